//! Which way the library takes where kernels differ: the best that there is, and none below it
//! without a word.

use super::fixtures::{self, V1};
use super::machines::STANDARD;
use super::mounted::{self, TREE, Traces, with_copy, with_verity};
use super::probe;
use super::verity::can_verify;
use crate::Error;
use crate::files::{copy, copy_tree};
use crate::scenario::{Guest, Scenario};
use rustix::mount::MountFlags;
use sealmount::{
    Errno, Memory, MountOptions, ObjectVerity, Operation, Rung, Step, UpperLayer, Verity,
};
use std::fs;
use std::path::{Path, PathBuf};
use test_support::mountinfo::mount_at;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "rungs_source",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: source,
    },
    Scenario {
        name: "rungs_damaged_image",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: damaged_image,
    },
    Scenario {
        name: "rungs_layers",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: layers,
    },
    Scenario {
        name: "rungs_tryverity",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: tryverity,
    },
    Scenario {
        name: "rungs_paths",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: paths,
    },
];

const SOURCE: &[Rung] = &[Rung::SourceByDescriptor, Rung::SourceByPath, Rung::SourceByLoopDevice];

const LAYERS: &[Rung] = &[
    Rung::LayersByDescriptor,
    Rung::LayersByPath,
    Rung::LayersInOneString,
    Rung::LowerLayersInOneString,
];

/// From any disk the best that the kernel has; from a tmpfs, which the initramfs is too, up to 7.3 a
/// loop device. Of copies, a ramfs is as good as a disk, and a memfd goes to a loop device at once.
fn source(guest: &mut Guest) -> Result<(), Error> {
    let mut places = fixtures::mount_each(guest, &["ext4", "ext4-verity", "btrfs", "fat"])?;
    let disk = places[0].clone();
    let best = probe::best_source(&V1.image_in(&disk))?;
    let options = MountOptions::new(V1.objects_in(&disk));
    places.extend([tmpfs()?, "/".into()]);
    for place in places {
        let image = V1.image_in(&place);
        let expected = probe::best_source(&image)?;
        let mounted = mounted::mount(&options, &image)??;
        assert_eq!(ladder(&mounted.steps, SOURCE), took(SOURCE, expected), "{}", image.display());
        mounted.unmount()?;

        let mounted = mounted::mount(&with_copy(&options, Memory::Ramfs), &image)??;
        assert_eq!(ladder(&mounted.steps, SOURCE), took(SOURCE, best), "{}", image.display());
        mounted.unmount()?;

        let mounted = mounted::mount(&with_copy(&options, Memory::Memfd), &image)??;
        let at_once = (vec![], vec![Rung::SourceByLoopDevice]);
        assert_eq!(ladder(&mounted.steps, SOURCE), at_once, "{}", image.display());
        mounted.unmount()?;
    }
    Ok(())
}

/// One that EROFS refuses is refused, on whatever rung: some answer for a source that they do not
/// take as for an image that they do not understand.
fn damaged_image(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let options = MountOptions::new(V1.objects_in(&disk));
    for place in [disk, tmpfs()?] {
        let mut image = fs::read(V1.image_in(&place))?;
        // An incompatible feature of EROFS that there is not.
        image[1024 + 83] |= 0x80;
        let damaged = place.join("damaged.cfs");
        fs::write(&damaged, image)?;
        for options in [&options, &with_copy(&options, Memory::Ramfs)] {
            let before = Traces::now()?;
            match mounted::mount(options, &damaged)? {
                Err(sealmount::Error::Kernel(error))
                    if error.operation == Operation::CreateSuperblock
                        && error.errno == Errno::INVAL
                        && error.file_system == Some("erofs") => {}
                other => return Err(format!("{}: {other:?}", damaged.display()).into()),
            }
            before.assert_same_now()?;
        }
    }
    Ok(())
}

fn tmpfs() -> Result<PathBuf, Error> {
    let place = Path::new("/mnt/tmpfs");
    fs::create_dir_all(place)?;
    rustix::mount::mount("tmpfs", place, "tmpfs", MountFlags::empty(), None)?;
    copy(&V1.image_in(Path::new("/")), &V1.image_in(place))?;
    Ok(place.into())
}

