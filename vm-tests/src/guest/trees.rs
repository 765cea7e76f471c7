//! Checks that the mounted tree of both formats matches the manifest, with every kind of mount.

use super::fixtures::{self, Fixture, V1, V2};
use super::machines::STANDARD;
use super::mounted::{self, TREE, Traces, is_failure};
use super::probe;
use crate::Error;
use crate::scenario::{Guest, Scenario};
use rustix::io::Errno;
use sealmount::{MemoryKind, MountOptions, Operation, UpperLayer};
use std::fs;
use std::path::{Path, PathBuf};
use test_support::manifest::{
    ROOT, Root, assert_has_hard_link, assert_is_manifest_mapped, assert_root_is,
};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "tree_without_copy_mounts_as_manifest",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| each_way(guest, None),
    },
    Scenario {
        name: "tree_from_memfd_mounts_as_manifest",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| each_way(guest, Some(MemoryKind::Memfd)),
    },
    Scenario {
        name: "tree_from_ramfs_mounts_as_manifest",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| each_way(guest, Some(MemoryKind::Ramfs)),
    },
];

const FIRST_ID: u32 = 100_000;

/// Mounts both formats in four ways: without options, with an upper layer, with an idmap, and with
/// both.
fn each_way(guest: &mut Guest, copy: Option<MemoryKind>) -> Result<(), Error> {
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
                assert_idmap_rejected(fixture, &options, &disk)?;
                continue;
            }
            assert_is_manifest(fixture, &options, &disk)?;
            if upper {
                assert_upper_layer_changes(fixture, &options, &disk)?;
                // The changes must be in the upper layer only.
                assert_is_manifest(fixture, &options, &disk)?;
            }
        }
    }
    assert_root_attributes(&disk, copy, can_idmap.then(|| user_namespace.path()))
}

/// Checks the error of Linux < 5.19, which rejects an idmap of EROFS.
fn assert_idmap_rejected(
    fixture: &Fixture,
    options: &MountOptions,
    disk: &Path,
) -> Result<(), Error> {
    let before = Traces::now()?;
    match mounted::mount(options, &fixture.image_in(disk))? {
        Err(error) if is_failure(&error, Operation::IdmapMount, Errno::INVAL) => {}
        other => {
            return Err(format!("a mount with an unsupported idmap returned {other:?}").into());
        }
    }
    before.assert_same_now()
}

fn assert_is_manifest(fixture: &Fixture, options: &MountOptions, disk: &Path) -> Result<(), Error> {
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

/// Checks that the tree matches the manifest, and that changes go to upperdir.
fn assert_upper_layer_changes(
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
    options.overlay.upper = Some(UpperLayer::new(&upperdir, workdir));
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
    assert_eq!(
        fs::read_dir(&upperdir)?.count(),
        2,
        "upperdir must contain the file and a whiteout"
    );
    mounted.unmount()
}

/// Checks the root directory of an image with unusual attributes. If whiteouts hide the objects,
/// overlayfs shows the root directory of the layer with the whiteouts.
fn assert_root_attributes(
    disk: &Path,
    copy: Option<MemoryKind>,
    user_namespace: Option<PathBuf>,
) -> Result<(), Error> {
    let root = Root { mode: 0o41753, uid: 1001, gid: 1002, mtime: 1_234_567_890 };
    let mut image = fs::read(V2.image_in(disk))?;
    // The root inode is the first inode. An extended inode holds all attributes.
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
