//! Object directories, in which an object is found as overlayfs finds it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;

use crate::kernel::{KernelError, Operation};
use crate::objects::report::ObjectProblem;

/// Object directories, in the order of overlayfs.
pub(crate) struct Store<'a> {
    pub directories: Vec<BorrowedFd<'a>>,
}

/// An object that is a regular file.
pub(crate) struct Found<'a> {
    directory: BorrowedFd<'a>,
    object: &'a Path,
    /// The size, in bytes.
    pub size: u64,
}

impl Store<'_> {
    /// Finds an object: the first regular file, as overlayfs does. The object is not opened for reading.
    pub fn find<'b>(&'b self, object: &'b Path) -> Result<Found<'b>, ObjectProblem> {
        let mut problem = ObjectProblem::Missing;
        for directory in self.directories.iter().copied() {
            match size_of(directory, object) {
                Ok(size) => return Ok(Found { directory, object, size }),
                // The problem in the first directory that has the name is the best message.
                Err(other) => {
                    if let ObjectProblem::Missing = problem {
                        problem = other;
                    }
                }
            }
        }
        Err(problem)
    }
}

impl Found<'_> {
    /// Opens the object for reading.
    pub fn open(&self) -> Result<OwnedFd, ObjectProblem> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = resolve(self.directory, self.object, flags).map_err(unreadable)?;
        // Another file may have taken the place of the object meanwhile.
        match regular_size(&file)? == self.size {
            true => Ok(file),
            false => Err(ObjectProblem::Changed),
        }
    }
}

fn size_of(directory: BorrowedFd, object: &Path) -> Result<u64, ObjectProblem> {
    match resolve(directory, object, OFlags::PATH | OFlags::NOFOLLOW) {
        Ok(file) => regular_size(&file),
        Err(Errno::NOENT | Errno::NOTDIR) => Err(ObjectProblem::Missing),
        Err(Errno::LOOP) => Err(ObjectProblem::not_regular(FileType::Symlink)),
        Err(errno) => Err(unreadable(errno)),
    }
}

/// Opens an object with the rules of overlayfs: LOOKUP_BENEATH, LOOKUP_NO_SYMLINKS and LOOKUP_NO_XDEV.
fn resolve(directory: BorrowedFd, object: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(directory, object, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

fn regular_size(file: &OwnedFd) -> Result<u64, ObjectProblem> {
    let stat = fstat(file).map_err(unreadable)?;
    match FileType::from_raw_mode(stat.st_mode) {
        // The size of a regular file is not negative.
        FileType::RegularFile => Ok(stat.st_size as u64),
        other => Err(ObjectProblem::not_regular(other)),
    }
}

pub(crate) fn unreadable(errno: Errno) -> ObjectProblem {
    ObjectProblem::Unreadable(Box::new(KernelError::new(Operation::ReadObject, errno)))
}
