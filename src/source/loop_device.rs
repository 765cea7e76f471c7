//! A file as a loop device: [loop(4)](https://man7.org/linux/man-pages/man4/loop.4.html).

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, major, openat};
use rustix::io::Errno;

use crate::kernel::{ErrorKind, Hint, KernelError, Operation, errno_text};
use crate::util::text::shown;

/// The major number of loop devices, among block devices.
const LOOP_MAJOR: u32 = 7;

/// The number of attempts to get a device. With the waits, all attempts need about four seconds.
const ATTEMPTS: u32 = 1000;
const LONGEST_WAIT: Duration = Duration::from_millis(8);

/// A loop device with a file attached, read-only. The kernel releases the file when the last user closes
/// the device: this value, or a mount of it.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    /// Keeps the device in use.
    device: OwnedFd,
    pub path: PathBuf,
}

impl LoopDevice {
    /// Attaches a file to a free device (`LOOP_CONFIGURE`, Linux 5.8). `LOOP_GET_STATUS64` shows `name`.
    pub fn attach(
        file: impl AsFd,
        block_size: u32,
        name: &[u8],
    ) -> Result<LoopDevice, LoopDeviceError> {
        let control = Path::new("/dev/loop-control");
        let control_error = |errno| KernelError::new(Operation::FindLoopDevice, errno).on(control);
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let control = openat(CWD, control, flags, Mode::empty()).map_err(control_error)?;

        let mut attempts = 0;
        loop {
            // The number is only a proposal. Until LOOP_CONFIGURE succeeds, other processes may take or
            // remove the device, and udev may be about to make its node.
            let number = match sealmount_sys::loop_device::get_free(&control) {
                Err(Errno::AGAIN | Errno::INTR) if attempts < ATTEMPTS => {
                    attempts += 1;
                    wait(attempts);
                    continue;
                }
                answer => answer.map_err(control_error)?,
            };
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let error = match try_attach(&path, &file, block_size, name) {
                Ok(Some(device)) => return Ok(LoopDevice { device, path }),
                Ok(None) => return Err(LoopDeviceError::NotLoopDevice { path }),
                Err(error) => error,
            };
            attempts += 1;
            let is_race = matches!(
                error.errno,
                Errno::BUSY
                    | Errno::AGAIN
                    | Errno::INTR
                    | Errno::NXIO
                    | Errno::NODEV
                    | Errno::NOENT
            );
            if !is_race {
                return Err(error.on(path).into());
            }
            if attempts >= ATTEMPTS {
                return Err(LoopDeviceError::NoLoopDevice {
                    attempts,
                    device: path,
                    source: error.errno.into(),
                });
            }
            wait(attempts);
        }
    }
}

impl LoopDevice {
    /// Checks that the file system with the root directory `root` is on this device.
    ///
    /// The kernel looks the path of the device up once more. In a foreign mount namespace, or a chroot,
    /// the path may lead to another device.
    pub fn check_is_source_of(&self, root: impl AsFd) -> Result<(), LoopDeviceError> {
        let device = |errno| KernelError::new(Operation::OpenLoopDevice, errno).on(&self.path);
        let is_same =
            fstat(root).map_err(device)?.st_dev == fstat(&self.device).map_err(device)?.st_rdev;
        if is_same {
            Ok(())
        } else {
            Err(LoopDeviceError::NotLoopDevice { path: self.path.clone() })
        }
    }
}

/// Attaches a file to the device at `path`. Returns `None` if the node at `path` is not a loop device.
fn try_attach(
    path: &Path,
    file: impl AsFd,
    block_size: u32,
    name: &[u8],
) -> Result<Option<OwnedFd>, KernelError> {
    let failed = |errno| KernelError::new(Operation::OpenLoopDevice, errno);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let device = openat(CWD, path, flags, Mode::empty()).map_err(failed)?;
    let stat = fstat(&device).map_err(failed)?;
    let is_block_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    if !is_block_device || major(stat.st_rdev) != LOOP_MAJOR {
        return Ok(None);
    }
    sealmount_sys::loop_device::configure(&device, file, block_size, name)
        .map_err(|errno| KernelError::new(Operation::ConfigureLoopDevice, errno))?;
    Ok(Some(device))
}

