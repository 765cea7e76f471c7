//! What a copy takes of memory, and that it gives it back. A test binary of its own: the figures are
//! those of the whole system.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use sealmount::{Algorithm, compute_digest};

use common::{Sandbox, V1, large_image, mount_at, run, umount};

const MIB: usize = 1024 * 1024;

/// A line of /proc/meminfo, in bytes.
fn meminfo(field: &str) -> usize {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Waits until the figure is within 4 MiB of `expected`: the kernel counts and gives back memory in
/// the background.
fn assert_meminfo(field: &str, expected: usize) {
    let start = Instant::now();
    while meminfo(field).abs_diff(expected) > 4 * MIB {
        let found = meminfo(field);
        assert!(start.elapsed() < Duration::from_secs(10), "{field} {found} for {expected}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_copy_takes_the_memory_of_the_image_and_gives_it_back() {
    let Some(sandbox) = Sandbox::new() else { return };
    let size = 64 * MIB;
    let content = large_image(size);
    let (image, mnt) = (sandbox.file("large.cfs", &content), sandbox.directory("mnt"));
    let digest = compute_digest(Algorithm::Sha512, &content);
    let (image, mnt_text) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    let helper = env!("CARGO_BIN_EXE_mount-composefs");

    // Where the kernel counts it: files of a tmpfs, and what is never swapped out.
    for (memory, field) in [("memfd", "Shmem:"), ("ramfs", "Unevictable:")] {
        let before = meminfo(field);
        let basedir = V1.objects();
        let options =
            format!("copy={memory},noverity,digest={digest},basedir={}", basedir.display());

        // RLIMIT_DATA: all private writable memory of the process, anonymous or not, the first
        // stack aside.
        run("prlimit", ["--data=4194304", helper, image, mnt_text, "-o", &options]);
        assert_meminfo(field, before + size);
        fs::read(mnt.join("data/70000")).unwrap();
        umount(&mnt);
        assert_meminfo(field, before);

        // Nor does one that fails keep any.
        let wrong = options.replace(&digest.to_string(), &"0".repeat(128));
        let output = common::mount_composefs([image, mnt_text, "-o", &wrong]);
        assert_eq!(output.status.code(), Some(32), "{output:?}");
        assert!(mount_at(&mnt).is_none());
        assert_meminfo(field, before);
    }
}
