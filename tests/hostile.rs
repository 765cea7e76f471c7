//! Malicious images and object directories: sealmount rejects each in bounded time and memory, with a
//! message that names the cause.
//!
//! `SEALMOUNT_HOSTILE=all` mounts the whole corpus of mutated images instead of a sample.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{CWD, FileType, Mode, OFlags, RenameFlags, makedev, mknodat, renameat_with};
use rustix::io::Errno;
use sealmount::{
    DetachedMount, DirectoryRole, Error, ErrorKind, ImageProblem, Location, MountOptions,
    Operation, OverlayError, SizeLimit, SourceError,
};
use test_support::{
    ErofsImage, Sandbox, V1, assert_is_manifest, image_problem, sandbox, through, umount,
};

/// The limit of the helper's private memory: several times the size of six buffers of 512 KiB and the
/// window of a decoder.
const MEMORY: &str = "--data=16777216";
/// The limit of CPU time, in seconds.
const TIME: &str = "--cpu=10";

const ZSTD: &[&str] = &["zstd", "-c"];
const XZ: &[&str] = &["xz", "-0", "-c"];
const GZIP: &[&str] = &["gzip", "-n", "-c"];

fn v1() -> Vec<u8> {
    fs::read(V1.image()).unwrap()
}

/// Returns the V1 image with another number of blocks in its superblock.
fn image_of_blocks(blocks: u32) -> Vec<u8> {
    patched(1060, &blocks.to_le_bytes())
}

fn patched(offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = v1();
    image[offset..][..bytes.len()].copy_from_slice(bytes);
    image
}

/// The message for a window that is too large.
const WINDOW: &str = ": its window is larger than 128 MiB";

/// Returns options with a copy and without a digest.
fn copy_options() -> MountOptions {
    let mut options = V1.copy_options();
    options.digest = None;
    options
}

/// Runs the helper on an image that the helper must reject within the limits of memory and CPU time.
/// Returns its message.
fn rejected_by_helper(image: &Path, more_options: &str) -> String {
    let options = format!("copy,basedir={}{more_options}", V1.objects().display());
    let output = Command::new("prlimit")
        .args([MEMORY, TIME, env!("CARGO_BIN_EXE_mount-composefs"), "-f"])
        .arg(image)
        .args(["/", "-o", &options])
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    // The helper must exit with its own error: a signal means that the helper reached a limit.
    assert!(matches!(output.status.code(), Some(2 | 32)), "{:?}: {message}", output.status);
    let start = format!("mount.composefs: {}: ", image.display());
    message.strip_prefix(&start).unwrap_or_else(|| panic!("{message}")).to_owned()
}

/// Returns a bomb of 16 GiB: compressed streams of 16 MiB of zeros.
fn sixteen_gibibytes(program: &[&str]) -> Vec<u8> {
    through(program, &vec![0; 16 << 20]).repeat(1024)
}

#[test]
fn bomb_of_16_gib_is_rejected_within_limits() {
    let Some(sandbox) = sandbox!() else { return };
    for program in [ZSTD, XZ, GZIP] {
        let zeros = sixteen_gibibytes(program);
        let with_zeros_after = |image: &[u8]| [through(program, image), zeros.clone()].concat();
        for (content, options, expected) in [
            (zeros.clone(), "", "cannot mount the image: the file is not a composefs image"),
            (with_zeros_after(&v1()), "", "cannot mount the image: the file has trailing data: "),
            (
                with_zeros_after(&image_of_blocks(16)),
                "",
                "cannot mount the image: the file has trailing data: ",
            ),
            // The superblock gives a size that is too large for this limit, or for every limit.
            (
                with_zeros_after(&image_of_blocks(1 << 22)),
                ",size=64m",
                "cannot copy the image: the image has 17179869184 bytes",
            ),
            (
                with_zeros_after(&image_of_blocks(u32::MAX)),
                "",
                "cannot copy the image: the image has 17592186040320 bytes",
            ),
            (
                through(program, &image_of_blocks(1 << 12)),
                "",
                "cannot mount the image: the file is truncated: it has 24576 bytes, the image 16777216 bytes",
            ),
        ] {
            let message = rejected_by_helper(&sandbox.file("bomb", &content), options);
            assert!(message.starts_with(expected), "{program:?}: {message}");
        }
    }
}

