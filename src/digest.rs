//! fs-verity digests: their text, the kernel's measurement, and the computation in user space.
//!
//! The digest of a file is the hash of a descriptor that holds the file's size and the root of a
//! Merkle tree over its blocks. The kernel's [fs-verity documentation] defines both; composefs uses
//! blocks of 4096 bytes and no salt.
//!
//! [fs-verity documentation]: https://docs.kernel.org/filesystems/fsverity.html

use std::fmt;
use std::ops::Range;
use std::os::fd::AsFd;
use std::str::FromStr;

use rustix::fs::{AtFlags, FsWord, StatxAttributes, StatxFlags, fstatfs};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256, Sha512};

use sealmount_sys::{fsverity, sha256, sha512};

/// Of statfs(2).
const FUSE_SUPER_MAGIC: FsWord = 0x6573_5546;

/// The size of a block of the Merkle tree, in bytes.
pub const BLOCK_SIZE: usize = 4096;

/// The hash algorithm of an fs-verity digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// SHA-256: digests of 32 bytes.
    Sha256,
    /// SHA-512: digests of 64 bytes.
    Sha512,
}

impl Algorithm {
    /// The size of a digest, in bytes.
    pub const fn digest_size(self) -> usize {
        match self {
            Algorithm::Sha256 => 32,
            Algorithm::Sha512 => 64,
        }
    }

    /// `FS_VERITY_HASH_ALG_*`
    const fn id(self) -> u16 {
        match self {
            Algorithm::Sha256 => fsverity::HASH_ALG_SHA256,
            Algorithm::Sha512 => fsverity::HASH_ALG_SHA512,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        })
    }
}

/// The fs-verity digest of a file.
///
/// Its text is 64 (SHA-256) or 128 (SHA-512) hexadecimal digits, as `fsverity digest --compact`
/// prints them, optionally behind `sha256:` or `sha512:`.
///
/// ```
/// use sealmount::Digest;
///
/// let digest: Digest =
///     "sha256:3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95".parse()?;
/// assert_eq!(digest, sealmount::compute_digest(digest.algorithm(), b""));
/// # Ok::<(), sealmount::ParseDigestError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Digest {
    /// A SHA-256 digest.
    Sha256([u8; 32]),
    /// A SHA-512 digest.
    Sha512([u8; 64]),
}

impl Digest {
    /// The hash algorithm, which the length of the digest tells.
    pub const fn algorithm(&self) -> Algorithm {
        match self {
            Digest::Sha256(_) => Algorithm::Sha256,
            Digest::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// The bytes of the digest.
    pub const fn as_bytes(&self) -> &[u8] {
        match self {
            Digest::Sha256(bytes) => bytes,
            Digest::Sha512(bytes) => bytes,
        }
    }

    fn from_kernel(measurement: &fsverity::Measurement) -> Option<Digest> {
        let digest = measurement.digest();
        match measurement.hash_algorithm() {
            fsverity::HASH_ALG_SHA256 => digest.try_into().ok().map(Digest::Sha256),
            fsverity::HASH_ALG_SHA512 => digest.try_into().ok().map(Digest::Sha512),
            _ => None,
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{self}", self.algorithm())
    }
}

/// Why a text is not an fs-verity digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseDigestError {
    /// Neither 64 nor 128 digits.
    #[error("{0} characters long, not 64 (SHA-256) or 128 (SHA-512) hexadecimal digits")]
    Length(usize),
    /// A character that is not a hexadecimal digit.
    #[error("{0:?} is not a hexadecimal digit")]
    Character(char),
    /// `sha256:` before a SHA-512 digest, or the reverse.
    #[error("the prefix {prefix}: does not go with {digits} hexadecimal digits")]
    Prefix {
        /// The algorithm of the prefix.
        prefix: Algorithm,
        /// How many digits came behind it.
        digits: usize,
    },
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Digest, ParseDigestError> {
        let (prefix, hex) = if let Some(hex) = text.strip_prefix("sha256:") {
            (Some(Algorithm::Sha256), hex)
        } else if let Some(hex) = text.strip_prefix("sha512:") {
            (Some(Algorithm::Sha512), hex)
        } else {
            (None, text)
        };
        if let Some(wrong) = hex.chars().find(|character| !character.is_ascii_hexdigit()) {
            return Err(ParseDigestError::Character(wrong));
        }
        let digest = match hex.len() {
            64 => Digest::Sha256(decode(hex)),
            128 => Digest::Sha512(decode(hex)),
            digits => return Err(ParseDigestError::Length(digits)),
        };
        match prefix {
            Some(prefix) if prefix != digest.algorithm() => {
                Err(ParseDigestError::Prefix { prefix, digits: hex.len() })
            }
            _ => Ok(digest),
        }
    }
}

/// Decodes 2 × N hexadecimal digits. What is not a digit was refused before.
fn decode<const N: usize>(hex: &str) -> [u8; N] {
    let value = |digit: u8| char::from(digit).to_digit(16).unwrap_or(0) as u8;
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = value(pair[0]) << 4 | value(pair[1]);
    }
    bytes
}

/// What the kernel says of the fs-verity of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measured {
    /// The file has it: every read of it is verified against this digest.
    Digest(Digest),
    /// The file has it, with a hash algorithm that composefs does not use.
    OtherAlgorithm(u16),
    /// The file system, or the kernel, supports it; the file does not have it.
    NotEnabled,
    /// The file system, or the kernel, does not support it.
    Unsupported,
}

