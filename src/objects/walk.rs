//! The walk of the bare EROFS mount, which finds the references to objects.
//!
//! The kernel reads the image: names with getdents(2), inodes with statx(2), xattrs with fgetxattr(2). A
//! hostile image can make the kernel show a tree without an end. So each directory is read once, and the
//! number of entries and the length of paths are limited.

use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, fgetxattr, fstat, lgetxattr, openat,
    openat2, statat,
};
use rustix::io::Errno;
use rustix::process::fchdir;
use sealmount_sys::unshare_working_directory;

use crate::erofs::{ErofsMount, check_permission};
use crate::kernel::{KernelError, Operation};
use crate::objects::error::ObjectsError;
use crate::objects::reference::{ImageObject, Reference};
use crate::source::Source;

/// The size of an entry of a directory in an EROFS, without its name, in bytes.
const ENTRY_SIZE: u64 = 12;

/// The highest length of a path, in bytes, with the NUL at its end.
const PATH_MAX: usize = 4096;

/// A directory that is not read yet. The parent's path is shared, so that many directories with a long path
/// need little memory.
pub(crate) struct Pending {
    parent: Arc<[u8]>,
    name: Box<[u8]>,
    inode: u64,
}

/// An entry of a directory.
pub(crate) enum Entry {
    Directory(Pending),
    File(Box<CStr>, Reference),
    /// A file without an object, or `.` or `..`.
    Other,
}

/// The tree of an image, with the limits of a walk.
#[derive(Debug)]
pub(crate) struct Tree<'a> {
    image: &'a ErofsMount,
    limit: u64,
    entries: AtomicU64,
    /// The number of entries except `.` and `..`.
    names: AtomicU64,
    visited: Mutex<BTreeSet<u64>>,
}

/// A directory that is being read.
#[derive(Debug)]
pub(crate) struct OpenDirectory {
    /// The absolute path, which is empty for the root.
    path: Arc<[u8]>,
    entries: Dir,
    access: Access,
}

/// The method to reach the files of a directory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Access {
    /// Each file is opened to read its xattrs. Any thread can use this method.
    ByDescriptor,
    /// The directory is the working directory of the thread, and files are not opened.
    ByWorkingDirectory,
}

impl Access {
    /// Gives the calling thread a working directory of its own.
    pub fn of_own_thread() -> Result<Access, Errno> {
        unshare_working_directory()?;
        Ok(Access::ByWorkingDirectory)
    }
}

/// Returns the highest number of directory entries that an image can hold.
///
/// A sparse image may be much larger than its data. Compressed data has at least a twelfth of its size, and a
/// file system may keep the data of a small file elsewhere.
fn entries_max(source: &Source) -> u64 {
    #[allow(clippy::unnecessary_cast, reason = "the type depends on the architecture")]
    let allocated = fstat(source).map_or(u64::MAX, |stat| stat.st_blocks as u64 * 512);
    (source.report().size / ENTRY_SIZE).min(allocated.saturating_add(1 << 20))
}

