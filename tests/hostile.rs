//! Images and object directories that are made to do harm: refused in bounded time and memory, each
//! with a message that tells what it is.
//!
//! `SEALMOUNT_HOSTILE=all` mounts the whole corpus of mutated images, not a sample of it.

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
use sealmount::{
    DetachedMount, DirectoryRole, Errno, Error, ImageError, Location, MountOptions, Operation,
    SizeLimit,
};
use test_support::{Sandbox, V1, assert_is_manifest, sandbox, through, umount};

/// Private memory that the helper gets here: six buffers of 512 KiB and a decoder's window, several
/// times over.
const MEMORY: &str = "--data=16777216";
/// Seconds of processor time.
const TIME: &str = "--cpu=10";

const ZSTD: &[&str] = &["zstd", "-c"];
const XZ: &[&str] = &["xz", "-0", "-c"];
const GZIP: &[&str] = &["gzip", "-n", "-c"];

fn v1() -> Vec<u8> {
    fs::read(V1.image()).unwrap()
}

/// The V1 image, whose superblock gives it so many blocks.
fn image_of_blocks(blocks: u32) -> Vec<u8> {
    patched(1060, &blocks.to_le_bytes())
}

fn patched(offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = v1();
    image[offset..][..bytes.len()].copy_from_slice(bytes);
    image
}

/// What is said of a window that is too large.
const WINDOW: &str = "and a window of more than 128 MiB";

/// The options that copy, without a digest.
fn copy_options() -> MountOptions {
    let mut options = V1.copy_options();
    options.digest = None;
    options
}

/// What the helper says of an image that it must refuse, with bounded memory and processor time.
fn refused_by_helper(image: &Path, more_options: &str) -> String {
    let options = format!("copy,basedir={}{more_options}", V1.objects().display());
    let output = Command::new("prlimit")
        .args([MEMORY, TIME, env!("CARGO_BIN_EXE_mount-composefs"), "-f"])
        .arg(image)
        .args(["/", "-o", &options])
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    // Neither killed nor out of memory.
    assert!(matches!(output.status.code(), Some(2 | 32)), "{:?}: {message}", output.status);
    let start = format!("mount.composefs: {}: ", image.display());
    message.strip_prefix(&start).unwrap_or_else(|| panic!("{message}")).to_owned()
}

/// As many zeros as this gives, in streams of 16 MiB: a bomb of 16 GiB.
fn sixteen_gibibytes(program: &[&str]) -> Vec<u8> {
    through(program, &vec![0; 16 << 20]).repeat(1024)
}

#[test]
fn bombs_are_refused_before_they_go_off() {
    let Some(sandbox) = sandbox!() else { return };
    for program in [ZSTD, XZ, GZIP] {
        let zeros = sixteen_gibibytes(program);
        let behind = |image: &[u8]| [through(program, image), zeros.clone()].concat();
        for (content, options, expected) in [
            (zeros.clone(), "", "not a composefs image"),
            (behind(&v1()), "", "too long: "),
            (behind(&image_of_blocks(16)), "", "too long: "),
            // It says how large it is: too large for this limit, and for any.
            (behind(&image_of_blocks(1 << 22)), ",size=64m", "a copy takes 17179869184 bytes"),
            (behind(&image_of_blocks(u32::MAX)), "", "a copy takes 17592186040320 bytes"),
            (through(program, &image_of_blocks(1 << 12)), "", "cut short: 24576 bytes of 16777216"),
        ] {
            let message = refused_by_helper(&sandbox.file("bomb", &content), options);
            assert!(message.starts_with(expected), "{program:?}: {message}");
        }
    }
}

/// A zstd frame of this header, with one block of one byte: libzstd does not compare sizes at the end of
/// a frame whose last block is empty.
fn zstd_frame(header: &[u8]) -> Vec<u8> {
    [&[0x28, 0xb5, 0x2f, 0xfd], header, &[9, 0, 0, b'x']].concat()
}

