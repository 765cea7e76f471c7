//! A root file system that is ready, and its place.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, major, minor, mkdirat, openat, stat, symlinkat};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, move_mount};

use crate::attach::open_mount_point;
use crate::boot::disk::is_mount_root;
use crate::boot::error::SetupError;
use crate::kernel::{KernelError, Operation};

/// The directory of the second mount of the disk, below its parents. systemd unmounts it last, because it is
/// below /run/initramfs.
const KEPT_DISK: [&str; 3] =
    ["/run/initramfs", "/run/initramfs/sealmount", "/run/initramfs/sealmount/disk"];

/// A root file system that is attached nowhere: a tree of mounts. Dropping the value unmounts the tree.
#[derive(Debug)]
pub struct PreparedRoot {
    tree: OwnedFd,
    disk: OwnedFd,
    /// The device number of the disk.
    device: u64,
}

impl PreparedRoot {
    pub(crate) fn new(tree: OwnedFd, disk: OwnedFd, device: u64) -> PreparedRoot {
        PreparedRoot { tree, disk, device }
    }

    /// Attaches the root to a directory, in one step. In an initramfs, the directory is the mount point of the
    /// disk. The root then covers the disk, and the disk stays mounted below the root. In a running system,
    /// /run/nextroot is the next root of `systemctl soft-reboot`.
    ///
    /// # Errors
    ///
    /// [`SetupError`]. Nothing is attached.
    pub fn attach(&self, target: impl AsRef<Path>) -> Result<(), SetupError> {
        let target = target.as_ref();
        let directory = open_mount_point(target)?;
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&self.tree, "", &directory, "", flags)
            .map_err(|errno| KernelError::new(Operation::Attach, errno).on(target).into())
    }

    /// Attaches the disk to a directory below /run/initramfs, for the end of the system. Otherwise no process
    /// can make the disk read-only when the system stops, and the next boot must recover the disk. For
    /// systemd, the method also makes the link /run/systemd/volatile-root, which leads to the device of the
    /// disk.
    ///
    /// If /run is not the root of a mount, the method does nothing: /run then ends with the initramfs.
    ///
    /// # Errors
    ///
    /// [`KernelError`]. The root works all the same.
    pub fn keep_disk(&self) -> Result<(), KernelError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let failed = |errno| KernelError::new(Operation::AttachDirectory, errno).on(KEPT_DISK[2]);
        match openat(CWD, "/run", flags, Mode::empty()).and_then(|run| is_mount_root(&run)) {
            Ok(false) | Err(Errno::NOENT) => return Ok(()),
            result => result.map_err(failed)?,
        };
        let [initramfs, own, disk] = KEPT_DISK;
        for (directory, mode) in [(initramfs, 0o755), (own, 0o700), (disk, 0o700)] {
            match mkdirat(CWD, directory, Mode::from_raw_mode(mode)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        move_mount(&self.disk, "", CWD, disk, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(failed)?;
        link_volatile_root(self.device);
        Ok(())
    }
}

/// Links /run/systemd/volatile-root to the device of the disk. systemd-gpt-auto-generator follows the link to
/// find the EFI system partition. An initramfs without systemd has no /run/systemd yet. If the link exists,
/// nothing changes.
fn link_volatile_root(device: u64) {
    // btrfs has a device number of its own, which is not the number of the disk.
    let device = match major(device) {
        0 => stat("/dev/gpt-auto-root").map(|stat| stat.st_rdev).ok(),
        _ => Some(device),
    };
    if let Some(device) = device {
        let path = format!("/dev/block/{}:{}", major(device), minor(device));
        let _ = mkdirat(CWD, "/run/systemd", Mode::from_raw_mode(0o755));
        let _ = symlinkat(path, CWD, "/run/systemd/volatile-root");
    }
}
