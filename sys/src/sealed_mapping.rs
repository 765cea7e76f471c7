//! A mapping of a sealed memfd, which no process can change.

use std::ffi::c_void;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::{NonNull, null_mut};
use std::slice;

use rustix::fs::{FsWord, SealFlags, SeekFrom, fcntl_get_seals, fstat, fstatfs, seek};
use rustix::io::{Errno, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The magic number of tmpfs, of statfs(2).
pub const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// The bytes of a sealed memfd ([mmap(2)](https://man7.org/linux/man-pages/man2/mmap.2.html)).
#[derive(Debug)]
pub struct SealedMapping {
    start: NonNull<c_void>,
    length: usize,
}

// SAFETY: no thread can write to the mapping.
unsafe impl Send for SealedMapping {}
// SAFETY: as for Send.
unsafe impl Sync for SealedMapping {}

impl SealedMapping {
    /// Maps all bytes of a memfd with the seals `F_SEAL_WRITE` and `F_SEAL_SHRINK`. Meanwhile the position of
    /// the descriptor moves. If a swap device fails to return a page, a read of the bytes raises SIGBUS.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the file lacks a seal, has huge pages, or has a hole. A read of a hole through a mapping
    ///   allocates memory.
    /// - `ENXIO`: the file is empty.
    /// - The errno of another failed system call.
    pub fn new(memfd: impl AsFd) -> Result<SealedMapping> {
        let seals = SealFlags::WRITE | SealFlags::SHRINK;
        let is_sealed = fcntl_get_seals(&memfd)?.contains(seals);
        let size = fstat(&memfd)?.st_size as u64;
        if !is_sealed || fstatfs(&memfd)?.f_type != TMPFS_MAGIC || first_hole(&memfd)? != size {
            return Err(Errno::INVAL);
        }
        // No slice is longer than isize::MAX.
        let length = isize::try_from(size).map_err(|_| Errno::NOMEM)? as usize;
        // SAFETY: the kernel chooses the place, so the mapping overlaps no other one.
        let start =
            unsafe { mmap(null_mut(), length, ProtFlags::READ, MapFlags::PRIVATE, memfd, 0)? };
        let start = NonNull::new(start).ok_or(Errno::NOMEM)?;
        Ok(SealedMapping { start, length })
    }
}

/// Returns the position of the first hole, or the size of a file without holes. The position of the
/// descriptor is the same afterwards.
fn first_hole(file: impl AsFd) -> Result<u64> {
    let position = seek(&file, SeekFrom::Current(0))?;
    let hole = seek(&file, SeekFrom::Hole(0));
    seek(&file, SeekFrom::Start(position))?;
    hole
}

impl Deref for SealedMapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has this length and lives as long as `self`. The seals were there before the
        // mapping, and no process can remove a seal. So the file keeps its size, and its bytes do not change.
        unsafe { slice::from_raw_parts(self.start.as_ptr().cast(), self.length) }
    }
}

impl Drop for SealedMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to `self`, and no slice of it is left.
        let _ = unsafe { munmap(self.start.as_ptr(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    fn memfd(content: &[u8]) -> std::fs::File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut file = std::fs::File::from(memfd_create("test", flags).unwrap());
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn sealed_memfd_shows_its_bytes() {
        let content: Vec<u8> = (0..70_001u32).map(|n| (n % 251) as u8).collect();
        let file = memfd(&content);
        fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
        let mapping = SealedMapping::new(&file).unwrap();
        assert_eq!(seek(&file, SeekFrom::Current(0)), Ok(content.len() as u64));
        drop(file);
        assert!(*mapping == *content);
    }

    #[test]
    fn file_that_may_change_is_rejected() {
        let seals = [SealFlags::empty(), SealFlags::WRITE, SealFlags::SHRINK | SealFlags::GROW];
        for seals in seals {
            let file = memfd(b"x");
            fcntl_add_seals(&file, seals).unwrap();
            assert_eq!(SealedMapping::new(&file).err(), Some(Errno::INVAL), "{seals:?}");
        }
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(SealedMapping::new(&file).err(), Some(Errno::INVAL));
    }

    #[test]
    fn memfd_with_a_hole_or_no_bytes_is_rejected() {
        for (content, size) in [(&b""[..], 0), (b"x", 8193), (b"", 1 << 50)] {
            let file = memfd(content);
            ftruncate(&file, size).unwrap();
            fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
            let error = SealedMapping::new(&file).unwrap_err();
            assert!(matches!(error, Errno::INVAL | Errno::NXIO), "{size}: {error}");
        }
    }
}