#[test]
fn zstd_frames_that_claim_too_much_are_refused() {
    let Some(sandbox) = sandbox!() else { return };
    let small = through(&["zstd", "-c", "--no-check", "--stream-size=24576"], &v1());
    assert_eq!(small[4] & 0xe4, 0x60, "a single segment, its size in two bytes");
    let mut size_lies = small.clone();
    size_lies[5] ^= 1;
    let skippable_to_nowhere = [&[0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff], &small[..]];
    for (content, expected) in [
        // A window of 2^31, and the largest that can be said.
        (zstd_frame(&[0, (31 - 10) << 3]), WINDOW),
        (zstd_frame(&[0, 0xff]), WINDOW),
        // A single segment, so a window, of 2^63 bytes.
        (zstd_frame(&[0xe0, 0, 0, 0, 0, 0, 0, 0, 0x80]), WINDOW),
        // The size of the content alone, beside a window of a kilobyte.
        (zstd_frame(&[0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80]), "corrupt"),
        (size_lies, "corrupt"),
        (zstd_frame(&[3, 0, 1, 2, 3, 4]), "ictionary"),
        (zstd_frame(&[8, 0]), "nsupported"),
        (skippable_to_nowhere.concat(), "incomplete frame"),
    ] {
        let message = refused_by_helper(&sandbox.file("image", &content), "");
        let start = match expected {
            WINDOW => "compressed with zstd ",
            _ => "cannot be decompressed with zstd: ",
        };
        assert!(message.starts_with(start) && message.contains(expected), "{expected}: {message}");
    }
}

/// Gives these bytes of an xz file, which a CRC32 follows, another value.
fn xz_patched(file: &[u8], checked: std::ops::Range<usize>, at: usize, value: u8) -> Vec<u8> {
    let mut file = file.to_vec();
    assert!(checked.contains(&at));
    let crc = |bytes: &[u8]| crc32fast::hash(bytes).to_le_bytes();
    let end = checked.end;
    assert_eq!(crc(&file[checked.clone()]), file[end..end + 4], "not what the CRC is of");
    file[at] = value;
    let crc = crc(&file[checked]);
    file[end..end + 4].copy_from_slice(&crc);
    file
}

#[test]
fn xz_streams_that_lie_are_refused() {
    let Some(sandbox) = sandbox!() else { return };
    let file = through(&["xz", "-C", "none", "-0", "-c"], &v1());
    // Twelve bytes of stream header, then the header of the block: its size, flags, a filter and the
    // size of its dictionary.
    let block_header = 12..12 + usize::from(file[12]) * 4;
    assert_eq!(file[14..16], [0x21, 1], "LZMA2, with properties of a byte");
    let dictionary = |size| xz_patched(&file, block_header.clone(), 16, size);
    // At the end, the index and a footer of twelve bytes, with the size of the index.
    let footer = file.len() - 12;
    let index_size = (usize::from(file[footer + 4]) + 1) * 4;
    let index = footer - index_size..footer - 4;
    let index_says = |at: usize, value| xz_patched(&file, index.clone(), index.start + at, value);
    let mut index_of_another_size = file.clone();
    index_of_another_size[footer + 4] += 1;
    let crc = crc32fast::hash(&index_of_another_size[footer + 4..footer + 10]);
    index_of_another_size[footer..footer + 4].copy_from_slice(&crc.to_le_bytes());

    for (content, expected) in [
        // 4 GiB - 1, 3 GiB, 192 MiB, and what is not defined.
        (dictionary(40), WINDOW),
        (dictionary(39), WINDOW),
        (dictionary(31), WINDOW),
        (dictionary(41), "invalid options"),
        // No record, 127 of them, another size of the block, another of its content.
        (index_says(1, 0), "lzma data error"),
        (index_says(1, 127), "lzma data error"),
        (index_says(2, file[index.start + 2] ^ 1), "lzma data error"),
        (index_says(4, file[index.start + 4] ^ 1), "lzma data error"),
        (index_of_another_size, "lzma data error"),
    ] {
        let message = refused_by_helper(&sandbox.file("image", &content), "");
        let start = match expected {
            WINDOW => "compressed with xz ",
            _ => "cannot be decompressed with xz: ",
        };
        assert!(message.starts_with(start) && message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn gzip_members_that_lie_are_refused() {
    let Some(sandbox) = sandbox!() else { return };
    let file = through(GZIP, &v1());
    let mut size_lies = file.clone();
    *size_lies.last_mut().unwrap() ^= 0x80;
    // A header that says: a name follows, up to a NUL; or an extra field of 65535 bytes.
    let endless_name = [&[0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 0][..], &[b'a'; 32 << 20]].concat();
    let extra_field = [&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0, 0xff, 0xff], &file[10..]].concat();
    for content in [size_lies, endless_name, extra_field] {
        let message = refused_by_helper(&sandbox.file("image", &content), "");
        assert!(message.starts_with("cannot be decompressed with gzip: "), "{message}");
    }
}

#[test]
fn streams_of_nothing_do_not_pile_up() {
    let Some(sandbox) = sandbox!() else { return };
    for program in [ZSTD, XZ, GZIP] {
        let nothing = through(program, b"").repeat(100_000);
        let message = refused_by_helper(&sandbox.file("image", &nothing), "");
        assert!(message.starts_with("not a composefs image: the file is empty"), "{message}");
        let image = [nothing, through(program, &v1())].concat();
        V1.copy_options().mount(sandbox.file("image", &image)).unwrap();
    }
}

/// A file of this content and a hole behind it.
fn sparse(sandbox: &Sandbox, content: &[u8], size: u64) -> PathBuf {
    let path = sandbox.file("sparse", content);
    OpenOptions::new().write(true).open(&path).unwrap().set_len(size).unwrap();
    path
}

#[test]
fn huge_sparse_files_are_not_read() {
    let Some(sandbox) = sandbox!() else { return };
    const SIZE: u64 = 8 << 40;
    // A skippable frame of 4 GiB, xz's padding between streams, and that of gzip.
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff];
    let too_large = "the compressed file alone has 8796093022208 bytes";
    for (content, expected) in [
        (vec![], "not a composefs image"),
        (v1(), "too long: 8796093022208 bytes, 24576 by its superblock"),
        (image_of_blocks(1 << 31), "a copy takes 8796093022208 bytes of memory"),
        (skippable.to_vec(), too_large),
        (through(XZ, &v1()), too_large),
        (through(GZIP, &v1()), too_large),
    ] {
        let message = refused_by_helper(&sparse(&sandbox, &content, SIZE), "");
        assert!(message.starts_with(expected), "{message}");
    }
    // The limit of the copy is one for the file.
    let padded = sparse(&sandbox, &through(XZ, &v1()), 1 << 20);
    let mut options = V1.copy_options();
    options.size = Some(SizeLimit::Bytes(1 << 20));
    options.mount(&padded).unwrap();
    options.size = Some(SizeLimit::Bytes((1 << 20) - 4096));
    let error = options.mount(&padded).unwrap_err();
    assert!(matches!(error, Error::CompressedTooLarge { size: 0x10_0000, .. }), "{error}");

    // Without copy only what is asked for is read of it.
    let image = sparse(&sandbox, &image_of_blocks(1 << 31), SIZE);
    let mnt = sandbox.directory("mnt");
    V1.options().mount(image).unwrap().attach(&mnt).unwrap();
    assert_is_manifest(&mnt);
    umount(&mnt);
}

/// What opens without doing anything, by descriptor.
fn by_descriptor(path: &Path) -> Location {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty()).unwrap().into()
}

