//! The options of a copy.

use std::fmt;

use crate::digest::Digest;

/// The kind of memory that holds a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryKind {
    /// A sealed memfd ([memfd_create(2)](https://man7.org/linux/man-pages/man2/memfd_create.2.html), Linux
    /// 3.17), mounted through a loop device. The kernel may swap it out.
    Memfd,
    /// A file in a private ramfs, whose superblock is read-only and which no process can reach. The kernel
    /// never swaps it out. From Linux 6.12, a ramfs is mounted without a loop device. Zeros pad the file to
    /// whole pages of the kernel.
    Ramfs,
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MemoryKind::Memfd => "sealed memfd",
            MemoryKind::Ramfs => "read-only ramfs",
        })
    }
}

/// The maximum size of a copy, in the format of the tmpfs option `size=`. 0 means no limit. A copy never
/// gets more memory than is available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeLimit {
    /// A number of bytes, rounded up to whole pages of the kernel.
    Bytes(u64),
    /// A percentage of the memory of the machine.
    Percent(u32),
}

impl SizeLimit {
    /// The description of the text, for messages.
    pub(crate) const EXPECTED: &str =
        "a number of bytes, with suffix k, m, g, t, p or e, or a percentage";

    /// Parses the text of the option `size=`.
    pub(crate) fn from_text(text: &[u8]) -> Option<SizeLimit> {
        let text = std::str::from_utf8(text).ok()?;
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit {
            "%" => return number.parse().ok().map(SizeLimit::Percent),
            "" => 0,
            "k" | "K" => 10,
            "m" | "M" => 20,
            "g" | "G" => 30,
            "t" | "T" => 40,
            "p" | "P" => 50,
            "e" | "E" => 60,
            _ => return None,
        };
        number.parse::<u64>().ok()?.checked_mul(1 << shift).map(SizeLimit::Bytes)
    }
}

/// The text of the option `size=` of sealmount and of tmpfs.
impl fmt::Display for SizeLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SizeLimit::Bytes(bytes) => bytes.fmt(f),
            SizeLimit::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// The options of a copy: the argument of [`Image::copy`](crate::Image::copy).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CopyOptions {
    /// The kind of memory.
    pub memory: MemoryKind,
    /// The maximum size of the copy. `None` means 50 % of the memory of the machine.
    pub size: Option<SizeLimit>,
    /// The fs-verity digest that the image must have.
    pub digest: Option<Digest>,
}

impl CopyOptions {
    /// Returns options for a copy in this kind of memory, with the default limit and without a digest.
    pub fn new(memory: MemoryKind) -> CopyOptions {
        CopyOptions { memory, size: None, digest: None }
    }
}
