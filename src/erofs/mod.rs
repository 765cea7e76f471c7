//! The bare EROFS mount of a source: methods and their fallbacks.

mod error;
mod last_page;
mod permission;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::kernel::fs_context::FsContext;
use crate::kernel::mount::Mount;
use crate::kernel::procfs::Procfs;
use crate::kernel::{KernelError, Operation, Unsupported};
use crate::location::{Location, proc_fd_path};
use crate::source::loop_device::LoopDevice;
use crate::source::{MemoryKind, Source};

pub use error::ErofsError;
pub use permission::check_permission;

/// A method to give an image to EROFS. The variants are in order, newest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceMethod {
    /// The file by descriptor (Linux 7.3).
    Descriptor,
    /// The path of the descriptor in a procfs (Linux 6.12).
    DescriptorPath,
    /// A loop device with the file (Linux 5.8).
    LoopDevice,
}

impl fmt::Display for SourceMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SourceMethod::Descriptor => "EROFS source by descriptor",
            SourceMethod::DescriptorPath => "EROFS source by path of the descriptor",
            SourceMethod::LoopDevice => "EROFS source by loop device",
        })
    }
}

/// A report on an EROFS mount.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ErofsReport {
    /// The method that was used.
    pub method: SourceMethod,
    /// The methods that this kernel does not support, in the order of the attempts.
    pub unsupported: Vec<Unsupported<SourceMethod>>,
    /// The loop device, if there is one.
    pub loop_device: Option<PathBuf>,
    /// Whether the EROFS is mounted with `noacl`, because the image is known to hold no ACL.
    pub noacl: bool,
    /// The user namespace with the mapping of the mount, if the mount is idmapped.
    pub user_namespace: Option<PathBuf>,
}

/// A detached mount of an EROFS: the metadata of the image, without the contents of the objects.
///
/// The third stage of a mount, made by [`Source::mount`]. An EROFS mount can be used alone. A plain EROFS
/// image is a complete file system. A composefs image shows the names, attributes and xattrs of its files.
/// Any number of overlays can be made on one EROFS mount: they share its superblock, with the caches of the
/// kernel. As [`AsFd`], the value is the root directory of the mount: files can be opened relative to it.
///
/// ```no_run
/// use sealmount::Image;
///
/// // A plain EROFS image needs no objects: the mount is complete.
/// let erofs = Image::open_erofs("/images/tools.erofs")?.trust()?.mount()?;
/// println!("{}", erofs.report().method);
/// erofs.into_detached().attach("/opt/tools")?;
/// # Ok::<(), sealmount::Error>(())
/// ```
#[derive(Debug)]
pub struct ErofsMount {
    mount: Mount,
    source: Source,
    report: ErofsReport,
    user_namespace: Option<Arc<OwnedFd>>,
}

impl Source {
    /// Mounts the EROFS, without attaching it anywhere.
    ///
    /// Each call makes a mount. Mounts through a loop device share the device and the superblock. If the
    /// kernel mounts the file itself (Linux 6.12), each call makes a superblock. To share one superblock,
    /// mount once and use [`ErofsMount::try_clone`] or [`ErofsMount::idmapped`].
    ///
    /// # Errors
    ///
    /// [`ErofsError`]; `EPERM` without `CAP_SYS_ADMIN` in the initial user namespace.
    pub fn mount(&self) -> Result<ErofsMount, ErofsError> {
        self.mount_noting(&mut Vec::new())
    }

    /// Mounts the EROFS. Notes unsupported methods in `unsupported`, also if the mount fails.
    pub(crate) fn mount_noting(
        &self,
        unsupported: &mut Vec<Unsupported<SourceMethod>>,
    ) -> Result<ErofsMount, ErofsError> {
        let mounted = mount(self, unsupported)?;
        Ok(ErofsMount::new(mounted, self, unsupported.clone()))
    }

