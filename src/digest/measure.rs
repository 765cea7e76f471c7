//! The kernel's measurement of a file's fs-verity digest.

use std::fmt;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FsWord, StatxAttributes, StatxFlags, fstatfs};
use rustix::io::Errno;
use sealmount_sys::fsverity;

use crate::digest::text::{Algorithm, Digest};

/// The magic number of FUSE, of statfs(2).
const FUSE_SUPER_MAGIC: FsWord = 0x6573_5546;

/// The kernel's report on the fs-verity of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VerityStatus {
    /// fs-verity is enabled: the kernel verifies every read against this digest.
    Digest(Digest),
    /// fs-verity is enabled with a hash algorithm that composefs does not use: its `FS_VERITY_HASH_ALG_*`.
    OtherAlgorithm(u16),
    /// The file system and the kernel support fs-verity. The file does not have it enabled.
    NotEnabled,
    /// The file system or the kernel does not support fs-verity.
    Unsupported,
}

impl fmt::Display for VerityStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VerityStatus::Digest(digest) => write!(f, "fs-verity digest {digest}"),
            VerityStatus::OtherAlgorithm(number) => {
                write!(f, "fs-verity with the hash algorithm {number}")
            }
            VerityStatus::NotEnabled => f.write_str("fs-verity is not enabled"),
            VerityStatus::Unsupported => f.write_str("fs-verity is not supported"),
        }
    }
}

impl VerityStatus {
    /// Returns the digest that the kernel enforces, if it is a digest of this algorithm.
    pub(crate) fn digest(self, algorithm: Algorithm) -> Result<Digest, VerityUnavailable> {
        Err(match self {
            VerityStatus::Digest(digest) if digest.algorithm() == algorithm => return Ok(digest),
            VerityStatus::Digest(_) | VerityStatus::OtherAlgorithm(_) => {
                VerityUnavailable::OtherAlgorithm(algorithm)
            }
            VerityStatus::NotEnabled => VerityUnavailable::NotEnabled,
            VerityStatus::Unsupported => VerityUnavailable::Unsupported,
        })
    }
}

/// Measures the fs-verity digest of an open file or directory (FS_IOC_MEASURE_VERITY, Linux 5.4).
pub(crate) fn measure(file: impl AsFd) -> Result<VerityStatus, Errno> {
    match fsverity::measure(&file) {
        Ok(_) if !is_verified_by_kernel(&file)? => Ok(VerityStatus::Unsupported),
        Ok(measurement) => Ok(match from_kernel(&measurement) {
            Some(digest) => VerityStatus::Digest(digest),
            None => VerityStatus::OtherAlgorithm(measurement.hash_algorithm()),
        }),
        Err(Errno::NODATA) => Ok(VerityStatus::NotEnabled),
        // EOPNOTSUPP: the file system supports fs-verity, but the kernel or the superblock lacks the
        // feature. ENOTTY: the file system does not know fs-verity.
        Err(Errno::NOTTY | Errno::OPNOTSUPP) => Ok(VerityStatus::Unsupported),
        Err(errno) => Err(errno),
    }
}

/// Returns whether the kernel itself verifies reads of a file whose digest was reported.
///
/// FUSE hands the ioctl on to its server, which may be any program, and does not verify reads. So far, FUSE
/// does not report the attribute either. Other file systems may hand ioctls on later.
fn is_verified_by_kernel(file: impl AsFd) -> Result<bool, Errno> {
    let file = file.as_fd();
    let statx = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    Ok(statx.stx_attributes.contains(StatxAttributes::VERITY)
        && fstatfs(file)?.f_type != FUSE_SUPER_MAGIC)
}

fn from_kernel(measurement: &fsverity::Measurement) -> Option<Digest> {
    let digest = measurement.digest();
    match measurement.hash_algorithm() {
        fsverity::HASH_ALG_SHA256 => digest.try_into().ok().map(Digest::Sha256),
        fsverity::HASH_ALG_SHA512 => digest.try_into().ok().map(Digest::Sha512),
        _ => None,
    }
}

/// The reason why the kernel does not verify reads of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerityUnavailable {
    /// The file system or the kernel does not support fs-verity.
    #[error(
        "the kernel or the file system does not support fs-verity, or the feature is switched off"
    )]
    Unsupported,
    /// The file system supports fs-verity. The file does not have it enabled.
    #[error("fs-verity is not enabled on the file")]
    NotEnabled,
    /// The file has fs-verity with another hash algorithm than the expected digest.
    #[error("the fs-verity digest of the file is not a {0} digest")]
    OtherAlgorithm(Algorithm),
    /// The image does not hold the digest of an object, so overlayfs cannot compare it.
    #[error("the image does not hold the fs-verity digest of an object")]
    NoDigest,
}
