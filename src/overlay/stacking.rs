//! A trial overlay on a finished mount: systemd-sysext and containers also mount an overlay there.
//!
//! overlayfs allows two levels of stacking. Linux 6.17.13 and 6.18.5 count an EROFS from a file as a level,
//! and do not count an EROFS on a loop device. On these kernels, no overlay fits on the overlay of an image
//! from a file.
//!
//! Only EINVAL for the superblock of the trial overlay means this fault. After any other failure the mount
//! counts as not tried: a trial must not make a good mount fail.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, mkdirat};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::kernel::fs_context::FsContext;
use crate::kernel::mount_table::IMAGE;
use crate::kernel::private_namespace::attach_in_scratch;
use crate::kernel::{KernelError, Operation};

/// The result of a trial overlay on a finished mount.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Stacking {
    /// Another overlay can be mounted on the mount: sealmount has made one, and removed it again.
    Possible,
    /// The kernel rejects another overlay on the mount. On some kernels, an EROFS from a file counts as a
    /// level of stacking (Linux 6.17.13 and 6.18.5).
    Impossible(KernelError),
    /// sealmount does not know: the EROFS is on a loop device, another layer is on an overlayfs, or the trial
    /// failed for another reason.
    NotTried,
}

impl Stacking {
    fn of(trial: Result<(), KernelError>, image: &Path) -> Stacking {
        match trial {
            Ok(()) => Stacking::Possible,
            Err(error)
                if (error.operation, error.errno)
                    == (Operation::CreateSuperblock, Errno::INVAL) =>
            {
                let mut stacked = KernelError::new(Operation::StackOverlay, Errno::INVAL).on(image);
                stacked.log = error.log;
                Stacking::Impossible(stacked)
            }
            Err(_) => Stacking::NotTried,
        }
    }

    /// Returns the error of the kernel if the mount cannot be stacked.
    pub fn error(&self) -> Option<&KernelError> {
        match self {
            Stacking::Impossible(error) => Some(error),
            _ => None,
        }
    }
}

/// Tries an overlay of a finished mount and the image below it, both detached (Linux 6.15).
pub(crate) fn try_on(mount: impl AsFd, image: impl AsFd, path: &Path) -> Stacking {
    let trial = || {
        let context = FsContext::open("overlay")?;
        // overlayfs needs two lower layers. The image conflicts with no layer.
        context.set_fd("lowerdir+", mount, path)?;
        context.set_fd("lowerdir+", image, path)?;
        context.create()
    };
    Stacking::of(trial(), path)
}

/// Tries two overlays on the image in the scratch of a private mount namespace. The trial does not use the
/// finished mount. Before Linux 6.15 a layer must be attached, and the finished mount could not be detached
/// again.
pub(crate) fn try_in_scratch(path: &Path) -> Stacking {
    let failed = |errno| KernelError::new(Operation::AttachLayer, errno);
    let overlay = |lowerdir| {
        let context = FsContext::open("overlay")?;
        context.set_string("lowerdir", lowerdir)?;
        context.create()?;
        Ok::<_, KernelError>(context)
    };
    let trial = || {
        mkdirat(CWD, "empty", Mode::RWXU).map_err(failed)?;
        let first = overlay(format!("{IMAGE}:empty"))?.mount(MountAttrFlags::empty())?;
        attach_in_scratch("first", &first).map_err(failed)?;
        overlay("first:empty".to_owned()).map(drop)
    };
    Stacking::of(trial(), path)
}
