//! The reason why an image is not verified or not copied.

use std::path::{Path, PathBuf};

use crate::digest::parallel::Halted;
use crate::digest::{Digest, VerityUnavailable};
use crate::image::{Compression, ImageError, ImageProblem};
use crate::kernel::{ErrorKind, Hint, KernelError, Operation};
use crate::util::text::shown;

/// The reason why an image is not verified or not copied. No memory stays allocated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The file is not an image that can be mounted.
    #[error(transparent)]
    Image(#[from] ImageError),

    /// The size of the file changed during the copy.
    #[error(
        "{}: cannot copy the image: the size of the file changed during the copy",
        shown(image)
    )]
    #[non_exhaustive]
    Changed {
        /// The path of the image.
        image: PathBuf,
    },

    /// The compressed file is damaged: truncated, with a wrong checksum or with trailing data.
    #[error("{}: cannot decompress the image with {format}: {}", shown(image), shown(&source.to_string()))]
    #[non_exhaustive]
    Decompress {
        /// The path of the image.
        image: PathBuf,
        /// The compression of the file.
        format: Compression,
        /// The error of the decoder.
        source: std::io::Error,
    },

    /// The window of the compressed file is larger than 128 MiB, the limit for decoders.
    #[error(
        "{}: cannot decompress the image with {format}: its window is larger than 128 MiB",
        shown(image)
    )]
    #[non_exhaustive]
    WindowTooLarge {
        /// The path of the image.
        image: PathBuf,
        /// The compression of the file.
        format: Compression,
    },

    /// The image has another fs-verity digest than the expected one.
    #[error(
        "{}: cannot verify the image: its fs-verity digest is {found}, expected {expected}",
        shown(image)
    )]
    #[non_exhaustive]
    DigestMismatch {
        /// The path of the image.
        image: PathBuf,
        /// The expected digest.
        expected: Box<Digest>,
        /// The digest that the kernel measured or sealmount computed.
        found: Box<Digest>,
    },

    /// The kernel's fs-verity cannot verify the image, and the image is not copied.
    #[error("{}: cannot verify the image without a copy: {reason}", shown(image))]
    #[non_exhaustive]
    VerityUnavailable {
        /// The path of the image.
        image: PathBuf,
        /// The reason.
        reason: VerityUnavailable,
    },

    /// The copy would exceed the limit that the caller set, or the default limit.
    #[error(
        "{}: cannot copy the image: {} has {size} bytes, and the limit for the copy is {limit} bytes",
        shown(image),
        subject(compression)
    )]
    #[non_exhaustive]
    LimitExceeded {
        /// The path of the image.
        image: PathBuf,
        /// The size of the image, in bytes. If `compression` is set, the size of the compressed file.
        size: u64,
        /// The limit, in bytes.
        limit: u64,
        /// The compression of the file, if the compressed file alone exceeds the limit.
        compression: Option<Compression>,
    },

    /// The machine does not have enough memory for the copy at this moment.
    #[error(
        "{}: cannot copy the image: {}, and {available} bytes of memory are available",
        shown(image),
        need(compression, *size, *decoder)
    )]
    #[non_exhaustive]
    NotEnoughMemory {
        /// The path of the image.
        image: PathBuf,
        /// The size of the image, in bytes. If `compression` is set, the size of the compressed file.
        size: u64,
        /// The memory of the decoder, in bytes: its window and its buffers. 0 if the file is not compressed.
        decoder: u64,
        /// The available memory, in bytes, with the memory that the copy already has.
        available: u64,
        /// The compression of the file, if the size of the image is not known yet.
        compression: Option<Compression>,
    },

    /// The caller's cgroup, or an ancestor of it, does not allow enough memory for the copy.
    #[error(
        "{}: cannot copy the image: {}, and the cgroup {} has {available} bytes of memory available, with \
         a limit of {limit} bytes",
        shown(image),
        need(compression, *size, *decoder),
        shown(cgroup)
    )]
    #[non_exhaustive]
    CgroupLimitExceeded {
        /// The path of the image.
        image: PathBuf,
        /// The size of the image, in bytes. If `compression` is set, the size of the compressed file.
        size: u64,
        /// The memory of the decoder, in bytes: its window and its buffers. 0 if the file is not compressed.
        decoder: u64,
        /// The path of the cgroup, as /proc/self/cgroup has it.
        cgroup: PathBuf,
        /// The limit of the cgroup, in bytes.
        limit: u64,
        /// The available memory of the cgroup, in bytes, with the memory that the copy already has.
        available: u64,
        /// The compression of the file, if the size of the image is not known yet.
        compression: Option<Compression>,
    },

    /// The caller's callback ended the copy.
    #[error("{}: cannot copy the image: cancelled by the caller", shown(image))]
    #[non_exhaustive]
    Cancelled {
        /// The path of the image.
        image: PathBuf,
    },

    /// A system call failed.
    #[error(transparent)]
    Kernel(Box<KernelError>),
}

