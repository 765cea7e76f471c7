//! [namespaces(7)](https://man7.org/linux/man-pages/man7/namespaces.7.html)

use std::ffi::c_void;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::CLONE_NEWUSER;
use linux_raw_sys::ioctl::{NS_GET_NSTYPE, NS_GET_USERNS};
use rustix::io;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// Gives the calling thread alone a mount namespace, a copy of its old one, and a working directory of its
/// own ([unshare(2)] with `CLONE_NEWNS`).
///
/// Threads and processes that this thread starts later inherit both. The namespace and its mounts end with
/// the last thread and descriptor of the namespace.
///
/// # Errors
///
/// `EPERM`: `CAP_SYS_ADMIN` is missing.
///
/// [unshare(2)]: https://man7.org/linux/man-pages/man2/unshare.2.html
pub fn unshare_mount_namespace() -> io::Result<()> {
    // SAFETY: only CLONE_FILES makes unshare unsafe, and it is not used.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
}

/// Gives the calling thread a working directory, a root directory and a umask of its own ([unshare(2)] with
/// `CLONE_FS`).
///
/// # Errors
///
/// `ENOMEM`: the kernel has no memory.
///
/// [unshare(2)]: https://man7.org/linux/man-pages/man2/unshare.2.html
pub fn unshare_working_directory() -> io::Result<()> {
    // SAFETY: as above.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
}

/// Gives the calling thread, which must be the only one of its process, a user namespace without a mapping
/// ([unshare(2)] with `CLONE_NEWUSER`).
///
/// # Errors
///
/// `EINVAL`: the process has more than one thread.
///
/// [unshare(2)]: https://man7.org/linux/man-pages/man2/unshare.2.html
pub fn unshare_user_namespace() -> io::Result<()> {
    // SAFETY: as above.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }
}

/// Enters a mount namespace with the calling thread ([setns(2)], Linux 3.8). The root and working directory
/// of the thread become the root of that namespace.
///
/// # Errors
///
/// `EINVAL`: `namespace` is not a mount namespace, or another thread shares the working directory.
///
/// [setns(2)]: https://man7.org/linux/man-pages/man2/setns.2.html
pub fn enter_mount_namespace(namespace: impl AsFd) -> io::Result<()> {
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
}

/// `NS_GET_NSTYPE` returns its result as the return value of ioctl(2).
struct NsType;

// SAFETY: NS_GET_NSTYPE has no argument and returns a CLONE_NEW* flag.
unsafe impl Ioctl for NsType {
    type Output = IoctlOutput;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        NS_GET_NSTYPE as Opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(nstype: IoctlOutput, _: *mut c_void) -> io::Result<IoctlOutput> {
        Ok(nstype)
    }
}

/// Returns whether a descriptor refers to a user namespace, such as /proc/PID/ns/user
/// ([ioctl_nsfs(2)](https://man7.org/linux/man-pages/man2/ioctl_nsfs.2.html), Linux 4.11).
pub fn is_user_namespace(file: impl AsFd) -> bool {
    // SAFETY: see NsType.
    let nstype = unsafe { ioctl(file, NsType) };
    nstype.is_ok_and(|nstype| nstype == CLONE_NEWUSER as IoctlOutput)
}

/// `NS_GET_USERNS` returns its result as the return value of ioctl(2).
struct Owner;

// SAFETY: NS_GET_USERNS has no argument and returns a new descriptor.
unsafe impl Ioctl for Owner {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        NS_GET_USERNS as Opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(descriptor: IoctlOutput, _: *mut c_void) -> io::Result<OwnedFd> {
        // SAFETY: the descriptor is new and has no other owner.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}

/// Opens the user namespace that owns a namespace, such as /proc/PID/ns/mnt
/// ([ioctl_nsfs(2)](https://man7.org/linux/man-pages/man2/ioctl_nsfs.2.html), Linux 4.9).
///
/// # Errors
///
/// `EPERM`: the user namespace is not the caller's own one or a descendant.
pub fn owner_of_namespace(namespace: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: see Owner.
    unsafe { ioctl(namespace, Owner) }
}