    /// Mounts the EROFS through a loop device, after the methods in `unsupported`.
    pub(crate) fn mount_by_loop_device(
        &self,
        unsupported: Vec<Unsupported<SourceMethod>>,
    ) -> Result<ErofsMount, ErofsError> {
        let mounted = mount_by_loop_device(self, &*self.loop_device()?)?;
        Ok(ErofsMount::new(mounted, self, unsupported))
    }

    /// Returns whether the source is a memfd. Up to Linux 7.3, EROFS cannot mount a file on a tmpfs itself.
    fn is_memfd(&self) -> bool {
        self.report().memory == Some(MemoryKind::Memfd)
    }
}

impl ErofsMount {
    fn new(
        (mount, method, loop_device): Mounted,
        source: &Source,
        unsupported: Vec<Unsupported<SourceMethod>>,
    ) -> ErofsMount {
        let noacl = source.header().has_no_acl();
        let report = ErofsReport { method, unsupported, loop_device, noacl, user_namespace: None };
        let mount = Mount::new(mount);
        ErofsMount { mount, source: source.clone(), report, user_namespace: None }
    }

    /// Returns whether the kernel mounts the file itself, without a loop device.
    pub(crate) fn is_from_file(&self) -> bool {
        self.report.method != SourceMethod::LoopDevice
    }

    /// Returns the report on the mount.
    pub fn report(&self) -> &ErofsReport {
        &self.report
    }

    /// Returns the source of the EROFS.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Clones the mount ([open_tree(2)](https://man7.org/linux/man-pages/man2/open_tree.2.html)). The clone
    /// is detached and shares the superblock.
    ///
    /// Before Linux 6.15, the kernel clones only attached mounts. There the clone depends on the source:
    ///
    /// - An EROFS on a loop device is mounted once more. The kernel finds the same superblock.
    /// - Any other EROFS is attached in a private mount namespace, which ends with this value. On the rootfs of
    ///   an initramfs, such a namespace cannot be made. Then the clone has a superblock of its own.
    ///
    /// # Errors
    ///
    /// [`ErofsError`]
    pub fn try_clone(&self) -> Result<ErofsMount, ErofsError> {
        let (mount, is_new) = match self.mount.clone_detached() {
            Ok(clone) => (clone, false),
            // Linux < 6.15
            Err(Errno::INVAL) => self.clone_attached()?,
            Err(errno) => return Err(self.clone_error(errno).into()),
        };
        let clone = ErofsMount {
            mount,
            source: self.source.clone(),
            report: self.report.clone(),
            user_namespace: self.user_namespace.clone(),
        };
        if let (true, Some(namespace)) = (is_new, &self.user_namespace) {
            clone.set_mapping(namespace)?;
        }
        Ok(clone)
    }

    /// Clones the mount on a kernel that clones only attached mounts. Also returns whether the clone is a new
    /// mount, without the mapping of the original.
    fn clone_attached(&self) -> Result<(Mount, bool), ErofsError> {
        if self.is_from_file() {
            match self.mount.clone_attached() {
                // The root of this mount namespace is the rootfs of an initramfs, so the image is mounted
                // once more.
                Err(error) if error.errno == Errno::INVAL => {}
                result => return Ok((result?, false)),
            }
        }
        let (mount, ..) = match self.is_from_file() {
            true => mount(&self.source, &mut Vec::new())?,
            false => mount_by_loop_device(&self.source, &*self.source.loop_device()?)?,
        };
        Ok((Mount::new(mount), true))
    }

    fn clone_error(&self, errno: Errno) -> KernelError {
        KernelError::new(Operation::CloneMount, errno).on(self.source.path())
    }

    /// Clones the mount and gives the clone the mapping of a user namespace (/proc/PID/ns/user). In the
    /// clone, the files of the image have the mapped owners
    /// ([mount_setattr(2)](https://man7.org/linux/man-pages/man2/mount_setattr.2.html), Linux 5.19).
    ///
    /// # Errors
    ///
    /// [`ErofsError::NotUserNamespace`]; [`ErofsError::AlreadyIdmapped`]; [`ErofsError::Kernel`] if the
    /// namespace is the initial one (`EPERM`) or has no mapping yet (`EINVAL`).
    pub fn idmapped(&self, user_namespace: impl Into<Location>) -> Result<ErofsMount, ErofsError> {
        let namespace = UserNamespace::open(&user_namespace.into())?;
        self.require_unmapped()?;
        self.try_clone()?.into_idmapped(&namespace)
    }

