//! How fast bytes are hashed.

use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use sealmount::{Algorithm, Digest};

use crate::bench::Bench;
use crate::machine::cores;
use crate::programs::Program;
use crate::report::{Report, Table};
use crate::timing::{Case, alternate};

/// The argument with which this program only compares the digest of a file with an expected one.
pub const COMMAND: &str = "digest-alone";

/// The bytes below one block of the lowest level of a Merkle tree of SHA-256.
const SPAN: usize = 512 * 1024;

pub const OPENSSL: &str = "openssl, one core";
const ONE_CORE: &str = "sealmount, one core";
pub const ALL_CORES: &str = "sealmount, all cores";

/// Computes the SHA-256 fs-verity digest of a file and compares it with the expected one.
pub fn check(path: &Path, expected: &str) -> Result<(), Box<dyn Error>> {
    let found = Digest::of_file(Algorithm::Sha256, File::open(path)?)?;
    match found == expected.parse()? {
        true => Ok(()),
        false => Err(format!("{}: the digest is {found}, not {expected}", path.display()).into()),
    }
}

/// Runs `work` in this thread, and in one more thread for each further core.
fn on_all_cores<T: Send>(work: impl Fn() -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..cores()).map(|_| scope.spawn(&work)).collect();
        let mut done = vec![work()];
        done.extend(others.into_iter().map(|thread| thread.join().unwrap()));
        done
    })
}

pub fn measure(bench: &Bench, report: &mut Report) {
    println!("digests…");
    let mut table = Table::new("digests", vec!["GB/s", "SHA-256", "SHA-512"]);
    let mut columns = Vec::new();
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        let mut cases = vec![
            Case::new(ONE_CORE, move || throughput(algorithm)),
            Case::new(ALL_CORES, move || on_all_cores(|| throughput(algorithm)).iter().sum()),
        ];
        if let Some(openssl) = &bench.programs.openssl {
            cases.insert(0, Case::new(OPENSSL, move || openssl_speed(openssl, algorithm)));
        } else {
            report.skip("openssl speed: no openssl".into());
        }
        let samples = alternate(bench.effort, cases);
        columns.push(samples.clone());
        report.add(&format!("GB/s, {algorithm}"), samples);
    }
    for (sha256, sha512) in columns[0].iter().zip(&columns[1]) {
        let cell = |figure: f64| format!("{figure:.2}");
        table.row([sha256.name.clone(), cell(sha256.median()), cell(sha512.median())]);
    }
    report.table(table);
}

/// Returns how fast this thread hashes, in GB/s.
fn throughput(algorithm: Algorithm) -> f64 {
    let data = vec![0x55; SPAN];
    let start = Instant::now();
    let mut bytes = 0;
    while start.elapsed() < Duration::from_millis(300) {
        black_box(Digest::of_bytes(algorithm, black_box(&data)));
        bytes += data.len();
    }
    bytes as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn openssl_speed(openssl: &Program, algorithm: Algorithm) -> f64 {
    let mut command = openssl.command();
    // By the clock, as for the other cases. The default is the time of the CPU.
    command.args(["speed", "-elapsed", "-seconds", "1", "-bytes", "4096", "-mr", "-evp"]);
    let output = command.arg(algorithm.to_string()).output().unwrap();
    // +F:25:sha256:1751500800.00
    let text = String::from_utf8_lossy(&output.stdout);
    let figure = text
        .lines()
        .find(|line| line.starts_with("+F:"))
        .and_then(|line| line.rsplit(':').next()?.parse::<f64>().ok());
    figure.unwrap_or_else(|| panic!("{command:?}: {text}")) / 1e9
}
