//! What a copy takes of memory, and that it gives it back. A test binary of its own: the figures are
//! those of the whole system.

use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use sealmount::{Algorithm, Error, Memory, SizeLimit, compute_digest};

use test_support::{V1, large_image, mount_at, mount_composefs, run, sandbox, through, umount};

const MIB: usize = 1024 * 1024;

/// Of two tests at once, each would measure the other too.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

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
    let _alone = ONE_AT_A_TIME.lock();
    let Some(sandbox) = sandbox!() else { return };
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
        let output = mount_composefs!([image, mnt_text, "-o", &wrong]);
        assert_eq!(output.status.code(), Some(32), "{output:?}");
        assert!(mount_at(&mnt).is_none());
        assert_meminfo(field, before);
    }
}

/// A decompressed stream is in memory already when it shows that there is too much of it, or too little.
#[test]
fn a_stream_that_is_refused_gives_its_memory_back() {
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
        for (kind, field) in [(Memory::Memfd, "Shmem:"), (Memory::Ramfs, "Unevictable:")] {
            options.copy = Some(kind);
            let before = meminfo(field);
            for image in [&longer, &shorter, &garbage, &damaged] {
                let error = options.mount(image).unwrap_err();
                assert!(
                    matches!(error, Error::Image { .. } | Error::Decompress { .. }),
                    "{}: {error}",
                    image.display(),
                );
            }
            assert_meminfo(field, before);
            // What says that it is larger than the limit takes none.
            options.size = Some(SizeLimit::Bytes(size as u64 / 2));
            let error = options.mount(&longer).unwrap_err();
            assert!(matches!(error, Error::NotEnoughMemory { .. }), "{error}");
            options.size = None;
            assert_meminfo(field, before);
        }
    }
}
