//! Checks which methods the library uses on each kernel: the newest method that the kernel supports,
//! and an event for each newer one.

use super::fixtures::{self, V1};
use super::machines::STANDARD;
use super::mounted::{self, TREE, Traces, is_failure, with_copy, with_verity};
use super::probe;
use super::verity::can_verify;
use crate::Error;
use crate::files::{copy, copy_tree};
use crate::scenario::{Guest, Scenario};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use sealmount::{
    ErrorKind, Event, LayerMethod, MemoryKind, Method, MountOptions, ObjectVerity, Operation,
    SourceMethod, UpperLayer, Verity,
};
use std::fs;
use std::path::{Path, PathBuf};
use test_support::mountinfo::mount_at;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "fallbacks_use_best_source_method",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: fallbacks_use_best_source_method,
    },
    Scenario {
        name: "fallbacks_reject_damaged_image",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: fallbacks_reject_damaged_image,
    },
    Scenario {
        name: "fallbacks_use_best_layer_method",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: fallbacks_use_best_layer_method,
    },
    Scenario {
        name: "fallbacks_with_tryverity_use_best_layers",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: fallbacks_with_tryverity_use_best_layers,
    },
    Scenario {
        name: "fallbacks_mount_unusual_object_paths",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: fallbacks_mount_unusual_object_paths,
    },
];

const LAYERS: &[LayerMethod] =
    &[LayerMethod::Descriptors, LayerMethod::Paths, LayerMethod::OneString, LayerMethod::LowerOnly];

/// A file on a disk and a copy in a ramfs use the newest method of the kernel. Up to Linux 7.3, a file
/// on a tmpfs or in the initramfs needs a loop device. For a memfd, sealmount tries only the loop
/// device. Linux 7.3 with large pages reads a file on a disk only through a loop device.
fn fallbacks_use_best_source_method(guest: &mut Guest) -> Result<(), Error> {
    let mut places = fixtures::mount_each(guest, &["ext4", "ext4-verity", "btrfs", "fat"])?;
    let disk = places[0].clone();
    let copied = used_last(probe::padded(&V1.image_in(&disk), probe::tried_sources)?);
    let options = MountOptions::new(V1.objects_in(&disk));
    places.extend([tmpfs()?, "/".into()]);
    for place in places {
        let image = V1.image_in(&place);
        let expected = used_last(probe::tried_sources(&image)?);
        for (options, expected) in [
            (options.clone(), expected),
            (with_copy(&options, MemoryKind::Ramfs), copied.clone()),
            (with_copy(&options, MemoryKind::Memfd), (vec![], vec![SourceMethod::LoopDevice])),
        ] {
            let mounted = mounted::mount(&options, &image)??;
            assert_eq!(source_methods(&mounted.events), expected, "{}", image.display());
            mounted.unmount()?;
        }
    }
    Ok(())
}

