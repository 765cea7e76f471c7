//! Compressed images: recognised by their first bytes, and read through decoders of other projects.

use std::fmt;
use std::io::{self, BufRead, Read};
use std::ops::{ControlFlow, Range};
use std::os::fd::OwnedFd;

use crate::util::io::read_at;
use crate::util::memory::try_filled;

/// The compression of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// [Zstandard](https://www.rfc-editor.org/rfc/rfc8878).
    Zstd,
    /// [xz](https://tukaani.org/xz/format.html).
    Xz,
    /// [gzip](https://www.rfc-editor.org/rfc/rfc1952).
    Gzip,
}

impl Compression {
    /// Recognises a format by the first bytes of a file.
    pub(crate) fn of(start: &[u8]) -> Option<Compression> {
        match start {
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
            // A skippable frame in front.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Compression::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Compression::Xz),
            [0x1f, 0x8b, ..] => Some(Compression::Gzip),
            _ => None,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Zstd => "zstd",
            Compression::Xz => "xz",
            Compression::Gzip => "gzip",
        })
    }
}

/// The limit of a decoder's window, as a power of two: 128 MiB. zstd without --long writes windows of at most
/// this size. The window of xz -9 has half of this size.
#[cfg(any(feature = "zstd", feature = "xz"))]
const WINDOW_LOG_MAX: u32 = 27;

/// Hears of each read of the compressed file, and can end the decompression.
pub(crate) type OnRead<'a> = &'a mut dyn FnMut() -> ControlFlow<()>;

/// The error of a read that [`OnRead`] ended.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("cancelled by the caller")]
struct Cancelled;

/// Returns a reader of the decompressed content: all frames, streams or members of the file in turn.
/// Trailing data, a wrong checksum and a truncated file are errors. At most `size` bytes of the file are
/// read: a file that grows has no end. `on_read` hears of each read of up to 128 KiB, as a file may be read for
/// long without any content. The format [is supported](is_supported).
#[allow(unreachable_patterns, unused_variables)] // Without some of the features.
pub(crate) fn decoder<'a>(
    format: Compression,
    file: &'a OwnedFd,
    size: u64,
    on_read: OnRead<'a>,
) -> io::Result<Box<dyn Read + 'a>> {
    let reader = FileReader::new(file, size, on_read)?;
    match format {
        #[cfg(feature = "zstd")]
        Compression::Zstd => zstd_decoder(reader),
        #[cfg(feature = "xz")]
        Compression::Xz => xz_decoder(reader),
        #[cfg(feature = "gzip")]
        Compression::Gzip => Ok(gzip_decoder(reader)),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Returns whether this build has a decoder for the format.
pub(crate) fn is_supported(format: Compression) -> bool {
    match format {
        Compression::Zstd => cfg!(feature = "zstd"),
        Compression::Xz => cfg!(feature = "xz"),
        Compression::Gzip => cfg!(feature = "gzip"),
    }
}

/// The reason why a decoder gives up on a file that may be intact.
#[cfg_attr(not(any(feature = "zstd", feature = "xz")), allow(dead_code))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Memory is short.
    NoMemory,
    /// The window of the file is larger than [`WINDOW_LOG_MAX`].
    WindowTooLarge,
    /// [`OnRead`] ended the decompression.
    Cancelled,
}

impl Refusal {
    /// Recognises the reason in a decoder's error.
    #[allow(unused_variables)] // Without some of the features.
    pub fn of(error: &io::Error) -> Option<Refusal> {
        if error.get_ref().is_some_and(|error| error.is::<Cancelled>()) {
            return Some(Refusal::Cancelled);
        }
        #[cfg(feature = "xz")]
        if let Some(error) = error.get_ref().and_then(|error| error.downcast_ref()) {
            return match error {
                liblzma::stream::Error::Mem => Some(Refusal::NoMemory),
                liblzma::stream::Error::MemLimit => Some(Refusal::WindowTooLarge),
                _ => None,
            };
        }
        #[cfg(feature = "zstd")]
        {
            use zstd::zstd_safe::{get_error_name, zstd_sys::ZSTD_ErrorCode};
            // The crate keeps only the text of the error.
            let text = error.get_ref().map(ToString::to_string);
            let is = |code: ZSTD_ErrorCode| {
                text.as_deref() == Some(get_error_name((code as usize).wrapping_neg()))
            };
            if is(ZSTD_ErrorCode::ZSTD_error_memory_allocation) {
                return Some(Refusal::NoMemory);
            }
            if is(ZSTD_ErrorCode::ZSTD_error_frameParameter_windowTooLarge) {
                return Some(Refusal::WindowTooLarge);
            }
        }
        None
    }
}

