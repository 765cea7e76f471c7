//! The limits of the project, and the figures that were found.

use sealmount::Algorithm;

use crate::bench::Bench;
use crate::report::{Report, Table};
use crate::sizes::{MEASURED_SIZE, MIB};
use crate::timing::Samples;
use crate::whole_process::{self as whole, GROWTH, GROWTH_GROUP, of_size};
use crate::{anonymous, checks, digests, memory, parts, shared, stop};

enum Limit {
    AtMost(f64),
    AtLeast(f64),
    /// The figure has no limit.
    None,
}
use Limit::{AtLeast, AtMost};

const HELPER_SIZE_GROUP: &str = "MiB";
const HELPER_SIZE: &str = "static helper";

/// The size without the feature `boot`, at most 2.04 MiB, and 200 KiB for sealmount-setup-root.
const HELPER_SIZE_MAX: f64 = 2.23;

/// A figure of each round.
struct Found {
    rounds: Samples,
    /// The ratio of the two medians, if the figure is a ratio.
    of_medians: Option<f64>,
}

impl Found {
    fn ratio(one: &Samples, other: &Samples) -> Found {
        let of_medians = Some(one.median() / other.median());
        Found { rounds: one.ratios_to(other), of_medians }
    }

    fn scaled(self, factor: f64) -> Found {
        let of_medians = self.of_medians.map(|ratio| ratio * factor);
        Found { rounds: self.rounds.scaled(factor), of_medians }
    }
}

