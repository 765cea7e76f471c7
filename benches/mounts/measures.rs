//! What the project has set itself, and what was found.

use std::path::Path;
use std::process::Stdio;

use crate::images::{Image, MIB};
use crate::report::{Report, Table};
use crate::whole_process::{self as whole, copy_options};
use crate::{Bench, MEASURED_SIZE, digests, memory};

const DATA_LIMIT: &str = "MiB, least RLIMIT_DATA";

/// Finds out with how little private writable memory the helper mounts an image, to 64 KiB: with
/// prlimit(1). All threads and their stacks count.
pub fn measure_data_limit(bench: &Bench, image: &Image, report: &mut Report) {
    let Some(prlimit) = &bench.programs.prlimit else {
        return report.skip(format!("{DATA_LIMIT}: no prlimit"));
    };
    let options = copy_options(image, "memfd");
    let mounts = |file: &Path, limit: usize| {
        let mut command = prlimit.command();
        command.arg(format!("--data={limit}")).args(bench.programs.helper.words());
        command.args(["-f", "-o", &options]).arg(file).arg(&bench.mnt);
        let status = command.stdin(Stdio::null()).stderr(Stdio::null()).status();
        memory::settle();
        status.is_ok_and(|status| status.success())
    };
    let files = [
        ("uncompressed", Some(&image.path)),
        ("zstd", image.zstd.as_ref()),
        ("xz", image.xz.as_ref()),
    ];
    for (name, file) in files {
        let (mut too_little, mut enough) = (0, 64 * MIB);
        match file {
            Some(file) if mounts(file, enough) => {
                while enough - too_little > 64 * 1024 {
                    let middle = (enough + too_little) / 2;
                    match mounts(file, middle) {
                        true => enough = middle,
                        false => too_little = middle,
                    }
                }
                report.figure(DATA_LIMIT, name, enough as f64 / MIB as f64);
            }
            _ => report.skip(format!("{DATA_LIMIT}, {name}: it is not mounted")),
        }
    }
}

pub fn tabulate(report: &mut Report) {
    let at = whole::group(MEASURED_SIZE);
    let ratio = |name, other| report.ratio(&at, name, other);
    let data = |name| report.median(DATA_LIMIT, name);
    let slower = |one: Option<f64>, other: Option<f64>| Some(one?.min(other?));
    let (sha256, gigabyte) = ("GB/s, sha256", whole::group(1024 * MIB));
    let per_byte = |name| {
        let small = report.median(&whole::group(100 * MIB), name)?;
        Some(report.median(&gigabyte, name)? / small * 100.0 / 1024.0)
    };

    let rows = [
        (
            "copy and digest ÷ the three steps of today",
            "≤",
            0.4,
            ratio(whole::MEMFD, whole::PIPELINE),
        ),
        (
            "copy and digest ÷ the slower of `cat` to a tmpfs and the digest alone",
            "≤",
            1.3,
            slower(ratio(whole::MEMFD, whole::CAT), ratio(whole::MEMFD, whole::DIGEST_ALONE)),
        ),
        (
            "SHA-256 on all cores ÷ openssl on one",
            "≥",
            1.7,
            report.ratio(sha256, digests::ALL_CORES, digests::OPENSSL),
        ),
        (
            "digest alone, whole process ÷ `fsverity digest`",
            "≤",
            0.5,
            ratio(whole::DIGEST_ALONE, whole::FSVERITY),
        ),
        (
            "copy, digest and mount ÷ `fsverity digest`",
            "–",
            0.0,
            ratio(whole::MEMFD, whole::FSVERITY),
        ),
        (
            "zstd, copy and digest ÷ `zstd -d` to a tmpfs",
            "≤",
            1.2,
            ratio(whole::ZSTD, whole::ZSTD_PROGRAM),
        ),
        ("xz, copy and digest ÷ `xz -d` to a tmpfs", "–", 0.0, ratio(whole::XZ, whole::XZ_PROGRAM)),
        (
            "plain ÷ composefs's mount.composefs",
            "≤",
            0.6,
            ratio(whole::PLAIN, whole::PLAIN_COMPOSEFS),
        ),
        (
            "plain ÷ composefs-rs's mount.composefs",
            "≤",
            0.6,
            ratio(whole::PLAIN, whole::PLAIN_COMPOSEFS_RS),
        ),
        (
            "ramfs: memory after walking the tree, beside directories' own ÷ image",
            "≤",
            1.05,
            report.median("memory, of the image", "ramfs, walked"),
        ),
        (
            "memfd: memory after walking the tree, beside directories' own ÷ image",
            "–",
            0.0,
            report.median("memory, of the image", "memfd, walked"),
        ),
        ("time for a byte, 1 GB ÷ 100 MB, memfd", "≤", 1.1, per_byte(whole::MEMFD)),
        ("time for a byte, 1 GB ÷ 100 MB, ramfs", "≤", 1.1, per_byte(whole::RAMFS)),
        ("MiB of anonymous memory, uncompressed", "≤", 8.0, data("uncompressed")),
        ("MiB of anonymous memory, zstd", "≤", 8.0, data("zstd")),
        ("MiB of anonymous memory, xz (its window is up to 8 MiB)", "≤", 16.0, data("xz")),
    ];
    let mut table = Table::new("measures", vec!["measure", "limit", "found", ""]);
    for (measure, relation, limit, found) in rows {
        let verdict = match (relation, found) {
            (_, None) => "not measured",
            ("≤", Some(found)) if found > limit => "missed",
            ("≥", Some(found)) if found < limit => "missed",
            ("–", _) => "",
            _ => "met",
        };
        let limit = if relation == "–" { "–".into() } else { format!("{relation} {limit}") };
        let found = found.map_or("–".into(), |found| format!("{found:.2}"));
        table.row([measure.to_owned(), limit, found, verdict.to_owned()]);
    }
    report.table(table);
}