#[test]
fn what_is_no_file_is_named_and_not_waited_for() {
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
        // A device that nobody drives: it is not even opened. Neither is a watchdog.
        (node("block", FileType::BlockDevice, makedev(240, 0)), "block device"),
        (node("character", FileType::CharacterDevice, makedev(10, 130)), "character device"),
        ("/dev/zero".into(), "character device"),
        ("/dev/full".into(), "character device"),
        (link, "FIFO"),
    ];
    for (path, kind) in cases {
        for options in [V1.options(), copy_options()] {
            let mut locations = vec![Location::from(&path)];
            // With O_NOFOLLOW and O_PATH it would be the link itself.
            if !path.is_symlink() {
                locations.push(by_descriptor(&path));
            }
            for location in locations {
                let error = options.mount(location).unwrap_err();
                let Error::Image { problem: ImageError::NotAFile(found), .. } = error else {
                    panic!("{}: {error}", path.display());
                };
                assert_eq!(found, kind, "{}", path.display());
                messages.insert(error.to_string());
            }
        }
    }
    // By path one for each, by descriptor with the descriptor's number.
    assert!(messages.len() >= 8, "{messages:?}");
}

#[test]
fn what_cannot_be_read_is_the_kernels_error() {
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
        let Error::Kernel(kernel) = &error else { panic!("{error}") };
        assert_eq!((kernel.operation, kernel.errno), (operation, errno), "{error}");
        assert!(error.to_string().starts_with(&name), "{error}");
    }
}