#[cfg(feature = "zstd")]
fn zstd_decoder(reader: FileReader<'_>) -> io::Result<Box<dyn Read + '_>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(reader)?;
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    Ok(Box::new(decoder))
}

#[cfg(feature = "xz")]
fn xz_decoder(reader: FileReader<'_>) -> io::Result<Box<dyn Read + '_>> {
    use liblzma::stream::{CONCATENATED, Stream, TELL_UNSUPPORTED_CHECK};
    // The decoder needs a little more memory than its window.
    let memory_limit = (1 << WINDOW_LOG_MAX) + (1 << 20);
    // By default liblzma ignores a check whose type it does not know.
    let stream = Stream::new_stream_decoder(memory_limit, CONCATENATED | TELL_UNSUPPORTED_CHECK)?;
    Ok(Box::new(liblzma::bufread::XzDecoder::new_stream(reader, stream)))
}

#[cfg(feature = "gzip")]
fn gzip_decoder(reader: FileReader<'_>) -> Box<dyn Read + '_> {
    Box::new(GzipMembers { member: Some(flate2::bufread::GzDecoder::new(reader)) })
}

/// The members of a gzip file. As with gzip(1), only zeros may follow the last member.
#[cfg(feature = "gzip")]
struct GzipMembers<'a> {
    member: Option<flate2::bufread::GzDecoder<FileReader<'a>>>,
}

#[cfg(feature = "gzip")]
impl Read for GzipMembers<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use flate2::bufread::GzDecoder;
        while let Some(member) = &mut self.member {
            match member.read(buffer)? {
                0 if !buffer.is_empty() => {
                    let reader = self.member.take().map(GzDecoder::into_inner);
                    self.member =
                        reader.map(next_member).transpose()?.flatten().map(GzDecoder::new);
                }
                length => return Ok(length),
            }
        }
        Ok(0)
    }
}

/// Returns the reader if another member follows.
#[cfg(feature = "gzip")]
fn next_member(mut reader: FileReader<'_>) -> io::Result<Option<FileReader<'_>>> {
    let garbage =
        || io::Error::new(io::ErrorKind::InvalidData, "trailing data behind the last member");
    if reader.fill_buf()?.first() == Some(&0x1f) {
        return Ok(Some(reader));
    }
    loop {
        let rest = reader.fill_buf()?;
        match rest.len() {
            0 => return Ok(None),
            _ if rest.iter().any(|byte| *byte != 0) => return Err(garbage()),
            length => reader.consume(length),
        }
    }
}

/// Reads a file from its start to `end`. The position of the descriptor does not count: other processes
/// may share it.
struct FileReader<'a> {
    file: &'a OwnedFd,
    /// The position of the next bytes for the buffer.
    offset: u64,
    end: u64,
    on_read: OnRead<'a>,
    buffer: Vec<u8>,
    /// The bytes of the buffer that are not read from it yet.
    unread: Range<usize>,
}

impl<'a> FileReader<'a> {
    /// The size that libzstd recommends for its input.
    const BUFFER_SIZE: usize = (128 << 10) + 3;

    fn new(file: &'a OwnedFd, end: u64, on_read: OnRead<'a>) -> io::Result<FileReader<'a>> {
        let buffer = try_filled(FileReader::BUFFER_SIZE, 0)?;
        Ok(FileReader { file, offset: 0, end, on_read, buffer, unread: 0..0 })
    }
}

impl Read for FileReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.read(buffer)?;
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for FileReader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.unread.is_empty() {
            let wanted = (self.end - self.offset).min(self.buffer.len() as u64) as usize;
            let length = read_at(self.file, &mut self.buffer[..wanted], self.offset)?;
            if (self.on_read)().is_break() {
                return Err(io::Error::other(Cancelled));
            }
            self.offset += length as u64;
            self.unread = 0..length;
        }
        Ok(&self.buffer[self.unread.clone()])
    }

    fn consume(&mut self, length: usize) {
        self.unread.start += length;
    }
}
