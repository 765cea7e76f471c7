//! A system call that failed.

use std::fmt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::kernel::hint::Hint;
use crate::kernel::kind::ErrorKind;
use crate::util::text::shown;

/// A system call that failed.
#[derive(Debug)]
pub struct KernelError {
    pub(crate) operation: Operation,
    pub(crate) object: Option<PathBuf>,
    pub(crate) file_system: Option<&'static str>,
    pub(crate) errno: Errno,
    pub(crate) log: Vec<String>,
    /// The errno as a standard error, for `Error::source`.
    source: std::io::Error,
}

impl Clone for KernelError {
    fn clone(&self) -> KernelError {
        KernelError {
            operation: self.operation,
            object: self.object.clone(),
            file_system: self.file_system,
            errno: self.errno,
            log: self.log.clone(),
            source: self.errno.into(),
        }
    }
}

impl KernelError {
    pub(crate) fn new(operation: Operation, errno: Errno) -> KernelError {
        KernelError {
            operation,
            object: None,
            file_system: None,
            errno,
            log: Vec::new(),
            source: errno.into(),
        }
    }

    /// Names the object of the operation.
    pub(crate) fn on(mut self, object: impl Into<PathBuf>) -> KernelError {
        self.object = Some(object.into());
        self
    }

    /// Returns whether the object is this option or file system type.
    pub(crate) fn is_on(&self, object: &str) -> bool {
        self.object.as_deref().is_some_and(|path| path.as_os_str() == object)
    }

    /// Returns the operation that failed.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// Returns the object of the operation: a file, a directory, an option; for a superblock or a
    /// mount, the image.
    pub fn object(&self) -> Option<&Path> {
        self.object.as_deref()
    }

