//! What a mount is to be, typed. [`grammar`] turns it from and into the text of `-o`.

mod grammar;

use std::ffi::OsString;

use bitflags::bitflags;

use crate::digest::{Digest, ParseDigestError};
use crate::location::Location;

pub use grammar::Sloppy;

/// How an image is mounted: what `mount -o` says.
///
/// Made in code, or from text with [`MountOptions::parse`]; [`MountOptions::to_text`] gives the
/// text back. [`MountOptions::mount`] does the work.
///
/// ```
/// use sealmount::{Memory, MountOptions};
///
/// let mut options = MountOptions::new("/sysroot/composefs/objects");
/// options.digest = Some("9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1".parse()?);
/// options.copy = Some(Memory::Memfd);
///
/// let text = "basedir=/sysroot/composefs/objects,copy,\
///             digest=9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1";
/// assert_eq!(options, MountOptions::parse(text)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MountOptions {
    /// `basedir=`: the object directories, the first one that has an object gives it. At least one.
    pub basedirs: Vec<Location>,
    /// `digest=`: the fs-verity digest that the image must have.
    pub digest: Option<Digest>,
    /// `verity`, `tryverity`, `noverity`. `None`: [`Verity::Require`] with a digest, [`Verity::Off`]
    /// without; see [`MountOptions::effective_verity`].
    pub verity: Option<Verity>,
    /// `copy`: mount a copy of the image in this kind of memory, not the file.
    pub copy: Option<Memory>,
    /// `size=`: the most memory that the copy may take. `None`: half of what there is.
    pub size: Option<SizeLimit>,
    /// `idmap=`: a user namespace (/proc/PID/ns/user), whose mapping of users and groups the files
    /// of the image get
    /// ([mount_setattr(2)](https://man7.org/linux/man-pages/man2/mount_setattr.2.html), Linux 5.19).
    pub idmap: Option<Location>,
    /// `upperdir=`, `workdir=`: a layer that takes changes.
    pub upper: Option<UpperLayer>,
    /// `ro`. Without [`upper`](Self::upper) the mount is read-only in any case.
    pub read_only: bool,
    /// `nosuid`, `nodev`, `noexec`, `nosymfollow`, `nodiratime`.
    pub attributes: MountAttributes,
    /// `relatime`, `noatime`, `strictatime`.
    pub atime: Atime,
    /// `sync`, `dirsync`, `lazytime`, `mand`.
    pub superblock_flags: SuperblockFlags,
    /// `context=`, `fscontext=`, `defcontext=`, `rootcontext=`.
    pub selinux_contexts: SelinuxContexts,
    /// What findmnt(8) shows as the source of the mount. `None`: the path of the image, without
    /// symbolic links; `composefs` where it was given by descriptor. Not part of the text: mount(8)
    /// gives the source as an operand.
    pub source: Option<OsString>,
}

impl MountOptions {
    /// The default options, with one object directory.
    pub fn new(basedir: impl Into<Location>) -> MountOptions {
        MountOptions { basedirs: vec![basedir.into()], ..MountOptions::without_basedir() }
    }

    fn without_basedir() -> MountOptions {
        MountOptions {
            basedirs: Vec::new(),
            digest: None,
            verity: None,
            copy: None,
            size: None,
            idmap: None,
            upper: None,
            read_only: false,
            attributes: MountAttributes::empty(),
            atime: Atime::default(),
            superblock_flags: SuperblockFlags::empty(),
            selinux_contexts: SelinuxContexts::default(),
            source: None,
        }
    }

    /// What is asked for of the objects' fs-verity: a digest implies [`Verity::Require`], also
    /// beside `tryverity`; only an explicit [`Verity::Off`] takes it back.
    pub fn effective_verity(&self) -> Verity {
        match (self.verity, &self.digest) {
            (Some(Verity::Off), _) | (None, None) => Verity::Off,
            (Some(Verity::Try), None) => Verity::Try,
            (Some(Verity::Require), _) | (_, Some(_)) => Verity::Require,
        }
    }

    /// What makes these options none that can be mounted with, as far as they alone tell.
    pub(crate) fn check(&self) -> Result<(), OptionsError> {
        if self.basedirs.is_empty() {
            return Err(OptionsError::NoBasedir);
        }
        if self.size.is_some() && self.copy.is_none() {
            return Err(OptionsError::SizeWithoutCopy);
        }
        Ok(())
    }

    /// Whether nothing can be changed through the mount.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.upper.is_none()
    }
}

/// Whether overlayfs checks the objects against the fs-verity digests in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verity {
    /// `verity`: every object is checked, or nothing is mounted (Linux 6.6).
    Require,
    /// `tryverity`: the same where kernel and file system can; else nothing is checked.
    /// [`DetachedMount::verity`](crate::DetachedMount::verity) tells.
    Try,
    /// `noverity`: nothing is checked.
    Off,
}

/// The kinds of memory that a copy can lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Memory {
    /// A sealed [memfd](https://man7.org/linux/man-pages/man2/memfd_create.2.html), mounted through
    /// a loop device. It can be swapped out.
    Memfd,
    /// A file in a ramfs of its own, whose superblock is made read-only and that nobody has a way to.
    /// Never swapped out; mounted without a loop device from Linux 6.12 on.
    Ramfs,
}

