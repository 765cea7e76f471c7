//! Mounts on systems that lack /proc, loop devices, modules, write access, or the right to change the
//! kernel. Either the mount works without the missing part, or the error names that part.

use super::fixtures::{self, Fixture, HELPER, V1, V2};
use super::machines::SOLITARY;
use super::probe;
use super::system::{helper, no_loop_devices, rejected, succeeded, unload};
use crate::machine::{Format, Machine};
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use sealmount::{MemoryKind, MountOptions, SourceMethod, Verity};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};
use test_support::manifest::{ROOT, assert_is_manifest, assert_root_is};
use test_support::mountinfo::mounts;

pub const SCENARIOS: &[Scenario] = &[
    scenario("missing_proc_still_mounts", missing_proc_still_mounts),
    scenario("missing_loop_control_is_reported", missing_loop_control_is_reported),
    scenario("missing_loop_nodes_are_reported", missing_loop_nodes_are_reported),
    scenario("missing_loop_module_is_reported", missing_loop_module_is_reported),
    scenario("missing_erofs_module_is_reported", missing_erofs_module_is_reported),
    scenario("missing_overlay_module_is_reported", missing_overlay_module_is_reported),
    scenario("missing_write_access_still_mounts", missing_write_access_still_mounts),
    Scenario { machine: &LOCKED_DOWN, ..scenario("lockdown_still_mounts", lockdown_still_mounts) },
];

/// Lockdown cannot be undone, so it has its own machine.
static LOCKED_DOWN: Machine = Machine { name: "locked-down", on_large_pages: false, ..SOLITARY };

const fn scenario(name: &'static str, run: fn(&mut Guest) -> Result<(), Error>) -> Scenario {
    Scenario { name, machine: &SOLITARY, time_limit: Scenario::TIME_LIMIT, run }
}

const TREE: &str = "/mnt/tree";

/// Runs the helper with the V1 image of a directory.
fn try_mount(directory: &Path, copy: &str) -> Result<Output, Error> {
    try_mount_of(&V1, directory, copy)
}

fn try_mount_of(fixture: &Fixture, directory: &Path, copy: &str) -> Result<Output, Error> {
    fs::create_dir_all(TREE)?;
    let options = format!("basedir={}{copy}", fixture.objects_in(directory).display());
    helper(&fixture.image_in(directory), Path::new(TREE), &options)
}

/// Mounts the images of both formats and checks the trees.
fn assert_mounts(directory: &Path, copy: &str) -> Result<(), Error> {
    for fixture in [&V1, &V2] {
        succeeded(&try_mount_of(fixture, directory, copy)?)?;
        assert_is_manifest(Path::new(TREE));
        assert_root_is(Path::new(TREE), ROOT);
        unmount(TREE, UnmountFlags::empty()).context(|| format!("cannot unmount {TREE}"))?;
    }
    Ok(())
}

/// The mounts that need no loop device, by the directory of the image and the option for a copy.
type WithoutLoopDevices<'a> = Vec<(&'a Path, &'static str)>;

/// Finds the mounts for which the kernel mounts EROFS from a file directly. A copy in a ramfs is like a file
/// on the disk.
fn without_loop_devices(disk: &Path) -> Result<WithoutLoopDevices<'_>, Error> {
    let mut without = Vec::new();
    for place in [disk, Path::new("/")] {
        if probe::best_source(&V1.image_in(place))? != SourceMethod::LoopDevice {
            without.push((place, ""));
        }
        let of_copy = probe::padded(&V1.image_in(disk), probe::best_source)?;
        if of_copy != SourceMethod::LoopDevice {
            without.push((place, ",copy=ramfs"));
        }
    }
    Ok(without)
}

/// Checks the mounts without loop devices. All mounts that are not in the list fail with one message.
fn needs_loop_devices(
    disk: &Path,
    without: &WithoutLoopDevices<'_>,
    expected: &[&str],
) -> Result<(), Error> {
    for place in [disk, Path::new("/")] {
        for copy in ["", ",copy=ramfs"] {
            match without.contains(&(place, copy)) {
                true => assert_mounts(place, copy)?,
                false => rejected(&try_mount(place, copy)?, 32, expected)?,
            }
        }
    }
    rejected(&try_mount(disk, ",copy")?, 32, expected)
}