/// Waits for a random part of a time that grows with every attempt. Other processes may try to get a device
/// at the same time.
fn wait(attempt: u32) {
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let at_most = LONGEST_WAIT.min(Duration::from_micros(100) * attempt);
    let percent = clock.subsec_nanos() / 16 % 100;
    std::thread::sleep(at_most * percent / 100);
}

/// The reason why a file cannot be attached to a loop device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoopDeviceError {
    /// Other processes took every loop device that the kernel offered, or the device could not be opened.
    #[error("{}: cannot attach the image: no free loop device after {attempts} attempts; last error: {}",
            shown(device), errno_text(Errno::from_io_error(source).unwrap_or(Errno::BUSY)))]
    #[non_exhaustive]
    NoLoopDevice {
        /// The number of attempts.
        attempts: u32,
        /// The device of the last attempt.
        device: PathBuf,
        /// The error of the last attempt: `EBUSY`, `ENOENT`, …
        source: std::io::Error,
    },

    /// The node in /dev is not the loop device that the kernel offered.
    #[error(
        "{}: cannot mount the image: the node is not the loop device of this name",
        shown(path)
    )]
    #[non_exhaustive]
    NotLoopDevice {
        /// The path of the node.
        path: PathBuf,
    },

    /// A system call failed.
    #[error(transparent)]
    Kernel(Box<KernelError>),
}

impl LoopDeviceError {
    /// Returns the failed system call, if the error is one.
    pub fn kernel(&self) -> Option<&KernelError> {
        match self {
            LoopDeviceError::Kernel(error) => Some(error),
            _ => None,
        }
    }

    /// Returns the [errno](https://man7.org/linux/man-pages/man3/errno.3.html) of the failed system call, if
    /// there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            LoopDeviceError::NoLoopDevice { source, .. } => source.raw_os_error(),
            _ => self.kernel().map(KernelError::raw_os_error),
        }
    }

    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        match self {
            LoopDeviceError::NoLoopDevice { .. } => ErrorKind::Busy,
            LoopDeviceError::NotLoopDevice { .. } => ErrorKind::NotFound,
            LoopDeviceError::Kernel(error) => error.kind(),
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        match self {
            LoopDeviceError::NoLoopDevice { .. } => {
                Some(Hint::new("check that /dev shows the loop devices of the kernel"))
            }
            LoopDeviceError::NotLoopDevice { .. } => {
                Some(Hint::new("mount a devtmpfs on /dev, or bind the /dev of the system there"))
            }
            LoopDeviceError::Kernel(error) => error.hint(),
        }
    }
}

impl From<KernelError> for LoopDeviceError {
    fn from(error: KernelError) -> LoopDeviceError {
        LoopDeviceError::Kernel(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::kernel::fs_context::FsContext;

    #[test]
    fn file_system_of_another_loop_device_is_rejected() {
        if !crate::may_mount() {
            return;
        }
        let image = include_bytes!("../../tests/images/v1/image.cfs");
        let [one, other] = [0, 1].map(|_| {
            let file = memfd_create("image", MemfdFlags::CLOEXEC).unwrap();
            rustix::io::pwrite(&file, image, 0).unwrap();
            LoopDevice::attach(file, 4096, b"file_system_of_another_loop_device").unwrap()
        });
        let context = FsContext::open("erofs").unwrap();
        context.set_string("source", &one.path).unwrap();
        context.set_flag("ro").unwrap();
        context.create().unwrap();
        let mount = context.mount(rustix::mount::MountAttrFlags::MOUNT_ATTR_RDONLY).unwrap();
        one.check_is_source_of(&mount).unwrap();
        let error = other.check_is_source_of(&mount).unwrap_err();
        assert!(
            matches!(&error, LoopDeviceError::NotLoopDevice { path } if *path == other.path),
            "{error}"
        );
    }
}