/// The most memory that a copy may take: `size=`, as tmpfs has it, so 0 is no limit. What is not
/// available cannot be taken in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeLimit {
    /// That many bytes, rounded up to a page of 4096.
    Bytes(u64),
    /// A part of the machine's memory, in hundredths.
    Percent(u32),
}

/// A layer that takes changes: both directories on one file system, and not one within the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpperLayer {
    /// `upperdir=`: what was changed.
    pub upperdir: Location,
    /// `workdir=`: an empty directory that overlayfs needs beside it.
    pub workdir: Location,
}

/// SELinux contexts, as in [mount(8)](https://man7.org/linux/man-pages/man8/mount.8.html): handed to
/// overlayfs as they are, and refused by a kernel without SELinux.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SelinuxContexts {
    /// `context=`: of every file.
    pub context: Option<OsString>,
    /// `fscontext=`: of the superblock.
    pub fscontext: Option<OsString>,
    /// `defcontext=`: of files that have none.
    pub defcontext: Option<OsString>,
    /// `rootcontext=`: of the root directory.
    pub rootcontext: Option<OsString>,
}

impl SelinuxContexts {
    pub(crate) const NAMES: [&str; 4] = ["context", "fscontext", "defcontext", "rootcontext"];

    /// Those that are set, with their names.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, &OsString)> {
        let values = [&self.context, &self.fscontext, &self.defcontext, &self.rootcontext];
        SelinuxContexts::NAMES
            .into_iter()
            .zip(values)
            .filter_map(|(name, v)| Some((name, v.as_ref()?)))
    }

    pub(crate) fn get_mut(&mut self, name: &[u8]) -> Option<(&'static str, &mut Option<OsString>)> {
        Some(match name {
            b"context" => ("context", &mut self.context),
            b"fscontext" => ("fscontext", &mut self.fscontext),
            b"defcontext" => ("defcontext", &mut self.defcontext),
            b"rootcontext" => ("rootcontext", &mut self.rootcontext),
            _ => return None,
        })
    }
}

/// When reading a file updates its access time, as in
/// [mount(8)](https://man7.org/linux/man-pages/man8/mount.8.html). Only a mount with an upper layer
/// can store one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Atime {
    /// `relatime`: where the old one is before the last change, or a day old.
    #[default]
    Relatime,
    /// `noatime`: never.
    Noatime,
    /// `strictatime`: always.
    Strictatime,
}

bitflags! {
    /// Attributes of a mount: `MOUNT_ATTR_*` of
    /// [mount_setattr(2)](https://man7.org/linux/man-pages/man2/mount_setattr.2.html).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct MountAttributes: u32 {
        /// `nosuid`: set-user-ID bits and file capabilities have no effect.
        const NOSUID = 0x2;
        /// `nodev`: device nodes cannot be opened.
        const NODEV = 0x4;
        /// `noexec`: programs cannot be executed.
        const NOEXEC = 0x8;
        /// `nodiratime`: access times of directories are not updated.
        const NODIRATIME = 0x80;
        /// `nosymfollow` (Linux 5.14): symbolic links are not followed.
        const NOSYMFOLLOW = 0x20_0000;
    }
}

bitflags! {
    /// Flags of the overlayfs superblock, of use with an upper layer.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct SuperblockFlags: u32 {
        /// `sync`: writes are synchronous.
        const SYNC = 1;
        /// `dirsync`: changes of directories are synchronous.
        const DIRSYNC = 2;
        /// `lazytime`: times are written late.
        const LAZYTIME = 4;
        /// `mand`: mandatory locks, which Linux 5.15 and later do not have.
        const MAND = 8;
    }
}

/// Why options are refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// An option of no meaning here.
    #[error("unknown option {}", _0.display())]
    Unknown(OsString),
    /// An option without the value it needs, or with an empty one.
    #[error("option {0} needs a value: {0}=…")]
    NeedsValue(&'static str),
    /// An option with a value where none belongs.
    #[error("option {0} takes no value")]
    TakesNoValue(&'static str),
    /// A value that the option does not have.
    #[error("option {option}={}: {expected} expected", value.display())]
    BadValue {
        /// The option.
        option: &'static str,
        /// Its value.
        value: OsString,
        /// What it could be.
        expected: &'static str,
    },
    /// `digest=` with something else than a digest.
    #[error("option digest=: {0}")]
    Digest(#[from] ParseDigestError),
    /// `digest=` twice, with different digests.
    #[error("option digest= given twice, with different digests")]
    TwoDigests,
    /// `basedir=` is missing.
    #[error("option basedir= is missing: the object directory, or several separated by colons")]
    NoBasedir,
    /// `upperdir=` without `workdir=`.
    #[error("option upperdir= needs workdir=, an empty directory on the same file system")]
    UpperWithoutWork,
    /// `workdir=` without `upperdir=`.
    #[error("option workdir= is of use only with upperdir=")]
    WorkWithoutUpper,
    /// `size=` without `copy`.
    #[error("option size= is of use only with copy")]
    SizeWithoutCopy,
    /// A backslash at the end, where it escapes nothing.
    #[error("the options end in a backslash, which escapes nothing")]
    TrailingBackslash,
    /// A NUL byte, which no path can hold.
    #[error("the options contain a NUL byte")]
    Nul,
}
