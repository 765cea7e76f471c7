//! A composefs image: opens it, and checks its header, superblock and size.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};

use crate::compression::Compression;
use crate::error::{Error, KernelError, Operation};
use crate::location::Location;
use crate::procfs::Procfs;

/// The bytes at the start of an image that [`Header::parse`] looks at.
const HEADER_SIZE: usize = 2048;

const COMPOSEFS_MAGIC: u32 = 0xd078_629a;
const COMPOSEFS_HEADER_VERSION: u32 = 1;
const COMPOSEFS_HAS_ACL: u32 = 1;

const EROFS_SUPERBLOCK: usize = 1024;
const EROFS_MAGIC: u32 = 0xe0f5_e1e2;
const EROFS_BLOCK_BITS: u8 = 12;

/// The block size of an image, in bytes.
pub(crate) const BLOCK_SIZE: u32 = 1 << EROFS_BLOCK_BITS;

/// Why a file is not a composefs image that can be mounted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A directory, device, FIFO or socket.
    #[error("not a regular file but a {0}")]
    NotAFile(&'static str),
    /// The file does not begin as a composefs image does.
    #[error("not a composefs image")]
    NotComposefs,
    /// The file has no bytes.
    #[error("not a composefs image: the file is empty")]
    Empty,
    /// An EROFS image that no composefs tool wrote.
    #[error("a plain EROFS image, not a composefs image")]
    PlainErofs,
    /// An image of a format that came later.
    #[error("a composefs image with header version {0}, of which only 1 is known")]
    HeaderVersion(u32),
    /// A compressed file, without `copy`.
    #[error("compressed with {0}, and only a copy of it can be mounted")]
    Compressed(Compression),
    /// A compressed file, of a format that this build of sealmount cannot read.
    #[error("compressed with {0}, which this build of sealmount does not support")]
    CompressionUnsupported(Compression),
    /// A composefs header with no EROFS behind it.
    #[error("damaged: a composefs header, and no EROFS superblock behind it")]
    NoSuperblock,
    /// An EROFS whose blocks are not of 4096 bytes.
    #[error("damaged: its EROFS superblock gives 2^{0} as block size, not 4096 bytes")]
    BlockSize(u8),
    /// The file ends before the image does.
    #[error("cut short: {size} bytes of {expected}")]
    TooShort {
        /// The size of the file, in bytes.
        size: u64,
        /// The size that the superblock gives, in bytes.
        expected: u64,
    },
    /// The file goes on behind the image.
    #[error("too long: {size} bytes, {expected} by its superblock")]
    TooLong {
        /// The size of the file, in bytes.
        size: u64,
        /// The size that the superblock gives, in bytes.
        expected: u64,
    },
}

/// What the composefs header and the EROFS superblock say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// 0 and 1: the two V1 formats of mkcomposefs; 2: V2 of composefs-rs.
    pub composefs_version: u32,
    has_acl: bool,
    blocks: u32,
}

impl Header {
    /// Reads the first bytes of an image of which at least [`HEADER_SIZE`] are given, or all.
    pub fn parse(start: &[u8]) -> Result<Header, ImageError> {
        let superblock_magic = u32_at(start, EROFS_SUPERBLOCK);
        if u32_at(start, 0) != Some(COMPOSEFS_MAGIC) {
            return Err(match superblock_magic {
                Some(EROFS_MAGIC) => ImageError::PlainErofs,
                _ if start.is_empty() => ImageError::Empty,
                _ => ImageError::NotComposefs,
            });
        }
        // A header cut off within its first words has no version that could be told.
        match u32_at(start, 4) {
            None | Some(COMPOSEFS_HEADER_VERSION) => {}
            Some(version) => return Err(ImageError::HeaderVersion(version)),
        }
        let (Some(EROFS_MAGIC), Some(block_bits), Some(blocks), Some(flags), Some(version)) = (
            superblock_magic,
            start.get(EROFS_SUPERBLOCK + 12).copied(),
            u32_at(start, EROFS_SUPERBLOCK + 36),
            u32_at(start, 8),
            u32_at(start, 12),
        ) else {
            return Err(ImageError::NoSuperblock);
        };
        if block_bits != EROFS_BLOCK_BITS {
            return Err(ImageError::BlockSize(block_bits));
        }
        Ok(Header { composefs_version: version, has_acl: flags & COMPOSEFS_HAS_ACL != 0, blocks })
    }

