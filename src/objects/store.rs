//! The search for an object in the object directories, by the rules of overlayfs.

use std::ffi::OsStr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags, fstat, openat2, statx,
};
use rustix::io::Errno;

use crate::kernel::{KernelError, Operation};
use crate::objects::report::ObjectProblem;

/// Object directories, in the order of overlayfs.
pub(crate) struct Store<'a> {
    directories: Vec<Directory<'a>>,
}

/// An object directory.
struct Directory<'a> {
    fd: BorrowedFd<'a>,
    mount: u64,
    /// The subdirectories with a name of two hexadecimal digits that are known to be plain directories. An
    /// object in such a directory needs one statx(2) and no openat2(2).
    plain: [AtomicBool; 256],
}

/// An object that is a regular file.
pub(crate) struct Found<'a> {
    directory: BorrowedFd<'a>,
    /// The index of the directory.
    pub index: usize,
    object: &'a Path,
    /// The size, in bytes.
    pub size: u64,
}

/// The reason why no directory has a usable object.
pub(crate) struct NotFound {
    /// The index of the directory with the problem.
    pub index: usize,
    pub problem: ObjectProblem,
}

impl From<NotFound> for ObjectProblem {
    fn from(not_found: NotFound) -> ObjectProblem {
        not_found.problem
    }
}

impl<'a> Store<'a> {
    pub fn new(directories: impl Iterator<Item = BorrowedFd<'a>>) -> Result<Store<'a>, Errno> {
        let open = |fd| {
            let mount = statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id;
            Ok(Directory { fd, mount, plain: [const { AtomicBool::new(false) }; 256] })
        };
        Ok(Store { directories: directories.map(open).collect::<Result<_, Errno>>()? })
    }

    /// Finds an object: the first regular file in the order of the directories, as overlayfs does. Does not
    /// open the object for reading.
    pub fn find<'b>(&'b self, object: &'b Path) -> Result<Found<'b>, NotFound> {
        let mut not_found = NotFound { index: 0, problem: ObjectProblem::Missing };
        for (index, directory) in self.directories.iter().enumerate() {
            let size = match directory.quick_size_of(object) {
                Some(size) => Ok(size),
                None => size_of(directory.fd, object),
            };
            match size {
                Ok(size) => return Ok(Found { directory: directory.fd, index, object, size }),
                // If no directory has the object, the first other problem is the best message.
                Err(problem) => {
                    if let ObjectProblem::Missing = not_found.problem {
                        not_found = NotFound { index, problem };
                    }
                }
            }
        }
        Err(not_found)
    }
}

impl Directory<'_> {
    /// Returns the size of an object `ab/cdef…`, without opening the object. Returns `None` for any other
    /// path or file, and for an object behind a symbolic link or a mount.
    fn quick_size_of(&self, object: &Path) -> Option<u64> {
        let (prefix, name) = object.as_os_str().as_bytes().split_at_checked(2)?;
        if !name.starts_with(b"/") || name[1..].contains(&b'/') {
            return None;
        }
        let number = u8::from_str_radix(std::str::from_utf8(prefix).ok()?, 16).ok()?;
        let plain = &self.plain[usize::from(number)];
        // Two spellings of a number are two directories, so only lower case is used.
        if prefix.iter().any(|digit| !matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        if !plain.load(Ordering::Relaxed) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            open_beneath(self.fd, Path::new(OsStr::from_bytes(prefix)), flags).ok()?;
            plain.store(true, Ordering::Relaxed);
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let mask = StatxFlags::TYPE | StatxFlags::SIZE | StatxFlags::MNT_ID;
        let statx = statx(self.fd, object, flags, mask).ok()?;
        let is_regular = FileType::from_raw_mode(statx.stx_mode.into()) == FileType::RegularFile;
        (is_regular && statx.stx_mnt_id == self.mount).then_some(statx.stx_size)
    }
}

impl Found<'_> {
    /// Opens the object for reading.
    pub fn open(&self) -> Result<OwnedFd, ObjectProblem> {
        let file = open_to_read(self.directory, self.object).map_err(unreadable)?;
        // Another file may have taken the place of the object meanwhile.
        match regular_size(&file)? == self.size {
            true => Ok(file),
            false => Err(ObjectProblem::Changed),
        }
    }
}

fn size_of(directory: BorrowedFd, object: &Path) -> Result<u64, ObjectProblem> {
    match open_beneath(directory, object, OFlags::PATH | OFlags::NOFOLLOW) {
        Ok(file) => regular_size(&file),
        Err(Errno::NOENT | Errno::NOTDIR) => Err(ObjectProblem::Missing),
        Err(Errno::LOOP) => Err(ObjectProblem::not_regular(FileType::Symlink)),
        Err(errno) => Err(unreadable(errno)),
    }
}

/// Opens a regular file for reading, by the same rules as [`open_beneath`]. Reads then leave its access time
/// unchanged, if the process may do so.
pub(crate) fn open_to_read(directory: BorrowedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    match open_beneath(directory, path, flags | OFlags::NOATIME) {
        // Only the owner, or a process with CAP_FOWNER, may leave the access time unchanged.
        Err(Errno::PERM) => open_beneath(directory, path, flags),
        file => file,
    }
}

/// Opens a file by the rules of overlayfs for objects: LOOKUP_BENEATH, LOOKUP_NO_SYMLINKS and
/// LOOKUP_NO_XDEV.
pub(crate) fn open_beneath(
    directory: BorrowedFd,
    path: &Path,
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
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