/// Returns a zstd frame with this header and one block of one byte. The block is not empty, because
/// libzstd does not compare sizes after an empty last block.
fn zstd_frame(header: &[u8]) -> Vec<u8> {
    [&[0x28, 0xb5, 0x2f, 0xfd], header, &[9, 0, 0, b'x']].concat()
}

#[test]
fn zstd_frame_with_false_header_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let small = through(&["zstd", "-c", "--no-check", "--stream-size=24576"], &v1());
    assert_eq!(
        small[4] & 0xe4,
        0x60,
        "the frame must be a single segment with a size of two bytes"
    );
    let mut false_size = small.clone();
    false_size[5] ^= 1;
    let skippable_to_nowhere = [&[0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff], &small[..]];
    for (content, expected) in [
        // The headers give a window of 2^31 bytes, and the largest window that a header can give.
        (zstd_frame(&[0, (31 - 10) << 3]), WINDOW),
        (zstd_frame(&[0, 0xff]), WINDOW),
        // The frame is a single segment of 2^63 bytes, so its window has the same size.
        (zstd_frame(&[0xe0, 0, 0, 0, 0, 0, 0, 0, 0x80]), WINDOW),
        // The header gives a window of a kilobyte, and a false size of the content.
        (zstd_frame(&[0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80]), "corrupt"),
        (false_size, "corrupt"),
        (zstd_frame(&[3, 0, 1, 2, 3, 4]), "ictionary"),
        (zstd_frame(&[8, 0]), "nsupported"),
        (skippable_to_nowhere.concat(), "incomplete frame"),
    ] {
        let message = rejected_by_helper(&sandbox.file("image", &content), "");
        let start = "cannot decompress the image with zstd: ";
        assert!(message.starts_with(start) && message.contains(expected), "{expected}: {message}");
    }
}

/// Changes one byte of an xz file within a range that a CRC32 covers, and corrects the CRC32.
fn xz_patched(file: &[u8], checked: std::ops::Range<usize>, at: usize, value: u8) -> Vec<u8> {
    let mut file = file.to_vec();
    assert!(checked.contains(&at));
    let crc = |bytes: &[u8]| crc32fast::hash(bytes).to_le_bytes();
    let end = checked.end;
    assert_eq!(crc(&file[checked.clone()]), file[end..end + 4], "the CRC covers other bytes");
    file[at] = value;
    let crc = crc(&file[checked]);
    file[end..end + 4].copy_from_slice(&crc);
    file
}

#[test]
fn xz_stream_with_false_sizes_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let file = through(&["xz", "-C", "none", "-0", "-c"], &v1());
    // The header of the stream has twelve bytes. The header of the block follows: size, flags, a filter
    // and the size of its dictionary.
    let block_header = 12..12 + usize::from(file[12]) * 4;
    assert_eq!(file[14..16], [0x21, 1], "the filter must be LZMA2 with one byte of properties");
    let dictionary = |size| xz_patched(&file, block_header.clone(), 16, size);
    // The file ends with the index and a footer of twelve bytes. The footer holds the size of the
    // index.
    let footer = file.len() - 12;
    let index_size = (usize::from(file[footer + 4]) + 1) * 4;
    let index = footer - index_size..footer - 4;
    let with_index_byte =
        |at: usize, value| xz_patched(&file, index.clone(), index.start + at, value);
    let mut index_of_another_size = file.clone();
    index_of_another_size[footer + 4] += 1;
    let crc = crc32fast::hash(&index_of_another_size[footer + 4..footer + 10]);
    index_of_another_size[footer..footer + 4].copy_from_slice(&crc.to_le_bytes());

    for (content, expected) in [
        // The sizes are 4 GiB - 1, 3 GiB, 192 MiB, and an undefined value.
        (dictionary(40), WINDOW),
        (dictionary(39), WINDOW),
        (dictionary(31), WINDOW),
        (dictionary(41), "invalid options"),
        // The index lists no record, 127 records, another size of the block, or another size of the
        // content.
        (with_index_byte(1, 0), "lzma data error"),
        (with_index_byte(1, 127), "lzma data error"),
        (with_index_byte(2, file[index.start + 2] ^ 1), "lzma data error"),
        (with_index_byte(4, file[index.start + 4] ^ 1), "lzma data error"),
        (index_of_another_size, "lzma data error"),
    ] {
        let message = rejected_by_helper(&sandbox.file("image", &content), "");
        let start = "cannot decompress the image with xz: ";
        assert!(message.starts_with(start) && message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn gzip_member_with_false_sizes_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let file = through(GZIP, &v1());
    let mut false_size = file.clone();
    *false_size.last_mut().unwrap() ^= 0x80;
    // One header has a name that does not end. The other header has an extra field of 65535 bytes.
    let endless_name = [&[0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 0][..], &[b'a'; 32 << 20]].concat();
    let extra_field = [&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0, 0xff, 0xff], &file[10..]].concat();
    for content in [false_size, endless_name, extra_field] {
        let message = rejected_by_helper(&sandbox.file("image", &content), "");
        assert!(message.starts_with("cannot decompress the image with gzip: "), "{message}");
    }
}