impl<'a> Tree<'a> {
    pub fn new(image: &'a ErofsMount) -> Tree<'a> {
        Tree {
            image,
            limit: entries_max(image.source()),
            entries: AtomicU64::new(0),
            names: AtomicU64::new(0),
            visited: Mutex::default(),
        }
    }

    /// Returns the root directory. Without `CAP_SYS_ADMIN`, the kernel hides the xattrs of overlayfs, and an
    /// image would seem to have no objects.
    pub fn root(&self) -> Result<Pending, ObjectsError> {
        check_permission()?;
        let stat = statat(self.image, "", AtFlags::EMPTY_PATH)
            .map_err(|errno| self.failed(&[b"/"], errno))?;
        Ok(Pending { parent: Arc::default(), name: Box::default(), inode: stat.st_ino })
    }

    /// Returns the path of the image.
    pub fn image(&self) -> &Path {
        self.image.source().path()
    }

    /// Returns the number of names that were read, without `.` and `..`.
    pub fn names(&self) -> u64 {
        self.names.load(Ordering::Relaxed)
    }

    /// Opens a directory, which must not have been opened before.
    pub fn open(&self, directory: Pending, access: Access) -> Result<OpenDirectory, ObjectsError> {
        let Pending { parent, name, inode } = directory;
        let is_root = parent.is_empty() && name.is_empty();
        let path: Arc<[u8]> = match is_root {
            true => parent,
            false => [&parent, &b"/"[..], &name].concat().into(),
        };
        if path.len() >= PATH_MAX {
            return Err(self.path_too_long(&path));
        }
        if !self.visited.lock().unwrap_or_else(PoisonError::into_inner).insert(inode) {
            return Err(self.directory_loop(&path));
        }
        let relative = if is_root { &b"."[..] } else { &path[1..] };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let open = || {
            let relative = OsStr::from_bytes(relative);
            let fd = openat2(self.image, relative, flags, Mode::empty(), resolve)?;
            if let Access::ByWorkingDirectory = access {
                fchdir(&fd)?;
            }
            Dir::new(fd)
        };
        match open() {
            Ok(entries) => Ok(OpenDirectory { path, entries, access }),
            Err(errno) => Err(self.failed(&[&path], errno)),
        }
    }

    /// Reads the next entry of a directory. Returns `None` after the last entry.
    pub fn next_entry(&self, directory: &mut OpenDirectory) -> Option<Result<Entry, ObjectsError>> {
        let entry = match directory.entries.next()? {
            Ok(entry) => entry,
            Err(errno) => return Some(Err(self.failed(&[&directory.path], errno))),
        };
        if self.entries.fetch_add(1, Ordering::Relaxed) >= self.limit {
            let image = self.image().to_owned();
            return Some(Err(ObjectsError::TooManyEntries { image, limit: self.limit }));
        }
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            return Some(Ok(Entry::Other));
        }
        self.names.fetch_add(1, Ordering::Relaxed);
        Some(self.read_entry(directory, name))
    }

    /// Reads the inode of an entry. The type in the entry itself may be wrong, so the inode decides.
    fn read_entry(&self, directory: &OpenDirectory, name: &CStr) -> Result<Entry, ObjectsError> {
        let failed = |errno| match errno {
            // The kernel does not show a directory inside itself.
            Errno::LOOP | Errno::STALE => {
                self.directory_loop(&[&directory.path, &b"/"[..], name.to_bytes()].concat())
            }
            _ => self.failed(&[&directory.path, b"/", name.to_bytes()], errno),
        };
        let fd = match directory.access {
            Access::ByDescriptor => directory.entries.fd().map_err(failed)?,
            Access::ByWorkingDirectory => CWD,
        };
        let stat = statat(fd, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Ok(Entry::Directory(Pending {
                parent: directory.path.clone(),
                name: name.to_bytes().into(),
                inode: stat.st_ino,
            })),
            FileType::RegularFile => {
                // The size of a regular file is not negative.
                let (inode, size) = (stat.st_ino, stat.st_size as u64);
                let reference = match directory.access {
                    Access::ByDescriptor => open_file(fd, name).and_then(|file| {
                        read_reference(inode, size, |xattr, value| fgetxattr(&file, xattr, value))
                    }),
                    Access::ByWorkingDirectory => {
                        read_reference(inode, size, |xattr, value| lgetxattr(name, xattr, value))
                    }
                };
                match reference.map_err(failed)? {
                    Some(reference) => Ok(Entry::File(name.into(), reference)),
                    None => Ok(Entry::Other),
                }
            }
            _ => Ok(Entry::Other),
        }
    }

    fn failed(&self, path: &[&[u8]], errno: Errno) -> ObjectsError {
        let path = [self.image().as_os_str().as_bytes(), b":", &path.concat()].concat();
        KernelError::new(Operation::ListObjects, errno).on(OsStr::from_bytes(&path)).into()
    }

    fn directory_loop(&self, path: &[u8]) -> ObjectsError {
        ObjectsError::DirectoryLoop { image: self.image().to_owned(), path: to_path(path) }
    }

    fn path_too_long(&self, directory: &[u8]) -> ObjectsError {
        // The directory may be a thousand levels down, and the start of its path is enough for a message.
        let directory = to_path(&directory[..directory.len().min(200)]);
        ObjectsError::PathTooLong { image: self.image().to_owned(), directory }
    }
}

impl OpenDirectory {
    /// Returns the absolute path of an entry.
    pub fn path_of(&self, name: &CStr) -> PathBuf {
        to_path(&[&self.path, &b"/"[..], name.to_bytes()].concat())
    }
}

fn to_path(bytes: &[u8]) -> PathBuf {
    let path = if bytes.is_empty() { b"/" } else { bytes };
    PathBuf::from(OsStr::from_bytes(path))
}