    /// Gives this mount the mapping of a user namespace.
    pub(crate) fn into_idmapped(
        mut self,
        namespace: &UserNamespace,
    ) -> Result<ErofsMount, ErofsError> {
        self.require_unmapped()?;
        self.report.user_namespace = Some(namespace.path.clone());
        self.set_mapping(&namespace.fd)?;
        self.user_namespace = Some(namespace.fd.clone());
        Ok(self)
    }

    fn require_unmapped(&self) -> Result<(), ErofsError> {
        match self.user_namespace {
            Some(_) => Err(ErofsError::AlreadyIdmapped { image: self.source.path().to_owned() }),
            None => Ok(()),
        }
    }

    fn set_mapping(&self, namespace: &OwnedFd) -> Result<(), KernelError> {
        sealmount_sys::mount_setattr_idmap(&self.mount, namespace).map_err(|errno| {
            let path = self.report.user_namespace.as_deref().unwrap_or(Path::new("idmap"));
            KernelError::new(Operation::IdmapMount, errno).on(path)
        })
    }

    /// Returns the mount, its source and its report.
    pub(crate) fn into_mount(self) -> (Mount, Source, ErofsReport) {
        (self.mount, self.source, self.report)
    }
}

impl AsFd for ErofsMount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }
}

/// An opened user namespace.
pub(crate) struct UserNamespace {
    fd: Arc<OwnedFd>,
    path: PathBuf,
}

impl UserNamespace {
    pub fn open(location: &Location) -> Result<UserNamespace, ErofsError> {
        let path = location.display_path();
        let opened = match location {
            Location::Path(path) => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
                openat(CWD, path, flags, Mode::empty())
            }
            Location::Fd(fd) => rustix::io::fcntl_dupfd_cloexec(fd, 0),
        };
        let fd = opened
            .map_err(|errno| KernelError::new(Operation::OpenUserNamespace, errno).on(&path))?;
        if !sealmount_sys::is_user_namespace(&fd) {
            return Err(ErofsError::NotUserNamespace { path });
        }
        Ok(UserNamespace { fd: Arc::new(fd), path })
    }
}

/// A mount of an EROFS, the method that made it, and its loop device.
type Mounted = (OwnedFd, SourceMethod, Option<PathBuf>);

/// Mounts the EROFS of a source, detached.
///
/// The methods, newest first. An errno in parentheses means "not supported".
/// 1. The file by descriptor, Linux 7.3 (EINVAL "Non-string source" for the option; on tmpfs, EINVAL
///    "source is unsupported" for the superblock).
/// 2. The path of the descriptor, Linux 6.12 (ENOTBLK, also on tmpfs and without
///    CONFIG_EROFS_FS_BACKED_BY_FILE; ENODEV if the kernel has no procfs).
/// 3. A loop device. A memfd is mounted with this method at once.
///
/// Linux 7.3 cannot read a file that ends within a page, by descriptor or by path (EIO of a trial,
/// [`last_page`]). Such a file is mounted through a loop device.
///
/// EINVAL for the superblock also means a damaged image. The next method fails with EINVAL too then, and
/// the image is rejected.
fn mount(
    source: &Source,
    unsupported: &mut Vec<Unsupported<SourceMethod>>,
) -> Result<Mounted, ErofsError> {
    let file_methods: &[(SourceMethod, MountFile)] = match source.is_memfd() {
        true => &[],
        false => &[
            (SourceMethod::Descriptor, mount_by_descriptor),
            (SourceMethod::DescriptorPath, mount_by_path),
        ],
    };
    let mut refusal = None;
    for (method, mount_file) in file_methods {
        let error = match mount_and_check(source, *mount_file) {
            Err(error) if means_unsupported(&error) => error,
            result => return Ok((result?, *method, None)),
        };
        unsupported.push(Unsupported::new(*method, error.clone()));
        let is_misread = error.operation == Operation::ReadLastPage;
        refusal = Some(error).filter(|error| error.errno == Errno::INVAL);
        // The kernel reads a file by path as by descriptor.
        if is_misread {
            break;
        }
    }
    let device = match (source.loop_device(), refusal) {
        // If there is no loop device, the error of the earlier method is the reason.
        (Err(_), Some(refusal)) => return Err(refusal.into()),
        (device, _) => device?,
    };
    mount_by_loop_device(source, &device)
}

