//! The limits of a copy: the caller's, the machine's, the cgroup's and the process's.

use std::path::Path;

use rustix::io::Errno;

use crate::image::Compression;
use crate::kernel::procfs::{self, Procfs};
use crate::kernel::{KernelError, Operation};
use crate::source::cgroup::{LimitedCgroup, tightest_cgroup};
use crate::source::error::SourceError;
use crate::source::options::SizeLimit;
use crate::util::pages::whole_pages;

/// The memory that a copy needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    /// The size of the image, in bytes. If `compression` is set, the size of the compressed file.
    pub size: u64,
    /// The memory of the decoder, in bytes: its window and its buffers.
    pub decoder: u64,
    /// The bytes of `size` and `decoder` that are allocated already.
    pub allocated: u64,
    /// The compression of the file, if the size of the image is not known yet.
    pub compression: Option<Compression>,
}

impl Need {
    /// Returns the need of a copy without a decoder.
    pub fn of_size(size: u64) -> Need {
        Need { size, decoder: 0, allocated: 0, compression: None }
    }
}

/// Checks that a copy is within the limit and the available memory, of the machine and of the cgroup. The
/// decoder counts as memory, and does not count for the limit. Returns the number of bytes that stay
/// available, or a lower number.
///
/// A memfd has no limit of its own. If memory runs out, the kernel kills processes and does not return
/// ENOSPC.
pub(crate) fn check_limit(
    image: &Path,
    need: Need,
    limit: Option<SizeLimit>,
    procfs: Option<&Procfs>,
) -> Result<u64, SourceError> {
    let Need { size, decoder, allocated, compression } = need;
    // The kernel allocates whole pages. A limit in whole pages needs no rounded size.
    let needed = whole_pages(size).saturating_add(decoder);
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
    let available = available.saturating_add(allocated);
    if needed > available {
        let image = image();
        return Err(SourceError::NotEnoughMemory { image, size, decoder, available, compression });
    }
    let cgroup = tightest_cgroup(procfs, needed.saturating_sub(allocated));
    let Some(LimitedCgroup { path: cgroup, limit, available: in_cgroup }) = cgroup else {
        return Ok(available - needed);
    };
    let in_cgroup = in_cgroup.saturating_add(allocated);
    if needed > in_cgroup {
        return Err(SourceError::CgroupLimitExceeded {
            image: image(),
            size,
            decoder,
            cgroup,
            limit,
            available: in_cgroup,
            compression,
        });
    }
    Ok(available.min(in_cgroup) - needed)
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

/// Returns a limit in bytes, in whole pages as for tmpfs. The default is half of the memory.
fn limit_in_bytes(limit: Option<SizeLimit>, total: u64) -> u64 {
    match limit.unwrap_or(SizeLimit::Percent(50)) {
        SizeLimit::Bytes(0) | SizeLimit::Percent(0) => u64::MAX,
        SizeLimit::Bytes(bytes) => whole_pages(bytes),
        SizeLimit::Percent(percent) => {
            whole_pages((total / 100).saturating_mul(u64::from(percent)))
        }
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
            check_limit(image, Need::of_size(size), limit, None).map(drop)
        };
        let refused = |result: Result<(), SourceError>, expected: u64| match result {
            Err(SourceError::LimitExceeded { limit, .. }) => assert_eq!(limit, expected),
            result => panic!("{result:?}"),
        };
        let page = sealmount_sys::page_size() as u64;
        refused(check(page + 1, Some(SizeLimit::Bytes(page))), page);
        check(page, Some(SizeLimit::Bytes(page))).unwrap();
        // As tmpfs has it: whole pages, and no limit.
        check(page, Some(SizeLimit::Bytes(1))).unwrap();
        refused(check(page + 1, Some(SizeLimit::Bytes(page - 1))), page);
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
