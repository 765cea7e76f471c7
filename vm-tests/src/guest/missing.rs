//! What is not there: /proc, loop devices, modules, the right to write, or to change the kernel. Each
//! ends in an error that says what is missing, or is worked around.

use super::fixtures::{self, Fixture, HELPER, V1, V2};
use super::machines::SOLITARY;
use super::probe;
use super::system::{helper, no_loop_devices, refused, succeeded, unload};
use crate::machine::{Format, Machine};
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use sealmount::{Memory, MountOptions, Rung, Step, Verity};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use test_support::manifest::{ROOT, assert_is_manifest, assert_root_is};
use test_support::mountinfo::mounts;

pub const SCENARIOS: &[Scenario] = &[
    scenario("missing_proc", missing_proc),
    scenario("missing_loop_control", missing_loop_control),
    scenario("missing_loop_nodes", missing_loop_nodes),
    scenario("missing_loop_module", missing_loop_module),
    scenario("missing_erofs_module", missing_erofs_module),
    scenario("missing_overlay_module", missing_overlay_module),
    scenario("missing_write_access", missing_write_access),
    Scenario { machine: &LOCKED_DOWN, ..scenario("missing_lockdown", missing_lockdown) },
];

/// There is no way back from it.
static LOCKED_DOWN: Machine = Machine { name: "locked-down", ..SOLITARY };

const fn scenario(name: &'static str, run: fn(&mut Guest) -> Result<(), Error>) -> Scenario {
    Scenario { name, machine: &SOLITARY, time_limit: Scenario::TIME_LIMIT, run }
}

const TREE: &str = "/mnt/tree";

/// Mounts the V1 image of a directory by the helper.
fn try_mount(directory: &Path, copy: &str) -> Result<Output, Error> {
    try_mount_of(&V1, directory, copy)
}

fn try_mount_of(fixture: &Fixture, directory: &Path, copy: &str) -> Result<Output, Error> {
    fs::create_dir_all(TREE)?;
    let options = format!("basedir={}{copy}", fixture.objects_in(directory).display());
    helper(&fixture.image_in(directory), Path::new(TREE), &options)
}

/// Mounts that of both formats, which must work.
fn mounts_whole(directory: &Path, copy: &str) -> Result<(), Error> {
    for fixture in [&V1, &V2] {
        succeeded(&try_mount_of(fixture, directory, copy)?)?;
        assert_is_manifest(Path::new(TREE));
        assert_root_is(Path::new(TREE), ROOT);
        unmount(TREE, UnmountFlags::empty()).context(|| format!("cannot unmount {TREE}"))?;
    }
    Ok(())
}

/// Those of the images' places from which EROFS mounts files as they are.
fn without_loop_devices(disk: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut places = Vec::new();
    for place in [disk, Path::new("/")] {
        if probe::best_source(&V1.image_in(place))? != Rung::SourceByLoopDevice {
            places.push(place.to_owned());
        }
    }
    Ok(places)
}

/// Without loop devices, a file is mounted where the kernel can do without, and all else refused
/// with the same words. A ramfs is as good as a disk.
fn needs_loop_devices(disk: &Path, without: &[PathBuf], said: &[&str]) -> Result<(), Error> {
    let root = Path::new("/");
    for (place, copy, like) in [
        (disk, "", disk),
        (disk, ",copy=ramfs", disk),
        (root, "", root),
        (root, ",copy=ramfs", disk),
    ] {
        match without.iter().any(|place| place == like) {
            true => mounts_whole(place, copy)?,
            false => refused(&try_mount(place, copy)?, 2, said)?,
        }
    }
    refused(&try_mount(disk, ",copy")?, 2, said)
}

fn missing_proc(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    let expected = probe::best_source(&V1.image_in(&disk))?;
    fs::create_dir_all(TREE)?;
    unmount("/proc", UnmountFlags::DETACH)?;
    if Path::new("/proc/self").exists() {
        return Err("there still is a /proc".into());
    }
    mounts_whole(&disk, "")?;
    mounts_whole(&disk, ",copy")?;

    // The name of a descriptor is one in a procfs of its own.
    let source = |fixture: &Fixture, copy, objects: sealmount::Location| {
        let mut options = MountOptions::new(objects);
        options.copy = copy;
        if copy.is_some() {
            options.digest = Some(fixture.digest()?);
            options.verity = Some(Verity::Off);
        }
        let mut sources = Vec::new();
        let image = File::open(fixture.image_in(&disk))?;
        let mount = options.mount_with(image, &mut |step| {
            use Rung::{SourceByDescriptor, SourceByLoopDevice, SourceByPath};
            if let Step::Taken {
                rung: rung @ (SourceByDescriptor | SourceByPath | SourceByLoopDevice),
            } = step
            {
                sources.push(rung);
            }
        })?;
        mount.attach(TREE)?;
        assert_is_manifest(Path::new(TREE));
        unmount(TREE, UnmountFlags::empty())?;
        Ok::<_, Error>(sources)
    };
    for fixture in [&V1, &V2] {
        let objects = File::open(fixture.objects_in(&disk))?;
        let found = [
            source(fixture, None, fixture.objects_in(&disk).into())?,
            source(fixture, None, objects.into())?,
            source(fixture, Some(Memory::Ramfs), fixture.objects_in(&disk).into())?,
            source(fixture, Some(Memory::Memfd), fixture.objects_in(&disk).into())?,
        ];
        let loop_device = Rung::SourceByLoopDevice;
        if found != [expected, expected, expected, loop_device].map(|rung| vec![rung]) {
            return Err(format!("without /proc the sources were {found:?}").into());
        }
    }

    let other_namespace = Command::new(HELPER)
        .args(["-N", "1", "-o", "basedir=/v1/objects", "/v1/image.cfs", TREE])
        .output()?;
    refused(&other_namespace, 32, &["/proc/1/ns/mnt", "No such file or directory"])?;
    no_loop_devices()
}

