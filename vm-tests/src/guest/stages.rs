//! Runs the stages of a mount one by one: clones of an EROFS share its superblock. A finished mount is
//! cloned, passed on and attached beneath another mount.

use super::boot::{AFTER_BOOT, BOOTS};
use super::fixtures::{self, UserNamespace, V1};
use super::machines::STANDARD;
use super::mounted::{MEMORIES, Traces, is_failure};
use super::probe;
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::fs::{AtFlags, Mode, OFlags, fstat, open, statat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sealmount::{
    CopyOptions, DetachedMount, ErofsMount, ErrorKind, Image, MemoryKind, MountOptions, Operation,
    OverlayOptions, Source, SourceMethod, UpperLayer,
};
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use test_support::manifest::{assert_is_manifest, assert_is_manifest_mapped};
use test_support::mountinfo::{loop_devices, mount_at};

/// Most scenarios run in an initramfs, whose rootfs pivot_root(2) cannot leave, and in the root of a
/// booted system.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "shared_superblock_serves_overlays",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| serves_overlays(guest, "ext4"),
    },
    Scenario {
        name: "shared_superblock_serves_overlays_after_boot",
        machine: &BOOTS,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| serves_overlays(guest, AFTER_BOOT),
    },
    Scenario {
        name: "shared_superblock_keeps_no_disk_busy",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| keeps_no_disk_busy(guest, "ext4"),
    },
    Scenario {
        name: "shared_superblock_keeps_no_disk_busy_after_boot",
        machine: &BOOTS,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| keeps_no_disk_busy(guest, AFTER_BOOT),
    },
    Scenario {
        name: "killed_clones_leave_nothing",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| killed_clones_leave_nothing(guest, "ext4"),
    },
    Scenario {
        name: "killed_clones_leave_nothing_after_boot",
        machine: &BOOTS,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| killed_clones_leave_nothing(guest, AFTER_BOOT),
    },
    Scenario {
        name: "detached_clone_attaches",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| detached_clone_attaches(guest, "ext4"),
    },
    Scenario {
        name: "detached_clone_attaches_after_boot",
        machine: &BOOTS,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| detached_clone_attaches(guest, AFTER_BOOT),
    },
    Scenario {
        name: "attach_beneath_shows_after_unmount",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: attach_beneath_shows_after_unmount,
    },
];

/// The argument with which vm-init holds clones until it is killed.
pub const HOLD_CLONES: &str = "--hold-clones";

const FIRST_IDS: [u32; 2] = [100_000, 300_000];

/// The directory of the mount points. The root of a booted system is read-only.
const PLACE: &str = "/tmp";

/// The source kinds: the file itself, and both kinds of copies.
const COPIES: [Option<MemoryKind>; 3] = [None, Some(MemoryKind::Memfd), Some(MemoryKind::Ramfs)];

fn source(image: &Path, copy: Option<MemoryKind>) -> Result<Source, Error> {
    let image = Image::open(image)?;
    Ok(match copy {
        None => image.trust()?,
        Some(memory) => image.copy(&CopyOptions::new(memory))?,
    })
}

/// Returns whether the root directory is the rootfs of an initramfs. pivot_root(2) cannot leave it.
fn is_on_rootfs() -> Result<bool, Error> {
    Ok(mount_at(Path::new("/")).ok_or("mountinfo has no root")?.fs_type == "rootfs")
}

/// Returns whether a clone of a mount by this method shares the superblock. One of three conditions
/// must hold:
/// - The kernel clones detached mounts (Linux 6.15).
/// - The method uses a loop device, which leads to the superblock.
/// - The mount can become the root of a private mount namespace.
fn shares_superblock(method: SourceMethod) -> Result<bool, Error> {
    Ok(probe::clones_detached_mounts()? || method == SourceMethod::LoopDevice || !is_on_rootfs()?)
}

/// Counts the superblocks of EROFS in the kernel.
fn erofs_superblocks() -> Result<usize, Error> {
    let entries = fs::read_dir("/sys/fs/erofs").context(|| "/sys/fs/erofs".into())?;
    let names = entries.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>, Error>>()?;
    Ok(names.iter().filter(|name| *name != "features").count())
}

