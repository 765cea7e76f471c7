//! Memory for a copy. After sealing, no process can change it.
//!
//! The types carry the state: [`UnsealedMemory`] can be written and is never mounted. [`SealedMemory`]
//! can be mounted and never written.

use std::ffi::{CString, OsStr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create, openat};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::kernel::fs_context::FsContext;
use crate::kernel::{KernelError, Operation};
use crate::source::error::SourceError;
use crate::source::limits::check_file_size_limit;
use crate::source::options::MemoryKind;
use crate::util::io::write_all_at;
use crate::util::pages::whole_pages;

/// The kernel waits about 150 ms in each attempt.
const SEAL_ATTEMPTS: u32 = 30;
/// Two seconds, with the pauses.
const READ_ONLY_ATTEMPTS: u32 = 200;
const PAUSE: Duration = Duration::from_millis(10);

/// The longest name of a file, in bytes.
const NAME_MAX: usize = 255;

/// A file in memory that is being written.
pub(crate) enum UnsealedMemory {
    Memfd(OwnedFd),
    Ramfs {
        file: OwnedFd,
        /// The detached mount: the only reference to the file system.
        mount: OwnedFd,
        /// The size of the image, in bytes.
        size: u64,
    },
}

/// A file in memory. No process, not even root, can change its content or size.
#[derive(Debug)]
pub(crate) struct SealedMemory {
    file: OwnedFd,
    kind: MemoryKind,
}

impl SealedMemory {
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    pub fn into_parts(self) -> (OwnedFd, MemoryKind) {
        (self.file, self.kind)
    }
}

/// Returns the name of the memory and of the loop device of an image: `sealmount:` and the path. losetup(8)
/// shows the start of the name.
pub(crate) fn memory_name(image: &Path) -> Vec<u8> {
    let path = std::path::absolute(image).unwrap_or_else(|_| image.to_owned());
    [b"sealmount:", path.as_os_str().as_bytes()].concat()
}

impl UnsealedMemory {
    /// Makes an empty file for `size` bytes, which must be within the limits: a memfd
    /// ([memfd_create(2)](https://man7.org/linux/man-pages/man2/memfd_create.2.html), Linux 3.17) or a file
    /// in a new ramfs.
    ///
    /// pwrite(2) allocates the memory. Unlike a write through a mapping, it returns an error if memory is
    /// short, and sends no signal.
    pub fn create(
        kind: MemoryKind,
        image: &Path,
        size: u64,
    ) -> Result<UnsealedMemory, SourceError> {
        let file_size = match kind {
            MemoryKind::Memfd => size,
            MemoryKind::Ramfs => whole_pages(size),
        };
        check_file_size_limit(image, file_size)?;
        match kind {
            MemoryKind::Memfd => UnsealedMemory::memfd(image),
            MemoryKind::Ramfs => UnsealedMemory::ramfs(image, size),
        }
        .map_err(SourceError::from)
    }

    fn memfd(image: &Path) -> Result<UnsealedMemory, KernelError> {
        let mut name = memory_name(image);
        // The limit of memfd_create(2), in bytes.
        name.truncate(249);
        let name = CString::new(name).unwrap_or_default();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = match memfd_create(&name, flags | MemfdFlags::NOEXEC_SEAL) {
            // Linux < 6.3
            Err(Errno::INVAL) => memfd_create(&name, flags),
            result => result,
        }
        .map_err(|errno| KernelError::new(Operation::CreateMemory, errno))?;
        Ok(UnsealedMemory::Memfd(memfd))
    }

    fn ramfs(image: &Path, size: u64) -> Result<UnsealedMemory, KernelError> {
        let mount = private_ramfs()?;
        // The file keeps its name: with an unlinked open file, the file system cannot become read-only.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&mount, ramfs_name(image), flags, Mode::RUSR)
            .map_err(|errno| KernelError::new(Operation::CreateMemory, errno))?;
        Ok(UnsealedMemory::Ramfs { file, mount, size })
    }

