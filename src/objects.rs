//! The object directories, and whether the kernel can verify what is in them.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{Dir, FileType, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::digest::{Measured, measure};
use crate::error::{Error, KernelError, NotVerity, Operation};
use crate::location::Location;

/// How many objects of a directory are looked at.
const SAMPLES: usize = 4;

/// Finds out whether the objects in a directory have fs-verity, by a few of them.
///
/// overlayfs does not look until an object is read: with `verity=require` and objects that lack
/// it, everything mounts and nothing can be read.
pub(crate) fn check_verity(location: &Location, directory: &OwnedFd) -> Result<(), Error> {
    let name = location.name();
    let failed = |errno| KernelError::new(Operation::SampleObjects, errno).on(&name);
    let directory = open_readable(directory).map_err(failed)?;
    // A directory answers like a file without fs-verity where its file system supports it.
    require_verity(&directory, &name, false)?;
    for (object, path) in sample(&directory).map_err(failed)? {
        require_verity(&object, &name.join(path), true)?;
    }
    Ok(())
}

fn require_verity(file: &OwnedFd, path: &std::path::Path, is_object: bool) -> Result<(), Error> {
    let measured = measure(file)
        .map_err(|errno| KernelError::new(Operation::MeasureVerity, errno).on(path))?;
    let reason = match measured {
        Measured::Digest(_) | Measured::OtherAlgorithm(_) => return Ok(()),
        Measured::NotEnabled if !is_object => return Ok(()),
        Measured::NotEnabled => NotVerity::NotEnabled,
        Measured::Unsupported => NotVerity::Unsupported,
    };
    Err(Error::ObjectsNotVerity { path: path.to_owned(), reason })
}

fn open_readable(directory: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(directory, ".", flags, Mode::empty())
}

/// The first objects found: regular files in directories of two hexadecimal digits. A directory
/// that has none gives none.
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
            // Not a directory, or gone since.
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
    fn what_is_no_object_is_neither_followed_nor_waited_for() {
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