    /// The size of the whole image, in bytes.
    pub fn size(&self) -> u64 {
        u64::from(self.blocks) << EROFS_BLOCK_BITS
    }

    /// Compares the size of the file with that of the image. The kernel does not: an image cut
    /// short mounts, and reads fail later.
    pub fn check_size(&self, size: u64) -> Result<(), ImageError> {
        let expected = self.size();
        match size.cmp(&expected) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Less => Err(ImageError::TooShort { size, expected }),
            std::cmp::Ordering::Greater => Err(ImageError::TooLong { size, expected }),
        }
    }

    /// Whether the image is known to hold no ACL. V2 images leave the flag clear even when they
    /// hold some.
    pub fn has_no_acl(&self) -> bool {
        self.composefs_version < 2 && !self.has_acl
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

/// An open image whose header and size are those of a composefs image. Its content is not verified.
#[derive(Debug)]
pub(crate) struct Image {
    pub file: OwnedFd,
    /// How messages call it.
    pub name: PathBuf,
    /// Its size when it was opened, in bytes: a whole number of blocks.
    pub size: u64,
}

/// An open file that begins as a compressed one does. What is in it is not known.
#[derive(Debug)]
pub(crate) struct CompressedImage {
    pub file: OwnedFd,
    pub name: PathBuf,
    /// The size of the file when it was opened, in bytes.
    pub size: u64,
    pub format: Compression,
}

/// What [`open`] found.
pub(crate) enum Opened {
    /// With the header as it was read then.
    Plain(Image, Header),
    Compressed(CompressedImage),
}

/// Opens an image. By path, what is no regular file is not opened at all, which for a FIFO or a device
/// could wait, or do things; without `procfs` (nothing is verified then), unless somebody puts it there
/// at the very moment.
pub(crate) fn open(location: &Location, procfs: Option<&Procfs>) -> Result<Opened, Error> {
    let name = location.name();
    let failed =
        |operation, errno| Error::from(KernelError::new(operation, errno).on(name.clone()));
    let wrong = |problem| Error::Image { image: name.clone(), problem };

    let file = match location {
        Location::Path(path) => {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let found = openat(CWD, path, flags, Mode::empty())
                .map_err(|errno| failed(Operation::OpenImage, errno))?;
            let stat = fstat(&found).map_err(|errno| failed(Operation::OpenImage, errno))?;
            require_regular(stat.st_mode).map_err(wrong)?;
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
            match procfs {
                Some(procfs) => procfs.reopen(&found, flags),
                None => openat(CWD, path, flags, Mode::empty()),
            }
        }
        Location::Fd(fd) => rustix::io::fcntl_dupfd_cloexec(fd, 0),
    }
    .map_err(|errno| failed(Operation::OpenImage, errno))?;
    let stat = fstat(&file).map_err(|errno| failed(Operation::OpenImage, errno))?;
    require_regular(stat.st_mode).map_err(wrong)?;

    let mut start = [0; HEADER_SIZE];
    let start =
        read_start(&file, &mut start).map_err(|errno| failed(Operation::ReadImage, errno))?;
    // Not negative for a regular file.
    let size = stat.st_size as u64;
    if let Some(format) = Compression::of(start) {
        return Ok(Opened::Compressed(CompressedImage { file, name, size, format }));
    }
    let header = Header::parse(start).map_err(wrong)?;
    header.check_size(size).map_err(wrong)?;
    Ok(Opened::Plain(Image { file, name, size }, header))
}

impl Image {
    /// What the header says in `file`, which is the image or a copy of it: read again once that cannot
    /// change any more. What was read when the image was opened, nobody has vouched for.
    pub fn header_in(&self, file: &OwnedFd) -> Result<Header, Error> {
        let wrong = |problem| Error::Image { image: self.name.clone(), problem };
        let mut start = [0; HEADER_SIZE];
        let start = read_start(file, &mut start)
            .map_err(|errno| KernelError::new(Operation::ReadImage, errno).on(&self.name))?;
        let header = Header::parse(start).map_err(wrong)?;
        header.check_size(self.size).map_err(wrong)?;
        Ok(header)
    }
}

fn read_start<'a>(
    file: &OwnedFd,
    start: &'a mut [u8; HEADER_SIZE],
) -> Result<&'a [u8], rustix::io::Errno> {
    let length = read_at(file, start, 0)?;
    Ok(&start[..length])
}

