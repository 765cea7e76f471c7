//! The limits of a copy: the caller's, the machine's, the cgroup's and the process's.

use std::path::Path;

use rustix::io::Errno;

use crate::image::Compression;
use crate::kernel::procfs::{self, Procfs};
use crate::kernel::{KernelError, Operation};
use crate::source::cgroup::{FullCgroup, full_cgroup};
use crate::source::error::SourceError;
use crate::source::options::SizeLimit;

/// The size of a page, in bytes.
const PAGE_SIZE: u64 = 4096;

/// Checks that a copy of `size` bytes is within the limit and the available memory, of the machine and of the
/// cgroup. If `compression` is set, `size` is the size of the compressed file.
///
/// A memfd has no limit of its own. If memory runs out, the kernel kills processes and does not return
/// ENOSPC.
pub(crate) fn check_limit(
    image: &Path,
    size: u64,
    limit: Option<SizeLimit>,
    compression: Option<Compression>,
    procfs: Option<&Procfs>,
) -> Result<(), SourceError> {
    // Without /proc, the page cache counts as used.
    let (total, available) = match meminfo(procfs) {
        Some(figures) => figures,
        None => sealmount_sys::memory()
            .map(|memory| (memory.total, memory.free))
            .map_err(|errno| KernelError::new(Operation::QueryMemory, errno))?,
    };
    let limit = limit_in_bytes(limit, total);
    let image = || image.to_owned();
    if size > limit {
        return Err(SourceError::LimitExceeded { image: image(), size, limit, compression });
    }
    if size > available {
        return Err(SourceError::NotEnoughMemory { image: image(), size, available, compression });
    }
    match full_cgroup(procfs, size) {
        Some(FullCgroup { path, limit, available }) => Err(SourceError::CgroupLimitExceeded {
            image: image(),
            size,
            cgroup: path,
            limit,
            available,
            compression,
        }),
        None => Ok(()),
    }
}

/// Checks RLIMIT_FSIZE ([getrlimit(2)](https://man7.org/linux/man-pages/man2/getrlimit.2.html)). On a write
/// beyond the limit, the kernel also sends SIGXFSZ, which ends a process that does not handle the signal.
pub(crate) fn check_file_size_limit(image: &Path, size: u64) -> Result<(), KernelError> {
    match sealmount_sys::file_size_limit() {
        Ok(Some(limit)) if size > limit => {
            Err(KernelError::new(Operation::WriteMemory, Errno::FBIG).on(image))
        }
        _ => Ok(()),
    }
}

/// Returns a limit in bytes. The default is half of the memory, as for tmpfs.
fn limit_in_bytes(limit: Option<SizeLimit>, total: u64) -> u64 {
    match limit.unwrap_or(SizeLimit::Percent(50)) {
        SizeLimit::Bytes(0) | SizeLimit::Percent(0) => u64::MAX,
        SizeLimit::Bytes(bytes) => bytes.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX),
        SizeLimit::Percent(percent) => (total / 100).saturating_mul(u64::from(percent)),
    }
}

/// Returns MemTotal and MemAvailable of [proc_meminfo(5)], in bytes.
///
/// [proc_meminfo(5)]: https://man7.org/linux/man-pages/man5/proc_meminfo.5.html
fn meminfo(procfs: Option<&Procfs>) -> Option<(u64, u64)> {
    let meminfo = String::from_utf8(procfs::read_file(procfs, "meminfo")?).ok()?;
    let bytes = |field: &str| -> Option<u64> {
        let value = meminfo.lines().find_map(|line| line.strip_prefix(field))?;
        let kibibytes: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(kibibytes * 1024)
    };
    Some((bytes("MemTotal:")?, bytes("MemAvailable:")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::ErrorKind;

    #[test]
    fn copy_larger_than_limit_is_rejected() {
        let check = |size, limit| {
            let image = Path::new("/some/image.cfs");
            check_limit(image, size, limit, None, None)
        };
        let refused = |result: Result<(), SourceError>, expected: u64| match result {
            Err(SourceError::LimitExceeded { limit, .. }) => assert_eq!(limit, expected),
            result => panic!("{result:?}"),
        };
        refused(check(4097, Some(SizeLimit::Bytes(4096))), 4096);
        check(4096, Some(SizeLimit::Bytes(4096))).unwrap();
        // As tmpfs has it: whole pages, and no limit.
        check(4096, Some(SizeLimit::Bytes(1))).unwrap();
        refused(check(4097, Some(SizeLimit::Bytes(4095))), 4096);
        check(1 << 20, Some(SizeLimit::Bytes(0))).unwrap();
        check(1 << 20, Some(SizeLimit::Percent(0))).unwrap();
        check(1 << 20, Some(SizeLimit::Percent(1000))).unwrap();
        // No limit allows more than the available memory.
        for limit in [
            None,
            Some(SizeLimit::Bytes(0)),
            Some(SizeLimit::Bytes(u64::MAX)),
            Some(SizeLimit::Percent(100)),
            Some(SizeLimit::Percent(u32::MAX)),
        ] {
            let error = check(1 << 46, limit).unwrap_err();
            let expected = [ErrorKind::LimitExceeded, ErrorKind::OutOfMemory];
            assert!(expected.contains(&error.kind()), "{error}");
        }
    }
}
