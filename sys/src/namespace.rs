//! [namespaces(7)](https://man7.org/linux/man-pages/man7/namespaces.7.html)

use std::ffi::c_void;
use std::os::fd::AsFd;

use linux_raw_sys::general::CLONE_NEWUSER;
use linux_raw_sys::ioctl::NS_GET_NSTYPE;
use rustix::io;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// [unshare(2)] with `CLONE_NEWNS`: the calling thread, and no other, gets a mount namespace of its
/// own, a copy of the one it was in, and a working directory of its own.
///
/// Threads and processes that it starts from then on inherit both. The namespace goes, with all
/// that is mounted in it, when the last of them ends.
///
/// [unshare(2)]: https://man7.org/linux/man-pages/man2/unshare.2.html
pub fn unshare_mount_namespace() -> io::Result<()> {
    // SAFETY: what is unsafe about unshare is CLONE_FILES, which is not used.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
}

/// [unshare(2)] with `CLONE_FS`: the working directory, the root and the umask of the calling thread are
/// no longer those of the threads that it shared them with.
///
/// [unshare(2)]: https://man7.org/linux/man-pages/man2/unshare.2.html
pub fn unshare_working_directory() -> io::Result<()> {
    // SAFETY: as above.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
}

/// [unshare(2)] with `CLONE_NEWUSER`: the calling thread, the only one of its process, gets a user
/// namespace of its own, with no mapping yet.
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

/// [setns(2)]: the calling thread enters a mount namespace; its root and working directory become
/// the root of that namespace.
///
/// # Errors
///
/// `EINVAL`: `namespace` is not a mount namespace, or the process has more than one thread that
/// share a working directory.
///
/// [setns(2)]: https://man7.org/linux/man-pages/man2/setns.2.html
pub fn enter_mount_namespace(namespace: impl AsFd) -> io::Result<()> {
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
}

/// `NS_GET_NSTYPE` answers with the return value of ioctl(2).
struct NsType;

// SAFETY: NS_GET_NSTYPE takes no argument and answers with a CLONE_NEW* flag.
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

/// Whether a descriptor is that of a user namespace, such as /proc/PID/ns/user
/// ([ioctl_nsfs(2)](https://man7.org/linux/man-pages/man2/ioctl_nsfs.2.html), Linux 4.11).
pub fn is_user_namespace(file: impl AsFd) -> bool {
    // SAFETY: see NsType.
    let nstype = unsafe { ioctl(file, NsType) };
    nstype.is_ok_and(|nstype| nstype == CLONE_NEWUSER as IoctlOutput)
}
