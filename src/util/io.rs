//! Whole reads and writes at an offset.

use std::os::fd::AsFd;

use rustix::io::{Errno, pread, pwrite, retry_on_intr};

/// Reads from `offset` until the buffer is full or the file ends. Returns the number of bytes read.
pub(crate) fn read_at(file: impl AsFd, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let mut length = 0;
    while length < buffer.len() {
        let rest = &mut buffer[length..];
        match retry_on_intr(|| pread(&file, &mut *rest, offset + length as u64))? {
            0 => break,
            more => length += more,
        }
    }
    Ok(length)
}

/// Writes all bytes at `offset`.
pub(crate) fn write_all_at(
    file: impl AsFd,
    mut bytes: &[u8],
    mut offset: u64,
) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match retry_on_intr(|| pwrite(&file, bytes, offset))? {
            // A write to a file in memory never returns 0. The error prevents an endless loop.
            0 => return Err(Errno::IO),
            written => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
        }
    }
    Ok(())
}
