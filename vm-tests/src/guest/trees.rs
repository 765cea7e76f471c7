//! That the tree of both formats is the manifest's, however it is mounted.

use super::fixtures::{self, Fixture, V1, V2};
use super::machines::STANDARD;
use super::mounted::{self, TREE, Traces};
use super::probe;
use crate::Error;
use crate::scenario::{Guest, Scenario};
use sealmount::{Errno, Memory, MountOptions, Operation, UpperLayer};
use std::fs;
use std::path::{Path, PathBuf};
use test_support::manifest::{
    ROOT, Root, assert_has_hard_link, assert_is_manifest_mapped, assert_root_is,
};

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

const FIRST_ID: u32 = 100_000;

/// Both formats: as they are, with an upper layer, with an idmap, with both.
fn each_way(guest: &mut Guest, copy: Option<Memory>) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let user_namespace = fixtures::user_namespace(FIRST_ID)?;
    let can_idmap = probe::idmap(&V1.image_in(&disk), &user_namespace.path())?;
    for fixture in [&V1, &V2] {
        for (upper, idmap) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut options = MountOptions::new(fixture.objects_in(&disk));
            options.copy = copy;
            options.idmap = idmap.then(|| user_namespace.path().into());
            println!("{} upper={upper} idmap={idmap}", fixture.name);
            if idmap && !can_idmap {
                idmap_is_refused(fixture, &options, &disk)?;
                continue;
            }
            is_manifest(fixture, &options, &disk)?;
            if upper {
                is_changed_in_upper_layer(fixture, &options, &disk)?;
                // All that was changed was the upper layer.
                is_manifest(fixture, &options, &disk)?;
            }
        }
    }
    root_is_the_images(&disk, copy, can_idmap.then(|| user_namespace.path()))
}

/// Before 5.19.
fn idmap_is_refused(fixture: &Fixture, options: &MountOptions, disk: &Path) -> Result<(), Error> {
    let before = Traces::now()?;
    match mounted::mount(options, &fixture.image_in(disk))? {
        Err(sealmount::Error::Kernel(error))
            if (error.operation, error.errno) == (Operation::IdmapMount, Errno::INVAL) => {}
        other => return Err(format!("idmap, which this kernel has not: {other:?}").into()),
    }
    before.assert_same_now()
}

fn is_manifest(fixture: &Fixture, options: &MountOptions, disk: &Path) -> Result<(), Error> {
    let mounted = mounted::mount(options, &fixture.image_in(disk))??;
    match options.idmap {
        None => mounted.assert_shows(fixture),
        Some(_) => {
            assert_is_manifest_mapped(Path::new(TREE), FIRST_ID);
            assert_root_is(Path::new(TREE), mapped(ROOT));
        }
    }
    mounted.unmount()
}

/// The tree is the manifest's until it is changed, and then the changes are in upperdir.
fn is_changed_in_upper_layer(
    fixture: &Fixture,
    options: &MountOptions,
    disk: &Path,
) -> Result<(), Error> {
    let (upperdir, workdir) = (disk.join("upper"), disk.join("work"));
    for directory in [&upperdir, &workdir] {
        let _ = fs::remove_dir_all(directory);
        fs::create_dir(directory)?;
    }
    let mut options = options.clone();
    options.upper =
        Some(UpperLayer { upperdir: upperdir.as_path().into(), workdir: workdir.into() });
    let mounted = mounted::mount(&options, &fixture.image_in(disk))??;
    let tree = Path::new(TREE);
    assert_is_manifest_mapped(tree, if options.idmap.is_some() { FIRST_ID } else { 0 });
    if fixture.name == V2.name {
        assert_has_hard_link(tree);
    }
    fs::write(tree.join("new"), "new")?;
    fs::remove_file(tree.join("hello.txt"))?;
    assert_eq!(fs::read_to_string(upperdir.join("new"))?, "new");
    assert!(!fs::exists(tree.join("hello.txt"))?);
    assert_eq!(fs::read_dir(&upperdir)?.count(), 2, "the file and a whiteout");
    mounted.unmount()
}

/// Attributes that no directory has by chance. Where objects are hidden by whiteouts the root that
/// is seen is that of the layer with the whiteouts.
fn root_is_the_images(
    disk: &Path,
    copy: Option<Memory>,
    user_namespace: Option<PathBuf>,
) -> Result<(), Error> {
    let root = Root { mode: 0o41753, uid: 1001, gid: 1002, mtime: 1_234_567_890 };
    let mut image = fs::read(V2.image_in(disk))?;
    // An extended inode, which has all of them. It is the first one, after superblock and header.
    let inode = &mut image[1152..];
    assert_eq!((inode[0] & 1, &inode[4..6]), (1, &0o40755u16.to_le_bytes()[..]));
    inode[4..6].copy_from_slice(&(root.mode as u16).to_le_bytes());
    inode[24..28].copy_from_slice(&root.uid.to_le_bytes());
    inode[28..32].copy_from_slice(&root.gid.to_le_bytes());
    inode[32..40].copy_from_slice(&root.mtime.to_le_bytes());
    let path = disk.join("other-root.cfs");
    fs::write(&path, image)?;

    let mut options = MountOptions::new(V2.objects_in(disk));
    options.copy = copy;
    let idmapped = user_namespace.map(|path| (Some(path.into()), mapped(root)));
    for (idmap, expected) in [(None, root)].into_iter().chain(idmapped) {
        options.idmap = idmap;
        let mounted = mounted::mount(&options, &path)??;
        assert_root_is(Path::new(TREE), expected);
        mounted.unmount()?;
    }
    Ok(())
}

fn mapped(root: Root) -> Root {
    Root { uid: root.uid + FIRST_ID, gid: root.gid + FIRST_ID, ..root }
}
