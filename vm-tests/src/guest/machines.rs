//! Defines the machines that scenarios of several modules use.

use super::fixtures::{self, HELPER};
use crate::Error;
use crate::binaries::Binaries;
use crate::machine::{Disk, Format, Machine, Tier};
use std::fs;
use std::path::Path;

/// The machine of most scenarios.
pub static STANDARD: Machine = Machine {
    name: "standard",
    modules: &[
        "virtio_pci",
        "virtio_blk",
        "loop",
        "erofs",
        "overlay",
        "ext4",
        "btrfs",
        "vfat",
        // vfat requests its tables with request_module, but the machine has no modprobe.
        "nls_cp437",
        "nls_ascii",
        "nls_iso8859-1",
        "nls_utf8",
        "zram",
        // fs-verity requests its hash with request_module too.
        "sha512_generic",
    ],
    files: fill_initramfs,
    disks: &[
        Disk { name: "ext4-verity", format: Format::Ext4Verity, size_mib: 64, fill: fill_disk },
        Disk { name: "ext4", format: Format::Ext4, size_mib: 64, fill: fill_disk },
        Disk { name: "btrfs", format: Format::Btrfs, size_mib: 128, fill: fill_disk },
        Disk { name: "fat", format: Format::Fat, size_mib: 64, fill: fill_disk },
    ],
    on_faulty_kernels: true,
    on_large_pages: true,
    ..Machine::BARE
};

/// The machine of long scenarios about the image and the objects. Middle kernels do not change their result.
pub static CONTENTS: Machine =
    Machine { name: "contents", tier: Tier::Ends, on_faulty_kernels: false, ..STANDARD };

/// The machine of scenarios that overwrite its disks.
pub static ERASED: Machine =
    Machine { name: "erased", tier: Tier::Ends, on_faulty_kernels: false, ..STANDARD };

/// The machine of scenarios that remove or exhaust a resource that other scenarios need, and restore
/// it.
pub static SOLITARY: Machine = Machine {
    name: "solitary",
    // A small memory is exhausted sooner.
    memory_mib: 320,
    modules: &["virtio_pci", "virtio_blk", "loop", "erofs", "overlay", "ext4"],
    files: fill_initramfs,
    disks: &[
        Disk { name: "images", format: Format::Ext4, size_mib: 64, fill: fixtures::fill },
        Disk { name: "swap", format: Format::Blank, size_mib: 128, fill: |_, _| Ok(()) },
    ],
    tier: Tier::Ends,
    on_large_pages: true,
    ..Machine::BARE
};

/// The content of a file on each disk of [`STANDARD`].
pub const CONTENT: &str = "content from the host\n";

fn fill_initramfs(binaries: &Binaries, root: &Path) -> Result<(), Error> {
    fixtures::fill(binaries, root)?;
    binaries.install("sealmount", "mount-composefs", &root.join(&HELPER[1..]))
}

fn fill_disk(binaries: &Binaries, dir: &Path) -> Result<(), Error> {
    fixtures::fill(binaries, dir)?;
    fs::create_dir(dir.join("directory"))?;
    fs::write(dir.join("directory/file"), CONTENT)?;
    fs::write(dir.join("empty"), "")?;
    Ok(())
}
