//! Tests the stages of a mount, each alone and in order, with real mounts on the running kernel.

use std::any::Any;
use std::error::Error as _;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create, openat};
use sealmount::{
    Algorithm, AttachError, CopyOptions, DetachedMount, Digest, ErofsError, ErofsMount, Error,
    ErrorKind, Event, Format, Image, ImageError, ImageProblem, KernelError, LayerMethod, Location,
    MemoryKind, MountOptions, ObjectVerity, Operation, Overlay, OverlayError, OverlayOptions,
    Progress, SizeLimit, Source, SourceError, SourceMethod, Stacking, UpperLayer, VerifiedBy,
    Verity, VerityStatus, VerityUnavailable, check_permission,
};

use test_support::every_block::VARIANTS;
use test_support::{
    EveryBlock, Fixture, Sandbox, V1, V2, assert_is_manifest, assert_is_manifest_mapped,
    assert_no_loop_device, large_image, loop_devices, mount_at, run, sandbox, through, umount,
};

const MIB: usize = 1024 * 1024;

/// The type of a ramfs, of statfs(2).
const RAMFS_MAGIC: rustix::fs::FsWord = 0x8584_58f6_u32 as rustix::fs::FsWord;

fn memfd() -> CopyOptions {
    CopyOptions::new(MemoryKind::Memfd)
}

fn ramfs() -> CopyOptions {
    CopyOptions::new(MemoryKind::Ramfs)
}

fn with_digest(mut options: CopyOptions, digest: Digest) -> CopyOptions {
    options.digest = Some(digest);
    options
}

fn proceed<T>(_: T) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Copies an image to a file of this name. The name distinguishes the memory and the loop device of the
/// image from the resources of other tests.
fn named(sandbox: &Sandbox, fixture: &Fixture, name: &str) -> PathBuf {
    sandbox.file(name, &fs::read(fixture.image()).unwrap())
}

/// Returns options for the objects in the source tree, which have no fs-verity.
fn unverified(fixture: &Fixture) -> OverlayOptions {
    let mut options = OverlayOptions::new(fixture.objects());
    options.verity = Some(Verity::Off);
    options
}

fn overlay(fixture: &Fixture, erofs: &ErofsMount) -> DetachedMount {
    unverified(fixture).open().unwrap().mount(erofs).unwrap()
}

/// Mounts the overlay, checks the tree, and unmounts the overlay.
fn assert_mounts(fixture: &Fixture, source: &Source, mount_point: &Path) {
    overlay(fixture, &source.mount().unwrap()).attach(mount_point).unwrap();
    assert_is_manifest(mount_point);
    umount(mount_point);
}

/// Returns the programs whose output this build can decompress.
fn decoders() -> impl Iterator<Item = &'static str> {
    let programs = [
        ("zstd", cfg!(feature = "zstd")),
        ("xz", cfg!(feature = "xz")),
        ("gzip", cfg!(feature = "gzip")),
    ];
    programs.into_iter().filter_map(|(program, is_supported)| is_supported.then_some(program))
}

/// Reads a file of a detached mount.
fn read(mount: impl AsFd, path: &str) -> String {
    let file = openat(mount, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    io::read_to_string(File::from(file)).unwrap()
}

fn device(file: impl AsFd) -> u64 {
    rustix::fs::fstat(file).unwrap().st_dev
}

fn device_and_inode(file: impl AsFd) -> (u64, u64) {
    let stat = rustix::fs::fstat(file).unwrap();
    (stat.st_dev, stat.st_ino)
}

/// Counts the descriptors of this process for files whose path or memory has this text in its name.
fn descriptors(text: &str) -> usize {
    fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| target.to_string_lossy().contains(text))
        .count()
}

/// Checks that no memory and no loop device of an image is left after the test has dropped all values
/// that hold them.
#[track_caller]
fn assert_nothing_left(image: &Path) {
    let name = image.file_name().unwrap().to_str().unwrap();
    assert_eq!(descriptors(name), 0, "descriptors of {name}");
    assert_no_loop_device(image.to_str().unwrap());
}

/// Returns a memfd with this content and these seals.
fn memfd_with(content: &[u8], seals: SealFlags) -> OwnedFd {
    let memfd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let mut file = File::from(memfd);
    file.write_all(content).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file.into()
}

fn all_seals() -> SealFlags {
    SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK
}

fn sealed_v1() -> OwnedFd {
    memfd_with(&fs::read(V1.image()).unwrap(), all_seals())
}

/// Makes a user namespace that maps its IDs to `first_id` and the following IDs, or without a mapping.
fn user_namespace(first_id: Option<u32>) -> File {
    let mut process = Command::new("unshare")
        .args(["--user", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = process.stdin.take().unwrap();
    // cat returns the line as soon as cat runs in the new namespace.
    stdin.write_all(b"\n").unwrap();
    process.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    for map in ["uid_map", "gid_map"] {
        if let Some(first_id) = first_id {
            let path = format!("/proc/{}/{map}", process.id());
            fs::write(path, format!("0 {first_id} 65536")).unwrap();
        }
    }
    let namespace = File::open(format!("/proc/{}/ns/user", process.id())).unwrap();
    drop(stdin);
    process.wait().unwrap();
    namespace
}

// Stages alone and in order.

#[test]
fn stages_are_send_and_sync() {
    fn check<T: Send + Sync + 'static>() {}
    check::<Image>();
    check::<Source>();
    check::<ErofsMount>();
    check::<Overlay>();
    check::<DetachedMount>();
    check::<Error>();
    check::<AttachError>();
    check::<MountOptions>();
    check::<OverlayOptions>();
}

#[test]
fn permission_check_accepts_root() {
    let Some(_sandbox) = sandbox!() else { return };
    check_permission().unwrap();
}

#[test]
fn opened_image_reports_header_and_state() {
    for (fixture, version) in [(V1, 0), (V2, 2)] {
        let image = Image::open(fixture.image()).unwrap();
        let size = fs::metadata(fixture.image()).unwrap().len();
        assert_eq!(image.path(), fixture.image());
        assert_eq!((image.file_size(), image.size()), (size, Some(size)));
        match (image.format(), version) {
            (Some(Format::Composefs { version: 0 | 1 }), 0) => {}
            (Some(Format::Composefs { version: found }), expected) => assert_eq!(found, expected),
            (format, _) => panic!("{format:?}"),
        }
        let header = image.header().unwrap();
        assert_eq!((header.size(), header.block_size()), (size, 4096));
        assert_eq!((image.compression(), image.is_sealed()), (None, false));
        let verity = image.verity().unwrap();
        assert!(matches!(verity, VerityStatus::NotEnabled | VerityStatus::Unsupported));
    }
}

#[test]
#[cfg(feature = "gzip")]
fn compressed_image_reports_no_header() {
    let Some(sandbox) = sandbox!() else { return };
    let content = through(&["gzip", "-c"], &fs::read(V1.image()).unwrap());
    let image = Image::open(sandbox.file("image.cfs.gz", &content)).unwrap();
    assert_eq!(image.compression(), Some(sealmount::Compression::Gzip));
    assert_eq!(image.file_size(), content.len() as u64);
    assert!((image.header(), image.size(), image.format()) == (None, None, None));
    for result in [image.trust(), image.verify(V1.digest())] {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidOptions, "{error}");
        assert!(error.hint().unwrap().to_string().contains("Image::copy"));
    }
}

#[test]
fn reports_name_verifier_methods_and_device() {
    let Some(sandbox) = sandbox!() else { return };
    let path = named(&sandbox, &V1, "reports.cfs");
    let image = Image::open(&path).unwrap();
    let size = image.file_size();
    for options in [memfd(), with_digest(memfd(), V1.digest()), with_digest(ramfs(), V1.digest())] {
        let source = image.copy(&options).unwrap();
        let report = source.report().clone();
        assert_eq!((&report.image, report.size), (&path, size));
        assert_eq!(report.format, image.format().unwrap());
        assert_eq!((report.compression, report.copied), (None, true));
        assert_eq!(report.memory, Some(options.memory));
        let by = report.verified.map(|verified| verified.by);
        assert_eq!(by, options.digest.map(|_| VerifiedBy::Userspace));
        assert_eq!((source.path(), source.digest()), (&*path, options.digest));

        let erofs = source.mount().unwrap();
        assert_eq!(erofs.source().report(), &report);
        let by_device = erofs.report().method == SourceMethod::LoopDevice;
        assert_eq!(erofs.report().loop_device.is_some(), by_device);
        assert_eq!((erofs.report().noacl, &erofs.report().user_namespace), (false, &None));
        match options.memory {
            // EROFS never mounts a file on tmpfs, so sealmount tries no other method.
            MemoryKind::Memfd => assert!(by_device && erofs.report().unsupported.is_empty()),
            _ => assert_unsupported_methods(&erofs),
        }

        let namespace = user_namespace(Some(100_000));
        let mapped = erofs.idmapped(namespace).unwrap();
        let namespace = mapped.report().user_namespace.clone().unwrap();
        assert!(namespace.to_string_lossy().starts_with("user:["), "{namespace:?}");

        let mount = overlay(&V1, &mapped);
        let report = mount.report().unwrap();
        assert_eq!(&report.source, source.report());
        assert_eq!(report.erofs.user_namespace, Some(namespace));
        assert_eq!(report.erofs.loop_device, erofs.report().loop_device);
        let overlay = report.overlay.as_ref().unwrap();
        assert_eq!(overlay.unsupported.is_empty(), overlay.method == LayerMethod::Descriptors);
        assert_eq!(overlay.verity, ObjectVerity::Disabled);
        assert_eq!(mount.verity(), Some(ObjectVerity::Disabled));

        let bare = erofs.into_detached();
        assert_eq!((bare.verity(), bare.report().unwrap().overlay.is_none()), (None, true));
    }
}

/// Checks that the report lists the methods before the used method, in order, each with its error.
fn assert_unsupported_methods(erofs: &ErofsMount) {
    let report = erofs.report();
    let order = [SourceMethod::Descriptor, SourceMethod::DescriptorPath, SourceMethod::LoopDevice];
    let used = order.iter().position(|method| *method == report.method).unwrap();
    let unsupported: Vec<_> = report.unsupported.iter().map(|found| found.method).collect();
    assert_eq!(unsupported, order[..used]);
    for found in &report.unsupported {
        let operation = found.error.operation();
        assert!(
            matches!(operation, Operation::SetOption | Operation::CreateSuperblock),
            "{operation:?}"
        );
    }
}

#[test]
fn trusted_file_mounts_and_reports_no_verifier() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    for fixture in [V1, V2] {
        let source = Image::open(fixture.image()).unwrap().trust().unwrap();
        let report = source.report();
        assert_eq!((report.memory, report.copied), (None, false));
        assert_eq!(report.verified, None);
        assert_unsupported_methods(&source.mount().unwrap());
        assert_mounts(&fixture, &source, &mount_point);
    }
}