#[test]
fn many_empty_streams_before_image_are_ignored() {
    let Some(sandbox) = sandbox!() else { return };
    for program in [ZSTD, XZ, GZIP] {
        let nothing = through(program, b"").repeat(100_000);
        let message = rejected_by_helper(&sandbox.file("image", &nothing), "");
        assert!(message.starts_with("cannot mount the image: the file is empty"), "{message}");
        let image = [nothing, through(program, &v1())].concat();
        V1.copy_options().mount(sandbox.file("image", &image)).unwrap();
    }
}

/// Returns a file with this content and a hole behind it.
fn sparse(sandbox: &Sandbox, content: &[u8], size: u64) -> PathBuf {
    let path = sandbox.file("sparse", content);
    OpenOptions::new().write(true).open(&path).unwrap().set_len(size).unwrap();
    path
}

#[test]
fn huge_sparse_file_is_not_read_whole() {
    let Some(sandbox) = sandbox!() else { return };
    const SIZE: u64 = 8 << 40;
    // The hole is the content of a skippable zstd frame, padding behind an xz stream, or padding behind
    // a gzip member.
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff];
    let too_large = |format| {
        format!("cannot copy the image: the {format} file has 8796093022208 bytes, and the limit")
    };
    let invalid = |problem| format!("cannot mount the image: the file {problem}");
    for (content, expected) in [
        (vec![], invalid("is not a composefs image")),
        (v1(), invalid("has trailing data: it has 8796093022208 bytes, the image 24576 bytes")),
        (
            image_of_blocks(1 << 31),
            "cannot copy the image: the image has 8796093022208 bytes, and the limit".into(),
        ),
        (skippable.to_vec(), too_large("zstd")),
        (through(XZ, &v1()), too_large("xz")),
        (through(GZIP, &v1()), too_large("gzip")),
    ] {
        let message = rejected_by_helper(&sparse(&sandbox, &content, SIZE), "");
        assert!(message.starts_with(&expected), "{message}");
    }
    // The limit of the copy also limits the size of the compressed file.
    let padded = sparse(&sandbox, &through(XZ, &v1()), 1 << 20);
    let mut options = V1.copy_options();
    options.size = Some(SizeLimit::Bytes(1 << 20));
    options.mount(&padded).unwrap();
    options.size = Some(SizeLimit::Bytes((1 << 20) - sealmount_sys::page_size() as u64));
    let error = options.mount(&padded).unwrap_err();
    let Error::Source(SourceError::LimitExceeded { size, compression: Some(_), .. }) = &error
    else {
        panic!("{error}")
    };
    assert_eq!((*size, error.kind()), (1 << 20, ErrorKind::LimitExceeded));

    // Without a copy, the kernel reads only the blocks that it needs.
    let image = sparse(&sandbox, &image_of_blocks(1 << 31), SIZE);
    let mnt = sandbox.directory("mnt");
    V1.options().mount(image).unwrap().attach(&mnt).unwrap();
    assert_is_manifest(&mnt);
    umount(&mnt);
}

