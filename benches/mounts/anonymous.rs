//! The private memory of the helper while it copies.

use std::fs;
use std::process::{Command, Stdio};

use crate::bench::Bench;
use crate::images::{GZIP_WINDOW, Image, XZ_WINDOW, ZSTD_WINDOW};
use crate::report::{Report, Table};
use crate::sizes::{MIB, SIZES};
use crate::timing::{Effort, Samples};
use crate::whole_process::copy_options;

/// The formats that are copied, and the window that each decoder keeps, in bytes.
pub const FORMATS: [(&str, usize); 4] =
    [("uncompressed", 0), ("zstd", ZSTD_WINDOW), ("xz", XZ_WINDOW), ("gzip", GZIP_WINDOW)];

fn group(size: usize) -> String {
    format!("MiB of anonymous memory, {} MB", size / MIB)
}

pub fn measure(bench: &Bench, image: &Image, report: &mut Report) {
    println!("    anonymous memory…");
    let options = copy_options(image, "memfd");
    let files = [Some(&image.path), image.zstd.as_ref(), image.xz.as_ref(), image.gzip.as_ref()];
    for ((format, _), file) in FORMATS.iter().zip(files) {
        let Some(file) = file else {
            report.skip(format!("anonymous memory, {format}: no such image"));
            continue;
        };
        let mut peaks = Vec::new();
        Effort::FEW.rounds(|_| {
            let mut command = bench.programs.helper.command();
            command.args(["-f", "-o", &options]).arg(file).arg(&bench.mnt);
            peaks.push(bench.with_memory(&[], || peak(&mut command)));
        });
        report.add(&group(image.size), vec![Samples::new(format, peaks)]);
    }
}

/// Returns the highest value in MiB, sampled all the time.
fn peak(command: &mut Command) -> f64 {
    let mut child = command.stdin(Stdio::null()).spawn().unwrap();
    let path = format!("/proc/{}/smaps_rollup", child.id());
    let mut peak = 0.0;
    loop {
        // Exact, unlike RssAnon in status before Linux 6.17. Missing after the end of the process.
        let text = fs::read_to_string(&path).unwrap_or_default();
        let kibibytes = text
            .lines()
            .find_map(|line| line.strip_prefix("Anonymous:")?.trim().strip_suffix(" kB"))
            .map_or(0.0, |value| value.parse::<f64>().unwrap());
        peak = f64::max(peak, kibibytes / 1024.0);
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{command:?}: {status}");
            return peak;
        }
    }
}

/// Returns the highest value of all sizes.
pub fn most(report: &Report, format: &str) -> Option<f64> {
    let all = SIZES.iter().filter_map(|size| report.samples(&group(*size), format));
    all.map(|samples| samples.quantile(1.0)).reduce(f64::max)
}

pub fn tabulate(report: &mut Report) {
    let sizes = SIZES.map(|size| format!("{} MB", size / MIB));
    let header = ["MiB", "window"].into_iter().chain(sizes.iter().map(String::as_str));
    let mut table = Table::new("anonymous", header.collect());
    for (format, window) in FORMATS {
        let cells = SIZES.map(|size| {
            let samples = report.samples(&group(size), format);
            samples.map_or("–".into(), |samples| format!("{:.2}", samples.quantile(1.0)))
        });
        let window = format!("{:.2}", window as f64 / MIB as f64);
        table.row([format.to_owned(), window].into_iter().chain(cells));
    }
    report.table(table);
}