#[test]
fn file_without_fs_verity_is_not_verified() {
    let error = Image::open(V1.image()).unwrap().verify(V1.digest()).unwrap_err();
    assert!(matches!(&error, SourceError::VerityUnavailable { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::VerityUnavailable);
    assert!(error.hint().unwrap().to_string().contains("Image::copy"));
}

#[test]
fn one_overlay_mounts_several_images() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let image = Image::open(V1.image()).unwrap();
    let overlay = unverified(&V1).open().unwrap();
    for source in [image.trust().unwrap(), image.copy(&memfd()).unwrap()] {
        let erofs = source.mount().unwrap();
        let mounts = [overlay.mount(&erofs).unwrap(), overlay.mount(&erofs).unwrap()];
        for mount in mounts {
            mount.attach(&mount_point).unwrap();
            assert_is_manifest(&mount_point);
            umount(&mount_point);
        }
    }
}

// Sharing.

#[test]
fn twenty_threads_share_one_copy_and_device() {
    let Some(sandbox) = sandbox!() else { return };
    let path = named(&sandbox, &V1, "shared.cfs");
    let source = Image::open(&path).unwrap().copy(&with_digest(memfd(), V1.digest())).unwrap();
    let erofs = source.mount().unwrap();
    let text = path.to_str().unwrap();
    let work = |number: u32| {
        let first_id = 100_000 * (number + 1);
        let directory = sandbox.directory(&format!("container{number}"));
        for name in ["upper", "work", "root"] {
            fs::create_dir(directory.join(name)).unwrap();
        }
        // Half of the threads clone one mount, and the others mount the source.
        let bare = if number.is_multiple_of(2) { None } else { Some(source.mount().unwrap()) };
        let namespace = user_namespace(Some(first_id));
        let image = bare.as_ref().unwrap_or(&erofs).idmapped(namespace).unwrap();
        let mut options = unverified(&V1);
        options.upper = Some(UpperLayer::new(directory.join("upper"), directory.join("work")));
        let mount = options.open().unwrap().mount(&image).unwrap();
        let root = directory.join("root");
        mount.attach(&root).unwrap();
        assert_is_manifest_mapped(&root, first_id);
        fs::write(root.join("own"), number.to_string()).unwrap();
        assert!(loop_devices(text).len() <= 1);
        (device(&image), root)
    };
    let results: Vec<(u64, PathBuf)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..20).map(|number| scope.spawn(move || work(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (number, (found, root)) in results.iter().enumerate() {
        assert_eq!(*found, device(&erofs), "the mounts have several superblocks");
        assert_eq!(fs::read_to_string(root.join("own")).unwrap(), number.to_string());
    }
    assert_eq!(loop_devices(text).len(), 1);
    drop((erofs, source));
    for (_, root) in &results {
        assert_eq!(loop_devices(text).len(), 1);
        umount(root);
    }
    assert_nothing_left(&path);
}

/// Checks that threads that mount a source at the same time share one loop device.
#[test]
fn parallel_first_mounts_attach_one_loop_device() {
    let Some(sandbox) = sandbox!() else { return };
    let path = named(&sandbox, &V1, "first.cfs");
    for _ in 0..10 {
        let source = Image::open(&path).unwrap().copy(&memfd()).unwrap();
        let barrier = std::sync::Barrier::new(8);
        let mount = || {
            let source = source.clone();
            barrier.wait();
            source.mount().unwrap()
        };
        let mounts: Vec<ErofsMount> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(mount)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let devices: Vec<_> = mounts.iter().map(|mount| &mount.report().loop_device).collect();
        assert!(devices.iter().all(|found| *found == devices[0]), "{devices:?}");
        assert!(mounts.iter().all(|mount| device(mount) == device(&mounts[0])));
        assert_eq!(loop_devices(path.to_str().unwrap()).len(), 1);
        drop((mounts, source));
        assert_nothing_left(&path);
    }
}

/// Returns all orders of `count` values.
fn permutations(count: usize) -> Vec<Vec<usize>> {
    let Some(last) = count.checked_sub(1) else { return vec![vec![]] };
    let insert = |order: Vec<usize>| {
        (0..count).map(move |at| {
            let mut order = order.clone();
            order.insert(at, last);
            order
        })
    };
    permutations(last).into_iter().flat_map(insert).collect()
}

#[test]
fn memory_and_device_go_with_the_last_user() {
    let Some(sandbox) = sandbox!() else { return };
    for (kind, name) in [(MemoryKind::Memfd, "last.cfs"), (MemoryKind::Ramfs, "last-ramfs.cfs")] {
        let path = named(&sandbox, &V1, name);
        let text = path.to_str().unwrap();
        for order in permutations(4) {
            let source = Image::open(&path).unwrap().copy(&CopyOptions::new(kind)).unwrap();
            let erofs = source.mount().unwrap();
            let has_device = erofs.report().loop_device.is_some();
            let mount = overlay(&V1, &erofs);
            let clone = mount.try_clone().unwrap();
            // The first two users hold descriptors of the memory. For a finished mount, only the kernel
            // holds the memory.
            let holders = [true, true, false, false];
            let mut users: [Option<Box<dyn Any>>; 4] = [
                Some(Box::new(source)),
                Some(Box::new(erofs)),
                Some(Box::new(mount)),
                Some(Box::new(clone)),
            ];
            for user in &order {
                users[*user] = None;
                for number in [2, 3] {
                    let Some(mount) = &users[number] else { continue };
                    let mount = mount.downcast_ref::<DetachedMount>().unwrap();
                    assert_eq!(read(mount, "hello.txt"), "hello from a composefs image\n");
                }
                let is_held = (0..4).any(|number| users[number].is_some() && holders[number]);
                assert_eq!(descriptors(name) > 0, is_held, "{order:?}");
                if has_device && users.iter().any(Option::is_some) {
                    assert_eq!(loop_devices(name).len(), 1, "{order:?}");
                }
            }
            assert_no_loop_device(text);
            assert_nothing_left(&path);
        }
    }
}

#[test]
fn attached_mount_outlives_all_stages() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let path = named(&sandbox, &V1, "outlives.cfs");
    let source = Image::open(&path).unwrap().copy(&memfd()).unwrap();
    let erofs = source.mount().unwrap();
    overlay(&V1, &erofs).attach(&mount_point).unwrap();
    drop((source, erofs));
    fs::remove_file(&path).unwrap();
    assert_eq!(loop_devices(path.to_str().unwrap()).len(), 1);
    assert_is_manifest(&mount_point);
    umount(&mount_point);
    assert_nothing_left(&path);
}

// Bare EROFS.

#[test]
fn bare_composefs_mount_shows_names_and_modes() {
    let Some(sandbox) = sandbox!() else { return };
    let (bare, full) = (sandbox.directory("bare"), sandbox.directory("full"));
    for fixture in [V1, V2] {
        let source = Image::open(fixture.image()).unwrap().trust().unwrap();
        let erofs = source.mount().unwrap();
        overlay(&fixture, &erofs).attach(&full).unwrap();
        erofs.into_detached().attach(&bare).unwrap();
        assert_eq!(mount_at(&bare).unwrap().fs_type, "erofs");
        for entry in fs::read_dir(&full).unwrap() {
            let name = entry.unwrap().file_name();
            let [bare, full] = [&bare, &full].map(|root| root.join(&name));
            let of = |path: &Path| {
                let metadata = fs::symlink_metadata(path).unwrap();
                (metadata.mode(), metadata.uid(), metadata.mtime())
            };
            assert_eq!(of(&bare), of(&full), "{name:?}");
        }
        umount(&bare);
        umount(&full);
    }
}

const HELLO: &str = "hello from a plain EROFS image\n";

/// Returns a plain EROFS image with one file, `hello.txt`. Its blocks hold the superblock, the inodes,
/// the directory and the content.
fn plain_erofs(block_bits: u8) -> Vec<u8> {
    let block_size = 1_usize << block_bits;
    // The superblock has 128 bytes.
    let metadata = (1024 + 128_usize).div_ceil(block_size);
    let (directory, content) = (metadata + 1, metadata + 2);
    let mut image = vec![0; (content + 1) * block_size];
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..][..bytes.len()].copy_from_slice(bytes);
    };

    put(1024, &0xe0f5_e1e2_u32.to_le_bytes());
    put(1024 + 12, &[block_bits]);
    // The number of an inode is its position behind `metadata`, in units of 32 bytes.
    put(1024 + 14, &1_u16.to_le_bytes());
    put(1024 + 16, &2_u64.to_le_bytes());
    put(1024 + 36, &(content as u32 + 1).to_le_bytes());
    put(1024 + 40, &(metadata as u32).to_le_bytes());

    // Each entry has a name, a type and an inode. The names follow the last entry.
    let entries: [(&str, u8, u64); 3] = [(".", 2, 1), ("..", 2, 1), ("hello.txt", 1, 2)];
    let mut name_offset = entries.len() * 12;
    for (number, (name, file_type, inode)) in entries.into_iter().enumerate() {
        let entry = directory * block_size + number * 12;
        put(entry, &inode.to_le_bytes());
        put(entry + 8, &(name_offset as u16).to_le_bytes());
        put(entry + 10, &[file_type]);
        put(directory * block_size + name_offset, name.as_bytes());
        name_offset += name.len();
    }
    put(content * block_size, HELLO.as_bytes());

    let inodes: [(u16, u16, usize, usize); 2] =
        [(0o40755, 2, name_offset, directory), (0o100_644, 1, HELLO.len(), content)];
    for (number, (mode, links, size, block)) in (1..).zip(inodes) {
        let inode = metadata * block_size + number * 32;
        put(inode + 4, &mode.to_le_bytes());
        put(inode + 6, &links.to_le_bytes());
        put(inode + 8, &(size as u32).to_le_bytes());
        put(inode + 16, &(block as u32).to_le_bytes());
        put(inode + 20, &(number as u32).to_le_bytes());
    }
    image
}

