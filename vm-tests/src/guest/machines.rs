//! The machines that several modules' scenarios run in.

use super::fixtures::{self, HELPER};
use crate::Error;
use crate::binaries::Binaries;
use crate::machine::{Disk, Format, Machine};
use std::fs;
use std::path::Path;

/// What most scenarios run in.
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
        // vfat asks for its tables with request_module, which has no modprobe to call here.
        "nls_cp437",
        "nls_ascii",
        "nls_iso8859-1",
        "nls_utf8",
        "zram",
        // fs-verity asks for its hash with request_module too.
        "sha512_generic",
    ],
    files: fill_initramfs,
    disks: &[
        Disk { name: "ext4-verity", format: Format::Ext4Verity, size_mib: 64, fill: fill_disk },
        Disk { name: "ext4", format: Format::Ext4, size_mib: 64, fill: fill_disk },
        Disk { name: "btrfs", format: Format::Btrfs, size_mib: 128, fill: fill_disk },
        Disk { name: "fat", format: Format::Fat, size_mib: 64, fill: fill_disk },
    ],
    ..Machine::BARE
};

/// For scenarios that write over its disks.
pub static ERASED: Machine = Machine { name: "erased", ..STANDARD };

/// For scenarios that take away, or use up, what others count on, and put it back: they have their
/// own boot, and bring all they need.
pub static SOLITARY: Machine = Machine {
    name: "solitary",
    // The less there is, the sooner it is used up.
    memory_mib: 320,
    modules: &["virtio_pci", "virtio_blk", "loop", "erofs", "overlay", "ext4"],
    files: fill_initramfs,
    disks: &[
        Disk { name: "images", format: Format::Ext4, size_mib: 64, fill: fixtures::fill },
        Disk { name: "swap", format: Format::Blank, size_mib: 128, fill: |_, _| Ok(()) },
    ],
    ..Machine::BARE
};

/// The content of a file on each disk of [`STANDARD`].
pub const CONTENT: &str = "what the host put here\n";

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