/// Opens a path with O_PATH, which has no effect on the file.
fn by_descriptor(path: &Path) -> Location {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty()).unwrap().into()
}

#[test]
fn non_regular_image_is_rejected_by_file_type() {
    let Some(sandbox) = sandbox!() else { return };
    let node = |name: &str, kind, device| {
        let path = sandbox.path(name);
        mknodat(CWD, &path, kind, Mode::RUSR, device).unwrap();
        path
    };
    let socket = sandbox.path("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let link = sandbox.path("link-to-fifo");
    symlink("fifo", &link).unwrap();
    let mut messages = HashSet::new();
    let cases = [
        (node("fifo", FileType::Fifo, 0), "FIFO"),
        (socket, "socket"),
        (sandbox.directory("directory"), "directory"),
        // sealmount must not open these devices: no driver serves the first, and the second is a
        // watchdog.
        (node("block", FileType::BlockDevice, makedev(240, 0)), "block device"),
        (node("character", FileType::CharacterDevice, makedev(10, 130)), "character device"),
        ("/dev/zero".into(), "character device"),
        ("/dev/full".into(), "character device"),
        (link, "FIFO"),
    ];
    for (path, kind) in cases {
        for options in [V1.options(), copy_options()] {
            let mut locations = vec![Location::from(&path)];
            // O_NOFOLLOW and O_PATH would open the link itself.
            if !path.is_symlink() {
                locations.push(by_descriptor(&path));
            }
            for location in locations {
                let error = options.mount(location).unwrap_err();
                let expected = ImageProblem::NotAFile(kind);
                assert_eq!(image_problem(&error), Some(&expected), "{}", path.display());
                messages.insert(error.to_string());
            }
        }
    }
    // Each path has its own message. The message for a descriptor contains the number of the
    // descriptor.
    assert!(messages.len() >= 8, "{messages:?}");
}

#[test]
fn unreadable_image_reports_kernel_error() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.file("image", &v1());
    symlink("loop", sandbox.path("loop")).unwrap();
    let write_only = OpenOptions::new().write(true).open(&image).unwrap();
    for (location, operation, errno) in [
        (Location::from(sandbox.path("missing")), Operation::OpenImage, Errno::NOENT),
        (sandbox.path("loop").into(), Operation::OpenImage, Errno::LOOP),
        (image.join("below").into(), Operation::OpenImage, Errno::NOTDIR),
        (sandbox.path(&"x".repeat(256)).into(), Operation::OpenImage, Errno::NAMETOOLONG),
        ("".into(), Operation::OpenImage, Errno::NOENT),
        ("nul\0".into(), Operation::OpenImage, Errno::INVAL),
        (by_descriptor(&image), Operation::ReadImage, Errno::BADF),
        (write_only.into(), Operation::ReadImage, Errno::BADF),
    ] {
        let name = location.to_string();
        let error = V1.copy_options().mount(location).unwrap_err();
        let Some(kernel) = error.kernel() else { panic!("{error}") };
        let found = (kernel.operation(), kernel.raw_os_error());
        assert_eq!(found, (operation, errno.raw_os_error()), "{error}");
        assert!(error.to_string().starts_with(&name), "{error}");
    }
}

