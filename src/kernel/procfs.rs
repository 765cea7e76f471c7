//! A private procfs, attached nowhere.
//!
//! A descriptor has a path below /proc. But each mount namespace has its own /proc. With `-N`, or in a
//! chroot, /proc may be a directory whose `self/fd/3` is another file than the verified one. No process can
//! put a file in front of a private procfs (Linux 5.8). A private procfs also works where /proc is not
//! mounted. docs/design.md has its cost.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, PROC_SUPER_MAGIC, fstat, fstatfs, openat};
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

    /// Opens the user namespace of the calling thread.
    pub fn open_user_namespace(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        openat(&self.root, "thread-self/ns/user", flags, Mode::empty())
    }

    /// Opens the table of the mounts that the calling thread can reach.
    pub fn open_mount_table(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        openat(&self.root, "thread-self/mountinfo", flags, Mode::empty())
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

/// Reads a file of a procfs, in the private procfs or below /proc. Returns `None` if the file cannot be read
/// or is not on a procfs.
pub(crate) fn read_file(procfs: Option<&Procfs>, path: &str) -> Option<Vec<u8>> {
    // In a foreign mount namespace the path may lead to a FIFO, which must not block.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = open_file(procfs, path, flags)?;
    if fstatfs(&file).ok()?.f_type != PROC_SUPER_MAGIC {
        return None;
    }
    let mut content = Vec::new();
    File::from(file).read_to_end(&mut content).ok()?;
    Some(content)
}

/// Returns whether the process is in the first cgroup namespace of the system, as far as /proc can tell.
pub(crate) fn is_in_initial_cgroup_namespace(procfs: Option<&Procfs>) -> bool {
    /// PROC_CGROUP_INIT_INO of the kernel, since Linux 4.6.
    const INITIAL: u64 = 0xeffffffb;
    let file = open_file(procfs, "self/ns/cgroup", OFlags::PATH);
    file.and_then(|file| fstat(file).ok()).is_some_and(|stat| stat.st_ino == INITIAL)
}

fn open_file(procfs: Option<&Procfs>, path: &str, flags: OFlags) -> Option<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    match procfs {
        Some(procfs) => openat(&procfs.root, path, flags, Mode::empty()),
        None => openat(CWD, Path::new("/proc").join(path), flags, Mode::empty()),
    }
    .ok()
}

fn link_to(fd: impl AsFd) -> PathBuf {
    format!("thread-self/fd/{}", fd.as_fd().as_raw_fd()).into()
}
