//! A finished mount, and the directories that it is attached to.

use std::fmt;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, move_mount};

use crate::erofs::{ErofsMount, ErofsReport};
use crate::kernel::mount::Mount;
use crate::kernel::{ErrorKind, Hint, KernelError, Operation};
use crate::location::{DirectoryError, DirectoryRole, Location};
use crate::overlay::{ImageLayer, ObjectVerity, Overlay, OverlayError, OverlayReport, Samples};
use crate::source::SourceReport;

/// A report on a mount, stage by stage.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MountReport {
    /// The source, with its digest and the verifier.
    pub source: SourceReport,
    /// The EROFS mount.
    pub erofs: ErofsReport,
    /// The overlay, or `None` for a bare EROFS mount.
    pub overlay: Option<OverlayReport>,
}

/// A mount that is attached nowhere. No process sees it, and dropping it unmounts it.
///
/// The fifth and last stage of a mount. As [`AsFd`], the value is the root directory of the mount: files can
/// be opened relative to it. [`into_fd`](DetachedMount::into_fd) returns the descriptor of
/// [fsmount(2)](https://man7.org/linux/man-pages/man2/fsmount.2.html) (Linux 5.2). Another process can
/// receive the descriptor and make a mount of it with `DetachedMount::from`.
#[derive(Debug)]
pub struct DetachedMount {
    mount: Mount,
    report: Option<Box<MountReport>>,
}

impl Overlay {
    /// Mounts the overlay on an image, without attaching it anywhere. The caller keeps the EROFS mount, and
    /// can mount other overlays on it.
    ///
    /// If [`OverlayOptions::check`](crate::OverlayOptions::check) requests a check of every object, the
    /// method checks the objects first. If the kernel mounted the EROFS from a file, the method also tries
    /// another overlay on the mount. [`OverlayReport::stacking`](crate::OverlayReport::stacking) has the
    /// result. Some kernels stack no other overlay (Linux 6.17.13 and 6.18.5).
    ///
    /// An upper layer belongs to one mount at a time. overlayfs does not reject a second mount with this
    /// layer: it writes a warning to dmesg, and the changes of both mounts mix.
    ///
    /// # Errors
    ///
    /// [`OverlayError`]
    pub fn mount(&self, image: &ErofsMount) -> Result<DetachedMount, OverlayError> {
        let check = self.check_before_mount(image, &mut |_| ControlFlow::Continue(()))?;
        let layer = ImageLayer::Borrowed(image);
        let (mount, overlay) =
            self.mount_noting(layer, check, &Samples::default(), &mut Vec::new())?;
        let (source, erofs) = (image.source().report().clone(), image.report().clone());
        Ok(DetachedMount::new(mount, MountReport { source, erofs, overlay: Some(overlay) }))
    }
}

impl ErofsMount {
    /// Turns the bare EROFS mount into a mount that can be attached.
    pub fn into_detached(self) -> DetachedMount {
        let (mount, source, erofs) = self.into_mount();
        let report = MountReport { source: source.report().clone(), erofs, overlay: None };
        DetachedMount::new(mount, report)
    }
}

impl DetachedMount {
    pub(crate) fn new(mount: Mount, report: MountReport) -> DetachedMount {
        DetachedMount { mount, report: Some(Box::new(report)) }
    }

    /// Returns the report on the mount, or `None` if the mount was made from a descriptor.
    pub fn report(&self) -> Option<&MountReport> {
        self.report.as_deref()
    }

    /// Returns whether the objects are verified when they are read, or `None` if the mount is not known to
    /// be an overlay.
    pub fn verity(&self) -> Option<ObjectVerity> {
        Some(self.report()?.overlay.as_ref()?.verity)
    }

    /// Attaches the mount to a directory, on top of a mount that is already there
    /// ([move_mount(2)](https://man7.org/linux/man-pages/man2/move_mount.2.html)).
    ///
    /// To find a missing directory before an image is copied, open the directory first with
    /// [`open_mount_point`].
    ///
    /// The method writes no record of the options for a later remount. After the attachment, a program can
    /// write a [`MountRecord`](crate::MountRecord).
    ///
    /// ```no_run
    /// # fn f(mount: sealmount::DetachedMount) -> Result<(), sealmount::Error> {
    /// if let Err(error) = mount.attach("/sysroot/nwe") {
    ///     eprintln!("{error}");
    ///     // The verified copy is not lost.
    ///     error.into_mount().attach("/sysroot/new")?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`AttachError`], which holds the mount.
    pub fn attach(self, mount_point: impl Into<Location>) -> Result<(), AttachError> {
        self.attach_by(&mount_point.into(), Operation::Attach, MoveMountFlags::empty())
    }

