//! The image of a root file system: in the initramfs, or on the disk.

use std::fs::DirEntry;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use crate::boot::command_line::{CommandLine, CopyChoice, ExpectedImage};
use crate::boot::disk::Disk;
use crate::boot::error::SetupError;
use crate::kernel::{KernelError, Operation};
use crate::location::Location;
use crate::options::MountOptions;
use crate::source::MemoryKind;

/// An image that may become the root.
pub(crate) struct Candidate {
    pub image: Location,
    pub expected: ExpectedImage,
    pub place: Place,
}

/// The place of an image.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The initramfs. The name of the image is its digest, or `sealmount.image=` names the image.
    Initramfs,
    /// The initramfs, as its only image with any name. The digest of the image is not known.
    OnlyInInitramfs,
    /// The disk.
    Disk,
}

/// Returns the images to try, in the order of the words on the kernel command line. Only with
/// [`Place::OnlyInInitramfs`], several images are returned: the digest decides between them.
pub(crate) fn candidates(
    command_line: &CommandLine,
    images: &Path,
    disk: &Disk,
) -> Result<Vec<Candidate>, SetupError> {
    let any = |image: &Path, place| -> Vec<Candidate> {
        let candidate = |expected: &ExpectedImage| Candidate {
            image: image.into(),
            expected: *expected,
            place,
        };
        command_line.images.iter().map(candidate).collect()
    };
    if let Some(image) = &command_line.image {
        return Ok(any(image, Place::OnlyInInitramfs));
    }
    let files = files(images)?;
    for expected in &command_line.images {
        let digest = expected.digest.to_string();
        if let Some(path) = files.iter().filter(|path| has_stem(path, &digest)).min() {
            let (image, place) = (path.into(), Place::Initramfs);
            return Ok(vec![Candidate { image, expected: *expected, place }]);
        }
        if let Some(file) = disk.image(&expected.digest)? {
            let image = Location::from(Arc::<OwnedFd>::new(file));
            return Ok(vec![Candidate { image, expected: *expected, place: Place::Disk }]);
        }
    }
    match files.as_slice() {
        [only] => Ok(any(only, Place::OnlyInInitramfs)),
        _ => Err(SetupError::ImageMissing {
            digests: command_line.images.iter().map(|image| image.digest).collect(),
            images: images.to_owned(),
            store: disk.images(),
        }),
    }
}

impl Candidate {
    /// Sets the kind of copy.
    ///
    /// An image in the initramfs is copied, because the memory of the initramfs is freed after the boot. An
    /// image on the disk is not copied, because the kernel's fs-verity can verify the file. With
    /// [`MemoryKind::Ramfs`] the root needs no loop device from Linux 6.12. systemd reports a loop device that
    /// it cannot detach when the system stops.
    pub fn set_copy(&self, choice: Option<CopyChoice>, options: &mut MountOptions) {
        options.copy = match (choice, self.place) {
            (Some(CopyChoice::Off), _) => None,
            (Some(CopyChoice::Memory(memory)), _) => Some(memory),
            (None, Place::Disk) => None,
            (None, Place::Initramfs | Place::OnlyInInitramfs) => Some(MemoryKind::Ramfs),
        };
    }
}

/// Returns the paths of the files in the directory of images. A missing directory has no files.
fn files(images: &Path) -> Result<Vec<PathBuf>, KernelError> {
    let failed = |error: std::io::Error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        KernelError::new(Operation::FindImage, errno).on(images)
    };
    let entries = match std::fs::read_dir(images) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.map_err(failed)?,
    };
    let path = |entry: std::io::Result<DirEntry>| entry.map(|entry| entry.path());
    entries.map(path).collect::<Result<_, _>>().map_err(failed)
}

/// Returns whether the name of a file, up to its first dot, is this text.
fn has_stem(path: &Path, stem: &str) -> bool {
    let name = path.file_name().map_or(&b""[..], |name| name.as_encoded_bytes());
    name.split(|byte| *byte == b'.').next() == Some(stem.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stem_is_the_name_up_to_its_first_dot() {
        for (name, expected) in
            [("/a/12", true), ("/a/12.cfs.zst", true), ("/a/123", false), ("/12/x", false)]
        {
            assert_eq!(has_stem(Path::new(name), "12"), expected, "{name}");
        }
    }
}
