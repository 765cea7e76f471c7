//! A detached mount that can be cloned.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;

use crate::kernel::error::{KernelError, Operation};
use crate::kernel::private_namespace::{CloneNamespace, open_clone};

/// A mount that is attached nowhere, or only in a private namespace of its own. Dropping the value unmounts
/// the mount.
#[derive(Debug)]
pub(crate) struct Mount {
    fd: OwnedFd,
    /// The namespace that the mount was attached in to be cloned, before Linux 6.15.
    namespace: Mutex<Option<CloneNamespace>>,
}

impl Mount {
    pub fn new(fd: OwnedFd) -> Mount {
        Mount { fd, namespace: Mutex::new(None) }
    }

    /// Clones the mount without attaching it (Linux 6.15). An older kernel fails with EINVAL.
    pub fn clone_detached(&self) -> Result<Mount, Errno> {
        open_clone(&self.fd).map(Mount::new)
    }

    /// Clones the mount after attaching it in a private namespace, which stays with this value.
    pub fn clone_attached(&self) -> Result<Mount, KernelError> {
        let mut namespace = self.namespace.lock().unwrap_or_else(PoisonError::into_inner);
        let namespace = match &mut *namespace {
            Some(namespace) => namespace,
            none => none.insert(CloneNamespace::with_root(&self.fd)?),
        };
        namespace.clone_mount(&self.fd).map(Mount::new)
    }

    /// Clones the mount by the first method that the kernel supports.
    pub fn try_clone(&self) -> Result<Mount, KernelError> {
        match self.clone_detached() {
            // Linux < 6.15
            Err(Errno::INVAL) => self.clone_attached(),
            result => result.map_err(|errno| KernelError::new(Operation::CloneMount, errno)),
        }
    }

    /// Returns a detached mount: this one, or a clone if this one had to be attached. A failure returns the
    /// mount.
    pub fn into_fd(self) -> Result<OwnedFd, (Mount, KernelError)> {
        let namespace = self.namespace.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(namespace) = namespace else { return Ok(self.fd) };
        match namespace.clone_mount(&self.fd) {
            Ok(clone) => Ok(clone),
            Err(error) => {
                let mount = Mount { fd: self.fd, namespace: Mutex::new(Some(namespace)) };
                Err((mount, error))
            }
        }
    }
}

impl AsFd for Mount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{Mode, OFlags, fstat, openat};
    use rustix::mount::MountAttrFlags;

    use super::*;
    use crate::kernel::fs_context::FsContext;

    fn tmpfs() -> Mount {
        let context = FsContext::open("tmpfs").unwrap();
        context.create().unwrap();
        Mount::new(context.mount(MountAttrFlags::empty()).unwrap())
    }

    fn make_file(mount: &impl AsFd) {
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
        openat(mount, "file", flags, Mode::RWXU).unwrap();
    }

    fn device(mount: &impl AsFd) -> u64 {
        fstat(mount).unwrap().st_dev
    }

    /// The method of kernels before 6.15 works on later kernels too.
    #[test]
    fn clones_of_attached_mount_share_its_superblock() {
        if !crate::may_mount() {
            return;
        }
        let mount = tmpfs();
        let clones = [mount.clone_attached().unwrap(), mount.clone_attached().unwrap()];
        make_file(&clones[0]);
        for clone in &clones {
            assert_eq!(device(clone), device(&mount));
            openat(clone, "file", OFlags::RDONLY, Mode::empty()).unwrap();
        }
        let expected = device(&mount);
        // The original is attached in its private namespace: a clone takes its place.
        let fd = mount.into_fd().unwrap();
        drop(clones);
        assert_eq!(device(&fd), expected);
        openat(&fd, "file", OFlags::RDONLY, Mode::empty()).unwrap();
    }
}
