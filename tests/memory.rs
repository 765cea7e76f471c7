//! Measures the memory that a copy uses and releases. The figures belong to the whole system, so these
//! tests have their own binary.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use sealmount::{Algorithm, Digest, ErrorKind, MemoryKind, SizeLimit};

use test_support::{
    V1, assert_no_loop_device, large_image, loop_devices, mount_at, mount_composefs, run, sandbox,
    through, umount,
};

const MIB: usize = 1024 * 1024;

/// Serializes the tests, because each of two parallel tests would measure the memory of the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Returns a field of /proc/meminfo, in bytes.
fn meminfo(field: &str) -> usize {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Waits until the figure is within 4 MiB of `expected`, because the kernel counts and releases memory
/// in the background.
fn assert_meminfo(field: &str, expected: usize) {
    let start = Instant::now();
    while meminfo(field).abs_diff(expected) > 4 * MIB {
        let found = meminfo(field);
        assert!(start.elapsed() < Duration::from_secs(10), "{field} {found} for {expected}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn copy_uses_image_size_and_leaves_no_memory() {
    let _alone = ONE_AT_A_TIME.lock();
    let Some(sandbox) = sandbox!() else { return };
    let size = 64 * MIB;
    let content = large_image(size);
    let (image, mnt) = (sandbox.file("large.cfs", &content), sandbox.directory("mnt"));
    let digest = Digest::of_bytes(Algorithm::Sha512, &content);
    let (image, mnt_text) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    let helper = env!("CARGO_BIN_EXE_mount-composefs");

    // The fields count the files of a tmpfs, and the memory that the kernel never swaps out.
    for (memory, field) in [("memfd", "Shmem:"), ("ramfs", "Unevictable:")] {
        let before = meminfo(field);
        let basedir = V1.objects();
        let options =
            format!("copy={memory},noverity,digest={digest},basedir={}", basedir.display());

        // RLIMIT_DATA limits all private writable memory of the process, except the first stack.
        run("prlimit", ["--data=4194304", helper, image, mnt_text, "-o", &options]);
        assert_meminfo(field, before + size);
        fs::read(mnt.join("data/70000")).unwrap();
        umount(&mnt);
        assert_meminfo(field, before);

        // A failed mount keeps no memory.
        let wrong = options.replace(&digest.to_string(), &"0".repeat(128));
        let output = mount_composefs!([image, mnt_text, "-o", &wrong]);
        assert_eq!(output.status.code(), Some(32), "{output:?}");
        assert!(mount_at(&mnt).is_none());
        assert_meminfo(field, before);
    }
}

#[test]
fn sealed_memfd_is_used_in_place() {
    let _alone = ONE_AT_A_TIME.lock();
    let Some(sandbox) = sandbox!() else { return };
    let mnt = sandbox.directory("mnt");
    let mnt_text = mnt.to_str().unwrap();
    let size = 64 * MIB;
    let content = large_image(size);
    let digest = Digest::of_bytes(Algorithm::Sha256, &content);
    let name = format!("sealed-{}", std::process::id());
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut memfd = File::from(memfd_create(&name, flags).unwrap());
    memfd.write_all(&content).unwrap();
    drop(content);
    fcntl_add_seals(&memfd, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK).unwrap();
    let image = format!("/proc/{}/fd/{}", std::process::id(), memfd.as_raw_fd());

    let basedir = format!("basedir={},noverity", V1.objects().display());
    let (right, wrong) = (format!("digest={digest}"), format!("digest={}", "0".repeat(64)));
    let before = meminfo("Shmem:");
    for options in ["ro", "copy", &right, &format!("copy,{right}")] {
        let options = format!("{basedir},{options}");
        let output = mount_composefs!(["-v", &image, mnt_text, "-o", &options]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{options}: {message}");
        assert!(message.contains("used in place") && !message.contains("copied"), "{message}");
        assert_eq!(
            message.contains("computed by sealmount"),
            options.contains("digest="),
            "{message}"
        );
        // The loop device holds the memfd of this test, not a copy.
        let backing_file = format!("/memfd:{name} (deleted)\n");
        assert_eq!(loop_devices(&name), [backing_file], "{options}: {message}");
        assert_meminfo("Shmem:", before);
        assert_eq!(fs::read(mnt.join("data/70000")).unwrap().len(), 70_000);
        umount(&mnt);
        assert_no_loop_device(&name);
    }
    for options in [&wrong, &format!("copy,{wrong}")] {
        let options = format!("{basedir},{options}");
        let output = mount_composefs!(["-v", &image, mnt_text, "-o", &options]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(32), "{options}: {message}");
        assert!(message.contains(&format!("its fs-verity digest is {digest}")), "{message}");
        assert!(mount_at(&mnt).is_none());
        assert_no_loop_device(&name);
        assert_meminfo("Shmem:", before);
    }
    // A ramfs is another kind of memory, so sealmount copies the image.
    let options = format!("{basedir},copy=ramfs,{right}");
    let output = mount_composefs!(["-v", &image, mnt_text, "-o", &options]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() && message.contains("copied into a read-only ramfs"),
        "{message}"
    );
    umount(&mnt);
}

#[test]
fn unsealed_memfd_is_copied() {
    let _alone = ONE_AT_A_TIME.lock();
    let Some(sandbox) = sandbox!() else { return };
    let mnt = sandbox.directory("mnt");
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut memfd = File::from(memfd_create("unsealed", flags).unwrap());
    memfd.write_all(&fs::read(V1.image()).unwrap()).unwrap();
    // Without the other seals, the file can still change.
    for seal in [SealFlags::GROW, SealFlags::SHRINK] {
        fcntl_add_seals(&memfd, seal).unwrap();
        let image = format!("/proc/{}/fd/{}", std::process::id(), memfd.as_raw_fd());
        let options = format!("basedir={},copy", V1.objects().display());
        let output = mount_composefs!(["-v", &image, mnt.to_str().unwrap(), "-o", &options]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.success() && message.contains("copied into a sealed memfd"),
            "{message}"
        );
        umount(&mnt);
    }
}

/// sealmount rejects a stream that is too long or truncated when most of the copy is in memory already.
#[test]
fn rejected_stream_leaves_no_memory_in_use() {
    let _alone = ONE_AT_A_TIME.lock();
    let Some(sandbox) = sandbox!() else { return };
    let size = 64 * MIB;
    let mut options = V1.copy_options();
    options.digest = None;
    let content = large_image(size);
    let more = [&content[..], &[0; 4096]].concat();
    let half = &content[..size / 2];
    for program in [&["zstd", "-1", "-c"][..], &["xz", "-0", "-c"], &["gzip", "-1", "-c"]] {
        let longer = sandbox.file("longer", &through(program, &more));
        let shorter = sandbox.file("shorter", &through(program, half));
        let whole = through(program, &content);
        let garbage = sandbox.file("garbage", &[&whole, &b"garbage"[..]].concat());
        let damaged = sandbox.file("damaged", &whole[..whole.len() - 1]);
        for (kind, field) in [(MemoryKind::Memfd, "Shmem:"), (MemoryKind::Ramfs, "Unevictable:")] {
            options.copy = Some(kind);
            let before = meminfo(field);
            for image in [&longer, &shorter, &garbage, &damaged] {
                let error = options.mount(image).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NotAnImage, "{}: {error}", image.display());
            }
            assert_meminfo(field, before);
            // sealmount rejects an image that exceeds the limit before the copy.
            options.size = Some(SizeLimit::Bytes(size as u64 / 2));
            let error = options.mount(&longer).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::LimitExceeded, "{error}");
            options.size = None;
            assert_meminfo(field, before);
        }
    }
}
