//! A file or directory, given by path or by descriptor.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::error::{DirectoryRole, Error};

/// A file or directory, given by path or by an open descriptor.
///
/// A directory's descriptor may be opened with `O_PATH`; an image's must be readable. Clones share
/// the descriptor.
#[derive(Clone, Debug)]
pub enum Location {
    /// A path, taken from the working directory where it is relative. Symbolic links are followed,
    /// as mount(8) does.
    Path(PathBuf),
    /// An open file or directory.
    Fd(Arc<OwnedFd>),
}

impl Location {
    /// Opens a directory with `O_PATH`: enough to name it to the kernel, and no permission to read
    /// it is needed.
    pub(crate) fn open_directory(&self, role: DirectoryRole) -> Result<OwnedFd, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = match self {
            Location::Path(path) => openat(CWD, path, flags, Mode::empty()),
            // Also finds out that it is a directory. It stays the same open directory: "." of a
            // mount's root is not followed to what is mounted on top.
            Location::Fd(fd) => openat(fd, ".", flags, Mode::empty()),
        };
        opened.map_err(|errno| Error::Directory { role, path: self.name(), errno })
    }

    /// How messages call it: the path it was given by; of a descriptor, the one that the kernel knows,
    /// or that under /proc.
    pub(crate) fn name(&self) -> PathBuf {
        match self {
            Location::Path(path) => path.clone(),
            Location::Fd(fd) => self.absolute_path().unwrap_or_else(|| proc_fd_path(fd)),
        }
    }

    /// The path that leads to it from the root directory: the one it was given by, or the one that
    /// the kernel knows for the descriptor, which may be out of date or out of reach.
    pub(crate) fn absolute_path(&self) -> Option<PathBuf> {
        match self {
            Location::Path(path) => std::path::absolute(path).ok(),
            Location::Fd(fd) => std::fs::read_link(proc_fd_path(fd)).ok(),
        }
    }
}

/// The path of an open file of this process, as long as it stays open.
pub(crate) fn proc_fd_path(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// Whether two descriptors are of the same file or directory.
pub(crate) fn is_same_file(one: impl AsFd, other: impl AsFd) -> Result<bool, Errno> {
    let (one, other) = (rustix::fs::fstat(one)?, rustix::fs::fstat(other)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

impl PartialEq for Location {
    fn eq(&self, other: &Location) -> bool {
        match (self, other) {
            (Location::Path(one), Location::Path(other)) => one.as_os_str() == other.as_os_str(),
            (Location::Fd(one), Location::Fd(other)) => one.as_raw_fd() == other.as_raw_fd(),
            _ => false,
        }
    }
}

impl Eq for Location {}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().display().fmt(f)
    }
}

impl From<PathBuf> for Location {
    fn from(path: PathBuf) -> Location {
        Location::Path(path)
    }
}

impl From<&PathBuf> for Location {
    fn from(path: &PathBuf) -> Location {
        Location::Path(path.clone())
    }
}

impl From<&Path> for Location {
    fn from(path: &Path) -> Location {
        Location::Path(path.to_owned())
    }
}

impl From<OsString> for Location {
    fn from(path: OsString) -> Location {
        Location::Path(path.into())
    }
}

impl From<&Location> for Location {
    fn from(location: &Location) -> Location {
        location.clone()
    }
}

impl From<&OsStr> for Location {
    fn from(path: &OsStr) -> Location {
        Location::Path(path.into())
    }
}

impl From<&str> for Location {
    fn from(path: &str) -> Location {
        Location::Path(path.into())
    }
}

impl From<String> for Location {
    fn from(path: String) -> Location {
        Location::Path(path.into())
    }
}

impl From<OwnedFd> for Location {
    fn from(fd: OwnedFd) -> Location {
        Location::Fd(Arc::new(fd))
    }
}

impl From<File> for Location {
    fn from(file: File) -> Location {
        OwnedFd::from(file).into()
    }
}
