//! Checks that no process can write to a copy, and that the loop device of a memfd has the requested
//! settings.

use super::fixtures::{self, V1};
use super::machines::STANDARD;
use super::mounted::{self, with_copy};
use super::{probe, system};
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_get_seals, memfd_create};
use rustix::io::Errno;
use sealmount::{CopyOptions, Event, Image, MemoryKind, MountOptions};
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use test_support::mountinfo::mount_at;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "copy_memfd_is_sealed",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: memfd_is_sealed,
    },
    Scenario {
        name: "copy_ramfs_is_read_only",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: ramfs_is_read_only,
    },
    Scenario {
        name: "copy_loop_device_uses_requested_settings",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: copy_loop_device_uses_requested_settings,
    },
    Scenario {
        name: "nosymfollow_is_enforced_or_rejected",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: nosymfollow_is_enforced_or_rejected,
    },
];

/// Copies an image. Calls `look` with the copy before and during a mount.
fn with_new_copy<T>(
    guest: &Guest,
    memory: MemoryKind,
    look: impl Fn(BorrowedFd, &Path) -> Result<T, Error>,
) -> Result<T, Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let source = Image::open(V1.image_in(&disk))?.copy(&CopyOptions::new(memory))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", source.as_fd().as_raw_fd()));
    look(source.as_fd(), &path)?;
    let _mount = source.mount()?;
    look(source.as_fd(), &path)
}

/// If the kernel supports `MFD_NOEXEC_SEAL`, the copy cannot be executed either.
fn memfd_is_sealed(guest: &mut Guest) -> Result<(), Error> {
    let mut expected = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    match memfd_create("probe", MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL) {
        Ok(_) => expected |= SealFlags::EXEC,
        Err(Errno::INVAL) => println!("this kernel does not support MFD_NOEXEC_SEAL"),
        Err(errno) => return Err(errno.into()),
    }
    let (seals, mode) = with_new_copy(guest, MemoryKind::Memfd, |copy, _| {
        Ok((fcntl_get_seals(copy)?, rustix::fs::fstat(copy)?.st_mode))
    })?;
    assert!(seals.contains(expected), "the copy has {seals:?} instead of {expected:?}");
    let is_noexec = expected.contains(SealFlags::EXEC);
    assert_eq!((seals.contains(SealFlags::EXEC), mode & 0o111 == 0), (is_noexec, is_noexec));
    Ok(())
}

/// Root can neither write to the copy nor make it writable again.
fn ramfs_is_read_only(guest: &mut Guest) -> Result<(), Error> {
    with_new_copy(guest, MemoryKind::Ramfs, |copy, path| {
        let write = File::options().write(true).open(path);
        let errno = write.err().as_ref().and_then(Errno::from_io_error);
        assert_eq!(errno, Some(Errno::ROFS), "open for writing");
        assert_eq!(rustix::fs::fchmod(copy, rustix::fs::Mode::RWXU), Err(Errno::ROFS));
        let magic = rustix::fs::fstatfs(copy)?.f_type;
        assert_eq!(magic as u32, 0x8584_58f6, "RAMFS_MAGIC");
        Ok(())
    })
}

/// Checks the settings of the loop device, which a single LOOP_CONFIGURE call makes.
fn copy_loop_device_uses_requested_settings(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let options = with_copy(&MountOptions::new(V1.objects_in(&disk)), MemoryKind::Memfd);
    let mounted = mounted::mount(&options, &V1.image_in(&disk))??;
    let device = mounted.events.iter().find_map(|event| match event {
        Event::LoopDevice { device, .. } => device.file_name(),
        _ => None,
    });
    let device = Path::new("/sys/block").join(device.ok_or("no event reports a loop device")?);
    for (attribute, expected) in [
        ("ro", "1"),
        ("loop/autoclear", "1"),
        ("loop/dio", "0"),
        ("queue/logical_block_size", "4096"),
    ] {
        let path = device.join(attribute);
        let found = fs::read_to_string(&path).context(|| path.display().to_string())?;
        assert_eq!(found.trim(), expected, "{}", path.display());
    }
    mounted.unmount()?;
    system::no_loop_devices()
}

/// Linux < 5.14 rejects the attribute.
fn nosymfollow_is_enforced_or_rejected(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let mut options = MountOptions::new(V1.objects_in(&disk));
    options.overlay.attributes.nosymfollow = true;
    let mounted = mounted::mount(&options, &V1.image_in(&disk))?;
    if !probe::nosymfollow()? {
        let errno = mounted.err().and_then(|error| error.raw_os_error());
        assert_eq!(errno, Some(Errno::INVAL.raw_os_error()));
        return Ok(());
    }
    let mounted = mounted?;
    let tree = Path::new(mounted::TREE);
    let seen = mount_at(tree).ok_or("mountinfo does not have the mount")?;
    assert!(seen.options.iter().any(|option| option == "nosymfollow"), "{seen:?}");
    mounted.assert_shows(&V1);
    let link = find_link(tree)?.ok_or("the tree has no symbolic link")?;
    assert!(fs::read_link(&link).is_ok());
    let followed = rustix::fs::stat(&link).map(drop);
    assert_eq!(followed, Err(Errno::LOOP), "{}", link.display());
    mounted.unmount()
}

fn find_link(directory: &Path) -> Result<Option<PathBuf>, Error> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_symlink() {
            return Ok(Some(path));
        }
        if kind.is_dir()
            && let Some(link) = find_link(&path)?
        {
            return Ok(Some(link));
        }
    }
    Ok(None)
}
