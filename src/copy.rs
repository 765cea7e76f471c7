//! An image's bytes into sealed memory, hashed on the way.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::io::{Errno, retry_on_intr};
use rustix::thread::sched_getaffinity;

use crate::allocation::{buffers, filled, room_for_threads};
use crate::digest::{Algorithm, Digest, Hash, MerkleTree, SpanHasher};
use crate::error::{Error, KernelError, Operation};
use crate::image::{Image, read_at};
use crate::memory::{SealedMemory, UnsealedMemory};
use crate::options::{Memory, SizeLimit};
use crate::step::Progress;
use crate::thread::in_threads;

/// What a thread reads, writes and hashes at a time: large enough that system calls do not count,
/// small enough to stay in its core's cache meanwhile.
pub(crate) const PIECE_SIZE: usize = 128 * 1024;

/// Writes into one file take turns, which leaves nothing to do for more threads than this.
const THREADS_MAX: usize = 8;

/// Copies an image into memory of this kind and of at most `limit` bytes, and seals it; with
/// `expected`, only if that is its digest.
pub(crate) fn into_memory(
    image: &Image,
    kind: Memory,
    limit: Option<SizeLimit>,
    expected: Option<Digest>,
    progress: Progress,
) -> Result<SealedMemory, Error> {
    let memory = UnsealedMemory::create(kind, &image.name, image.size, limit)?;
    let algorithm = expected.map(|digest| digest.algorithm());
    let spans = copy(image, memory.file(), algorithm, progress)?;
    check_digest(&image.name, image.size, spans, expected)?;
    memory.seal(&image.name)
}

/// Whether what was copied has the digest that was asked for, if one was.
pub(crate) fn check_digest(
    image: &Path,
    size: u64,
    spans: Vec<Hash>,
    expected: Option<Digest>,
) -> Result<(), Error> {
    let Some(expected) = expected else { return Ok(()) };
    let found = MerkleTree::new(expected.algorithm(), size).digest(spans);
    if expected != found {
        return Err(Error::mismatch(image, expected, found));
    }
    Ok(())
}

