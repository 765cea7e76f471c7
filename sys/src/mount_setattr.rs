//! [mount_setattr(2)](https://man7.org/linux/man-pages/man2/mount_setattr.2.html) (Linux 5.12).

use std::ffi::{CStr, c_char, c_int, c_long, c_uint};
use std::os::fd::{AsFd, AsRawFd};

use linux_raw_sys::general::{
    __NR_mount_setattr, AT_EMPTY_PATH, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_IDMAP, MS_PRIVATE,
    mount_attr,
};
use rustix::io;

unsafe extern "C" {
    /// syscall(2) of the C library, which std links anyway. Neither rustix nor the C library wraps
    /// mount_setattr.
    fn syscall(number: c_long, ...) -> c_long;
}

fn mount_setattr(dirfd: c_int, path: &CStr, flags: c_uint, attr: &mount_attr) -> io::Result<()> {
    // SAFETY: the arguments have the types of mount_setattr(2). The kernel reads the path up to its NUL
    // and size_of::<mount_attr>() bytes of the attributes, and writes nothing.
    let result = unsafe {
        syscall(
            __NR_mount_setattr as c_long,
            dirfd,
            path.as_ptr() as *const c_char,
            flags,
            attr as *const mount_attr,
            size_of::<mount_attr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => {
            Err(io::Errno::from_io_error(&std::io::Error::last_os_error())
                .unwrap_or(io::Errno::INVAL))
        }
    }
}

/// Gives a detached mount the mapping of a user namespace (`MOUNT_ATTR_IDMAP`; EROFS supports it from Linux
/// 5.19).
///
/// # Errors
///
/// `EINVAL`: the file system does not support idmapped mounts, or the mount was attached before. `EPERM`: the
/// namespace is the initial one, or the caller lacks `CAP_SYS_ADMIN`.
pub fn mount_setattr_idmap(mount: impl AsFd, user_namespace: impl AsFd) -> io::Result<()> {
    let attr = mount_attr {
        attr_set: u64::from(MOUNT_ATTR_IDMAP),
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(user_namespace.as_fd().as_raw_fd())
            .map_err(|_| io::Errno::BADF)?,
    };
    mount_setattr(mount.as_fd().as_raw_fd(), c"", AT_EMPTY_PATH, &attr)
}

/// Sets and clears attributes of an attached mount (`MOUNT_ATTR_*`). The kernel changes all of them or none.
///
/// # Errors
///
/// - `EBUSY`: the call makes the mount read-only, and a file of the mount is open for writing.
/// - `EPERM`: the caller lacks `CAP_SYS_ADMIN`, or the mount namespace locks an attribute.
/// - `EINVAL`: the mount is not in the mount namespace of the caller.
pub fn mount_setattr_flags(mount: impl AsFd, set: u32, clear: u32) -> io::Result<()> {
    let attr = mount_attr {
        attr_set: u64::from(set),
        attr_clr: u64::from(clear),
        propagation: 0,
        userns_fd: 0,
    };
    mount_setattr(mount.as_fd().as_raw_fd(), c"", AT_EMPTY_PATH, &attr)
}

/// Makes every mount of the calling thread's mount namespace private: mounts propagate neither out of the
/// namespace nor into it.
///
/// # Errors
///
/// `EINVAL`: the root directory of the thread is not the root of a mount. `EPERM`: `CAP_SYS_ADMIN` is missing.
pub fn mount_setattr_private() -> io::Result<()> {
    let attr =
        mount_attr { attr_set: 0, attr_clr: 0, propagation: u64::from(MS_PRIVATE), userns_fd: 0 };
    mount_setattr(AT_FDCWD, c"/", AT_RECURSIVE, &attr)
}