/// The resources before a scenario. The root of a booted system has its own EROFS and loop device.
struct Before {
    traces: Traces,
    superblocks: usize,
    loop_devices: usize,
}

impl Before {
    fn now() -> Result<Before, Error> {
        let (traces, superblocks) = (Traces::now()?, erofs_superblocks()?);
        Ok(Before { traces, superblocks, loop_devices: loop_devices("").len() })
    }

    fn new_superblocks(&self) -> Result<usize, Error> {
        Ok(erofs_superblocks()? - self.superblocks)
    }

    /// Checks that the scenario left no resource in any mount namespace.
    fn assert_same_now(&self) -> Result<(), Error> {
        self.traces.assert_same_now()?;
        let is_same = || Ok(erofs_superblocks()? == self.superblocks);
        eventually("superblocks of EROFS are still in use", is_same)
    }
}

/// Mounts a tmpfs for mount points.
fn make_place() -> Result<&'static Path, Error> {
    mount("place", PLACE, "tmpfs", MountFlags::empty(), None).context(|| PLACE.into())?;
    Ok(Path::new(PLACE))
}

/// Mounts three overlays on one EROFS. Each has another owner of the same files, and its own upper
/// layer.
fn serves_overlays(guest: &mut Guest, disk: &str) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, disk)?;
    let place = make_place()?;
    let image = V1.image_in(&disk);
    let namespaces =
        [fixtures::user_namespace(FIRST_IDS[0])?, fixtures::user_namespace(FIRST_IDS[1])?];
    let namespaces_at = namespaces.each_ref().map(UserNamespace::path);
    let before = Before::now()?;
    for copy in COPIES {
        let source = source(&image, copy)?;
        let erofs = source.mount()?;
        let [one, other] = [&namespaces_at[0], &namespaces_at[1]].map(|path| erofs.idmapped(path));
        let (one, other) = (one?, other?);
        let mounts = [(&erofs, 0), (&one, FIRST_IDS[0]), (&other, FIRST_IDS[1])];
        for (erofs, first_id) in mounts {
            mount_with_upper_layer(&disk, erofs, &place.join(first_id.to_string()))?;
        }
        assert_shared(&before, copy, mounts.map(|(erofs, _)| erofs))?;
        for (_, first_id) in mounts {
            let root = place.join(first_id.to_string());
            assert_is_manifest_mapped(&root, first_id);
            fs::write(root.join("new"), first_id.to_string())?;
            fs::remove_file(root.join("hello.txt"))?;
        }
        for (_, first_id) in mounts {
            let root = place.join(first_id.to_string());
            for new in [root.join("new"), upper_layer(&disk, &root).join("new")] {
                assert_eq!(fs::read_to_string(new)?, first_id.to_string());
            }
            unmount(&root, UnmountFlags::empty())?;
        }

        // The first mount must still attach, and its clones must outlive it.
        let root = place.join("first");
        fs::create_dir_all(&root)?;
        erofs.into_detached().attach(&root)?;
        assert!(root.join("hello.txt").is_file());
        unmount(&root, UnmountFlags::empty())?;
        drop(source);
        mount_with_upper_layer(&disk, &one, &root)?;
        assert_is_manifest_mapped(&root, FIRST_IDS[0]);
        unmount(&root, UnmountFlags::empty())?;
        drop((one, other));
        before.assert_same_now()?;
    }
    Ok(())
}

fn upper_layer(disk: &Path, root: &Path) -> PathBuf {
    disk.join("layers").join(root.file_name().unwrap_or_default()).join("upper")
}

/// Mounts an overlay on a directory, with a new upper layer on the disk.
fn mount_with_upper_layer(disk: &Path, erofs: &ErofsMount, root: &Path) -> Result<(), Error> {
    let upper = upper_layer(disk, root);
    let work = upper.with_file_name("work");
    for directory in [&upper, &work] {
        let _ = fs::remove_dir_all(directory);
        fs::create_dir_all(directory)?;
    }
    fs::create_dir_all(root)?;
    let mut options = OverlayOptions::new(V1.objects_in(disk));
    options.upper = Some(UpperLayer::new(upper, work));
    options.open()?.mount(erofs)?.attach(root)?;
    Ok(())
}