fn subject(compression: &Option<Compression>) -> String {
    match compression {
        Some(format) => format!("the {format} file"),
        None => "the image".into(),
    }
}

/// Returns the parts of the memory that a copy needs.
fn need(compression: &Option<Compression>, size: u64, decoder: u64) -> String {
    let decoder = match decoder {
        0 => String::new(),
        decoder => format!(", its decoder needs {decoder} bytes"),
    };
    format!("{} has {size} bytes{decoder}", subject(compression))
}

impl SourceError {
    pub(crate) fn invalid(image: &Path, problem: ImageProblem) -> SourceError {
        ImageError::Invalid { image: image.to_owned(), problem }.into()
    }

    pub(crate) fn mismatch(image: &Path, expected: Digest, found: Digest) -> SourceError {
        let (expected, found) = (Box::new(expected), Box::new(found));
        SourceError::DigestMismatch { image: image.to_owned(), expected, found }
    }

    /// Names the image that the work was for.
    pub(crate) fn from_halted(image: &Path, halted: Halted) -> SourceError {
        match halted {
            Halted::Cancelled => SourceError::Cancelled { image: image.to_owned() },
            Halted::NoMemory(errno) => {
                KernelError::new(Operation::AllocateBuffers, errno).on(image).into()
            }
        }
    }

    /// Returns the failed system call, if the error is one.
    pub fn kernel(&self) -> Option<&KernelError> {
        match self {
            SourceError::Image(error) => error.kernel(),
            SourceError::Kernel(error) => Some(error),
            _ => None,
        }
    }

    /// Returns the [errno](https://man7.org/linux/man-pages/man3/errno.3.html) of the failed system call, if
    /// there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.kernel().map(KernelError::raw_os_error)
    }

    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        match self {
            SourceError::Image(error) => error.kind(),
            SourceError::Changed { .. } => ErrorKind::Busy,
            SourceError::Decompress { .. } => ErrorKind::NotAnImage,
            SourceError::WindowTooLarge { .. }
            | SourceError::LimitExceeded { .. }
            | SourceError::CgroupLimitExceeded { .. } => ErrorKind::LimitExceeded,
            SourceError::DigestMismatch { .. } => ErrorKind::DigestMismatch,
            SourceError::VerityUnavailable { .. } => ErrorKind::VerityUnavailable,
            SourceError::NotEnoughMemory { .. } => ErrorKind::OutOfMemory,
            SourceError::Cancelled { .. } => ErrorKind::Cancelled,
            SourceError::Kernel(error) => error.kind(),
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        Some(match self {
            SourceError::Image(error) => return error.hint(),
            SourceError::Changed { .. } => Hint::new("try again when the file is complete"),
            SourceError::WindowTooLarge { .. } => Hint::new(
                "compress the image again: with zstd, without --long; with xz, with a dictionary of at \
                 most 128 MiB",
            ),
            SourceError::VerityUnavailable { .. } => Hint::of_types_or_options(
                "use Image::copy, which computes the digest while copying the image into sealed memory, \
                 on any file system",
                "add the option copy: sealmount then computes the digest while copying the image into \
                 sealed memory, on any file system",
            ),
            SourceError::DigestMismatch { .. } => Hint::new(
                "get the image again, or check the digest: the image is damaged, replaced, or another one",
            ),
            SourceError::LimitExceeded { .. } => Hint::of_types_or_options(
                "raise CopyOptions::size (default: 50 % of the memory), or mount the uncompressed image \
                 without a copy",
                "raise size= (default: 50% of the memory), or mount the uncompressed image without \
                 copy",
            ),
            SourceError::NotEnoughMemory { .. } => Hint::new(
                "free some memory and try again, or mount the uncompressed image without a copy",
            ),
            SourceError::CgroupLimitExceeded { .. } => Hint::new(
                "raise the limit of the cgroup (of a systemd unit: MemoryMax=), or mount outside of the \
                 cgroup, or mount the uncompressed image without a copy",
            ),
            SourceError::Kernel(error) => return error.hint(),
            _ => return None,
        })
    }
}

impl From<KernelError> for SourceError {
    fn from(error: KernelError) -> SourceError {
        SourceError::Kernel(Box::new(error))
    }
}
