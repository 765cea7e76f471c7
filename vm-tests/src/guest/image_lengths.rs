//! Checks that images of every length are readable to their last byte, wherever the last page of their file
//! ends.

use super::fixtures;
use super::machines::STANDARD;
use super::mounted::{self, TREE, Traces, with_copy, with_digest, with_verity};
use super::probe;
use super::system::{helper, succeeded};
use crate::Error;
use crate::machine::{Machine, Tier};
use crate::scenario::{Guest, Scenario};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use sealmount::{
    Algorithm, CopyOptions, Digest, ErofsMount, Event, Image, MemoryKind, Method, MountOptions,
    SourceMethod, Verity,
};
use sealmount_sys::page_size;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use test_support::EveryBlock;
use test_support::every_block::VARIANTS;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "images_of_every_length_mount",
        machine: &LENGTHS,
        time_limit: TIME_LIMIT,
        run: images_of_every_length_mount,
    },
    Scenario {
        name: "images_with_small_blocks_mount_or_fail",
        machine: &LENGTHS,
        time_limit: TIME_LIMIT,
        run: images_with_small_blocks_mount_or_fail,
    },
];

/// The machine of these scenarios, which need a minute under emulation.
static LENGTHS: Machine =
    Machine { name: "lengths", tier: Tier::Ci, on_faulty_kernels: false, ..STANDARD };

const TIME_LIMIT: Duration = Duration::from_secs(180);

/// The highest number of blocks: two pages of 65,536 bytes and a half.
const BLOCKS_MAX: usize = 40;

/// The expected methods for a file on a disk: of whole pages, and with an end within a page.
struct Expected {
    whole: SourceMethod,
    partial: SourceMethod,
}

impl Expected {
    /// Probes the kernel with two images.
    fn probe(
        directory: &Path,
        whole: &EveryBlock,
        partial: &EveryBlock,
    ) -> Result<Expected, Error> {
        assert!(whole.bytes.len().is_multiple_of(page_size()));
        Ok(Expected { whole: newest(directory, whole)?, partial: newest(directory, partial)? })
    }

    fn of(&self, image: &EveryBlock) -> SourceMethod {
        match image.bytes.len().is_multiple_of(page_size()) {
            true => self.whole,
            false => self.partial,
        }
    }
}

/// Returns the newest method by which the kernel shows the whole image.
fn newest(directory: &Path, image: &EveryBlock) -> Result<SourceMethod, Error> {
    let path = write(directory, image)?;
    for method in [SourceMethod::Descriptor, SourceMethod::DescriptorPath] {
        let shown = match probe::erofs(&path, method) {
            Ok(mount) => {
                let root = format!("/proc/self/fd/{}", mount.as_raw_fd());
                image.compare(Path::new(&root))
            }
            Err(errno) => Err(errno.to_string()),
        };
        match shown {
            Ok(()) => return Ok(method),
            Err(problem) => println!("{} bytes, {method}: {problem}", image.bytes.len()),
        }
    }
    Ok(SourceMethod::LoopDevice)
}

fn write(directory: &Path, image: &EveryBlock) -> Result<PathBuf, Error> {
    let path = directory.join("length.cfs");
    fs::write(&path, &image.bytes)?;
    Ok(path)
}

/// Composefs images: every name is right without a copy, in a memfd, in a ramfs, and decompressed.
fn images_of_every_length_mount(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let objects = disk.join("no-objects");
    fs::create_dir_all(&objects)?;
    let plain = MountOptions::new(objects.as_path());
    // A mount that no overlay can be stacked on uses a loop device, whatever the length.
    let stacks = probe::best_source(&write(&disk, &EveryBlock::composefs(16, 0))?)?;
    let expected =
        Expected::probe(&disk, &EveryBlock::composefs(16, 0), &EveryBlock::composefs(1, 0))?;
    let of_file = |method| if stacks == expected.whole { method } else { SourceMethod::LoopDevice };
    let before = Traces::now()?;
    for (blocks, variant) in lengths(1) {
        let image = EveryBlock::composefs(blocks, variant);
        let path = write(&disk, &image)?;
        println!("{blocks} blocks, variant {variant}");
        assert_shows(&plain, &path, &image, of_file(expected.of(&image)))?;
        if variant != blocks % VARIANTS {
            continue;
        }
        let digest = Digest::of_bytes(Algorithm::Sha256, &image.bytes);
        let hashed = with_verity(&with_digest(&plain, digest), Verity::Off);
        let [memfd, ramfs] =
            [MemoryKind::Memfd, MemoryKind::Ramfs].map(|memory| with_copy(&hashed, memory));
        assert_shows(&memfd, &path, &image, SourceMethod::LoopDevice)?;
        // A copy in a ramfs has whole pages.
        assert_shows(&ramfs, &path, &image, of_file(expected.whole))?;

        fs::write(&path, stored_in_zstd(&image.bytes))?;
        let options = format!("basedir={},copy=ramfs,digest={digest},noverity", objects.display());
        succeeded(&helper(&path, Path::new(TREE), &options)?)?;
        image.compare(Path::new(TREE))?;
        unmount(TREE, UnmountFlags::empty())?;
    }
    before.assert_same_now()
}