/// Returns the sources that the stages can make from an opened EROFS image, one for each method.
fn all_sources(image: &Image, content: &[u8]) -> Vec<Source> {
    let digest = Digest::of_bytes(Algorithm::Sha256, content);
    let sealed = Image::open_erofs(memfd_with(content, all_seals())).unwrap();
    vec![
        image.trust().unwrap(),
        image.copy(&with_digest(memfd(), digest)).unwrap(),
        image.copy(&with_digest(ramfs(), digest)).unwrap(),
        sealed.verify(digest).unwrap(),
    ]
}

#[test]
fn plain_erofs_mounts_with_each_block_size() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    for block_bits in [9, 10, 11, 12] {
        // The padding is a part of a block, a sector, or many blocks.
        for padding in [0, 100, 512, 8192, 9000] {
            let mut content = plain_erofs(block_bits);
            let size = content.len() as u64;
            content.resize(content.len() + padding, 0x55);
            let path = sandbox.file("plain.erofs", &content);
            let image = Image::open_erofs(&path).unwrap();
            assert_eq!((image.format(), image.size()), (Some(Format::Erofs), Some(size)));
            assert_eq!(image.header().unwrap().block_size(), 1 << block_bits);
            assert_eq!(image.file_size(), size + padding as u64);
            for source in all_sources(&image, &content) {
                let erofs = source.mount().unwrap_or_else(|error| {
                    panic!("2^{block_bits} bytes, padding {padding}, {source:?}: {error}")
                });
                assert_eq!(read(&erofs, "hello.txt"), HELLO);
                erofs.into_detached().attach(&mount_point).unwrap();
                assert_eq!(fs::read_to_string(mount_point.join("hello.txt")).unwrap(), HELLO);
                umount(&mount_point);
            }
            let error = Image::open(&path).unwrap_err();
            assert_plain_erofs(&error);
        }
    }
}

fn assert_plain_erofs(error: &ImageError) {
    let problem = |error: &ImageError| match error {
        ImageError::Invalid { problem, .. } => Some(problem.clone()),
        _ => None,
    };
    assert_eq!(problem(error), Some(ImageProblem::PlainErofs));
    assert_eq!(error.kind(), ErrorKind::NotAnImage);
    assert!(error.hint().unwrap().to_string().contains("Image::open_erofs"));
    assert!(error.hint().unwrap().for_options().contains("-t erofs"));
}

#[test]
fn truncated_plain_erofs_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let content = plain_erofs(9);
    let path = sandbox.file("short.erofs", &content[..content.len() - 1]);
    let error = Image::open_erofs(path).unwrap_err();
    assert!(
        matches!(&error, ImageError::Invalid { problem: ImageProblem::TooShort { .. }, .. }),
        "{error}"
    );
}

