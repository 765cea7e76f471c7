//! A file as a loop device.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, major, openat};
use rustix::io::Errno;

use crate::error::{Error, KernelError, Operation};
use crate::image::BLOCK_SIZE;

/// The major number of loop devices, among block devices.
const LOOP_MAJOR: u32 = 7;

/// How often a device is tried before giving up. Waits included, about four seconds.
const ATTEMPTS: u32 = 1000;
const LONGEST_WAIT: Duration = Duration::from_millis(8);

/// A loop device with a file attached, read-only. The kernel lets go of the file when the device
/// is closed by its last user: this value, or the mount of it.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    /// Keeps the device until it is mounted.
    device: OwnedFd,
    pub path: PathBuf,
}

impl LoopDevice {
    /// `name` is what `LOOP_GET_STATUS64` shows.
    pub fn attach(file: impl AsFd, name: &[u8]) -> Result<LoopDevice, Error> {
        let control = Path::new("/dev/loop-control");
        let control_error = |errno| KernelError::new(Operation::FindLoopDevice, errno).on(control);
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let control = openat(CWD, control, flags, Mode::empty()).map_err(control_error)?;

        let mut attempts = 0;
        loop {
            // Only a proposal. Until LOOP_CONFIGURE succeeds others may take the device, remove
            // it, or, where udev makes the nodes, be about to make it.
            let number = match sealmount_sys::loop_device::get_free(&control) {
                Err(Errno::AGAIN | Errno::INTR) if attempts < ATTEMPTS => {
                    attempts += 1;
                    wait(attempts);
                    continue;
                }
                answer => answer.map_err(control_error)?,
            };
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let error = match try_attach(&path, &file, name) {
                Ok(Some(device)) => return Ok(LoopDevice { device, path }),
                Ok(None) => return Err(Error::NotLoopDevice { path }),
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
                return Err(Error::NoLoopDevice { attempts, device: path, errno: error.errno });
            }
            wait(attempts);
        }
    }
}

impl LoopDevice {
    /// That a file system, of which `root` is the root, was made of this device. The kernel has looked
    /// the device's path up once more; in a mount namespace that is somebody else's, or where /dev is,
    /// that may have led to another device.
    pub fn check_is_source_of(&self, root: impl AsFd) -> Result<(), Error> {
        let device = |errno| KernelError::new(Operation::OpenLoopDevice, errno).on(&self.path);
        let is_same =
            fstat(root).map_err(device)?.st_dev == fstat(&self.device).map_err(device)?.st_rdev;
        if is_same { Ok(()) } else { Err(Error::NotLoopDevice { path: self.path.clone() }) }
    }
}

/// `None`: what has the device's name is none.
fn try_attach(path: &Path, file: impl AsFd, name: &[u8]) -> Result<Option<OwnedFd>, KernelError> {
    let failed = |errno| KernelError::new(Operation::OpenLoopDevice, errno);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let device = openat(CWD, path, flags, Mode::empty()).map_err(failed)?;
    let stat = fstat(&device).map_err(failed)?;
    let is_block_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    if !is_block_device || major(stat.st_rdev) != LOOP_MAJOR {
        return Ok(None);
    }
    sealmount_sys::loop_device::configure(&device, file, BLOCK_SIZE, name)
        .map_err(|errno| KernelError::new(Operation::ConfigureLoopDevice, errno))?;
    Ok(Some(device))
}

/// Waits longer with every attempt, and not as long as the others that try the same at this moment.
fn wait(attempt: u32) {
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let at_most = LONGEST_WAIT.min(Duration::from_micros(100) * attempt);
    let percent = clock.subsec_nanos() / 16 % 100;
    std::thread::sleep(at_most * percent / 100);
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::fs_context::FsContext;

    /// The kernel is told a path, and what it finds there must be what was attached.
    #[test]
    fn a_file_system_of_another_device_is_noticed() {
        if !crate::may_mount() {
            return;
        }
        let image = include_bytes!("../tests/images/v1/image.cfs");
        let [one, other] = [0, 1].map(|_| {
            let file = memfd_create("image", MemfdFlags::CLOEXEC).unwrap();
            rustix::io::pwrite(&file, image, 0).unwrap();
            LoopDevice::attach(file, b"a_file_system_of_another_device").unwrap()
        });
        let context = FsContext::open("erofs").unwrap();
        context.set_string("source", &one.path).unwrap();
        context.set_flag("ro").unwrap();
        context.create().unwrap();
        let mount = context.mount(rustix::mount::MountAttrFlags::MOUNT_ATTR_RDONLY).unwrap();
        one.check_is_source_of(&mount).unwrap();
        let error = other.check_is_source_of(&mount).unwrap_err();
        assert!(matches!(&error, Error::NotLoopDevice { path } if *path == other.path), "{error}");
    }
}
