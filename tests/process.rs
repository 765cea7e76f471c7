//! What a mount leaves in the process that asks for it: nothing. A test binary of its own, with one
//! test: what is compared is that of the whole process.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use sealmount::{Algorithm, Memory, MountOptions, Rung, Step, UpperLayer, compute_digest};
use test_support::sandboxing::{SystemCall, refuse, refuse_argument};
use test_support::{
    V1, V2, assert_is_manifest, large_image, mounts, sandbox, through, umount, user_namespace,
};

/// Whatever a library could disturb in a process, as text.
fn state() -> io::Result<BTreeMap<String, String>> {
    let mut state = BTreeMap::new();
    let mut add = |name: String, value: String| assert!(state.insert(name, value).is_none());
    let link = |path: PathBuf| fs::read_link(path).map(|target| target.display().to_string());
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        add(path.display().to_string(), link(path)?);
    }
    for thread in fs::read_dir("/proc/self/task").unwrap() {
        let thread = thread.unwrap().path();
        for name in ["cwd", "root", "ns/mnt", "ns/user", "ns/pid", "ns/net"] {
            add(format!("{} {name}", thread.display()), link(thread.join(name))?);
        }
        let status = fs::read_to_string(thread.join("status"))?;
        for field in ["Umask", "SigBlk", "SigIgn", "SigCgt", "CapEff", "Uid", "Gid", "Groups"] {
            let line = status.lines().find(|line| line.starts_with(field)).unwrap();
            add(format!("{} {field}", thread.display()), line.into());
        }
        let children = fs::read_to_string(thread.join("children")).unwrap_or_default();
        add(format!("{} children", thread.display()), children);
    }
    add("limits".into(), fs::read_to_string("/proc/self/limits").unwrap());
    add("environment".into(), format!("{:?}", std::env::vars_os().collect::<Vec<_>>()));
    add("mounts".into(), format!("{:?}", mounts()));
    Ok(state)
}

/// The kernel takes a thread out of /proc a moment after it was joined: the state once that is over.
fn settled_state() -> BTreeMap<String, String> {
    let mut before = None;
    loop {
        match state() {
            Ok(after) if before.as_ref() == Some(&after) => return after,
            after => before = after.ok(),
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn assert_state(expected: &BTreeMap<String, String>) {
    let found = settled_state();
    let without = |one: &BTreeMap<String, String>, other: &BTreeMap<String, String>| {
        let is_other = |(name, value): &(&String, &String)| other.get(*name) != Some(value);
        one.iter().filter(is_other).map(|entry| format!("{entry:?}")).collect::<Vec<_>>()
    };
    assert_eq!(without(&found, expected), without(expected, &found));
}

/// The descriptors that a program gets.
fn descriptors_of_a_child() -> String {
    test_support::run("ls", ["/proc/self/fd"])
}

/// Mounts, looks at what a child gets at every step and all the time, and unmounts.
fn mount(options: &MountOptions, image: &Path, mount_point: &Path, rung: Rung) {
    let inherited = descriptors_of_a_child();
    let done = AtomicBool::new(false);
    let mut looked = 0;
    thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let mut looked = 0;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(descriptors_of_a_child(), inherited);
                looked += 1;
            }
            looked
        });
        let mut rungs = Vec::new();
        let mount = options.mount_with(image, &mut |step| {
            assert_eq!(descriptors_of_a_child(), inherited, "{step}");
            if let Step::Taken { rung } = step {
                rungs.push(rung);
            }
        });
        done.store(true, Ordering::Relaxed);
        let mount = mount.unwrap();
        assert_eq!(rungs.last(), Some(&rung));
        assert_eq!(descriptors_of_a_child(), inherited);
        mount.attach(mount_point).unwrap();
        looked = looking.join().unwrap();
    });
    assert!(looked > 0);
    umount(mount_point);
}

const FSCONFIG_SET_FD: u32 = 5;

/// The system calls that these mounts fail without, and that Rust's runtime does not.
const CALLS: [SystemCall; 17] = [
    libc::SYS_clone3,
    libc::SYS_fchdir,
    libc::SYS_fcntl,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fstat,
    libc::SYS_ioctl,
    libc::SYS_memfd_create,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_statx,
    libc::SYS_unshare,
];