    /// Returns the type of the file system that was being mounted.
    pub fn file_system(&self) -> Option<&'static str> {
        self.file_system
    }

    /// Returns the kernel's [errno](https://man7.org/linux/man-pages/man3/errno.3.html).
    pub fn raw_os_error(&self) -> i32 {
        self.errno.raw_os_error()
    }

    /// Returns the kernel's messages from the log of the fs context, one line each.
    pub fn log(&self) -> &[String] {
        &self.log
    }

    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        match (self.operation, self.errno) {
            (Operation::OpenFileSystem, Errno::NODEV)
            | (Operation::FindLoopDevice, Errno::NOENT | Errno::NODEV | Errno::NXIO)
            | (Operation::IdmapMount, Errno::INVAL)
            | (Operation::ReadLastPage, Errno::IO)
            | (Operation::CloneMount, Errno::INVAL)
            | (Operation::AttachBeneath, Errno::OPNOTSUPP)
            | (_, Errno::NOSYS) => ErrorKind::Unsupported,
            // The directory is not the root of a mount.
            (Operation::AttachBeneath, Errno::INVAL) => ErrorKind::InvalidOptions,
            // The descriptor is not a detached mount, or the file is not a mount namespace.
            (Operation::Attach | Operation::EnterNamespace, Errno::INVAL)
            | (Operation::Attach, Errno::LOOP) => ErrorKind::InvalidOptions,
            (_, Errno::PERM | Errno::ACCESS) => ErrorKind::PermissionDenied,
            (_, Errno::NOMEM | Errno::NOSPC) => ErrorKind::OutOfMemory,
            (_, Errno::MFILE | Errno::NFILE | Errno::FBIG) => ErrorKind::LimitExceeded,
            (_, Errno::BUSY | Errno::AGAIN) => ErrorKind::Busy,
            (_, Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG) => {
                ErrorKind::NotFound
            }
            (Operation::SetOption, Errno::INVAL) => ErrorKind::InvalidOptions,
            // EROFS fails with EBADMSG if the checksum of the superblock is wrong.
            (
                Operation::CreateSuperblock,
                Errno::INVAL | Errno::UCLEAN | Errno::OPNOTSUPP | Errno::BADMSG,
            ) if self.file_system == Some("erofs") => ErrorKind::NotAnImage,
            // EROFS fails with EUCLEAN (EFSCORRUPTED) for a damaged inode, directory or xattr.
            (Operation::ListObjects, Errno::UCLEAN | Errno::OPNOTSUPP) => ErrorKind::NotAnImage,
            _ => ErrorKind::Io,
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        let text = match (self.operation, self.errno) {
            (Operation::OpenFileSystem, Errno::NODEV) if self.is_on("erofs") => {
                "load the module erofs, or enable CONFIG_EROFS_FS: this kernel has no EROFS"
            }
            (Operation::OpenFileSystem, Errno::NODEV) if self.is_on("proc") => {
                "enable CONFIG_PROC_FS: this kernel has no procfs"
            }
            (Operation::OpenFileSystem, Errno::NODEV) => {
                "load the module overlay, or enable CONFIG_OVERLAY_FS: this kernel has no overlayfs"
            }
            (Operation::OpenFileSystem, Errno::NOSYS) => {
                "use Linux 5.2 or later, or allow fsopen(2) in the seccomp filter"
            }
            (_, Errno::NOSYS) => {
                "use a later kernel, or allow the system call in the seccomp filter"
            }
            (Operation::FindLoopDevice, Errno::NOENT | Errno::NODEV | Errno::NXIO) => {
                return Some(Hint::of_types_or_options(
                    "load the module loop, or mount a devtmpfs on /dev, or copy to MemoryKind::Ramfs with \
                     Linux 6.12 or later: there are no loop devices",
                    "load the module loop, or mount a devtmpfs on /dev, or use copy=ramfs with Linux 6.12 \
                     or later: there are no loop devices",
                ));
            }
            (operation, Errno::PERM | Errno::ACCESS) => operation.permission()?,
            (_, Errno::MFILE) => {
                "raise RLIMIT_NOFILE (`ulimit -n`): the process has too many open files"
            }
            (Operation::ReadImage, Errno::BADF) => "open the descriptor for reading",
            (Operation::ReadThrough, Errno::IO) => {
                "look into dmesg: the disk cannot read the object, or the content of the object does not \
                 match its digest"
            }
            (Operation::WriteMemory, Errno::FBIG) => {
                "raise RLIMIT_FSIZE (`ulimit -f`): the image is larger than a file may be"
            }
            (Operation::IdmapMount, Errno::INVAL) => {
                "write uid_map and gid_map of the user namespace first; idmapped EROFS needs Linux 5.19"
            }
            (Operation::CloneMount, Errno::INVAL) => {
                "use Linux 6.15 or later, or a detached mount: an older kernel cannot clone a mount on the \
                 rootfs of an initramfs"
            }
            (Operation::AttachBeneath, Errno::OPNOTSUPP) => {
                "use Linux 6.5 or later, or attach on top of the mount"
            }
            (Operation::Attach, Errno::INVAL | Errno::LOOP) => {
                "attach a detached mount to a directory of this mount namespace"
            }
            (Operation::EnterNamespace, Errno::INVAL | Errno::NOENT) => {
                "give the ID of a running process, or a path such as /proc/PID/ns/mnt"
            }
            (Operation::AttachBeneath, Errno::INVAL) => {
                "give the root directory of a mount, which must not be the root of the system"
            }
            (Operation::MakeWhiteouts, Errno::OPNOTSUPP) => {
                "use Linux 6.6 or later: the root directory of the image has extended attributes that \
                 an older tmpfs cannot hold"
            }
            (Operation::SetOption, Errno::INVAL) if self.is_selinux_context() => {
                "use a kernel with SELinux enabled, or leave out the SELinux context"
            }
            (Operation::ChangeSuperblock | Operation::ChangeAttributes, Errno::BUSY) => {
                "close the files that are open for writing: `fuser -vm DIRECTORY` lists the files"
            }
            (Operation::CreateSuperblock, _) if self.log.is_empty() => match self.file_system {
                Some("overlay") => {
                    "look into dmesg; no layer may lie within another layer, and upperdir must be \
                     writable"
                }
                _ => "look into dmesg for messages of the kernel",
            },
            _ => return None,
        };
        Some(Hint::new(text))
    }

    fn is_selinux_context(&self) -> bool {
        let option = self.object.as_deref().map(|option| option.as_os_str().as_encoded_bytes());
        option.is_some_and(|option| {
            SELINUX_CONTEXTS.iter().any(|name| {
                option.strip_prefix(name.as_bytes()).is_some_and(|v| v.starts_with(b"="))
            })
        })
    }
}

/// The mount options for SELinux contexts, which every file system accepts.
pub(crate) const SELINUX_CONTEXTS: [&str; 4] =
    ["context", "fscontext", "defcontext", "rootcontext"];

impl std::error::Error for KernelError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(object) = &self.object {
            write!(f, "{}: ", shown(object))?;
        }
        write!(f, "cannot {}", self.operation)?;
        if let Some(file_system) = self.file_system {
            write!(f, " of {file_system}")?;
        }
        write!(f, ": {}", errno_text(self.errno))?;
        if !self.log.is_empty() {
            write!(f, " (the kernel says: {})", shown(&self.log.join("; ")))?;
        }
        Ok(())
    }
}

impl From<KernelError> for std::io::Error {
    fn from(error: KernelError) -> std::io::Error {
        let kind = std::io::Error::from(error.errno).kind();
        std::io::Error::new(kind, error)
    }
}