/// Mounts the EROFS in a file. The source gives the options, and the path for messages.
type MountFile = fn(&Source, BorrowedFd<'_>) -> Result<OwnedFd, KernelError>;

fn mount_by_descriptor(source: &Source, file: BorrowedFd<'_>) -> Result<OwnedFd, KernelError> {
    mount_from(source, &|context| context.set_fd("source", file, source.path()))
}

fn mount_by_path(source: &Source, file: BorrowedFd<'_>) -> Result<OwnedFd, KernelError> {
    with_fd_path(source, file, |link| {
        mount_from(source, &|context| context.set_string("source", link))
    })
}

/// Mounts the file of a source. If the file ends within a page, checks that the kernel can read the page.
fn mount_and_check(source: &Source, mount_file: MountFile) -> Result<OwnedFd, KernelError> {
    let mounted = mount_file(source, source.as_fd());
    let is_read = |error: &KernelError| {
        error.operation == Operation::CreateSuperblock && error.errno == Errno::IO
    };
    if source.ends_within_page() && mounted.as_ref().err().is_none_or(is_read) {
        last_page::check(source.path(), |file| mount_file(source, file))?;
    }
    mounted
}

fn mount_by_loop_device(source: &Source, device: &LoopDevice) -> Result<Mounted, ErofsError> {
    let mount = mount_from(source, &|context| context.set_string("source", &device.path))?;
    device.check_is_source_of(&mount)?;
    Ok((mount, SourceMethod::LoopDevice, Some(device.path.clone())))
}

/// Runs `work` with a path by which the kernel finds a file: the file of the source, or of a trial.
///
/// With a digest, the path must lead to the file that was verified, so a private procfs is used. Without a
/// digest, no file was verified, and a path in /proc is as good as the path of the image. docs/design.md has
/// the cost of the private procfs.
fn with_fd_path(
    source: &Source,
    file: BorrowedFd<'_>,
    work: impl Fn(&Path) -> Result<OwnedFd, KernelError> + Send,
) -> Result<OwnedFd, KernelError> {
    if source.digest().is_none() {
        match work(&proc_fd_path(file)) {
            // /proc is not mounted.
            Err(error) if error.errno == Errno::NOENT => {}
            result => return result,
        }
    }
    match source.procfs() {
        Some(procfs) => procfs.with_fd_path(file, work),
        None => Procfs::require()?.with_fd_path(file, work),
    }
}

fn mount_from(
    source: &Source,
    set_source: &dyn Fn(&FsContext) -> Result<(), KernelError>,
) -> Result<OwnedFd, KernelError> {
    let context = FsContext::open("erofs")?.for_image(source.path());
    set_source(&context)?;
    context.set_flag("ro")?;
    if source.header().has_no_acl() {
        // Saves a search for ACLs on every access.
        context.set_flag("noacl")?;
    }
    context.create()?;
    context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Returns whether an error may mean that the kernel does not support the method.
fn means_unsupported(error: &KernelError) -> bool {
    match error.operation {
        Operation::SetOption | Operation::CreateSuperblock => {
            matches!(error.errno, Errno::INVAL | Errno::NOTBLK)
        }
        // The kernel has no procfs.
        Operation::OpenFileSystem => error.errno == Errno::NODEV && error.is_on("proc"),
        Operation::ReadLastPage => error.errno == Errno::IO,
        _ => false,
    }
}
