//! The check of the permission to mount an EROFS, before an image is copied.

use rustix::io::Errno;

use crate::kernel::fs_context::FsContext;
use crate::kernel::{KernelError, Operation};

/// Checks that the process may mount an EROFS, and that the kernel has EROFS. The check needs only some
/// microseconds, so it can come before the copy of an image.
///
/// EROFS needs `CAP_SYS_ADMIN` in the initial user namespace. The check makes a superblock without a source
/// (`FSCONFIG_CMD_CREATE` of [fsconfig(2)](https://man7.org/linux/man-pages/man2/fsconfig.2.html), Linux
/// 5.2). The kernel checks the capability before it looks for the source.
///
/// # Errors
///
/// `EPERM` or `EACCES` if the permission is missing, `ENOSYS` if a seccomp filter denies fsconfig(2),
/// `ENODEV` if the kernel has no EROFS.
pub fn check_permission() -> Result<(), KernelError> {
    let context = FsContext::open("erofs").map_err(|error| match error.errno {
        Errno::PERM | Errno::ACCESS => denied(error.errno),
        _ => error,
    })?;
    match context.create() {
        // ENOSYS: a seccomp filter denied fsconfig(2).
        Err(error) if matches!(error.errno, Errno::PERM | Errno::ACCESS | Errno::NOSYS) => {
            Err(denied(error.errno))
        }
        // The source is missing, as expected.
        _ => Ok(()),
    }
}

fn denied(errno: Errno) -> KernelError {
    KernelError::new(Operation::CheckPermission, errno)
}