/// Asks the kernel for the fs-verity digest of an open file or directory.
pub(crate) fn measure(file: impl AsFd) -> Result<Measured, Errno> {
    match fsverity::measure(&file) {
        Ok(_) if !is_verified_by_kernel(&file)? => Ok(Measured::Unsupported),
        Ok(measurement) => Ok(match Digest::from_kernel(&measurement) {
            Some(digest) => Measured::Digest(digest),
            None => Measured::OtherAlgorithm(measurement.hash_algorithm()),
        }),
        Err(Errno::NODATA) => Ok(Measured::NotEnabled),
        // EOPNOTSUPP comes from a file system that could, in a kernel or on a superblock without
        // the feature; ENOTTY from one that never heard of it.
        Err(Errno::NOTTY | Errno::OPNOTSUPP) => Ok(Measured::Unsupported),
        Err(errno) => Err(errno),
    }
}

/// Whether it is the kernel that verifies what is read of a file for which something has answered with
/// a digest: FUSE hands the question on to its server, which may be anyone's program, and verifies
/// nothing. It does not tell the attribute either, so far; other file systems that hand ioctls on may be
/// to come.
fn is_verified_by_kernel(file: impl AsFd) -> Result<bool, Errno> {
    let file = file.as_fd();
    let statx = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    Ok(statx.stx_attributes.contains(StatxAttributes::VERITY)
        && fstatfs(file)?.f_type != FUSE_SUPER_MAGIC)
}

/// Computes the fs-verity digest of `data`: 4096-byte blocks, no salt.
pub fn compute_digest(algorithm: Algorithm, data: &[u8]) -> Digest {
    let tree = MerkleTree::new(algorithm, data.len() as u64);
    let spans = data.chunks(tree.span_size()).map(|span| {
        let mut hasher = tree.span_hasher();
        hasher.update(span);
        hasher.finish()
    });
    tree.digest(spans.collect())
}

/// The Merkle tree of a file of known size, in spans that can be hashed in any order.
///
/// A span is the data below one block of the tree's lowest level: 512 KiB with SHA-256, 256 KiB with
/// SHA-512. What remains of it is a single hash, so the tree of a gigabyte takes 64 KiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MerkleTree {
    algorithm: Algorithm,
    /// The size of the file, in bytes.
    size: u64,
}

/// A hash in the tree; the digest size of the algorithm says how much of it counts.
pub(crate) type Hash = [u8; 64];

impl MerkleTree {
    pub fn new(algorithm: Algorithm, size: u64) -> MerkleTree {
        MerkleTree { algorithm, size }
    }

    /// The size of every span but the last, in bytes.
    pub fn span_size(&self) -> usize {
        BLOCK_SIZE / self.algorithm.digest_size() * BLOCK_SIZE
    }

    /// Where a span lies in the file, if it has that many.
    pub fn span(&self, number: u64) -> Option<Range<u64>> {
        let start = number.checked_mul(self.span_size() as u64)?;
        (start < self.size).then(|| start..self.size.min(start + self.span_size() as u64))
    }

    /// A hasher for the next span.
    pub fn span_hasher(&self) -> SpanHasher {
        SpanHasher { tree: *self, hashes: HashBlock::new(self.algorithm) }
    }