fn missing_proc_still_mounts(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    fs::create_dir_all(TREE)?;
    let mut before = Vec::new();
    for fixture in [&V1, &V2] {
        let image = fixture.image_in(&disk);
        let of_copy = probe::padded(&image, probe::best_source)?;
        before.push((fixture, probe::best_source(&image)?, of_copy));
    }
    unmount("/proc", UnmountFlags::DETACH)?;
    if Path::new("/proc/self").exists() {
        return Err("/proc is still mounted".into());
    }
    assert_mounts(&disk, "")?;
    assert_mounts(&disk, ",copy")?;

    // sealmount resolves the path of a descriptor in a private procfs.
    let source = |fixture: &Fixture, copy, objects: sealmount::Location| {
        let mut options = MountOptions::new(objects);
        options.copy = copy;
        if copy.is_some() {
            options.digest = Some(fixture.digest()?);
            options.overlay.verity = Some(Verity::Off);
        }
        let mount = options.mount(File::open(fixture.image_in(&disk))?)?;
        let method = mount.report().ok_or("the mount has no report")?.erofs.method;
        mount.attach(TREE)?;
        assert_is_manifest(Path::new(TREE));
        unmount(TREE, UnmountFlags::empty())?;
        Ok::<_, Error>(method)
    };
    for (fixture, expected, of_copy) in before {
        let objects = File::open(fixture.objects_in(&disk))?;
        let found = [
            source(fixture, None, fixture.objects_in(&disk).into())?,
            source(fixture, None, objects.into())?,
            source(fixture, Some(MemoryKind::Ramfs), fixture.objects_in(&disk).into())?,
            source(fixture, Some(MemoryKind::Memfd), fixture.objects_in(&disk).into())?,
        ];
        if found != [expected, expected, of_copy, SourceMethod::LoopDevice] {
            return Err(format!("unexpected source methods without /proc: {found:?}").into());
        }
    }

    let other_namespace = Command::new(HELPER)
        .args(["-N", "1", "-o", "basedir=/v1/objects", "/v1/image.cfs", TREE])
        .output()?;
    rejected(&other_namespace, 32, &["/proc/1/ns/mnt", "No such file or directory"])?;
    no_loop_devices()
}

/// Mounts an empty /dev for this scenario, with /dev/null and perhaps /dev/loop-control.
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

fn missing_loop_control_is_reported(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    let without = without_loop_devices(&disk)?;
    empty_dev(false)?;
    needs_loop_devices(
        &disk,
        &without,
        &["/dev/loop-control: ", "No such file or directory", "load the module loop"],
    )
}

/// A container can have a static /dev, which does not show new loop devices.
fn missing_loop_nodes_are_reported(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    empty_dev(true)?;
    let expected = ["/dev/loop", "no free loop device after", "No such file or directory"];
    rejected(&try_mount(&disk, ",copy")?, 2, &expected)?;
    no_loop_devices()
}

fn missing_loop_module_is_reported(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    let without = without_loop_devices(&disk)?;
    let Some(_unloaded) = unload("loop")? else {
        return assert_mounts(&disk, ",copy");
    };
    let hint = "load the module loop, or mount a devtmpfs on /dev, or use copy=ramfs";
    needs_loop_devices(&disk, &without, &["/dev/loop-control: ", "No such file", hint])?;
    // A static /dev still has the node.
    empty_dev(true)?;
    needs_loop_devices(&disk, &without, &["/dev/loop-control: ", "No such device", hint])
}

fn missing_erofs_module_is_reported(guest: &mut Guest) -> Result<(), Error> {
    missing_file_system(
        guest,
        "erofs",
        "load the module erofs, or enable CONFIG_EROFS_FS: this kernel has no EROFS",
    )
}

fn missing_overlay_module_is_reported(guest: &mut Guest) -> Result<(), Error> {
    missing_file_system(
        guest,
        "overlay",
        "load the module overlay, or enable CONFIG_OVERLAY_FS: this kernel has no overlayfs",
    )
}

fn missing_file_system(guest: &Guest, name: &str, hint: &str) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    let Some(unloaded) = unload(name)? else {
        return assert_mounts(&disk, ",copy");
    };
    let message = format!("{name}: cannot open the file system type: No such device");
    for copy in ["", ",copy", ",copy,tryverity"] {
        rejected(&try_mount(&disk, copy)?, 32, &[&message, hint])?;
    }
    no_loop_devices()?;
    // A mount must work after the module is loaded again.
    drop(unloaded);
    assert_mounts(&disk, ",copy")
}

fn missing_write_access_still_mounts(guest: &mut Guest) -> Result<(), Error> {
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
            other => return Err(format!("creating {} returned {other:?}", path.display()).into()),
        }
    }
    for directory in [&disk, Path::new("/")] {
        assert_mounts(directory, "")?;
        assert_mounts(directory, ",copy")?;
    }
    no_loop_devices()
}

/// In lockdown, the kernel protects itself from root. Mounts still work.
fn lockdown_still_mounts(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "images")?;
    let lockdown = Path::new("/sys/kernel/security/lockdown");
    if guest.has_file_system("securityfs")? && !lockdown.exists() {
        mount("securityfs", "/sys/kernel/security", "securityfs", MountFlags::empty(), None)?;
    }
    if !lockdown.exists() {
        println!("this kernel does not support lockdown");
        return Ok(());
    }
    fs::write(lockdown, "confidentiality").context(|| format!("cannot write {lockdown:?}"))?;
    let level = fs::read_to_string(lockdown)?;
    assert!(level.contains("[confidentiality]"), "{level}");
    for copy in ["", ",copy", ",copy=ramfs"] {
        assert_mounts(&disk, copy)?;
    }
    no_loop_devices()
}
