//! What a mount leaves in the process that asks for it: nothing. A test binary of its own, with one
//! test: what is compared is that of the whole process.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::refusals::refuse_argument;
use common::{Sandbox, V1, V2, assert_is_manifest, large_image, mounts, umount};
use rustix::io::Errno;
use sealmount::{Algorithm, Memory, MountOptions, Rung, Step, compute_digest};

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
    common::run("ls", ["/proc/self/fd"])
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

#[test]
fn a_mount_leaves_the_process_as_it_was_and_its_children_get_nothing() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mount_point = sandbox.directory("mnt");
    let content = large_image(32 << 20);
    let large = sandbox.file("large.cfs", &content);
    let plain = V1.options();
    let mut memfd = V1.copy_options();
    memfd.digest = Some(compute_digest(Algorithm::Sha512, &content));
    let mut ramfs = memfd.clone();
    ramfs.copy = Some(Memory::Ramfs);
    let mut v2 = V2.copy_options();
    v2.copy = Some(Memory::Memfd);
    let zstd = sandbox.path("large.zst");
    let compressed = Command::new("zstd").arg("-q").arg(&large).arg("-o").arg(&zstd).status();
    assert!(compressed.unwrap().success());

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

    // As on kernels that take no layers by descriptor: in a private mount namespace.
    thread::scope(|scope| {
        scope.spawn(|| {
            const FSCONFIG_SET_FD: u32 = 5;
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
}