fn require_regular(mode: rustix::fs::RawMode) -> Result<(), ImageError> {
    Err(ImageError::NotAFile(match FileType::from_raw_mode(mode) {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "directory",
        FileType::BlockDevice => "block device",
        FileType::CharacterDevice => "character device",
        FileType::Fifo => "FIFO",
        FileType::Socket => "socket",
        _ => "file of another kind",
    }))
}

/// Reads from `offset` until the buffer is full or the file ends; returns how many bytes that were.
pub(crate) fn read_at(
    file: &OwnedFd,
    buffer: &mut [u8],
    offset: u64,
) -> Result<usize, rustix::io::Errno> {
    let mut length = 0;
    while length < buffer.len() {
        let rest = &mut buffer[length..];
        match rustix::io::retry_on_intr(|| {
            rustix::io::pread(file, &mut *rest, offset + length as u64)
        })? {
            0 => break,
            more => length += more,
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V1: &[u8] = include_bytes!("../tests/images/v1/image.cfs");
    const V2: &[u8] = include_bytes!("../tests/images/v2-sha512/image.cfs");

    #[test]
    fn real_images() {
        let v1 = Header::parse(V1).unwrap();
        assert_eq!((v1.composefs_version < 2, v1.size()), (true, V1.len() as u64));
        assert!(!v1.has_no_acl());
        let v2 = Header::parse(&V2[..HEADER_SIZE]).unwrap();
        assert_eq!((v2.composefs_version, v2.size()), (2, V2.len() as u64));
        assert!(!v2.has_no_acl(), "a V2 image with a clear flag may hold ACLs");
    }

    /// An image's first bytes with some of them changed.
    fn patched(offset: usize, bytes: &[u8]) -> Vec<u8> {
        let mut image = V1.to_vec();
        image[offset..][..bytes.len()].copy_from_slice(bytes);
        image
    }

    #[test]
    fn each_damage_has_its_own_error() {
        let parse = |bytes: &[u8]| Header::parse(bytes).unwrap_err();
        assert_eq!(parse(b""), ImageError::Empty);
        assert_eq!(parse(&[0x7f; HEADER_SIZE]), ImageError::NotComposefs);
        assert_eq!(parse(&patched(0, &[0; 4])), ImageError::PlainErofs);
        assert_eq!(parse(&patched(4, &[2, 0, 0, 0])), ImageError::HeaderVersion(2));
        assert_eq!(parse(&patched(1024, &[0; 4])), ImageError::NoSuperblock);
        assert_eq!(parse(&patched(1036, &[9])), ImageError::BlockSize(9));
        for length in [4, 31, 32, 1023, 1026, 1036, 1063] {
            assert_eq!(parse(&V1[..length]), ImageError::NoSuperblock, "{length} bytes");
        }
    }

    #[test]
    fn a_v1_image_without_the_acl_flag_has_none() {
        assert!(Header::parse(&patched(8, &[0; 4])).unwrap().has_no_acl());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Header::parse(&bytes);
        }

        #[test]
        fn a_changed_header_is_refused_or_read_as_it_says(offset in 0..1152usize, value: u8) {
            let image = patched(offset, &[value]);
            match Header::parse(&image) {
                Ok(header) => {
                    let blocks = u32::from_le_bytes(image[1060..1064].try_into().unwrap());
                    prop_assert_eq!(header.size(), u64::from(blocks) * 4096);
                    prop_assert_eq!(header.check_size(image.len() as u64).is_ok(),
                                    image.len() as u64 == u64::from(blocks) * 4096);
                }
                Err(_) => prop_assert!(offset < 8 || (1024..1037).contains(&offset)),
            }
        }

        #[test]
        fn a_length_that_differs_is_refused(size: u64) {
            let header = Header::parse(V1).unwrap();
            let expected = V1.len() as u64;
            let wanted = match size {
                size if size < expected => Err(ImageError::TooShort { size, expected }),
                size if size > expected => Err(ImageError::TooLong { size, expected }),
                _ => Ok(()),
            };
            prop_assert_eq!(header.check_size(size), wanted);
        }
    }
}
