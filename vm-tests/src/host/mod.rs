//! The host side: from a list of scenarios to the result of each on each kernel.

mod accelerator;
mod apt;
pub mod composefs;
mod cpio;
mod disks;
mod initramfs;
pub mod kernels;
mod lab;
mod modules;
mod monitor;
pub mod qemu;
mod say;
pub mod suite;

pub use lab::Lab;