/// Returns the lengths from `least` blocks on, each with all variants of the last block.
fn lengths(least: usize) -> impl Iterator<Item = (usize, usize)> {
    (least..=BLOCKS_MAX).flat_map(|blocks| (0..VARIANTS).map(move |variant| (blocks, variant)))
}

fn assert_shows(
    options: &MountOptions,
    path: &Path,
    image: &EveryBlock,
    expected: SourceMethod,
) -> Result<(), Error> {
    let mounted = mounted::mount(options, path)??;
    let used = mounted.events.iter().find_map(|event| match event {
        Event::MethodUsed { method: Method::Source(method), .. } => Some(*method),
        _ => None,
    });
    assert_eq!(used, Some(expected));
    image.compare(Path::new(TREE))?;
    mounted.unmount()
}

/// Returns a zstd frame that holds the content in blocks that are not compressed.
fn stored_in_zstd(content: &[u8]) -> Vec<u8> {
    /// The window in the header of the frame, and the largest block, in bytes.
    const BLOCK_MAX: usize = 128 << 10;
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3];
    let blocks = content.chunks(BLOCK_MAX);
    let last = blocks.len() - 1;
    for (number, block) in blocks.enumerate() {
        let header = (block.len() as u32) << 3 | u32::from(number == last);
        frame.extend(&header.to_le_bytes()[..3]);
        frame.extend(block);
    }
    frame
}

/// Plain EROFS images with blocks of 512 bytes end within a page on every architecture. Linux 6.1 does not
/// support such blocks.
fn images_with_small_blocks_mount_or_fail(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let whole = EveryBlock::small_blocks(128, 0);
    let before = Traces::now()?;
    if let Err(errno) = probe::erofs(&write(&disk, &whole)?, SourceMethod::LoopDevice) {
        assert_eq!(errno, Errno::INVAL);
        let error = Image::open_erofs(write(&disk, &whole)?)?.trust()?.mount().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::INVAL.raw_os_error()), "{error}");
        return before.assert_same_now();
    }
    let expected = Expected::probe(&disk, &whole, &EveryBlock::small_blocks(4, 0))?;
    println!("from a file of whole pages: {}; else: {}", expected.whole, expected.partial);
    fs::create_dir_all(TREE)?;
    for (blocks, variant) in lengths(4) {
        let image = EveryBlock::small_blocks(blocks, variant);
        println!("{blocks} blocks, variant {variant}");
        let opened = Image::open_erofs(write(&disk, &image)?)?;
        assert_complete(opened.trust()?.mount()?, &image, expected.of(&image))?;
        if variant == blocks % VARIANTS {
            for (memory, method) in
                [(MemoryKind::Memfd, SourceMethod::LoopDevice), (MemoryKind::Ramfs, expected.whole)]
            {
                let mut options = CopyOptions::new(memory);
                options.digest = Some(Digest::of_bytes(Algorithm::Sha256, &image.bytes));
                assert_complete(opened.copy(&options)?.mount()?, &image, method)?;
            }
        }
    }
    before.assert_same_now()
}

fn assert_complete(
    mount: ErofsMount,
    image: &EveryBlock,
    expected: SourceMethod,
) -> Result<(), Error> {
    assert_eq!(mount.report().method, expected, "{:?}", mount.report());
    mount.into_detached().attach(TREE)?;
    image.compare(Path::new(TREE))?;
    unmount(TREE, UnmountFlags::empty())?;
    Ok(())
}