fn assert_shared(
    before: &Before,
    copy: Option<MemoryKind>,
    mounts: [&ErofsMount; 3],
) -> Result<(), Error> {
    let method = mounts[0].report().method;
    let [one, two, three] = mounts.map(|mount| fstat(mount).map(|stat| stat.st_dev));
    let devices = [one?, two?, three?];
    let superblocks = before.new_superblocks()?;
    println!("{copy:?}: {method:?}, {superblocks} superblocks, {devices:?}");
    let loop_devices = loop_devices("").len() - before.loop_devices;
    assert_eq!(loop_devices, usize::from(method == SourceMethod::LoopDevice));
    match shares_superblock(method)? {
        true => assert_eq!((devices, superblocks), ([devices[0]; 3], 1)),
        false => println!("on a rootfs, this kernel cannot clone detached mounts"),
    }
    Ok(())
}

/// A disk must be free after its unmount in this namespace: no namespace of a clone holds the disk.
fn keeps_no_disk_busy(guest: &mut Guest, disk: &str) -> Result<(), Error> {
    for memory in MEMORIES {
        let before = Before::now()?;
        let directory = fixtures::mount_objects(guest, disk)?;
        make_place()?;
        let erofs = source(&V1.image_in(&directory), Some(memory))?.mount()?;
        let clone = erofs.try_clone()?;
        for directory in [Path::new(PLACE), &directory] {
            let what = || format!("{} is still in use", directory.display());
            unmount(directory, UnmountFlags::empty()).context(what)?;
        }
        has_one_user(&guest.disk(disk)?)?;
        for mount in [&erofs, &clone] {
            statat(mount, "hello.txt", AtFlags::empty())?;
        }
        drop((erofs, clone));
        before.assert_same_now()?;
    }
    Ok(())
}

/// Waits until an exclusive open of a block device succeeds, which fails while a file system uses the
/// device.
fn has_one_user(device: &Path) -> Result<(), Error> {
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    // The kernel releases the device shortly after its last use.
    eventually("the device is still in use", || match open(device, flags, Mode::empty()) {
        Ok(_) => Ok(true),
        Err(Errno::BUSY) => Ok(false),
        Err(errno) => Err(errno.into()),
    })
}

/// Waits until a condition holds, for at most five seconds.
fn eventually(otherwise: &str, holds: impl Fn() -> Result<bool, Error>) -> Result<(), Error> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !holds()? {
        if Instant::now() > deadline {
            return Err(otherwise.into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn killed_clones_leave_nothing(guest: &mut Guest, disk: &str) -> Result<(), Error> {
    let before = Before::now()?;
    let directory = fixtures::mount_objects(guest, disk)?;
    let mut process = Command::new("/proc/self/exe")
        .arg(HOLD_CLONES)
        .args([V1.image_in(&directory), V1.objects_in(&directory)])
        .stdout(Stdio::piped())
        .spawn()?;
    let ready =
        process.stdout.as_mut().ok_or("the process has no standard output")?.read_exact(&mut [0]);
    let superblocks = before.new_superblocks()?;
    process.kill()?;
    process.wait()?;
    drop(process);
    ready.context(|| "the process could not make clones".into())?;
    assert!(superblocks >= COPIES.len(), "only {superblocks} superblocks");
    unmount(&directory, UnmountFlags::empty()).context(|| "the disk is still in use".into())?;
    has_one_user(&guest.disk(disk)?)?;
    before.assert_same_now()
}

/// Creates mounts and clones for every kind of source, and holds them until the process is killed.
pub fn hold_clones(image: &Path, objects: &Path) -> Result<(), Error> {
    let overlay = OverlayOptions::new(objects).open()?;
    let mut held = Vec::new();
    for copy in COPIES {
        let erofs = source(image, copy)?.mount()?;
        let clone = erofs.try_clone()?;
        let mount = overlay.mount(&clone)?;
        // On a rootfs, some kernels cannot clone the finished mount.
        let clone_of_mount = mount.try_clone();
        held.push((erofs, clone, mount, clone_of_mount));
    }
    println!();
    loop {
        thread::park();
    }
}

/// If the kernel cannot clone the mount, the mount itself must still attach.
fn detached_clone_attaches(guest: &mut Guest, disk: &str) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, disk)?;
    let place = make_place()?;
    let before = Before::now()?;
    for copy in COPIES {
        let mut options = MountOptions::new(V1.objects_in(&disk));
        options.copy = copy;
        let mount = options.mount(V1.image_in(&disk))?;
        let mut clones = Vec::new();
        match mount.try_clone() {
            Ok(clone) => clones.push(clone),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}"),
        }
        let can_clone = probe::clones_detached_mounts()? || !is_on_rootfs()?;
        assert_eq!(clones.len(), usize::from(can_clone));

        // A mount from a descriptor stands for a mount that another process sent.
        let mount = DetachedMount::from(mount.into_fd()?);
        assert!(mount.report().is_none());
        clones.extend(mount.try_clone().ok());
        assert_eq!(clones.len(), 2 * usize::from(can_clone));
        let device = fstat(&mount)?.st_dev;
        clones.push(mount);
        let roots: Vec<_> = (0..clones.len()).map(|n| place.join(n.to_string())).collect();
        for (mount, root) in clones.into_iter().zip(&roots) {
            assert_eq!(fstat(&mount)?.st_dev, device);
            fs::create_dir_all(root)?;
            mount.attach(root)?;
        }
        for root in roots {
            assert_is_manifest(&root);
            unmount(&root, UnmountFlags::empty())?;
        }
        before.assert_same_now()?;
    }
    Ok(())
}