/// Calls `disturb` repeatedly in a thread while `work` runs.
fn meanwhile(mut disturb: impl FnMut() + Send, work: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                disturb();
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

#[test]
fn image_replaced_by_fifo_is_rejected_unopened() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, fifo) = (sandbox.file("image", &v1()), sandbox.path("fifo"));
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
    let swap = || renameat_with(CWD, &image, CWD, &fifo, RenameFlags::EXCHANGE).unwrap();
    // The wrong digest ends each mount after the copy.
    let mut options = V1.copy_options();
    options.digest = Some("0".repeat(64).parse().unwrap());
    // Opening a device can have effects. inotify shows whether sealmount opens the FIFO, which stands
    // for a device.
    let opened = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&opened, &fifo, WatchFlags::OPEN).unwrap();
    let mut rejected = 0;
    meanwhile(swap, || {
        for _ in 0..500 {
            match options.mount(&image).unwrap_err() {
                Error::Source(SourceError::DigestMismatch { .. }) => {}
                error => {
                    let expected = ImageProblem::NotAFile("FIFO");
                    assert_eq!(image_problem(&error), Some(&expected), "{error}");
                    rejected += 1;
                }
            }
        }
    });
    assert!(rejected > 0, "no mount met the FIFO");
    let seen = rustix::io::read(&opened, &mut [0; 1024]);
    assert_eq!(seen, Err(Errno::AGAIN), "sealmount opened the FIFO");
    // This open shows that inotify reports opens of the FIFO.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    for path in [&image, &fifo] {
        rustix::fs::openat(CWD, path, flags, Mode::empty()).unwrap();
    }
    assert!(rustix::io::read(&opened, &mut [0; 1024]).is_ok());
}

#[test]
fn growing_image_is_rejected_without_hanging() {
    let Some(sandbox) = sandbox!() else { return };
    let mut options = V1.copy_options();
    options.digest = Some("0".repeat(64).parse().unwrap());
    // Zeros are padding behind xz and gzip streams, and trailing data behind zstd frames.
    for content in [v1(), through(XZ, &v1()), through(GZIP, &v1()), through(ZSTD, &v1())] {
        for _ in 0..20 {
            let image = sandbox.file("image", &content);
            let mut writer = OpenOptions::new().append(true).open(&image).unwrap();
            let grow = || writer.write_all(&[0; 4096]).unwrap();
            meanwhile(grow, || match options.mount(&image).unwrap_err() {
                Error::Source(
                    SourceError::DigestMismatch { .. }
                    | SourceError::Changed { .. }
                    | SourceError::Decompress { .. },
                ) => {}
                error => {
                    let problem = image_problem(&error);
                    assert!(matches!(problem, Some(ImageProblem::TooLong { .. })), "{error}");
                }
            });
        }
    }
}

const EXTREMES: [u32; 6] = [0, 1, 2, 0x7fff_ffff, 0x8000_0000, u32::MAX];

#[test]
fn extreme_header_field_mounts_or_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let mut messages = HashSet::new();
    for field in 0..8 {
        for value in EXTREMES {
            let image = sandbox.file("image", &patched(4 * field, &value.to_le_bytes()));
            for options in [V1.options(), copy_options()] {
                let result = options.mount(&image);
                match (field, value, result.as_ref().map_err(image_problem)) {
                    (0, _, Err(Some(ImageProblem::PlainErofs))) => {}
                    (1, 1, Ok(_)) => {}
                    (1, _, Err(Some(problem @ ImageProblem::HeaderVersion(found)))) => {
                        assert_eq!(*found, value);
                        messages.insert(problem.to_string());
                    }
                    // Only the kernel reads the flags, the version of the format, the unused fields and
                    // the content of the file system.
                    (2.., _, Ok(_)) => {}
                    _ => panic!("field {field}, {value:#x}: {result:?}"),
                }
            }
        }
    }
    assert_eq!(messages.len(), EXTREMES.len() - 1);
}

