//! The disk with the objects and the state of the deployments, in a private mount namespace.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxAttributes, StatxFlags,
    chmodat, fstatvfs, mkdirat, openat, openat2, statx,
};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MoveMountFlags, move_mount};
use sealmount_sys::mount_setattr_flags;

use crate::boot::error::SetupError;
use crate::digest::Digest;
use crate::kernel::fs_context::FsContext;
use crate::kernel::private_namespace::open_recursive_clone;
use crate::kernel::{KernelError, Operation};

/// The directory of the images, below the root of the disk. An image has the name of its digest.
pub(crate) const IMAGES: &str = "composefs/images";
/// The directory of the objects, below the root of the disk.
pub(crate) const OBJECTS: &str = "composefs/objects";
/// The directory of the deployments, below the root of the disk.
const DEPLOYMENTS: &str = "state/deploy";

/// The file system of the disk. Its mount is a clone, attached on top of the original in a private mount
/// namespace. The original stays as it is.
pub(crate) struct Disk {
    root: OwnedFd,
    path: PathBuf,
    /// Whether a disk is mounted on the path. Otherwise the path is a directory of the initramfs.
    is_mounted: bool,
}

impl Disk {
    /// Opens the disk that is mounted on a directory. Changes the mount namespace of the thread.
    ///
    /// The clone can be written to, even if the original mount is read-only.
    pub fn open(path: &Path) -> Result<Disk, SetupError> {
        let failed = |operation, errno| KernelError::new(operation, errno).on(path);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match openat(CWD, path, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Err(SetupError::DiskMissing { sysroot: path.to_owned() }),
            result => result.map_err(|errno| failed(Operation::StatDirectory, errno))?,
        };
        let is_mounted =
            is_mount_root(&directory).map_err(|errno| failed(Operation::StatDirectory, errno))?;
        let root = open_recursive_clone(&directory)
            .map_err(|errno| failed(Operation::CloneTree, errno))?;
        mount_setattr_flags(&root, 0, MountAttrFlags::MOUNT_ATTR_RDONLY.bits())
            .map_err(|errno| failed(Operation::ChangeAttributes, errno))?;
        move_mount(&root, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(|errno| failed(Operation::AttachDirectory, errno))?;
        Ok(Disk { root, path: path.to_owned(), is_mounted })
    }

    /// Opens the object directory.
    pub fn objects(&self, path: Option<&Path>) -> Result<OwnedFd, SetupError> {
        let path = path.unwrap_or(Path::new(OBJECTS));
        match self.open_directory(path) {
            Err(Errno::NOENT | Errno::NOTDIR) if !self.is_mounted => {
                Err(SetupError::DiskMissing { sysroot: self.path.clone() })
            }
            Err(Errno::NOENT | Errno::NOTDIR) => {
                Err(SetupError::ObjectsMissing { path: self.shown(path) })
            }
            result => {
                result.map_err(|errno| self.failed(Operation::StatDirectory, path, errno).into())
            }
        }
    }

    /// Opens the image with a digest, or returns `None` if the disk has no such image.
    pub fn image(&self, digest: &Digest) -> Result<Option<OwnedFd>, SetupError> {
        let path = Path::new(IMAGES).join(digest.to_string());
        // Without O_NONBLOCK, a FIFO would block.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        match self.open_below(&path, flags) {
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(self.failed(Operation::OpenImage, &path, errno).into()),
            Ok(image) => Ok(Some(image)),
        }
    }

    /// Returns the path of the directory of the images, for messages.
    pub fn images(&self) -> PathBuf {
        self.path.join(IMAGES)
    }

    /// Clones the mount of the disk, with all mounts below it. The clone is detached.
    pub fn clone_mount(&self) -> Result<OwnedFd, KernelError> {
        open_recursive_clone(&self.root)
            .map_err(|errno| KernelError::new(Operation::CloneTree, errno).on(&self.path))
    }

    /// Makes the file system writable, if it is read-only. Many systems mount the disk read-only at first.
    pub fn make_writable(&self) -> Result<(), KernelError> {
        let statvfs = fstatvfs(&self.root)
            .map_err(|errno| KernelError::new(Operation::StatDirectory, errno).on(&self.path))?;
        if !statvfs.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Ok(());
        }
        let context = FsContext::pick("the disk", &self.root)?.for_image(&self.path);
        context.set_flag("rw")?;
        context.reconfigure(Operation::ChangeSuperblock)
    }

    fn open_directory(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.open_below(path, OFlags::PATH | OFlags::DIRECTORY)
    }

    /// Opens a path below the root of the disk. Symbolic links lead to files of the disk.
    fn open_below(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// Returns the path of a file of the disk, for messages.
    fn shown(&self, path: &Path) -> PathBuf {
        self.path.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn failed(&self, operation: Operation, path: &Path, errno: Errno) -> KernelError {
        KernelError::new(operation, errno).on(self.shown(path))
    }
}

/// The state of one deployment on the disk: the changes of /etc, and /var.
pub(crate) struct Deployment<'a> {
    disk: &'a Disk,
    path: PathBuf,
}

/// The directories of a layer that receives changes.
pub(crate) struct LayerDirectories {
    pub upperdir: PathBuf,
    pub workdir: PathBuf,
}

impl<'a> Deployment<'a> {
    /// Returns the deployment of an image. Opens nothing.
    pub fn new(disk: &'a Disk, digest: &Digest) -> Deployment<'a> {
        Deployment { disk, path: Path::new(DEPLOYMENTS).join(digest.to_string()) }
    }

    /// Opens a directory.
    pub fn directory(&self, name: &str) -> Result<OwnedFd, SetupError> {
        self.open(&self.path.join(name))
    }

    /// Makes the directories of a layer, if they are missing, and returns their paths.
    ///
    /// The root directory of the overlay has the mode of `upperdir`. With another mode than 0755, only root
    /// could use the overlay.
    pub fn layer(&self, name: &str) -> Result<LayerDirectories, SetupError> {
        let parent = self.open(&self.path)?;
        self.make(&parent, name, 0o755)?;
        let path = self.path.join(name);
        let directory = self.open(&path)?;
        self.make(&directory, "upper", 0o755)?;
        self.make(&directory, "work", 0o700)?;
        let path = self.disk.shown(&path);
        Ok(LayerDirectories { upperdir: path.join("upper"), workdir: path.join("work") })
    }

    fn open(&self, path: &Path) -> Result<OwnedFd, SetupError> {
        match self.disk.open_directory(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => {
                Err(SetupError::StateMissing { path: self.disk.shown(path) })
            }
            result => result.map_err(|errno| {
                SetupError::from(self.disk.failed(Operation::OpenState, path, errno))
            }),
        }
    }

    fn make(&self, parent: &OwnedFd, name: &str, mode: u32) -> Result<(), SetupError> {
        let mode = Mode::from_raw_mode(mode);
        // The umask of the process does not count.
        let made = mkdirat(parent, name, mode)
            .and_then(|()| chmodat(parent, name, mode, AtFlags::empty()));
        match made {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => {
                let path = self.path.join(name);
                Err(self.disk.failed(Operation::OpenState, &path, errno).into())
            }
        }
    }
}

/// Returns whether a directory is the root of a mount.
pub(crate) fn is_mount_root(directory: &OwnedFd) -> Result<bool, Errno> {
    let statx = statx(directory, "", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    Ok(statx.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}
