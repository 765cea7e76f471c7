//! Kernel interfaces that [sealmount] needs and [rustix] lacks:
//!
//! - loop devices, fs-verity, `mount_setattr`, `statmount`, namespaces of a single thread
//! - `AT_SECURE`, the page size, `sysinfo`, a resource limit, the current CPU
//! - a mapping of a sealed memfd
//! - swap areas, and ptrace on aarch64, for the tests of sealmount
//! - SHA-256 and SHA-512 of several blocks at a time
//!
//! Each function except the hashes and the mapping makes one system call. The function is safe to call with
//! any argument, and returns the kernel's errno unchanged. This crate holds all `unsafe` code of the
//! project. The API follows the needs of sealmount and may change with each version.
//!
//! [sealmount]: https://docs.rs/sealmount
//! [rustix]: https://docs.rs/rustix

mod auxv;
mod cpu;
pub mod fsverity;
pub mod loop_device;
mod mount_setattr;
mod namespace;
#[cfg(target_arch = "aarch64")]
mod ptrace;
mod sealed_mapping;
pub mod sha256;
pub mod sha512;
mod statmount;
mod swap;
mod sysinfo;

pub use auxv::{is_secure_execution, page_size};
pub use cpu::current_cpu;
pub use mount_setattr::{mount_setattr_flags, mount_setattr_idmap, mount_setattr_private};
pub use namespace::{
    enter_mount_namespace, is_user_namespace, owner_of_namespace, unshare_mount_namespace,
    unshare_user_namespace, unshare_working_directory,
};
#[cfg(target_arch = "aarch64")]
pub use ptrace::set_traced_call;
pub use sealed_mapping::{SealedMapping, TMPFS_MAGIC};
pub use statmount::statmount_exists;
pub use swap::{swap_off, swap_on};
pub use sysinfo::{SystemMemory, file_size_limit, memory};
