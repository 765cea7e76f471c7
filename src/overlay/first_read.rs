//! Reads of sampled files through a new mount, before the mount is handed over. With verity, overlayfs
//! checks an object only when its file is opened. So a mount whose objects cannot be verified looks like a
//! good mount.
//!
//! The files are found on the EROFS mount, where a walk needs no object directory. They are read through the
//! overlay.

use std::cell::OnceCell;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, fgetxattr, fstat, openat, statat};
use rustix::io::Errno;

use crate::digest::measure::measure;
use crate::digest::{Digest, VerityUnavailable};
use crate::kernel::{KernelError, Operation};
use crate::objects::ObjectProblem;
use crate::objects::store::{Found, NotFound, Store, open_beneath, open_to_read};
use crate::objects::walk::read_reference;
use crate::overlay::error::OverlayError;
use crate::overlay::layers::Layers;

/// The limits of the walk: files to return, regular files, directory entries, and directories to read. The
/// root of a V1 image alone has 256 whiteouts. docs/design.md has the cost of the walk.
const FILES: usize = 4;
const CANDIDATES: usize = 128;
const ENTRIES: usize = 768;
const DIRECTORIES: usize = 32;

/// The largest file that an image holds itself, in bytes.
const INLINE_MAX: u64 = 64;

/// A file of an image whose content is an object.
#[derive(Debug)]
pub(crate) struct SampledFile {
    /// The path of the file, relative to the root of the image.
    path: PathBuf,
    /// The path of the object, relative to an object directory.
    object: PathBuf,
    /// The fs-verity digest of the object, as the image has it.
    digest: Option<Digest>,
}

impl SampledFile {
    /// Returns the path for messages.
    pub fn shown_path(&self) -> PathBuf {
        Path::new("/").join(&self.path)
    }

    /// Returns the path of the object, relative to an object directory.
    pub fn object(&self) -> &Path {
        &self.object
    }
}

/// The sampled files of an image. The walk that finds the files runs at most once.
#[derive(Debug, Default)]
pub(crate) struct Samples(OnceCell<Vec<SampledFile>>);

impl Samples {
    /// Returns the sampled files. `image` must be a mount of the same image in each call.
    pub fn of(&self, image: impl AsFd) -> Result<&[SampledFile], KernelError> {
        if let Some(files) = self.0.get() {
            return Ok(files);
        }
        let files = sample_files(image)?;
        Ok(self.0.get_or_init(|| files))
    }
}

/// Returns up to four files of an image whose contents are objects, from a bounded walk of the EROFS mount.
///
/// A directory or file that the process may not read is left out: a mount needs no permission to read files
/// of the image. A path that is too long is left out too.
fn sample_files(image: impl AsFd) -> Result<Vec<SampledFile>, KernelError> {
    let mut files = Vec::new();
    let mut directories = vec![PathBuf::from(".")];
    let (mut candidates, mut entries, mut visited) = (0, 0, 0);
    // The last directory comes first, so the walk goes down before it continues on the same level.
    while let Some(path) = directories.pop() {
        let failed = |errno| KernelError::new(Operation::SampleFiles, errno).on(shown_path(&path));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = match openat(&image, &path, flags, Mode::empty()) {
            Err(errno) if is_denied(errno) || errno == Errno::NAMETOOLONG => continue,
            directory => directory.map_err(failed)?,
        };
        let mut below = Vec::new();
        for entry in Dir::new(directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_bytes();
            let path = path.join(std::ffi::OsStr::from_bytes(name));
            match entry.file_type() {
                FileType::Directory if name != b"." && name != b".." => below.push(path),
                FileType::RegularFile => {
                    let failed = |errno| {
                        KernelError::new(Operation::SampleFiles, errno).on(shown_path(&path))
                    };
                    files.extend(file_with_object(&image, &path).map_err(failed)?);
                    candidates += 1;
                }
                _ => {}
            }
            entries += 1;
            if files.len() == FILES || candidates == CANDIDATES || entries == ENTRIES {
                return Ok(files);
            }
        }
        visited += 1;
        if visited == DIRECTORIES {
            break;
        }
        directories.extend(below.into_iter().rev());
    }
    Ok(files)
}

fn shown_path(path: &Path) -> PathBuf {
    Path::new("/").join(path.strip_prefix(".").unwrap_or(path))
}

/// Returns a file of the image, or `None` if the image holds its content, or the process may not read it.
fn file_with_object(image: impl AsFd, path: &Path) -> Result<Option<SampledFile>, Errno> {
    let stat = match statat(&image, path, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NAMETOOLONG) => return Ok(None),
        stat => stat?,
    };
    let size = stat.st_size as u64;
    // The inode decides on the type. A crafted image may show a device as a file in the directory.
    let is_regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if !is_regular || size <= INLINE_MAX {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match openat(&image, path, flags, Mode::empty()) {
        Err(errno) if is_denied(errno) => return Ok(None),
        file => file?,
    };
    let reference = read_reference(stat.st_ino, size, |name, value| fgetxattr(&file, name, value))?;
    let path = path.strip_prefix(".").unwrap_or(path).to_owned();
    // A reference without an object is not valid, so overlayfs cannot open the file.
    Ok(reference.and_then(|reference| {
        Some(SampledFile { path, object: reference.object?, digest: reference.digest })
    }))
}

