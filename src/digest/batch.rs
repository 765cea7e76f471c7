//! Digests of many small files, hashed together.
//!
//! The CPU hashes a group of several independent blocks in the time of one or two blocks. A small file does
//! not have enough blocks for a group, so several files share a group.

use rustix::io::Errno;

use crate::digest::text::{Algorithm, Digest};
use crate::digest::tree::{Block, Hash, MERKLE_BLOCK_SIZE, MerkleTree, hash_blocks};
use crate::util::memory::try_filled;

/// The number of blocks of a batch. With this number, a file of a batch has at most one block of hashes.
const BLOCKS: usize = 64;

/// Small files that are hashed together. `T` identifies a file.
pub(crate) struct Batch<T> {
    algorithm: Algorithm,
    blocks: Vec<Block>,
    /// The number of blocks in use.
    used: usize,
    files: Vec<(T, u64)>,
    /// The hashes of the blocks, and then the roots of the trees.
    hashes: Vec<Hash>,
    /// For each file with more than one block, its block of hashes.
    trees: Vec<Block>,
}

impl<T> Batch<T> {
    /// The size of the largest file that is hashed together with others, in bytes.
    pub const FILE_MAX: usize = BLOCKS * MERKLE_BLOCK_SIZE;

    /// Makes an empty batch.
    pub fn new() -> Result<Batch<T>, Errno> {
        Ok(Batch {
            algorithm: Algorithm::Sha256,
            blocks: try_filled(BLOCKS, [0; MERKLE_BLOCK_SIZE])?,
            used: 0,
            files: Vec::new(),
            hashes: try_filled(BLOCKS, [0; 64])?,
            trees: try_filled(BLOCKS / 2, [0; MERKLE_BLOCK_SIZE])?,
        })
    }

    /// Returns whether the batch has room for a file.
    pub fn has_room(&self, algorithm: Algorithm, size: u64) -> bool {
        let is_empty = self.files.is_empty();
        let blocks = size.div_ceil(MERKLE_BLOCK_SIZE as u64);
        (is_empty || self.algorithm == algorithm)
            && self.files.len() < BLOCKS
            && blocks <= (BLOCKS - self.used) as u64
    }

    /// Returns the buffer for the content of the next file, for which there must be room.
    pub fn buffer(&mut self, size: u64) -> &mut [u8] {
        &mut self.blocks[self.used..].as_flattened_mut()[..size as usize]
    }

    /// Returns the whole buffer. The batch must be empty.
    pub fn whole_buffer(&mut self) -> &mut [u8] {
        debug_assert!(self.files.is_empty());
        self.blocks.as_flattened_mut()
    }

    /// Adds the file whose content is in the buffer.
    pub fn push(&mut self, file: T, algorithm: Algorithm, size: u64) {
        let end = (size as usize).next_multiple_of(MERKLE_BLOCK_SIZE);
        // The last block of a file is padded with zeros.
        self.blocks[self.used..].as_flattened_mut()[size as usize..end].fill(0);
        self.used += end / MERKLE_BLOCK_SIZE;
        self.algorithm = algorithm;
        self.files.push((file, size));
    }

    /// Hashes the files and removes them. Calls `each` with each file and its digest, in order.
    pub fn finish(&mut self, mut each: impl FnMut(T, Digest)) {
        let algorithm = self.algorithm;
        let leaves = hash_into(algorithm, &self.blocks, self.used, &mut self.hashes);
        let mut trees = 0;
        let mut leaf = 0;
        for (_, size) in &self.files {
            let blocks = blocks_of(*size);
            if blocks > 1 {
                fill(&mut self.trees[trees], algorithm, &leaves[leaf..][..blocks]);
                trees += 1;
            }
            leaf += blocks;
        }
        let mut roots = [[0; 64]; BLOCKS / 2];
        hash_into(algorithm, &self.trees, trees, &mut roots);
        let (mut root, mut leaf) = (roots.iter(), 0);
        for (file, size) in self.files.drain(..) {
            let blocks = blocks_of(size);
            let hash = match blocks {
                0 => &[0; 64],
                // The hash of a single block is the root of the tree.
                1 => &leaves[leaf],
                _ => root.next().unwrap_or(&[0; 64]),
            };
            each(file, MerkleTree::new(algorithm, size).digest_of_root(hash));
            leaf += blocks;
        }
        self.used = 0;
    }
}

fn blocks_of(size: u64) -> usize {
    size.div_ceil(MERKLE_BLOCK_SIZE as u64) as usize
}

/// Fills a block of the tree with hashes, and zeros behind the hashes.
fn fill(block: &mut Block, algorithm: Algorithm, hashes: &[Hash]) {
    let size = algorithm.digest_size();
    let (filled, rest) = block.split_at_mut(hashes.len() * size);
    for (place, hash) in filled.chunks_exact_mut(size).zip(hashes) {
        place.copy_from_slice(&hash[..size]);
    }
    rest.fill(0);
}

/// Hashes the first `count` blocks into `hashes`, which has room for all. Returns the hashes.
fn hash_into<'a>(
    algorithm: Algorithm,
    blocks: &[Block],
    count: usize,
    hashes: &'a mut [Hash],
) -> &'a [Hash] {
    let mut places = hashes.iter_mut();
    hash_blocks(algorithm, blocks, count, &mut |hash| {
        if let Some(place) = places.next() {
            place[..hash.len().min(64)].copy_from_slice(&hash[..hash.len().min(64)]);
        }
    });
    hashes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn batched_files_have_the_digest_of_their_bytes(
            sizes in proptest::collection::vec(0..40_000usize, 1..60),
            seed: u8,
        ) {
            for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
                let mut batch = Batch::new().unwrap();
                let mut found = Vec::new();
                let content = |number: usize, size: usize| -> Vec<u8> {
                    (0..size).map(|n| (n / 4096 * 31 + n + number) as u8 ^ seed).collect()
                };
                for (number, size) in sizes.iter().enumerate() {
                    if !batch.has_room(algorithm, *size as u64) {
                        batch.finish(|number, digest| found.push((number, digest)));
                    }
                    batch.buffer(*size as u64).copy_from_slice(&content(number, *size));
                    batch.push(number, algorithm, *size as u64);
                }
                batch.finish(|number, digest| found.push((number, digest)));
                let expected = sizes.iter().enumerate().map(|(number, size)| {
                    (number, Digest::of_bytes(algorithm, &content(number, *size)))
                });
                prop_assert_eq!(found, expected.collect::<Vec<_>>());
            }
        }
    }
}
