//! What a mount did, step by step, for whoever wants to know.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::compression::Compression;
use crate::digest::Digest;
use crate::error::{KernelError, NotVerity};
use crate::options::Memory;

/// A step that [`MountOptions::mount_with`](crate::MountOptions::mount_with) has done. Its text is
/// one line.
#[derive(Debug)]
#[non_exhaustive]
pub enum Step {
    /// The image was opened, and its header and size are in order.
    ImageOpened {
        /// The image.
        image: PathBuf,
        /// Its size, in bytes; uncompressed.
        size: u64,
        /// How it is compressed.
        compression: Option<Compression>,
        /// The composefs format it says to be of: 0 and 1 are written by mkcomposefs, 2 is V2.
        composefs_version: u32,
    },
    /// The digest of the image is the one asked for.
    DigestVerified {
        /// The digest.
        digest: Digest,
        /// Who found it.
        by: VerifiedBy,
    },
    /// The image is being copied: told at most ten times a second, from half a second on.
    Copying {
        /// How much of it is in memory, in bytes.
        done: u64,
        /// Its size, in bytes.
        total: u64,
    },
    /// The image lies in sealed memory; its file is not in use any more.
    Copied {
        /// Its size, in bytes.
        size: u64,
        /// The kind of memory.
        memory: Memory,
    },
    /// A way to do it that this kernel does not have. The next one is tried.
    NotTaken {
        /// The way.
        rung: Rung,
        /// The kernel's answer.
        error: KernelError,
    },
    /// The way that the kernel took.
    Taken {
        /// The way.
        rung: Rung,
    },
    /// The image is known to hold no ACL, and is mounted with `noacl`.
    WithoutAcls,
    /// The image is attached to a loop device.
    LoopDevice {
        /// The device.
        device: PathBuf,
    },
    /// The mount of the image got the mapping of a user namespace.
    Idmapped {
        /// The namespace.
        user_namespace: PathBuf,
    },
    /// Whether the objects are verified.
    Verity(ObjectVerity),
}

/// Who found out the digest of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerifiedBy {
    /// The kernel's fs-verity: every read of the file is verified.
    Kernel,
    /// sealmount computed it from the bytes that went into the copy.
    Copy,
}

/// Whether a mount verifies the objects that it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ObjectVerity {
    /// overlayfs checks every object against the digest in the image, and the kernel's fs-verity
    /// every read of it.
    Enforced,
    /// Not: it was not asked for.
    Off,
    /// Not: `noverity`, also where a digest verified the image.
    Noverity,
    /// Not: `tryverity`, and this kernel's overlayfs does not know `verity=require`.
    UnsupportedByOverlay,
    /// Not: `tryverity`, and the objects would fail to verify.
    UnsupportedByObjects(NotVerity),
}

/// The ways to hand an image and its layers to the kernel, newest first in each group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rung {
    /// The image as an EROFS source by descriptor (Linux 7.3).
    SourceByDescriptor,
    /// The image as an EROFS source by the path of its descriptor, in a procfs (Linux 6.12).
    SourceByPath,
    /// The image through a loop device (Linux 5.8).
    SourceByLoopDevice,
    /// Detached layers by descriptor (Linux 6.15).
    LayersByDescriptor,
    /// Layers by path, a string each, in a private mount namespace (Linux 6.7).
    LayersByPath,
    /// Layers in one string with data-only ones, in a private mount namespace (Linux 6.5).
    LayersInOneString,
    /// Layers in one string, all of one kind, in a private mount namespace.
    LowerLayersInOneString,
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rung::SourceByDescriptor => "EROFS source by descriptor",
            Rung::SourceByPath => "EROFS source by path of the descriptor",
            Rung::SourceByLoopDevice => "EROFS source by loop device",
            Rung::LayersByDescriptor => "overlay layers by descriptor",
            Rung::LayersByPath => "overlay layers by path, in a private mount namespace",
            Rung::LayersInOneString => "overlay layers in one string, in a private mount namespace",
            Rung::LowerLayersInOneString => {
                "overlay layers in one string without data-only ones, in a private mount namespace"
            }
        })
    }
}

impl fmt::Display for ObjectVerity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectVerity::Enforced => f.write_str("objects are verified (verity=require)"),
            ObjectVerity::Off => f.write_str("objects are not verified: not asked for"),
            ObjectVerity::Noverity => f.write_str("objects are not verified: noverity"),
            ObjectVerity::UnsupportedByOverlay => f.write_str(
                "objects are not verified: this kernel's overlayfs has no verity=require",
            ),
            ObjectVerity::UnsupportedByObjects(reason) => {
                write!(f, "objects are not verified: of an object directory, {reason}")
            }
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::ImageOpened { image, size, compression, composefs_version } => {
                let image = image.display();
                let compressed = match compression {
                    Some(compression) => format!(" uncompressed ({compression})"),
                    None => String::new(),
                };
                let format = if *composefs_version < 2 { 1 } else { *composefs_version };
                write!(f, "image {image}: {size} bytes{compressed}, format V{format}")
            }
            Step::DigestVerified { digest, by } => {
                let by = match by {
                    VerifiedBy::Kernel => "by the kernel's fs-verity",
                    VerifiedBy::Copy => "computed while copying",
                };
                write!(f, "image has the digest {digest}, {by}")
            }
            Step::Copying { done, total } => write!(f, "copying: {done} of {total} bytes"),
            Step::Copied { size, memory } => {
                let memory = match memory {
                    Memory::Memfd => "a sealed memfd",
                    Memory::Ramfs => "a read-only ramfs",
                };
                write!(f, "image copied into {memory}: {size} bytes")
            }
            Step::NotTaken { rung, error } => write!(f, "{rung}: not here: {error}"),
            Step::Taken { rung: rung @ (Rung::SourceByDescriptor | Rung::SourceByPath) } => {
                write!(f, "{rung}: taken, no loop device")
            }
            Step::Taken { rung } => write!(f, "{rung}: taken"),
            Step::WithoutAcls => f.write_str("image has no ACLs: noacl"),
            Step::LoopDevice { device } => write!(f, "loop device {}", device.display()),
            Step::Idmapped { user_namespace } => {
                write!(f, "image idmapped as {}", user_namespace.display())
            }
            Step::Verity(verity) => verity.fmt(f),
        }
    }
}

/// Tells of a copy while it lasts.
pub(crate) struct Progress<'a> {
    total: u64,
    steps: &'a mut dyn FnMut(Step),
    next: Instant,
}

impl<'a> Progress<'a> {
    pub fn new(total: u64, steps: &'a mut dyn FnMut(Step)) -> Progress<'a> {
        Progress { total, steps, next: Instant::now() + Duration::from_millis(500) }
    }

    pub fn at(&mut self, done: u64) {
        let now = Instant::now();
        if now >= self.next {
            self.next = now + Duration::from_millis(100);
            (self.steps)(Step::Copying { done, total: self.total });
        }
    }
}
