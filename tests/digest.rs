//! Compares digests with the output of `fsverity digest` of fsverity-utils.

use std::fs::File;
use std::io::Write;
use std::process::Command;

use proptest::prelude::*;
use sealmount::{Algorithm, Digest};

/// Returns the digest that fsverity prints for each of these contents.
fn fsverity(algorithm: Algorithm, contents: &[Vec<u8>]) -> Vec<Digest> {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let paths: Vec<_> = (0..contents.len()).map(|n| directory.path().join(n.to_string())).collect();
    for (path, content) in paths.iter().zip(contents) {
        File::create(path).unwrap().write_all(content).unwrap();
    }
    let output = Command::new("fsverity")
        .args(["digest", "--compact", &format!("--hash-alg={algorithm}")])
        .args(&paths)
        .output()
        .expect("this test needs the program fsverity (Debian: apt-get install fsverity)");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

fn content(seed: u64, size: usize) -> Vec<u8> {
    // The content is not zeros, so that an off-by-one error in the padding shows.
    let mut state = seed | 1;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8 | 1
    };
    (0..size).map(|_| next()).collect()
}

/// Returns a file with this content.
fn memory_file(content: &[u8]) -> File {
    let memfd = rustix::fs::memfd_create("content", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(memfd);
    file.write_all(content).unwrap();
    file
}

fn assert_agrees(contents: &[Vec<u8>]) {
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        let expected = fsverity(algorithm, contents);
        for (content, expected) in contents.iter().zip(expected) {
            let found = [
                Digest::of_bytes(algorithm, content),
                Digest::of_reader(algorithm, content.as_slice()).unwrap(),
                Digest::of_file(algorithm, memory_file(content)).unwrap(),
            ];
            assert_eq!(found, [expected; 3], "{algorithm} of {} bytes", content.len());
        }
    }
}

#[test]
fn boundary_sizes_return_digest_of_fsverity() {
    const BLOCK: usize = 4096;
    // A block holds 128 SHA-256 or 64 SHA-512 hashes. Up to that number of blocks, the tree has one
    // level. Up to the square of that number, the tree has two levels.
    let boundaries = [0, 1, 2, 64, 128, 64 * 64, 128 * 128].map(|blocks| blocks * BLOCK);
    let sizes = boundaries.iter().flat_map(|size| [size.saturating_sub(1), *size, size + 1]);
    for size in sizes {
        assert_agrees(&[content(size as u64, size)]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn any_size_returns_digest_of_fsverity(seeds in prop::collection::vec((any::<u64>(), 0..1_500_000usize), 1..6)) {
        let contents: Vec<_> = seeds.iter().map(|(seed, size)| content(*seed, *size)).collect();
        assert_agrees(&contents);
    }
}
