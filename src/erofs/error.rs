//! The reason why an EROFS cannot be mounted.

use std::path::PathBuf;

use crate::kernel::{ErrorKind, Hint, KernelError};
use crate::source::LoopDeviceError;
use crate::util::text::shown;

/// The reason why an EROFS cannot be mounted or idmapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErofsError {
    /// The image cannot be attached to a loop device.
    #[error(transparent)]
    LoopDevice(#[from] LoopDeviceError),

    /// The file is not a user namespace.
    #[error("{}: cannot idmap the mount: the file is not a user namespace", shown(path))]
    #[non_exhaustive]
    NotUserNamespace {
        /// The path of the file.
        path: PathBuf,
    },

    /// The mount is idmapped already. The kernel idmaps a mount only once.
    #[error("{}: cannot idmap the mount: it is idmapped already", shown(image))]
    #[non_exhaustive]
    AlreadyIdmapped {
        /// The path of the image.
        image: PathBuf,
    },

    /// A system call failed.
    #[error(transparent)]
    Kernel(Box<KernelError>),
}

impl ErofsError {
    /// Returns the failed system call, if the error is one.
    pub fn kernel(&self) -> Option<&KernelError> {
        match self {
            ErofsError::LoopDevice(error) => error.kernel(),
            ErofsError::Kernel(error) => Some(error),
            _ => None,
        }
    }

    /// Returns the [errno](https://man7.org/linux/man-pages/man3/errno.3.html) of the failed system call, if
    /// there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            ErofsError::LoopDevice(error) => error.raw_os_error(),
            _ => self.kernel().map(KernelError::raw_os_error),
        }
    }

    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ErofsError::LoopDevice(error) => error.kind(),
            ErofsError::NotUserNamespace { .. } | ErofsError::AlreadyIdmapped { .. } => {
                ErrorKind::InvalidOptions
            }
            ErofsError::Kernel(error) => error.kind(),
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        match self {
            ErofsError::LoopDevice(error) => error.hint(),
            ErofsError::NotUserNamespace { .. } => {
                Some(Hint::new("give a path such as /proc/PID/ns/user"))
            }
            ErofsError::AlreadyIdmapped { .. } => {
                Some(Hint::new("idmap the mount that Source::mount returned"))
            }
            ErofsError::Kernel(error) => error.hint(),
        }
    }
}

impl From<KernelError> for ErofsError {
    fn from(error: KernelError) -> ErofsError {
        ErofsError::Kernel(Box::new(error))
    }
}