/// The same with an upper layer as without.
fn layers(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let mut options = MountOptions::new(V1.objects_in(&disk));
    let mounted = mounted::mount(&options, &V1.image_in(&disk))??;
    assert_best_layers(&mounted.steps)?;
    mounted.unmount()?;

    let (upperdir, workdir) = (disk.join("rungs/upper"), disk.join("rungs/work"));
    fs::create_dir_all(&upperdir)?;
    fs::create_dir_all(&workdir)?;
    options.upper = Some(UpperLayer { upperdir: upperdir.into(), workdir: workdir.into() });
    let mounted = mounted::mount(&options, &V1.image_in(&disk))??;
    assert_best_layers(&mounted.steps)?;
    mounted.unmount()
}

/// What is tried for verity=require, and what is done without where the kernel lacks it, is told as
/// one climb down the ladder.
fn tryverity(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    if !can_verify(&V1, &disk)? {
        return Ok(());
    }
    let copy = disk.join("rungs");
    V1.copy_with_verity(&disk, &copy)?;
    let options = with_verity(&MountOptions::new(V1.objects_in(&copy)), Verity::Try);
    let mounted = mounted::mount(&options, &V1.image_in(&disk))??;
    assert_best_layers(&mounted.steps)?;
    let expected = match probe::overlayfs()?.verity {
        true => ObjectVerity::Enforced,
        false => ObjectVerity::UnsupportedByOverlay,
    };
    assert_eq!(mounted.verity, expected);
    mounted.unmount()
}

/// In one string, an object directory whose path would be misunderstood goes by another name. Where
/// layers are given one by one, each is seen by its real path, whatever that is.
fn paths(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let strange = disk.join("rungs/a, b:c\\d");
    copy_tree(&V1.objects_in(&disk), &strange)?;
    for (objects, is_strange) in [(V1.objects_in(&disk), false), (strange, true)] {
        let options = MountOptions::new(objects.as_path());
        let mounted = mounted::mount(&options, &V1.image_in(&disk))??;
        let (_, rung) = ladder(&mounted.steps, LAYERS);
        let one_by_one = rung == [Rung::LayersByDescriptor] || rung == [Rung::LayersByPath];
        let seen = mount_at(Path::new(TREE)).ok_or("not in mountinfo")?;
        let (fs_type, source) = (seen.fs_type.as_str(), Path::new(&seen.source));
        assert_eq!((fs_type, source), ("overlay", V1.image_in(&disk).as_path()));
        let shown = seen.options.iter().any(|option| match option.split_once('=') {
            Some(("datadir+", path)) => one_by_one && Path::new(path) == objects,
            Some(("lowerdir", list)) => {
                !one_by_one && list.split(':').any(|path| Path::new(path) == objects)
            }
            _ => false,
        });
        assert_eq!(shown, one_by_one || !is_strange, "{} in {:?}", objects.display(), seen.options);
        mounted.assert_shows(&V1);
        mounted.unmount()?;
    }
    Ok(())
}

/// The rungs of one ladder that were told of: not taken, and taken.
fn ladder(steps: &[Step], of: &[Rung]) -> (Vec<Rung>, Vec<Rung>) {
    let (mut not_taken, mut taken) = (Vec::new(), Vec::new());
    for step in steps {
        match step {
            Step::NotTaken { rung, .. } if of.contains(rung) => not_taken.push(*rung),
            Step::Taken { rung } if of.contains(rung) => taken.push(*rung),
            _ => {}
        }
    }
    (not_taken, taken)
}

/// What [`ladder`] gives where one was taken after all above it were not.
fn took(ladder: &[Rung], rung: Rung) -> (Vec<Rung>, Vec<Rung>) {
    let above = ladder.iter().copied().take_while(|other| *other != rung);
    (above.collect(), vec![rung])
}

fn assert_best_layers(steps: &[Step]) -> Result<(), Error> {
    let (mut not_taken, taken) = ladder(steps, LAYERS);
    // Whose options are not its own to parse has nothing of what came with its parser: the one
    // answer is that of three rungs.
    let old_parser = steps.iter().any(|step| {
        matches!(step, Step::NotTaken { rung: Rung::LayersByDescriptor, error }
            if error.errno == Errno::OPNOTSUPP)
    });
    if old_parser && not_taken == [Rung::LayersByDescriptor] {
        not_taken = LAYERS[..3].to_vec();
    }
    assert_eq!((not_taken, taken), took(LAYERS, probe::overlayfs()?.layers));
    Ok(())
}