    pub fn file(&self) -> &OwnedFd {
        match self {
            UnsealedMemory::Memfd(file) | UnsealedMemory::Ramfs { file, .. } => file,
        }
    }

    /// Seals the memory, which holds the whole image. Zeros pad a file in a ramfs to whole pages: Linux 7.3
    /// cannot read EROFS from a file that ends within a page.
    pub fn seal(self, image: &Path) -> Result<SealedMemory, SourceError> {
        let failed = |errno| KernelError::new(Operation::SealMemory, errno);
        match self {
            UnsealedMemory::Memfd(file) => {
                let seals =
                    SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
                add_seals(&file, seals).map_err(failed)?;
                Ok(SealedMemory { file, kind: MemoryKind::Memfd })
            }
            UnsealedMemory::Ramfs { file: writer, mount, size } => {
                pad_to_pages(&writer, size)
                    .map_err(|errno| KernelError::new(Operation::WriteMemory, errno).on(image))?;
                // The kernel makes a superblock read-only only if no file of it is open for writing.
                // After the mount's descriptor is closed, no process can change that back: the
                // file's descriptor does not lead to a directory of the file system.
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                let file =
                    openat(&mount, ramfs_name(image), flags, Mode::empty()).map_err(failed)?;
                drop(writer);
                make_read_only(&mount)?;
                Ok(SealedMemory { file, kind: MemoryKind::Ramfs })
            }
        }
    }
}

/// Makes a ramfs that no other process can reach. Returns its detached mount.
pub(crate) fn private_ramfs() -> Result<OwnedFd, KernelError> {
    let context = FsContext::open("ramfs")?;
    context.set_string("mode", "0700")?;
    context.create()?;
    context.mount(MountAttrFlags::empty())
}