/// Does this over and over in a thread while `work` runs.
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
fn a_file_that_becomes_a_fifo_is_not_waited_for() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, fifo) = (sandbox.file("image", &v1()), sandbox.path("fifo"));
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
    let swap = || renameat_with(CWD, &image, CWD, &fifo, RenameFlags::EXCHANGE).unwrap();
    // Without the rest of a mount: what is opened in time fails for its digest.
    let mut options = V1.copy_options();
    options.digest = Some("0".repeat(64).parse().unwrap());
    // As of a device, opening may have effects: who looks on must not see it opened.
    let opened = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&opened, &fifo, WatchFlags::OPEN).unwrap();
    let mut refused = 0;
    meanwhile(swap, || {
        for _ in 0..500 {
            match options.mount(&image).unwrap_err() {
                Error::DigestMismatch { .. } => {}
                Error::Image { problem: ImageError::NotAFile("FIFO"), .. } => refused += 1,
                error => panic!("{error}"),
            }
        }
    });
    assert!(refused > 0, "it never was a FIFO");
    let seen = rustix::io::read(&opened, &mut [0; 1024]);
    assert_eq!(seen, Err(Errno::AGAIN), "the FIFO was opened");
    // So that the test can tell.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    for path in [&image, &fifo] {
        rustix::fs::openat(CWD, path, flags, Mode::empty()).unwrap();
    }
    assert!(rustix::io::read(&opened, &mut [0; 1024]).is_ok());
}

#[test]
fn a_file_that_grows_has_an_end() {
    let Some(sandbox) = sandbox!() else { return };
    let mut options = V1.copy_options();
    options.digest = Some("0".repeat(64).parse().unwrap());
    // Behind xz and gzip streams zeros are padding, behind zstd garbage.
    for content in [v1(), through(XZ, &v1()), through(GZIP, &v1()), through(ZSTD, &v1())] {
        for _ in 0..20 {
            let image = sandbox.file("image", &content);
            let mut writer = OpenOptions::new().append(true).open(&image).unwrap();
            let grow = || writer.write_all(&[0; 4096]).unwrap();
            meanwhile(grow, || match options.mount(&image).unwrap_err() {
                Error::DigestMismatch { .. }
                | Error::ImageChanged { .. }
                | Error::Decompress { .. }
                | Error::Image { problem: ImageError::TooLong { .. }, .. } => {}
                error => panic!("{error}"),
            });
        }
    }
}

const EXTREMES: [u32; 6] = [0, 1, 2, 0x7fff_ffff, 0x8000_0000, u32::MAX];

#[test]
fn every_field_of_the_header_at_its_extremes() {
    let Some(sandbox) = sandbox!() else { return };
    let mut messages = HashSet::new();
    for field in 0..8 {
        for value in EXTREMES {
            let image = sandbox.file("image", &patched(4 * field, &value.to_le_bytes()));
            for options in [V1.options(), copy_options()] {
                match (field, value, options.mount(&image)) {
                    (0, _, Err(Error::Image { problem: ImageError::PlainErofs, .. })) => {}
                    (1, 1, Ok(_)) => {}
                    (1, _, Err(Error::Image { problem: ImageError::HeaderVersion(found), .. })) => {
                        assert_eq!(found, value);
                        messages.insert(ImageError::HeaderVersion(found).to_string());
                    }
                    // Flags, the version of the format, and what is not in use: only the kernel reads
                    // what it is for.
                    (2.., _, Ok(_)) => {}
                    (_, _, result) => panic!("field {field}, {value:#x}: {result:?}"),
                }
            }
        }
    }
    assert_eq!(messages.len(), EXTREMES.len() - 1);
}

