//! A trial: whether the kernel reads EROFS from a file that ends within a page.
//!
//! Linux 7.3 mounts such a file, and then fails with EIO whenever EROFS needs the last page of the file. The
//! trial mounts an image that lies within one page, from a file that ends within this page, and reads its
//! files. docs/design.md compares the trial with a walk over the image itself.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use crate::image::header::{EROFS_MAGIC, EROFS_SUPERBLOCK};
use crate::kernel::{KernelError, Operation};
use crate::source::memory::private_ramfs;
use crate::util::io::{read_at, write_all_at};

/// The size of a block of the trial image, in bytes, as a power of two: the smallest of EROFS. So the image
/// is smaller than the smallest page.
const BLOCK_BITS: usize = 9;
const BLOCK_SIZE: usize = 1 << BLOCK_BITS;

/// The positions of the inodes. The number of an inode is its position in units of [`SLOT`].
const ROOT: usize = 1152;
const INLINE: usize = 1248;
const PLAIN: usize = 1312;
const SLOT: usize = 32;
/// The block with the content of the plain file, which is the last block of the image.
const PLAIN_BLOCK: usize = 3;
const SIZE: usize = (PLAIN_BLOCK + 1) * BLOCK_SIZE;
// The image ends within every page.
const _: () = assert!(SIZE < 4096);

const INLINE_CONTENT: &[u8] = b"within the block of the inode";

/// The layouts of the data of an inode, in its first word.
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2 << 1;

