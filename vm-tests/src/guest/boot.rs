//! Tests the main use of sealmount: an initramfs holds an image and mounts it as the root of the
//! system. The kernel command line contains the digest. Then the initramfs switches to the new root and
//! frees its memory.
//!
//! [`boot_init`](super::boot_init) runs first, as process 1, and leaves notes for the scenarios in
//! [`NOTES`]. Then `boot_init` executes vm-init: an object of the composefs root or, without a root,
//! the file in the initramfs.

use super::fixtures::{self, HELPER};
use super::probe;
use crate::binaries::Binaries;
use crate::files::read;
use crate::machine::{Disk, Format, Machine, Tier};
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::mount::MountFlags;
use sealmount::{Algorithm, Digest};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use test_support::composefs::{Node, image, object_path};
use test_support::mountinfo::{loop_devices, mount_at};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "boot_with_right_digest_mounts_root",
        machine: &BOOTS,
        time_limit: Scenario::TIME_LIMIT,
        run: boot_with_right_digest_mounts_root,
    },
    Scenario {
        name: "boot_with_wrong_digest_is_rejected",
        machine: &WRONG_DIGEST,
        time_limit: Scenario::TIME_LIMIT,
        run: boot_with_wrong_digest_is_rejected,
    },
];

pub static BOOTS: Machine = Machine {
    name: "boot",
    modules: &["virtio_pci", "virtio_blk", "loop", "erofs", "overlay", "ext4"],
    files: |binaries, initramfs| root(binaries)?.fill_initramfs(binaries, initramfs),
    disks: &[
        Disk {
            name: OBJECTS,
            format: Format::Ext4Verity,
            size_mib: 64,
            fill: |binaries, disk| root(binaries)?.fill_disk(disk),
        },
        // A disk for other scenarios that run after the boot.
        Disk { name: AFTER_BOOT, format: Format::Ext4, size_mib: 64, fill: fixtures::fill },
    ],
    command_line: |binaries| Ok(format!("{DIGEST}={}", root(binaries)?.digest)),
    takes_over: Some("/sbin/boot-init"),
    on_faulty_kernels: true,
    on_large_pages: true,
    ..Machine::BARE
};