#[test]
fn a_superblock_that_lies_is_refused_by_us_or_the_kernel() {
    let Some(sandbox) = sandbox!() else { return };
    // Of struct erofs_super_block: the offset of a field, its name, and a value for it.
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
            // EROFS_FEATURE_COMPAT_SB_CHKSUM: it is to be looked at.
            image[1032] |= 1;
        }
        let path = sandbox.file("image", &image);
        for options in [V1.options(), copy_options()] {
            let error = options.mount(&path).unwrap_err();
            match &error {
                Error::Image { problem, .. } => match (field, problem) {
                    ("magic", ImageError::NoSuperblock)
                    | ("blkszbits", ImageError::BlockSize(_))
                    | ("blocks", ImageError::TooShort { .. } | ImageError::TooLong { .. }) => {}
                    _ => panic!("{field}: {error}"),
                },
                Error::Kernel(kernel) => {
                    assert_eq!(kernel.operation, Operation::CreateSuperblock, "{error}");
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
fn object_directories_that_are_none_are_refused() {
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
        // Also behind one that is in order.
        for mut options in [V1.options(), V1.copy_options()] {
            options.basedirs.push(path.into());
            let error = options.mount(V1.image()).unwrap_err();
            let Error::Directory { role: DirectoryRole::Objects, path: named, errno: found } =
                &error
            else {
                panic!("{error}");
            };
            assert_eq!((named, found), (path, errno));
            messages.insert(error.to_string());
        }
    }
    assert_eq!(messages.len(), cases.len());

    // A symbolic link to a directory is one.
    symlink(V1.objects(), sandbox.path("objects")).unwrap();
    let mnt = sandbox.directory("mnt");
    MountOptions::new(sandbox.path("objects")).mount(V1.image()).unwrap().attach(&mnt).unwrap();
    assert_is_manifest(&mnt);
    umount(&mnt);
}

#[test]
fn objects_that_are_no_files_are_not_opened() {
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

/// Whether the whole corpus is asked for.
fn whole() -> bool {
    std::env::var_os("SEALMOUNT_HOSTILE").is_some_and(|value| value == "all")
}

/// The image with one byte after the other changed, all bits of it in one copy and one in another.
fn mutations() -> Vec<(usize, u8)> {
    let whole = whole();
    let length = v1().len();
    (0..length)
        .flat_map(|offset| [(offset, 0xff), (offset, 1 << (offset % 8))])
        .filter(|(offset, flip)| match offset {
            _ if whole && *offset < 4096 => true,
            _ if whole => offset % 16 == usize::from(*flip != 0xff),
            // The header and the superblock, and some of the rest.
            0..32 | 1024..1152 => *flip == 0xff,
            _ => offset % 193 == usize::from(*flip != 0xff),
        })
        .collect()
}

fn count(outcomes: &mut BTreeMap<String, usize>, outcome: impl Into<String>) {
    *outcomes.entry(outcome.into()).or_default() += 1;
}

/// Who refused it, and why, in short.
fn outcome(error: &Error) -> String {
    match error {
        Error::Image { problem, .. } => {
            let problem = format!("{problem:?}");
            format!("refused by us: {}", problem.split(['(', ' ']).next().unwrap())
        }
        Error::Kernel(kernel) => {
            format!("refused by the kernel: {}", std::io::Error::from(kernel.errno))
        }
        Error::DigestMismatch { .. } => "refused by us: DigestMismatch".into(),
        error => format!("{error:?}"),
    }
}

#[test]
fn mutated_images_never_pass_a_digest() {
    let Some(sandbox) = sandbox!() else { return };
    let original = v1();
    // Changed in place: ext4 writes out what was truncated before it is written to.
    let path = sandbox.file("image", &original);
    let image = OpenOptions::new().write(true).open(&path).unwrap();
    let options = V1.copy_options();
    let mut outcomes = BTreeMap::new();
    // No mount is made of any: there is time for every byte.
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
                matches!(error, Error::DigestMismatch { .. } | Error::Image { .. }),
                "byte {offset} ^ {flip:#x}: {error}",
            );
            count(&mut outcomes, outcome(&error));
        }
        image.write_all_at(&original[offset..=offset], offset as u64).unwrap();
    }
    println!("{outcomes:#?}");
    assert!(outcomes["refused by us: DigestMismatch"] > 8192);
}

/// Looks at all that is in a mount, up to a limit that no mutation of the image comes near to unless
/// its directories go round in circles.
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
                count(outcomes, "walk: given up after 2000 entries");
                return;
            }
            let path = match entry {
                Ok(entry) => entry.path(),
                Err(error) => {
                    note("getdents", error);
                    break;
                }
            };
            match look_at(&path) {
                Ok(true) if depth < 16 => directories.push((path, depth + 1)),
                Ok(_) => {}
                Err((what, error)) => note(what, error),
            }
        }
    }
    count(outcomes, "walk: to the end");
}

/// Reads what can be read of one entry; says whether it is a directory.
fn look_at(path: &Path) -> Result<bool, (&'static str, std::io::Error)> {
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
fn mutated_images_are_mounted_or_refused_by_the_kernel() {
    let Some(sandbox) = sandbox!() else { return };
    let original = v1();
    let path = sandbox.file("image", &original);
    let image = OpenOptions::new().write(true).open(&path).unwrap();
    let mutations = mutations();
    let mut outcomes = BTreeMap::new();
    for (number, (offset, flip)) in mutations.iter().copied().enumerate() {
        image.write_all_at(&[original[offset] ^ flip], offset as u64).unwrap();
        // Every other one through a copy, and so a loop device; with all of them, each in both ways.
        let both = [copy_options(), V1.options()];
        let of_each_flip = number / 2 % 2;
        let ways = if whole() { &both[..] } else { &both[of_each_flip..=of_each_flip] };
        for result in ways.iter().map(|options| options.mount(&path)) {
            match result {
                Ok(mount) => {
                    count(&mut outcomes, "mounted");
                    walk(&mount, &mut outcomes);
                }
                Err(error) => {
                    let expected = match &error {
                        Error::Image { .. } => true,
                        Error::Kernel(error) => error.operation == Operation::CreateSuperblock,
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
