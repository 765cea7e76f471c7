//! Checks of the object directories.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Dir, FileType, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::digest::measure::measure;
use crate::digest::{VerityStatus, VerityUnavailable};
use crate::kernel::{KernelError, Operation};
use crate::overlay::error::OverlayError;
use crate::overlay::layers::Layer;

/// The number of objects that are sampled in a directory.
const SAMPLES: usize = 4;

/// Rejects an object directory whose file system does not support fs-verity.
pub(crate) fn check_support(layer: &Layer) -> Result<(), OverlayError> {
    let path = layer.path();
    let failed = |errno| KernelError::new(Operation::SampleObjects, errno).on(&path);
    // If the file system supports fs-verity, a directory is measured like a file without fs-verity.
    require_verity(&open_readable(&layer.fd).map_err(failed)?, &path, false)
}

/// Samples objects of a directory, and rejects the directory if one of them lacks fs-verity.
///
/// overlayfs checks an object when the object is opened. With `verity=require` and objects without
/// fs-verity, the mount succeeds and every read fails.
pub(crate) fn check_samples(layer: &Layer) -> Result<(), OverlayError> {
    let path = layer.path();
    let failed = |errno| KernelError::new(Operation::SampleObjects, errno).on(&path);
    let directory = open_readable(&layer.fd).map_err(failed)?;
    require_verity(&directory, &path, false)?;
    for (object, name) in sample(&directory).map_err(failed)? {
        require_verity(&object, &path.join(name), true)?;
    }
    Ok(())
}

fn require_verity(file: &OwnedFd, path: &Path, is_object: bool) -> Result<(), OverlayError> {
    let measured = measure(file)
        .map_err(|errno| KernelError::new(Operation::MeasureVerity, errno).on(path))?;
    let reason = match measured {
        VerityStatus::Digest(_) | VerityStatus::OtherAlgorithm(_) => return Ok(()),
        VerityStatus::NotEnabled if !is_object => return Ok(()),
        VerityStatus::NotEnabled => VerityUnavailable::NotEnabled,
        VerityStatus::Unsupported => VerityUnavailable::Unsupported,
    };
    Err(OverlayError::ObjectsVerityUnavailable { path: path.to_owned(), reason })
}

fn open_readable(directory: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(directory, ".", flags, Mode::empty())
}

/// Returns the first objects: regular files in directories of two hexadecimal digits.
fn sample(directory: &OwnedFd) -> Result<Vec<(OwnedFd, PathBuf)>, Errno> {
    let mut objects = Vec::new();
    for entry in Dir::read_from(directory)? {
        if objects.len() == SAMPLES {
            break;
        }
        let entry = entry?;
        let prefix = entry.file_name();
        if prefix.to_bytes().len() != 2 || !prefix.to_bytes().iter().all(u8::is_ascii_hexdigit) {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let subdirectory = match openat(directory, prefix, flags, Mode::empty()) {
            // The entry is not a directory, or is gone.
            Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => continue,
            result => result?,
        };
        for entry in Dir::read_from(&subdirectory)? {
            let entry = entry?;
            let name = entry.file_name();
            if !matches!(entry.file_type(), FileType::RegularFile | FileType::Unknown) {
                continue;
            }
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
            match openat(&subdirectory, name, flags, Mode::empty()) {
                Err(Errno::LOOP | Errno::NOENT | Errno::NXIO) => continue,
                object => {
                    let text = |name: &std::ffi::CStr| name.to_string_lossy().into_owned();
                    objects.push((object?, PathBuf::from(text(prefix)).join(text(name))));
                }
            }
            break;
        }
    }
    Ok(objects)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, mknodat};

    use super::*;

    #[test]
    fn sample_ignores_links_and_non_regular_files() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["aa", "bb", "cc", "dd", "ee", "not hexadecimal"] {
            fs::create_dir(path(name)).unwrap();
        }
        let fifo = |name| mknodat(CWD, path(name), FileType::Fifo, Mode::RWXU, 0).unwrap();
        fifo("aa/fifo");
        fifo("ab");
        symlink("/dev/zero", path("bb/link")).unwrap();
        symlink("/usr", path("bc")).unwrap();
        symlink("ee", path("ff")).unwrap();
        fs::create_dir(path("cc/directory")).unwrap();
        fs::write(path("not hexadecimal/file"), "x").unwrap();
        fs::write(path("ee/object"), "x").unwrap();
        fs::write(path("01"), "x").unwrap();

        let opened = openat(CWD, directory.path(), OFlags::RDONLY, Mode::empty()).unwrap();
        let sampled: Vec<_> = sample(&opened).unwrap().into_iter().map(|(_, path)| path).collect();
        assert_eq!(sampled, [PathBuf::from("ee/object")]);
    }
}
