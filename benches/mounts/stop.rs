//! The time from the callback's decision to stop a copy until the call returns.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::Instant;

use rustix::fs::{MemfdFlags, memfd_create};
use sealmount::{CopyOptions, Digest, ErrorKind, MemoryKind};
use test_support::V1;

use crate::bench::{Bench, Taken};
use crate::report::Report;
use crate::sizes::MIB;
use crate::timing::{Case, alternate, milliseconds};

pub const GROUP: &str = "ms from a stop to the return, 1 GiB";
pub const AT_FIRST: &str = "first callback";
pub const AT_QUARTER: &str = "a quarter";
pub const AT_HALF: &str = "a half";
pub const PANIC_AT_FIRST: &str = "first callback, panic";
pub const PANIC_AT_HALF: &str = "a half, panic";
pub const FREE_HALF: &str = "closing a memfd of 512 MiB";

pub const SIZE: usize = 1024 * MIB;

pub fn measure(bench: &Bench, report: &mut Report) -> Result<(), Box<dyn Error>> {
    println!("stopping a copy…");
    // A hole follows the image. The page cache holds the zeros of the hole after the first read.
    let mut content = fs::read(V1.image())?;
    content[1060..1064].copy_from_slice(&(SIZE as u32 / 4096).to_le_bytes());
    let path = bench.sandbox.file("stopped.cfs", &content);
    File::options().write(true).open(&path)?.set_len(SIZE as u64)?;

    let stop = |name: &str, at: usize, how: fn() -> ControlFlow<()>| {
        let path = &path;
        Case::new(name, move || {
            bench.with_memory(&[Taken::PageCache(at + 8 * MIB)], || stop_at(path, at, how))
        })
    };
    let end = || ControlFlow::Break(());
    let panic = || resume_unwind(Box::new(PANIC_AT_HALF));
    let cases = vec![
        stop(AT_FIRST, 0, end),
        stop(AT_QUARTER, SIZE / 4, end),
        stop(AT_HALF, SIZE / 2, end),
        stop(PANIC_AT_FIRST, 0, panic),
        stop(PANIC_AT_HALF, SIZE / 2, panic),
        Case::new(FREE_HALF, || {
            bench.with_memory(&[Taken::PageCache(SIZE / 2)], || free(SIZE / 2))
        }),
    ];
    report.add(GROUP, alternate(bench.effort, cases));
    fs::remove_file(&path)?;
    Ok(())
}

/// Copies a file and stops the copy at the first callback from this many bytes on. Returns the time from
/// the end of the callback to the return of the call.
fn stop_at(path: &Path, at: usize, how: fn() -> ControlFlow<()>) -> f64 {
    let image = sealmount::Image::open(path).unwrap();
    let mut options = CopyOptions::new(MemoryKind::Memfd);
    // No file has this digest. With a digest, all cores copy.
    options.digest = Some(Digest::Sha256([0; 32]));
    let mut stopped = None;
    let result = catch_unwind(AssertUnwindSafe(|| {
        image.copy_with_progress(&options, &mut |progress| {
            if progress.done < at as u64 {
                return ControlFlow::Continue(());
            }
            assert!(stopped.is_none(), "the callback is called again after a stop");
            stopped = Some(Instant::now());
            how()
        })
    }));
    let time = stopped.unwrap().elapsed();
    if let Ok(result) = result {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    milliseconds(time)
}

/// Returns the time that the kernel needs to free the memory of a memfd.
fn free(size: usize) -> f64 {
    let mut memfd = File::from(memfd_create("memfd", MemfdFlags::CLOEXEC).unwrap());
    for _ in 0..size / MIB {
        memfd.write_all(&[1; MIB]).unwrap();
    }
    let start = Instant::now();
    drop(memfd);
    milliseconds(start.elapsed())
}
