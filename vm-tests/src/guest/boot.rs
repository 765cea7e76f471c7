//! The way sealmount is meant to be used: an initramfs mounts the root of the system from an image
//! that it brings, checked against the kernel's command line, goes on in it and gives itself up.
//!
//! [`boot_init`](super::boot_init) is what runs first, as process 1. It leaves notes for the scenarios in [`NOTES`], and
//! ends in vm-init: the one in the composefs root, which is an object, or if there is no root, the
//! one in the initramfs.

use super::fixtures::HELPER;
use super::probe;
use crate::binaries::Binaries;
use crate::files::read;
use crate::host::composefs::{Node, image, object_path};
use crate::machine::{Disk, Format, Machine};
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::mount::MountFlags;
use sealmount::{Algorithm, Digest, compute_digest};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use test_support::mountinfo::{loop_devices, mount_at};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "boot_into_composefs",
        machine: &BOOTS,
        time_limit: Scenario::TIME_LIMIT,
        run: boot_into_composefs,
    },
    Scenario {
        name: "boot_with_wrong_digest",
        machine: &REFUSES,
        time_limit: Scenario::TIME_LIMIT,
        run: boot_with_wrong_digest,
    },
];

static BOOTS: Machine = Machine {
    name: "boot",
    modules: &["virtio_pci", "virtio_blk", "loop", "erofs", "overlay", "ext4"],
    files: |binaries, root| {
        fs::write(root.join(&IMAGE[1..]), self::root(binaries)?.image)?;
        fs::create_dir(root.join("run"))?;
        fs::create_dir(root.join("sysroot"))?;
        binaries.install("sealmount", "mount-composefs", &root.join(&HELPER[1..]))?;
        binaries.install("vm-tests", "boot-init", &root.join("sbin/boot-init"))
    },
    disks: &[Disk {
        name: OBJECTS,
        format: Format::Ext4Verity,
        size_mib: 64,
        fill: |binaries, disk| {
            let root = self::root(binaries)?;
            for content in [root.init, root.data] {
                let digest = compute_digest(Algorithm::Sha256, &content);
                let object = disk.join("objects").join(object_path(&digest));
                fs::create_dir_all(object.parent().ok_or("no directory for an object")?)?;
                fs::write(object, content)?;
            }
            Ok(())
        },
    }],
    command_line: |binaries| Ok(format!("{DIGEST}={}", root(binaries)?.digest)),
    takes_over: Some("/sbin/boot-init"),
    ..Machine::BARE
};

static REFUSES: Machine = Machine {
    name: "boot-wrong-digest",
    command_line: |binaries| {
        let digest = root(binaries)?.digest.to_string();
        let (rest, last) = digest.split_at(digest.len() - 1);
        Ok(format!("{DIGEST}={rest}{}", if last == "0" { "1" } else { "0" }))
    },
    modules: BOOTS.modules,
    files: BOOTS.files,
    disks: BOOTS.disks,
    takes_over: BOOTS.takes_over,
    ..Machine::BARE
};

pub const IMAGE: &str = "/image.cfs";
/// The disk with the objects.
pub const OBJECTS: &str = "boot-objects";
/// The word of the kernel's command line.
pub const DIGEST: &str = "composefs.digest";
/// A file for each thing that happened in the first stage.
pub const NOTES: &str = "/run/boot";
/// Noted where the objects can have no fs-verity.
pub const NO_VERITY: &str = "no_verity";
/// Nearly all of it empty, but copied and hashed like the rest: enough to tell whether the memory
/// of it is given back.
const IMAGE_BLOCKS: usize = 4096;
const IMAGE_KIB: u64 = 4 * IMAGE_BLOCKS as u64;

/// The file system of the machine after its first stage.
struct Root {
    init: Vec<u8>,
    data: Vec<u8>,
    image: Vec<u8>,
    digest: Digest,
}

const DIRECTORIES: [&str; 8] = ["dev", "mnt", "proc", "run", "sbin", "sys", "tmp", "usr"];

fn root(binaries: &Binaries) -> Result<Root, Error> {
    let init = fs::read(binaries.get("vm-tests", "vm-init")?)?;
    let data = data();
    let mut tree = BTreeMap::from([
        (String::new(), Node::Directory),
        (format!("mnt/{OBJECTS}"), Node::Directory),
        ("sbin/init".to_owned(), Node::file(0o755, &init)),
        ("usr/data".to_owned(), Node::file(0o644, &data)),
    ]);
    tree.extend(DIRECTORIES.map(|path| (path.to_owned(), Node::Directory)));
    let image = image(tree, IMAGE_BLOCKS);
    let digest = compute_digest(Algorithm::Sha256, &image);
    Ok(Root { init, data, image, digest })
}

/// No two blocks are equal.
fn data() -> Vec<u8> {
    (0..50_000u32).flat_map(u32::to_le_bytes).collect()
}

/// What the first stage says about something; None if it did not come to that.
fn note(name: &str) -> Option<String> {
    fs::read_to_string(Path::new(NOTES).join(name)).ok()
}

fn number(name: &str) -> Result<u64, Error> {
    let text = note(name).ok_or_else(|| format!("the first stage did not note {name}"))?;
    text.parse().context(|| format!("{name} is {text:?}"))
}

