//! Compressed images, made by the programs that users have, through `copy`.

use std::fs;
use std::io::Write;

use proptest::prelude::*;
use sealmount::{
    Algorithm, Compression, Error, ImageError, Memory, MountOptions, SizeLimit, Step,
    compute_digest,
};
use test_support::{Sandbox, V1, V2, assert_is_manifest, large_image, sandbox, through};

const PROGRAMS: [(Compression, &[&str]); 3] = [
    (Compression::Zstd, &["zstd", "-19", "-c"]),
    (Compression::Xz, &["xz", "-c"]),
    (Compression::Gzip, &["gzip", "-c"]),
];

/// Whether this build has a decoder for what the program makes.
fn is_supported(program: &[&str]) -> bool {
    let formats = [
        ("zstd", cfg!(feature = "zstd")),
        ("xz", cfg!(feature = "xz")),
        ("gzip", cfg!(feature = "gzip")),
    ];
    formats.contains(&(program[0], true))
}

fn supported<'a>(programs: &'a [&'a [&'a str]]) -> impl Iterator<Item = &'a [&'a str]> {
    programs.iter().copied().filter(|program| is_supported(program))
}

fn formats() -> impl Iterator<Item = (Compression, &'static [&'static str])> {
    PROGRAMS.into_iter().filter(|(_, program)| is_supported(program))
}

fn options(digest: bool) -> MountOptions {
    let mut options = V1.copy_options();
    options.digest = digest.then(|| V1.digest());
    options
}

/// The error of mounting this.
fn refused(sandbox: &Sandbox, options: &MountOptions, content: &[u8]) -> Error {
    match options.mount(sandbox.file("refused", content)) {
        Err(error) => error,
        Ok(_) => panic!("mounted"),
    }
}

/// RLIMIT_DATA: all private writable memory of the process, anonymous or not, the first stack aside.
#[test]
fn a_large_image_is_decompressed_in_8_mib_with_the_window() {
    let Some(sandbox) = sandbox!() else { return };
    let mnt = sandbox.directory("mnt");
    let content = large_image(64 << 20);
    let digest = compute_digest(Algorithm::Sha256, &content);
    let basedir = V1.objects();
    let options = format!("copy,noverity,digest={digest},basedir={}", basedir.display());
    // Windows of 2 MiB, 1 MiB and 32 KiB.
    for program in supported(&[&["zstd", "-3"], &["xz", "-1"], &["gzip"]]) {
        let image = sandbox.file("large", &through(program, &content));
        let (image, mnt_text) = (image.to_str().unwrap(), mnt.to_str().unwrap());
        let helper = env!("CARGO_BIN_EXE_mount-composefs");
        test_support::run("prlimit", ["--data=8388608", helper, image, mnt_text, "-o", &options]);
        test_support::umount(&mnt);
    }
}

#[test]
fn every_format_is_mounted() {
    let Some(sandbox) = sandbox!() else { return };
    let mnt = sandbox.directory("mnt");
    for (format, program) in formats() {
        for fixture in [V1, V2] {
            for memory in [Memory::Memfd, Memory::Ramfs] {
                let compressed = through(program, &fs::read(fixture.image()).unwrap());
                let image = sandbox.file("image", &compressed);
                let mut options = fixture.copy_options();
                options.copy = Some(memory);
                let mut steps = Vec::new();
                let mount = options.mount_with(&image, &mut |step| steps.push(step)).unwrap();
                assert!(matches!(
                    steps[0],
                    Step::ImageOpened { compression: Some(found), .. } if found == format,
                ));
                mount.attach(&mnt).unwrap();
                fs::remove_file(image).unwrap();
                assert_is_manifest(&mnt);
                test_support::umount(&mnt);
            }
        }
    }
}

#[test]
fn images_of_many_spans_are_hashed_as_they_are() {
    let Some(sandbox) = sandbox!() else { return };
    // Around the spans of both algorithms, and more of them than threads can be waiting.
    for size in [256 << 10, 512 << 10, (512 << 10) + 4096, 9 << 20, (9 << 20) - 4096] {
        let image = large_image(size);
        for (_, program) in formats() {
            let path = sandbox.file("large", &through(&[program[0], "-1", "-c"], &image));
            for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
                let mut options = options(false);
                options.digest = Some(compute_digest(algorithm, &image));
                options.mount(&path).unwrap_or_else(|error| panic!("{size} {program:?}: {error}"));
            }
        }
    }
}

