//! Copies an image into sealed memory, and hashes the bytes on the way.

use std::path::Path;

use crate::digest::Algorithm;
use crate::digest::Digest;
use crate::digest::parallel::{Halted, OnProgress, SpanReader};
use crate::digest::tree::{Hash, MerkleTree};
use crate::image::Image;
use crate::kernel::{KernelError, Operation};
use crate::source::error::SourceError;
use crate::source::limits::{Need, check_limit};
use crate::source::memory::{SealedMemory, UnsealedMemory};
use crate::source::options::CopyOptions;
use crate::util::io::{read_at, write_all_at};
use crate::util::threads::useful_threads;

/// Copies an image into memory and seals it. With `expected`, the copy must have that digest.
pub(crate) fn into_memory(
    image: &Image,
    options: &CopyOptions,
    expected: Option<Digest>,
    progress: OnProgress,
) -> Result<SealedMemory, SourceError> {
    let (path, size) = (image.path(), image.file_size());
    check_limit(path, Need::of_size(size), options.size, image.procfs.as_deref())?;
    let memory = UnsealedMemory::create(options.memory, path, size)?;
    let algorithm = expected.map(|digest| digest.algorithm());
    let spans = copy(image, &memory, algorithm, progress)?;
    check_digest(path, size, spans, expected)?;
    memory.seal(path)
}

/// Checks that the spans have the expected digest, if there is one.
pub(crate) fn check_digest(
    image: &Path,
    size: u64,
    spans: Vec<Hash>,
    expected: Option<Digest>,
) -> Result<(), SourceError> {
    let Some(expected) = expected else { return Ok(()) };
    let found = MerkleTree::new(expected.algorithm(), size).digest(spans);
    if expected != found {
        return Err(SourceError::mismatch(image, expected, found));
    }
    Ok(())
}

/// Copies as many bytes as the image had when it was opened. With an algorithm, hashes the bytes that it
/// writes, and returns the hashes of the spans of the Merkle tree.
///
/// Each thread reads a piece, writes it and hashes it while it is in the cache. docs/design.md has the
/// designs that were measured against this one.
fn copy(
    image: &Image,
    memory: &UnsealedMemory,
    algorithm: Option<Algorithm>,
    progress: OnProgress,
) -> Result<Vec<Hash>, SourceError> {
    let (path, size) = (image.path(), image.file_size());
    let failed = |operation, errno| KernelError::new(operation, errno).on(path);
    let reader = SpanReader {
        tree: MerkleTree::new(algorithm.unwrap_or(Algorithm::Sha256), size),
        // Without hashing, one thread is as fast. One thread also reads in order, as any program would. This
        // matters because no digest shows whether the file changed meanwhile.
        threads: if algorithm.is_some() { useful_threads() } else { 1 },
        hashes: algorithm.is_some(),
    };
    let copy_piece = |piece: &mut [u8], offset| -> Result<Option<&[u8]>, Stopped> {
        let length = read_at(&image.file, piece, offset)
            .map_err(|errno| failed(Operation::ReadImage, errno))?;
        if length < piece.len() {
            return Err(SourceError::Changed { image: path.to_owned() }.into());
        }
        write_all_at(memory.file(), piece, offset)
            .map_err(|errno| failed(Operation::WriteMemory, errno))?;
        Ok(None)
    };
    let spans = reader.run(copy_piece, progress).map_err(|stopped| stopped.of(path))?;
    let behind = read_at(&image.file, &mut [0], size)
        .map_err(|errno| failed(Operation::ReadImage, errno))?;
    if behind > 0 {
        return Err(SourceError::Changed { image: path.to_owned() });
    }
    Ok(spans)
}

/// The reason why threads stopped: an error with the image, or a reason without it.
pub(crate) enum Stopped {
    Halted(Halted),
    Failed(Box<SourceError>),
}

impl Stopped {
    pub fn of(self, image: &Path) -> SourceError {
        match self {
            Stopped::Halted(halted) => SourceError::from_halted(image, halted),
            Stopped::Failed(error) => *error,
        }
    }
}

impl From<Halted> for Stopped {
    fn from(halted: Halted) -> Stopped {
        Stopped::Halted(halted)
    }
}

impl<E: Into<SourceError>> From<E> for Stopped {
    fn from(error: E) -> Stopped {
        Stopped::Failed(Box::new(error.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;
    use crate::source::options::MemoryKind;

    const V1: &[u8] = include_bytes!("../../tests/images/v1/image.cfs");

    /// An image of `size` bytes: a real header, whose superblock gives this size, and other bytes.
    fn image(content: &[u8], size: u64) -> Image {
        let mut bytes = V1.to_vec();
        bytes[1060..1064].copy_from_slice(&(size as u32 / 4096).to_le_bytes());
        bytes.extend(content.iter().cycle().take(size as usize - V1.len()));
        let file = memfd_create("image", MemfdFlags::CLOEXEC).unwrap();
        write_all_at(&file, &bytes, 0).unwrap();
        Image::open(file).unwrap()
    }

    fn into_memfd(image: &Image, expected: Option<Digest>) -> Result<SealedMemory, SourceError> {
        let options = CopyOptions::new(MemoryKind::Memfd);
        into_memory(image, &options, expected, &mut |_| ControlFlow::Continue(()))
    }

    fn read_all(file: &impl std::os::fd::AsFd, size: u64) -> Vec<u8> {
        let mut content = vec![0; size as usize + 1];
        let length = read_at(file, &mut content, 0).unwrap();
        content.truncate(length);
        content
    }

    #[test]
    fn image_with_changed_size_is_rejected() {
        for size in [0, 4096, V1.len() as u64 - 1, V1.len() as u64 + 1] {
            let image = image(b"", V1.len() as u64);
            ftruncate(&image.file, size).unwrap();
            let error = into_memfd(&image, None).unwrap_err();
            assert!(matches!(error, SourceError::Changed { .. }), "{error}");
        }
    }

    #[test]
    fn cancelled_copy_reports_the_image() {
        let image = image(b"x", 8 << 20);
        let options = CopyOptions::new(MemoryKind::Memfd);
        let error =
            into_memory(&image, &options, None, &mut |_| ControlFlow::Break(())).unwrap_err();
        assert!(matches!(error, SourceError::Cancelled { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn copy_keeps_hashed_bytes_or_is_rejected(
            content in prop::collection::vec(any::<u8>(), 1..4096),
            blocks in 6..400u64,
        ) {
            let size = blocks * 4096;
            let image = image(&content, size);
            let content = read_all(&image.file, size);
            let digest = Digest::of_bytes(Algorithm::Sha256, &content);
            let memory = into_memfd(&image, Some(digest)).unwrap();
            prop_assert_eq!(read_all(memory.file(), size), content.clone());

            write_all_at(&image.file, &[content[size as usize - 1] ^ 1], size - 1).unwrap();
            let result = into_memfd(&image, Some(digest));
            let is_mismatch = matches!(result, Err(SourceError::DigestMismatch { .. }));
            prop_assert!(is_mismatch);
        }
    }
}
