//! The kernel interfaces of a mount, and the error of a system call that failed.

mod error;
mod fallback;
pub(crate) mod fs_context;
mod hint;
mod kind;
pub(crate) mod mount;
pub(crate) mod mount_table;
pub(crate) mod private_namespace;
pub(crate) mod procfs;
mod thread;

pub use error::{KernelError, Operation};
pub(crate) use error::{SELINUX_CONTEXTS, errno_text};
pub use fallback::Unsupported;
pub use hint::Hint;
pub use kind::ErrorKind;
