//! The window of a compressed file: the distance that its decoder may refer back, from the first header.

use crate::image::compression::Compression;

/// The number of bytes that hold the first header of a file that ordinary programs write.
pub(crate) const START_SIZE: usize = 64;

/// The window of gzip, in bytes.
const GZIP_WINDOW: u64 = 32 << 10;

/// Returns the window of the first frame or block, in bytes. Returns `None` if `start` does not hold a header
/// with the window. The file is not verified, so the decoder may need another window.
pub(crate) fn first_window(format: Compression, start: &[u8]) -> Option<u64> {
    match format {
        Compression::Zstd => zstd_window(start),
        Compression::Xz => xz_dictionary(start),
        Compression::Gzip => Some(GZIP_WINDOW),
    }
}

/// Parses the [header of a frame](https://www.rfc-editor.org/rfc/rfc8878#name-frame-header), behind skippable
/// frames.
fn zstd_window(start: &[u8]) -> Option<u64> {
    let mut frame = start;
    while let [0x50..=0x5f, 0x2a, 0x4d, 0x18, a, b, c, d, rest @ ..] = frame {
        let length = u32::from_le_bytes([*a, *b, *c, *d]);
        frame = rest.get(usize::try_from(length).ok()?..)?;
    }
    let [0x28, 0xb5, 0x2f, 0xfd, descriptor, rest @ ..] = frame else { return None };
    let is_single_segment = descriptor & 1 << 5 != 0;
    if !is_single_segment {
        let window = *rest.first()?;
        let base = 1 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // The window is the whole content.
    let dictionary_id = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let length = 1 << (descriptor >> 6);
    let size = rest.get(dictionary_id..dictionary_id + length)?;
    let offset = if length == 2 { 256 } else { 0 };
    little_endian(size).checked_add(offset)
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Parses the [header of the first block](https://tukaani.org/xz/xz-file-format.txt).
fn xz_dictionary(start: &[u8]) -> Option<u64> {
    const STREAM_HEADER_SIZE: usize = 12;
    const LZMA2: u64 = 0x21;
    let [size, flags, fields @ ..] = start.get(STREAM_HEADER_SIZE..)? else { return None };
    // The index follows: there is no block.
    if *size == 0 {
        return None;
    }
    let mut fields = fields;
    // The compressed and the uncompressed size.
    for flag in [1 << 6, 1 << 7] {
        if flags & flag != 0 {
            take_number(&mut fields)?;
        }
    }
    for _ in 0..=flags & 3 {
        let filter = take_number(&mut fields)?;
        let length = usize::try_from(take_number(&mut fields)?).ok()?;
        let (properties, rest) = fields.split_at_checked(length)?;
        if filter == LZMA2 {
            let bits = u64::from(*properties.first()? & 0x3f);
            return Some((2 | bits & 1) << (bits / 2 + 11));
        }
        fields = rest;
    }
    None
}

/// Takes a number with seven bits in each byte, the lowest first.
fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn zstd_header_returns_its_window() {
        let window = |bytes: &[u8]| first_window(Compression::Zstd, bytes);
        let magic = b"\x28\xb5\x2f\xfd";
        let frame = |rest: &[u8]| [&magic[..], rest].concat();
        assert_eq!(window(&frame(b"\x84\x68\0\x90\x98\0")), Some(8 << 20));
        assert_eq!(window(&frame(b"\x00\x01")), Some(1152));
        assert_eq!(window(&frame(b"\x20\x07")), Some(7));
        assert_eq!(window(&frame(b"\x61\xff\x01\x02")), Some(0x201 + 256));
        assert_eq!(window(&frame(b"\xe0\0\0\0\0\x01\0\0\0")), Some(1 << 32));
        let skippable = b"\x51\x2a\x4d\x18\x02\0\0\0ab";
        assert_eq!(window(&[&skippable[..], &frame(b"\x04\x88")].concat()), Some(128 << 20));
        for without in [&b""[..], magic, b"\x50\x2a\x4d\x18\xff\xff\xff\xff", &frame(b"\x04")] {
            assert_eq!(window(without), None, "{without:?}");
        }
    }

    #[test]
    fn xz_header_returns_its_dictionary() {
        let window = |block: &[u8]| {
            first_window(
                Compression::Xz,
                &[&b"\xfd7zXZ\0\0\x04\xe6\xd6\xb4\x46"[..], block].concat(),
            )
        };
        assert_eq!(window(b"\x02\0\x21\x01\x16\0"), Some(8 << 20));
        assert_eq!(window(b"\x02\0\x21\x01\x1c\0"), Some(64 << 20));
        // With both sizes, and behind a filter for x86 code.
        assert_eq!(window(b"\x04\xc1\x81\x01\x05\x04\0\x21\x01\x17"), Some(12 << 20));
        for without in [&b""[..], b"\0\0\0", b"\x02\0\x21", b"\x02\0\x04\0", b"\x02\x40\x81"] {
            assert_eq!(window(without), None, "{without:?}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_parsed_without_panic(rest: Vec<u8>) {
            for (format, magic) in [
                (Compression::Zstd, &b"\x28\xb5\x2f\xfd"[..]),
                (Compression::Zstd, b"\x50\x2a\x4d\x18"),
                (Compression::Xz, b"\xfd7zXZ\0\0\x04\xe6\xd6\xb4\x46"),
            ] {
                first_window(format, &[magic, &rest].concat());
            }
        }
    }
}
