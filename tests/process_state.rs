//! Checks that a mount leaves the state of the calling process unchanged. The test compares the state
//! of the whole process, so the test has its own binary.
// test_support::sandboxing supports little-endian architectures only.
#![cfg(target_endian = "little")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use sealmount::{
    Algorithm, Digest, Event, LayerMethod, MemoryKind, Method, MountOptions, UpperLayer,
};
use test_support::sandboxing::{SystemCall, deny, deny_argument};
use test_support::{
    V1, V2, assert_is_manifest, large_image, mounts, sandbox, through, umount, user_namespace,
};

/// Returns the state of the process that a library could disturb, as text.
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

/// Returns the state after the state has stopped changing. The kernel removes a thread from /proc a
/// moment after another thread has joined the thread.
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

/// Returns the descriptors that a program inherits.
fn inherited_descriptors() -> String {
    test_support::run("ls", ["/proc/self/fd"])
}

/// Mounts and unmounts. At every event and between events, compares the descriptors that a child
/// inherits.
fn mount(options: &MountOptions, image: &Path, mount_point: &Path, expected: Method) {
    let inherited = inherited_descriptors();
    let done = AtomicBool::new(false);
    let mut comparisons = 0;
    thread::scope(|scope| {
        let comparer = scope.spawn(|| {
            let mut comparisons = 0;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(inherited_descriptors(), inherited);
                comparisons += 1;
            }
            comparisons
        });
        let mut methods = Vec::new();
        let mount = options.mount_with_events(image, &mut |event| {
            assert_eq!(inherited_descriptors(), inherited, "{event}");
            if let Event::MethodUsed { method, .. } = event {
                methods.push(method);
            }
            ControlFlow::Continue(())
        });
        done.store(true, Ordering::Relaxed);
        let mount = mount.unwrap();
        assert_eq!(methods.last(), Some(&expected));
        assert_eq!(inherited_descriptors(), inherited);
        mount.attach(mount_point).unwrap();
        comparisons = comparer.join().unwrap();
    });
    assert!(comparisons > 0);
    umount(mount_point);
}

const FSCONFIG_SET_FD: u32 = 5;

/// The system calls that these mounts need, and that Rust's runtime does not need.
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

/// Makes each mount with each system call denied, in new threads. With `is_older_kernel`, overlayfs
/// rejects layers by descriptor. Returns the calls whose denial made a mount fail.
fn needed_calls(
    mounts: &[(&MountOptions, &Path)],
    mount_point: &Path,
    is_older_kernel: bool,
) -> BTreeSet<SystemCall> {
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let mut needed = BTreeSet::new();
    // A mount does not make the first call. Its denial shows that no other call fails.
    for number in [libc::SYS_reboot].into_iter().chain(CALLS) {
        for errno in [Errno::PERM, Errno::INVAL, Errno::NOMEM] {
            let mount = |(options, image): &(&MountOptions, &Path)| {
                options.mount(*image)?.attach(mount_point)?;
                unmount(mount_point, UnmountFlags::empty()).unwrap();
                Ok::<_, sealmount::Error>(())
            };
            let mount = || {
                if is_older_kernel {
                    deny_argument(libc::SYS_fsconfig, 1, FSCONFIG_SET_FD, Errno::BADF);
                }
                deny(&[number], errno);
                mounts.iter().filter(|each| mount(each).is_err()).count()
            };
            if thread::scope(|scope| scope.spawn(mount).join().unwrap()) > 0 {
                needed.insert(number);
            }
            assert_eq!(descriptors(), before, "system call {number}, {errno}");
        }
    }
    needed
}

#[test]
fn mount_leaves_process_and_children_unchanged() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let content = large_image(32 << 20);
    let large = sandbox.file("large.cfs", &content);
    let plain = V1.options();
    let mut memfd = V1.copy_options();
    memfd.digest = Some(Digest::of_bytes(Algorithm::Sha512, &content));
    let content = large_image(1 << 20);
    let middle = sandbox.file("middle.cfs", &content);
    let middle_zstd = sandbox.file("middle.zst", &through(&["zstd", "-c"], &content));
    let mut medium = V1.copy_options();
    medium.digest = Some(Digest::of_bytes(Algorithm::Sha256, &content));
    let mut ramfs = memfd.clone();
    ramfs.copy = Some(MemoryKind::Ramfs);
    let mut v2 = V2.copy_options();
    v2.copy = Some(MemoryKind::Memfd);
    let zstd = sandbox.path("large.zst");
    let compressed = Command::new("zstd").arg("-q").arg(&large).arg("-o").arg(&zstd).status();
    assert!(compressed.unwrap().success());

    let mut small = V1.copy_options();
    small.copy = Some(MemoryKind::Ramfs);
    let mut with_upper = V1.copy_options();
    with_upper.overlay.upper =
        Some(UpperLayer::new(sandbox.directory("upper"), sandbox.directory("work")));
    let (mut process, namespace) = user_namespace();
    let mut idmapped = V1.copy_options();
    idmapped.idmap = Some(namespace.as_str().into());
    let (v1, v2_image) = (V1.image(), V2.image());

    let before = settled_state();
    let newest = Method::Layers(LayerMethod::Descriptors);
    mount(&plain, &V1.image(), &mount_point, newest);
    mount(&memfd, &large, &mount_point, newest);
    mount(&ramfs, &large, &mount_point, newest);
    mount(&memfd, &zstd, &mount_point, newest);
    mount(&v2, &V2.image(), &mount_point, newest);
    // A failed mount leaves nothing either.
    memfd.digest = Some(V1.digest());
    memfd.mount(&large).unwrap_err();
    assert_state(&before);

    // Each of these mounts runs with each system call denied.
    let tries: [(&MountOptions, &Path); 7] = [
        (&plain, &v1),
        (&small, &v1),
        (&with_upper, &v1),
        (&idmapped, &v1),
        (&v2, &v2_image),
        (&medium, &middle),
        (&medium, &middle_zstd),
    ];
    let mut needed = needed_calls(&tries, &mount_point, false);
    // EROFS accepts the descriptor of an image outside of a memfd. No kernel fails with EBADF there.
    needed.extend(needed_calls(&tries[2..], &mount_point, true));
    let without: Vec<_> = CALLS.iter().filter(|call| !needed.contains(call)).collect();
    assert!(without.is_empty(), "no mount failed when these calls were denied: {without:?}");
    assert!(!needed.contains(&libc::SYS_reboot));
    assert_state(&before);

    // Linux < 6.15: layers by path, in a private mount namespace.
    thread::scope(|scope| {
        scope.spawn(|| {
            deny_argument(libc::SYS_fsconfig, 1, FSCONFIG_SET_FD, Errno::BADF);
            let before = settled_state();
            mount(&v2, &V2.image(), &mount_point, Method::Layers(LayerMethod::Paths));
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