/// Returns whether a security module, or a missing capability, denies a read of the file. A mount does not
/// need the permission to read files.
fn is_denied(errno: Errno) -> bool {
    matches!(errno, Errno::ACCESS | Errno::PERM)
}

/// Reads a byte of each file through an overlay with `verity=require`. If overlayfs does not open a file,
/// measures its object to find the reason.
///
/// # Errors
///
/// [`OverlayError`]: the object is missing, has no fs-verity or another digest; or the kernel cannot open the
/// object.
pub(crate) fn read_files(
    mount: impl AsFd,
    files: &[SampledFile],
    layers: &Layers,
) -> Result<(), OverlayError> {
    for file in files {
        let failed = |operation, errno| KernelError::new(operation, errno).on(file.shown_path());
        match open_through(&mount, &file.path) {
            Ok(None) => {}
            Ok(Some(opened)) => {
                rustix::io::read(&opened, &mut [0; 1])
                    .map_err(|errno| failed(Operation::ReadThrough, errno))?;
            }
            Err(errno @ (Errno::IO | Errno::NOENT)) => {
                require_object(file, layers)?;
                // The object is right, so the kernel is the reason.
                return Err(match errno {
                    Errno::IO => OverlayError::VerityBroken { file: file.shown_path() },
                    errno => failed(Operation::ReadThrough, errno).into(),
                });
            }
            Err(errno) => return Err(failed(Operation::ReadThrough, errno).into()),
        }
    }
    Ok(())
}

/// Opens a file through an overlay. Returns `None` if the upper layer hides or replaces the file, or if the
/// process may not read it.
fn open_through(mount: impl AsFd, path: &Path) -> Result<Option<OwnedFd>, Errno> {
    // A device or a FIFO is not opened. With O_PATH, overlayfs does not open the object either.
    let file = match open_beneath(mount.as_fd(), path, OFlags::PATH | OFlags::NOFOLLOW) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        Err(errno) if is_denied(errno) => return Ok(None),
        file => file?,
    };
    if FileType::from_raw_mode(fstat(file)?.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    match open_to_read(mount.as_fd(), path) {
        Err(errno) if is_denied(errno) => Ok(None),
        opened => opened.map(Some),
    }
}

/// Checks that the object of a file exists and has the digest of the image.
fn require_object(file: &SampledFile, layers: &Layers) -> Result<(), OverlayError> {
    let missing =
        || OverlayError::ObjectMissing { file: file.shown_path(), object: file.object.clone() };
    let store = layers.store()?;
    let found = find_object(&store, file, layers)?.ok_or_else(missing)?;
    let path = layers.objects[found.index].path().join(&file.object);
    let object = match found.open() {
        Ok(object) => object,
        Err(problem) => {
            reject_unreadable(problem, &path)?;
            return Err(missing());
        }
    };
    let Some(expected) = file.digest else {
        let (path, reason) = (file.shown_path(), VerityUnavailable::NoDigest);
        return Err(OverlayError::ObjectsVerityUnavailable { path, reason });
    };
    let measured = measure(&object)
        .map_err(|errno| KernelError::new(Operation::MeasureVerity, errno).on(&path))?;
    match measured.digest(expected.algorithm()) {
        Ok(found) if found == expected => Ok(()),
        Ok(found) => {
            let (expected, found) = (Box::new(expected), Box::new(found));
            Err(OverlayError::ObjectMismatch { path, expected, found })
        }
        Err(reason) => Err(OverlayError::ObjectsVerityUnavailable { path, reason }),
    }
}

/// Finds the object of a file. Returns `None` if overlayfs finds no object.
fn find_object<'a>(
    store: &'a Store,
    file: &'a SampledFile,
    layers: &Layers,
) -> Result<Option<Found<'a>>, KernelError> {
    store.find(&file.object).map(Some).or_else(|NotFound { index, problem }| {
        reject_unreadable(problem, &layers.objects[index].path().join(&file.object))?;
        Ok(None)
    })
}

/// Rejects an object that exists and cannot be opened.
fn reject_unreadable(problem: ObjectProblem, path: &Path) -> Result<(), KernelError> {
    match problem {
        // The object is on another mount, where overlayfs does not look.
        ObjectProblem::Unreadable(error) if error.errno != Errno::XDEV => {
            Err(KernelError::new(Operation::SampleObjects, error.errno).on(path))
        }
        _ => Ok(()),
    }
}

/// Returns the files whose object is in no object directory.
pub(crate) fn without_object<'a>(
    files: &'a [SampledFile],
    layers: &Layers,
) -> Result<Vec<&'a SampledFile>, KernelError> {
    let store = layers.store()?;
    let mut missing = Vec::new();
    for file in files {
        if find_object(&store, file, layers)?.is_none() {
            missing.push(file);
        }
    }
    Ok(missing)
}
