//! That the tree of both formats is the manifest's, however it is mounted.

use super::fixtures::{self, Fixture, V1, V2};
use super::manifest::{assert_has_hard_link, assert_is_manifest, assert_is_manifest_mapped};
use super::{Guest, basics::STANDARD};
use crate::scenario::Scenario;
use crate::{Context, Error};
use rustix::mount::{UnmountFlags, unmount};
use sealmount::{Memory, MountOptions, UpperLayer};
use std::fs;
use std::path::Path;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "tree_plain",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| each_way(guest, None),
    },
    Scenario {
        name: "tree_copy",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| each_way(guest, Some(Memory::Memfd)),
    },
    Scenario {
        name: "tree_ramfs",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| each_way(guest, Some(Memory::Ramfs)),
    },
];

/// Both formats: as they are, with an upper layer, with an idmap, with both.
fn each_way(guest: &mut Guest, copy: Option<Memory>) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let user_namespace = fixtures::user_namespace(100_000)?;
    for fixture in [&V1, &V2] {
        for (upper, idmap) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut options = MountOptions::new(fixture.objects_in(&disk));
            options.copy = copy;
            if upper {
                let (upperdir, workdir) = (disk.join("upper"), disk.join("work"));
                for directory in [&upperdir, &workdir] {
                    let _ = fs::remove_dir_all(directory);
                    fs::create_dir(directory)?;
                }
                options.upper =
                    Some(UpperLayer { upperdir: upperdir.into(), workdir: workdir.into() });
            }
            if idmap {
                options.idmap = Some(user_namespace.path().into());
            }
            let case = format!("{} upper={upper} idmap={idmap}", fixture.name);
            println!("{case}");
            is_manifest(fixture, &options, &disk, if idmap { 100_000 } else { 0 })
                .context(|| case)?;
        }
    }
    Ok(())
}

fn is_manifest(
    fixture: &Fixture,
    options: &MountOptions,
    disk: &Path,
    first_id: u32,
) -> Result<(), Error> {
    let mount_point = Path::new("/tree");
    fs::create_dir_all(mount_point)?;
    let print = &mut |step: sealmount::Step| println!("  {step}");
    options.mount_with(fixture.image_in(disk), print)?.attach(mount_point)?;
    match first_id {
        0 => assert_is_manifest(mount_point),
        _ => assert_is_manifest_mapped(mount_point, first_id),
    }
    if fixture.name == V2.name {
        assert_has_hard_link(mount_point);
    }
    if options.upper.is_some() {
        fs::write(mount_point.join("new"), "new")?;
        fs::remove_file(mount_point.join("hello.txt"))?;
    }
    unmount(mount_point, UnmountFlags::empty())?;
    Ok(())
}
