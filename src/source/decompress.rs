//! Decompresses an image into sealed memory, and hashes the bytes on the way.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use crate::digest::Algorithm;
use crate::digest::parallel::{Halted, Hashes, buffers_for, read_span, share_spans};
use crate::digest::tree::MerkleTree;
use crate::image::compression::{Refusal, decoder, is_supported};
use crate::image::window::{START_SIZE, first_window};
use crate::image::{Compression, Header, Image, ImageProblem};
use crate::kernel::{KernelError, Operation};
use crate::source::copy::{Stopped, check_digest};
use crate::source::error::SourceError;
use crate::source::limits::{Need, check_limit};
use crate::source::memory::{SealedMemory, UnsealedMemory};
use crate::source::options::CopyOptions;
use crate::util::io::{read_at, write_all_at};
use crate::util::memory::{threads_that_fit, try_filled};

/// The memory of a decoder and of the threads, beside the window and the spans, in bytes. docs/benchmarks.md
/// has measurements.
const DECODER_SIZE: u64 = 1 << 20;

/// A callback for the number of bytes that are done, and the total. The callback can end the work.
pub(crate) type OnTotalProgress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// Decompresses an image into memory and seals it. If the options have a digest, the image must have that
/// digest.
///
/// The first bytes of the image hold its size. A stream is rejected as soon as it exceeds that size or the
/// limit.
pub(crate) fn into_memory(
    image: &Image,
    format: Compression,
    options: &CopyOptions,
    progress: OnTotalProgress,
) -> Result<(SealedMemory, Header), SourceError> {
    let path = image.path();
    let invalid = |problem| SourceError::invalid(path, problem);
    if !is_supported(format) {
        return Err(invalid(ImageProblem::CompressionUnsupported(format)));
    }
    // A stream can be padded without end: reading a sparse file of terabytes needs hours. So a file that is
    // larger than the copy may be is not read.
    let check = |need| check_limit(path, need, options.size, image.procfs.as_deref());
    let algorithm = options.digest.map(|digest| digest.algorithm());
    // Without an algorithm, spans only divide the work.
    let tree_algorithm = algorithm.unwrap_or(Algorithm::Sha256);
    let span_size = MerkleTree::new(tree_algorithm, 0).span_size();
    let (size, compression) = (image.file_size(), Some(format));
    let decoder_size = span_size as u64 + DECODER_SIZE;
    check(Need { size, decoder: decoder_size, allocated: 0, compression })?;
    let window = window_of(image, format)?;
    let no_memory = |errno| KernelError::new(Operation::AllocateBuffers, errno).on(path);
    threads_that_fit(0).map_err(no_memory)?;
    // The decoder and the loop below both report how far the work is.
    let progress = RefCell::new(progress);
    let (done, total) = (Cell::new(0), Cell::new(0));
    let report = || (progress.borrow_mut())(done.get(), total.get());
    let mut on_read = report;
    let mut decoder = decoder(format, &image.file, image.file_size(), &mut on_read)
        .map_err(|error| decompress_error(path, format, error))?;
    let mut next = |buffer: &mut Vec<u8>| {
        read_span(&mut *decoder, buffer).map_err(|error| decompress_error(path, format, error))
    };

    let mut first = try_filled(span_size, 0).map_err(no_memory)?;
    next(&mut first)?;
    let header = image.parse_header(&first).map_err(invalid)?;
    let size = header.size();
    total.set(size);
    let tree = MerkleTree::new(tree_algorithm, size);
    let needs = DecoderNeeds { image: size, window, span: span_size as u64 };
    let slack = check(needs.at_start(buffers_for(tree.spans())))?;
    let memory = UnsealedMemory::create(options.memory, path, size)?;
    let hashes = algorithm.map(|_| Hashes::new(tree.spans())).transpose().map_err(no_memory)?;
    let target =
        Target { image: path, memory: memory.file(), tree, hashes, written: AtomicU64::new(0) };

    let too_long = |decoded| invalid(ImageProblem::TooLong { size: decoded, expected: size });
    let write = |number, span: &[u8]| target.write(number, span).map_err(Stopped::from);
    share_spans(tree.spans(), span_size, write, |hand_over| {
        let (mut span, mut decoded, mut number) = (first, 0, 0);
        // A later frame or block may have a larger window. Each decoded byte takes at most one more byte of
        // it, so the slack cannot be used up earlier.
        let mut next_check = slack;
        // The first span that is not full is the last one.
        loop {
            let length = span.len();
            decoded += length as u64;
            if decoded > size {
                return Err(too_long(decoded).into());
            }
            span = hand_over(number, span)?;
            done.set(decoded);
            if report().is_break() {
                return Err(Halted::Cancelled.into());
            }
            if length < span_size {
                break;
            }
            if decoded >= next_check {
                let written = target.written.load(Ordering::Relaxed);
                next_check = decoded.saturating_add(check(needs.after(decoded, written))?);
            }
            span.resize(span_size, 0);
            next(&mut span)?;
            number += 1;
        }
        Ok(header.check_size(decoded).map_err(invalid)?)
    })
    .map_err(|stopped| stopped.of(path))?;
    let hashes = target.hashes.map(Hashes::into_inner).unwrap_or_default();
    check_digest(path, size, hashes, options.digest)?;
    Ok((memory.seal(path)?, header))
}

/// Returns the window of the first frame or block, in bytes, or 0 if it is not known.
fn window_of(image: &Image, format: Compression) -> Result<u64, KernelError> {
    let mut start = [0; START_SIZE];
    let length = read_at(&image.file, &mut start, 0)
        .map_err(|errno| KernelError::new(Operation::ReadImage, errno).on(image.path()))?;
    Ok(first_window(format, &start[..length]).unwrap_or(0))
}

