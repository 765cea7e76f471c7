//! The error of a mount, which gathers the errors of the stages.

use crate::attach::{AttachError, AttachProblem};
use crate::erofs::ErofsError;
use crate::image::ImageError;
use crate::kernel::{ErrorKind, Hint, KernelError};
use crate::location::DirectoryError;
use crate::objects::{CheckReport, ObjectsError};
use crate::options::OptionsError;
use crate::overlay::OverlayError;
use crate::record::RecordError;
use crate::remount::RemountError;
use crate::source::SourceError;

/// The reason why an image could not be mounted. No mount, device or file is left.
///
/// The type has one variant for each stage. [`kind`](Error::kind) is the category of the error in any stage:
/// a program decides by the kind. The text is one line: the object, the step that failed, and the kernel's
/// reason. [`hint`](Error::hint) is an instruction for a person.
///
/// ```
/// use sealmount::{ErrorKind, MountOptions};
///
/// let error = MountOptions::new("/no/objects").mount("/no/image.cfs").unwrap_err();
/// match error.kind() {
///     ErrorKind::OutOfMemory | ErrorKind::Busy => println!("try again later"),
///     ErrorKind::NotAnImage | ErrorKind::DigestMismatch => println!("get the image again"),
///     _ => println!("an operator must act"),
/// }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The options contradict each other.
    #[error(transparent)]
    Options(#[from] OptionsError),

    /// The image cannot be opened.
    #[error(transparent)]
    Image(#[from] ImageError),

    /// The image is not verified or not copied.
    #[error(transparent)]
    Source(#[from] SourceError),

    /// The EROFS cannot be mounted.
    #[error(transparent)]
    Erofs(#[from] ErofsError),

    /// The overlay cannot be mounted.
    #[error(transparent)]
    Overlay(#[from] OverlayError),

    /// The mount cannot be attached.
    #[error(transparent)]
    Attach(#[from] AttachProblem),

    /// The mount cannot be remounted.
    #[error(transparent)]
    Remount(#[from] RemountError),

    /// The options of the mount cannot be recorded.
    #[error(transparent)]
    Record(#[from] RecordError),

    /// The caller's callback ended the mount.
    #[error("mount: cancelled by the caller")]
    Cancelled,

    /// A system call that belongs to no stage failed.
    #[error(transparent)]
    Kernel(Box<KernelError>),
}

impl Error {
    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Options(error) => error.kind(),
            Error::Image(error) => error.kind(),
            Error::Source(error) => error.kind(),
            Error::Erofs(error) => error.kind(),
            Error::Overlay(error) => error.kind(),
            Error::Attach(error) => error.kind(),
            Error::Remount(error) => error.kind(),
            Error::Record(error) => error.kind(),
            Error::Cancelled => ErrorKind::Cancelled,
            Error::Kernel(error) => error.kind(),
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        match self {
            Error::Options(error) => error.hint(),
            Error::Image(error) => error.hint(),
            Error::Source(error) => error.hint(),
            Error::Erofs(error) => error.hint(),
            Error::Overlay(error) => error.hint(),
            Error::Attach(error) => error.hint(),
            Error::Remount(error) => error.hint(),
            Error::Record(error) => error.hint(),
            Error::Cancelled => None,
            Error::Kernel(error) => error.hint(),
        }
    }

    /// Returns the report of the check, if objects fail it.
    pub fn check_report(&self) -> Option<&CheckReport> {
        match self {
            Error::Overlay(error) => error.check_report(),
            _ => None,
        }
    }

    /// Returns the failed system call, if the error is one.
    pub fn kernel(&self) -> Option<&KernelError> {
        match self {
            Error::Options(_) | Error::Cancelled => None,
            Error::Image(error) => error.kernel(),
            Error::Source(error) => error.kernel(),
            Error::Erofs(error) => error.kernel(),
            Error::Overlay(error) => error.kernel(),
            Error::Attach(error) => error.kernel(),
            Error::Remount(error) => error.kernel(),
            Error::Record(error) => error.kernel(),
            Error::Kernel(error) => Some(error),
        }
    }

    /// Returns the [errno](https://man7.org/linux/man-pages/man3/errno.3.html) of the failed system call, if
    /// there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Error::Options(_) | Error::Cancelled => None,
            Error::Image(error) => error.raw_os_error(),
            Error::Source(error) => error.raw_os_error(),
            Error::Erofs(error) => error.raw_os_error(),
            Error::Overlay(error) => error.raw_os_error(),
            Error::Attach(error) => error.raw_os_error(),
            Error::Remount(error) => error.raw_os_error(),
            Error::Record(error) => error.kernel().map(KernelError::raw_os_error),
            Error::Kernel(error) => Some(error.raw_os_error()),
        }
    }
}

impl From<KernelError> for Error {
    fn from(error: KernelError) -> Error {
        Error::Kernel(Box::new(error))
    }
}

impl From<ObjectsError> for Error {
    fn from(error: ObjectsError) -> Error {
        Error::Overlay(error.into())
    }
}

impl From<DirectoryError> for Error {
    fn from(error: DirectoryError) -> Error {
        Error::Attach(error.into())
    }
}

/// Drops the mount. [`AttachError::into_mount`] returns it.
impl From<AttachError> for Error {
    fn from(error: AttachError) -> Error {
        Error::Attach(error.into_problem())
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> std::io::Error {
        use std::io::ErrorKind as Io;
        let kind = match error.kind() {
            ErrorKind::InvalidOptions => Io::InvalidInput,
            ErrorKind::NotAnImage | ErrorKind::DigestMismatch | ErrorKind::ObjectsDamaged => {
                Io::InvalidData
            }
            ErrorKind::NotFound => Io::NotFound,
            ErrorKind::PermissionDenied => Io::PermissionDenied,
            ErrorKind::VerityUnavailable | ErrorKind::Unsupported => Io::Unsupported,
            ErrorKind::OutOfMemory => Io::OutOfMemory,
            ErrorKind::LimitExceeded => Io::QuotaExceeded,
            ErrorKind::Busy => Io::ResourceBusy,
            // The kind is not Interrupted, because many loops then try again.
            ErrorKind::Cancelled => Io::Other,
            _ => Io::Other,
        };
        std::io::Error::new(kind, error)
    }
}

/// Converts the error of a stage into the error of the mount, and then into a standard error.
macro_rules! into_io_error {
    ($($stage:ty),*) => {
        $(impl From<$stage> for std::io::Error {
            fn from(error: $stage) -> std::io::Error {
                Error::from(error).into()
            }
        })*
    };
}

into_io_error!(
    OptionsError,
    ImageError,
    SourceError,
    ErofsError,
    OverlayError,
    ObjectsError,
    AttachError,
    RemountError,
    RecordError,
    DirectoryError
);

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;
    use crate::kernel::Operation;
    use crate::source::LoopDeviceError;

    #[test]
    fn nested_kernel_error_keeps_its_errno() {
        let kernel = || KernelError::new(Operation::ReadImage, Errno::IO);
        let errors: [Error; 8] = [
            kernel().into(),
            ImageError::from(kernel()).into(),
            SourceError::from(ImageError::from(kernel())).into(),
            ErofsError::from(LoopDeviceError::from(kernel())).into(),
            OverlayError::from(kernel()).into(),
            OverlayError::from(ErofsError::from(LoopDeviceError::from(kernel()))).into(),
            ObjectsError::from(kernel()).into(),
            AttachProblem::from(kernel()).into(),
        ];
        for error in errors {
            let found = error.kernel().map(KernelError::operation);
            assert_eq!(found, Some(Operation::ReadImage), "{error:?}");
            assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()), "{error:?}");
        }
    }
}