/// Makes each mount with each system call refused, in threads of their own; `is_older`: layers cannot be
/// given by descriptor. Which calls were of consequence.
fn refused(
    mounts: &[(&MountOptions, &Path)],
    mount_point: &Path,
    is_older: bool,
) -> BTreeSet<SystemCall> {
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let mut of_consequence = BTreeSet::new();
    // One that a mount does not make first: that nothing else fails.
    for number in [libc::SYS_reboot].into_iter().chain(CALLS) {
        for errno in [Errno::PERM, Errno::INVAL, Errno::NOMEM] {
            let mount = |(options, image): &(&MountOptions, &Path)| {
                options.mount(*image)?.attach(mount_point)?;
                unmount(mount_point, UnmountFlags::empty()).unwrap();
                Ok::<_, sealmount::Error>(())
            };
            let mount = || {
                if is_older {
                    refuse_argument(libc::SYS_fsconfig, 1, FSCONFIG_SET_FD, Errno::BADF);
                }
                refuse(&[number], errno);
                mounts.iter().filter(|each| mount(each).is_err()).count()
            };
            if thread::scope(|scope| scope.spawn(mount).join().unwrap()) > 0 {
                of_consequence.insert(number);
            }
            assert_eq!(descriptors(), before, "system call {number}, {errno}");
        }
    }
    of_consequence
}

#[test]
fn a_mount_leaves_the_process_as_it_was_and_its_children_get_nothing() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let content = large_image(32 << 20);
    let large = sandbox.file("large.cfs", &content);
    let plain = V1.options();
    let mut memfd = V1.copy_options();
    memfd.digest = Some(compute_digest(Algorithm::Sha512, &content));
    let content = large_image(1 << 20);
    let middle = sandbox.file("middle.cfs", &content);
    let middle_zstd = sandbox.file("middle.zst", &through(&["zstd", "-c"], &content));
    let mut medium = V1.copy_options();
    medium.digest = Some(compute_digest(Algorithm::Sha256, &content));
    let mut ramfs = memfd.clone();
    ramfs.copy = Some(Memory::Ramfs);
    let mut v2 = V2.copy_options();
    v2.copy = Some(Memory::Memfd);
    let zstd = sandbox.path("large.zst");
    let compressed = Command::new("zstd").arg("-q").arg(&large).arg("-o").arg(&zstd).status();
    assert!(compressed.unwrap().success());

    let mut small = V1.copy_options();
    small.copy = Some(Memory::Ramfs);
    let mut with_upper = V1.copy_options();
    with_upper.upper = Some(UpperLayer {
        upperdir: sandbox.directory("upper").into(),
        workdir: sandbox.directory("work").into(),
    });
    let (mut process, namespace) = user_namespace();
    let mut idmapped = V1.copy_options();
    idmapped.idmap = Some(namespace.as_str().into());
    let (v1, v2_image) = (V1.image(), V2.image());

    let before = settled_state();
    let newest = Rung::LayersByDescriptor;
    mount(&plain, &V1.image(), &mount_point, newest);
    mount(&memfd, &large, &mount_point, newest);
    mount(&ramfs, &large, &mount_point, newest);
    mount(&memfd, &zstd, &mount_point, newest);
    mount(&v2, &V2.image(), &mount_point, newest);
    // One that fails, too.
    memfd.digest = Some(V1.digest());
    memfd.mount(&large).unwrap_err();
    assert_state(&before);

    // Many that fail, at every step.
    let tries: [(&MountOptions, &Path); 7] = [
        (&plain, &v1),
        (&small, &v1),
        (&with_upper, &v1),
        (&idmapped, &v1),
        (&v2, &v2_image),
        (&medium, &middle),
        (&medium, &middle_zstd),
    ];
    let mut of_consequence = refused(&tries, &mount_point, false);
    // What is not in a memfd, EROFS would take by descriptor, and no kernel answers EBADF to that.
    of_consequence.extend(refused(&tries[2..], &mount_point, true));
    let without: Vec<_> = CALLS.iter().filter(|call| !of_consequence.contains(call)).collect();
    assert!(without.is_empty(), "refused without consequence: {without:?}");
    assert!(!of_consequence.contains(&libc::SYS_reboot));
    assert_state(&before);

    // As on kernels that take no layers by descriptor: in a private mount namespace.
    thread::scope(|scope| {
        scope.spawn(|| {
            refuse_argument(libc::SYS_fsconfig, 1, FSCONFIG_SET_FD, Errno::BADF);
            let before = settled_state();
            mount(&v2, &V2.image(), &mount_point, Rung::LayersByPath);
            v2.mount(V2.image()).unwrap().attach(&mount_point).unwrap();
            assert_is_manifest(&mount_point);
            umount(&mount_point);
            memfd.mount(&large).unwrap_err();
            assert_state(&before);
        });
    });
    assert_state(&before);
    process.kill().unwrap();
    process.wait().unwrap();
}
