//! What a copy is: memory that nobody can write to, and the loop device that some need.

use super::fixtures::{self, V1};
use super::machines::STANDARD;
use super::mounted::{self, with_copy};
use super::{probe, system};
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_get_seals, memfd_create};
use sealmount::{Errno, Memory, MountAttributes, MountOptions, Step};
use std::fs::{self, File};
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
        name: "copy_loop_device",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: loop_device_is_as_asked_for,
    },
    Scenario {
        name: "nosymfollow",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: nosymfollow,
    },
];

/// Mounts a copy, and looks at it as it is when it has just been made.
fn with_new_copy<T>(
    guest: &Guest,
    memory: Memory,
    look: impl Fn(&File, &Path) -> Result<T, Error>,
) -> Result<T, Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let options = with_copy(&MountOptions::new(V1.objects_in(&disk)), memory);
    let before = descriptors()?;
    let mut seen = Err("it was not told that there is a copy".into());
    let mount = options.mount_with(V1.image_in(&disk), &mut |step| {
        if matches!(step, Step::Copied { .. }) {
            seen =
                copy_among_descriptors(&before).and_then(|path| look(&File::open(&path)?, &path));
        }
    })?;
    drop(mount);
    seen
}

fn descriptors() -> Result<Vec<(PathBuf, PathBuf)>, Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        // That of the directory itself is gone.
        if let Ok(file) = fs::read_link(&path) {
            found.push((path, file));
        }
    }
    Ok(found)
}

/// Of the new ones, the one that is no file of a directory: a memfd, or of a ramfs that is attached
/// nowhere.
fn copy_among_descriptors(before: &[(PathBuf, PathBuf)]) -> Result<PathBuf, Error> {
    let mut found = descriptors()?;
    println!("{found:?}");
    found.retain(|descriptor| {
        let (path, file) = descriptor;
        let is_copy = file.starts_with("/memfd:sealmount:") || file == Path::new("/image.cfs");
        !before.contains(descriptor) && is_copy && fs::metadata(path).is_ok_and(|it| it.is_file())
    });
    match found.as_slice() {
        [(path, _)] => Ok(path.clone()),
        _ => Err(format!("copies among the descriptors: {found:?}").into()),
    }
}

/// Where the kernel can, execution is sealed off too.
fn memfd_is_sealed(guest: &mut Guest) -> Result<(), Error> {
    let mut expected = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    match memfd_create("probe", MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL) {
        Ok(_) => expected |= SealFlags::EXEC,
        Err(Errno::INVAL) => println!("this kernel has no MFD_NOEXEC_SEAL"),
        Err(errno) => return Err(errno.into()),
    }
    let (seals, mode) = with_new_copy(guest, Memory::Memfd, |copy, _| {
        use std::os::unix::fs::MetadataExt;
        Ok((fcntl_get_seals(copy)?, copy.metadata()?.mode()))
    })?;
    assert!(seals.contains(expected), "{seals:?}, and not {expected:?}");
    let is_noexec = expected.contains(SealFlags::EXEC);
    assert_eq!((seals.contains(SealFlags::EXEC), mode & 0o111 == 0), (is_noexec, is_noexec));
    Ok(())
}

/// Root itself can neither write to it nor make it writable again.
fn ramfs_is_read_only(guest: &mut Guest) -> Result<(), Error> {
    with_new_copy(guest, Memory::Ramfs, |copy, path| {
        let write = File::options().write(true).open(path);
        let errno = write.err().as_ref().and_then(Errno::from_io_error);
        assert_eq!(errno, Some(Errno::ROFS), "opened for writing");
        assert_eq!(rustix::fs::fchmod(copy, rustix::fs::Mode::RWXU), Err(Errno::ROFS));
        let is_file_system = rustix::fs::fstatfs(copy)?.f_type;
        assert_eq!(is_file_system, 0x8584_58f6, "RAMFS_MAGIC");
        Ok(())
    })
}

/// One call, and no other, makes it all of this.
fn loop_device_is_as_asked_for(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let options = with_copy(&MountOptions::new(V1.objects_in(&disk)), Memory::Memfd);
    let mounted = mounted::mount(&options, &V1.image_in(&disk))??;
    let device = mounted.steps.iter().find_map(|step| match step {
        Step::LoopDevice { device } => device.file_name(),
        _ => None,
    });
    let device = Path::new("/sys/block").join(device.ok_or("no loop device was told of")?);
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

/// Refused before 5.14.
fn nosymfollow(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let mut options = MountOptions::new(V1.objects_in(&disk));
    options.attributes |= MountAttributes::NOSYMFOLLOW;
    let mounted = mounted::mount(&options, &V1.image_in(&disk))?;
    if !probe::nosymfollow()? {
        assert_eq!(mounted.err().and_then(|error| error.errno()), Some(Errno::INVAL));
        return Ok(());
    }
    let mounted = mounted?;
    let tree = Path::new(mounted::TREE);
    let seen = mount_at(tree).ok_or("not in mountinfo")?;
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