#[test]
#[cfg(feature = "zstd")]
fn compressed_plain_erofs_mounts_with_open_erofs() {
    let Some(sandbox) = sandbox!() else { return };
    let content = plain_erofs(10);
    let digest = Digest::of_bytes(Algorithm::Sha512, &content);
    let path = sandbox.file("plain.erofs.zst", &through(&["zstd", "-c"], &content));
    let options = with_digest(memfd(), digest);
    let source = Image::open_erofs(&path).unwrap().copy(&options).unwrap();
    assert_eq!(source.report().format, Format::Erofs);
    assert_eq!(source.report().compression, Some(sealmount::Compression::Zstd));
    assert_eq!(read(source.mount().unwrap(), "hello.txt"), HELLO);
    // The format shows only while the file is decompressed.
    match Image::open(&path).unwrap().copy(&options).unwrap_err() {
        SourceError::Image(error) => assert_plain_erofs(&error),
        error => panic!("{error}"),
    }
}

#[test]
fn image_without_composefs_magic_is_plain_erofs() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    for fixture in [V1, V2] {
        let mut content = fs::read(fixture.image()).unwrap();
        content[..4].fill(0);
        let path = sandbox.file("zeroed.cfs", &content);
        assert_plain_erofs(&Image::open(&path).unwrap_err());
        let image = Image::open_erofs(&path).unwrap();
        assert_eq!(image.format(), Some(Format::Erofs));
        for source in all_sources(&image, &content) {
            assert_mounts(&fixture, &source, &mount_point);
        }
        // open_erofs accepts a composefs image too.
        let image = Image::open_erofs(fixture.image()).unwrap();
        assert!(matches!(image.format(), Some(Format::Composefs { .. })));
        assert_mounts(&fixture, &image.trust().unwrap(), &mount_point);
    }
}

/// Images with blocks of 512 bytes end within a page. sealmount then tries whether the kernel reads the page.
#[test]
fn images_that_end_within_a_page_mount() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    for blocks in 4..=20 {
        for variant in 0..VARIANTS {
            let expected = EveryBlock::small_blocks(blocks, variant);
            let path = sandbox.file("small.erofs", &expected.bytes);
            let image = Image::open_erofs(&path).unwrap();
            for source in all_sources(&image, &expected.bytes) {
                let mount = source.mount().unwrap();
                let method = mount.report().method;
                mount.into_detached().attach(&mount_point).unwrap();
                let compared = expected.compare(&mount_point);
                umount(&mount_point);
                assert_eq!(compared, Ok(()), "{blocks} blocks, variant {variant}, {method}");
            }
        }
    }
}

/// Needs mkfs.erofs (Debian: erofs-utils).
#[test]
fn images_of_mkfs_erofs_mount() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let tree = sandbox.directory("tree");
    for size in [0, 1, 4095, 4096, 4097, 3 * MIB] {
        fs::write(tree.join(size.to_string()), large_image(size.max(24576)).split_at(size).0)
            .unwrap();
    }
    fs::create_dir(tree.join("directory")).unwrap();
    std::os::unix::fs::symlink("../1", tree.join("directory/link")).unwrap();
    for options in [&[][..], &["-zlz4"]] {
        let path = sandbox.path("mkfs.erofs");
        let arguments = [&["--quiet"], options].concat();
        let mut arguments: Vec<_> = arguments.into_iter().map(PathBuf::from).collect();
        arguments.extend([path.clone(), tree.clone()]);
        run("mkfs.erofs", &arguments);
        for padding in [0, 100, 4096] {
            let mut content = fs::read(&path).unwrap();
            content.resize(content.len() + padding, 0);
            fs::write(&path, &content).unwrap();
            let image = Image::open_erofs(&path).unwrap();
            assert_eq!(image.format(), Some(Format::Erofs));
            for source in all_sources(&image, &content) {
                source.mount().unwrap().into_detached().attach(&mount_point).unwrap();
                run(
                    "diff",
                    ["-r", "--no-dereference"]
                        .map(Path::new)
                        .iter()
                        .copied()
                        .chain([&*tree, &*mount_point]),
                );
                umount(&mount_point);
            }
        }
        fs::remove_file(path).unwrap();
    }
}

// Sealed memfds.

#[test]
fn sealed_memfd_is_used_in_place() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let memfd_of = sealed_v1();
    let inode = device_and_inode(&memfd_of);
    let image = Image::open(memfd_of).unwrap();
    assert!(image.is_sealed());
    let digest = V1.digest();
    for (source, digest) in [
        (image.verify(digest).unwrap(), Some(digest)),
        (image.copy(&with_digest(memfd(), digest)).unwrap(), Some(digest)),
        (image.copy(&memfd()).unwrap(), None),
        (image.trust().unwrap(), None),
    ] {
        assert_eq!(device_and_inode(&source), inode);
        let report = source.report();
        assert_eq!((report.copied, report.memory), (false, Some(MemoryKind::Memfd)));
        assert_eq!(source.digest(), digest);
        let by = report.verified.map(|verified| verified.by);
        assert_eq!(by, digest.map(|_| VerifiedBy::Userspace));
        let erofs = source.mount().unwrap();
        assert_eq!(erofs.report().method, SourceMethod::LoopDevice);
        assert!(erofs.report().unsupported.is_empty());
        assert_mounts(&V1, &source, &mount_point);
    }
}

#[test]
fn sealed_memfd_with_wrong_digest_is_rejected() {
    let image = Image::open(sealed_v1()).unwrap();
    for wrong in [Digest::Sha256([7; 32]), Digest::Sha512([7; 64]), V2.digest()] {
        for result in [image.verify(wrong), image.copy(&with_digest(memfd(), wrong))] {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DigestMismatch);
            let SourceError::DigestMismatch { expected, found, .. } = error else { panic!() };
            assert_eq!(*expected, wrong);
            assert_eq!(found.algorithm(), wrong.algorithm());
        }
    }
}

#[test]
fn memfd_without_all_seals_is_treated_as_file() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let content = fs::read(V1.image()).unwrap();
    for seals in [
        SealFlags::empty(),
        SealFlags::SEAL,
        SealFlags::WRITE,
        SealFlags::WRITE | SealFlags::GROW,
        SealFlags::WRITE | SealFlags::SHRINK,
        SealFlags::GROW | SealFlags::SHRINK,
        // With these seals, existing mappings can still change the content.
        SealFlags::FUTURE_WRITE | SealFlags::GROW | SealFlags::SHRINK,
    ] {
        let memfd_of = memfd_with(&content, seals);
        let inode = device_and_inode(&memfd_of);
        let image = Image::open(memfd_of).unwrap();
        assert!(!image.is_sealed(), "{seals:?}");
        let error = image.verify(V1.digest()).unwrap_err();
        assert!(
            matches!(
                &error,
                SourceError::VerityUnavailable { reason: VerityUnavailable::Unsupported, .. }
            ),
            "{error}"
        );
        let source = image.copy(&with_digest(memfd(), V1.digest())).unwrap();
        assert!(source.report().copied && device_and_inode(&source) != inode);
        assert_mounts(&V1, &source, &mount_point);
        let source = image.trust().unwrap();
        assert_eq!((source.report().copied, source.report().memory), (false, None));
        assert_mounts(&V1, &source, &mount_point);
    }
}

#[test]
#[cfg(feature = "zstd")]
fn sealed_memfd_with_compressed_image_is_copied() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let content = through(&["zstd", "-c"], &fs::read(V1.image()).unwrap());
    let image = Image::open(memfd_with(&content, all_seals())).unwrap();
    assert_eq!((image.is_sealed(), image.size()), (true, None));
    assert_eq!(image.verify(V1.digest()).unwrap_err().kind(), ErrorKind::InvalidOptions);
    assert_eq!(image.trust().unwrap_err().kind(), ErrorKind::InvalidOptions);
    for options in [memfd(), ramfs()] {
        let source = image.copy(&with_digest(options, V1.digest())).unwrap();
        assert!(source.report().copied);
        assert_eq!(source.report().memory, Some(options.memory));
        assert_mounts(&V1, &source, &mount_point);
    }
}

