//! The events of a mount, as they happen.

use std::fmt;
use std::path::PathBuf;

use crate::digest::Digest;
use crate::erofs::SourceMethod;
use crate::image::{Compression, Format};
use crate::kernel::KernelError;
use crate::objects::{CheckProgress, CheckReport};
use crate::overlay::{LayerMethod, ObjectVerity};
use crate::source::{MemoryKind, Progress, VerifiedBy};
use crate::util::text::shown;

/// An event of [`MountOptions::mount_with_events`](crate::MountOptions::mount_with_events). The text of an
/// event is one line.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// The image is opened, and its header and size are right.
    #[non_exhaustive]
    ImageOpened {
        /// The path of the image.
        image: PathBuf,
        /// The size of the image, in bytes, decompressed.
        size: u64,
        /// The compression of the file.
        compression: Option<Compression>,
        /// The format of the image.
        format: Format,
    },
    /// The image is being copied, or hashed in place. At most a hundred of these events come in a second.
    Copying(Progress),
    /// The image has the expected digest.
    #[non_exhaustive]
    DigestVerified {
        /// The digest.
        digest: Digest,
        /// The verifier: the kernel or sealmount.
        by: VerifiedBy,
    },
    /// The image is in sealed memory. The file is not in use any more.
    #[non_exhaustive]
    Copied {
        /// The size of the image, in bytes.
        size: u64,
        /// The kind of memory.
        memory: MemoryKind,
    },
    /// The image is a sealed memfd, which is used in place.
    UsedInPlace,
    /// This kernel does not support a method. The next method is tried.
    #[non_exhaustive]
    MethodUnsupported {
        /// The method.
        method: Method,
        /// The kernel's error.
        error: KernelError,
    },
    /// A method succeeded.
    #[non_exhaustive]
    MethodUsed {
        /// The method.
        method: Method,
    },
    /// The image is known to hold no ACL, and is mounted with `noacl`.
    WithoutAcls,
    /// The image is attached to a loop device.
    #[non_exhaustive]
    LoopDevice {
        /// The path of the device.
        device: PathBuf,
    },
    /// The mount of the image has the mapping of a user namespace.
    #[non_exhaustive]
    Idmapped {
        /// The path of the namespace.
        user_namespace: PathBuf,
    },
    /// The progress of the check of every object, at most a hundred times a second.
    Checking(CheckProgress),
    /// The report of the check: all objects pass.
    ObjectsChecked(CheckReport),
    /// The verification of the objects.
    Verity(ObjectVerity),
    /// No other overlay can be mounted on the mount ([`Stacking`](crate::Stacking)), and there is no loop
    /// device to avoid this.
    #[non_exhaustive]
    NotStackable {
        /// The kernel's error.
        error: KernelError,
    },
    /// A sampled file cannot be read: no object directory has its object. With
    /// [`Verity::Require`](crate::Verity::Require), sealmount rejects the mount instead.
    #[non_exhaustive]
    ObjectMissing {
        /// The path of the file in the image.
        file: PathBuf,
        /// The path of the object, relative to an object directory.
        object: PathBuf,
    },
}

/// A method to give an image or its layers to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Method {
    /// A method to give an image to EROFS.
    Source(SourceMethod),
    /// A method to give layers to overlayfs.
    Layers(LayerMethod),
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Method::Source(method) => method.fmt(f),
            Method::Layers(method) => method.fmt(f),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::ImageOpened { image, size, compression, format } => {
                let image = shown(image);
                match compression {
                    Some(compression) => {
                        write!(
                            f,
                            "image {image}: {format}, {size} bytes, decompressed ({compression})"
                        )
                    }
                    None => write!(f, "image {image}: {format}, {size} bytes"),
                }
            }
            Event::Copying(Progress { done, total, .. }) => {
                write!(f, "copying: {done} of {total} bytes")
            }
            Event::DigestVerified { digest, by } => {
                write!(f, "image has the digest {digest}, {by}")
            }
            Event::Copied { size, memory } => {
                write!(f, "image copied into a {memory}: {size} bytes")
            }
            Event::UsedInPlace => f.write_str("image is a sealed memfd: used in place"),
            Event::MethodUnsupported { method, error } => {
                write!(
                    f,
                    "{method}: not supported by this kernel, trying the next method ({error})"
                )
            }
            Event::MethodUsed { method } => write!(f, "{method}: used"),
            Event::WithoutAcls => f.write_str("image has no ACLs: noacl"),
            Event::LoopDevice { device } => write!(f, "loop device {}", shown(device)),
            Event::Idmapped { user_namespace } => {
                write!(f, "image idmapped with {}", shown(user_namespace))
            }
            Event::Checking(CheckProgress { done, total, bytes, total_bytes, .. }) => {
                write!(f, "checking objects: {done} of {total} files and directories")?;
                match total_bytes {
                    0 => Ok(()),
                    _ => write!(f, ", {bytes} of {total_bytes} bytes"),
                }
            }
            Event::ObjectsChecked(report) => report.fmt(f),
            Event::Verity(verity) => verity.fmt(f),
            Event::NotStackable { error } => write!(
                f,
                "no overlay can be mounted on the mount, as systemd-sysext and containers do, unless \
                 there are loop devices ({error})"
            ),
            Event::ObjectMissing { file, object } => write!(
                f,
                "file {} cannot be read: no object directory has its object {}",
                shown(file),
                shown(object)
            ),
        }
    }
}
