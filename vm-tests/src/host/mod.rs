//! The host side: runs a list of scenarios, and returns the result of each scenario on each kernel.

pub(crate) mod accelerator;
mod apt;
pub(crate) mod cpio;
mod disks;
mod initramfs;
pub mod kernels;
mod lab;
mod modules;
mod monitor;
mod packages;
pub mod qemu;
mod say;
pub mod suite;

pub use lab::Lab;
