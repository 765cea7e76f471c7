//! The header of an image: a pure parser.

use std::fmt;

use crate::image::compression::Compression;

/// The number of bytes at the start of an image that [`Header::parse`] needs.
pub(crate) const HEADER_SIZE: usize = 2048;

const COMPOSEFS_MAGIC: u32 = 0xd078_629a;
const COMPOSEFS_HEADER_VERSION: u32 = 1;
const COMPOSEFS_HAS_ACL: u32 = 1;

/// The position of the superblock, and the magic number at its start.
pub(crate) const EROFS_SUPERBLOCK: usize = 1024;
pub(crate) const EROFS_MAGIC: u32 = 0xe0f5_e1e2;
/// `EROFS_FEATURE_INCOMPAT_48BIT`: the number of blocks has 48 bits.
const EROFS_48BIT: u32 = 0x80;

/// The block size of a composefs image, as a power of two.
const COMPOSEFS_BLOCK_BITS: u8 = 12;

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// A composefs image. mkcomposefs writes versions 0 and 1, which both are format V1; composefs-rs
    /// writes version 2, format V2.
    Composefs {
        /// The version in the composefs header.
        version: u32,
    },
    /// A plain EROFS image, without a composefs header.
    Erofs,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Format::Composefs { version: 0 | 1 } => f.write_str("composefs V1"),
            Format::Composefs { version } => write!(f, "composefs V{version}"),
            Format::Erofs => f.write_str("plain EROFS"),
        }
    }
}

/// The reason why a file is not an image that can be mounted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageProblem {
    /// The file is a directory, a device, a FIFO or a socket.
    #[error("the file is a {0}, not a regular file")]
    NotAFile(&'static str),
    /// The file does not start like a composefs image.
    #[error("the file is not a composefs image")]
    NotComposefs,
    /// The file has no bytes.
    #[error("the file is empty, not a composefs image")]
    Empty,
    /// The file is an EROFS image without a composefs header.
    #[error("the file is a plain EROFS image, not a composefs image")]
    PlainErofs,
    /// The file is neither a composefs image nor a plain EROFS image.
    #[error("the file is not an EROFS image")]
    NotErofs,
    /// The image has a later format.
    #[error("the composefs header has version {0}; sealmount knows version 1")]
    HeaderVersion(u32),
    /// The file is compressed, so only a copy of the image can be mounted.
    #[error("the file is compressed with {0}, so only a copy can be mounted")]
    Compressed(Compression),
    /// The file is compressed in a format that this build of sealmount cannot read.
    #[error("the file is compressed with {0}, which this build of sealmount does not support")]
    CompressionUnsupported(Compression),
    /// A composefs header without an EROFS superblock behind it.
    #[error("the image is damaged: no EROFS superblock follows the composefs header")]
    NoSuperblock,
    /// The EROFS has blocks of a size that cannot be mounted.
    #[error("the image is damaged: its superblock gives a block size of 2^{0} bytes")]
    BlockSize(u8),
    /// The file ends before the image does.
    #[error("the file is truncated: it has {size} bytes, the image {expected} bytes")]
    TooShort {
        /// The size of the file, in bytes.
        size: u64,
        /// The size that the superblock gives, in bytes.
        expected: u64,
    },
    /// The file has trailing data.
    #[error("the file has trailing data: it has {size} bytes, the image {expected} bytes")]
    TooLong {
        /// The size of the file, in bytes.
        size: u64,
        /// The size that the superblock gives, in bytes.
        expected: u64,
    },
}

/// The formats that the caller accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accept {
    Composefs,
    AnyErofs,
}

/// The contents of the composefs header and the EROFS superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    format: Format,
    has_acl: bool,
    block_bits: u8,
    blocks: u64,
}

impl Header {
    /// Parses the start of an image: [`HEADER_SIZE`] bytes, or all bytes of a shorter file.
    pub(crate) fn parse(start: &[u8], accept: Accept) -> Result<Header, ImageProblem> {
        let superblock_magic = u32_at(start, EROFS_SUPERBLOCK);
        if u32_at(start, 0) != Some(COMPOSEFS_MAGIC) {
            return match (superblock_magic, accept) {
                (Some(EROFS_MAGIC), Accept::AnyErofs) => Header::parse_erofs(start, Format::Erofs),
                (Some(EROFS_MAGIC), Accept::Composefs) => Err(ImageProblem::PlainErofs),
                _ if start.is_empty() => Err(ImageProblem::Empty),
                (_, Accept::AnyErofs) => Err(ImageProblem::NotErofs),
                (_, Accept::Composefs) => Err(ImageProblem::NotComposefs),
            };
        }
        // A file that is truncated within the first words has no version.
        match u32_at(start, 4) {
            None | Some(COMPOSEFS_HEADER_VERSION) => {}
            Some(version) => return Err(ImageProblem::HeaderVersion(version)),
        }
        let (Some(EROFS_MAGIC), Some(flags), Some(version)) =
            (superblock_magic, u32_at(start, 8), u32_at(start, 12))
        else {
            return Err(ImageProblem::NoSuperblock);
        };
        let header = Header::parse_erofs(start, Format::Composefs { version })?;
        if header.block_bits != COMPOSEFS_BLOCK_BITS {
            return Err(ImageProblem::BlockSize(header.block_bits));
        }
        Ok(Header { has_acl: flags & COMPOSEFS_HAS_ACL != 0, ..header })
    }

