//! What can go wrong: one variant for each thing that somebody can do something about.

use std::fmt;
use std::path::{Path, PathBuf};

pub use rustix::io::Errno;

use crate::compression::Compression;
use crate::digest::{Algorithm, Digest};
use crate::image::ImageError;
use crate::options::OptionsError;

/// Why an image could not be mounted. Nothing is left behind where one of these is returned.
///
/// The text is one line: what failed, on which path, and what the kernel said. [`Error::hint`] says
/// what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The options are not understood, or do not go together.
    #[error(transparent)]
    Options(#[from] OptionsError),

    /// The file is not an image that can be mounted: its first blocks or its size are wrong.
    #[error("{}: {problem}", image.display())]
    Image {
        /// The image.
        image: PathBuf,
        /// What is wrong with it.
        problem: ImageError,
    },

    /// The image was written to while it was copied.
    #[error("{}: changed its size while it was read", image.display())]
    ImageChanged {
        /// The image.
        image: PathBuf,
    },

    /// A compressed image is damaged: cut off, a wrong checksum, or followed by something else. Or it
    /// takes more memory to decompress than a decoder is given.
    #[error("{}: cannot be decompressed with {format}: {error}", image.display())]
    Decompress {
        /// The image.
        image: PathBuf,
        /// How it is compressed.
        format: Compression,
        /// What the decoder says.
        error: std::io::Error,
    },

    /// The image does not have the fs-verity digest that `digest=` asks for.
    #[error("{}: its fs-verity digest is {found}, not {expected}", image.display())]
    DigestMismatch {
        /// The image.
        image: PathBuf,
        /// The digest asked for.
        expected: Box<Digest>,
        /// The digest found, by the kernel or computed.
        found: Box<Digest>,
    },

    /// `digest=` without `copy`, and the kernel cannot vouch for the image.
    #[error("{}: cannot be checked against digest= without copy: {reason}", image.display())]
    ImageNotVerity {
        /// The image.
        image: PathBuf,
        /// Why not.
        reason: NotVerity,
    },

    /// `verity`, and the objects of a directory would not be verified: every read would fail.
    #[error("verity cannot be enforced on {}: {reason}", path.display())]
    ObjectsNotVerity {
        /// The object directory, or an object in it.
        path: PathBuf,
        /// Why not.
        reason: NotVerity,
    },

    /// `verity`, and this kernel's overlayfs does not know `verity=require`.
    #[error("the kernel's overlayfs cannot enforce fs-verity (verity=require needs Linux 6.6)")]
    VerityUnsupported,

    /// A directory is missing, not a directory, or out of reach.
    #[error("{role} {}: {}", path.display(), errno_text(*errno))]
    Directory {
        /// What the directory is for.
        role: DirectoryRole,
        /// Its path.
        path: PathBuf,
        /// `ENOENT`, `ENOTDIR`, `EACCES`, …
        errno: Errno,
    },

    /// `idmap=` names something that is not a user namespace.
    #[error("idmap={}: not a user namespace", path.display())]
    NotUserNamespace {
        /// The path that was given.
        path: PathBuf,
    },

    /// A copy would take more memory than `size=` allows, or than can be had.
    #[error("{}: a copy takes {size} bytes of memory, and {limit} may be taken", image.display())]
    NotEnoughMemory {
        /// The image.
        image: PathBuf,
        /// Its size, in bytes.
        size: u64,
        /// The memory that a copy may take at this moment, in bytes.
        limit: u64,
    },

    /// Every loop device that the kernel offered was taken by somebody else, or could not be opened.
    #[error(
        "no loop device to be had in {attempts} attempts: {}: {}",
        device.display(), errno_text(*errno)
    )]
    NoLoopDevice {
        /// How often one was tried.
        attempts: u32,
        /// The one tried last.
        device: PathBuf,
        /// The answer that one gave: `EBUSY`, `ENOENT`, …
        errno: Errno,
    },

    /// The kernel refused a system call.
    #[error(transparent)]
    Kernel(#[from] Box<KernelError>),
}