    /// Attaches the mount to a directory, beneath the mount that is already there (`MOVE_MOUNT_BENEATH` of
    /// [move_mount(2)](https://man7.org/linux/man-pages/man2/move_mount.2.html), Linux 6.5). When the mount
    /// on top is unmounted, the mount beneath shows. So a tree can be replaced while the directory is never
    /// empty.
    ///
    /// The mount point is the root directory of the mount on top.
    ///
    /// # Errors
    ///
    /// [`AttachError`], which holds the mount. On a kernel without `MOVE_MOUNT_BENEATH`, the kind of the
    /// error is [`ErrorKind::Unsupported`].
    pub fn attach_beneath(self, mount_point: impl Into<Location>) -> Result<(), AttachError> {
        let mount_point = mount_point.into();
        if let Err(errno) = probe_beneath() {
            let error = KernelError::new(Operation::AttachBeneath, errno);
            return Err(AttachError::new(self, error.on(mount_point.display_path())));
        }
        // rustix lacks MOVE_MOUNT_BENEATH.
        let beneath = MoveMountFlags::from_bits_retain(MOVE_MOUNT_BENEATH);
        self.attach_by(&mount_point, Operation::AttachBeneath, beneath)
    }

    fn attach_by(
        mut self,
        mount_point: &Location,
        operation: Operation,
        flags: MoveMountFlags,
    ) -> Result<(), AttachError> {
        let directory = match open_mount_point(mount_point) {
            Ok(directory) => directory,
            Err(error) => return Err(AttachError::new(self, error)),
        };
        // A mount that had to be attached to be cloned is replaced by a clone.
        self.mount = match self.mount.into_fd() {
            Ok(fd) => Mount::new(fd),
            Err((mount, error)) => {
                self.mount = mount;
                return Err(AttachError::new(self, error));
            }
        };
        let flags = flags
            | MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
            | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        match move_mount(&self.mount, "", &directory, "", flags) {
            Ok(()) => Ok(()),
            Err(errno) => {
                let error = KernelError::new(operation, errno).on(mount_point.display_path());
                Err(AttachError::new(self, error))
            }
        }
    }

    /// Clones the mount ([open_tree(2)](https://man7.org/linux/man-pages/man2/open_tree.2.html)). The clone is
    /// detached and shares the superblock.
    ///
    /// Before Linux 6.15, the kernel clones only attached mounts. There the mount is attached in a private
    /// mount namespace, which ends with this value.
    ///
    /// # Errors
    ///
    /// [`KernelError`]. Before Linux 6.15 and on the rootfs of an initramfs, no such namespace can be made, and
    /// the kind of the error is [`ErrorKind::Unsupported`].
    pub fn try_clone(&self) -> Result<DetachedMount, KernelError> {
        Ok(DetachedMount { mount: self.mount.try_clone()?, report: self.report.clone() })
    }

    /// Returns the descriptor of the mount. Closing the descriptor unmounts the mount.
    ///
    /// # Errors
    ///
    /// [`KernelError`], only before Linux 6.15 and after [`try_clone`](DetachedMount::try_clone).
    pub fn into_fd(self) -> Result<OwnedFd, KernelError> {
        self.mount.into_fd().map_err(|(_, error)| error)
    }
}

/// Uses a descriptor of [fsmount(2)](https://man7.org/linux/man-pages/man2/fsmount.2.html) or
/// [open_tree(2)](https://man7.org/linux/man-pages/man2/open_tree.2.html), for example from another process.
/// The descriptor is not checked, so it must come from a trusted sender. An attached mount is moved when it
/// is attached, a directory of a mount is rejected then, and a clone of it shows the directory.
impl From<OwnedFd> for DetachedMount {
    fn from(fd: OwnedFd) -> DetachedMount {
        DetachedMount { mount: Mount::new(fd), report: None }
    }
}

impl AsFd for DetachedMount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }
}

const MOVE_MOUNT_BENEATH: u32 = 0x200;

