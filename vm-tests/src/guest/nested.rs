//! Images and objects on an overlayfs, as in a container in a container, or on a live system. The kernel
//! stacks at most two overlays: the composefs mount, and an overlay below the mount.

use super::fixtures::{self, V1, V2};
use super::machines::STANDARD;
use super::mounted::{self, MEMORIES, TREE, Traces, with_copy, with_verity};
use super::probe;
use super::verity::{can_verify, contents};
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sealmount::{
    Error as MountError, Event, Image, Method, MountOptions, ObjectVerity, OverlayError,
    SourceMethod, Verity, VerityUnavailable,
};
use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "nested_image_and_objects_mount",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: nested_image_and_objects_mount,
    },
    Scenario {
        name: "nested_twice_is_rejected",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: nested_twice_is_rejected,
    },
    Scenario {
        name: "nested_objects_with_verity_are_rejected",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: nested_objects_with_verity_are_rejected,
    },
];

/// Mounts an overlay on `lower`, with an upper layer in memory. Returns its root directory.
fn overlay_on(lower: &Path, name: &str) -> Result<PathBuf, Error> {
    let place = Path::new("/mnt/nested").join(name);
    fs::create_dir_all(&place)?;
    mount("tmpfs", &place, "tmpfs", MountFlags::empty(), None)?;
    let directory = |name: &str| {
        let path = place.join(name);
        fs::create_dir(&path).map(|()| path.display().to_string())
    };
    let (upper, work, root) = (directory("upper")?, directory("work")?, directory("root")?);
    let options = format!("lowerdir={},upperdir={upper},workdir={work}", lower.display());
    overlay(&options, Path::new(&root))?;
    Ok(root.into())
}

fn overlay(options: &str, root: &Path) -> Result<(), Error> {
    let data = CString::new(options)?;
    mount("overlay", root, "overlay", MountFlags::empty(), Some(data.as_c_str()))
        .context(|| format!("cannot mount an overlay with {options}"))
}

/// EROFS does not mount a file of an overlayfs directly, so the image needs a loop device. A copy has the
/// newest method of the kernel, and no trial overlay: with objects on an overlayfs, no method allows another
/// overlay.
fn nested_image_and_objects_mount(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let nested = overlay_on(&disk, "once")?;
    let best = probe::padded(&V1.image_in(&disk), probe::newest_source)?;
    for fixture in [&V1, &V2] {
        let image = fixture.image_in(&nested);
        let options = MountOptions::new(fixture.objects_in(&nested));
        let [memfd, ramfs] = MEMORIES.map(|memory| with_copy(&options, memory));
        for (options, expected) in
            [(options, SourceMethod::LoopDevice), (memfd, SourceMethod::LoopDevice), (ramfs, best)]
        {
            let before = Traces::now()?;
            let mounted = mounted::mount(&options, &image)??;
            let used = mounted.events.iter().find_map(|event| match event {
                Event::MethodUsed { method: Method::Source(method), .. } => Some(*method),
                _ => None,
            });
            assert_eq!(used, Some(expected));
            mounted.assert_shows(fixture);
            mounted.unmount()?;
            before.assert_same_now()?;
        }
    }
    Ok(())
}

/// The overlayfs of the image does not count as a level, because the image is behind a loop device or copied.
fn nested_twice_is_rejected(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let twice = overlay_on(&overlay_on(&disk, "first")?, "second")?;
    let below = MountOptions::new(V1.objects_in(&disk));
    for options in [&below, &with_copy(&below, MEMORIES[1])] {
        let mounted = mounted::mount(options, &V1.image_in(&twice))??;
        mounted.assert_shows(&V1);
        mounted.unmount()?;
    }

    let objects = V1.objects_in(&twice);
    let options = MountOptions::new(objects.as_path());
    let [memfd, ramfs] = MEMORIES.map(|memory| with_copy(&options, memory));
    for options in [&options, &memfd, &ramfs] {
        let before = Traces::now()?;
        match mounted::mount(options, &V1.image_in(&disk))?.err() {
            Some(MountError::Overlay(error @ OverlayError::ObjectsOnOverlay { .. })) => {
                assert_eq!(error.raw_os_error(), Some(Errno::INVAL.raw_os_error()));
                let message = error.to_string();
                assert!(message.starts_with(&objects.display().to_string()), "{message}");
                let hint = error.hint().map(|hint| hint.to_string());
                assert!(hint.is_some_and(|hint| hint.contains("not on an overlayfs")));
            }
            other => return Err(format!("{options:?}: {other:?}").into()),
        }
        before.assert_same_now()?;
    }
    Ok(())
}

/// The files of an overlayfs have no fs-verity, even if the files below have fs-verity. The kernel mounts
/// with `verity=require` and fails every read. sealmount rejects the objects before the mount.
fn nested_objects_with_verity_are_rejected(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    if !can_verify(&V1, &disk)? {
        return Ok(());
    }
    let place = disk.join("nested");
    V1.copy_with_verity(&disk, &place)?;
    let nested = overlay_on(&place, "verity")?;
    let (image, objects) = (V1.image_in(&nested), V1.objects_in(&nested));
    let options = MountOptions::new(objects.as_path());
    match mounted::mount(&with_verity(&options, Verity::Require), &image)?.err() {
        Some(MountError::Overlay(OverlayError::ObjectsVerityUnavailable {
            path,
            reason: VerityUnavailable::Unsupported,
            ..
        })) if path == objects => {}
        other => return Err(format!("{other:?}").into()),
    }
    let mounted = mounted::mount(&with_verity(&options, Verity::Try), &image)??;
    let expected = ObjectVerity::UnsupportedByObjects(VerityUnavailable::Unsupported);
    assert_eq!(mounted.verity, Some(expected));
    mounted.assert_shows(&V1);
    mounted.unmount()?;

    if probe::overlayfs()?.verity {
        let erofs = Path::new("/mnt/nested/erofs");
        fs::create_dir_all(erofs)?;
        let mounted = Image::open(&image)?.trust()?.mount()?;
        mounted.into_detached().attach(erofs)?;
        let layers = format!("lowerdir={}::{}", erofs.display(), objects.display());
        overlay(&format!("{layers},metacopy=on,redirect_dir=on,verity=require"), Path::new(TREE))?;
        let failed = contents()?.into_values().filter(|content| *content == Err(Errno::IO)).count();
        assert!(failed > 0, "the kernel reads objects on an overlayfs with verity=require");
        unmount(TREE, UnmountFlags::empty())?;
    }
    Ok(())
}