/// A /dev with nothing in it but what is named, for this scenario alone.
fn empty_dev(loop_control: bool) -> Result<(), Error> {
    mount("dev", "/dev", "tmpfs", MountFlags::empty(), None)?;
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(CWD, "/dev/null", FileType::CharacterDevice, mode, makedev(1, 3))?;
    if loop_control {
        make_loop_control(Path::new("/dev/loop-control"))?;
    }
    Ok(())
}

fn make_loop_control(path: &Path) -> Result<(), Error> {
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(10, 237))?;
    Ok(())
}

fn missing_loop_control(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    let without = without_loop_devices(&disk)?;
    empty_dev(false)?;
    needs_loop_devices(
        &disk,
        &without,
        &["/dev/loop-control: ", "No such file or directory", "load the module loop"],
    )
}

/// As in a container whose /dev was made once and for all.
fn missing_loop_nodes(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    empty_dev(true)?;
    let said = ["no loop device to be had", "/dev/loop", "No such file or directory"];
    refused(&try_mount(&disk, ",copy")?, 2, &said)?;
    no_loop_devices()
}

fn missing_loop_module(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    let without = without_loop_devices(&disk)?;
    let Some(_unloaded) = unload("loop")? else {
        return mounts_whole(&disk, ",copy");
    };
    let hint = "there are no loop devices: load the module loop";
    needs_loop_devices(&disk, &without, &["/dev/loop-control: ", "No such file", hint])?;
    // Where nodes do not come and go with the drivers.
    empty_dev(true)?;
    needs_loop_devices(&disk, &without, &["/dev/loop-control: ", "No such device", hint])
}

fn missing_erofs_module(guest: &mut Guest) -> Result<(), Error> {
    missing_file_system(
        guest,
        "erofs",
        "this kernel has no EROFS: load the module erofs, or enable CONFIG_EROFS_FS",
    )
}

fn missing_overlay_module(guest: &mut Guest) -> Result<(), Error> {
    missing_file_system(
        guest,
        "overlay",
        "this kernel has no overlayfs: load the module overlay, or enable CONFIG_OVERLAY_FS",
    )
}

fn missing_file_system(guest: &Guest, name: &str, hint: &str) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    let Some(unloaded) = unload(name)? else {
        return mounts_whole(&disk, ",copy");
    };
    let message = format!("{name}: cannot open the file system type: No such device");
    for copy in ["", ",copy", ",copy,tryverity"] {
        refused(&try_mount(&disk, copy)?, 32, &[&message, hint])?;
    }
    no_loop_devices()?;
    // The next attempt works once the module is there.
    drop(unloaded);
    mounts_whole(&disk, ",copy")
}

fn missing_write_access(guest: &mut Guest) -> Result<(), Error> {
    let disk = guest.mount_disk("images", Format::Ext4, MountFlags::RDONLY)?;
    fs::create_dir_all(TREE)?;
    for mount in mounts() {
        mount_remount(&mount.mount_point, MountFlags::BIND | MountFlags::RDONLY, "")
            .context(|| format!("cannot make {} read-only", mount.mount_point.display()))?;
    }
    for directory in ["/", "/tmp", "/dev", "/mnt", "/mnt/images", "/run"] {
        let path = Path::new(directory).join("new");
        match File::create(&path) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::ROFS) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            other => return Err(format!("{} could be made: {other:?}", path.display()).into()),
        }
    }
    for directory in [&disk, Path::new("/")] {
        mounts_whole(directory, "")?;
        mounts_whole(directory, ",copy")?;
    }
    no_loop_devices()
}

/// What root may still do where the kernel protects itself from root.
fn missing_lockdown(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    let lockdown = Path::new("/sys/kernel/security/lockdown");
    if guest.has_file_system("securityfs")? && !lockdown.exists() {
        mount("securityfs", "/sys/kernel/security", "securityfs", MountFlags::empty(), None)?;
    }
    if !lockdown.exists() {
        println!("this kernel has no lockdown: nothing to show");
        return Ok(());
    }
    fs::write(lockdown, "confidentiality").context(|| format!("cannot write {lockdown:?}"))?;
    let level = fs::read_to_string(lockdown)?;
    assert!(level.contains("[confidentiality]"), "{level}");
    for copy in ["", ",copy", ",copy=ramfs"] {
        mounts_whole(&disk, copy)?;
    }
    no_loop_devices()
}