/// A system call that the kernel refused.
#[derive(Debug)]
#[non_exhaustive]
pub struct KernelError {
    /// What was being done.
    pub operation: Operation,
    /// The file, directory or option it was done to.
    pub object: Option<PathBuf>,
    /// The kernel's answer.
    pub errno: Errno,
    /// What the kernel wrote into the log of the fs context, a line each.
    pub log: Vec<String>,
}

impl std::error::Error for KernelError {}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(object) = &self.object {
            write!(f, "{}: ", object.display())?;
        }
        write!(f, "cannot {}: {}", self.operation, errno_text(self.errno))?;
        if !self.log.is_empty() {
            write!(f, " (the kernel says: {})", self.log.join("; "))?;
        }
        Ok(())
    }
}

/// What a directory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirectoryRole {
    /// One of `basedir=`.
    Objects,
    /// `upperdir=`
    Upper,
    /// `workdir=`
    Work,
    /// Where the mount is attached.
    MountPoint,
}

impl fmt::Display for DirectoryRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DirectoryRole::Objects => "object directory",
            DirectoryRole::Upper => "upperdir",
            DirectoryRole::Work => "workdir",
            DirectoryRole::MountPoint => "mount point",
        })
    }
}

/// Why the kernel does not verify the reads of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotVerity {
    /// The file system, or the kernel, does not support fs-verity.
    #[error("its file system does not support fs-verity (or has it switched off)")]
    Unsupported,
    /// The file system supports it, and the file does not have it enabled.
    #[error("fs-verity is not enabled on it")]
    NotEnabled,
    /// The file has it, with another hash algorithm than the digest that was asked for.
    #[error("its fs-verity digest is not a {0} one")]
    OtherAlgorithm(Algorithm),
}

impl Error {
    pub(crate) fn mismatch(image: &Path, expected: Digest, found: Digest) -> Error {
        let (expected, found) = (Box::new(expected), Box::new(found));
        Error::DigestMismatch { image: image.to_owned(), expected, found }
    }

    /// What to do about it, where that is known: a sentence or two for a person.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::Image { problem: ImageError::Compressed(_), .. } => Some("add the option copy"),
            Error::ImageNotVerity { .. } => Some(
                "add the option copy: the digest is then computed while the image is copied into \
                 sealed memory, whatever file system it is on",
            ),
            Error::DigestMismatch { .. } => Some(
                "this is not the image that was asked for: it was damaged, replaced, or the digest \
                 is that of another one",
            ),
            Error::ObjectsNotVerity { reason: NotVerity::NotEnabled, .. } => {
                Some("enable it on every object with `fsverity enable`, or mount with noverity")
            }
            Error::ObjectsNotVerity { .. } => Some(
                "ext4 (made or tuned with -O verity) and btrfs support it, given a kernel with \
                 CONFIG_FS_VERITY; noverity mounts without checking the objects",
            ),
            Error::VerityUnsupported => {
                Some("tryverity mounts anyway, with nothing enforced; so does noverity")
            }
            Error::Directory { role: DirectoryRole::MountPoint, errno: Errno::NOENT, .. } => {
                Some("make the directory first")
            }
            Error::NotEnoughMemory { .. } => Some(
                "the limit is size=, without it half of the memory, and in any case what is \
                 available; without copy the image takes none",
            ),
            Error::NotUserNamespace { .. } => Some("it is a path such as /proc/PID/ns/user"),
            Error::Kernel(error) => error.hint(),
            _ => None,
        }
    }

    /// The kernel's answer, where this is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Directory { errno, .. } | Error::NoLoopDevice { errno, .. } => Some(*errno),
            Error::Kernel(error) => Some(error.errno),
            _ => None,
        }
    }
}