#[test]
fn ramfs_copy_of_sealed_memfd_is_in_ramfs() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let memfd_of = sealed_v1();
    let inode = device_and_inode(&memfd_of);
    let image = Image::open(memfd_of).unwrap();
    for options in [ramfs(), with_digest(ramfs(), V1.digest())] {
        let source = image.copy(&options).unwrap();
        assert!(source.report().copied && device_and_inode(&source) != inode);
        assert_eq!(source.report().memory, Some(MemoryKind::Ramfs));
        assert_eq!(rustix::fs::fstatfs(&source).unwrap().f_type, RAMFS_MAGIC);
        assert_mounts(&V1, &source, &mount_point);
    }
}

#[test]
fn front_door_uses_sealed_memfd_in_place() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let mut options = V1.copy_options();
    for copy in [Some(MemoryKind::Memfd), None] {
        options.copy = copy;
        let mut events = Vec::new();
        let mount = options.mount_with_events(sealed_v1(), &mut |event| {
            events.push(event);
            proceed(())
        });
        let used = events.iter().filter(|event| matches!(event, Event::UsedInPlace)).count();
        let verified = events
            .iter()
            .any(|event| matches!(event, Event::DigestVerified { by: VerifiedBy::Userspace, .. }));
        assert_eq!((used, verified), (1, true), "{events:?}");
        mount.unwrap().attach(&mount_point).unwrap();
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }
}

/// A copy is a sealed memfd, so another process can use the memfd without a second copy.
#[test]
fn copy_handed_over_is_sealed_and_used_in_place() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let first = Image::open(V2.image()).unwrap().copy(&memfd()).unwrap();
    let inode = device_and_inode(&first);
    let handed = first.as_fd().try_clone_to_owned().unwrap();
    drop(first);
    let image = Image::open(handed).unwrap();
    assert!(image.is_sealed());
    let source = image.verify(V2.digest()).unwrap();
    assert_eq!(device_and_inode(&source), inode);
    assert_mounts(&V2, &source, &mount_point);
}

// Digests of files.

#[test]
fn digest_of_file_and_reader_is_digest_of_fsverity() {
    let Some(sandbox) = sandbox!() else { return };
    let all = large_image(9 * MIB + 7);
    let sizes = [1, 4096, 4097, 512 * 1024 - 1, 512 * 1024, MIB + 1, 4 * MIB, 9 * MIB + 7];
    for size in sizes {
        let content = &all[..size];
        let path = sandbox.file("content", content);
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let option = format!("--hash-alg={algorithm}");
            let arguments = ["digest", "--compact", &option, path.to_str().unwrap()];
            let expected: Digest = run("fsverity", arguments).trim().parse().unwrap();
            let of_file = Digest::of_file(algorithm, File::open(&path).unwrap()).unwrap();
            let of_reader = Digest::of_reader(algorithm, File::open(&path).unwrap()).unwrap();
            let of_bytes = Digest::of_bytes(algorithm, content);
            assert_eq!([of_file, of_reader, of_bytes], [expected; 3], "{size} bytes");
        }
    }
}

/// Checks that the digest neither depends on the position of the descriptor nor changes the position.
#[test]
fn digest_of_file_ignores_its_position() {
    use std::io::Seek;
    let mut file = File::open(V1.image()).unwrap();
    file.seek(io::SeekFrom::Start(1000)).unwrap();
    assert_eq!(Digest::of_file(Algorithm::Sha256, &file).unwrap(), V1.digest());
    assert_eq!(file.stream_position().unwrap(), 1000);
}

// Progress, cancellation and panics.

#[test]
fn progress_ends_with_all_bytes() {
    let Some(sandbox) = sandbox!() else { return };
    let sealed = memfd_with(&large_image(4 * MIB), all_seals());
    let digest = Digest::of_file(Algorithm::Sha256, &sealed).unwrap();
    let mut images = vec![(Image::open(sealed).unwrap(), with_digest(memfd(), digest))];
    for (path, options) in copies(&sandbox, "progress.cfs") {
        images.push((Image::open(path).unwrap(), options));
    }
    // The progress includes trailing data.
    let padded = [&plain_erofs(12)[..], &vec![1; 4 * MIB - plain_erofs(12).len()]].concat();
    images.push((Image::open_erofs(sandbox.file("padded", &padded)).unwrap(), memfd()));
    for (image, options) in images {
        let mut calls = Vec::new();
        let source = image.copy_with_progress(&options, &mut |progress| {
            calls.push((progress.done, progress.total));
            proceed(())
        });
        source.unwrap();
        let size = 4 * MIB as u64;
        assert_eq!(calls.last(), Some(&(size, size)), "{image:?}");
        // The size of a compressed image is not known at first.
        let start = calls.iter().take_while(|call| **call == (0, 0)).count();
        assert!(start == 0 || image.compression().is_some(), "{calls:?}");
        assert!(calls.is_sorted(), "{calls:?}");
        assert!(calls[start..].iter().all(|(_, total)| *total == size), "{calls:?}");
        assert_eq!(calls.iter().filter(|(done, _)| *done == size).count(), 1, "{calls:?}");
    }
}

/// Makes images of 4 MiB in files whose names start with this name. Returns each image with options for
/// a kind of copy.
fn copies(sandbox: &Sandbox, name: &str) -> Vec<(PathBuf, CopyOptions)> {
    let content = large_image(4 * MIB);
    let digest = Digest::of_bytes(Algorithm::Sha256, &content);
    let plain = sandbox.file(name, &content);
    let mut copies = Vec::new();
    for options in [memfd(), ramfs()] {
        copies.push((plain.clone(), options));
        copies.push((plain.clone(), with_digest(options, digest)));
    }
    for program in decoders() {
        let content = through(&[program, "-1", "-c"], &content);
        let image = sandbox.file(&format!("{name}.{program}"), &content);
        copies.push((image, with_digest(memfd(), digest)));
    }
    copies
}

