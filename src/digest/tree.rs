//! The Merkle tree of fs-verity.
//!
//! The digest of a file is the hash of a descriptor. The descriptor holds the size of the file and the root
//! of a Merkle tree over its blocks. The kernel's [fs-verity documentation] defines both. composefs uses
//! blocks of 4096 bytes and no salt.
//!
//! [fs-verity documentation]: https://docs.kernel.org/filesystems/fsverity.html

use std::ops::Range;

use sealmount_sys::{sha256, sha512};
use sha2::{Digest as _, Sha256, Sha512};

use crate::digest::text::{Algorithm, Digest};

/// The size of a block of the Merkle tree, in bytes.
pub(crate) const MERKLE_BLOCK_SIZE: usize = 4096;

/// A block of data, or of hashes.
pub(crate) type Block = [u8; MERKLE_BLOCK_SIZE];

impl Digest {
    /// Computes the fs-verity digest of `data`, with blocks of 4096 bytes and no salt, in the calling
    /// thread.
    pub fn of_bytes(algorithm: Algorithm, data: &[u8]) -> Digest {
        let tree = MerkleTree::new(algorithm, data.len() as u64);
        let spans = data.chunks(tree.span_size()).map(|span| {
            let mut hasher = tree.span_hasher();
            hasher.update(span);
            hasher.finish()
        });
        tree.digest(spans.collect())
    }
}

/// The Merkle tree of a file, in spans that can be hashed in any order.
///
/// A span is the data below one block of the tree's lowest level: 512 KiB with SHA-256, 256 KiB with SHA-512.
/// A span leaves a single hash, so the hashes of 1 GiB need 128 KiB of memory (SHA-256).
#[derive(Clone, Copy, Debug)]
pub(crate) struct MerkleTree {
    algorithm: Algorithm,
    /// The size of the file, in bytes.
    size: u64,
}

/// A hash in the tree. Only the first [`Algorithm::digest_size`] bytes count.
pub(crate) type Hash = [u8; 64];

impl MerkleTree {
    pub fn new(algorithm: Algorithm, size: u64) -> MerkleTree {
        MerkleTree { algorithm, size }
    }

    /// Returns the size of every span except the last, in bytes.
    pub fn span_size(&self) -> usize {
        MERKLE_BLOCK_SIZE / self.algorithm.digest_size() * MERKLE_BLOCK_SIZE
    }

    /// Returns the position of a span in the file, or `None` behind the last span.
    pub fn span(&self, number: u64) -> Option<Range<u64>> {
        let start = number.checked_mul(self.span_size() as u64)?;
        (start < self.size)
            .then(|| start..self.size.min(start.saturating_add(self.span_size() as u64)))
    }

    /// Returns the number of spans.
    pub fn spans(&self) -> usize {
        self.size.div_ceil(self.span_size() as u64) as usize
    }

    /// Returns a hasher for a span.
    pub fn span_hasher(&self) -> SpanHasher {
        SpanHasher { tree: *self, hashes: HashBlock::new(self.algorithm) }
    }

    /// Returns the digest of the file, from the hashes of all spans in order.
    pub fn digest(&self, mut level: Vec<Hash>) -> Digest {
        let size = self.algorithm.digest_size();
        while level.len() > 1 {
            let blocks = level.chunks(MERKLE_BLOCK_SIZE / size);
            level = blocks
                .map(|hashes| {
                    let mut block = HashBlock::new(self.algorithm);
                    hashes.iter().for_each(|hash| block.push(hash));
                    block.hash()
                })
                .collect();
        }
        // The root of an empty file is all zeros.
        self.digest_of_root(level.first().unwrap_or(&[0; 64]))
    }

    /// Returns the digest of the file, from the root of its tree.
    pub fn digest_of_root(&self, root: &Hash) -> Digest {
        let size = self.algorithm.digest_size();
        // struct fsverity_descriptor
        let mut descriptor = [0; 256];
        descriptor[0] = 1; // version
        descriptor[1] = self.algorithm.id() as u8;
        descriptor[2] = MERKLE_BLOCK_SIZE.ilog2() as u8;
        descriptor[8..16].copy_from_slice(&self.size.to_le_bytes());
        descriptor[16..][..size].copy_from_slice(&root[..size]);
        match self.algorithm {
            Algorithm::Sha256 => Digest::Sha256(Sha256::digest(descriptor).into()),
            Algorithm::Sha512 => Digest::Sha512(Sha512::digest(descriptor).into()),
        }
    }
}

/// Hashes one span.
pub(crate) struct SpanHasher {
    tree: MerkleTree,
    hashes: HashBlock,
}

impl SpanHasher {
    /// Adds the next blocks of the span. Only the last block of the file may be short.
    pub fn update(&mut self, data: &[u8]) {
        let (blocks, rest) = data.as_chunks::<MERKLE_BLOCK_SIZE>();
        let algorithm = self.tree.algorithm;
        hash_blocks(algorithm, blocks, blocks.len(), &mut |hash| self.hashes.push(hash));
        if !rest.is_empty() {
            let mut block = [0; MERKLE_BLOCK_SIZE];
            block[..rest.len()].copy_from_slice(rest);
            self.hashes.push(&hash(algorithm, &block));
        }
    }