/// Each measure, its limit, and what was found.
fn measures(report: &Report) -> Vec<(&'static str, Limit, Option<Found>)> {
    let ratio = |group: &str, name: &str, other: &str| {
        Some(Found::ratio(report.samples(group, name)?, report.samples(group, other)?))
    };
    let at = whole::group(MEASURED_SIZE);
    let whole_process = |name, other| ratio(&at, name, other);
    let slower = |one, other| match report.median(&at, one) > report.median(&at, other) {
        true => one,
        false => other,
    };
    let [small, large] = GROWTH;
    let for_a_byte = |name| {
        let found = ratio(GROWTH_GROUP, &of_size(name, large), &of_size(name, small))?;
        Some(found.scaled(small as f64 / large as f64))
    };
    let anonymous = |number: usize| {
        let (format, window) = anonymous::FORMATS[number];
        let beside_window = anonymous::most(report, format)? - window as f64 / MIB as f64;
        Some(Found { rounds: Samples::new(format, vec![beside_window]), of_medians: None })
    };
    let figure = |group: &str, name: &str| {
        let rounds = report.samples(group, name)?.clone();
        Some(Found { rounds, of_medians: None })
    };
    let stop = |name| figure(stop::GROUP, name);
    let shared = |name, other| ratio(shared::GROUP, name, other);
    let content = |algorithm| ratio(&checks::group(algorithm), checks::CHECK, checks::OTHER);
    let sealed = || {
        let all = |variant| report.samples(&parts::group(variant), parts::ALL);
        Some(Found::ratio(all(parts::SEALED_DIGEST)?, all(parts::MEMFD_DIGEST)?))
    };
    vec![
        (
            "copy and digest ÷ the three steps of today",
            AtMost(0.4),
            whole_process(whole::MEMFD, whole::PIPELINE),
        ),
        (
            "copy and digest ÷ the slower of `cat` to a tmpfs and the digest alone",
            AtMost(1.3),
            whole_process(whole::MEMFD, slower(whole::CAT, whole::DIGEST_ALONE)),
        ),
        (
            "copy and digest: one core ÷ all cores",
            Limit::None,
            whole_process(whole::MEMFD_ONE_CORE, whole::MEMFD),
        ),
        (
            "SHA-256 on all cores ÷ openssl on one",
            AtLeast(1.7),
            ratio("GB/s, sha256", digests::ALL_CORES, digests::OPENSSL),
        ),
        (
            "digest alone, whole process ÷ `fsverity digest`",
            AtMost(0.5),
            whole_process(whole::DIGEST_ALONE, whole::FSVERITY),
        ),
        (
            "copy, digest and mount ÷ `fsverity digest`",
            Limit::None,
            whole_process(whole::MEMFD, whole::FSVERITY),
        ),
        (
            "zstd, copy and digest ÷ `zstd -d` to a tmpfs",
            AtMost(1.2),
            whole_process(whole::MEMFD_ZSTD, whole::ZSTD_PROGRAM),
        ),
        (
            "xz, copy and digest ÷ `xz -d` to a tmpfs",
            Limit::None,
            whole_process(whole::MEMFD_XZ, whole::XZ_PROGRAM),
        ),
        (
            "plain ÷ composefs's mount.composefs",
            AtMost(0.6),
            whole_process(whole::PLAIN, whole::PLAIN_COMPOSEFS),
        ),
        (
            "plain, static with musl ÷ composefs's mount.composefs",
            AtMost(0.45),
            whole_process(whole::PLAIN_MUSL, whole::PLAIN_COMPOSEFS),
        ),
        (
            "plain ÷ composefs-rs's mount.composefs",
            AtMost(0.6),
            whole_process(whole::PLAIN, whole::PLAIN_COMPOSEFS_RS),
        ),
        (
            "ramfs: memory after walking the tree, beside directories' own ÷ image",
            AtMost(1.05),
            figure(memory::OF_IMAGE, memory::RAMFS_WALKED),
        ),
        (
            "memfd: memory after walking the tree, beside directories' own ÷ image",
            Limit::None,
            figure(memory::OF_IMAGE, memory::MEMFD_WALKED),
        ),
        ("sealed memfd, digest and mount ÷ copy, digest and mount", AtMost(0.8), sealed()),
        (
            "sealed memfd, digest and mount: MiB of memory",
            AtMost(0.0),
            figure(parts::MEMORY_GROUP, parts::SEALED_DIGEST),
        ),
        (
            "50 mounts of one copy, walked: growth of the page cache ÷ image",
            AtMost(1.05),
            figure(shared::GROUP, shared::MEMORY),
        ),
        (
            "50 mounts of one copy: loop devices",
            AtMost(1.0),
            figure(shared::GROUP, shared::LOOP_DEVICES),
        ),
        (
            "50 mounts of one copy: a further mount ÷ the first",
            AtMost(0.15),
            shared(shared::FURTHER, shared::FIRST),
        ),
        (
            "50 mounts of one copy: the slowest further mount ÷ the first",
            Limit::None,
            shared(shared::SLOWEST, shared::FIRST),
        ),
        (
            "50 mounts of one copy: a further mount ÷ a plain mount",
            AtMost(2.0),
            shared(shared::FURTHER, shared::PLAIN),
        ),
        (
            "10 mounts of one copy, walked: slab of a further mount ÷ of the first",
            AtMost(0.6),
            ratio(shared::SLAB_GROUP, shared::SLAB_FURTHER, shared::SLAB_FIRST),
        ),
        ("ms to stop a copy of 1 GiB at the first callback", AtMost(20.0), stop(stop::AT_FIRST)),
        ("ms to stop a copy of 1 GiB at a quarter", AtMost(20.0), stop(stop::AT_QUARTER)),
        ("ms to stop a copy of 1 GiB at a half", AtMost(20.0), stop(stop::AT_HALF)),
        (
            "ms to stop a copy of 1 GiB by a panic at the first callback",
            AtMost(20.0),
            stop(stop::PANIC_AT_FIRST),
        ),
        (
            "ms to stop a copy of 1 GiB by a panic at a half",
            AtMost(20.0),
            stop(stop::PANIC_AT_HALF),
        ),
        ("ms to close a memfd of 512 MiB", Limit::None, stop(stop::FREE_HALF)),
        (
            "stop of a copy of 1 GiB at a half ÷ closing a memfd of 512 MiB",
            Limit::None,
            ratio(stop::GROUP, stop::AT_HALF, stop::FREE_HALF),
        ),
        ("time for a byte, 1 GB ÷ 100 MB: copy=memfd", AtMost(1.1), for_a_byte(whole::MEMFD)),
        ("time for a byte, 1 GB ÷ 100 MB: copy=ramfs", AtMost(1.1), for_a_byte(whole::RAMFS)),
        ("time for a byte, 1 GB ÷ 100 MB: `cat` to a tmpfs", Limit::None, for_a_byte(whole::CAT)),
        ("MiB of anonymous memory, uncompressed", AtMost(4.0), anonymous(0)),
        ("MiB of anonymous memory beside the window, zstd", AtMost(8.0), anonymous(1)),
        ("MiB of anonymous memory beside the window, xz", AtMost(8.0), anonymous(2)),
        ("MiB of anonymous memory beside the window, gzip", AtMost(8.0), anonymous(3)),
        (
            "mount with check=all ÷ a second `find -printf %s`, real image",
            AtMost(1.5),
            ratio(checks::GROUP_ALL, checks::CHECK, checks::OTHER),
        ),
        (
            "mount with check=all ÷ a first `find -printf %s`, real image",
            Limit::None,
            ratio(checks::GROUP_ALL, checks::CHECK, checks::FIRST),
        ),
        (
            "check=content ÷ two `fsverity digest`, SHA-256",
            AtMost(0.85),
            content(Algorithm::Sha256),
        ),
        ("check=content ÷ two `fsverity digest`, SHA-512", AtMost(0.6), content(Algorithm::Sha512)),
        (
            "MiB of the static helper, all formats",
            AtMost(HELPER_SIZE_MAX),
            figure(HELPER_SIZE_GROUP, HELPER_SIZE),
        ),
    ]
}