fn boot_into_composefs(guest: &mut Guest) -> Result<(), Error> {
    let has_verity = note(NO_VERITY).is_none();
    let enforced = has_verity && probe::overlayfs()?.verity;
    let why_not = if has_verity { "Linux 6.6" } else { "verity cannot be enforced on " };
    match (note("verity"), note("digest"), note("noverity")) {
        (Some(verity), None, None) if enforced && verity.starts_with("exit status: 0\n") => {}
        // As much was asked for as can be had only after both refusals.
        (Some(verity), Some(digest), Some(noverity))
            if !enforced
                && [&verity, &digest].iter().all(|refusal| {
                    refusal.starts_with("exit status: 32\n") && refusal.contains(why_not)
                })
                && noverity.starts_with("exit status: 0\n") => {}
        other => return Err(format!("the helper's answers in the first stage: {other:?}").into()),
    }

    let root = mount_at(Path::new("/")).ok_or("there is no root in mountinfo")?;
    let has = |option: &str| root.options.iter().any(|other| other == option);
    if root.fs_type != "overlay" || !has("ro") || has("verity=require") != enforced {
        return Err(format!("this is the root: {root:?}").into());
    }
    is_whole()?;
    if has_verity {
        init_is_verified_object(guest)?;
    }
    initramfs_is_gone()
}

/// Of the disk with the objects, every file that the new root has, read anew.
fn is_whole() -> Result<(), Error> {
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let mut names = fs::read_dir("/")?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>, Error>>()?;
    names.sort();
    if names != DIRECTORIES {
        return Err(format!("in the root there are {names:?}").into());
    }
    if fs::read("/usr/data")? != data() {
        return Err("/usr/data has not its content".into());
    }
    match fs::write("/usr/data", "") {
        Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => Ok(()),
        other => Err(format!("writing to the root: {other:?}").into()),
    }
}

fn init_is_verified_object(guest: &Guest) -> Result<(), Error> {
    let exe = fs::read_link("/proc/1/exe")?;
    if exe != Path::new("/sbin/init") {
        return Err(format!("process 1 is {}", exe.display()).into());
    }
    let running = compute_digest(Algorithm::Sha256, &fs::read("/proc/1/exe")?);
    let disk = guest.mount_disk(OBJECTS, Format::Ext4Verity, MountFlags::empty())?;
    let object = File::open(disk.join("objects").join(object_path(&running)))?;
    let measured = sealmount_sys::fsverity::measure(&object)?;
    match measured.digest() == running.as_bytes() {
        true => Ok(()),
        false => Err(format!("process 1 runs {running}, its object is {measured:?}").into()),
    }
}

fn initramfs_is_gone() -> Result<(), Error> {
    if fs::exists(IMAGE)? {
        return Err(format!("{IMAGE} is in the new root").into());
    }
    // Process 1 has kept it open: nothing but the empty mount point of the root is left in it.
    let old_root = format!("/proc/1/fd/{}", number("old_root")?);
    let left = fs::read_dir(&old_root).context(|| old_root)?;
    let left: Vec<_> = left.map(|entry| Ok(entry?.file_name())).collect::<Result<_, Error>>()?;
    if left != ["sysroot"] {
        return Err(format!("left of the initramfs: {left:?}").into());
    }
    let (before, after) = (number("cached_kib.mounted")?, number("cached_kib.emptied")?);
    println!("memory of files: {before} KiB with the initramfs, {after} KiB without");
    if after + IMAGE_KIB > before {
        return Err(format!(
            "of {before} KiB, emptying the initramfs left {after}, its image alone had {IMAGE_KIB}"
        )
        .into());
    }
    let backing = loop_devices("");
    match backing.iter().all(|name| name.contains("memfd:sealmount:/image.cfs")) {
        true if backing.len() == 1 => Ok(()),
        _ => Err(format!("loop devices: {backing:?}").into()),
    }
}

fn boot_with_wrong_digest(guest: &mut Guest) -> Result<(), Error> {
    let asked = guest.command_line(DIGEST).ok_or("no digest on the command line")?;
    let found = compute_digest(Algorithm::Sha256, &fs::read(IMAGE)?);
    let message =
        format!("mount.composefs: {IMAGE}: its fs-verity digest is {found}, not {asked}\n  hint: ");
    for name in ["verity", "digest", "noverity"] {
        // The objects are looked at before the image is copied.
        let expected = match note(NO_VERITY) {
            Some(_) if name != "noverity" => "verity cannot be enforced on ",
            _ => &message,
        };
        match note(name) {
            Some(answer)
                if answer.starts_with("exit status: 32\n") && answer.contains(expected) => {}
            other => return Err(format!("with {name}, the helper answered {other:?}").into()),
        }
    }
    match note("no_root") {
        Some(why) if why.contains("mount.composefs") => {}
        other => return Err(format!("the first stage ended with {other:?}").into()),
    }
    let exe = fs::read_link("/proc/1/exe")?;
    if exe != Path::new("/init") {
        return Err(format!("process 1 is {}", exe.display()).into());
    }
    let mounts = read("/proc/self/mountinfo")?;
    match (mounts.contains("sysroot"), loop_devices("").as_slice()) {
        (false, []) => Ok(()),
        left => Err(format!("left of the attempts: {left:?}, {mounts}").into()),
    }
}