/// Adds seals to a memfd.
///
/// F_SEAL_WRITE fails with EBUSY while a page has another reference, which could be for a later write. The
/// kernel itself takes these references for a moment, to reclaim or to move pages. On a busy machine, the
/// kernel's own wait is too short (seen in benchmarks, in one of some thousand copies). A writable mapping
/// would cause EBUSY without end, so the number of attempts has a limit.
fn add_seals(memfd: &OwnedFd, seals: SealFlags) -> Result<(), Errno> {
    for _ in 0..SEAL_ATTEMPTS {
        match fcntl_add_seals(memfd, seals) {
            Err(Errno::BUSY) => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
    Err(Errno::BUSY)
}

/// Writes zeros behind the image, up to the end of its last page.
fn pad_to_pages(file: &OwnedFd, size: u64) -> Result<(), Errno> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let end = whole_pages(size);
    let mut offset = size;
    while offset < end {
        let length = (end - offset).min(ZEROS.len() as u64);
        write_all_at(file, &ZEROS[..length as usize], offset)?;
        offset += length;
    }
    Ok(())
}

/// Makes a ramfs read-only.
///
/// If another thread starts a program at this moment, the child has a copy of the writer's descriptor between
/// fork and exec. The kernel then fails with EBUSY. Later children do not get the descriptor, because the
/// writer is closed.
fn make_read_only(mount: &OwnedFd) -> Result<(), KernelError> {
    let mut attempts = 0;
    loop {
        // After a failure a context cannot be used again.
        let context = FsContext::pick("ramfs", mount)?;
        context.set_flag("ro")?;
        match context.reconfigure(Operation::SealMemory) {
            Err(error) if error.errno == Errno::BUSY && attempts < READ_ONLY_ATTEMPTS => {
                attempts += 1;
                std::thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

/// Returns the file name of the image. losetup(8) shows it if a loop device is needed.
fn ramfs_name(image: &Path) -> &OsStr {
    let name = image.file_name().unwrap_or("image".as_ref()).as_bytes();
    // The kernel's path of a descriptor may end in " (deleted)".
    OsStr::from_bytes(&name[..name.len().min(NAME_MAX)])
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use rustix::fs::{fcntl_get_seals, ftruncate};
    use rustix::io::{pread, pwrite};

    use super::*;
    use crate::kernel::ErrorKind;
    use crate::location::proc_fd_path;
    use crate::may_mount;

    const CONTENT: &[u8] = b"what is in it";

    fn sealed(kind: MemoryKind) -> SealedMemory {
        let image = Path::new("/some/image.cfs");
        let memory = UnsealedMemory::create(kind, image, CONTENT.len() as u64).unwrap();
        pwrite(memory.file(), CONTENT, 0).unwrap();
        memory.seal(image).unwrap()
    }

    /// Checks the content and the size.
    fn has_content(memory: &SealedMemory, size: usize) {
        let mut content = vec![1; size + 1];
        assert_eq!(pread(memory.file(), &mut content, 0), Ok(size));
        assert_eq!(&content[..CONTENT.len()], CONTENT);
        assert!(content[CONTENT.len()..size].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn ramfs_is_padded_to_whole_pages() {
        if !may_mount() {
            return;
        }
        let page = sealmount_sys::page_size();
        for size in [1, 4095, 4097, page - 1, page, page + 1, 3 * page - 4096] {
            let image = Path::new("/some/image.cfs");
            let memory = UnsealedMemory::create(MemoryKind::Ramfs, image, size as u64).unwrap();
            let content = vec![b'x'; size];
            write_all_at(memory.file(), &content, 0).unwrap();
            let memory = memory.seal(image).unwrap();
            let mut found = vec![1; size + 2 * page];
            let length = pread(memory.file(), &mut found, 0).unwrap();
            assert_eq!(length, size.next_multiple_of(page), "{size} bytes");
            assert!(found[..size] == content && found[size..length].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn sealed_memfd_rejects_every_change() {
        let memory = sealed(MemoryKind::Memfd);
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        let file = memory.file();
        assert!(fcntl_get_seals(file).unwrap().contains(seals));
        assert_eq!(pwrite(file, b"x", 0), Err(Errno::PERM));
        assert_eq!(ftruncate(file, 0), Err(Errno::PERM));
        assert_eq!(ftruncate(file, 1 << 20), Err(Errno::PERM));
        assert_eq!(fcntl_add_seals(file, SealFlags::FUTURE_WRITE), Err(Errno::PERM));
        // Root may open the memfd for writing, but cannot write.
        if let Ok(mut again) = File::options().write(true).open(proc_fd_path(file)) {
            let error = again.write(b"x").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::PERM.raw_os_error()));
        }
        has_content(&memory, CONTENT.len());
    }

    #[test]
    fn read_only_ramfs_rejects_every_change() {
        if !may_mount() {
            return;
        }
        let memory = sealed(MemoryKind::Ramfs);
        let file = memory.file();
        assert_eq!(pwrite(file, b"x", 0), Err(Errno::BADF), "it is open for reading");
        let error = File::options().write(true).open(proc_fd_path(file)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ROFS.raw_os_error()));
        let chmod = rustix::fs::fchmod(file, Mode::RWXU);
        assert_eq!(chmod, Err(Errno::ROFS));
        // The descriptor does not lead to the superblock: it is the descriptor of a file, and its mount has
        // ended.
        let again = rustix::mount::fspick(file, "", rustix::mount::FsPickFlags::FSPICK_EMPTY_PATH);
        assert!(again.is_err());
        has_content(&memory, sealmount_sys::page_size());
    }

    /// A child process has a copy of the writer between fork and exec.
    #[test]
    fn ramfs_seal_waits_for_last_writer_or_fails() {
        if !may_mount() {
            return;
        }
        let image = Path::new("/some/image.cfs");
        let create = || UnsealedMemory::create(MemoryKind::Ramfs, image, 1).unwrap();

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
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    }
}