#[test]
fn frames_are_taken_together() {
    let Some(sandbox) = sandbox!() else { return };
    let image = fs::read(V1.image()).unwrap();
    let (one, other) = image.split_at(5000);
    for (_, program) in formats() {
        let frames = [through(program, one), through(program, b""), through(program, other)];
        options(true).mount(sandbox.file("frames", &frames.concat())).unwrap();
    }
    if !is_supported(&["zstd"]) {
        return;
    }
    // Skippable frames: a magic number, a length, and what is skipped.
    let skippable = [&[0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    let zstd = through(PROGRAMS[0].1, &image);
    let frames = [&skippable, &zstd, &skippable].map(Vec::as_slice).concat();
    options(true).mount(sandbox.file("skippable", &frames)).unwrap();
}

#[test]
fn a_build_without_a_format_says_so() {
    let Some(sandbox) = sandbox!() else { return };
    for (format, program) in PROGRAMS {
        let compressed = through(program, &fs::read(V1.image()).unwrap());
        let result = options(false).mount(sandbox.file("image", &compressed));
        match result {
            Ok(_) => assert!(is_supported(program), "{format}"),
            Err(Error::Image { problem: ImageError::CompressionUnsupported(found), .. }) => {
                assert!(found == format && !is_supported(program), "{format}");
            }
            Err(error) => panic!("{format}: {error}"),
        }
    }
}

#[test]
fn without_copy_it_is_refused() {
    let Some(sandbox) = sandbox!() else { return };
    for (format, program) in formats() {
        let compressed = through(program, &fs::read(V1.image()).unwrap());
        let mut options = options(false);
        options.copy = None;
        let error = refused(&sandbox, &options, &compressed);
        let Error::Image { problem: ImageError::Compressed(found), .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(*found, format);
        assert!(error.hint().unwrap().contains("copy"));
    }
}

#[test]
fn what_is_cut_off_or_goes_on_is_refused() {
    let Some(sandbox) = sandbox!() else { return };
    let image = fs::read(V1.image()).unwrap();
    for (_, program) in formats() {
        let whole = through(program, &image);
        for length in [8, whole.len() / 3, whole.len() - 5, whole.len() - 1] {
            let error = refused(&sandbox, &options(false), &whole[..length]);
            assert!(matches!(error, Error::Decompress { .. }), "{length}: {error}");
        }
        for garbage in [&b"garbage behind the end of it"[..], b"\x7f"] {
            let error = refused(&sandbox, &options(false), &[&whole, garbage].concat());
            assert!(matches!(error, Error::Decompress { .. }), "{garbage:?}: {error}");
        }
        // A sound stream of something else, or of too little, or of too much.
        let error = refused(&sandbox, &options(false), &through(program, &image[..8192]));
        assert!(
            matches!(error, Error::Image { problem: ImageError::TooShort { .. }, .. }),
            "{error}",
        );
        let more = [image.as_slice(), &[0; 4096]].concat();
        let error = refused(&sandbox, &options(false), &through(program, &more));
        assert!(
            matches!(error, Error::Image { problem: ImageError::TooLong { .. }, .. }),
            "{error}",
        );
        let error = refused(&sandbox, &options(false), &through(program, &[7; 100_000]));
        assert!(matches!(error, Error::Image { problem: ImageError::NotComposefs, .. }), "{error}");
        let error = refused(&sandbox, &options(false), &through(program, b""));
        assert!(matches!(error, Error::Image { problem: ImageError::Empty, .. }), "{error}");
    }
}

/// Makes of an xz file with CRC64 one whose check is of this kind: said by the flags of the stream's
/// header, and again by those of its footer.
#[cfg(feature = "xz")]
fn xz_with_check(file: &[u8], check: u8) -> Vec<u8> {
    let mut file = file.to_vec();
    let footer = file.len() - 12;
    assert_eq!((file[7], file[footer + 9]), (4, 4), "CRC64");
    file[7] = check;
    let crc = crc32fast::hash(&file[6..8]).to_le_bytes();
    file[8..12].copy_from_slice(&crc);
    file[footer + 9] = check;
    let crc = crc32fast::hash(&file[footer + 4..footer + 10]).to_le_bytes();
    file[footer..footer + 4].copy_from_slice(&crc);
    file
}

#[cfg(feature = "xz")]
#[test]
fn a_check_of_an_unknown_kind_is_not_passed_over() {
    let Some(sandbox) = sandbox!() else { return };
    let image = fs::read(V1.image()).unwrap();
    let file = through(&["xz", "-c"], &image);
    assert_eq!(xz_with_check(&file, 4), file);
    // Reserved, of 4, 8 and 64 bytes; the second takes the place of CRC64, so all else is sound.
    for check in [2, 5, 13] {
        let error = refused(&sandbox, &options(true), &xz_with_check(&file, check));
        assert!(matches!(error, Error::Decompress { .. }), "{check}: {error}");
        assert!(error.to_string().contains("check"), "{check}: {error}");
    }
    // Behind a sound stream, too.
    let (one, other) = image.split_at(8192);
    let streams = [one, other].map(|part| through(&["xz", "-c"], part));
    let error = refused(
        &sandbox,
        &options(true),
        &[&streams[0][..], &xz_with_check(&streams[1], 5)].concat(),
    );
    assert!(matches!(error, Error::Decompress { .. }), "{error}");
    // What has no check is left to the digest, as by xz(1).
    for check in ["none", "crc32", "sha256"] {
        let file = through(&["xz", "-C", check, "-c"], &image);
        options(true).mount(sandbox.file("image", &file)).unwrap();
    }
}

#[cfg(feature = "xz")]
#[test]
fn xz_padding_is_of_four_bytes() {
    let Some(sandbox) = sandbox!() else { return };
    let (one, other) = (fs::read(V1.image()).unwrap(), through(&["xz", "-c"], b""));
    let one = through(&["xz", "-c"], &one);
    for padding in 1..=9 {
        let zeros = &[0; 9][..padding];
        for content in [[&one, zeros].concat(), [&one, zeros, &other].concat()] {
            let result = options(true).mount(sandbox.file("padded", &content));
            match result {
                Ok(_) => assert!(padding % 4 == 0, "{padding}"),
                Err(Error::Decompress { .. }) => assert!(padding % 4 != 0, "{padding}"),
                Err(error) => panic!("{padding}: {error}"),
            }
        }
    }
}

#[cfg(feature = "gzip")]
#[test]
fn only_zeros_may_follow_the_last_gzip_member() {
    let Some(sandbox) = sandbox!() else { return };
    let whole = through(&["gzip", "-n", "-c"], &fs::read(V1.image()).unwrap());
    // More than is read at a time.
    for padding in [1, 2, 7, 8, 9, 10, 18, 512, 300_000] {
        let mut padded = whole.clone();
        padded.resize(whole.len() + padding, 0);
        options(true).mount(sandbox.file("padded", &padded)).unwrap();
        // Neither a member nor anything else may follow that.
        for end in [&b"x"[..], &whole] {
            let error = refused(&sandbox, &options(true), &[&padded, end].concat());
            assert!(error.to_string().contains("something follows"), "{padding}: {error}");
        }
    }
    for length in 1..30 {
        let garbage = &b"garbage behind the end of a file"[..length];
        let error = refused(&sandbox, &options(true), &[&whole, garbage].concat());
        assert!(error.to_string().contains("something follows"), "{length}: {error}");
    }
}

/// RFC 1952: the flag FHCRC says that two bytes of the header's CRC32 follow it.
#[cfg(feature = "gzip")]
#[test]
fn the_crc_of_a_gzip_header_is_checked() {
    let Some(sandbox) = sandbox!() else { return };
    let plain = through(&["gzip", "-n", "-c"], &fs::read(V1.image()).unwrap());
    let mut header = plain[..10].to_vec();
    header[3] = 2;
    let crc = crc32fast::hash(&header) as u16;
    for (crc, is_right) in [(crc, true), (crc ^ 1, false), (crc ^ 0x8000, false)] {
        let content = [&header, &crc.to_le_bytes()[..], &plain[10..]].concat();
        let result = options(true).mount(sandbox.file("image", &content));
        match result {
            Ok(_) => assert!(is_right),
            Err(Error::Decompress { .. }) => assert!(!is_right),
            Err(error) => panic!("{error}"),
        }
    }
}

/// At every length, and without a digest: what is cut off must be nothing, and the cut between two
/// frames.
#[test]
fn no_stream_passes_that_is_cut_off() {
    let Some(sandbox) = sandbox!() else { return };
    let image = fs::read(V1.image()).unwrap();
    let (one, other) = image.split_at(9000);
    let options = options(false);
    for (format, program) in formats() {
        let whole = through(program, &image);
        let frames = [one, b"", other, b"", b""].map(|part| through(program, part));
        // Where frames end that nothing follows but frames of nothing.
        let end = frames[..3].concat().len();
        let ends = [end, end + frames[3].len()];
        for (stream, ends) in [(whole, &[][..]), (frames.concat(), &ends)] {
            let path = sandbox.file("cut", b"");
            let mut file = fs::File::options().append(true).open(&path).unwrap();
            for (length, byte) in stream.iter().enumerate() {
                let is_end = ends.contains(&length);
                match options.mount(&path) {
                    Ok(_) => assert!(is_end, "{format} {length}"),
                    Err(Error::Decompress { .. } | Error::Image { .. }) => {
                        assert!(!is_end, "{format} {length}")
                    }
                    Err(error) => panic!("{format} {length}: {error}"),
                }
                file.write_all(&[*byte]).unwrap();
            }
            options.mount(&path).unwrap();
        }
    }
}

#[cfg(feature = "zstd")]
#[test]
fn skippable_frames_are_no_image_and_are_whole() {
    let Some(sandbox) = sandbox!() else { return };
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 5, 0, 0, 0][..], b"12345"].concat();
    for count in [1, 2, 1000] {
        let error = refused(&sandbox, &options(false), &skippable.repeat(count));
        assert!(matches!(error, Error::Image { problem: ImageError::Empty, .. }), "{error}");
    }
    let image = through(&["zstd", "-c"], &fs::read(V1.image()).unwrap());
    for length in 1..skippable.len() {
        let error = refused(&sandbox, &options(true), &[&image, &skippable[..length]].concat());
        assert!(matches!(error, Error::Decompress { .. }), "{length}: {error}");
    }
}

#[test]
fn a_bomb_is_refused_before_it_goes_off() {
    let Some(sandbox) = sandbox!() else { return };
    // A gigabyte of zeros behind the image.
    let mut bomb = fs::read(V1.image()).unwrap();
    bomb.resize(1 << 30, 0);
    for program in supported(&[&["zstd", "-c"], &["gzip", "-1", "-c"]]) {
        let error = refused(&sandbox, &options(false), &through(program, &bomb));
        let Error::Image { problem: ImageError::TooLong { size, .. }, .. } = error else {
            panic!("{error}");
        };
        assert!(size < 1 << 20, "{size} bytes were decompressed before it was noticed");
    }
    // One that says how large it is.
    bomb[1060..1064].copy_from_slice(&(1u32 << 18).to_le_bytes());
    for program in supported(&[&["zstd", "-1", "-c"], &["gzip", "-1", "-c"]]) {
        let mut options = options(false);
        options.size = Some(SizeLimit::Bytes(100 << 20));
        let error = refused(&sandbox, &options, &through(program, &bomb));
        assert!(matches!(error, Error::NotEnoughMemory { size: 0x4000_0000, .. }), "{error}");
    }
}

#[test]
fn a_window_beyond_the_limit_is_refused() {
    let Some(sandbox) = sandbox!() else { return };
    // --long=31 makes zstd say that two gigabytes are referred back to, if the size is not known.
    let image = fs::read(V1.image()).unwrap();
    let dictionary = "--lzma2=preset=0,dict=192MiB";
    let wide: [&[&str]; 3] =
        [&["zstd", "--long=28", "-c"], &["zstd", "--long=31", "-c"], &["xz", dictionary, "-c"]];
    for program in supported(&wide) {
        let error = refused(&sandbox, &options(false), &through(program, &image));
        assert!(matches!(error, Error::WindowTooLarge { .. }), "{program:?}: {error}");
        assert!(error.to_string().contains("128 MiB"), "{error}");
        assert!(error.hint().unwrap().contains("without --long"), "{error}");
    }
    // The limit itself.
    let dictionary = "--lzma2=preset=0,dict=128MiB";
    for program in supported(&[&["zstd", "--long=27", "-c"], &["xz", dictionary, "-c"]]) {
        options(true).mount(sandbox.file("wide", &through(program, &image))).unwrap();
    }
}

#[test]
fn damage_never_passes() {
    let Some(sandbox) = sandbox!() else { return };
    let image = fs::read(V1.image()).unwrap();
    let compressed: Vec<_> = formats().map(|(_, program)| through(program, &image)).collect();
    if compressed.is_empty() {
        return;
    }
    let damage = (0..compressed.len(), any::<prop::sample::Index>(), 1..=255u8);
    proptest!(ProptestConfig::with_cases(300), |((format, at, flip) in damage)| {
        let mut damaged = compressed[format].clone();
        let at = at.index(damaged.len());
        damaged[at] ^= flip;
        let path = sandbox.file("damaged", &damaged);
        // A header's unused bits may change; what is mounted then is the image all the same.
        let mounted = options(true).mount(&path).is_ok();
        let without_digest = options(false).mount(&path).is_ok();
        prop_assert_eq!(mounted, without_digest, "a checksum lets pass what the digest does not");
    });
}
