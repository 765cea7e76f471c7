//! Copies images into sealed memory, and compares the copies with the images. No test needs a mount, so these
//! tests also run on an emulated CPU of another architecture: `tests/cross test`.

use std::fs;
use std::os::fd::OwnedFd;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};
use sealmount::{
    Algorithm, Compression, CopyOptions, Digest, ErrorKind, Format, Image, MemoryKind, Source,
    SourceError, VerifiedBy,
};
use test_support::{V1, V2, large_image, through};

const FORMATS: [(Compression, &[&str]); 3] = [
    (Compression::Zstd, &["zstd", "-1", "-c"]),
    (Compression::Xz, &["xz", "-1", "-c"]),
    (Compression::Gzip, &["gzip", "-1", "-c"]),
];

/// Returns the compression formats that this build can decompress.
fn formats() -> impl Iterator<Item = (Compression, &'static [&'static str])> {
    FORMATS.into_iter().filter(|(format, _)| match format {
        Compression::Zstd => cfg!(feature = "zstd"),
        Compression::Xz => cfg!(feature = "xz"),
        Compression::Gzip => cfg!(feature = "gzip"),
        _ => unreachable!(),
    })
}

/// Returns the content as it is, and the output of each program.
fn files(content: &[u8]) -> Vec<(Option<Compression>, Vec<u8>)> {
    let plain = (None, content.to_vec());
    let compressed = formats().map(|(format, program)| (Some(format), through(program, content)));
    [plain].into_iter().chain(compressed).collect()
}

fn open(content: &[u8]) -> Image {
    let file = memfd_create("image", MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(rustix::io::pwrite(&file, content, 0), Ok(content.len()));
    Image::open(file).unwrap()
}

fn copy(content: &[u8], digest: Option<Digest>) -> Result<Source, SourceError> {
    let mut options = CopyOptions::new(MemoryKind::Memfd);
    options.digest = digest;
    open(content).copy(&options)
}

/// Returns the bytes of the copy, and checks that there are no more.
fn content_of(source: &Source) -> Vec<u8> {
    let size = source.report().size as usize;
    let mut content = vec![0; size + 1];
    assert_eq!(rustix::io::pread(source, &mut content[..], 0), Ok(size));
    content.truncate(size);
    content
}

/// Returns an image of this many blocks. Its superblock gives the size in the byte order of EROFS.
fn image_of_blocks(blocks: usize) -> Vec<u8> {
    large_image(blocks * 4096)
}

#[test]
fn bundled_images_report_format_size_and_digest() {
    for fixture in [V1, V2] {
        let content = fs::read(fixture.image()).unwrap();
        let image = open(&content);
        assert!(matches!(image.format(), Some(Format::Composefs { .. })), "{:?}", image.format());
        assert_eq!(image.size(), Some(content.len() as u64));
        let digest = fixture.digest();
        assert_eq!(Digest::of_bytes(digest.algorithm(), &content), digest);
        assert_eq!(Digest::of_reader(digest.algorithm(), content.as_slice()).unwrap(), digest);
    }
}

#[test]
fn copies_of_bundled_images_keep_content_and_digest() {
    for fixture in [V1, V2] {
        let content = fs::read(fixture.image()).unwrap();
        for (format, file) in files(&content) {
            let source = copy(&file, Some(fixture.digest())).unwrap();
            assert_eq!(source.report().compression, format);
            let verified = source.report().verified.unwrap();
            assert_eq!(verified.digest, fixture.digest());
            assert_eq!(verified.by, VerifiedBy::Userspace);
            assert!(content_of(&source) == content, "{format:?}");
            // The sealed copy is an image too.
            let sealed: OwnedFd = rustix::io::dup(&source).unwrap();
            assert!(Image::open(sealed).unwrap().is_sealed());
        }
    }
}

#[test]
fn image_with_another_digest_is_rejected() {
    let content = fs::read(V1.image()).unwrap();
    for other in [Digest::Sha256([0; 32]), V2.digest()] {
        for (format, file) in files(&content) {
            let error = copy(&file, Some(other)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DigestMismatch, "{format:?}: {error}");
        }
    }
}

#[test]
fn truncated_compressed_image_is_rejected() {
    let content = fs::read(V1.image()).unwrap();
    for (format, program) in formats() {
        let file = through(program, &content);
        for length in [file.len() - 1, file.len() / 2] {
            let error = copy(&file[..length], None).unwrap_err();
            assert!(matches!(error, SourceError::Decompress { .. }), "{format}: {error}");
        }
    }
}

#[test]
fn image_of_many_spans_keeps_content_and_digest() {
    // The sizes lie around the spans of both algorithms.
    for blocks in [63, 64, 65, 127, 128, 129, 128 * 3 + 1] {
        let content = image_of_blocks(blocks);
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let digest = Digest::of_bytes(algorithm, &content);
            assert_eq!(Digest::of_reader(algorithm, content.as_slice()).unwrap(), digest);
            for (format, file) in files(&content) {
                let source = copy(&file, Some(digest)).unwrap();
                assert!(content_of(&source) == content, "{blocks} {algorithm} {format:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn any_content_keeps_content_and_digest(
        blocks in 6..80usize,
        changes in prop::collection::vec((0..1usize << 20, any::<u8>()), 0..20),
    ) {
        let mut content = image_of_blocks(blocks);
        // The header is in the first 2048 bytes.
        for (position, byte) in changes {
            let position = 2048 + position % (content.len() - 2048);
            content[position] = byte;
        }
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let digest = Digest::of_bytes(algorithm, &content);
            for (format, file) in files(&content) {
                let source = copy(&file, Some(digest)).unwrap();
                prop_assert!(content_of(&source) == content, "{:?}", format);
            }
        }
    }
}