/// An operation that the kernel performs for sealmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Operation {
    /// FSCONFIG_CMD_CREATE of an EROFS without a source, as a check of the permission to mount.
    #[error("mount EROFS")]
    CheckPermission,
    /// open(2) of the image.
    #[error("open the image")]
    OpenImage,
    /// pread(2) of the image.
    #[error("read the image")]
    ReadImage,
    /// FS_IOC_MEASURE_VERITY on the image, an object directory or an object.
    #[error("measure the fs-verity digest")]
    MeasureVerity,
    /// open(2) and getdents(2) in an object directory.
    #[error("sample the objects")]
    SampleObjects,
    /// open(2), getdents(2) and getxattr(2) on the EROFS mount, to find files with an object.
    #[error("sample the files of the image")]
    SampleFiles,
    /// openat2(2) and read(2) of a file of the image, through the finished mount.
    #[error("read the file through the mount")]
    ReadThrough,
    /// open(2), getdents(2), stat(2) and getxattr(2) of the directories and files of a mounted image.
    #[error("list the objects of the image")]
    ListObjects,
    /// open(2), stat(2) and pread(2) of an object.
    #[error("read the object")]
    ReadObject,
    /// fstat(2) or statx(2) of a directory that becomes a layer.
    #[error("stat the directory")]
    StatDirectory,
    /// sysinfo(2), if /proc/meminfo cannot be read.
    #[error("query the memory of the machine")]
    QueryMemory,
    /// memfd_create(2), or open(2) of a file in a new ramfs.
    #[error("make a memory file for the copy")]
    CreateMemory,
    /// malloc(3) of buffers for the copy.
    #[error("allocate buffers")]
    AllocateBuffers,
    /// pwrite(2) to the memory file.
    #[error("write to the copy")]
    WriteMemory,
    /// F_ADD_SEALS of fcntl(2), or the change of a ramfs to read-only.
    #[error("seal the copy")]
    SealMemory,
    /// open(2) of /dev/loop-control, and LOOP_CTL_GET_FREE.
    #[error("find a free loop device")]
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
    /// The system calls that try whether EROFS reads the last page of a file that ends within this page.
    #[error("read the last page of the file through EROFS")]
    ReadLastPage,
    /// FSCONFIG_CMD_CREATE of a trial overlay on the finished mount.
    #[error("stack an overlay on the mount")]
    StackOverlay,
    /// open_tree(2) with OPEN_TREE_CLONE.
    #[error("clone the mount")]
    CloneMount,
    /// open(2) of a user namespace.
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
    #[error("enter a private procfs")]
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
    /// move_mount(2) with MOVE_MOUNT_BENEATH.
    #[error("attach the mount beneath another")]
    AttachBeneath,
    /// open(2) and read(2) of mountinfo in a private procfs.
    #[error("read the mount table")]
    ReadMountTable,
    /// FSCONFIG_CMD_RECONFIGURE of an attached mount.
    #[error("change the superblock")]
    ChangeSuperblock,
    /// mount_setattr(2) of an attached mount.
    #[error("change the attributes of the mount")]
    ChangeAttributes,
    /// open_tree(2) with OPEN_TREE_CLONE and AT_RECURSIVE, of the disk or of the finished root file system.
    #[error("clone the tree of mounts")]
    CloneTree,
    /// move_mount(2) of a directory of the root file system.
    #[error("attach the directory of the root file system")]
    AttachDirectory,
    /// mkdir(2) and openat2(2) in the directory of a deployment.
    #[error("open the directory of the deployment")]
    OpenState,
    /// getdents(2) in the directory of images.
    #[error("find the image")]
    FindImage,
    /// The system calls that write the options of a mount to a file in /run.
    #[error("record the options of the mount")]
    WriteRecord,
    /// The system calls that read the options of a mount from a file in /run.
    #[error("read the recorded options of the mount")]
    ReadRecord,
}

impl Operation {
    /// Returns the advice for EPERM and EACCES.
    fn permission(self) -> Option<&'static str> {
        match self {
            Operation::OpenImage => None,
            Operation::FindLoopDevice
            | Operation::OpenLoopDevice
            | Operation::ConfigureLoopDevice => Some(
                "run as root, with access to /dev/loop-control and /dev/loop*: a container needs both \
                 given to it",
            ),
            Operation::OpenUserNamespace => {
                Some("run as root (CAP_SYS_PTRACE): the process belongs to another user")
            }
            Operation::IdmapMount => Some(
                "give another user namespace than the initial one, and run as root (CAP_SYS_ADMIN in the \
                 initial user namespace)",
            ),
            Operation::EnterNamespace => {
                Some("run as root (CAP_SYS_ADMIN and CAP_SYS_CHROOT) to enter a mount namespace")
            }
            Operation::WriteRecord | Operation::ReadRecord => {
                Some("run as root, which owns the directory of the records")
            }
            Operation::ReadImage
            | Operation::MeasureVerity
            | Operation::SampleObjects
            | Operation::ReadObject => Some(
                "check the permissions of the files; if you are root, a security module or a seccomp \
                 filter denied the call",
            ),
            _ => Some(
                "mounting needs root (CAP_SYS_ADMIN in the initial user namespace); if you are root, a \
                 seccomp filter (common in containers) or a security module denied the call",
            ),
        }
    }
}

/// Returns the text of an errno, as strerror(3) has it.
pub(crate) fn errno_text(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}