/// What sealmount asks the kernel for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // The texts say it.
pub enum Operation {
    #[error("open the image")]
    OpenImage,
    #[error("read the image")]
    ReadImage,
    #[error("ask for the fs-verity digest")]
    MeasureVerity,
    #[error("look for objects")]
    SampleObjects,
    #[error("find out how much memory there is")]
    AskForMemory,
    #[error("make a memory file for the copy")]
    CreateMemory,
    #[error("write to the copy")]
    WriteMemory,
    #[error("read the copy")]
    ReadMemory,
    #[error("seal the copy")]
    SealMemory,
    #[error("ask for a free loop device")]
    FindLoopDevice,
    #[error("open the loop device")]
    OpenLoopDevice,
    #[error("attach the image to the loop device")]
    ConfigureLoopDevice,
    #[error("open the file system type")]
    OpenFileSystem,
    #[error("set the option")]
    SetOption,
    #[error("make the superblock")]
    CreateSuperblock,
    #[error("make the mount")]
    CreateMount,
    #[error("open the user namespace")]
    OpenUserNamespace,
    #[error("idmap the mount")]
    IdmapMount,
    #[error("enter the mount namespace")]
    EnterNamespace,
    #[error("make a private mount namespace")]
    PrivateNamespace,
    #[error("attach the layer in a private mount namespace")]
    AttachLayer,
    #[error("make whiteouts that hide the object directories")]
    MakeWhiteouts,
    #[error("attach the mount")]
    Attach,
}

impl KernelError {
    pub(crate) fn new(operation: Operation, errno: Errno) -> KernelError {
        KernelError { operation, object: None, errno, log: Vec::new() }
    }

    pub(crate) fn on(mut self, object: impl Into<PathBuf>) -> KernelError {
        self.object = Some(object.into());
        self
    }

    fn is_on(&self, object: &str) -> bool {
        self.object.as_deref().is_some_and(|path| path.as_os_str() == object)
    }

    fn hint(&self) -> Option<&'static str> {
        match (self.operation, self.errno) {
            (Operation::OpenFileSystem, Errno::NODEV) if self.is_on("erofs") => {
                Some("this kernel has no EROFS: load the module erofs, or enable CONFIG_EROFS_FS")
            }
            (Operation::OpenFileSystem, Errno::NODEV) => Some(
                "this kernel has no overlayfs: load the module overlay, or enable \
                 CONFIG_OVERLAY_FS",
            ),
            (Operation::OpenFileSystem, Errno::NOSYS) => {
                Some("this kernel lacks the mount API of Linux 5.2, or a seccomp filter denies it")
            }
            (_, Errno::NOSYS) => {
                Some("this kernel lacks the system call for it, or a seccomp filter denies it")
            }
            (Operation::FindLoopDevice, Errno::NOENT | Errno::NODEV | Errno::NXIO) => {
                Some("there are no loop devices: load the module loop")
            }
            (operation, Errno::PERM | Errno::ACCESS) => operation.permission(),
            (Operation::CreateSuperblock, _) if self.log.is_empty() => {
                Some("dmesg may show more of what the kernel says")
            }
            _ => None,
        }
    }
}

impl Operation {
    /// The permission that is missing where the kernel answers EPERM or EACCES.
    fn permission(self) -> Option<&'static str> {
        match self {
            Operation::OpenImage => None,
            Operation::FindLoopDevice
            | Operation::OpenLoopDevice
            | Operation::ConfigureLoopDevice => Some(
                "it takes root, and access to /dev/loop-control and /dev/loop*: containers have \
                 neither unless they are given them",
            ),
            Operation::OpenUserNamespace => {
                Some("the namespace of another user's process takes root (CAP_SYS_PTRACE)")
            }
            Operation::IdmapMount => Some(
                "it must be another user namespace than the initial one; and it takes root \
                 (CAP_SYS_ADMIN in the initial user namespace)",
            ),
            Operation::EnterNamespace => {
                Some("entering a mount namespace takes root (CAP_SYS_ADMIN and CAP_SYS_CHROOT)")
            }
            Operation::ReadImage | Operation::MeasureVerity | Operation::SampleObjects => Some(
                "reading takes the permissions of the files; as root, a security module or a \
                 seccomp filter refuses it",
            ),
            _ => Some(
                "mounting takes root (CAP_SYS_ADMIN in the initial user namespace); as root, a \
                 seccomp filter, as containers have it, or a security module refuses it",
            ),
        }
    }
}

impl From<KernelError> for Error {
    fn from(error: KernelError) -> Error {
        Error::Kernel(Box::new(error))
    }
}

/// The text of an errno as strerror(3) has it.
fn errno_text(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}
