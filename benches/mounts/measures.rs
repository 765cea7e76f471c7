//! What the project has set itself, and what was found.

use crate::report::{Report, Table};
use crate::sizes::{MEASURED_SIZE, MIB};
use crate::timing::Samples;
use crate::whole_process::{self as whole, GROWTH, GROWTH_GROUP, of_size};
use crate::{anonymous, digests, memory};

enum Limit {
    AtMost(f64),
    AtLeast(f64),
    /// Only a figure to know.
    None,
}
use Limit::{AtLeast, AtMost};

/// A figure of each round.
struct Found {
    rounds: Samples,
    /// Of a ratio, the same by the other way: first the medians, then their ratio.
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
    let of_image = |name| {
        let rounds = report.samples(memory::OF_IMAGE, name)?.clone();
        Some(Found { rounds, of_medians: None })
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
            "plain ÷ composefs-rs's mount.composefs",
            AtMost(0.6),
            whole_process(whole::PLAIN, whole::PLAIN_COMPOSEFS_RS),
        ),
        (
            "ramfs: memory after walking the tree, beside directories' own ÷ image",
            AtMost(1.05),
            of_image(memory::RAMFS_WALKED),
        ),
        (
            "memfd: memory after walking the tree, beside directories' own ÷ image",
            Limit::None,
            of_image(memory::MEMFD_WALKED),
        ),
        ("time for a byte, 1 GB ÷ 100 MB: copy=memfd", AtMost(1.1), for_a_byte(whole::MEMFD)),
        ("time for a byte, 1 GB ÷ 100 MB: copy=ramfs", AtMost(1.1), for_a_byte(whole::RAMFS)),
        ("time for a byte, 1 GB ÷ 100 MB: `cat` to a tmpfs", Limit::None, for_a_byte(whole::CAT)),
        ("MiB of anonymous memory, uncompressed", AtMost(4.0), anonymous(0)),
        ("MiB of anonymous memory beside the window, zstd", AtMost(8.0), anonymous(1)),
        ("MiB of anonymous memory beside the window, xz", AtMost(8.0), anonymous(2)),
        ("MiB of anonymous memory beside the window, gzip", AtMost(8.0), anonymous(3)),
    ]
}

pub fn tabulate(report: &mut Report) {
    let header = vec!["measure", "limit", "found", "", "quartiles", "rounds", "of medians"];
    let mut table = Table::new("measures", header);
    let dash = || "–".to_owned();
    let text = |value: f64| format!("{value:.2}");
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