/// Checks that the kernel reads the last page of a file that ends within this page. `mount_file` mounts the
/// EROFS in a file. Errors name `image`.
///
/// # Errors
///
/// EIO of [`Operation::ReadLastPage`] if this kernel cannot read the page, or reads other bytes; any other
/// errno if the trial itself fails.
pub(crate) fn check(
    image: &Path,
    mount_file: impl FnOnce(BorrowedFd<'_>) -> Result<OwnedFd, KernelError>,
) -> Result<(), KernelError> {
    let failed = |errno| KernelError::new(Operation::ReadLastPage, errno).on(image);
    let ramfs = private_ramfs()?;
    let file = trial_file(&ramfs).map_err(failed)?;
    let mount = match mount_file(file.as_fd()) {
        Err(error) if is_fault(&error) => return Err(failed(Errno::IO)),
        mount => mount?,
    };
    for (name, expected) in [("inline", INLINE_CONTENT), ("plain", &plain_content())] {
        match read_file(&mount, name) {
            Ok(content) if content == expected => {}
            // EUCLEAN: the kernel takes other bytes for metadata.
            Ok(_) | Err(Errno::IO | Errno::UCLEAN) => return Err(failed(Errno::IO)),
            Err(errno) => return Err(failed(errno)),
        }
    }
    Ok(())
}

/// Returns whether the kernel could not read the superblock, or read other bytes.
fn is_fault(error: &KernelError) -> bool {
    error.operation == Operation::CreateSuperblock
        && matches!(error.errno, Errno::IO | Errno::UCLEAN | Errno::INVAL | Errno::NOTBLK)
}

/// Writes the trial image to a file of a ramfs. Returns the file, open for reading as an image is.
fn trial_file(ramfs: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let writer = openat(ramfs, "trial", flags, Mode::RUSR)?;
    write_all_at(&writer, &trial_image(), 0)?;
    openat(ramfs, "trial", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Reads at most [`BLOCK_SIZE`] bytes of a file.
fn read_file(mount: &OwnedFd, name: &str) -> Result<Vec<u8>, Errno> {
    let file = openat(mount, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut content = vec![0; BLOCK_SIZE];
    let length = read_at(&file, &mut content, 0)?;
    content.truncate(length);
    Ok(content)
}

/// Returns an image with a root directory and two files. The content of one file follows its inode, the
/// content of the other fills the last block. EROFS reads the first as metadata, the second as data.
fn trial_image() -> [u8; SIZE] {
    let mut image = [0; SIZE];
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..][..bytes.len()].copy_from_slice(bytes);
    };
    // Magic, the bits of a block, the number of the root inode, the numbers of inodes and of blocks.
    put(EROFS_SUPERBLOCK, &EROFS_MAGIC.to_le_bytes());
    put(EROFS_SUPERBLOCK + 12, &[BLOCK_BITS as u8]);
    put(EROFS_SUPERBLOCK + 14, &((ROOT / SLOT) as u16).to_le_bytes());
    put(EROFS_SUPERBLOCK + 16, &3u64.to_le_bytes());
    put(EROFS_SUPERBLOCK + 36, &((SIZE / BLOCK_SIZE) as u32).to_le_bytes());

    let directory = directory();
    put(ROOT, &inode(FLAT_INLINE, 0o40755, directory.len(), 0));
    put(ROOT + SLOT, &directory);
    put(INLINE, &inode(FLAT_INLINE, 0o100644, INLINE_CONTENT.len(), 0));
    put(INLINE + SLOT, INLINE_CONTENT);
    put(PLAIN, &inode(FLAT_PLAIN, 0o100644, BLOCK_SIZE, PLAIN_BLOCK));
    put(PLAIN_BLOCK * BLOCK_SIZE, &plain_content());
    image
}

fn plain_content() -> [u8; BLOCK_SIZE] {
    std::array::from_fn(|n| (n * 7 + n / 251) as u8)
}

/// Returns a compact inode.
fn inode(layout: u16, mode: u16, size: usize, block: usize) -> [u8; SLOT] {
    let mut inode = [0; SLOT];
    inode[..2].copy_from_slice(&layout.to_le_bytes());
    inode[4..6].copy_from_slice(&mode.to_le_bytes());
    let links: u16 = if mode & 0o40000 != 0 { 2 } else { 1 };
    inode[6..8].copy_from_slice(&links.to_le_bytes());
    inode[8..12].copy_from_slice(&(size as u32).to_le_bytes());
    inode[16..20].copy_from_slice(&(block as u32).to_le_bytes());
    inode
}

/// Returns the entries of the root directory, in the order of the names, and then the names.
fn directory() -> Vec<u8> {
    const DIRECTORY: u8 = 2;
    const REGULAR: u8 = 1;
    let entries = [
        (".", ROOT, DIRECTORY),
        ("..", ROOT, DIRECTORY),
        ("inline", INLINE, REGULAR),
        ("plain", PLAIN, REGULAR),
    ];
    let mut bytes = Vec::new();
    let mut name_offset = 12 * entries.len();
    for (name, position, kind) in entries {
        bytes.extend(((position / SLOT) as u64).to_le_bytes());
        bytes.extend((name_offset as u16).to_le_bytes());
        bytes.extend([kind, 0]);
        name_offset += name.len();
    }
    entries.iter().for_each(|(name, ..)| bytes.extend(name.as_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use rustix::mount::MountAttrFlags;

    use super::*;
    use crate::kernel::ErrorKind;
    use crate::kernel::fs_context::FsContext;
    use crate::may_mount;
    use crate::source::loop_device::LoopDevice;

    const IMAGE: &str = "/some/image.cfs";

    fn mount(
        set_source: impl Fn(&FsContext) -> Result<(), KernelError>,
    ) -> Result<OwnedFd, KernelError> {
        let context = FsContext::open("erofs")?;
        set_source(&context)?;
        context.set_flag("ro")?;
        context.create()?;
        context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY)
    }

    /// A loop device reads the last page on every kernel.
    fn by_loop_device(file: impl AsFd) -> Result<OwnedFd, KernelError> {
        let device = LoopDevice::attach(file, BLOCK_SIZE as u32, b"last_page").unwrap();
        mount(|context| context.set_string("source", &device.path))
    }

    /// A file with these bytes, in place of the trial image.
    fn file_of(content: &[u8]) -> OwnedFd {
        let file = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        write_all_at(&file, content, 0).unwrap();
        file
    }

    #[test]
    fn trial_image_keeps_its_parts_apart() {
        assert!(ROOT + SLOT + directory().len() <= INLINE);
        assert!(INLINE + SLOT + INLINE_CONTENT.len() <= PLAIN);
    }

    #[test]
    fn trial_image_is_read_by_the_kernel() {
        if !may_mount() {
            return;
        }
        check(Path::new(IMAGE), |file| by_loop_device(file)).unwrap();
    }

    #[test]
    fn other_bytes_in_the_last_page_are_a_fault() {
        if !may_mount() {
            return;
        }
        let image = trial_image();
        for position in [EROFS_SUPERBLOCK, ROOT + SLOT, INLINE, INLINE + SLOT, SIZE - 1] {
            let mut other = image;
            // As a kernel that fills the rest of the page with zeros.
            other[position..].fill(0);
            let error = check(Path::new(IMAGE), |_| by_loop_device(file_of(&other))).unwrap_err();
            assert_eq!((error.operation, error.errno), (Operation::ReadLastPage, Errno::IO));
            assert_eq!(error.object.as_deref(), Some(Path::new(IMAGE)));
            assert_eq!(error.kind(), ErrorKind::Unsupported);
        }
    }

    #[test]
    fn failed_trial_is_not_a_fault() {
        if !may_mount() {
            return;
        }
        for errno in [Errno::PERM, Errno::NOMEM, Errno::ACCESS] {
            let denied = KernelError::new(Operation::CreateSuperblock, errno);
            let error = check(Path::new(IMAGE), |_| Err(denied)).unwrap_err();
            assert_eq!((error.operation, error.errno), (Operation::CreateSuperblock, errno));
        }
    }
}