#[test]
fn cancelled_copy_leaves_nothing() {
    let Some(sandbox) = sandbox!() else { return };
    for (image, options) in copies(&sandbox, "cancelled.cfs") {
        let before = fs::read(&image).unwrap();
        let half = |progress: Progress| progress.done >= progress.total / 2;
        let last = |progress: Progress| progress.done == progress.total;
        let first = |_| true;
        let moments: [(&str, &dyn Fn(Progress) -> bool); 3] =
            [("first", &first), ("middle", &half), ("last", &last)];
        for (moment, is_now) in moments {
            let opened = Image::open(&image).unwrap();
            let mut cancelled = false;
            let mut calls = Vec::new();
            let result = opened.copy_with_progress(&options, &mut |progress| {
                assert!(!cancelled, "sealmount called the callback after the cancellation");
                assert!(progress.done <= progress.total, "{progress:?}");
                // sealmount skips a call that comes less than 10 ms after the previous call.
                std::thread::sleep(Duration::from_millis(11));
                calls.push(progress);
                cancelled = is_now(progress);
                if cancelled { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert!(
                cancelled,
                "no call at this moment: {moment}, {image:?}, {options:?}: {calls:?}"
            );
            let error = result.unwrap_err();
            assert!(matches!(&error, SourceError::Cancelled { .. }), "{error}");
            assert_eq!(error.kind(), ErrorKind::Cancelled);
            assert_eq!(Error::from(error).kind(), ErrorKind::Cancelled);
            // A caller can copy the opened image again after the cancellation.
            opened.copy(&options).unwrap();
            drop(opened);
            assert_nothing_left(&image);
        }
        assert_eq!(fs::read(&image).unwrap(), before);
    }
}

#[test]
fn cancelled_hash_of_sealed_memfd_is_reported() {
    let content = large_image(4 * MIB);
    let digest = Digest::of_bytes(Algorithm::Sha512, &content);
    let image = Image::open(memfd_with(&content, all_seals())).unwrap();
    let options = with_digest(memfd(), digest);
    let result = image.copy_with_progress(&options, &mut |_| ControlFlow::Break(()));
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
    let mut last = None;
    let source = image.copy_with_progress(&options, &mut |progress| {
        last = Some(progress);
        proceed(())
    });
    assert!(!source.unwrap().report().copied);
    assert_eq!(last.unwrap().total, content.len() as u64);
}

#[test]
fn panic_in_callback_is_passed_on() {
    let Some(sandbox) = sandbox!() else { return };
    for (image, options) in copies(&sandbox, "panicked.cfs") {
        let opened = Image::open(&image).unwrap();
        let copy = || {
            opened.copy_with_progress(&options, &mut |_| std::panic::resume_unwind(Box::new(42_u8)))
        };
        let panic = catch_unwind(AssertUnwindSafe(copy)).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&42_u8));
        opened.copy(&options).unwrap();
        drop(opened);
        assert_nothing_left(&image);
    }
}

/// Ends a mount at its first event, at its second, and so on until the mount succeeds. Returns the
/// number of events.
fn end_at_each_event(
    options: &MountOptions,
    image: &Path,
    end: &dyn Fn() -> ControlFlow<()>,
    check: &dyn Fn(std::thread::Result<Result<DetachedMount, Error>>),
) -> usize {
    for number in 0.. {
        let mut count = 0;
        let mut events = |_| {
            count += 1;
            if count > number { end() } else { proceed(()) }
        };
        let mount = || options.mount_with_events(image, &mut events);
        let result = catch_unwind(AssertUnwindSafe(mount));
        if count <= number {
            drop(result.unwrap().unwrap());
            assert_nothing_left(image);
            return number;
        }
        check(result);
        assert_nothing_left(image);
    }
    unreachable!()
}

#[test]
fn mount_ended_at_any_event_leaves_nothing() {
    let Some(sandbox) = sandbox!() else { return };
    let path = named(&sandbox, &V1, "ended.cfs");
    let namespace = user_namespace(Some(100_000));
    for copy in [None, Some(MemoryKind::Memfd), Some(MemoryKind::Ramfs)] {
        let mut options = V1.copy_options();
        options.copy = copy;
        options.digest = copy.map(|_| V1.digest());
        options.idmap = Some(namespace.try_clone().unwrap().into());
        let cancel = || ControlFlow::Break(());
        let count = end_at_each_event(&options, &path, &cancel, &|result| {
            assert_eq!(result.unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
        });
        assert!(count >= 5, "{count} events");
        let panic = || std::panic::resume_unwind(Box::new("from the callback"));
        end_at_each_event(&options, &path, &panic, &|result| {
            let panic = result.unwrap_err();
            assert_eq!(panic.downcast_ref(), Some(&"from the callback"));
        });
    }
}

// Attaching.

#[test]
fn attach_error_returns_the_mount() {
    let Some(sandbox) = sandbox!() else { return };
    let (missing, mount_point) = (sandbox.path("missing"), sandbox.directory("mnt"));
    let file = sandbox.file("file", b"");
    let path = named(&sandbox, &V1, "returned.cfs");
    let source = Image::open(&path).unwrap().copy(&memfd()).unwrap();
    let mount = overlay(&V1, &source.mount().unwrap());
    drop(source);

    let error = mount.attach(&missing).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.hint().unwrap().to_string(), "make the directory first");
    assert!(error.to_string().contains(missing.to_str().unwrap()), "{error}");
    let error = error.into_mount().attach(&file).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let error = error.into_mount().attach_beneath(&missing).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unsupported), "{error}");
    // This mount point is the directory of a detached mount.
    let other = overlay(&V1, &Image::open(V1.image()).unwrap().trust().unwrap().mount().unwrap());
    let elsewhere = openat(&other, ".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let mount = error.into_mount();
    assert_eq!(
        mount.verity(),
        Some(ObjectVerity::Disabled),
        "the error lost the report of the mount"
    );
    let mount = match mount.attach(elsewhere) {
        // Linux 6.15 attaches a mount to a detached mount.
        Ok(()) => overlay(&V1, &Image::open(&path).unwrap().trust().unwrap().mount().unwrap()),
        Err(error) => error.into_mount(),
    };
    mount.attach(&mount_point).unwrap();
    assert_is_manifest(&mount_point);
    umount(&mount_point);
    drop(other);
    assert_nothing_left(&path);
}

#[test]
fn dropped_attach_error_unmounts() {
    let Some(sandbox) = sandbox!() else { return };
    let path = named(&sandbox, &V1, "dropped.cfs");
    let mount = V1.copy_options().mount(&path).unwrap();
    let error = mount.attach(sandbox.path("missing")).unwrap_err();
    assert_eq!(loop_devices(path.to_str().unwrap()).len(), 1);
    assert_eq!(Error::from(error).kind(), ErrorKind::NotFound);
    assert_nothing_left(&path);
}

/// Mounts V1 with an additional file that identifies the mount.
fn marked(sandbox: &Sandbox, name: &str) -> DetachedMount {
    let directory = sandbox.directory(&format!("layer {name}"));
    for name in ["upper", "work"] {
        fs::create_dir(directory.join(name)).unwrap();
    }
    fs::write(directory.join("upper/marker"), name).unwrap();
    let mut options = unverified(&V1);
    options.upper = Some(UpperLayer::new(directory.join("upper"), directory.join("work")));
    let erofs = Image::open(V1.image()).unwrap().trust().unwrap().mount().unwrap();
    options.open().unwrap().mount(&erofs).unwrap()
}

fn marker(mount_point: &Path) -> String {
    fs::read_to_string(mount_point.join("marker")).unwrap_or_default()
}

#[test]
fn attach_covers_the_mount_that_is_there() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    marked(&sandbox, "old").attach(&mount_point).unwrap();
    marked(&sandbox, "new").attach(&mount_point).unwrap();
    assert_eq!(marker(&mount_point), "new");
    umount(&mount_point);
    assert_eq!(marker(&mount_point), "old");
    umount(&mount_point);
    assert_eq!(marker(&mount_point), "");
}

/// Returns whether the mount was attached beneath. Before Linux 6.5, the error must return the mount.
fn attaches_beneath(result: Result<(), AttachError>, mount_point: &Path) -> bool {
    match result {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            error.into_mount().attach(mount_point).unwrap();
            false
        }
    }
}

#[test]
fn attach_beneath_shows_new_tree_after_umount() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    marked(&sandbox, "old").attach(&mount_point).unwrap();
    let opened = sealmount::open_mount_point(&mount_point).unwrap();
    for (name, location) in
        [("path", Location::from(&mount_point)), ("descriptor", Location::from(opened))]
    {
        let new = marked(&sandbox, name);
        if !attaches_beneath(new.attach_beneath(location), &mount_point) {
            return;
        }
        assert_eq!(marker(&mount_point), "old");
    }
    // The newest mount lies directly beneath the top mount.
    for name in ["descriptor", "path", ""] {
        umount(&mount_point);
        assert_eq!(marker(&mount_point), name);
    }
}

#[test]
fn attach_beneath_a_directory_returns_the_mount() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let error = marked(&sandbox, "new").attach_beneath(&mount_point).unwrap_err();
    let problem = error.problem().kernel().unwrap();
    assert_eq!(problem.operation(), Operation::AttachBeneath);
    assert_eq!(problem.object(), Some(&*mount_point));
    let hint = error.hint().unwrap().to_string();
    assert!(hint.contains("the root directory of a mount") || hint.contains("Linux 6.5"), "{hint}");
    error.into_mount().attach(&mount_point).unwrap();
    assert_eq!(marker(&mount_point), "new");
    umount(&mount_point);
}