/// Checks that the kernel knows `MOVE_MOUNT_BENEATH` (Linux 6.5).
///
/// EINVAL of a real call has many causes. So the probe has empty paths, without the flags that allow empty
/// paths. A kernel that knows the flag fails with ENOENT. An older kernel fails with EINVAL before it looks
/// at the paths.
fn probe_beneath() -> Result<(), Errno> {
    let beneath = MoveMountFlags::from_bits_retain(MOVE_MOUNT_BENEATH);
    match move_mount(CWD, "", CWD, "", beneath) {
        // Linux < 6.5
        Err(Errno::INVAL) => Err(Errno::OPNOTSUPP),
        Err(errno @ (Errno::PERM | Errno::ACCESS | Errno::NOSYS)) => Err(errno),
        _ => Ok(()),
    }
}

/// The reason why a mount cannot be attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachProblem {
    /// The mount point is missing, not a directory, or out of reach.
    #[error(transparent)]
    Directory(#[from] DirectoryError),

    /// A system call failed.
    #[error(transparent)]
    Kernel(Box<KernelError>),
}

impl AttachProblem {
    /// Returns the failed system call, if the problem is a system call.
    pub fn kernel(&self) -> Option<&KernelError> {
        match self {
            AttachProblem::Kernel(error) => Some(error),
            _ => None,
        }
    }

    /// Returns the [errno](https://man7.org/linux/man-pages/man3/errno.3.html) of the failed system call, if
    /// there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            AttachProblem::Directory(error) => Some(error.raw_os_error()),
            _ => self.kernel().map(KernelError::raw_os_error),
        }
    }

    /// Returns the category of the problem, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        match self {
            AttachProblem::Directory(error) => error.kind(),
            AttachProblem::Kernel(error) => error.kind(),
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        match self {
            AttachProblem::Directory(error) => error.hint(),
            AttachProblem::Kernel(error) => error.hint(),
        }
    }
}

impl From<KernelError> for AttachProblem {
    fn from(error: KernelError) -> AttachProblem {
        AttachProblem::Kernel(Box::new(error))
    }
}

/// A mount that could not be attached, and the reason.
#[derive(Debug)]
pub struct AttachError {
    problem: AttachProblem,
    mount: Box<DetachedMount>,
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.problem.fmt(f)
    }
}

impl std::error::Error for AttachError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.problem.source()
    }
}

impl AttachError {
    fn new(mount: DetachedMount, problem: impl Into<AttachProblem>) -> AttachError {
        AttachError { problem: problem.into(), mount: Box::new(mount) }
    }

    /// Returns the reason.
    pub fn problem(&self) -> &AttachProblem {
        &self.problem
    }

    /// Returns the failed system call, if the error is one.
    pub fn kernel(&self) -> Option<&KernelError> {
        self.problem.kernel()
    }

    /// Returns the [errno](https://man7.org/linux/man-pages/man3/errno.3.html) of the failed system call, if
    /// there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.problem.raw_os_error()
    }

    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        self.problem.kind()
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        self.problem.hint()
    }

    /// Returns the mount, which is still detached.
    pub fn into_mount(self) -> DetachedMount {
        *self.mount
    }

    pub(crate) fn into_problem(self) -> AttachProblem {
        self.problem
    }
}

/// Opens the mount point. Opening it before mounting reports a missing directory early, and pins the
/// directory: later changes of the path have no effect.
///
/// # Errors
///
/// [`DirectoryError`]
pub fn open_mount_point(mount_point: impl Into<Location>) -> Result<OwnedFd, DirectoryError> {
    mount_point.into().open_directory(DirectoryRole::MountPoint)
}

/// Enters a mount namespace (/proc/PID/ns/mnt) with
/// [setns(2)](https://man7.org/linux/man-pages/man2/setns.2.html) (Linux 3.8). Paths then belong to that
/// namespace, and mounts are attached in it. The root directory and the working directory become the root of
/// the namespace.
///
/// # Errors
///
/// [`KernelError`]; `EINVAL` if the process has several threads, or if the file is not a mount namespace.
pub fn enter_mount_namespace(namespace: impl AsRef<Path>) -> Result<(), KernelError> {
    let namespace = namespace.as_ref();
    openat(CWD, namespace, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
        .and_then(sealmount_sys::enter_mount_namespace)
        .map_err(|errno| KernelError::new(Operation::EnterNamespace, errno).on(namespace))
}
