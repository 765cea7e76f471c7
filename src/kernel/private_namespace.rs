//! Mount namespaces that no other process sees. A namespace and its mounts end with the last thread and
//! descriptor of the namespace, also if the process is killed.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, Mode, mkdirat};
use rustix::io::Errno;
use rustix::mount::{
    MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount,
};

use crate::kernel::error::{KernelError, Operation};
use crate::kernel::fs_context::FsContext;
use crate::kernel::procfs::Procfs;
use crate::kernel::thread::in_new_thread;

/// Runs `work` in a thread with a private mount namespace, which starts as a copy of the caller's namespace
/// ([unshare(2)](https://man7.org/linux/man-pages/man2/unshare.2.html)).
///
/// `work` gets `true` if the caller's paths still lead to the same files. In a chroot, the caller's root may
/// be a directory that is not the root of a mount. `work` then gets `false`, and the thread is at the root of
/// the namespace: [mount_setattr(2)](https://man7.org/linux/man-pages/man2/mount_setattr.2.html) (Linux 5.12)
/// needs the root of a mount.
pub(crate) fn in_private_namespace<T: Send>(
    work: impl FnOnce(bool) -> Result<T, KernelError> + Send,
) -> Result<T, KernelError> {
    let failed = |errno| KernelError::new(Operation::PrivateNamespace, errno);
    in_new_thread(|| {
        sealmount_sys::unshare_mount_namespace().map_err(failed)?;
        // Without this, attached mounts would propagate to the original namespace.
        match sealmount_sys::mount_setattr_private() {
            Err(Errno::INVAL) => {
                Procfs::require()?
                    .open_mount_namespace()
                    .and_then(sealmount_sys::enter_mount_namespace)
                    .and_then(|()| sealmount_sys::mount_setattr_private())
                    .map_err(failed)?;
                work(false)
            }
            result => {
                result.map_err(failed)?;
                work(true)
            }
        }
    })
}

/// Attaches a tmpfs on top of the root directory of a private namespace, and makes it the working directory
/// of the thread. Paths start below a mount on top of the root directory, so they still lead to the same
/// files.
pub(crate) fn enter_scratch(operation: Operation) -> Result<(), KernelError> {
    let failed = |errno| KernelError::new(operation, errno);
    let context = FsContext::open("tmpfs")?;
    context.create()?;
    let scratch = context.mount(MountAttrFlags::empty())?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&scratch, "", CWD, "/", flags).map_err(failed)?;
    rustix::process::fchdir(&scratch).map_err(failed)
}

/// Attaches a detached mount to a new directory of the scratch.
pub(crate) fn attach_in_scratch(directory: &str, mount: impl AsFd) -> Result<(), Errno> {
    mkdirat(CWD, directory, Mode::RWXU)?;
    move_mount(mount, "", CWD, directory, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// A private mount namespace with one mount in it, kept by a descriptor.
///
/// Before Linux 6.15 only a mount that is attached in the caller's namespace can be cloned.
#[derive(Debug)]
pub(crate) struct CloneNamespace {
    namespace: OwnedFd,
}

impl CloneNamespace {
    /// Attaches a detached mount as the root of a new namespace.
    ///
    /// All other mounts are removed from the namespace, so that the namespace keeps no other file system
    /// busy. On the rootfs of an initramfs,
    /// [pivot_root(2)](https://man7.org/linux/man-pages/man2/pivot_root.2.html) fails with EINVAL. The mount
    /// then stays detached.
    pub fn with_root(mount: impl AsFd + Sync) -> Result<CloneNamespace, KernelError> {
        in_private_namespace(|_| {
            let failed = |errno| KernelError::new(Operation::CloneMount, errno);
            let namespace = Procfs::require()?.open_mount_namespace().map_err(failed)?;
            // A mount that was attached in a namespace cannot be attached again after the namespace has
            // ended. So the steps that may fail use a scratch mount.
            enter_scratch(Operation::CloneMount)?;
            // pivot_root(2): with "." twice the old root lies on top of the new one.
            rustix::process::pivot_root(".", ".").map_err(failed)?;
            unmount(".", UnmountFlags::DETACH).map_err(failed)?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            move_mount(&mount, "", CWD, "/", flags).map_err(failed)?;
            Ok(CloneNamespace { namespace })
        })
    }

    /// Clones the mount. The clone is detached.
    pub fn clone_mount(&self, mount: impl AsFd + Sync) -> Result<OwnedFd, KernelError> {
        let failed = |errno| KernelError::new(Operation::CloneMount, errno);
        in_new_thread(|| {
            sealmount_sys::unshare_working_directory().map_err(failed)?;
            sealmount_sys::enter_mount_namespace(&self.namespace).map_err(failed)?;
            open_clone(&mount).map_err(failed)
        })
    }
}

/// Clones a mount with [open_tree(2)](https://man7.org/linux/man-pages/man2/open_tree.2.html). The clone
/// is detached.
pub(crate) fn open_clone(mount: impl AsFd) -> Result<OwnedFd, Errno> {
    open_clone_with(mount, OpenTreeFlags::empty())
}

/// Clones a mount and all mounts below it. The clone is detached.
#[cfg(feature = "boot")]
pub(crate) fn open_recursive_clone(mount: impl AsFd) -> Result<OwnedFd, Errno> {
    open_clone_with(mount, OpenTreeFlags::AT_RECURSIVE)
}

fn open_clone_with(mount: impl AsFd, more: OpenTreeFlags) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(mount, "", flags | more)
}