#[test]
fn false_superblock_field_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    // Each case is a field of struct erofs_super_block: its offset, its name, and a value.
    let cases: [(usize, &str, &[u8]); 12] = [
        (0, "magic", &[0; 4]),
        (4, "checksum", &[0xff; 4]),
        (12, "blkszbits", &[0]),
        (12, "blkszbits", &[9]),
        (12, "blkszbits", &[13]),
        (12, "blkszbits", &[255]),
        (36, "blocks", &[0; 4]),
        (36, "blocks", &[5, 0, 0, 0]),
        (36, "blocks", &[7, 0, 0, 0]),
        (36, "blocks", &[0xff; 4]),
        (14, "root_nid", &[0xff; 2]),
        (80, "feature_incompat", &[0xff; 4]),
    ];
    let mut messages = HashSet::new();
    for (offset, field, value) in cases {
        let mut image = patched(1024 + offset, value);
        if field == "checksum" {
            // EROFS_FEATURE_COMPAT_SB_CHKSUM makes the kernel check the checksum.
            image[1032] |= 1;
        }
        let path = sandbox.file("image", &image);
        for options in [V1.options(), copy_options()] {
            let error = options.mount(&path).unwrap_err();
            match (image_problem(&error), error.kernel()) {
                (Some(problem), _) => match (field, problem) {
                    ("magic", ImageProblem::NoSuperblock)
                    | ("blkszbits", ImageProblem::BlockSize(_))
                    | ("blocks", ImageProblem::TooShort { .. } | ImageProblem::TooLong { .. }) => {}
                    _ => panic!("{field}: {error}"),
                },
                (None, Some(kernel)) => {
                    assert_eq!(kernel.operation(), Operation::CreateSuperblock, "{error}");
                    assert_eq!(error.kind(), ErrorKind::NotAnImage, "{error}");
                    assert!(
                        ["checksum", "root_nid", "feature_incompat"].contains(&field),
                        "{field}: {error}",
                    );
                }
                _ => panic!("{field}: {error}"),
            }
            messages.insert(error.to_string());
        }
    }
    assert!(messages.len() >= cases.len(), "{messages:#?}");
}

#[test]
fn object_path_not_a_directory_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let file = sandbox.file("file", b"");
    let fifo = sandbox.path("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
    let socket = sandbox.path("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    for (link, target) in [("loop", "loop"), ("dangling", "missing"), ("to-file", "file")] {
        symlink(target, sandbox.path(link)).unwrap();
    }
    let mut messages = HashSet::new();
    let cases = [
        (sandbox.path("missing"), Errno::NOENT),
        (file, Errno::NOTDIR),
        (fifo, Errno::NOTDIR),
        (socket, Errno::NOTDIR),
        ("/dev/zero".into(), Errno::NOTDIR),
        (sandbox.path("loop"), Errno::LOOP),
        (sandbox.path("dangling"), Errno::NOENT),
        (sandbox.path("to-file"), Errno::NOTDIR),
        (sandbox.path(&"x".repeat(256)), Errno::NAMETOOLONG),
    ];
    for (path, errno) in &cases {
        // The bad directory follows a valid directory.
        for mut options in [V1.options(), V1.copy_options()] {
            options.overlay.objects.push(path.into());
            let error = options.mount(V1.image()).unwrap_err();
            let Error::Overlay(OverlayError::Directory(directory)) = &error else {
                panic!("{error}");
            };
            let found = (directory.role(), directory.path(), directory.raw_os_error());
            assert_eq!(found, (DirectoryRole::Objects, path.as_path(), errno.raw_os_error()));
            messages.insert(error.to_string());
        }
    }
    assert_eq!(messages.len(), cases.len());

    // sealmount follows a symbolic link to a directory.
    symlink(V1.objects(), sandbox.path("objects")).unwrap();
    let mnt = sandbox.directory("mnt");
    MountOptions::new(sandbox.path("objects")).mount(V1.image()).unwrap().attach(&mnt).unwrap();
    assert_is_manifest(&mnt);
    umount(&mnt);
}

#[test]
fn non_regular_objects_are_not_opened() {
    let Some(sandbox) = sandbox!() else { return };
    let mnt = sandbox.directory("mnt");
    let secret = sandbox.file("secret", &[b's'; 70_000]);
    let node = |path: &Path, kind, device| mknodat(CWD, path, kind, Mode::RUSR, device).unwrap();
    for kind in ["fifo", "zero", "directory", "link"] {
        let objects = sandbox.directory(kind);
        for prefix in fs::read_dir(V1.objects()).unwrap() {
            let prefix = prefix.unwrap();
            let directory = objects.join(prefix.file_name());
            fs::create_dir(&directory).unwrap();
            for object in fs::read_dir(prefix.path()).unwrap() {
                let object = directory.join(object.unwrap().file_name());
                match kind {
                    "fifo" => node(&object, FileType::Fifo, 0),
                    "zero" => node(&object, FileType::CharacterDevice, makedev(1, 5)),
                    "directory" => fs::create_dir(&object).unwrap(),
                    _ => symlink(&secret, &object).unwrap(),
                }
            }
        }
        MountOptions::new(objects).mount(V1.image()).unwrap().attach(&mnt).unwrap();
        let opened = File::open(mnt.join("data/70000"));
        assert!(opened.is_err(), "{kind}: opened");
        umount(&mnt);
    }
}

