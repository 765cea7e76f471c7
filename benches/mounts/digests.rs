//! How fast bytes are hashed.

use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sealmount::{Algorithm, Digest, compute_digest};
use sealmount_sys::sha256::hash_two_blocks;
use sha2::{Digest as _, Sha256};

use crate::bench::Bench;
use crate::machine::cores;
use crate::programs::Program;
use crate::report::{Report, Table};
use crate::timing::{Case, alternate};

/// The argument with which this program does nothing but find out whether a file has a digest.
pub const COMMAND: &str = "digest-alone";

const BLOCK_SIZE: usize = 4096;

/// What a thread hashes at a time: what is below one block of the lowest level of the Merkle tree.
const SPAN: usize = BLOCK_SIZE / HASH_SIZE * BLOCK_SIZE;

/// What a thread reads at a time: it stays in the cache of its core, as it does while an image is
/// copied.
const PIECE: usize = 128 * 1024;

const HASH_SIZE: usize = 32;

type Hash = [u8; HASH_SIZE];

pub const OPENSSL: &str = "openssl, one core";
const ONE_CORE: &str = "sealmount, one core";
pub const ALL_CORES: &str = "sealmount, all cores";

/// Finds out the SHA-256 fs-verity digest of a file, on all cores and done as the copy does it, and
/// compares it. The library has no function for a digest without a copy.
pub fn check(path: &Path, expected: &str) -> Result<(), Box<dyn Error>> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let next = AtomicU64::new(0);
    let hashes = on_all_cores(|| {
        let (mut buffer, mut hashes) = (vec![0; PIECE], Vec::new());
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let start = number * SPAN as u64;
            if start >= size {
                return Ok(hashes);
            }
            let end = size.min(start + SPAN as u64);
            hashes.push((number, hash_span(&file, start..end, &mut buffer)?));
        }
    });
    let mut hashes: Vec<_> = hashes.into_iter().collect::<io::Result<Vec<_>>>()?.concat();
    hashes.sort_unstable();
    let found = digest(size, hashes.into_iter().map(|(_, hash)| hash).collect());
    match found == expected.parse()? {
        true => Ok(()),
        false => Err(format!("{}: the digest is {found}, not {expected}", path.display()).into()),
    }
}

/// The hash of the block of hashes of this part of a file.
fn hash_span(file: &File, span: Range<u64>, buffer: &mut [u8]) -> io::Result<Hash> {
    let mut hashes = Vec::with_capacity(BLOCK_SIZE);
    let end = span.end;
    for offset in span.step_by(PIECE) {
        let length = PIECE.min((end - offset) as usize);
        file.read_exact_at(&mut buffer[..length], offset)?;
        let padded = length.next_multiple_of(BLOCK_SIZE);
        buffer[length..padded].fill(0);
        let (pairs, last) = buffer[..padded].as_chunks().0.as_chunks();
        for pair in pairs {
            match hash_two_blocks(pair) {
                Some(both) => hashes.extend_from_slice(both.as_flattened()),
                None => pair.iter().for_each(|block| hashes.extend(Sha256::digest(block))),
            }
        }
        last.iter().for_each(|block| hashes.extend(Sha256::digest(block)));
    }
    Ok(hash_block(&hashes))
}

/// The hash of a block of the tree: hashes, and zeros behind them.
fn hash_block(hashes: &[u8]) -> Hash {
    let mut block = [0; BLOCK_SIZE];
    block[..hashes.len()].copy_from_slice(hashes);
    Sha256::digest(block).into()
}

/// The digest of a file of more than one block, from the hashes of its spans.
fn digest(size: u64, mut level: Vec<Hash>) -> Digest {
    assert!(size > BLOCK_SIZE as u64, "a file of one block has no tree");
    while level.len() > 1 {
        level = level
            .chunks(BLOCK_SIZE / HASH_SIZE)
            .map(|hashes| hash_block(hashes.as_flattened()))
            .collect();
    }
    // struct fsverity_descriptor: version, algorithm, size of a block as a power of two, of the file.
    let mut descriptor = [0; 256];
    descriptor[..3].copy_from_slice(&[1, 1, 12]);
    descriptor[8..16].copy_from_slice(&size.to_le_bytes());
    descriptor[16..][..HASH_SIZE].copy_from_slice(&level[0]);
    Digest::Sha256(Sha256::digest(descriptor).into())
}

/// Does it in this thread, and in one more for each further core.
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
