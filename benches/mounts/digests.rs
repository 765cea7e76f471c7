//! How fast bytes are hashed.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sealmount::{Algorithm, compute_digest};

use crate::Bench;
use crate::programs::Program;
use crate::report::{Report, Table};
use crate::timing::{Case, alternate};

/// The argument with which this program does nothing but hash a file.
pub const COMMAND: &str = "hash-on-all-cores";

/// What a thread hashes at a time: it stays in the cache of its core, as it does while an image is
/// copied.
const SPAN: usize = 512 * 1024;

pub const OPENSSL: &str = "openssl, one core";
const ONE_CORE: &str = "sealmount, one core";
pub const ALL_CORES: &str = "sealmount, all cores";

/// Reads and hashes a file on all cores: the work of finding out its digest, done as the copy does
/// it. The library has no function for a digest alone.
pub fn hash_on_all_cores(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let next = AtomicU64::new(0);
    let work = || -> io::Result<()> {
        let mut buffer = vec![0; SPAN];
        loop {
            let offset = next.fetch_add(SPAN as u64, Ordering::Relaxed);
            match file.read_at(&mut buffer, offset)? {
                0 => return Ok(()),
                length => black_box(compute_digest(Algorithm::Sha256, &buffer[..length])),
            };
        }
    };
    on_all_cores(work).into_iter().collect()
}

fn on_all_cores<T: Send>(work: impl Fn() -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores()).map(|_| scope.spawn(&work)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
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

/// Bytes hashed by this thread, in GB/s.
fn throughput(algorithm: Algorithm) -> f64 {
    let data = vec![0x55; SPAN];
    let start = Instant::now();
    let mut bytes = 0;
    while start.elapsed() < Duration::from_millis(300) {
        black_box(compute_digest(algorithm, black_box(&data)));
        bytes += data.len();
    }
    bytes as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn openssl_speed(openssl: &Program, algorithm: Algorithm) -> f64 {
    let mut command = openssl.command();
    // By the clock, as the others are measured; the default is the processor's time.
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