static WRONG_DIGEST: Machine = Machine {
    name: "boot-wrong-digest",
    tier: Tier::Ends,
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
/// The name of the disk with the objects.
pub const OBJECTS: &str = "boot-objects";
/// The name of the disk with the bundled images. The root of the system does not use this disk.
pub const AFTER_BOOT: &str = "after-boot";
/// The word on the kernel command line that contains the digest.
pub const DIGEST: &str = "composefs.digest";
/// The directory of the notes, one file for each event of the first stage.
pub const NOTES: &str = "/run/boot";
/// The name of the note that the kernel cannot enable fs-verity on the objects.
pub const NO_VERITY: &str = "no_verity";
/// The message of the helper on a kernel without fs-verity, after the path of the object directory.
const NO_FS_VERITY: &str =
    ": cannot enforce verity: the kernel or the file system does not support fs-verity";
/// sealmount copies and hashes the empty blocks too. So the image is large enough to show whether its
/// memory is freed.
const IMAGE_BLOCKS: usize = 4096;
const IMAGE_KIB: u64 = 4 * IMAGE_BLOCKS as u64;

/// The file system of the machine after its first stage.
pub struct Root {
    objects: Vec<Vec<u8>>,
    pub image: Vec<u8>,
    pub digest: Digest,
}

const DIRECTORIES: [&str; 8] = ["dev", "mnt", "proc", "run", "sbin", "sys", "tmp", "usr"];

fn root(binaries: &Binaries) -> Result<Root, Error> {
    Root::new(binaries, vec![("usr/data".to_owned(), 0o644, data())], &[])
}

impl Root {
    /// Makes a root with vm-init, these files (path, mode and content), and these directories.
    pub fn new(
        binaries: &Binaries,
        mut files: Vec<(String, u16, Vec<u8>)>,
        more: &[&str],
    ) -> Result<Root, Error> {
        let init = fs::read(binaries.get("vm-tests", "vm-init")?)?;
        files.push(("sbin/init".to_owned(), 0o755, init));
        let directories = ["", &format!("mnt/{OBJECTS}"), &format!("mnt/{AFTER_BOOT}")]
            .map(|path| (path.to_owned(), Node::Directory));
        let mut tree = BTreeMap::from(directories);
        let all = DIRECTORIES.iter().chain(more);
        tree.extend(all.map(|path| (path.to_string(), Node::Directory)));
        for (path, mode, content) in &files {
            let parents = Path::new(path).ancestors().skip(1);
            tree.extend(parents.map(|path| (path.display().to_string(), Node::Directory)));
            tree.insert(path.clone(), Node::file(*mode, content));
        }
        let image = image(tree, IMAGE_BLOCKS);
        let digest = Digest::of_bytes(Algorithm::Sha256, &image);
        let objects = files.into_iter().map(|(_, _, content)| content).collect();
        Ok(Root { objects, image, digest })
    }

    /// Fills an initramfs with the image and the first stage.
    pub fn fill_initramfs(&self, binaries: &Binaries, initramfs: &Path) -> Result<(), Error> {
        fs::write(initramfs.join(&IMAGE[1..]), &self.image)?;
        fs::create_dir(initramfs.join("run"))?;
        fs::create_dir(initramfs.join("sysroot"))?;
        binaries.install("sealmount", "mount-composefs", &initramfs.join(&HELPER[1..]))?;
        binaries.install("vm-tests", "boot-init", &initramfs.join("sbin/boot-init"))
    }

    /// Fills a disk with the objects.
    pub fn fill_disk(&self, disk: &Path) -> Result<(), Error> {
        self.fill_objects(&disk.join("objects"))
    }

    /// Fills an object directory.
    pub fn fill_objects(&self, objects: &Path) -> Result<(), Error> {
        for content in &self.objects {
            let digest = Digest::of_bytes(Algorithm::Sha256, content);
            let object = objects.join(object_path(&digest));
            fs::create_dir_all(object.parent().ok_or("the path of an object has no directory")?)?;
            fs::write(object, content)?;
        }
        Ok(())
    }
}

/// Returns content without two equal blocks.
pub fn data() -> Vec<u8> {
    (0..50_000u32).flat_map(u32::to_le_bytes).collect()
}

/// Returns a note of the first stage, or `None` if the stage did not write it.
pub fn note(name: &str) -> Option<String> {
    fs::read_to_string(Path::new(NOTES).join(name)).ok()
}

fn number(name: &str) -> Result<u64, Error> {
    let text =
        note(name).ok_or_else(|| format!("the first stage did not write the note {name}"))?;
    text.parse().context(|| format!("{name} is {text:?}"))
}

fn boot_with_right_digest_mounts_root(guest: &mut Guest) -> Result<(), Error> {
    let has_verity = note(NO_VERITY).is_none();
    let enforced = has_verity && probe::overlayfs()?.verity;
    let why_not = match has_verity {
        true => "overlayfs: cannot enforce verity: verity=require needs Linux 6.6",
        false => NO_FS_VERITY,
    };
    match (note("verity"), note("digest"), note("noverity")) {
        (Some(verity), None, None) if enforced && verity.starts_with("exit status: 0\n") => {}
        // The first stage mounts without verity only after both errors.
        (Some(verity), Some(digest), Some(noverity))
            if !enforced
                && [&verity, &digest].iter().all(|result| {
                    result.starts_with("exit status: 32\n") && result.contains(why_not)
                })
                && noverity.starts_with("exit status: 0\n") => {}
        other => {
            return Err(format!("the helper's results in the first stage are {other:?}").into());
        }
    }

    let root = mount_at(Path::new("/")).ok_or("mountinfo has no root")?;
    let has = |option: &str| root.options.iter().any(|other| other == option);
    if root.fs_type != "overlay" || !has("ro") || has("verity=require") != enforced {
        return Err(format!("the root has the wrong type or options: {root:?}").into());
    }
    assert_root_is_whole()?;
    if has_verity {
        init_is_verified_object(guest)?;
    }
    initramfs_is_gone()
}

/// Checks every file of the new root after dropping the caches, so the kernel reads the disk again.
fn assert_root_is_whole() -> Result<(), Error> {
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let mut names = fs::read_dir("/")?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>, Error>>()?;
    names.sort();
    if names != DIRECTORIES {
        return Err(format!("the root contains {names:?}").into());
    }
    if fs::read("/usr/data")? != data() {
        return Err("/usr/data has the wrong content".into());
    }
    match fs::write("/usr/data", "") {
        Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => Ok(()),
        other => Err(format!("a write to the root returned {other:?}").into()),
    }
}

fn init_is_verified_object(guest: &Guest) -> Result<(), Error> {
    let exe = fs::read_link("/proc/1/exe")?;
    if exe != Path::new("/sbin/init") {
        return Err(format!("process 1 is {}", exe.display()).into());
    }
    let running = Digest::of_bytes(Algorithm::Sha256, &fs::read("/proc/1/exe")?);
    let disk = guest.mount_disk(OBJECTS, Format::Ext4Verity, MountFlags::empty())?;
    let object = File::open(disk.join("objects").join(object_path(&running)))?;
    let measured = sealmount_sys::fsverity::measure(&object)?;
    match measured.digest() == running.as_bytes() {
        true => Ok(()),
        false => {
            Err(format!("process 1 runs {running}, but its object has the digest {measured:?}")
                .into())
        }
    }
}

fn initramfs_is_gone() -> Result<(), Error> {
    if fs::exists(IMAGE)? {
        return Err(format!("{IMAGE} is in the new root").into());
    }
    // Process 1 keeps the root of the initramfs open. Only the empty mount point of the new root must
    // be left.
    let old_root = format!("/proc/1/fd/{}", number("old_root")?);
    let left = fs::read_dir(&old_root).context(|| old_root)?;
    let left: Vec<_> = left.map(|entry| Ok(entry?.file_name())).collect::<Result<_, Error>>()?;
    if left != ["sysroot"] {
        return Err(format!("the initramfs still contains {left:?}").into());
    }
    let (before, after) = (number("cached_kib.mounted")?, number("cached_kib.emptied")?);
    println!("page cache: {before} KiB with the initramfs, {after} KiB without");
    if after + IMAGE_KIB > before {
        return Err(format!(
            "the cache shrank only from {before} KiB to {after} KiB, but the image has {IMAGE_KIB} KiB"
        )
        .into());
    }
    let backing = loop_devices("");
    match backing.iter().all(|name| name.contains("memfd:sealmount:/image.cfs")) {
        true if backing.len() == 1 => Ok(()),
        _ => Err(format!("the loop devices have the wrong backing files: {backing:?}").into()),
    }
}

fn boot_with_wrong_digest_is_rejected(guest: &mut Guest) -> Result<(), Error> {
    let requested = guest.command_line(DIGEST).ok_or("the kernel command line has no digest")?;
    let found = Digest::of_bytes(Algorithm::Sha256, &fs::read(IMAGE)?);
    let message = format!(
        "mount.composefs: {IMAGE}: cannot verify the image: its fs-verity digest is {found}, expected \
         {requested}\n  hint: "
    );
    for name in ["verity", "digest", "noverity"] {
        // sealmount samples the objects before it copies the image, so that error comes first.
        let expected = match note(NO_VERITY) {
            Some(_) if name != "noverity" => NO_FS_VERITY,
            _ => &message,
        };
        match note(name) {
            Some(answer)
                if answer.starts_with("exit status: 32\n") && answer.contains(expected) => {}
            other => return Err(format!("with {name}, the helper returned {other:?}").into()),
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
        left => Err(format!("mounts or loop devices are left: {left:?}, {mounts}").into()),
    }
}