// Clones and descriptors.

#[test]
fn clones_of_mounts_share_the_superblock() {
    let Some(sandbox) = sandbox!() else { return };
    let (one, other) = (sandbox.directory("one"), sandbox.directory("other"));
    let path = named(&sandbox, &V1, "cloned.cfs");
    let image = Image::open(&path).unwrap();
    for source in [image.trust().unwrap(), image.copy(&memfd()).unwrap()] {
        let erofs = source.mount().unwrap();
        let clone = erofs.try_clone().unwrap();
        assert_eq!(device(&clone), device(&erofs));
        assert_eq!(clone.report().method, erofs.report().method);
        drop(erofs);

        let mount = overlay(&V1, &clone);
        let again = mount.try_clone().unwrap();
        assert_eq!(device(&again), device(&mount));
        assert_eq!(again.verity(), Some(ObjectVerity::Disabled));
        mount.attach(&one).unwrap();
        drop((source, clone));
        umount(&one);
        let third = again.try_clone().unwrap();
        again.attach(&one).unwrap();
        third.attach(&other).unwrap();
        assert_is_manifest(&one);
        umount(&one);
        assert_is_manifest(&other);
        umount(&other);
    }
    drop(image);
    assert_nothing_left(&path);
}

#[test]
fn clone_of_bare_mount_is_a_bare_mount() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let source = Image::open(V1.image()).unwrap().copy(&ramfs()).unwrap();
    let bare = source.mount().unwrap().into_detached();
    let clone = bare.try_clone().unwrap();
    assert!(clone.report().unwrap().overlay.is_none());
    for mount in [bare, clone] {
        mount.attach(&mount_point).unwrap();
        assert_eq!(mount_at(&mount_point).unwrap().fs_type, "erofs");
        umount(&mount_point);
    }
}

#[test]
fn clone_keeps_the_idmap() {
    let Some(_sandbox) = sandbox!() else { return };
    let source = Image::open(V1.image()).unwrap().copy(&memfd()).unwrap();
    let mapped = source.mount().unwrap().idmapped(user_namespace(Some(300_000))).unwrap();
    for erofs in [mapped.try_clone().unwrap(), mapped.try_clone().unwrap().try_clone().unwrap()] {
        let stat = rustix::fs::statat(&erofs, "hello.txt", rustix::fs::AtFlags::empty()).unwrap();
        assert_eq!((stat.st_uid, stat.st_gid), (300_000, 300_000));
        let error = erofs.idmapped(user_namespace(Some(400_000))).unwrap_err();
        assert!(matches!(error, ErofsError::AlreadyIdmapped { .. }), "{error}");
    }
}

#[test]
fn mount_survives_the_round_trip_as_descriptor() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let path = named(&sandbox, &V1, "descriptor.cfs");
    for clone_first in [false, true] {
        let mount = V1.copy_options().mount(&path).unwrap();
        let clone = clone_first.then(|| mount.try_clone().unwrap());
        let fd: OwnedFd = mount.into_fd().unwrap();
        drop(clone);
        let mount = DetachedMount::from(fd);
        assert!(mount.report().is_none() && mount.verity().is_none());
        let clone = mount.try_clone().unwrap();
        assert!(clone.report().is_none());
        let error = mount.attach(sandbox.path("missing")).unwrap_err();
        error.into_mount().attach(&mount_point).unwrap();
        drop(clone);
        assert_is_manifest(&mount_point);
        umount(&mount_point);
        assert_nothing_left(&path);
    }
}

#[test]
fn descriptor_of_a_file_does_not_attach() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let file = sandbox.file("file", b"");
    let mount = DetachedMount::from(OwnedFd::from(File::open(file).unwrap()));
    let error = mount.attach(&mount_point).unwrap_err();
    assert_eq!(error.problem().kernel().unwrap().operation(), Operation::Attach);
    assert!(mount_at(&mount_point).is_none());
}

// Verity of the objects.

#[test]
fn verified_image_requires_verity_of_objects() {
    let Some(sandbox) = sandbox!() else { return };
    // tmpfs has no fs-verity.
    let objects = sandbox.tmpfs("objects");
    run("cp", [Path::new("-a"), &V1.objects().join("."), &objects]);
    let image = Image::open(V1.image()).unwrap();
    let copy = with_digest(memfd(), V1.digest());
    let verified = image.copy(&copy).unwrap().mount().unwrap();
    let in_place = Image::open(sealed_v1()).unwrap().verify(V1.digest()).unwrap().mount().unwrap();
    let trusted = image.trust().unwrap().mount().unwrap();
    let unhashed = image.copy(&memfd()).unwrap().mount().unwrap();

    let mut options = OverlayOptions::new(&objects);
    // Opening the directories succeeds, because the image decides whether sealmount requires verity.
    let overlay = options.open().unwrap();
    for erofs in [&verified, &in_place, &verified.try_clone().unwrap()] {
        let error = overlay.mount(erofs).unwrap_err();
        assert!(
            matches!(
                &error,
                OverlayError::ObjectsVerityUnavailable { path, .. } if path.starts_with(&objects)
            ),
            "{error}"
        );
        assert_eq!(error.kind(), ErrorKind::VerityUnavailable);
        assert!(error.hint().unwrap().to_string().contains("Verity::Off"));
    }
    for erofs in [&trusted, &unhashed] {
        let mount = overlay.mount(erofs).unwrap();
        assert_eq!(mount.verity(), Some(ObjectVerity::NotRequested));
    }
    for (verity, expected) in [
        (Verity::Off, ObjectVerity::Disabled),
        (Verity::Try, ObjectVerity::UnsupportedByObjects(VerityUnavailable::Unsupported)),
    ] {
        options.verity = Some(verity);
        let overlay = options.open().unwrap();
        for erofs in [&verified, &trusted] {
            let mount = overlay.mount(erofs).unwrap();
            assert_eq!(mount.verity(), Some(expected));
            assert_eq!(read(&mount, "hello.txt"), "hello from a composefs image\n");
        }
    }
    options.verity = Some(Verity::Require);
    assert_eq!(options.open().unwrap_err().kind(), ErrorKind::VerityUnavailable);
}

// Idmaps.