/// The limits of [`rejected_by_helper`] apply.
#[test]
fn image_with_many_names_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let mut image = ErofsImage::new();
    let file = image.file(1, Some(b""), Some(b"/ab/cd"));
    let mut directory = 0;
    for number in 0..300_000 {
        if number % 1000 == 0 {
            directory = image.directory();
            image.link(0, format!("d{number}"), directory);
        }
        image.link(directory, format!("{number}"), file);
    }
    let image = sandbox.file("names.cfs", &image.finish());
    let message = rejected_by_helper(&image, ",size=80%,check=all");
    let expected =
        "cannot use the objects: 1 of 1 objects failed the check\n  /d0/0 needs ab/cd: missing\n";
    assert!(message.starts_with(expected), "{message}");
    assert!(message.contains("for 300000 files"), "{message}");
}

/// Returns whether the environment selects the whole corpus.
fn whole() -> bool {
    std::env::var_os("SEALMOUNT_HOSTILE").is_some_and(|value| value == "all")
}

/// Returns offsets of bytes to change, each once with all bits flipped and once with one bit flipped.
fn mutations() -> Vec<(usize, u8)> {
    let whole = whole();
    let length = v1().len();
    (0..length)
        .flat_map(|offset| [(offset, 0xff), (offset, 1 << (offset % 8))])
        .filter(|(offset, flip)| match offset {
            _ if whole && *offset < 4096 => true,
            _ if whole => offset % 16 == usize::from(*flip != 0xff),
            // The sample covers the header, the superblock, and some bytes of the rest.
            0..32 | 1024..1152 => *flip == 0xff,
            _ => offset % 193 == usize::from(*flip != 0xff),
        })
        .collect()
}

fn count(outcomes: &mut BTreeMap<String, usize>, outcome: impl Into<String>) {
    *outcomes.entry(outcome.into()).or_default() += 1;
}

/// Returns a short text: whether sealmount or the kernel rejected the image, and the reason.
fn outcome(error: &Error) -> String {
    match (image_problem(error), error.kernel()) {
        (Some(problem), _) => {
            let problem = format!("{problem:?}");
            format!("rejected by sealmount: {}", problem.split(['(', ' ']).next().unwrap())
        }
        (None, Some(kernel)) => {
            let errno = std::io::Error::from_raw_os_error(kernel.raw_os_error());
            format!("rejected by the kernel: {errno}")
        }
        _ if is_mismatch(error) => "rejected by sealmount: DigestMismatch".into(),
        _ => format!("{error:?}"),
    }
}

fn is_mismatch(error: &Error) -> bool {
    matches!(error, Error::Source(SourceError::DigestMismatch { .. }))
}

#[test]
fn mutated_image_with_digest_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let original = v1();
    // The test changes the file in place, because ext4 flushes a file that is truncated and rewritten.
    let path = sandbox.file("image", &original);
    let image = OpenOptions::new().write(true).open(&path).unwrap();
    let options = V1.copy_options();
    let mut outcomes = BTreeMap::new();
    // The test mounts no image, so there is time for many bytes.
    for offset in 0..original.len() {
        if offset >= 4096 && offset % 16 != 0 {
            continue;
        }
        let flips = [0xff, 1 << (offset % 8)];
        for flip in flips {
            image.write_all_at(&[original[offset] ^ flip], offset as u64).unwrap();
            let error = match options.mount(&path) {
                Err(error) => error,
                Ok(_) => panic!("byte {offset} ^ {flip:#x}: mounted"),
            };
            assert!(
                is_mismatch(&error) || image_problem(&error).is_some(),
                "byte {offset} ^ {flip:#x}: {error}",
            );
            count(&mut outcomes, outcome(&error));
        }
        image.write_all_at(&original[offset..=offset], offset as u64).unwrap();
    }
    println!("{outcomes:#?}");
    assert!(outcomes["rejected by sealmount: DigestMismatch"] > 8192);
}

