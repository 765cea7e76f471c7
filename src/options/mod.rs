//! The typed options of a mount. [`grammar`] reads and writes them as the text of `-o`.

mod grammar;

use std::ffi::OsString;

use crate::digest::{Digest, ParseDigestError};
use crate::kernel::{ErrorKind, Hint};
use crate::location::Location;
use crate::overlay::{Atime, MountAttributes, OverlayOptions, SuperblockFlags, Verity};
use crate::source::{CopyOptions, MemoryKind, SizeLimit};
use crate::util::text::shown;

pub use grammar::{RemountOptions, Sloppy};

/// The options of a mount, as in `mount -o`.
///
/// Options are made in code, or from text with [`MountOptions::parse`]. [`MountOptions::to_text`] returns the
/// text. [`MountOptions::mount`] mounts an image.
///
/// ```
/// use sealmount::{MemoryKind, MountOptions};
///
/// let mut options = MountOptions::new("/sysroot/composefs/objects");
/// options.digest = Some("9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1".parse()?);
/// options.copy = Some(MemoryKind::Memfd);
///
/// let text = "basedir=/sysroot/composefs/objects,copy,\
///             digest=9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1";
/// assert_eq!(options, MountOptions::parse(text)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MountOptions {
    /// `digest=`: the fs-verity digest that the image must have.
    pub digest: Option<Digest>,
    /// `copy`: the kind of memory for a copy of the image. `None` means that the file is mounted.
    pub copy: Option<MemoryKind>,
    /// `size=`: the maximum size of the copy. `None` means 50 % of the memory of the machine.
    pub size: Option<SizeLimit>,
    /// `idmap=`: a user namespace (/proc/PID/ns/user). The files of the image get the owners of its mapping
    /// ([mount_setattr(2)](https://man7.org/linux/man-pages/man2/mount_setattr.2.html), Linux 5.19).
    pub idmap: Option<Location>,
    /// The options of the overlay, for example `basedir=`, `verity=`, `upperdir=` and `ro`.
    pub overlay: OverlayOptions,
}

impl MountOptions {
    /// Returns the default options with one object directory.
    pub fn new(objects: impl Into<Location>) -> MountOptions {
        MountOptions { overlay: OverlayOptions::new(objects), ..MountOptions::default() }
    }

    /// Returns the verification of objects: [`OverlayOptions::verity`], or its default.
    pub fn effective_verity(&self) -> Verity {
        self.overlay.effective_verity(self.digest)
    }

    /// Returns the options of the copy, if a copy is requested.
    pub(crate) fn copy_options(&self) -> Option<CopyOptions> {
        let mut options = CopyOptions::new(self.copy?);
        (options.size, options.digest) = (self.size, self.digest);
        Some(options)
    }

    /// Checks for errors that show in the options alone: no object directory, or `size` without `copy`.
    pub(crate) fn check(&self) -> Result<(), OptionsError> {
        if self.overlay.objects.is_empty() {
            return Err(OptionsError::NoObjects);
        }
        if self.size.is_some() && self.copy.is_none() {
            return Err(OptionsError::SizeWithoutCopy);
        }
        Ok(())
    }
}

/// The flags of a mount, which a remount can change. The text is the text of `-o`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MountFlags {
    /// `ro`: the mount or its superblock is read-only.
    pub read_only: bool,
    /// `nosuid`, `nodev`, `noexec`, `nosymfollow`, `nodiratime`.
    pub attributes: MountAttributes,
    /// `relatime`, `noatime`, `strictatime`.
    pub atime: Atime,
    /// `sync`, `dirsync`, `lazytime`, `mand`.
    pub superblock_flags: SuperblockFlags,
}

/// The reason why options are rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// An option that sealmount does not know.
    #[error("options: cannot use the option {}: unknown", shown(_0))]
    Unknown(OsString),
    /// An option without the value that it needs, or with an empty value.
    #[error("options: cannot use {0}: the value is missing ({0}=…)")]
    NeedsValue(&'static str),
    /// A value after an option that accepts no value.
    #[error("options: cannot use {0}: the option takes no value")]
    TakesNoValue(&'static str),
    /// A value that the option does not accept.
    #[error("options: cannot use {option}={}: expected {expected}", shown(value))]
    #[non_exhaustive]
    BadValue {
        /// The option.
        option: &'static str,
        /// The value.
        value: OsString,
        /// The values that the option accepts.
        expected: &'static str,
    },
    /// The value of `digest=` is not a digest.
    #[error("options: cannot use digest=: {0}")]
    Digest(#[from] ParseDigestError),
    /// `digest=` is given twice, with different digests.
    #[error("options: cannot use digest=: given twice, with different digests")]
    TwoDigests,
    /// No object directory: `basedir=` is missing.
    #[error("options: cannot mount: no object directory given")]
    NoObjects,
    /// `upperdir=` without `workdir=`.
    #[error("options: cannot use upperdir= without workdir=")]
    UpperdirWithoutWorkdir,
    /// `workdir=` without `upperdir=`.
    #[error("options: cannot use workdir= without upperdir=")]
    WorkdirWithoutUpperdir,
    /// A size limit without a copy.
    #[error("options: cannot limit the size of a copy: no copy requested")]
    SizeWithoutCopy,
    /// A backslash at the end, without a character to escape.
    #[error("options: cannot end in a backslash: it escapes nothing")]
    TrailingBackslash,
    /// A NUL byte, which no path can hold.
    #[error("options: cannot contain a NUL byte")]
    Nul,
}

impl OptionsError {
    /// Returns the category of the error: always [`ErrorKind::InvalidOptions`].
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidOptions
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        Some(match self {
            OptionsError::Unknown(name) => match name.as_encoded_bytes() {
                b"remount" => Hint::of_types_or_options(
                    "parse the options of a remount with RemountOptions::parse",
                    "leave out remount for a new mount",
                ),
                b"bind" => {
                    Hint::new("call mount(8): `mount -o remount,bind,…` needs no mount helper")
                }
                b"private" | b"shared" | b"slave" | b"unbindable" | b"rprivate" | b"rshared"
                | b"rslave" | b"runbindable" => Hint::new(
                    "set the propagation with `mount --make-private` and the like, after the mount",
                ),
                name if name.contains(&b'"') => Hint::new(
                    "write a backslash before a comma in a value: quotes do not protect the comma",
                ),
                _ => Hint::of_types_or_options(
                    "check the spelling; MountOptions::parse_sloppy tolerates unknown options",
                    "check the spelling in mount.composefs(8); -s tolerates unknown options",
                ),
            },
            OptionsError::NoObjects => Hint::of_types_or_options(
                "add a directory to OverlayOptions::objects",
                "add basedir=, with one directory or several separated by colons",
            ),
            OptionsError::UpperdirWithoutWorkdir => {
                Hint::new("add workdir=, an empty directory on the same file system")
            }
            OptionsError::TwoDigests => Hint::of_types_or_options(
                "leave out one of the digests",
                "leave out one of the digests: mount(8) joins the options of fstab and of the command line",
            ),
            OptionsError::SizeWithoutCopy => Hint::of_types_or_options(
                "set MountOptions::copy too",
                "add the option copy, or leave out size=",
            ),
            _ => return None,
        })
    }
}
