//! A compressed image's bytes into sealed memory, hashed on the way.

use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::{self, TrySendError};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;

use crate::allocation::{buffers, filled, room_for_threads};
use crate::compression::{Refusal, decoder, is_supported};
use crate::copy::{Hashes, check_digest, threads, write_all_at};
use crate::digest::{Algorithm, Digest, MerkleTree};
use crate::error::{Error, KernelError, Operation};
use crate::image::{CompressedImage, Header, ImageError};
use crate::memory::{SealedMemory, UnsealedMemory, check_limit};
use crate::options::{Memory, SizeLimit};
use crate::step::{Progress, Step};
use crate::thread::in_threads;

/// Decoding is the slowest part of it: more threads would have nothing to do.
const HELPERS_MAX: usize = 3;

/// Spans that wait for a thread. With one for each thread, this is the memory that it takes beside
/// that of the decoder: 512 KiB each.
const WAITING_MAX: usize = 2;

/// Decompresses an image into memory of this kind and of at most `limit` bytes, and seals it; with
/// `expected`, only if that is its digest.
///
/// The first bytes say how large the image is, so a stream that goes on behind that, or would take
/// more than the limit, is refused as soon as it shows.
pub(crate) fn into_memory(
    image: &CompressedImage,
    kind: Memory,
    limit: Option<SizeLimit>,
    expected: Option<Digest>,
    steps: &mut dyn FnMut(Step),
) -> Result<(SealedMemory, Header), Error> {
    let wrong = |problem| Error::Image { image: image.name.clone(), problem };
    if !is_supported(image.format) {
        return Err(wrong(ImageError::CompressionUnsupported(image.format)));
    }
    // A stream can be padded without end: a sparse file of terabytes takes hours to read, and nothing
    // comes out. So what is larger than the copy may be is not read at all.
    check_limit(&image.name, image.size, limit).map_err(|error| match error {
        Error::NotEnoughMemory { image, size, limit } => {
            Error::CompressedTooLarge { image, size, limit }
        }
        error => error,
    })?;
    let no_memory = |errno| KernelError::new(Operation::TakeMemory, errno).on(&image.name);
    room_for_threads(0).map_err(no_memory)?;
    let decoder = decoder(image.format, &image.file, image.size)
        .map_err(|error| decompress_error(image, error))?;
    let mut stream = Stream { image, decoder };

    let algorithm = expected.map(|digest| digest.algorithm());
    // Without an algorithm the spans are but a way to share the work.
    let span_size = MerkleTree::new(algorithm.unwrap_or(Algorithm::Sha256), 0).span_size();
    let first = stream.next(filled(span_size, 0).map_err(no_memory)?)?;
    let header = Header::parse(&first).map_err(wrong)?;
    let size = header.size();
    let tree = MerkleTree::new(algorithm.unwrap_or(Algorithm::Sha256), size);
    let memory = UnsealedMemory::create(kind, &image.name, size, limit)?;
    let spans = size.div_ceil(span_size as u64) as usize;
    let hashes = algorithm.map(|_| Hashes::of(spans)).transpose().map_err(no_memory)?;
    let target = Target { image: &image.name, memory: memory.file(), tree, hashes };

    let mut progress = Progress::new(size, steps);
    let check_size = |size| header.check_size(size).map_err(wrong);
    write_spans(&target, spans, |write| {
        let (mut piece, mut decoded, mut number) = (first, 0, 0);
        // A span that is not full is the last.
        loop {
            let length = piece.len();
            decoded += length as u64;
            if decoded > size {
                check_size(decoded)?;
            }
            let buffer = write(number, piece)?;
            progress.at(decoded);
            if length < span_size {
                return check_size(decoded);
            }
            piece = stream.next(buffer)?;
            number += 1;
        }
    })?;
    let hashes = target.hashes.map(Hashes::into_inner).unwrap_or_default();
    check_digest(&image.name, size, hashes, expected)?;
    Ok((memory.seal(&image.name)?, header))
}

/// The decompressed image.
struct Stream<'a> {
    image: &'a CompressedImage,
    decoder: Box<dyn Read + 'a>,
}

impl Stream<'_> {
    /// Fills the buffer; it is cut to what there is where the stream ends.
    fn next(&mut self, mut buffer: Vec<u8>) -> Result<Vec<u8>, Error> {
        let mut length = 0;
        while length < buffer.len() {
            match self.decoder.read(&mut buffer[length..]) {
                Ok(0) => break,
                Ok(more) => length += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(decompress_error(self.image, error)),
            }
        }
        buffer.truncate(length);
        Ok(buffer)
    }
}

fn decompress_error(image: &CompressedImage, error: std::io::Error) -> Error {
    let kernel = |operation, errno| KernelError::new(operation, errno).on(&image.name).into();
    if let Some(errno) = Errno::from_io_error(&error) {
        return kernel(Operation::ReadImage, errno);
    }
    match Refusal::of(&error) {
        Some(Refusal::NoMemory) => kernel(Operation::TakeMemory, Errno::NOMEM),
        Some(Refusal::WindowTooLarge) => {
            Error::WindowTooLarge { image: image.name.clone(), format: image.format }
        }
        None => Error::Decompress { image: image.name.clone(), format: image.format, error },
    }
}