/// Copies as many bytes as the image had when it was opened, and hashes the bytes that it writes:
/// with an algorithm, returns the hashes of the spans of the Merkle tree.
///
/// Without one, this thread copies alone: hashing is what several are of use for.
///
/// Threads take spans as they come: each reads a piece, writes it and hashes it while it is in the
/// cache. docs/design.md has the designs that were measured against this one.
fn copy(
    image: &Image,
    memory: &OwnedFd,
    algorithm: Option<Algorithm>,
    mut progress: Progress,
) -> Result<Vec<Hash>, Error> {
    let tree = MerkleTree::new(algorithm.unwrap_or(Algorithm::Sha256), image.size);
    let spans = image.size.div_ceil(tree.span_size() as u64) as usize;
    let no_memory = |errno| KernelError::new(Operation::TakeMemory, errno).on(&image.name);
    let hashes = Hashes::of(spans).map_err(no_memory)?;
    // Where no digest says what was read, it is at least read in order, as others would.
    let threads = if algorithm.is_some() { threads().min(spans.max(1)) } else { 1 };
    let mut buffers = buffers(threads, PIECE_SIZE).into_iter();
    let own_buffer = buffers.next().ok_or(Errno::NOMEM).map_err(no_memory)?;
    let helpers = room_for_threads(buffers.len()).map_err(no_memory)?;

    let next = AtomicU64::new(0);
    let done = AtomicU64::new(0);
    let work = |mut buffer: Vec<u8>, progress: &mut dyn FnMut(u64)| -> Result<(), Error> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(span) = tree.span(number) else { return Ok(()) };
            let size = span.end - span.start;
            let hasher = algorithm.map(|_| tree.span_hasher());
            match copy_span(image, memory, span, &mut buffer, hasher) {
                Ok(hash) => {
                    hash.inspect(|hash| hashes.set(number, *hash));
                    progress(done.fetch_add(size, Ordering::Relaxed) + size);
                }
                Err(error) => {
                    // Nobody is to start another one.
                    next.store(u64::MAX / 2, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let work = &work;
    let helpers = buffers.take(helpers).map(|buffer| move || work(buffer, &mut |_| {}));
    in_threads(helpers, || work(own_buffer, &mut |done| progress.at(done)))?;

    let behind = read_at(&image.file, &mut [0], image.size)
        .map_err(|errno| KernelError::new(Operation::ReadImage, errno).on(&image.name))?;
    if behind > 0 {
        return Err(Error::ImageChanged { image: image.name.clone() });
    }
    Ok(hashes.into_inner())
}

/// The hashes of the spans, which come in any order.
pub(crate) struct Hashes(Mutex<Vec<Hash>>);

impl Hashes {
    pub fn of(spans: usize) -> Result<Hashes, Errno> {
        Ok(Hashes(Mutex::new(filled(spans, [0; 64])?)))
    }

    pub fn set(&self, span: u64, hash: Hash) {
        let mut hashes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = hashes.get_mut(span as usize) {
            *place = hash;
        }
    }

    pub fn into_inner(self) -> Vec<Hash> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many threads are of use. Not by the standard library, which also looks for limits of a cgroup,
/// by paths below /proc and /sys: in the mount namespace of somebody else a FIFO may be there.
pub(crate) fn threads() -> usize {
    let processors = sched_getaffinity(None).map_or(1, |set| set.count() as usize);
    processors.clamp(1, THREADS_MAX)
}

fn copy_span(
    image: &Image,
    memory: &OwnedFd,
    range: Range<u64>,
    buffer: &mut [u8],
    mut hasher: Option<SpanHasher>,
) -> Result<Option<Hash>, Error> {
    let failed = |operation, errno| KernelError::new(operation, errno).on(&image.name);
    let mut offset = range.start;
    while offset < range.end {
        let wanted = buffer.len().min((range.end - offset) as usize);
        let piece = &mut buffer[..wanted];
        let length = read_at(&image.file, piece, offset)
            .map_err(|errno| failed(Operation::ReadImage, errno))?;
        if length < wanted {
            return Err(Error::ImageChanged { image: image.name.clone() });
        }
        write_all_at(memory, piece, offset)
            .map_err(|errno| failed(Operation::WriteMemory, errno))?;
        if let Some(hasher) = &mut hasher {
            hasher.update(piece);
        }
        offset += length as u64;
    }
    Ok(hasher.map(SpanHasher::finish))
}

pub(crate) fn write_all_at(
    memory: &OwnedFd,
    mut bytes: &[u8],
    mut offset: u64,
) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match retry_on_intr(|| rustix::io::pwrite(memory, bytes, offset))? {
            // Never for memory; without this, a loop without end if it were.
            0 => return Err(Errno::IO),
            written => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::digest::compute_digest;

    const V1: &[u8] = include_bytes!("../tests/images/v1/image.cfs");

    /// An image as far as copying is concerned.
    fn image(content: &[u8], size: u64) -> Image {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        Image { file: file.into(), name: "/some/image.cfs".into(), size }
    }

    fn into_memfd(image: Image, expected: Option<Digest>) -> Result<SealedMemory, Error> {
        let steps = &mut |_| {};
        into_memory(&image, Memory::Memfd, None, expected, Progress::new(image.size, steps))
    }

    fn read_all(memory: &SealedMemory, size: usize) -> Vec<u8> {
        let mut content = vec![0; size + 1];
        let length = read_at(memory.file(), &mut content, 0).unwrap();
        content.truncate(length);
        content
    }

    #[test]
    fn an_image_that_changes_its_size_is_refused() {
        for size in [V1.len() as u64 - 4096, V1.len() as u64 + 4096] {
            let error = into_memfd(image(V1, size), None).unwrap_err();
            assert!(matches!(error, Error::ImageChanged { .. }), "{error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_copied_is_what_was_hashed(
            content in prop::collection::vec(any::<u8>(), 1..4096),
            repeat in 1..400usize,
        ) {
            let content = content.repeat(repeat);
            let digest = compute_digest(Algorithm::Sha256, &content);
            let memory = into_memfd(image(&content, content.len() as u64), Some(digest)).unwrap();
            prop_assert_eq!(read_all(&memory, content.len()), content.clone());

            let mut other = content;
            *other.last_mut().unwrap() ^= 1;
            let size = other.len() as u64;
            let result = into_memfd(image(&other, size), Some(digest));
            let is_mismatch = matches!(result, Err(Error::DigestMismatch { .. }));
            prop_assert!(is_mismatch);
        }
    }
}