    pub fn finish(self) -> Hash {
        // The hash of a single block is the root of the tree.
        match self.tree.size <= MERKLE_BLOCK_SIZE as u64 {
            true => self.hashes.first(),
            false => self.hashes.hash(),
        }
    }
}

/// A block of the tree: hashes, and zeros behind the hashes.
struct HashBlock {
    algorithm: Algorithm,
    bytes: [u8; MERKLE_BLOCK_SIZE],
    filled: usize,
}

impl HashBlock {
    fn new(algorithm: Algorithm) -> HashBlock {
        HashBlock { algorithm, bytes: [0; MERKLE_BLOCK_SIZE], filled: 0 }
    }

    fn push(&mut self, hash: &[u8]) {
        let size = self.algorithm.digest_size();
        self.bytes[self.filled..][..size].copy_from_slice(&hash[..size]);
        self.filled += size;
    }

    fn first(&self) -> Hash {
        let mut first = [0; 64];
        first.copy_from_slice(&self.bytes[..64]);
        first
    }

    fn hash(&self) -> Hash {
        hash(self.algorithm, &self.bytes)
    }
}

/// Hashes the first `count` blocks, which may belong to several files. Calls `each` with each hash, in order.
/// The other blocks only fill the last group.
pub(crate) fn hash_blocks(
    algorithm: Algorithm,
    blocks: &[Block],
    count: usize,
    each: &mut dyn FnMut(&[u8]),
) {
    match algorithm {
        Algorithm::Sha256 => hash_by(algorithm, blocks, count, sha256::hash_two_blocks, each),
        Algorithm::Sha512 => hash_by(algorithm, blocks, count, sha512::hash_eight_blocks, each),
    }
}

/// The smallest number of blocks that the CPU hashes faster in a group than one by one. With SHA-256, a
/// group has two blocks.
const GROUP_MIN: usize = 3;

/// Hashes N blocks at a time if the CPU has instructions for that, and the rest one by one.
fn hash_by<const N: usize, const SIZE: usize>(
    algorithm: Algorithm,
    blocks: &[Block],
    count: usize,
    hash_several: impl Fn(&[Block; N]) -> Option<[[u8; SIZE]; N]>,
    each: &mut dyn FnMut(&[u8]),
) {
    let (groups, _) = blocks.as_chunks::<N>();
    let mut done = 0;
    for group in groups {
        let wanted = N.min(count - done);
        if wanted < N.min(GROUP_MIN) {
            break;
        }
        let Some(hashes) = hash_several(group) else { break };
        hashes.iter().take(wanted).for_each(|hash| each(hash));
        done += wanted;
    }
    blocks[done..count].iter().for_each(|block| each(&hash(algorithm, block)));
}

fn hash(algorithm: Algorithm, block: &Block) -> Hash {
    let mut hash = [0; 64];
    match algorithm {
        Algorithm::Sha256 => hash[..32].copy_from_slice(&Sha256::digest(block)),
        Algorithm::Sha512 => hash.copy_from_slice(&Sha512::digest(block)),
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn empty_file_returns_known_digest() {
        assert_eq!(
            Digest::of_bytes(Algorithm::Sha256, b"").to_string(),
            "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95",
        );
    }

    /// The digests are the output of `fsverity digest`. They hold on every architecture, also where sha2
    /// alone hashes.
    #[test]
    fn file_of_many_blocks_returns_known_digest() {
        let content: Vec<u8> = (0..11 * 4096 + 100).map(|n| (n * 7 + n / 251) as u8).collect();
        for (algorithm, expected) in [
            (Algorithm::Sha256, "5b501d957057dcdde144a96d68ef3e00c314da85fe0d24487a7a287c4fd9af11"),
            (
                Algorithm::Sha512,
                "85e36bea93af46363bb5965f7a9aec40baff3ade366849703e538f0dd64440c6\
                 65fd5c4a816be8eb2c253da769273e3e4d4ceaac4b1000a0fd89c9027d6e65a9",
            ),
        ] {
            assert_eq!(Digest::of_bytes(algorithm, &content).to_string(), expected);
        }
    }

    proptest! {
        #[test]
        fn spans_in_any_order_and_pieces_keep_the_digest(
            data: Vec<u8>,
            repeat in 1..20_000usize,
            blocks in 1..200usize,
        ) {
            let data = data.repeat(repeat);
            for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
                let tree = MerkleTree::new(algorithm, data.len() as u64);
                let hash_span = |span: &[u8]| {
                    let mut hasher = tree.span_hasher();
                    span.chunks(blocks * MERKLE_BLOCK_SIZE).for_each(|piece| hasher.update(piece));
                    hasher.finish()
                };
                let mut spans: Vec<_> =
                    data.chunks(tree.span_size()).rev().map(hash_span).collect();
                spans.reverse();
                prop_assert_eq!(tree.digest(spans), Digest::of_bytes(algorithm, &data));
            }
        }
    }
}