/// The upper mount is removed while another thread reads the directory.
fn attach_beneath_shows_after_unmount(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    // The kernel cannot attach a mount beneath the root mount of a namespace, such as the rootfs.
    let root = make_place()?.join("root");
    fs::create_dir(&root)?;
    let before = Before::now()?;
    let options = MountOptions::new(V1.objects_in(&disk));
    options.mount(V1.image_in(&disk))?.attach(&root)?;
    let first = fs::metadata(&root)?.dev();
    let second = options.mount(V1.image_in(&disk))?;
    let second_device = fstat(&second)?.st_dev;

    if !probe::attaches_beneath()? {
        let error = second
            .attach_beneath(&root)
            .err()
            .ok_or("attach_beneath succeeded on a kernel without the feature")?;
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.hint().is_some());
        error.into_mount().attach(&root)?;
        assert_eq!(fs::metadata(&root)?.dev(), second_device);
        unmount(&root, UnmountFlags::empty())?;
        assert_eq!(fs::metadata(&root)?.dev(), first);
        unmount(&root, UnmountFlags::empty())?;
        return before.assert_same_now();
    }
    second.attach_beneath(&root)?;
    assert_eq!(fs::metadata(&root)?.dev(), first);
    let is_over = AtomicBool::new(false);
    let looks = thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut looks = 0;
            while !is_over.load(Ordering::Relaxed) {
                assert!(root.join("hello.txt").is_file(), "the directory has no hello.txt");
                looks += 1;
            }
            looks
        });
        thread::sleep(Duration::from_millis(100));
        // The other thread may be using the mount at this moment, so only a lazy unmount works.
        let unmounted = unmount(&root, UnmountFlags::DETACH);
        thread::sleep(Duration::from_millis(100));
        is_over.store(true, Ordering::Relaxed);
        unmounted.map(|()| watcher.join())
    })?;
    println!("the thread read the directory {looks:?} times");
    assert!(looks.is_ok());
    assert_eq!(fs::metadata(&root)?.dev(), second_device);
    assert_is_manifest(&root);

    // A directory that is not a mount point is rejected.
    let third = options.mount(V1.image_in(&disk))?;
    let error = third
        .attach_beneath(root.join("data"))
        .err()
        .ok_or("attach_beneath succeeded on a directory")?;
    assert!(is_failure(&error.into(), Operation::AttachBeneath, Errno::INVAL));
    unmount(&root, UnmountFlags::empty())?;
    assert!(!root.join("hello.txt").exists());
    before.assert_same_now()
}
