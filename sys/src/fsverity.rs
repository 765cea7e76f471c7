//! fs-verity: read-only files. The kernel checks every read of them against a Merkle tree.
//!
//! See the kernel's [fs-verity documentation].
//!
//! [fs-verity documentation]: https://docs.kernel.org/filesystems/fsverity.html

use std::os::fd::AsFd;

use linux_raw_sys::ioctl::{FS_IOC_ENABLE_VERITY, FS_IOC_MEASURE_VERITY};
use rustix::io;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl};

/// `FS_VERITY_HASH_ALG_SHA256`
pub const HASH_ALG_SHA256: u16 = 1;
/// `FS_VERITY_HASH_ALG_SHA512`
pub const HASH_ALG_SHA512: u16 = 2;

/// `FS_VERITY_MAX_DIGEST_SIZE`, in bytes.
const MAX_DIGEST_SIZE: usize = 64;

/// `struct fsverity_digest`, with room for the longest digest.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct FsverityDigest {
    digest_algorithm: u16,
    digest_size: u16,
    digest: [u8; MAX_DIGEST_SIZE],
}

/// The digest of a file with fs-verity, as the kernel reports it.
#[derive(Debug, Clone, Copy)]
pub struct Measurement {
    raw: FsverityDigest,
}

impl Measurement {
    /// Returns [`HASH_ALG_SHA256`], [`HASH_ALG_SHA512`], or a later algorithm.
    pub fn hash_algorithm(&self) -> u16 {
        self.raw.digest_algorithm
    }

    /// Returns the fs-verity digest of the file.
    pub fn digest(&self) -> &[u8] {
        let size = usize::from(self.raw.digest_size).min(MAX_DIGEST_SIZE);
        &self.raw.digest[..size]
    }
}

/// Measures the fs-verity digest of an open file ([`FS_IOC_MEASURE_VERITY`], Linux 5.4).
///
/// # Errors
///
/// `ENODATA`: the file system supports fs-verity, and the file does not have it. `ENOTTY`,
/// `EOPNOTSUPP`: the file system or the kernel does not support fs-verity.
///
/// [`FS_IOC_MEASURE_VERITY`]: https://docs.kernel.org/filesystems/fsverity.html#fs-ioc-measure-verity
pub fn measure(file: impl AsFd) -> io::Result<Measurement> {
    let mut raw = FsverityDigest {
        digest_algorithm: 0,
        digest_size: MAX_DIGEST_SIZE as u16,
        digest: [0; MAX_DIGEST_SIZE],
    };
    // SAFETY: the opcode is FS_IOC_MEASURE_VERITY, whose argument is a struct fsverity_digest. The kernel
    // writes at most digest_size bytes behind its two fields, and the struct has room for them.
    unsafe { ioctl(file, Updater::<{ FS_IOC_MEASURE_VERITY as Opcode }, _>::new(&mut raw))? };
    Ok(Measurement { raw })
}

/// `struct fsverity_enable_arg`
#[repr(C)]
struct FsverityEnableArg {
    version: u32,
    hash_algorithm: u32,
    block_size: u32,
    salt_size: u32,
    salt_ptr: u64,
    sig_size: u32,
    reserved1: u32,
    sig_ptr: u64,
    reserved2: [u64; 11],
}

/// Enables fs-verity on a file ([`FS_IOC_ENABLE_VERITY`], Linux 5.4). The file cannot be written any more,
/// and the kernel verifies every read. Blocks have 4096 bytes, without salt and signature, as in composefs.
///
/// `file` must be open for reading only, and no descriptor of it may be open for writing.
/// `hash_algorithm` is [`HASH_ALG_SHA256`] or [`HASH_ALG_SHA512`].
///
/// # Errors
///
/// `ENOTTY`, `EOPNOTSUPP`: the file system or the kernel does not support fs-verity. `EEXIST`: the file
/// has fs-verity already. `ETXTBSY`: the file is open for writing.
///
/// [`FS_IOC_ENABLE_VERITY`]: https://docs.kernel.org/filesystems/fsverity.html#fs-ioc-enable-verity
pub fn enable(file: impl AsFd, hash_algorithm: u16) -> io::Result<()> {
    let arg = FsverityEnableArg {
        version: 1,
        hash_algorithm: u32::from(hash_algorithm),
        block_size: 4096,
        salt_size: 0,
        salt_ptr: 0,
        sig_size: 0,
        reserved1: 0,
        sig_ptr: 0,
        reserved2: [0; 11],
    };
    // SAFETY: the opcode is FS_IOC_ENABLE_VERITY, whose argument is a struct fsverity_enable_arg,
    // only read by the kernel; salt and signature are of size zero.
    unsafe { ioctl(file, Setter::<{ FS_IOC_ENABLE_VERITY as Opcode }, _>::new(arg)) }
}
