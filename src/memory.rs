//! Memory that an image is copied into, and that nobody can change once it is sealed.
//!
//! The types carry the state: [`UnsealedMemory`] can be written to and is not mounted,
//! [`SealedMemory`] the reverse.

use std::ffi::{CString, OsStr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{
    CWD, MemfdFlags, Mode, OFlags, PROC_SUPER_MAGIC, SealFlags, fcntl_add_seals, fstatfs,
    memfd_create, openat,
};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::error::{Error, KernelError, Operation};
use crate::fs_context::FsContext;
use crate::options::{Memory, SizeLimit};

/// The kernel waits for about 150 ms in each.
const SEAL_ATTEMPTS: u32 = 30;
/// With the pauses, two seconds.
const READ_ONLY_ATTEMPTS: u32 = 200;
const PAUSE: Duration = Duration::from_millis(10);

/// Images are of whole blocks of as many bytes.
const PAGE_SIZE: u64 = 4096;

/// The longest name of a file, in bytes.
const NAME_MAX: usize = 255;

/// A file in memory that is being written.
pub(crate) enum UnsealedMemory {
    Memfd(OwnedFd),
    Ramfs {
        file: OwnedFd,
        /// The only way to the file system: attached nowhere.
        mount: OwnedFd,
    },
}

/// A file in memory whose content and size cannot change any more, not even by root.
#[derive(Debug)]
pub(crate) struct SealedMemory {
    file: OwnedFd,
    kind: Memory,
}

impl SealedMemory {
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    pub fn kind(&self) -> Memory {
        self.kind
    }
}

/// What the memory and the loop device of an image are called: `sealmount:` and the path, of which
/// losetup(8) shows as much as there is room for.
pub(crate) fn memory_name(image: &Path) -> Vec<u8> {
    let path = std::path::absolute(image).unwrap_or_else(|_| image.to_owned());
    [b"sealmount:", path.as_os_str().as_bytes()].concat()
}

impl UnsealedMemory {
    /// An empty file for `size` bytes, which must be within the limit.
    ///
    /// The memory is taken when it is written to, with [pwrite(2)] and not through a mapping, so
    /// running out of it is an error and no signal.
    ///
    /// [pwrite(2)]: https://man7.org/linux/man-pages/man2/pwrite.2.html
    pub fn create(
        kind: Memory,
        image: &Path,
        size: u64,
        limit: Option<SizeLimit>,
    ) -> Result<UnsealedMemory, Error> {
        check_limit(image, size, limit)?;
        check_file_size_limit(image, size)?;
        match kind {
            Memory::Memfd => UnsealedMemory::memfd(image),
            Memory::Ramfs => UnsealedMemory::ramfs(image),
        }
        .map_err(Error::from)
    }

    fn memfd(image: &Path) -> Result<UnsealedMemory, KernelError> {
        let mut name = memory_name(image);
        // memfd_create(2): at most 249 bytes.
        name.truncate(249);
        let name = CString::new(name).unwrap_or_default();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = match memfd_create(&name, flags | MemfdFlags::NOEXEC_SEAL) {
            // Before 6.3.
            Err(Errno::INVAL) => memfd_create(&name, flags),
            result => result,
        }
        .map_err(|errno| KernelError::new(Operation::CreateMemory, errno))?;
        Ok(UnsealedMemory::Memfd(memfd))
    }

    fn ramfs(image: &Path) -> Result<UnsealedMemory, KernelError> {
        let context = FsContext::open("ramfs")?;
        context.set_string("mode", "0700")?;
        context.create()?;
        let mount = context.mount(MountAttrFlags::empty())?;
        // A name, because the file system cannot become read-only while an unlinked file is open.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&mount, ramfs_name(image), flags, Mode::RUSR)
            .map_err(|errno| KernelError::new(Operation::CreateMemory, errno))?;
        Ok(UnsealedMemory::Ramfs { file, mount })
    }

    pub fn file(&self) -> &OwnedFd {
        match self {
            UnsealedMemory::Memfd(file) | UnsealedMemory::Ramfs { file, .. } => file,
        }
    }

    pub fn seal(self, image: &Path) -> Result<SealedMemory, Error> {
        let failed = |errno| KernelError::new(Operation::SealMemory, errno);
        match self {
            UnsealedMemory::Memfd(file) => {
                let seals =
                    SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
                add_seals(&file, seals).map_err(failed)?;
                Ok(SealedMemory { file, kind: Memory::Memfd })
            }
            UnsealedMemory::Ramfs { file: writer, mount } => {
                // A superblock becomes read-only only when nobody has a file of it open for
                // writing, and with the mount's descriptor closed nobody has a way to change that
                // again: the file's descriptor leads to no directory of it that could be opened.
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                let file =
                    openat(&mount, ramfs_name(image), flags, Mode::empty()).map_err(failed)?;
                drop(writer);
                make_read_only(&mount)?;
                Ok(SealedMemory { file, kind: Memory::Ramfs })
            }
        }
    }
}

/// `F_SEAL_WRITE` is refused with EBUSY while anybody holds a reference to one of the pages, in case
/// it is to write to it later. The kernel itself takes such references for a moment, to reclaim or to
/// move pages, and waits for less than that may last on a busy machine (found in benchmarks, one in
/// some thousand copies). A mapping that is writable would be refused in the same way, and for good:
/// hence the limit.
fn add_seals(memfd: &OwnedFd, seals: SealFlags) -> Result<(), Errno> {
    for _ in 0..SEAL_ATTEMPTS {
        match fcntl_add_seals(memfd, seals) {
            Err(Errno::BUSY) => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
    Err(Errno::BUSY)
}

/// Where another thread of the process is starting a program, its child has the writer's descriptor too,
/// from the fork to the exec: EBUSY. With the writer closed, no further child gets it.
fn make_read_only(mount: &OwnedFd) -> Result<(), KernelError> {
    let mut attempts = 0;
    loop {
        // A context that failed is of no more use.
        let context = FsContext::pick("ramfs", mount)?;
        context.set_flag("ro")?;
        match context.reconfigure() {
            Err(error) if error.errno == Errno::BUSY && attempts < READ_ONLY_ATTEMPTS => {
                attempts += 1;
                std::thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

/// The image's own name: losetup(8) shows it where a loop device is needed.
fn ramfs_name(image: &Path) -> &OsStr {
    let name = image.file_name().unwrap_or("image".as_ref()).as_bytes();
    // Of a descriptor, the kernel's path may go on with " (deleted)".
    OsStr::from_bytes(&name[..name.len().min(NAME_MAX)])
}

/// Whether a copy may take so many bytes.
pub(crate) fn check_limit(image: &Path, size: u64, limit: Option<SizeLimit>) -> Result<(), Error> {
    let limit =
        limit_in_bytes(limit).map_err(|errno| KernelError::new(Operation::AskForMemory, errno))?;
    if size > limit {
        return Err(Error::NotEnoughMemory { image: image.to_owned(), size, limit });
    }
    Ok(())
}

/// A write beyond RLIMIT_FSIZE is not only refused with EFBIG: the kernel also sends SIGXFSZ, which ends
/// a process that does not expect it.
fn check_file_size_limit(image: &Path, size: u64) -> Result<(), KernelError> {
    match sealmount_sys::file_size_limit() {
        Ok(Some(limit)) if size > limit => {
            Err(KernelError::new(Operation::WriteMemory, Errno::FBIG).on(image))
        }
        _ => Ok(()),
    }
}

/// The memory that a copy may take: what was asked for, or half of what there is, as tmpfs has it;
/// and no more than can be had without swapping.
///
/// A memfd has no limit of its own: asked for more than there is, the kernel does not answer ENOSPC
/// but kills processes to make room.
fn limit_in_bytes(limit: Option<SizeLimit>) -> Result<u64, Errno> {
    // Without /proc, what lies in the page cache counts as taken.
    let (total, available) = match meminfo() {
        Some(figures) => figures,
        None => sealmount_sys::memory().map(|memory| (memory.total, memory.free))?,
    };
    let limit = match limit.unwrap_or(SizeLimit::Percent(50)) {
        SizeLimit::Bytes(0) | SizeLimit::Percent(0) => u64::MAX,
        SizeLimit::Bytes(bytes) => bytes.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX),
        SizeLimit::Percent(percent) => (total / 100).saturating_mul(u64::from(percent)),
    };
    Ok(limit.min(available))
}

/// MemTotal and MemAvailable of [proc_meminfo(5)], in bytes.
///
/// [proc_meminfo(5)]: https://man7.org/linux/man-pages/man5/proc_meminfo.5.html
fn meminfo() -> Option<(u64, u64)> {
    // In somebody else's mount namespace it may be anything, which is not to be waited for.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = openat(CWD, "/proc/meminfo", flags, Mode::empty()).ok()?;
    if fstatfs(&file).ok()?.f_type != PROC_SUPER_MAGIC {
        return None;
    }
    let meminfo = std::io::read_to_string(std::fs::File::from(file)).ok()?;
    let bytes = |field: &str| -> Option<u64> {
        let value = meminfo.lines().find_map(|line| line.strip_prefix(field))?;
        let kibibytes: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(kibibytes * 1024)
    };
    Some((bytes("MemTotal:")?, bytes("MemAvailable:")?))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use rustix::fs::{fcntl_get_seals, ftruncate};
    use rustix::io::{pread, pwrite};

    use super::*;
    use crate::location::proc_fd_path;
    use crate::may_mount;

    const CONTENT: &[u8] = b"what is in it";

    fn sealed(kind: Memory) -> SealedMemory {
        let image = Path::new("/some/image.cfs");
        let memory = UnsealedMemory::create(kind, image, CONTENT.len() as u64, None).unwrap();
        pwrite(memory.file(), CONTENT, 0).unwrap();
        memory.seal(image).unwrap()
    }

    fn has_content(memory: &SealedMemory) {
        let mut content = [0; CONTENT.len() + 1];
        assert_eq!(pread(memory.file(), &mut content, 0), Ok(CONTENT.len()));
        assert_eq!(&content[..CONTENT.len()], CONTENT);
    }

    #[test]
    fn nothing_changes_a_sealed_memfd() {
        let memory = sealed(Memory::Memfd);
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        let file = memory.file();
        assert!(fcntl_get_seals(file).unwrap().contains(seals));
        assert_eq!(pwrite(file, b"x", 0), Err(Errno::PERM));
        assert_eq!(ftruncate(file, 0), Err(Errno::PERM));
        assert_eq!(ftruncate(file, 1 << 20), Err(Errno::PERM));
        assert_eq!(fcntl_add_seals(file, SealFlags::FUTURE_WRITE), Err(Errno::PERM));
        // Root may open it for writing, and write nothing.
        if let Ok(mut again) = File::options().write(true).open(proc_fd_path(file)) {
            let error = again.write(b"x").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::PERM.raw_os_error()));
        }
        has_content(&memory);
    }

    #[test]
    fn nothing_changes_a_ramfs_that_is_read_only() {
        if !may_mount() {
            return;
        }
        let memory = sealed(Memory::Ramfs);
        let file = memory.file();
        assert_eq!(pwrite(file, b"x", 0), Err(Errno::BADF), "it is open for reading");
        let error = File::options().write(true).open(proc_fd_path(file)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ROFS.raw_os_error()));
        let chmod = rustix::fs::fchmod(file, Mode::RWXU);
        assert_eq!(chmod, Err(Errno::ROFS));
        // The descriptor is no way to the superblock: it is of a file, and of a mount that is gone.
        let again = rustix::mount::fspick(file, "", rustix::mount::FsPickFlags::FSPICK_EMPTY_PATH);
        assert!(again.is_err());
        has_content(&memory);
    }

    /// As a child has one between fork and exec.
    #[test]
    fn a_ramfs_is_sealed_when_the_last_copy_of_its_writer_is_closed() {
        if !may_mount() {
            return;
        }
        let image = Path::new("/some/image.cfs");
        let create = || UnsealedMemory::create(Memory::Ramfs, image, 1, None).unwrap();

        let memory = create();
        let writer = memory.file().try_clone().unwrap();
        let closing = std::thread::spawn(|| {
            std::thread::sleep(20 * PAUSE);
            drop(writer);
        });
        memory.seal(image).unwrap();
        closing.join().unwrap();

        let memory = create();
        let _writer = memory.file().try_clone().unwrap();
        let error = memory.seal(image).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::BUSY), "{error}");
    }

    #[test]
    fn more_than_the_limit_is_refused() {
        let create = |size, limit| {
            let image = Path::new("/some/image.cfs");
            UnsealedMemory::create(Memory::Memfd, image, size, limit).map(drop)
        };
        let refused = |result: Result<(), Error>, expected: u64| match result {
            Err(Error::NotEnoughMemory { limit, .. }) => assert_eq!(limit, expected),
            result => panic!("{result:?}"),
        };
        refused(create(4097, Some(SizeLimit::Bytes(4096))), 4096);
        create(4096, Some(SizeLimit::Bytes(4096))).unwrap();
        // As tmpfs has it: whole pages, and no limit.
        create(4096, Some(SizeLimit::Bytes(1))).unwrap();
        refused(create(4097, Some(SizeLimit::Bytes(4095))), 4096);
        create(1 << 20, Some(SizeLimit::Bytes(0))).unwrap();
        create(1 << 20, Some(SizeLimit::Percent(0))).unwrap();
        create(1 << 20, Some(SizeLimit::Percent(1000))).unwrap();
        // More than there is, whatever was asked for.
        for limit in [
            None,
            Some(SizeLimit::Bytes(0)),
            Some(SizeLimit::Bytes(u64::MAX)),
            Some(SizeLimit::Percent(100)),
            Some(SizeLimit::Percent(u32::MAX)),
        ] {
            assert!(matches!(create(1 << 46, limit), Err(Error::NotEnoughMemory { .. })));
        }
    }
}
