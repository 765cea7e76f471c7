//! The reason why the objects of an image cannot be listed.

use std::path::PathBuf;

use crate::kernel::{ErrorKind, Hint, KernelError};
use crate::util::text::shown;

/// The reason why the objects of an image cannot be listed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObjectsError {
    /// A file has a reference that overlayfs would reject. The list continues after the file.
    #[error(
        "{}: cannot list the objects: the reference of {} is invalid",
        shown(image),
        shown(path)
    )]
    #[non_exhaustive]
    InvalidReference {
        /// The path of the image.
        image: PathBuf,
        /// The path of the file in the image.
        path: PathBuf,
    },

    /// A directory is in two places, so the tree may be endless.
    #[error(
        "{}: cannot list the objects: the directory {} is also in another place",
        shown(image),
        shown(path)
    )]
    #[non_exhaustive]
    DirectoryLoop {
        /// The path of the image.
        image: PathBuf,
        /// The path of the directory in the image.
        path: PathBuf,
    },

    /// The directories have more entries than an image of this size can hold, so directories share entries.
    #[error(
        "{}: cannot list the objects: the directories have more than {limit} entries, which the size of the \
         image does not allow",
        shown(image)
    )]
    #[non_exhaustive]
    TooManyEntries {
        /// The path of the image.
        image: PathBuf,
        /// The highest number of entries that the image can hold.
        limit: u64,
    },

    /// A path is longer than the kernel accepts.
    #[error(
        "{}: cannot list the objects: a path has more than 4095 bytes, in the directory {}",
        shown(image),
        shown(directory)
    )]
    #[non_exhaustive]
    PathTooLong {
        /// The path of the image.
        image: PathBuf,
        /// The path of the directory in the image.
        directory: PathBuf,
    },

    /// The caller's callback ended the check.
    #[error("{}: cannot check the objects: cancelled by the caller", shown(image))]
    #[non_exhaustive]
    Cancelled {
        /// The path of the image.
        image: PathBuf,
    },

    /// A system call failed.
    #[error(transparent)]
    Kernel(Box<KernelError>),
}

impl ObjectsError {
    /// Returns the failed system call, if the error is one.
    pub fn kernel(&self) -> Option<&KernelError> {
        match self {
            ObjectsError::Kernel(error) => Some(error),
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
            ObjectsError::Kernel(error) => error.kind(),
            ObjectsError::Cancelled { .. } => ErrorKind::Cancelled,
            _ => ErrorKind::NotAnImage,
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        match self {
            ObjectsError::Kernel(error) => error.hint(),
            ObjectsError::Cancelled { .. } => None,
            _ => Some(Hint::new("get the image again: no tool for composefs makes such an image")),
        }
    }
}

impl From<KernelError> for ObjectsError {
    fn from(error: KernelError) -> ObjectsError {
        ObjectsError::Kernel(Box::new(error))
    }
}
