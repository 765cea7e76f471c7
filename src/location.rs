//! A file or directory, given by path or by descriptor.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::kernel::{ErrorKind, Hint, KernelError, Operation, errno_text};
use crate::util::text::shown;

/// A file or directory, given by path or by an open descriptor.
///
/// The descriptor of a directory may be opened with `O_PATH`
/// ([open(2)](https://man7.org/linux/man-pages/man2/open.2.html)). The descriptor of an image must be
/// readable. Clones share the descriptor.
#[derive(Clone, Debug)]
pub enum Location {
    /// A path. A relative path starts at the working directory. Symbolic links are followed, as by
    /// mount(8).
    Path(PathBuf),
    /// An open file or directory.
    Fd(Arc<OwnedFd>),
}

impl Location {
    /// Opens a directory with `O_PATH`, which needs no permission to read the directory.
    pub(crate) fn open_directory(&self, role: DirectoryRole) -> Result<OwnedFd, DirectoryError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = match self {
            Location::Path(path) => openat(CWD, path, flags, Mode::empty()),
            // Opening "." also checks that the descriptor is a directory. At the root of a mount, "." does
            // not lead to a mount on top of that root.
            Location::Fd(fd) => openat(fd, ".", flags, Mode::empty()),
        };
        opened.map_err(|errno| DirectoryError {
            role,
            path: self.display_path(),
            errno,
            source: errno.into(),
        })
    }

    /// Returns the path for messages: the given path, or, for a descriptor, the path that the kernel
    /// knows or the path below /proc.
    pub(crate) fn display_path(&self) -> PathBuf {
        match self {
            Location::Path(path) => path.clone(),
            Location::Fd(fd) => self.absolute_path().unwrap_or_else(|| proc_fd_path(fd)),
        }
    }

    /// Returns the absolute path. For a descriptor, it is the path that the kernel knows, which may be out of
    /// date or out of reach.
    pub(crate) fn absolute_path(&self) -> Option<PathBuf> {
        match self {
            Location::Path(path) => std::path::absolute(path).ok(),
            Location::Fd(fd) => std::fs::read_link(proc_fd_path(fd)).ok(),
        }
    }
}

/// Returns the path of an open descriptor of this process.
pub(crate) fn proc_fd_path(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// Returns whether two descriptors refer to the same file or directory.
pub(crate) fn is_same_file(one: impl AsFd, other: impl AsFd) -> Result<bool, Errno> {
    let (one, other) = (rustix::fs::fstat(one)?, rustix::fs::fstat(other)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

/// The purpose of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirectoryRole {
    /// An object directory: one of `basedir=`.
    Objects,
    /// The directory that receives changes: `upperdir=`.
    Upper,
    /// The directory for overlayfs itself: `workdir=`.
    Work,
    /// The directory that a mount is attached to.
    MountPoint,
}

impl fmt::Display for DirectoryRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DirectoryRole::Objects => "object directory",
            DirectoryRole::Upper => "upperdir",
            DirectoryRole::Work => "workdir",
            DirectoryRole::MountPoint => "mount point",
        })
    }
}

/// A directory that cannot be opened: it is missing, not a directory, or out of reach.
#[derive(Debug)]
pub struct DirectoryError {
    role: DirectoryRole,
    path: PathBuf,
    errno: Errno,
    /// The errno as a standard error, for `Error::source`.
    source: std::io::Error,
}

impl DirectoryError {
    /// Returns the purpose of the directory.
    pub fn role(&self) -> DirectoryRole {
        self.role
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the errno of open(2): `ENOENT`, `ENOTDIR`, `EACCES`, …
    pub fn raw_os_error(&self) -> i32 {
        self.errno.raw_os_error()
    }

    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        KernelError::new(Operation::StatDirectory, self.errno).kind()
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        match (self.role, self.errno) {
            (DirectoryRole::MountPoint, Errno::NOENT) => {
                Some(Hint::new("make the directory first"))
            }
            _ => None,
        }
    }
}

impl fmt::Display for DirectoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cause = errno_text(self.errno);
        write!(f, "{} {}: cannot open the directory: {cause}", self.role, shown(&self.path))
    }
}

impl std::error::Error for DirectoryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
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
        shown(&self.display_path()).fmt(f)
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

impl From<&String> for Location {
    fn from(path: &String) -> Location {
        Location::Path(path.into())
    }
}

impl From<Arc<OwnedFd>> for Location {
    fn from(fd: Arc<OwnedFd>) -> Location {
        Location::Fd(fd)
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