    fn parse_erofs(start: &[u8], format: Format) -> Result<Header, ImageProblem> {
        let superblock = start.get(EROFS_SUPERBLOCK..).unwrap_or_default();
        let (Some(block_bits), Some(low_blocks)) =
            (superblock.get(12).copied(), u32_at(superblock, 36))
        else {
            return Err(ImageProblem::NoSuperblock);
        };
        // The limits of loop devices, and of the kernel's page sizes.
        if !(9..=16).contains(&block_bits) {
            return Err(ImageProblem::BlockSize(block_bits));
        }
        let mut blocks = u64::from(low_blocks);
        if format == Format::Erofs && u32_at(superblock, 80).unwrap_or(0) & EROFS_48BIT != 0 {
            let high = superblock.get(14..16).unwrap_or_default().first_chunk();
            blocks |= u64::from(high.map_or(0, |high| u16::from_le_bytes(*high))) << 32;
        }
        Ok(Header { format, has_acl: false, block_bits, blocks })
    }

    /// Returns the size of the whole image, in bytes.
    pub fn size(&self) -> u64 {
        self.blocks << self.block_bits
    }

    /// Returns the format of the image.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Returns the size of the blocks of the EROFS, in bytes.
    pub fn block_size(&self) -> u32 {
        1 << self.block_bits
    }

    /// Compares the size of the file with the size of the image. The kernel does not compare them: it mounts
    /// a truncated image, and reads fail later.
    ///
    /// A plain EROFS image may have trailing data, such as padding.
    pub(crate) fn check_size(&self, size: u64) -> Result<(), ImageProblem> {
        let expected = self.size();
        match size.cmp(&expected) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Less => Err(ImageProblem::TooShort { size, expected }),
            std::cmp::Ordering::Greater if self.format == Format::Erofs => Ok(()),
            std::cmp::Ordering::Greater => Err(ImageProblem::TooLong { size, expected }),
        }
    }

    /// Returns whether the image is known to hold no ACL. V2 images leave the flag clear even if they
    /// hold ACLs.
    pub(crate) fn has_no_acl(&self) -> bool {
        matches!(self.format, Format::Composefs { version: 0 | 1 }) && !self.has_acl
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V1: &[u8] = include_bytes!("../../tests/images/v1/image.cfs");
    const V2: &[u8] = include_bytes!("../../tests/images/v2-sha512/image.cfs");

    #[test]
    fn real_image_reports_version_size_and_acl_flag() {
        let v1 = Header::parse(V1, Accept::Composefs).unwrap();
        assert_eq!((v1.format().to_string(), v1.size()), ("composefs V1".into(), V1.len() as u64));
        assert!(!v1.has_no_acl());
        let v2 = Header::parse(&V2[..HEADER_SIZE], Accept::Composefs).unwrap();
        assert_eq!((v2.format(), v2.size()), (Format::Composefs { version: 2 }, V2.len() as u64));
        assert!(!v2.has_no_acl(), "a V2 image with a clear flag may hold ACLs");
    }

    /// An image's first bytes with some of them changed.
    fn patched(offset: usize, bytes: &[u8]) -> Vec<u8> {
        let mut image = V1.to_vec();
        image[offset..][..bytes.len()].copy_from_slice(bytes);
        image
    }

    #[test]
    fn each_damaged_header_reports_its_own_error() {
        let parse = |bytes: &[u8]| Header::parse(bytes, Accept::Composefs).unwrap_err();
        assert_eq!(parse(b""), ImageProblem::Empty);
        assert_eq!(parse(&[0x7f; HEADER_SIZE]), ImageProblem::NotComposefs);
        assert_eq!(parse(&patched(0, &[0; 4])), ImageProblem::PlainErofs);
        assert_eq!(parse(&patched(4, &[2, 0, 0, 0])), ImageProblem::HeaderVersion(2));
        assert_eq!(parse(&patched(1024, &[0; 4])), ImageProblem::NoSuperblock);
        assert_eq!(parse(&patched(1036, &[9])), ImageProblem::BlockSize(9));
        for length in [4, 31, 32, 1023, 1026, 1036, 1063] {
            assert_eq!(parse(&V1[..length]), ImageProblem::NoSuperblock, "{length} bytes");
        }
    }

    #[test]
    fn v1_image_without_acl_flag_reports_no_acl() {
        assert!(Header::parse(&patched(8, &[0; 4]), Accept::Composefs).unwrap().has_no_acl());
    }

    proptest! {
        #[test]
        fn arbitrary_header_never_panics(bytes: Vec<u8>) {
            let _ = Header::parse(&bytes, Accept::Composefs);
            let _ = Header::parse(&bytes, Accept::AnyErofs).map(|header| header.size());
        }

        #[test]
        fn changed_header_is_rejected_or_reports_its_size(offset in 0..1152usize, value: u8) {
            let image = patched(offset, &[value]);
            match Header::parse(&image, Accept::Composefs) {
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
        fn too_short_or_too_long_image_is_rejected(size: u64) {
            let header = Header::parse(V1, Accept::Composefs).unwrap();
            let expected = V1.len() as u64;
            let wanted = match size {
                size if size < expected => Err(ImageProblem::TooShort { size, expected }),
                size if size > expected => Err(ImageProblem::TooLong { size, expected }),
                _ => Ok(()),
            };
            prop_assert_eq!(header.check_size(size), wanted);
        }
    }
}
