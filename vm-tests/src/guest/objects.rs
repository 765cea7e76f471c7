//! Checks objects without fs-verity: with `verity`, sealmount rejects them before it mounts anything.

use super::fixtures::{self, V1, V2};
use super::machines::STANDARD;
use super::mounted::{self, Traces, with_copy, with_digest, with_verity};
use super::verity::can_verify;
use crate::Error;
use crate::files::copy_tree;
use crate::scenario::{Guest, Scenario};
use rustix::mount::MountFlags;
use sealmount::{
    Error as MountError, MemoryKind, MountOptions, ObjectVerity, OverlayError, Verity,
    VerityUnavailable,
};
use std::fs;
use std::path::Path;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "objects_without_verity_are_rejected",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: objects_without_verity_are_rejected,
    },
    Scenario {
        name: "objects_partly_without_verity_are_rejected",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: objects_partly_without_verity_are_rejected,
    },
];

fn objects_without_verity_are_rejected(guest: &mut Guest) -> Result<(), Error> {
    let tmpfs = Path::new("/mnt/objects");
    fs::create_dir_all(tmpfs)?;
    rustix::mount::mount("tmpfs", tmpfs, "tmpfs", MountFlags::empty(), None)?;
    let mut places = vec![tmpfs.to_owned(), fixtures::mount_objects(guest, "ext4")?];
    places.push(fixtures::mount_objects(guest, "fat")?);
    for fixture in [&V1, &V2] {
        copy_tree(&fixture.objects_in(Path::new("/")), &fixture.objects_in(tmpfs))?;
        for place in &places {
            let objects = fixture.objects_in(place);
            let image = fixture.image_in(Path::new("/"));
            let none = MountOptions::new(objects.as_path());
            let verity = with_verity(&none, Verity::Require);
            // A digest implies verity.
            let digest = with_digest(&with_copy(&none, MemoryKind::Ramfs), fixture.digest()?);
            for options in [&verity, &with_copy(&verity, MemoryKind::Memfd), &digest] {
                let before = Traces::now()?;
                assert_unsupported(mounted::mount(options, &image)?.err(), &objects);
                before.assert_same_now()?;
            }
        }
    }

    // With verity=try, the library mounts the image and reports the reason.
    let objects = V1.objects_in(&places[1]);
    let options = with_verity(&MountOptions::new(objects), Verity::Try);
    let mounted = mounted::mount(&options, &V1.image_in(Path::new("/")))??;
    let expected = ObjectVerity::UnsupportedByObjects(VerityUnavailable::Unsupported);
    assert_eq!(mounted.verity, Some(expected));
    mounted.assert_shows(&V1);
    mounted.unmount()
}

/// Checks that sealmount samples the second object directory too.
fn objects_partly_without_verity_are_rejected(guest: &mut Guest) -> Result<(), Error> {
    let with = fixtures::mount_objects(guest, "ext4-verity")?;
    if !can_verify(&V1, &with)? {
        return Ok(());
    }
    let copy = with.join("partly");
    V1.copy_with_verity(&with, &copy)?;
    let without = V1.objects_in(&fixtures::mount_objects(guest, "ext4")?);
    let mut options = MountOptions::new(V1.objects_in(&copy));
    options.overlay.objects.push(without.as_path().into());
    options.overlay.verity = Some(Verity::Require);
    let before = Traces::now()?;
    assert_unsupported(mounted::mount(&options, &V1.image_in(&with))?.err(), &without);
    before.assert_same_now()
}

fn assert_unsupported(error: Option<MountError>, objects: &Path) {
    match &error {
        Some(MountError::Overlay(OverlayError::ObjectsVerityUnavailable {
            path,
            reason: VerityUnavailable::Unsupported,
            ..
        })) if path == objects => {}
        _ => panic!("{error:?}"),
    }
    let hint = error.and_then(|error| error.hint());
    assert!(hint.is_some_and(|hint| hint.for_options().contains("-O verity")), "{hint:?}");
}
