//! Measures the figures of docs/benchmarks.md and writes them there: `cargo bench --features helper`, as
//! root.
//!
//! With `SEALMOUNT_BENCH_QUICK=1` it measures few rounds and small images, and writes no files. Variables
//! give the paths of other programs to compare with, see [`programs`].
#![forbid(unsafe_code)]

mod anonymous;
mod bench;
mod chart;
mod checks;
mod digests;
mod images;
mod machine;
mod measures;
mod memory;
mod parts;
mod programs;
mod report;
mod shared;
mod sizes;
mod stop;
mod timing;
mod whole_process;

use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::Instant;

use test_support::{run, sandbox};

use bench::Bench;
use images::Image;
use programs::Programs;
use report::Report;
use sizes::{MEASURED_SIZE, MIB, SIZES};
use timing::Effort;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [digests::COMMAND, file, digest] => return digests::check(Path::new(file), digest),
        ["--bench", ..] => {}
        _ => {
            println!("not measured: run `cargo bench --features helper`");
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
    run("mount", ["-t", "ramfs", "ramfs", bench.ramfs.to_str().unwrap()]);

    let mut report = Report::new(&bench.programs.versions);
    measures::add_helper_size(&bench, &mut report)?;
    digests::measure(&bench, &mut report);
    checks::measure(&bench, &mut report)?;
    memory::measure(&bench, &mut report)?;
    shared::measure_slab(&bench, &mut report)?;
    if machine::available() / 4 < stop::SIZE as u64 {
        report.skip("stopping a copy: too little memory".into());
    } else {
        stop::measure(&bench, &mut report)?;
    }
    let mut images = Vec::new();
    for size in SIZES {
        if quick && size > 100 * MIB || size as u64 > machine::available() / 4 {
            report.skip(format!("images of {} MB: they take too long or too much", size / MIB));
            continue;
        }
        let image = Image::create(&bench, size)?;
        if size == MEASURED_SIZE {
            parts::measure(&bench, &image, &mut report);
            shared::measure(&bench, &image, &mut report)?;
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