    /// The digest of the file, from the hashes of all spans in their order.
    pub fn digest(&self, mut level: Vec<Hash>) -> Digest {
        let size = self.algorithm.digest_size();
        while level.len() > 1 {
            let blocks = level.chunks(BLOCK_SIZE / size);
            level = blocks
                .map(|hashes| {
                    let mut block = HashBlock::new(self.algorithm);
                    hashes.iter().for_each(|hash| block.push(hash));
                    block.hash()
                })
                .collect();
        }
        // The root of an empty file is all zeros.
        let root = level.first().copied().unwrap_or([0; 64]);
        // struct fsverity_descriptor
        let mut descriptor = [0; 256];
        descriptor[0] = 1; // version
        descriptor[1] = self.algorithm.id() as u8;
        descriptor[2] = BLOCK_SIZE.ilog2() as u8;
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
    /// Takes the next blocks of the span; only the last one of the file may be short.
    pub fn update(&mut self, data: &[u8]) {
        let (blocks, rest) = data.as_chunks::<BLOCK_SIZE>();
        match self.tree.algorithm {
            Algorithm::Sha256 => self.update_by(blocks, sha256::hash_two_blocks),
            Algorithm::Sha512 => self.update_by(blocks, sha512::hash_eight_blocks),
        }
        if !rest.is_empty() {
            let mut block = [0; BLOCK_SIZE];
            block[..rest.len()].copy_from_slice(rest);
            self.hashes.push(&hash(self.tree.algorithm, &block));
        }
    }

    /// Hashes N blocks at a time, where the processor has instructions for it, and what remains one
    /// by one.
    fn update_by<const N: usize, const SIZE: usize>(
        &mut self,
        blocks: &[[u8; BLOCK_SIZE]],
        hash_several: impl Fn(&[[u8; BLOCK_SIZE]; N]) -> Option<[[u8; SIZE]; N]>,
    ) {
        let (groups, rest) = blocks.as_chunks::<N>();
        for group in groups {
            match hash_several(group) {
                Some(hashes) => hashes.iter().for_each(|hash| self.hashes.push(hash)),
                None => self.update_singly(group),
            }
        }
        self.update_singly(rest);
    }

    fn update_singly(&mut self, blocks: &[[u8; BLOCK_SIZE]]) {
        for block in blocks {
            self.hashes.push(&hash(self.tree.algorithm, block));
        }
    }

    pub fn finish(self) -> Hash {
        // The hash of a single block is the root itself: there is nothing to hash it with.
        match self.tree.size <= BLOCK_SIZE as u64 {
            true => self.hashes.first(),
            false => self.hashes.hash(),
        }
    }
}

/// A block of the tree: hashes, and zeros behind them.
struct HashBlock {
    algorithm: Algorithm,
    bytes: [u8; BLOCK_SIZE],
    filled: usize,
}

impl HashBlock {
    fn new(algorithm: Algorithm) -> HashBlock {
        HashBlock { algorithm, bytes: [0; BLOCK_SIZE], filled: 0 }
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

fn hash(algorithm: Algorithm, block: &[u8; BLOCK_SIZE]) -> Hash {
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
    fn the_empty_file() {
        assert_eq!(
            compute_digest(Algorithm::Sha256, b"").to_string(),
            "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95",
        );
    }

    #[test]
    fn what_is_no_digest_is_refused() {
        let digits = "0".repeat(64);
        let parse = |text: &str| text.parse::<Digest>();
        assert_eq!(parse(""), Err(ParseDigestError::Length(0)));
        assert_eq!(parse(&digits[1..]), Err(ParseDigestError::Length(63)));
        assert_eq!(parse(&format!("{}g", &digits[1..])), Err(ParseDigestError::Character('g')));
        assert_eq!(parse(&format!("{}é", &digits[2..])), Err(ParseDigestError::Character('é')));
        assert_eq!(parse(&format!("md5:{digits}")), Err(ParseDigestError::Character('m')));
        assert_eq!(
            parse(&format!("sha512:{digits}")),
            Err(ParseDigestError::Prefix { prefix: Algorithm::Sha512, digits: 64 }),
        );
        assert!(parse(&format!("sha256:{digits}")).is_ok());
    }

    fn digests() -> impl Strategy<Value = Digest> {
        prop_oneof![
            any::<[u8; 32]>().prop_map(Digest::Sha256),
            any::<[u8; 64]>().prop_map(Digest::Sha512),
        ]
    }

    proptest! {
        #[test]
        fn text_survives(digest in digests(), upper: bool, prefix: bool) {
            let mut text = digest.to_string();
            if upper {
                text.make_ascii_uppercase();
            }
            if prefix {
                text = format!("{}:{text}", digest.algorithm());
            }
            prop_assert_eq!(text.parse(), Ok(digest));
        }

        #[test]
        fn arbitrary_text_is_a_digest_or_refused(text in ".*") {
            if let Ok(digest) = text.parse::<Digest>() {
                let hex = text.rsplit(':').next().map(str::to_ascii_lowercase);
                prop_assert_eq!(Some(digest.to_string()), hex);
            }
        }

        #[test]
        fn order_and_pieces_do_not_matter(
            data: Vec<u8>,
            repeat in 1..20_000usize,
            blocks in 1..200usize,
        ) {
            let data = data.repeat(repeat);
            for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
                let tree = MerkleTree::new(algorithm, data.len() as u64);
                let hash_span = |span: &[u8]| {
                    let mut hasher = tree.span_hasher();
                    span.chunks(blocks * BLOCK_SIZE).for_each(|piece| hasher.update(piece));
                    hasher.finish()
                };
                let mut spans: Vec<_> =
                    data.chunks(tree.span_size()).rev().map(hash_span).collect();
                spans.reverse();
                prop_assert_eq!(tree.digest(spans), compute_digest(algorithm, &data));
            }
        }
    }
}
