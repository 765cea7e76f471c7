//! Kernel interfaces that [sealmount] needs and [rustix] lacks: loop devices, fs-verity,
//! `mount_setattr`, namespaces of a single thread, `AT_SECURE`, `sysinfo`, a resource limit, the current
//! processor; and swap areas, for its tests.
//!
//! And SHA-256 and SHA-512 of several blocks at a time.
//!
//! Every other function is one system call, safe to call with any argument, and answers with the
//! kernel's errno unchanged. This is the only crate of the project that holds `unsafe` code.
//!
//! [sealmount]: https://docs.rs/sealmount
//! [rustix]: https://docs.rs/rustix

mod auxv;
pub mod fsverity;
pub mod loop_device;
mod mount_setattr;
mod namespace;
mod processor;
pub mod sha256;
pub mod sha512;
mod swap;
mod sysinfo;

pub use auxv::is_secure_execution;
pub use mount_setattr::{mount_setattr_idmap, mount_setattr_private};
pub use namespace::{
    enter_mount_namespace, is_user_namespace, unshare_mount_namespace, unshare_user_namespace,
    unshare_working_directory,
};
pub use processor::current_processor;
pub use swap::{swap_off, swap_on};
pub use sysinfo::{Memory, file_size_limit, memory};