/// Walks through a mount. Only an image with circular directories reaches the limit.
fn walk(mount: &DetachedMount, outcomes: &mut BTreeMap<String, usize>) {
    use std::os::fd::AsFd;
    let root = format!("/proc/self/fd/{}/.", mount.as_fd().as_raw_fd());
    let mut directories = vec![(PathBuf::from(root), 0)];
    let mut entries = 0;
    let mut note = |what: &str, error: std::io::Error| {
        count(outcomes, format!("walk: {what}: {error}"));
    };
    while let Some((directory, depth)) = directories.pop() {
        let listing = match fs::read_dir(&directory) {
            Ok(listing) => listing,
            Err(error) => {
                note("readdir", error);
                continue;
            }
        };
        for entry in listing {
            entries += 1;
            if entries > 2000 {
                count(outcomes, "walk: ended after 2000 entries");
                return;
            }
            let path = match entry {
                Ok(entry) => entry.path(),
                Err(error) => {
                    note("getdents", error);
                    break;
                }
            };
            match read_entry(&path) {
                Ok(true) if depth < 16 => directories.push((path, depth + 1)),
                Ok(_) => {}
                Err((what, error)) => note(what, error),
            }
        }
    }
    count(outcomes, "walk: to the end");
}

/// Reads one entry. Returns whether the entry is a directory.
fn read_entry(path: &Path) -> Result<bool, (&'static str, std::io::Error)> {
    let metadata = path.symlink_metadata().map_err(|error| ("lstat", error))?;
    let mut names = vec![0; 4096];
    if let Err(errno) = rustix::fs::llistxattr(path, &mut names[..]) {
        return Err(("listxattr", errno.into()));
    }
    let kind = metadata.file_type();
    if kind.is_symlink() {
        fs::read_link(path).map_err(|error| ("readlink", error))?;
    } else if kind.is_file() {
        let flags = OFlags::NONBLOCK.bits() as i32;
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)
            .map_err(|error| ("open", error))?;
        let mut piece = vec![0; 16384];
        file.read(&mut piece).map_err(|error| ("read", error))?;
        file.seek(SeekFrom::End(-1)).ok();
        file.read(&mut piece).map_err(|error| ("read at the end", error))?;
    } else {
        assert!(
            kind.is_dir()
                || kind.is_fifo()
                || kind.is_socket()
                || kind.is_block_device()
                || kind.is_char_device()
        );
    }
    Ok(kind.is_dir())
}

#[test]
fn mutated_image_mounts_or_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let original = v1();
    let path = sandbox.file("image", &original);
    let image = OpenOptions::new().write(true).open(&path).unwrap();
    let mutations = mutations();
    let mut outcomes = BTreeMap::new();
    for (number, (offset, flip)) in mutations.iter().copied().enumerate() {
        image.write_all_at(&[original[offset] ^ flip], offset as u64).unwrap();
        // A sample mounts every other mutation from a copy, and so from a loop device. The whole corpus
        // mounts each mutation in both modes.
        let both = [copy_options(), V1.options()];
        let of_each_flip = number / 2 % 2;
        let modes = if whole() { &both[..] } else { &both[of_each_flip..=of_each_flip] };
        for result in modes.iter().map(|options| options.mount(&path)) {
            match result {
                Ok(mount) => {
                    count(&mut outcomes, "mounted");
                    walk(&mount, &mut outcomes);
                }
                Err(error) => {
                    let expected = match (image_problem(&error), error.kernel()) {
                        (Some(_), _) => true,
                        (_, Some(error)) => error.operation() == Operation::CreateSuperblock,
                        _ => false,
                    };
                    assert!(expected, "byte {offset} ^ {flip:#x}: {error}");
                    count(&mut outcomes, outcome(&error));
                }
            }
        }
        image.write_all_at(&original[offset..=offset], offset as u64).unwrap();
    }
    println!("{} mutations: {outcomes:#?}", mutations.len());
    assert!(outcomes.contains_key("mounted"));
}
