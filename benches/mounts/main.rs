//! Measures what docs/benchmarks.md shows, and writes it there: `cargo bench`, as root.
//!
//! `SEALMOUNT_BENCH_QUICK=1` measures little and writes nothing. More programs to compare with are
//! named by variables, see [`programs`].
#![forbid(unsafe_code)]

mod anonymous;
mod chart;
mod digests;
mod images;
mod measures;
mod memory;
mod parts;
mod programs;
mod report;
mod timing;
mod whole_process;

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use images::{Image, MIB};
use programs::{Program, Programs};
use report::Report;
use test_support::{Sandbox, sandbox};
use timing::Effort;

/// What everything that is measured needs.
struct Bench {
    effort: Effort,
    programs: Programs,
    sandbox: Sandbox,
    /// Where everything is mounted.
    mnt: PathBuf,
    tmpfs: PathBuf,
    ramfs: PathBuf,
}

impl Bench {
    /// Mounts; returns the time of the whole process in milliseconds.
    fn mount(&self, program: &Program, options: &str, image: &Path) -> f64 {
        let mut command = program.command();
        timing::whole_process(command.args(["-o", options]).arg(image).arg(&self.mnt))
    }

    fn unmount(&self) {
        test_support::umount(&self.mnt);
    }

    /// Runs something that takes memory for as long as it lasts: right before it so much is free, and
    /// once more right behind it.
    ///
    /// A kernel in a virtual machine may give memory back to the host that was free for a moment (free
    /// page reporting). Taking it again costs more than filling it, and nobody can tell when that
    /// happens. So it is in use until just before; and a page here and there stays in use, because what
    /// is given back are whole huge pages.
    fn with_memory<T>(&self, memory: &[Taken], run: impl FnOnce() -> T) -> T {
        let before = memory::held();
        let mut kept = Vec::new();
        for (number, taken) in memory.iter().enumerate() {
            let (directory, bytes) = match taken {
                Taken::PageCache(bytes) => (&self.tmpfs, bytes),
                Taken::Ramfs(bytes) => (&self.ramfs, bytes),
            };
            let path = directory.join("to-be-freed");
            let mut to_be_freed = File::create(&path).unwrap();
            kept.push(directory.join(format!("kept-{number}")));
            let mut to_be_kept = File::create(&kept[number]).unwrap();
            for _ in 0..bytes.div_ceil(Taken::BETWEEN_KEPT) {
                to_be_freed.write_all(&[1; Taken::BETWEEN_KEPT]).unwrap();
                to_be_kept.write_all(&[1; Taken::KEPT]).unwrap();
            }
            drop(to_be_freed);
            fs::remove_file(&path).unwrap();
        }
        let result = run();
        kept.iter().for_each(|path| fs::remove_file(path).unwrap());
        memory::wait_until_freed(before);
        result
    }
}

/// Memory, in bytes. The kernel keeps apart what it can move elsewhere and what not.
enum Taken {
    /// Of a memfd, a tmpfs and of files on disk.
    PageCache(usize),
    Ramfs(usize),
}

impl Taken {
    /// A page, and what is between two such: a part of a huge page.
    const KEPT: usize = 4096;
    const BETWEEN_KEPT: usize = MIB / 4;

    fn by_copy(kind: &str, bytes: usize) -> Taken {
        match kind {
            "ramfs" => Taken::Ramfs(bytes),
            _ => Taken::PageCache(bytes),
        }
    }
}

const SIZES: [usize; 5] = [MIB, 10 * MIB, 40 * MIB, 100 * MIB, 1024 * MIB];

/// The size that the measures are about.
const MEASURED_SIZE: usize = 40 * MIB;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [digests::COMMAND, file, digest] => return digests::check(Path::new(file), digest),
        ["--bench", ..] => {}
        _ => {
            println!("not measured: cargo bench does that");
            return Ok(());
        }
    }

    let start = Instant::now();
    let quick = std::env::var_os("SEALMOUNT_BENCH_QUICK").is_some();
    let Some(sandbox) = sandbox!() else { return Ok(()) };
    let bench = Bench {
        effort: if quick { Effort::QUICK } else { Effort::FULL },
        programs: Programs::find(),
        mnt: sandbox.directory("mnt"),
        tmpfs: sandbox.tmpfs("tmpfs"),
        ramfs: sandbox.directory("ramfs"),
        sandbox,
    };
    test_support::run("mount", ["-t", "ramfs", "ramfs", bench.ramfs.to_str().unwrap()]);

    let mut report = Report::new(&bench.programs.versions);
    digests::measure(&bench, &mut report);
    memory::measure(&bench, &mut report)?;
    let mut images = Vec::new();
    for size in SIZES {
        if quick && size > 100 * MIB || size as u64 > memory::available() / 4 {
            report.skip(format!("images of {} MB: they take too long or too much", size / MIB));
            continue;
        }
        let image = Image::create(&bench, size)?;
        if size == MEASURED_SIZE {
            parts::measure(&bench, &image, &mut report);
        }
        anonymous::measure(&bench, &image, &mut report);
        whole_process::measure(&bench, &image, &mut report);
        images.push(image);
    }
    whole_process::measure_growth(&bench, &images, &mut report);
    anonymous::tabulate(&mut report);
    whole_process::tabulate(&mut report);
    measures::tabulate(&mut report);

    println!("\n{}\nin {} s", report.to_text(), start.elapsed().as_secs());
    if !quick {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
        fs::write(docs.join("benchmarks/figures.tsv"), report.to_tsv())?;
        fs::write(docs.join("benchmarks/by-size.svg"), chart::by_size(&report))?;
        let page = docs.join("benchmarks.md");
        fs::write(&page, report.fill_in(&fs::read_to_string(&page)?))?;
    }
    Ok(())
}
