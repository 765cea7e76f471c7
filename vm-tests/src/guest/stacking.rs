//! Mounts overlays on a mounted image, as systemd-sysext, bootc and container runtimes do. On kernels that
//! count an EROFS from a file as a level of stacking, sealmount uses a loop device.

use super::fixtures::{self, V1};
use super::machines::STANDARD;
use super::mounted::{self, Mounted, TREE, with_copy};
use super::probe;
use crate::files::copy;
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sealmount::{Event, MemoryKind, Method, MountOptions, Operation, SourceMethod, UpperLayer};
use std::ffi::CString;
use std::fs;
use std::path::Path;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "overlay_stacks_on_image_from_disk",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: overlay_stacks_on_image_from_disk,
    },
    Scenario {
        name: "overlay_stacks_on_image_from_tmpfs",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: overlay_stacks_on_image_from_tmpfs,
    },
    Scenario {
        name: "overlay_stacks_on_copies",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: overlay_stacks_on_copies,
    },
    Scenario {
        name: "overlay_stacks_on_upper_layer",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: overlay_stacks_on_upper_layer,
    },
    Scenario {
        name: "stacking_is_reported_without_loop",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: stacking_is_reported_without_loop,
    },
];

fn overlay_stacks_on_image_from_disk(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let mounted = mounted::mount(&MountOptions::new(V1.objects_in(&disk)), &V1.image_in(&disk))??;
    assert_source(&mounted, &disk)?;
    assert_stacks(mounted, &disk)
}

fn overlay_stacks_on_image_from_tmpfs(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let place = Path::new("/mnt/stacking");
    fs::create_dir_all(place)?;
    mount("tmpfs", place, "tmpfs", MountFlags::empty(), None)?;
    copy(&V1.image_in(&disk), &V1.image_in(place))?;
    let mounted = mounted::mount(&MountOptions::new(V1.objects_in(&disk)), &V1.image_in(place))??;
    assert_source(&mounted, place)?;
    assert_stacks(mounted, &disk)
}

fn overlay_stacks_on_copies(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let none = MountOptions::new(V1.objects_in(&disk));
    let memfd = mounted::mount(&with_copy(&none, MemoryKind::Memfd), &V1.image_in(&disk))??;
    assert_stacks(memfd, &disk)?;
    let ramfs = mounted::mount(&with_copy(&none, MemoryKind::Ramfs), &V1.image_in(&disk))??;
    // A kernel mounts a file of a ramfs as it mounts a file of a disk.
    let expected = probe::padded(&V1.image_in(&disk), probe::best_source)?;
    assert_source_is(&ramfs, expected);
    assert_stacks(ramfs, &disk)
}

fn overlay_stacks_on_upper_layer(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let (upperdir, workdir) = (disk.join("below/upper"), disk.join("below/work"));
    fs::create_dir_all(&upperdir)?;
    fs::create_dir_all(&workdir)?;
    let mut options = MountOptions::new(V1.objects_in(&disk));
    options.overlay.upper = Some(UpperLayer::new(&upperdir, workdir));
    let mounted = mounted::mount(&options, &V1.image_in(&disk))??;
    assert_source(&mounted, &disk)?;
    fs::write(Path::new(TREE).join("below"), "below")?;
    assert_eq!(fs::read_to_string(upperdir.join("below"))?, "below");
    assert_stacks(mounted, &disk)
}

/// Without a loop device, sealmount still mounts. An event reports that no overlay can be mounted on the
/// mount.
fn stacking_is_reported_without_loop(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let image = V1.image_in(&disk);
    if probe::newest_source(&image)? == SourceMethod::LoopDevice {
        println!("this kernel mounts an image only through a loop device");
        return Ok(());
    }
    let stacks = probe::best_source(&image)? != SourceMethod::LoopDevice;
    let control = Path::new("/dev/loop-control");
    let hidden = Path::new("/dev/hidden-loop-control");
    fs::rename(control, hidden)?;
    let mounted = mounted::mount(&MountOptions::new(V1.objects_in(&disk)), &image);
    fs::rename(hidden, control)?;
    let mounted = mounted??;
    let found = mounted.events.iter().find_map(|event| match event {
        Event::NotStackable { error, .. } => Some(error.operation()),
        _ => None,
    });
    assert_eq!(found, (!stacks).then_some(Operation::StackOverlay));
    mounted.assert_shows(&V1);
    mounted.unmount()
}

/// Checks that the mount has the newest source method on whose mounts the kernel stacks two overlays.
fn assert_source(mounted: &Mounted, place: &Path) -> Result<(), Error> {
    assert_source_is(mounted, probe::best_source(&V1.image_in(place))?);
    Ok(())
}

fn assert_source_is(mounted: &Mounted, expected: SourceMethod) {
    let used = mounted.events.iter().find_map(|event| match event {
        Event::MethodUsed { method: Method::Source(method), .. } => Some(*method),
        _ => None,
    });
    assert_eq!(used, Some(expected));
    assert!(!mounted.events.iter().any(|event| matches!(event, Event::NotStackable { .. })));
}

/// Mounts two overlays on the tree, one after the other. The first overlay is read-only, beside an
/// extension, as systemd-sysext mounts. The second overlay has an upper layer, as container runtimes mount.
fn assert_stacks(mounted: Mounted, disk: &Path) -> Result<(), Error> {
    let place = disk.join("stacked");
    let _ = fs::remove_dir_all(&place);
    for directory in ["extension", "upper", "work"] {
        fs::create_dir_all(place.join(directory))?;
    }
    fs::write(place.join("extension/tool"), "tool")?;
    let path = |name: &str| place.join(name).display().to_string();
    let root = Path::new("/stacked");
    fs::create_dir_all(root)?;
    let lower = format!("lowerdir={}:{TREE}", path("extension"));
    let with_upper = format!("lowerdir={TREE},upperdir={},workdir={}", path("upper"), path("work"));
    let content = fs::read(Path::new(TREE).join("data/70000"))?;
    for (options, name) in [(lower, "tool"), (with_upper, "new")] {
        let text = CString::new(options.as_str())?;
        mount("overlay", root, "overlay", MountFlags::empty(), text.as_c_str())
            .context(|| format!("cannot stack an overlay with {options}"))?;
        if name == "new" {
            fs::write(root.join("new"), "tool")?;
        }
        assert_eq!(fs::read_to_string(root.join(name))?, "tool");
        assert_eq!(fs::read(root.join("data/70000"))?, content);
        unmount(root, UnmountFlags::empty())?;
    }
    mounted.unmount()
}