/// The parts of the memory that a decompression needs, in bytes.
struct DecoderNeeds {
    image: u64,
    /// The window of the first frame or block.
    window: u64,
    span: u64,
}

impl DecoderNeeds {
    /// Returns the need before the decompression. The decoder writes its window from the start to the end, so
    /// the size of the image limits the memory of the window.
    fn at_start(&self, buffers: usize) -> Need {
        let buffers = buffers as u64 * self.span + DECODER_SIZE;
        let decoder = self.window.min(self.image) + buffers;
        Need { size: self.image, decoder, allocated: 0, compression: None }
    }

    /// Returns the need during the decompression, when the buffers are allocated. The next span must fit, also
    /// if the window grows.
    fn after(&self, decoded: u64, written: u64) -> Need {
        let decoder = self.window.min(self.image) + self.span;
        let allocated = written + self.window.min(decoded);
        Need { size: self.image, decoder, allocated, compression: None }
    }
}

fn decompress_error(image: &Path, format: Compression, error: io::Error) -> SourceError {
    let kernel = |operation, errno| KernelError::new(operation, errno).on(image).into();
    if let Some(errno) = Errno::from_io_error(&error) {
        return kernel(Operation::ReadImage, errno);
    }
    let image = || image.to_owned();
    match Refusal::of(&error) {
        Some(Refusal::Cancelled) => SourceError::Cancelled { image: image() },
        Some(Refusal::NoMemory) => kernel(Operation::AllocateBuffers, Errno::NOMEM),
        Some(Refusal::WindowTooLarge) => SourceError::WindowTooLarge { image: image(), format },
        None => SourceError::Decompress { image: image(), format, source: error },
    }
}

/// The destination of spans.
struct Target<'a> {
    image: &'a Path,
    memory: &'a OwnedFd,
    tree: MerkleTree,
    /// The hashes of the written spans, if the caller needs a digest.
    hashes: Option<Hashes>,
    /// The number of bytes that are written.
    written: AtomicU64,
}

impl Target<'_> {
    /// Writes a span, and hashes the bytes that it writes.
    fn write(&self, number: u64, span: &[u8]) -> Result<(), SourceError> {
        let failed = |operation, errno| KernelError::new(operation, errno).on(self.image);
        let offset = number * self.tree.span_size() as u64;
        write_all_at(self.memory, span, offset)
            .map_err(|errno| failed(Operation::WriteMemory, errno))?;
        self.written.fetch_add(span.len() as u64, Ordering::Relaxed);
        if let Some(hashes) = &self.hashes
            && !span.is_empty()
        {
            let mut hasher = self.tree.span_hasher();
            hasher.update(span);
            hashes
                .set(number, hasher.finish())
                .map_err(|errno| failed(Operation::AllocateBuffers, errno))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;
    use std::time::Duration;

    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;
    use crate::kernel::ErrorKind;
    use crate::source::options::MemoryKind;

    #[test]
    fn decoder_fails_early_after_failed_write() {
        // Only a write beyond the size of the memfd fails.
        let memory = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        let tree = MerkleTree::new(Algorithm::Sha256, 1 << 30);
        ftruncate(&memory, tree.span_size() as u64).unwrap();
        fcntl_add_seals(&memory, SealFlags::GROW).unwrap();
        let image = Path::new("/some/image.zst");
        let target =
            Target { image, memory: &memory, tree, hashes: None, written: AtomicU64::new(0) };

        let mut handed_over = 0;
        let write = |number, span: &[u8]| target.write(number, span).map_err(Stopped::from);
        let stopped = share_spans(1000, tree.span_size(), write, |hand_over| {
            hand_over(1, vec![1; 4096])?;
            for _ in 0..1000 {
                std::thread::sleep(Duration::from_millis(1));
                hand_over(0, vec![1; 4096])?;
                handed_over += 1;
            }
            Ok(())
        })
        .unwrap_err();
        let error = stopped.of(image);
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(handed_over < 500, "{handed_over}");
    }

    #[test]
    fn unreadable_compressed_file_reports_read_error() {
        for (format, start) in [
            (Compression::Zstd, &b"\x28\xb5\x2f\xfd"[..]),
            (Compression::Xz, b"\xfd7zXZ\0"),
            (Compression::Gzip, b"\x1f\x8b"),
        ] {
            if !is_supported(format) {
                continue;
            }
            let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
            write_all_at(&file, start, 0).unwrap();
            let mut image = Image::open(file).unwrap();
            image.file = std::sync::Arc::new(std::fs::File::open("/").unwrap().into());
            let options = CopyOptions::new(MemoryKind::Memfd);
            let ignored = &mut |_, _| ControlFlow::Continue(());
            let error = into_memory(&image, format, &options, ignored).unwrap_err();
            let SourceError::Kernel(kernel) = &error else { panic!("{format}: {error}") };
            assert_eq!((kernel.operation, kernel.errno), (Operation::ReadImage, Errno::ISDIR));
        }
    }

    #[cfg(feature = "gzip")]
    #[test]
    fn file_without_content_can_be_cancelled() {
        // A member without content, again and again.
        let member = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x03\0\0\0\0\0\0\0\0\0";
        let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        write_all_at(&file, &member.repeat(100_000), 0).unwrap();
        let image = Image::open(file).unwrap();
        let options = CopyOptions::new(MemoryKind::Memfd);
        let mut calls = 0;
        let error = into_memory(&image, Compression::Gzip, &options, &mut |done, total| {
            assert_eq!((done, total), (0, 0));
            calls += 1;
            if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap_err();
        assert!(matches!(error, SourceError::Cancelled { .. }), "{error}");
        assert_eq!(calls, 3);
    }
}
