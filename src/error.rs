//! What can go wrong: one variant for each thing that somebody can do something about.

use std::fmt;
use std::path::{Path, PathBuf};

pub use rustix::io::Errno;

use crate::compression::Compression;
use crate::digest::{Algorithm, Digest};
use crate::image::ImageError;
use crate::options::{OptionsError, SelinuxContexts};

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

    /// A compressed image is damaged: cut off, a wrong checksum, or followed by something else.
    #[error("{}: cannot be decompressed with {format}: {error}", image.display())]
    Decompress {
        /// The image.
        image: PathBuf,
        /// How it is compressed.
        format: Compression,
        /// What the decoder says.
        error: std::io::Error,
    },

    /// A compressed image refers further back than 128 MiB, so it takes more memory to decompress than a
    /// decoder is given.
    #[error("{}: compressed with {format} and a window of more than 128 MiB", image.display())]
    WindowTooLarge {
        /// The image.
        image: PathBuf,
        /// How it is compressed.
        format: Compression,
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

    /// A directory is given twice: overlayfs takes it for one layer only.
    #[error("{role} {} is also the {other_role} {}", path.display(), other_path.display())]
    SameDirectory {
        /// What the directory is for.
        role: DirectoryRole,
        /// Its path.
        path: PathBuf,
        /// What else it is for.
        other_role: DirectoryRole,
        /// The path that it was given by there.
        other_path: PathBuf,
    },

    /// `upperdir=` and `workdir=` are not on one mount, which overlayfs wants them to be.
    #[error("workdir {} is not on the same mount as upperdir {}", workdir.display(), upperdir.display())]
    WorkOnOtherMount {
        /// `upperdir=`
        upperdir: PathBuf,
        /// `workdir=`
        workdir: PathBuf,
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

    /// A compressed image that is itself larger than a copy may be: what is in it was not looked at.
    #[error(
        "{}: the compressed file alone has {size} bytes, and a copy may take {limit}",
        image.display()
    )]
    CompressedTooLarge {
        /// The image.
        image: PathBuf,
        /// The size of the file, in bytes.
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

    /// What /dev has by a loop device's name is not the device that the kernel offered.
    #[error("{}: not the loop device of this name, but something else", path.display())]
    NotLoopDevice {
        /// The name.
        path: PathBuf,
    },

    /// The kernel refused a system call.
    #[error(transparent)]
    Kernel(#[from] Box<KernelError>),
}

/// A system call that the kernel refused.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct KernelError {
    /// What was being done.
    pub operation: Operation,
    /// The file, directory or option it was done to; of a superblock or mount, the image.
    pub object: Option<PathBuf>,
    /// The type of the file system that was being made.
    pub file_system: Option<&'static str>,
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
        write!(f, "cannot {}", self.operation)?;
        if let Some(file_system) = self.file_system {
            write!(f, " of {file_system}")?;
        }
        write!(f, ": {}", errno_text(self.errno))?;
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
            Error::Options(OptionsError::Unknown(name)) => match name.as_encoded_bytes() {
                b"remount" => Some(
                    "what is mounted stays as it is; `mount -o remount,bind,…` changes its ro, nosuid, \
                     nodev, noexec and the like",
                ),
                name if name.contains(&b'"') => Some(
                    "a comma in a value takes a backslash before it, and quotes do not replace it",
                ),
                _ => None,
            },
            Error::Image { problem: ImageError::Compressed(_), .. } => Some("add the option copy"),
            Error::Image { problem: ImageError::NotAFile("block device"), .. } => {
                Some("give the image's file itself, without the option loop")
            }
            Error::WindowTooLarge { .. } => Some(
                "compress it again: with zstd, without --long; with xz, with a dictionary of at most \
                 128 MiB",
            ),
            Error::ImageNotVerity { .. } => Some(
                "add the option copy: the digest is then computed while the image is copied into \
                 sealed memory, whatever file system it is on",
            ),
            Error::DigestMismatch { .. } => Some(
                "this is not the image that was asked for: it was damaged, replaced, or the digest \
                 is that of another one",
            ),
            Error::ObjectsNotVerity { reason: NotVerity::NotEnabled, .. } => Some(
                "enable it on every object with `fsverity enable`; noverity takes back what verity \
                     or digest= asks for",
            ),
            Error::ObjectsNotVerity { .. } => Some(
                "ext4 (made or tuned with -O verity) and btrfs support it, given a kernel with \
                 CONFIG_FS_VERITY; noverity takes back what verity or digest= asks for, and mounts \
                 without checking the objects",
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
            Error::CompressedTooLarge { .. } => Some(
                "the limit is size=, without it half of the memory, and in any case what is \
                 available",
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
pub enum Operation {
    /// open(2) of the image.
    #[error("open the image")]
    OpenImage,
    /// pread(2) of the image.
    #[error("read the image")]
    ReadImage,
    /// FS_IOC_MEASURE_VERITY on the image, an object directory or an object.
    #[error("ask for the fs-verity digest")]
    MeasureVerity,
    /// open(2) and getdents(2) in an object directory.
    #[error("look for objects")]
    SampleObjects,
    /// fstat(2) or statx(2) of a directory that becomes a layer.
    #[error("look at the directory")]
    LookAtDirectory,
    /// sysinfo(2), where /proc/meminfo cannot be read.
    #[error("find out how much memory there is")]
    AskForMemory,
    /// memfd_create(2), or open(2) of a file in a new ramfs.
    #[error("make a memory file for the copy")]
    CreateMemory,
    /// Buffers to copy with, which malloc(3) did not have.
    #[error("get memory to copy with")]
    TakeMemory,
    /// pwrite(2) to the memory file.
    #[error("write to the copy")]
    WriteMemory,
    /// F_ADD_SEALS of fcntl(2), or making a ramfs read-only.
    #[error("seal the copy")]
    SealMemory,
    /// open(2) of /dev/loop-control, and LOOP_CTL_GET_FREE.
    #[error("ask for a free loop device")]
    FindLoopDevice,
    /// open(2) of /dev/loopN.
    #[error("open the loop device")]
    OpenLoopDevice,
    /// LOOP_CONFIGURE of ioctl(2).
    #[error("attach the image to the loop device")]
    ConfigureLoopDevice,
    /// fsopen(2) or fspick(2).
    #[error("open the file system type")]
    OpenFileSystem,
    /// fsconfig(2) with one option.
    #[error("set the option")]
    SetOption,
    /// FSCONFIG_CMD_CREATE of fsconfig(2).
    #[error("make the superblock")]
    CreateSuperblock,
    /// fsmount(2).
    #[error("make the mount")]
    CreateMount,
    /// open(2) of what `idmap=` names.
    #[error("open the user namespace")]
    OpenUserNamespace,
    /// MOUNT_ATTR_IDMAP of mount_setattr(2).
    #[error("idmap the mount")]
    IdmapMount,
    /// setns(2).
    #[error("enter the mount namespace")]
    EnterNamespace,
    /// clone(2).
    #[error("start a thread")]
    StartThread,
    /// fchdir(2) to a detached procfs, in a thread with a working directory of its own.
    #[error("enter a procfs of its own")]
    EnterProcfs,
    /// unshare(2), and mount_setattr(2) to stop propagation.
    #[error("make a private mount namespace")]
    PrivateNamespace,
    /// open_tree(2) and move_mount(2) of a layer, before Linux 6.15.
    #[error("attach the layer in a private mount namespace")]
    AttachLayer,
    /// mknod(2) and the attributes of a layer of whiteouts, before Linux 6.5.
    #[error("make whiteouts that hide the object directories")]
    MakeWhiteouts,
    /// move_mount(2) of the finished mount.
    #[error("attach the mount")]
    Attach,
}

impl KernelError {
    pub(crate) fn new(operation: Operation, errno: Errno) -> KernelError {
        KernelError { operation, object: None, file_system: None, errno, log: Vec::new() }
    }

    pub(crate) fn on(mut self, object: impl Into<PathBuf>) -> KernelError {
        self.object = Some(object.into());
        self
    }

    pub(crate) fn is_on(&self, object: &str) -> bool {
        self.object.as_deref().is_some_and(|path| path.as_os_str() == object)
    }

    fn is_selinux_context(&self) -> bool {
        let option = self.object.as_deref().map(|option| option.as_os_str().as_encoded_bytes());
        option.is_some_and(|option| {
            SelinuxContexts::NAMES.iter().any(|name| {
                option.strip_prefix(name.as_bytes()).is_some_and(|v| v.starts_with(b"="))
            })
        })
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
            (Operation::ReadImage, Errno::BADF) => Some("the descriptor must be one for reading"),
            (Operation::WriteMemory, Errno::FBIG) => {
                Some("the image is larger than files may be here: RLIMIT_FSIZE, `ulimit -f`")
            }
            (Operation::IdmapMount, Errno::INVAL) => Some(
                "the user namespace must have its uid_map and gid_map written; EROFS can be idmapped \
                 from Linux 5.19 on",
            ),
            (Operation::MakeWhiteouts, Errno::OPNOTSUPP) => Some(
                "the root directory of the image has extended attributes that a tmpfs does not take \
                 before Linux 6.6",
            ),
            (Operation::SetOption, Errno::INVAL) if self.is_selinux_context() => {
                Some("it takes a kernel with SELinux enabled")
            }
            (Operation::CreateSuperblock, _) if self.log.is_empty() => {
                Some(match self.file_system {
                    Some("overlay") => {
                        "dmesg may show more of what the kernel says; one layer must not lie within \
                         another, and upperdir must be writable"
                    }
                    _ => "dmesg may show more of what the kernel says",
                })
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
