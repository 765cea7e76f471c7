//! The reason why an overlay cannot be mounted.

use std::path::PathBuf;

use crate::digest::{Digest, VerityUnavailable};
use crate::erofs::ErofsError;
use crate::kernel::{ErrorKind, Hint, KernelError, errno_text};
use crate::location::{DirectoryError, DirectoryRole};
use crate::objects::{CheckReport, ObjectProblemKind, ObjectsError};
use crate::util::text::shown;

/// The reason why an overlay cannot be mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlayError {
    /// The options name no object directory.
    #[error("object directories: cannot mount an overlay: no directory given")]
    NoObjects,

    /// A directory is missing, not a directory, or out of reach.
    #[error(transparent)]
    Directory(#[from] DirectoryError),

    /// A directory is given twice. overlayfs uses a directory for one layer only.
    #[error(
        "{role} {}: cannot use the directory twice: it is also the {other_role} {}",
        shown(path),
        shown(other_path)
    )]
    #[non_exhaustive]
    SameDirectory {
        /// The purpose of the directory.
        role: DirectoryRole,
        /// The path of the directory.
        path: PathBuf,
        /// The other purpose of the directory.
        other_role: DirectoryRole,
        /// The path for the other purpose.
        other_path: PathBuf,
    },

    /// `upperdir` and `workdir` are not on one mount, as overlayfs requires.
    #[error(
        "workdir {}: cannot use the directory: it is not on the mount of upperdir {}",
        shown(workdir),
        shown(upperdir)
    )]
    #[non_exhaustive]
    WorkdirOnOtherMount {
        /// The path of `upperdir`.
        upperdir: PathBuf,
        /// The path of `workdir`.
        workdir: PathBuf,
    },

    /// Verity is required, and overlayfs would fail to open the objects of a directory.
    #[error("{}: cannot enforce verity: {reason}", shown(path))]
    #[non_exhaustive]
    ObjectsVerityUnavailable {
        /// The object directory, or an object in it.
        path: PathBuf,
        /// The reason.
        reason: VerityUnavailable,
    },

    /// Verity is required, and the kernel's overlayfs does not know `verity=require`.
    #[error("overlayfs: cannot enforce verity: verity=require needs Linux 6.6")]
    VerityUnsupported,

    /// The kernel rejected the layers, and an object directory is on an overlayfs. The kernel stacks an
    /// overlay on one overlayfs, and not on an overlayfs above another overlayfs.
    #[error(
        "{}: cannot use the objects: the directory is on an overlayfs, and the kernel rejects the layers \
         ({})",
        shown(path),
        errno_text(source.errno)
    )]
    #[non_exhaustive]
    ObjectsOnOverlay {
        /// The object directory.
        path: PathBuf,
        /// The failed system call.
        source: Box<KernelError>,
    },

    /// Verity is required, and overlayfs does not open a file although its object has the right fs-verity
    /// digest. Linux 7.0 has this fault.
    #[error(
        "{}: cannot enforce verity: overlayfs fails with EIO, although the object of the file has the right \
         fs-verity digest",
        shown(file)
    )]
    #[non_exhaustive]
    VerityBroken {
        /// The path of the file in the image.
        file: PathBuf,
    },

    /// Verity is required, and the object of a file is in no object directory.
    #[error(
        "{}: cannot open the file through the mount: no object directory has its object {}",
        shown(file),
        shown(object)
    )]
    #[non_exhaustive]
    ObjectMissing {
        /// The path of the file in the image.
        file: PathBuf,
        /// The path of the object, relative to an object directory.
        object: PathBuf,
    },

    /// Verity is required, and an object has another fs-verity digest than the image has for the object.
    #[error(
        "{}: cannot verify the object: its fs-verity digest is {found}, expected {expected}",
        shown(path)
    )]
    #[non_exhaustive]
    ObjectMismatch {
        /// The path of the object.
        path: PathBuf,
        /// The digest in the image.
        expected: Box<Digest>,
        /// The digest that the kernel measures.
        found: Box<Digest>,
    },

    /// Objects of the image fail the check that the options request.
    #[error(
        "{}: cannot use the objects: {} of {} objects failed the check",
        shown(image),
        report.failed,
        report.objects
    )]
    #[non_exhaustive]
    ObjectsDamaged {
        /// The path of the image.
        image: PathBuf,
        /// The report, which names the first objects that fail.
        report: Box<CheckReport>,
    },

    /// The objects of the image cannot be listed.
    #[error(transparent)]
    Objects(#[from] ObjectsError),

    /// The EROFS mount cannot be cloned for the overlay.
    #[error(transparent)]
    Erofs(#[from] ErofsError),

    /// A system call failed.
    #[error(transparent)]
    Kernel(Box<KernelError>),
}

impl OverlayError {
    /// Returns the failed system call, if the error is one.
    pub fn kernel(&self) -> Option<&KernelError> {
        match self {
            OverlayError::Objects(error) => error.kernel(),
            OverlayError::Erofs(error) => error.kernel(),
            OverlayError::Kernel(error) | OverlayError::ObjectsOnOverlay { source: error, .. } => {
                Some(error)
            }
            _ => None,
        }
    }

    /// Returns the report of the check, if objects fail it.
    pub fn check_report(&self) -> Option<&CheckReport> {
        match self {
            OverlayError::ObjectsDamaged { report, .. } => Some(report),
            _ => None,
        }
    }

    /// Returns the [errno](https://man7.org/linux/man-pages/man3/errno.3.html) of the failed system call, if
    /// there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            OverlayError::Directory(error) => Some(error.raw_os_error()),
            OverlayError::Objects(error) => error.raw_os_error(),
            OverlayError::Erofs(error) => error.raw_os_error(),
            _ => self.kernel().map(KernelError::raw_os_error),
        }
    }

    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        match self {
            OverlayError::Directory(error) => error.kind(),
            OverlayError::NoObjects
            | OverlayError::SameDirectory { .. }
            | OverlayError::WorkdirOnOtherMount { .. } => ErrorKind::InvalidOptions,
            OverlayError::ObjectsVerityUnavailable { .. }
            | OverlayError::VerityUnsupported
            | OverlayError::VerityBroken { .. } => ErrorKind::VerityUnavailable,
            OverlayError::ObjectMissing { .. } => ErrorKind::NotFound,
            OverlayError::ObjectMismatch { .. } => ErrorKind::DigestMismatch,
            OverlayError::ObjectsDamaged { .. } => ErrorKind::ObjectsDamaged,
            OverlayError::Objects(error) => error.kind(),
            OverlayError::Erofs(error) => error.kind(),
            OverlayError::Kernel(error) | OverlayError::ObjectsOnOverlay { source: error, .. } => {
                error.kind()
            }
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        Some(match self {
            OverlayError::Directory(error) => return error.hint(),
            OverlayError::NoObjects => Hint::of_types_or_options(
                "add a directory to OverlayOptions::objects",
                "add the option basedir=",
            ),
            OverlayError::ObjectsVerityUnavailable {
                reason: VerityUnavailable::NotEnabled,
                ..
            } => Hint::of_types_or_options(
                "enable fs-verity on every object with `fsverity enable`, or set Verity::Off: objects are \
                 then not verified when they are read",
                "enable fs-verity on every object with `fsverity enable`, or add noverity: objects are \
                 then not verified when they are read",
            ),
            OverlayError::ObjectsVerityUnavailable {
                reason: VerityUnavailable::NoDigest, ..
            } => Hint::of_types_or_options(
                "make the image again with the digests of its objects, or set Verity::Off: objects are \
                 then not verified when they are read",
                "make the image again with the digests of its objects, or add noverity: objects are then \
                 not verified when they are read",
            ),
            OverlayError::ObjectsVerityUnavailable { .. } => Hint::of_types_or_options(
                "use ext4 (made or tuned with -O verity) or btrfs, without an overlayfs on top, and a \
                 kernel with CONFIG_FS_VERITY, or set Verity::Off: objects are then not verified when they \
                 are read",
                "use ext4 (made or tuned with -O verity) or btrfs, without an overlayfs on top, and a \
                 kernel with CONFIG_FS_VERITY, or add noverity: objects are then not verified when they \
                 are read",
            ),
            OverlayError::ObjectsOnOverlay { .. } => Hint::new(
                "give an object directory that is not on an overlayfs, or look into dmesg: the kernel \
                 stacks an overlay on one overlayfs, and not on two",
            ),
            OverlayError::VerityUnsupported => Hint::of_types_or_options(
                "set Verity::Try or Verity::Off: objects are then not verified when they are read",
                "add verity=try or noverity: objects are then not verified when they are read",
            ),
            OverlayError::VerityBroken { .. } => Hint::of_types_or_options(
                "use another kernel (Linux 7.0 has this fault), or set Verity::Off: objects are then not \
                 verified when they are read",
                "use another kernel (Linux 7.0 has this fault), or add noverity: objects are then not \
                 verified when they are read",
            ),
            OverlayError::ObjectMissing { .. } => Hint::of_types_or_options(
                "copy the object into an object directory, or add its directory to OverlayOptions::objects",
                "copy the object into an object directory, or add its directory to basedir=",
            ),
            OverlayError::ObjectMismatch { .. } => {
                Hint::new("restore the object: the object is damaged, or was replaced")
            }
            OverlayError::ObjectsDamaged { report, .. } => damaged_hint(report),
            OverlayError::Objects(error) => return error.hint(),
            OverlayError::Erofs(error) => return error.hint(),
            OverlayError::Kernel(error) => return error.hint(),
            _ => return None,
        })
    }
}

fn damaged_hint(report: &CheckReport) -> Hint {
    match report.failed_by_kind[..] {
        [(ObjectProblemKind::Missing, missing)] if missing == report.objects => {
            Hint::of_types_or_options(
                "all objects are missing: check OverlayOptions::objects",
                "all objects are missing: check the object directories (basedir=)",
            )
        }
        [(ObjectProblemKind::VerityUnavailable, _)] => Hint::of_types_or_options(
            "enable fs-verity on every object with `fsverity enable`, or set Verity::Off: objects are then \
             not verified when they are read",
            "enable fs-verity on every object with `fsverity enable`, or add noverity: objects are then \
             not verified when they are read",
        ),
        _ if report.failed > report.failures.len() as u64 => {
            Hint::new("get the named objects again, then repeat the check: more objects failed")
        }
        _ => Hint::new("get the named objects again"),
    }
}

impl From<KernelError> for OverlayError {
    fn from(error: KernelError) -> OverlayError {
        OverlayError::Kernel(Box::new(error))
    }
}
