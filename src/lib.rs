//! Mounts [composefs] images, from their file or from sealed memory.
//!
//! A composefs image is a small EROFS file with the metadata of a file tree. The contents of its
//! files are objects, named by their [fs-verity] digest, in one or more directories; overlayfs joins
//! the two. [`MountOptions`] says how an image is mounted, and [`MountOptions::mount`] mounts it:
//!
//! ```no_run
//! use sealmount::{Memory, MountOptions};
//!
//! let mut options = MountOptions::new("/sysroot/objects");
//! options.digest =
//!     Some("9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1".parse()?);
//! options.copy = Some(Memory::Memfd);
//! let mount = options.mount("/boot/image.cfs")?;
//! mount.attach("/sysroot/new")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What comes back is a [`DetachedMount`]: a descriptor of a mount that nobody sees until it is
//! attached, and that is gone when it is dropped. With [`MountOptions::mount_with`] the caller is
//! told each [`Step`]: what was verified by whom, and which way the kernel took.
//!
//! # What is verified
//!
//! With [`digest`](MountOptions::digest) the image is mounted only if it has that fs-verity digest.
//! With [`copy`](MountOptions::copy) it is computed while the image is copied into a sealed memfd,
//! which is what is mounted: nothing of the source stays in use, and nothing can change what was
//! verified. Without `copy` the kernel's fs-verity must vouch for the file. A digest implies
//! [`Verity::Require`]: overlayfs checks every object against the image. A system that cannot enforce
//! that is told at once, with an [`Error`].
//!
//! # Kernels
//!
//! Linux 6.1 and later, found out at run time by trying. `CAP_SYS_ADMIN` in the initial user
//! namespace is needed. The library makes threads for a moment, to copy an image and on kernels before
//! 7.3, and otherwise leaves the process as it is: no signal handlers, no output, no change of
//! directory.
//!
//! [composefs]: https://github.com/composefs/composefs
//! [fs-verity]: https://docs.kernel.org/filesystems/fsverity.html
#![forbid(unsafe_code)]

mod allocation;
mod compression;
mod copy;
mod decompress;
mod digest;
mod erofs;
mod error;
mod fs_context;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod image;
mod location;
mod loop_device;
mod memory;
mod mount;
mod named_layers;
mod objects;
mod options;
mod overlay;
mod procfs;
mod step;
mod thread;

pub use compression::Compression;
pub use digest::{Algorithm, Digest, ParseDigestError, compute_digest};
pub use error::{DirectoryRole, Errno, Error, KernelError, NotVerity, Operation};
pub use image::ImageError;
pub use location::Location;
pub use mount::{DetachedMount, enter_mount_namespace, open_mount_point};
pub use options::{
    Atime, Memory, MountAttributes, MountOptions, OptionsError, SelinuxContexts, SizeLimit, Sloppy,
    SuperblockFlags, UpperLayer, Verity,
};
pub use step::{ObjectVerity, Rung, Step, VerifiedBy};

/// Whether this is root; if not, the test may be skipped where that is allowed.
#[cfg(test)]
fn may_mount() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    let skip = std::env::var_os("SEALMOUNT_SKIP_ROOT_TESTS");
    assert!(is_root || skip.is_some(), "run this test as root, or set SEALMOUNT_SKIP_ROOT_TESTS");
    is_root
}