/// Some kernels return the same errno for an unsupported kind of source and for a damaged image. The
/// damaged image must be rejected even then.
fn fallbacks_reject_damaged_image(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let options = MountOptions::new(V1.objects_in(&disk));
    for place in [disk, tmpfs()?] {
        let mut image = fs::read(V1.image_in(&place))?;
        // EROFS does not know this incompatible feature.
        image[1024 + 83] |= 0x80;
        let damaged = place.join("damaged.cfs");
        fs::write(&damaged, image)?;
        for options in [&options, &with_copy(&options, MemoryKind::Ramfs)] {
            let before = Traces::now()?;
            match mounted::mount(options, &damaged)? {
                Err(error)
                    if error.kind() == ErrorKind::NotAnImage
                        && is_failure(&error, Operation::CreateSuperblock, Errno::INVAL)
                        && error.kernel().is_some_and(|e| e.file_system() == Some("erofs")) => {}
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

/// An upper layer must not change the method.
fn fallbacks_use_best_layer_method(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let mut options = MountOptions::new(V1.objects_in(&disk));
    let mounted = mounted::mount(&options, &V1.image_in(&disk))??;
    assert_best_layers(&mounted.events)?;
    mounted.unmount()?;

    let (upperdir, workdir) = (disk.join("fallbacks/upper"), disk.join("fallbacks/work"));
    fs::create_dir_all(&upperdir)?;
    fs::create_dir_all(&workdir)?;
    options.overlay.upper = Some(UpperLayer::new(upperdir, workdir));
    let mounted = mounted::mount(&options, &V1.image_in(&disk))??;
    assert_best_layers(&mounted.events)?;
    mounted.unmount()
}

/// The events of attempts with and without verity=require form one series of methods.
fn fallbacks_with_tryverity_use_best_layers(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    if !can_verify(&V1, &disk)? {
        return Ok(());
    }
    let copy = disk.join("fallbacks");
    V1.copy_with_verity(&disk, &copy)?;
    let options = with_verity(&MountOptions::new(V1.objects_in(&copy)), Verity::Try);
    let mounted = mounted::mount(&options, &V1.image_in(&disk))??;
    assert_best_layers(&mounted.events)?;
    let expected = match probe::overlayfs()?.verity {
        true => ObjectVerity::Enforced,
        false => ObjectVerity::UnsupportedByOverlay,
    };
    assert_eq!(mounted.verity, Some(expected));
    mounted.unmount()
}

/// With one option for each layer, mountinfo shows the real path of every object directory. In one
/// string, it shows a real path only if overlayfs can parse the path unchanged.
fn fallbacks_mount_unusual_object_paths(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let strange = disk.join("fallbacks/a, b:c\\d");
    copy_tree(&V1.objects_in(&disk), &strange)?;
    for (objects, is_strange) in [(V1.objects_in(&disk), false), (strange, true)] {
        let options = MountOptions::new(objects.as_path());
        let mounted = mounted::mount(&options, &V1.image_in(&disk))??;
        let (_, used) = layer_methods(&mounted.events);
        let one_by_one = used == [LayerMethod::Descriptors] || used == [LayerMethod::Paths];
        let seen = mount_at(Path::new(TREE)).ok_or("mountinfo does not have the mount")?;
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

/// The methods of one kind in the events: first the unsupported methods, then the used ones.
type Attempts<M> = (Vec<M>, Vec<M>);

fn source_methods(events: &[Event]) -> Attempts<SourceMethod> {
    methods(events, |method| match method {
        Method::Source(method) => Some(method),
        _ => None,
    })
}

fn layer_methods(events: &[Event]) -> Attempts<LayerMethod> {
    methods(events, |method| match method {
        Method::Layers(method) => Some(method),
        _ => None,
    })
}

fn methods<M>(events: &[Event], select: impl Fn(Method) -> Option<M>) -> Attempts<M> {
    let (mut unsupported, mut used) = (Vec::new(), Vec::new());
    for event in events {
        match event {
            Event::MethodUnsupported { method, .. } => unsupported.extend(select(*method)),
            Event::MethodUsed { method, .. } => used.extend(select(*method)),
            _ => {}
        }
    }
    (unsupported, used)
}

/// Returns the attempts of which the last one succeeds.
fn used_last<M>(mut methods: Vec<M>) -> Attempts<M> {
    let used = methods.split_off(methods.len().saturating_sub(1));
    (methods, used)
}

/// Returns the attempts that end with `method`, after all methods before it in `list`.
fn attempts<M: Copy + PartialEq>(list: &[M], method: M) -> Attempts<M> {
    let above = list.iter().copied().take_while(|other| *other != method);
    (above.collect(), vec![method])
}

fn assert_best_layers(events: &[Event]) -> Result<(), Error> {
    let (mut unsupported, used) = layer_methods(events);
    // An overlayfs without its own option parser lacks all features of that parser. One error then
    // stands for three methods.
    let old_parser = events.iter().any(|event| {
        matches!(event, Event::MethodUnsupported { method: Method::Layers(LayerMethod::Descriptors), error, .. }
            if error.raw_os_error() == Errno::OPNOTSUPP.raw_os_error())
    });
    if old_parser && unsupported == [LayerMethod::Descriptors] {
        unsupported = LAYERS[..3].to_vec();
    }
    assert_eq!((unsupported, used), attempts(LAYERS, probe::overlayfs()?.layers));
    Ok(())
}