/// Opens a file to read its xattrs. The inode is a regular file, so the open has no effect.
fn open_file(directory: BorrowedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    openat(directory, name, flags, Mode::empty())
}

/// Reads the xattrs of overlayfs. Returns `None` if the file has no object.
pub(crate) fn read_reference(
    inode: u64,
    size: u64,
    get: impl Fn(&CStr, &mut [u8]) -> Result<usize, Errno>,
) -> Result<Option<Reference>, Errno> {
    let mut buffer = [0; 256];
    let metacopy = match get(c"trusted.overlay.metacopy", &mut buffer) {
        // EOPNOTSUPP: the image has no xattrs at all.
        Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
        Err(Errno::RANGE) => None,
        length => Some(&buffer[..length?]),
    };
    let mut buffer = [0; PATH_MAX];
    let redirect = match get(c"trusted.overlay.redirect", &mut buffer) {
        Err(Errno::NODATA | Errno::RANGE) => None,
        length => Some(&buffer[..length?]),
    };
    Ok(Some(Reference::new(inode, size, metacopy, redirect)))
}

/// An iterator over the files of an image that have an object, made by [`ErofsMount::objects`].
///
/// The files of a directory come first, and then its subdirectories. After an error, the iterator ends.
/// [`ObjectsError::InvalidReference`] is an exception: the iterator continues with the next file.
#[derive(Debug)]
pub struct Objects<'a> {
    references: References<'a>,
}

impl ErofsMount {
    /// Lists the objects that the image refers to, with a file for each. The kernel reads the image.
    ///
    /// ```no_run
    /// use sealmount::Image;
    ///
    /// let erofs = Image::open("/images/base.cfs")?.trust()?.mount()?;
    /// for object in erofs.objects() {
    ///     let object = object?;
    ///     println!("{}: {} bytes", object.object.display(), object.size);
    /// }
    /// # Ok::<(), sealmount::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Each item can be an [`ObjectsError`].
    pub fn objects(&self) -> Objects<'_> {
        Objects { references: References::new(self) }
    }
}

impl Iterator for Objects<'_> {
    type Item = Result<ImageObject, ObjectsError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (path, reference) = match self.references.next()? {
            Ok(found) => found,
            Err(error) => return Some(Err(error)),
        };
        let Reference { object, size, digest, .. } = reference;
        Some(match object {
            Some(object) => Ok(ImageObject { path, object, size, digest }),
            None => {
                let image = self.references.tree.image().to_owned();
                Err(ObjectsError::InvalidReference { image, path })
            }
        })
    }
}

/// An iterator over the references of an image, in the order of [`Objects`], with the path of each file.
#[derive(Debug)]
pub(crate) struct References<'a> {
    tree: Tree<'a>,
    state: State,
}

enum State {
    Start,
    /// The current directory, its subdirectories, and the directories that follow, the next one last.
    Walking {
        current: Option<OpenDirectory>,
        children: Vec<Pending>,
        rest: Vec<Pending>,
    },
    End,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            State::Start => "Start",
            State::Walking { .. } => "Walking",
            State::End => "End",
        })
    }
}

impl<'a> References<'a> {
    pub fn new(image: &'a ErofsMount) -> References<'a> {
        References { tree: Tree::new(image), state: State::Start }
    }

    fn advance(&mut self) -> Result<Option<(PathBuf, Reference)>, ObjectsError> {
        if let State::Start = self.state {
            let rest = vec![self.tree.root()?];
            self.state = State::Walking { current: None, children: Vec::new(), rest };
        }
        let State::Walking { current, children, rest } = &mut self.state else { return Ok(None) };
        loop {
            let Some(directory) = current else {
                let Some(next) = rest.pop() else { return Ok(None) };
                *current = Some(self.tree.open(next, Access::ByDescriptor)?);
                continue;
            };
            match self.tree.next_entry(directory).transpose()? {
                Some(Entry::Directory(child)) => children.push(child),
                Some(Entry::File(name, reference)) => {
                    return Ok(Some((directory.path_of(&name), reference)));
                }
                Some(Entry::Other) => {}
                None => {
                    rest.extend(children.drain(..).rev());
                    *current = None;
                }
            }
        }
    }
}

impl Iterator for References<'_> {
    type Item = Result<(PathBuf, Reference), ObjectsError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance();
        if !matches!(next, Ok(Some(_))) {
            self.state = State::End;
        }
        next.transpose()
    }
}