/// Adds the size of the static helper to the figures.
pub fn add_helper_size(bench: &Bench, report: &mut Report) -> std::io::Result<()> {
    let size = bench.programs.helper.size()?;
    println!("    {size} bytes");
    let size = Samples::new(HELPER_SIZE, vec![size as f64 / MIB as f64]);
    report.add(HELPER_SIZE_GROUP, vec![size]);
    Ok(())
}

pub fn tabulate(report: &mut Report) {
    let header = vec!["measure", "limit", "found", "", "quartiles", "rounds", "of medians"];
    let mut table = Table::new("measures", header);
    let dash = || "–".to_owned();
    let text = |value: f64| match value {
        // Two digits of a small ratio.
        0.0005..0.0995 => format!("{value:.3}"),
        _ => format!("{value:.2}"),
    };
    for (measure, limit, found) in measures(report) {
        let median = found.as_ref().map(|found| found.rounds.median());
        let verdict = match (&limit, median) {
            (_, None) => "not measured",
            (AtMost(limit), Some(median)) if median > *limit => "missed",
            (AtLeast(limit), Some(median)) if median < *limit => "missed",
            (Limit::None, _) => "",
            _ => "met",
        };
        let limit = match limit {
            AtMost(limit) => format!("≤ {limit}"),
            AtLeast(limit) => format!("≥ {limit}"),
            Limit::None => dash(),
        };
        let spread = |found: &Found| {
            let rounds = &found.rounds;
            match rounds.values.len() {
                1 => dash(),
                _ => [0.25, 0.75].map(|part| text(rounds.quantile(part))).join("–"),
            }
        };
        table.row([
            measure.to_owned(),
            limit,
            median.map_or_else(dash, text),
            verdict.to_owned(),
            found.as_ref().map_or_else(dash, spread),
            found.as_ref().map_or_else(dash, |found| found.rounds.values.len().to_string()),
            found.as_ref().and_then(|found| found.of_medians).map_or_else(dash, text),
        ]);
        if let Some(Found { rounds, of_medians }) = found {
            let medians = of_medians.map(|ratio| Samples::new(measure, vec![ratio]));
            report.add("measure", vec![Samples::new(measure, rounds.values)]);
            report.add("measure, ratio of medians", medians.into_iter().collect());
        }
    }
    report.table(table);
}
