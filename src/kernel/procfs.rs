//! A private procfs, attached nowhere.
//!
//! A descriptor has a path below /proc. But each mount namespace has its own /proc. With `-N`, or in a
//! chroot, /proc may be a directory whose `self/fd/3` is another file than the verified one. No process can
//! put a file in front of a private procfs (Linux 5.8). A private procfs also works where /proc is not
//! mounted. docs/design.md has its cost.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::kernel::error::{KernelError, Operation};
use crate::kernel::fs_context::FsContext;
use crate::kernel::thread::in_new_thread;

/// A detached mount of procfs.
#[derive(Debug)]
pub(crate) struct Procfs {
    root: OwnedFd,
}

impl Procfs {
    /// Mounts a procfs. Returns `None` if the kernel has no procfs.
    ///
    /// EPERM and EACCES are errors: a policy that denies this mount denies the other mounts too.
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

    /// Mounts a procfs. Fails with ENODEV if the kernel has no procfs.
    pub fn require() -> Result<Procfs, KernelError> {
        let missing = || KernelError::new(Operation::OpenFileSystem, Errno::NODEV).on("proc");
        Procfs::open()?.ok_or_else(missing)
    }

    /// Opens the file of a descriptor once more, with other flags.
    pub fn reopen(&self, fd: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        openat(&self.root, link_to(fd), flags, Mode::empty())
    }

    /// Opens the mount namespace of the calling thread.
    pub fn open_mount_namespace(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        openat(&self.root, "thread-self/ns/mnt", flags, Mode::empty())
    }

    /// Runs `work` with a path that leads to the file of a descriptor.
    ///
    /// The path is relative to this procfs, which is the working directory of the thread that runs
    /// `work`, and of no other thread.
    pub fn with_fd_path<T: Send>(
        &self,
        fd: impl AsFd,
        work: impl FnOnce(&Path) -> Result<T, KernelError> + Send,
    ) -> Result<T, KernelError> {
        let link = link_to(fd);
        in_new_thread(|| {
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
