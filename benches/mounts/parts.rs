//! The time of each stage of a mount, taken between the calls of the library.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Instant;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use sealmount::{CopyOptions, Digest, Location, MemoryKind, OverlayOptions, Verity};
use test_support::V1;

use crate::bench::{Bench, Taken};
use crate::images::Image;
use crate::machine::MemInfo;
use crate::report::{Report, Table};
use crate::sizes::MIB;
use crate::timing::{Samples, milliseconds};

/// The stages. Copy, digest and seal are one call, as are the loop device and EROFS.
const PARTS: [&str; 6] =
    ["open, check", "copy, digest, seal", "loop device, EROFS", "overlayfs", "attach", ALL];

/// The last of the parts.
pub const ALL: &str = "all";

pub const MEMFD_DIGEST: &str = "memfd, digest";
pub const SEALED_DIGEST: &str = "sealed memfd, digest";

/// The group of the growth of `Shmem` by a mount of a sealed memfd.
pub const MEMORY_GROUP: &str = "MiB of Shmem";

pub fn group(variant: &str) -> String {
    format!("ms, parts of {variant}")
}

/// An image, and how it is mounted.
pub struct Variant {
    pub image: Location,
    pub copy: Option<MemoryKind>,
    pub digest: Option<Digest>,
}

pub fn measure(bench: &Bench, image: &Image, report: &mut Report) {
    println!("the parts of a mount…");
    let file = Location::from(&image.path);
    let memfd = Location::from(sealed_memfd(&image.path));
    let digest = Some(image.digest);
    let variant = |image: &Location, copy, digest| Variant { image: image.clone(), copy, digest };
    let variants = [
        ("plain", variant(&file, None, None)),
        ("memfd", variant(&file, Some(MemoryKind::Memfd), None)),
        (MEMFD_DIGEST, variant(&file, Some(MemoryKind::Memfd), digest)),
        ("ramfs", variant(&file, Some(MemoryKind::Ramfs), None)),
        ("ramfs, digest", variant(&file, Some(MemoryKind::Ramfs), digest)),
        (SEALED_DIGEST, variant(&memfd, Some(MemoryKind::Memfd), digest)),
    ];
    let mut samples = [(); 6].map(|()| PARTS.map(|part| Samples::new(part, Vec::new())));
    let mut grown = Samples::new(SEALED_DIGEST, Vec::new());
    bench.effort.rounds(|counts| {
        for ((name, variant), samples) in variants.iter().zip(&mut samples) {
            let memory = match (*name, variant.copy) {
                (SEALED_DIGEST, _) | (_, None) => None,
                (_, Some(MemoryKind::Ramfs)) => Some(Taken::Ramfs(image.size)),
                (_, Some(_)) => Some(Taken::PageCache(image.size)),
            };
            let times = bench.with_memory(memory.as_slice(), || {
                let before = MemInfo::read_all().get("Shmem");
                let times = mount(variant, &bench.mnt);
                if *name == SEALED_DIGEST && counts {
                    let now = MemInfo::read_all().get("Shmem");
                    grown.values.push((now as f64 - before as f64) / MIB as f64);
                }
                bench.unmount();
                times
            });
            if counts {
                samples.iter_mut().zip(times).for_each(|(all, time)| all.values.push(time));
            }
        }
    });

    let header = variants.iter().map(|(name, _)| *name);
    let mut table = Table::new("parts", ["ms"].into_iter().chain(header).collect());
    for (number, part) in PARTS.iter().enumerate() {
        let cells = samples.iter().map(|parts| format!("{:.2}", parts[number].median()));
        table.row([part.to_string()].into_iter().chain(cells));
    }
    for ((name, _), samples) in variants.iter().zip(samples) {
        report.add(&group(name), samples.into());
    }
    report.add(MEMORY_GROUP, vec![grown]);
    report.table(table);
}

/// Mounts an image and attaches the mount. Returns the time of each part, in milliseconds. A method that
/// this kernel does not support counts for the method that is used.
fn mount(variant: &Variant, mount_point: &Path) -> [f64; PARTS.len()] {
    let mut times = [0.0; PARTS.len()];
    let start = Instant::now();
    let mut before = start;
    let mut lap = |part: usize| {
        let now = Instant::now();
        times[part] = milliseconds(now - before);
        before = now;
    };
    let image = sealmount::Image::open(&variant.image).unwrap();
    let overlay = overlay_options().open().unwrap();
    lap(0);
    let source = match (variant.copy, variant.digest) {
        (Some(memory), digest) => {
            let mut options = CopyOptions::new(memory);
            options.digest = digest;
            image.copy(&options).unwrap()
        }
        (None, Some(digest)) => image.verify(digest).unwrap(),
        (None, None) => image.trust().unwrap(),
    };
    lap(1);
    let erofs = source.mount().unwrap();
    lap(2);
    let mount = overlay.mount(&erofs).unwrap();
    lap(3);
    mount.attach(mount_point).unwrap();
    lap(4);
    times[5] = milliseconds(start.elapsed());
    times
}

/// Mounts a file without a copy, without an upper layer and without a mapping. Returns the time of all
/// parts, in milliseconds.
pub fn mount_plain(image: &Path, mount_point: &Path) -> f64 {
    let variant = Variant { image: image.into(), copy: None, digest: None };
    mount(&variant, mount_point)[PARTS.len() - 1]
}

/// Returns the options of every overlay that is measured. Objects are not verified.
pub fn overlay_options() -> OverlayOptions {
    let mut options = OverlayOptions::new(V1.objects());
    options.verity = Some(Verity::Off);
    options
}

/// Copies a file into a memfd that no process can change.
fn sealed_memfd(path: &Path) -> OwnedFd {
    let memfd = memfd_create("image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let mut writer = fs::File::from(memfd.try_clone().unwrap());
    std::io::copy(&mut fs::File::open(path).unwrap(), &mut writer).unwrap();
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    fcntl_add_seals(&memfd, seals).unwrap();
    memfd
}
