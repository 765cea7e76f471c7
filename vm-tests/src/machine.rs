//! Describes the kinds of virtual machines, as plain data that host and guest share.

use crate::Error;
use crate::binaries::Binaries;
use std::path::Path;
use std::time::Duration;

/// Fills a directory on the host, which becomes the content of an initramfs or a disk.
pub type Fill = fn(&Binaries, &Path) -> Result<(), Error>;

/// A kind of virtual machine. All scenarios of one machine share one boot.
#[derive(Debug)]
pub struct Machine {
    /// Identifies the machine.
    pub name: &'static str,
    pub memory_mib: u32,
    /// The modules that vm-init loads before the first scenario. The host adds their dependencies, and
    /// leaves out modules that the kernel lacks.
    pub modules: &'static [&'static str],
    /// Adds files to the initramfs, besides `/init` and the modules.
    pub files: Fill,
    pub disks: &'static [Disk],
    /// Returns words to add to the kernel command line.
    pub command_line: fn(&Binaries) -> Result<String, Error>,
    /// A program in the initramfs that replaces vm-init as process 1 after the modules are loaded. The
    /// program must finally execute `vm-init`, which then runs the scenarios in the current root.
    pub takes_over: Option<&'static str>,
    /// The time from the start of QEMU to the first frame of vm-init. An idle host needs a few seconds
    /// under emulation.
    pub boot_limit: Duration,
    /// The time from the last result to the end of QEMU. QEMU usually ends at once.
    pub off_limit: Duration,
    /// The commands that boot this machine. A long scenario needs a machine of [`Tier::Ci`].
    pub tier: Tier,
    /// Whether the default run also boots this machine on versions with a fault. If SEALMOUNT_VM_SERIES names
    /// such a version, the run boots every machine.
    pub on_faulty_kernels: bool,
    /// Whether the default run also boots this machine on the kernel with large pages. If SEALMOUNT_VM_SERIES
    /// names this kernel, the run boots every machine.
    pub on_large_pages: bool,
}

/// The commands that boot a machine. SEALMOUNT_TESTS selects scenarios by the tier of their machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// The result differs between kernels. `tests/run` boots the machine on the oldest and the newest kernel,
    /// `tests/run ci` on every kernel.
    Quick,
    /// `tests/run` and `tests/run ci` boot the machine on the oldest and the newest kernel, `tests/run ci` also on
    /// the kernel with large pages, and `tests/run release` on every kernel.
    Ends,
    /// The machine needs half a minute or more under emulation. `tests/run ci` boots the machine on the newest
    /// kernel and on the kernel with large pages, and `tests/run release` on every kernel.
    Ci,
}

impl Machine {
    /// A machine without modules and disks, as the base of other machines.
    pub const BARE: Machine = Machine {
        name: "bare",
        memory_mib: 512,
        modules: &[],
        files: |_, _| Ok(()),
        disks: &[],
        command_line: |_| Ok(String::new()),
        takes_over: None,
        boot_limit: Duration::from_secs(90),
        off_limit: Duration::from_secs(60),
        tier: Tier::Quick,
        on_faulty_kernels: false,
        on_large_pages: false,
    };
}

/// A virtual disk. Every boot starts with the content that the host built. QEMU discards the writes of
/// the guest.
#[derive(Debug)]
pub struct Disk {
    /// The name by which `Guest::disk` finds the disk: its serial number, at most 20 bytes.
    pub name: &'static str,
    pub format: Format,
    pub size_mib: u64,
    pub fill: Fill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Ext4,
    /// ext4 with the feature that fs-verity needs. The guest enables fs-verity on files.
    Ext4Verity,
    Btrfs,
    Fat,
    /// A disk of zeros. The host does not call `fill`.
    Blank,
}
