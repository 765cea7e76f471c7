//! Mounts [composefs] images, from their file or from sealed memory.
//!
//! A composefs image is a small EROFS file with the metadata of a file tree. The contents of its
//! files are objects in one or more directories, named by their [fs-verity] digest. overlayfs joins the
//! image and the objects.
//!
//! # One call
//!
//! ```no_run
//! use sealmount::{MemoryKind, MountOptions};
//!
//! let mut options = MountOptions::new("/sysroot/objects");
//! options.digest =
//!     Some("9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1".parse()?);
//! options.copy = Some(MemoryKind::Memfd);
//! let mount = options.mount("/boot/image.cfs")?;
//! mount.attach("/sysroot/new")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Stages
//!
#![doc = include_str!("../docs/pipeline.svg")]
//!
//! Each stage of a mount is a type. A stage is made from the stage before it, and can be used alone:
//!
//! | stage | type | state |
//! |---|---|---|
//! | 1 | [`Image`] | opened: header, size, format and compression are known, and not verified |
//! | 2 | [`Source`] | trusted: a file that the kernel verifies, or a sealed copy |
//! | 3 | [`ErofsMount`] | mounted: the bare EROFS, detached, idmapped if needed |
//! | 4 | [`Overlay`] | object directories and an upper layer, opened and checked |
//! | 5 | [`DetachedMount`] | a finished mount, to be attached, handed on or cloned |
//!
//! One sealed copy serves any number of mounts:
//!
//! ```no_run
//! use sealmount::{CopyOptions, Image, MemoryKind, OverlayOptions, UpperLayer};
//!
//! let mut copy = CopyOptions::new(MemoryKind::Memfd);
//! copy.digest = Some("9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1".parse()?);
//! let erofs = Image::open("/images/base.cfs")?.copy(&copy)?.mount()?;
//!
//! for name in ["one", "two", "three"] {
//!     let directory = format!("/run/containers/{name}");
//!     let mut options = OverlayOptions::new("/images/objects");
//!     options.upper = Some(UpperLayer::new(
//!         format!("{directory}/upper"),
//!         format!("{directory}/work"),
//!     ));
//!     let image = erofs.idmapped(format!("{directory}/user-namespace"))?;
//!     options.open()?.mount(&image)?.attach(format!("{directory}/root"))?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is verified
//!
//! With a digest, an image is mounted only if it has that fs-verity digest. With a copy, the image is hashed
//! while it is copied into sealed memory. Afterwards the file is not in use any more, and no process can
//! change the copy. Without a copy, the kernel's fs-verity must verify the file, or the file is a sealed
//! memfd, which is hashed in place. A digest implies
//! [`Verity::Require`]: overlayfs checks every object against the image. If the system cannot enforce this
//! check, the mount is rejected.
//! For objects without fs-verity, set [`OverlayOptions::verity`] to [`Verity::Off`] or [`Verity::Try`].
//!
//! # More
//!
//! - Check every object before a mount or an update: [`OverlayOptions::check`], [`Overlay::check_objects`].
//! - List the objects that an image needs: [`ErofsMount::objects`].
//! - Cancel a mount, or show its progress: [`MountOptions::mount_with_events`], [`Image::copy_with_progress`].
//! - Replace a mounted tree without a gap: [`DetachedMount::attach_beneath`].
//! - Change the flags of a mount: [`AttachedMount::remount`].
//! - Record the options that the kernel does not show, for a remount: [`MountRecord`]. A mount by the library
//!   has no record until the program writes a record.
//! - Hand a mount to another process: [`DetachedMount::into_fd`], and `DetachedMount::from` there.
//! - Mount a sealed memfd in place: give its descriptor to [`Image::open`].
//! - Mount a plain EROFS image: [`Image::open_erofs`], [`ErofsMount::into_detached`].
//! - Compute the digest of a file on all CPUs: [`Digest::of_file`], [`Digest::of_reader`].
//!
//! The examples `quickstart`, `snapshotter`, `updater` and `handover` are complete programs.
//!
//! # Errors
//!
//! Each stage has its own error, and [`Error`] gathers these errors. A program decides by [`Error::kind`].
//! [`Error::hint`] is an instruction for a person.
//!
//! # Kernels
//!
//! sealmount supports Linux 6.1 and later. It tries a capability of the kernel when the capability is needed.
//! If the kernel does not support a method, the next method is used. Mounting, and a copy in a ramfs, need
//! `CAP_SYS_ADMIN` in the initial user namespace. Opening and hashing an image, and a copy in a memfd, do not
//! need it. Threads live only during a call. The library installs no signal handlers, does not print and does
//! not change the working directory.
//!
//! # Features
//!
//! | feature | brings |
//! |---|---|
//! | (default) | the library, for uncompressed images: Rust only, no argument parser |
//! | `zstd`, `xz` | decoders for compressed images (libzstd and liblzma, built from C) |
//! | `gzip` | a decoder for compressed images (Rust) |
//! | `cli` | the mount helper, without decoders |
//! | `boot` | the module `boot`: the root file system of a system that boots from an image |
//! | `helper` | the mount helper with all decoders: `cargo install sealmount --features helper` |
//!
//! [composefs]: https://github.com/composefs/composefs
//! [fs-verity]: https://docs.kernel.org/filesystems/fsverity.html
#![forbid(unsafe_code)]

mod attach;
#[cfg(feature = "boot")]
pub mod boot;
mod digest;
mod erofs;
mod error;
mod event;
mod image;
mod kernel;
mod location;
mod mount;
mod objects;
mod options;
mod overlay;
mod record;
mod remount;
mod source;
mod util;

#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;

pub use attach::{
    AttachError, AttachProblem, DetachedMount, MountReport, enter_mount_namespace, open_mount_point,
};
pub use digest::{Algorithm, Digest, ParseDigestError, VerityStatus, VerityUnavailable};
pub use erofs::{ErofsError, ErofsMount, ErofsReport, SourceMethod, check_permission};
pub use error::Error;
pub use event::{Event, Method};
pub use image::{Compression, Format, Header, Image, ImageError, ImageProblem};
pub use kernel::{ErrorKind, Hint, KernelError, Operation, Unsupported};
pub use location::{DirectoryError, DirectoryRole, Location};
pub use objects::{
    CheckProgress, CheckReport, ImageObject, ObjectCheck, ObjectFailure, ObjectProblem,
    ObjectProblemKind, Objects, ObjectsError,
};
pub use options::{MountFlags, MountOptions, OptionsError, RemountOptions, Sloppy};
pub use overlay::{
    Atime, LayerMethod, MountAttributes, ObjectVerity, Overlay, OverlayError, OverlayOptions,
    OverlayReport, SelinuxContexts, Stacking, SuperblockFlags, UpperLayer, Verity,
};
pub use record::{MountRecord, RecordError, RecordProblem};
pub use remount::{AttachedMount, RemountError, RemountReport};
pub use source::{
    CopyOptions, LoopDeviceError, MemoryKind, Progress, SizeLimit, Source, SourceError,
    SourceReport, Verified, VerifiedBy,
};

/// Returns whether this process is root. Panics if it is not root and SEALMOUNT_SKIP_ROOT_TESTS is not set.
#[cfg(test)]
fn may_mount() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    let skip = std::env::var_os("SEALMOUNT_SKIP_ROOT_TESTS");
    assert!(is_root || skip.is_some(), "run this test as root, or set SEALMOUNT_SKIP_ROOT_TESTS");
    is_root
}