/// Where spans go.
struct Target<'a> {
    image: &'a Path,
    memory: &'a OwnedFd,
    tree: MerkleTree,
    /// Of what was written, where hashes are asked for.
    hashes: Option<Hashes>,
}

impl Target<'_> {
    /// Writes a span, and hashes what it writes.
    fn write(&self, number: u64, span: &[u8]) -> Result<(), Error> {
        let offset = number * self.tree.span_size() as u64;
        write_all_at(self.memory, span, offset)
            .map_err(|errno| KernelError::new(Operation::WriteMemory, errno).on(self.image))?;
        if let Some(hashes) = &self.hashes
            && !span.is_empty()
        {
            let mut hasher = self.tree.span_hasher();
            hasher.update(span);
            hashes.set(number, hasher.finish());
        }
        Ok(())
    }
}

/// A span and its number.
type Span = (u64, Vec<u8>);

/// Runs `decode` in this thread, with a function that takes a span and gives a buffer for the next.
/// Other threads write and hash the spans; this one does where they have enough to do, or where there
/// is no memory for more buffers. `decode` is expected to hand over about `spans`.
fn write_spans(
    target: &Target,
    spans: usize,
    decode: impl FnOnce(&mut dyn FnMut(u64, Vec<u8>) -> Result<Vec<u8>, Error>) -> Result<(), Error>,
) -> Result<(), Error> {
    let no_memory = |errno| KernelError::new(Operation::TakeMemory, errno).on(target.image);
    let helpers = threads().saturating_sub(1).clamp(1, HELPERS_MAX).min(spans.saturating_sub(1));
    // The decoder has one already.
    let wanted = if helpers > 0 { (helpers + WAITING_MAX).min(spans - 1) } else { 0 };
    let mut spare = buffers(wanted, target.tree.span_size());
    let helpers = room_for_threads(helpers.min(spare.len())).map_err(no_memory)?;

    let (sender, receiver) = mpsc::sync_channel::<Span>(WAITING_MAX);
    let receiver = Mutex::new(receiver);
    let (give_back, given_back) = mpsc::sync_channel(spare.len() + 1);
    let work = || {
        loop {
            let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
            // The decoder is done, and there is no span left.
            let Ok((number, span)) = next else { return };
            let written = target.write(number, &span).map(|()| span);
            let failed = written.is_err();
            // There is room for every buffer.
            let _ = give_back.try_send(written);
            if failed {
                return;
            }
        }
    };
    let helper = || {
        work();
        Ok(())
    };
    in_threads(std::iter::repeat_n(&helper, helpers), || {
        let result = decode(&mut |number, span| {
            // A write that failed ends it.
            for written in given_back.try_iter() {
                spare.push(written?);
            }
            let Some(buffer) = spare.pop() else {
                target.write(number, &span)?;
                return Ok(span);
            };
            match sender.try_send((number, span)) {
                Ok(()) => Ok(buffer),
                Err(TrySendError::Full((_, span)) | TrySendError::Disconnected((_, span))) => {
                    spare.push(buffer);
                    target.write(number, &span)?;
                    Ok(span)
                }
            }
        });
        // So that the others, and then this one, know where to stop.
        drop(sender);
        result?;
        work();
        Ok(())
    })?;
    given_back.try_iter().try_for_each(|written| written.map(drop))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;
    use crate::compression::Compression;

    #[test]
    fn a_write_that_fails_stops_the_decoder() {
        // What is written beyond its size fails, all else does not.
        let memory = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        let tree = MerkleTree::new(Algorithm::Sha256, 1 << 30);
        ftruncate(&memory, tree.span_size() as u64).unwrap();
        fcntl_add_seals(&memory, SealFlags::GROW).unwrap();
        let image = Path::new("/some/image.zst");
        let target = Target { image, memory: &memory, tree, hashes: None };

        let mut handed_over = 0;
        let error = write_spans(&target, 1000, |write| {
            write(1, vec![1; 4096])?;
            for _ in 0..1000 {
                std::thread::sleep(Duration::from_millis(1));
                write(0, vec![1; 4096])?;
                handed_over += 1;
            }
            Ok(())
        })
        .unwrap_err();
        assert_eq!(error.errno(), Some(Errno::PERM), "{error}");
        assert!(handed_over < 500, "{handed_over}");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_not_called_damaged() {
        for format in [Compression::Zstd, Compression::Xz, Compression::Gzip] {
            if !is_supported(format) {
                continue;
            }
            let file = File::open("/").unwrap().into();
            let image = CompressedImage { file, name: "/some/image".into(), size: 100, format };
            let error = into_memory(&image, Memory::Memfd, None, None, &mut |_| {}).unwrap_err();
            let Error::Kernel(kernel) = &error else { panic!("{format}: {error}") };
            assert_eq!((kernel.operation, kernel.errno), (Operation::ReadImage, Errno::ISDIR));
        }
    }
}
