//! A procfs of our own, attached nowhere.
//!
//! By its links a descriptor gets a name. What lies at /proc is whatever the mount namespace has there,
//! and with `-N`, or in a chroot, that may be somebody else's: a directory whose `self/fd/3` is another
//! file than the one that was verified. In front of this one nobody can put anything, and it is there
//! where /proc is not mounted. docs/design.md says when it is worth its time.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::error::{KernelError, Operation};
use crate::fs_context::FsContext;
use crate::thread::in_thread;

/// A detached mount of procfs.
#[derive(Debug)]
pub(crate) struct Procfs {
    root: OwnedFd,
}

impl Procfs {
    /// `None`: the kernel has no procfs.
    ///
    /// What refuses this one mount (EPERM, EACCES) refuses the others too, or means to.
    pub fn open() -> Result<Option<Procfs>, KernelError> {
        let context = match FsContext::open("proc") {
            Err(error) if error.errno == Errno::NODEV => return Ok(None),
            context => context?,
        };
        context.create()?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        Ok(Some(Procfs { root: context.mount(attributes)? }))
    }

    /// As [`open`](Self::open), where there is no other way.
    pub fn require() -> Result<Procfs, KernelError> {
        let missing = || KernelError::new(Operation::OpenFileSystem, Errno::NODEV).on("proc");
        Procfs::open()?.ok_or_else(missing)
    }

    /// Opens what a descriptor is of once more, in another way.
    pub fn reopen(&self, fd: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        openat(&self.root, link_to(fd), flags, Mode::empty())
    }

    /// Opens the mount namespace of the calling thread.
    pub fn open_mount_namespace(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        openat(&self.root, "thread-self/ns/mnt", flags, Mode::empty())
    }

    /// Runs `work` with a name of what a descriptor is of.
    ///
    /// The name is relative to this procfs, which is the working directory of the thread that `work`
    /// runs in, and of no other.
    pub fn with_name<T: Send>(
        &self,
        fd: impl AsFd,
        work: impl FnOnce(&Path) -> Result<T, KernelError> + Send,
    ) -> Result<T, KernelError> {
        let link = link_to(fd);
        in_thread(|| {
            sealmount_sys::unshare_working_directory()
                .and_then(|()| rustix::process::fchdir(&self.root))
                .map_err(|errno| KernelError::new(Operation::EnterProcfs, errno))?;
            work(&link)
        })
    }
}

fn link_to(fd: impl AsFd) -> PathBuf {
    format!("thread-self/fd/{}", fd.as_fd().as_raw_fd()).into()
}