#[test]
fn second_idmap_is_rejected() {
    let Some(_sandbox) = sandbox!() else { return };
    let source = Image::open(V1.image()).unwrap().trust().unwrap();
    let erofs = source.mount().unwrap();
    let mapped = erofs.idmapped(user_namespace(Some(100_000))).unwrap();
    let error = mapped.idmapped(user_namespace(Some(200_000))).unwrap_err();
    assert!(matches!(error, ErofsError::AlreadyIdmapped { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::InvalidOptions);
    assert!(error.hint().unwrap().to_string().contains("Source::mount"));
    // One unmapped mount can have any number of mapped clones.
    let other = erofs.idmapped(user_namespace(Some(200_000))).unwrap();
    for (erofs, owner) in [(&erofs, 0), (&mapped, 100_000), (&other, 200_000)] {
        let stat = rustix::fs::statat(erofs, "hello.txt", rustix::fs::AtFlags::empty()).unwrap();
        assert_eq!(stat.st_uid, owner);
        assert_eq!(device(erofs), device(&mapped));
    }
}

#[test]
fn unusable_user_namespaces_are_reported() {
    let Some(sandbox) = sandbox!() else { return };
    let erofs = Image::open(V1.image()).unwrap().trust().unwrap().mount().unwrap();
    let file = sandbox.file("file", b"");
    for location in [Location::from(file), Location::from("/proc/self/ns/mnt")] {
        let error = erofs.idmapped(location).unwrap_err();
        assert!(matches!(error, ErofsError::NotUserNamespace { .. }), "{error}");
    }
    for (location, kind) in [
        (sandbox.path("missing").into(), ErrorKind::NotFound),
        (Location::from("/proc/self/ns/user"), ErrorKind::PermissionDenied),
        (user_namespace(None).into(), ErrorKind::Unsupported),
    ] {
        let error = erofs.idmapped(location).unwrap_err();
        assert!(matches!(error, ErofsError::Kernel(_)), "{error}");
        assert_eq!(error.kind(), kind, "{error}");
    }
    erofs.idmapped(user_namespace(Some(100_000))).unwrap();
}

// Errors.

/// Returns an error of each stage.
fn errors(sandbox: &Sandbox) -> Vec<(Error, ErrorKind, io::ErrorKind)> {
    use ErrorKind as K;
    let image = Image::open(V1.image()).unwrap();
    let junk = sandbox.file("junk", &[1; 8192]);
    let trusted = image.trust().unwrap().mount().unwrap();
    let mut limited = memfd();
    limited.size = Some(SizeLimit::Bytes(4096));
    let mut damaged = fs::read(V1.image()).unwrap();
    // These bytes are the number of the root inode.
    damaged[1024 + 14..][..2].fill(0xff);
    let damaged = Image::open(sandbox.file("damaged", &damaged)).unwrap().trust().unwrap();
    let mut both = V1.options();
    both.size = Some(SizeLimit::Bytes(4096));
    let missing = sandbox.path("missing");
    vec![
        (both.mount(V1.image()).unwrap_err(), K::InvalidOptions, io::ErrorKind::InvalidInput),
        (
            OverlayOptions::default().open().unwrap_err().into(),
            K::InvalidOptions,
            io::ErrorKind::InvalidInput,
        ),
        (Image::open(junk).unwrap_err().into(), K::NotAnImage, io::ErrorKind::InvalidData),
        (damaged.mount().unwrap_err().into(), K::NotAnImage, io::ErrorKind::InvalidData),
        (Image::open(&missing).unwrap_err().into(), K::NotFound, io::ErrorKind::NotFound),
        (
            image.copy(&with_digest(memfd(), Digest::Sha256([0; 32]))).unwrap_err().into(),
            K::DigestMismatch,
            io::ErrorKind::InvalidData,
        ),
        (
            image.verify(V1.digest()).unwrap_err().into(),
            K::VerityUnavailable,
            io::ErrorKind::Unsupported,
        ),
        (image.copy(&limited).unwrap_err().into(), K::LimitExceeded, io::ErrorKind::QuotaExceeded),
        (
            image.copy_with_progress(&memfd(), &mut |_| ControlFlow::Break(())).unwrap_err().into(),
            K::Cancelled,
            io::ErrorKind::Other,
        ),
        (
            trusted.idmapped("/proc/self/ns/user").unwrap_err().into(),
            K::PermissionDenied,
            io::ErrorKind::PermissionDenied,
        ),
        (
            OverlayOptions::new(&missing).open().unwrap_err().into(),
            K::NotFound,
            io::ErrorKind::NotFound,
        ),
        (
            trusted.into_detached().attach(&missing).unwrap_err().into(),
            K::NotFound,
            io::ErrorKind::NotFound,
        ),
        (
            sealmount::open_mount_point(&missing).unwrap_err().into(),
            K::NotFound,
            io::ErrorKind::NotFound,
        ),
    ]
}

#[test]
fn io_error_keeps_kind_text_and_error() {
    let Some(sandbox) = sandbox!() else { return };
    for (error, kind, io_kind) in errors(&sandbox) {
        assert_eq!(error.kind(), kind, "{error}");
        let text = error.to_string();
        assert_eq!(text.lines().count(), 1, "{text:?}");
        let errno = error.raw_os_error();
        let error = io::Error::from(error);
        assert_eq!((error.kind(), error.to_string()), (io_kind, text));
        let inner = error.get_ref().unwrap().downcast_ref::<Error>().unwrap();
        assert_eq!((inner.kind(), inner.raw_os_error()), (kind, errno));
    }
}

/// Returns an error and its sources.
fn chain(error: &Error) -> Vec<&(dyn std::error::Error + 'static)> {
    let mut chain: Vec<&(dyn std::error::Error + 'static)> = vec![error];
    while let Some(source) = chain[chain.len() - 1].source() {
        chain.push(source);
    }
    chain
}

#[test]
fn kernel_error_is_reached_from_each_stage() {
    let Some(sandbox) = sandbox!() else { return };
    let missing = sandbox.path("missing");
    let erofs = Image::open(V1.image()).unwrap().trust().unwrap().mount().unwrap();
    let not_a_mount = DetachedMount::from(OwnedFd::from(File::open(V1.image()).unwrap()));
    let in_use = sandbox.directory("mnt");
    for (error, operation) in [
        (Error::from(Image::open(&missing).unwrap_err()), Operation::OpenImage),
        (erofs.idmapped(&missing).unwrap_err().into(), Operation::OpenUserNamespace),
        (not_a_mount.attach(in_use).unwrap_err().into(), Operation::Attach),
    ] {
        let kernel: &KernelError = error.kernel().unwrap();
        assert_eq!(kernel.operation(), operation, "{error}");
        assert_eq!(error.raw_os_error(), Some(kernel.raw_os_error()));
        // The message contains the text of the kernel's error only once.
        assert_eq!(error.to_string(), kernel.to_string());
        assert!(chain(&error).len() > 1, "{error}");
    }
    // The error for a missing directory has an errno too.
    let error = Error::from(OverlayOptions::new(&missing).open().unwrap_err());
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NOENT.raw_os_error()));
}

#[test]
fn decompress_error_has_io_error_as_source() {
    let Some(sandbox) = sandbox!() else { return };
    let content = large_image(2 * MIB);
    for program in decoders() {
        let compressed = through(&[program, "-1", "-c"], &content);
        let path = sandbox.file(program, &compressed[..compressed.len() / 2]);
        let error = Image::open(path).unwrap().copy(&memfd()).unwrap_err();
        assert!(matches!(&error, SourceError::Decompress { .. }), "{error}");
        assert_eq!(error.kind(), ErrorKind::NotAnImage);
        assert!(error.source().unwrap().downcast_ref::<io::Error>().is_some());
        let error = Error::from(error);
        let found = chain(&error).iter().any(|error| error.downcast_ref::<io::Error>().is_some());
        assert!(found && error.kernel().is_none(), "{error}");
    }
}

#[test]
fn overlay_on_file_reports_stacking() {
    let Some(sandbox) = sandbox!() else { return };
    let image = Image::open(V1.image()).unwrap();
    let overlay = unverified(&V1).open().unwrap();
    let stacking = |erofs: &ErofsMount, overlay: &Overlay| {
        let mount = overlay.mount(erofs).unwrap();
        mount.report().unwrap().overlay.as_ref().unwrap().stacking.clone()
    };
    let from_file = image.trust().unwrap().mount().unwrap();
    assert_ne!(from_file.report().method, SourceMethod::LoopDevice);
    assert!(matches!(stacking(&from_file, &overlay), Stacking::Possible));
    let from_loop = image.copy(&memfd()).unwrap().mount().unwrap();
    assert!(matches!(stacking(&from_loop, &overlay), Stacking::NotTried));

    // Objects on an overlayfs use up a level, with every source of the image.
    let [lower, merged] = ["lower", "merged"].map(|name| sandbox.directory(name));
    let layers = format!("lowerdir={}:{}", V1.objects().display(), lower.display());
    run("mount", ["-t", "overlay", "-o", &layers, "overlay", merged.to_str().unwrap()]);
    let mut options = OverlayOptions::new(&merged);
    options.verity = Some(Verity::Off);
    assert!(matches!(stacking(&from_file, &options.open().unwrap()), Stacking::NotTried));
    umount(&merged);
}
