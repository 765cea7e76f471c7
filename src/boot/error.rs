//! The errors of the set-up of a root file system.

use std::path::PathBuf;

use crate::boot::command_line::CommandLineError;
use crate::digest::{Digest, VerityUnavailable};
use crate::error::Error;
use crate::kernel::{ErrorKind, Hint, KernelError, Operation};
use crate::location::DirectoryError;
use crate::overlay::OverlayError;
use crate::source::SourceError;
use crate::util::text::shown;

/// The reason why a configuration is rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The text is not TOML.
    #[error("{}cannot read TOML: {}", on_line(*line), shown(message))]
    #[non_exhaustive]
    Syntax {
        /// The number of the line, if it is known.
        line: Option<usize>,
        /// The reason.
        message: String,
    },
    /// A table or a key that sealmount does not know.
    #[error("line {line}: cannot use the key {}: unknown", shown(key))]
    #[non_exhaustive]
    UnknownKey {
        /// The number of the line.
        line: usize,
        /// The key, behind its table and a dot.
        key: String,
    },
    /// A value that the key does not accept.
    #[error("line {line}: cannot use {}: expected {expected}", shown(key))]
    #[non_exhaustive]
    BadValue {
        /// The number of the line.
        line: usize,
        /// The key, behind its table and a dot.
        key: String,
        /// The values that the key accepts.
        expected: &'static str,
    },
}

fn on_line(line: Option<usize>) -> String {
    line.map(|line| format!("line {line}: ")).unwrap_or_default()
}

/// The reason why a root file system is not set up. The tree at the place of the root is the tree that was
/// there before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// The kernel command line is rejected.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),

    /// The directory of the disk is missing, or no disk is mounted on it.
    #[error("{}: cannot set up the root: the disk is not mounted", shown(sysroot))]
    #[non_exhaustive]
    DiskMissing {
        /// The directory of the disk.
        sysroot: PathBuf,
    },

    /// The disk has no object directory.
    #[error("{}: cannot set up the root: the disk has no object directory", shown(path))]
    #[non_exhaustive]
    ObjectsMissing {
        /// The path of the object directory.
        path: PathBuf,
    },

    /// No image has a digest of the kernel command line.
    #[error(
        "cannot find the image {}: neither in {} nor in {}",
        any_of(digests),
        shown(images),
        shown(store)
    )]
    #[non_exhaustive]
    ImageMissing {
        /// The digests on the kernel command line.
        digests: Vec<Digest>,
        /// The directory of images in the initramfs.
        images: PathBuf,
        /// The directory of images on the disk.
        store: PathBuf,
    },

    /// The image cannot be mounted.
    #[error(transparent)]
    Mount(#[from] Error),

    /// A directory of the deployment is missing.
    #[error("{}: cannot set up the root: the deployment has no such directory", shown(path))]
    #[non_exhaustive]
    StateMissing {
        /// The path of the directory.
        path: PathBuf,
    },

    /// The image lacks a directory that the configuration needs.
    #[error("/{directory}: cannot set up the root: the image has no such directory")]
    #[non_exhaustive]
    DirectoryMissing {
        /// The name of the directory.
        directory: &'static str,
    },

    /// A system call failed.
    #[error(transparent)]
    Kernel(Box<KernelError>),
}

fn any_of(digests: &[Digest]) -> String {
    digests.iter().map(Digest::to_string).collect::<Vec<_>>().join(" or ")
}

impl SetupError {
    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        match self {
            SetupError::CommandLine(error) => error.kind(),
            SetupError::Mount(error) => error.kind(),
            SetupError::Kernel(error) => error.kind(),
            _ => ErrorKind::NotFound,
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        Some(Hint::new(match self {
            SetupError::CommandLine(error) => return error.hint(),
            SetupError::Mount(error) => match hint_of_mount(error) {
                Some(hint) => hint,
                None => return error.hint(),
            },
            SetupError::Kernel(error) => match (error.operation, error.errno) {
                (Operation::ChangeSuperblock, _) => {
                    "check the disk: it cannot be made writable, and /etc or /var is on it"
                }
                _ => return error.hint(),
            },
            SetupError::DiskMissing { .. } => {
                "check root= on the kernel command line, and the driver of the disk in the initramfs"
            }
            SetupError::ObjectsMissing { .. } => {
                "check that root= is the disk with the objects; sealmount.objects= is the path of the object \
                 directory on this disk"
            }
            SetupError::ImageMissing { .. } => {
                "check the digest on the kernel command line, or add the image to the initramfs or to the \
                 disk"
            }
            SetupError::StateMissing { .. } => {
                "make the directory when the system is installed, with a copy of the same directory of the \
                 image"
            }
            SetupError::DirectoryMissing { .. } => {
                "add the directory to the image, or set mount = \"none\" for it in the configuration"
            }
        }))
    }
}

/// Returns an instruction with words of the kernel command line, if the hint of the error has mount options.
fn hint_of_mount(error: &Error) -> Option<&'static str> {
    Some(match error {
        Error::Source(SourceError::LimitExceeded { .. }) => {
            "raise sealmount.size= on the kernel command line (default: 50% of the memory)"
        }
        Error::Source(SourceError::VerityUnavailable { .. }) => {
            "remove sealmount.copy=off from the kernel command line: sealmount then copies the image"
        }
        Error::Overlay(OverlayError::VerityUnsupported) => {
            "use Linux 6.6 or later, or put ? before the digest on the kernel command line: objects are then not \
             verified when they are read"
        }
        Error::Overlay(OverlayError::VerityBroken { .. }) => {
            "use another kernel: Linux 7.0 has this fault"
        }
        Error::Overlay(OverlayError::ObjectsVerityUnavailable { reason, .. }) => match reason {
            VerityUnavailable::NotEnabled => {
                "enable fs-verity on every object with `fsverity enable`"
            }
            VerityUnavailable::NoDigest => "make the image again with the digests of its objects",
            _ => {
                "use a disk with ext4 (made or tuned with -O verity) or btrfs, and a kernel with CONFIG_FS_VERITY, \
                 or put ? before the digest on the kernel command line: objects are then not verified when they \
                 are read"
            }
        },
        Error::Overlay(OverlayError::ObjectMissing { .. }) => {
            "copy the object into the object directory of the disk"
        }
        _ => return None,
    })
}

impl From<KernelError> for SetupError {
    fn from(error: KernelError) -> SetupError {
        SetupError::Kernel(Box::new(error))
    }
}

impl From<DirectoryError> for SetupError {
    fn from(error: DirectoryError) -> SetupError {
        SetupError::Mount(error.into())
    }
}
