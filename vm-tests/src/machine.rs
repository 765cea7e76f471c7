//! The kinds of virtual machines: plain data that host and guest share.

use crate::Error;
use crate::binaries::Binaries;
use std::path::Path;
use std::time::Duration;

/// Fills a directory of the host that becomes the content of an initramfs or a disk.
pub type Fill = fn(&Binaries, &Path) -> Result<(), Error>;

/// A kind of virtual machine. All scenarios with the same machine share one boot of it.
#[derive(Debug)]
pub struct Machine {
    /// Machines are told apart by it.
    pub name: &'static str,
    pub memory_mib: u32,
    /// Loaded before the first scenario, with what they need. One that the kernel lacks is left out.
    pub modules: &'static [&'static str],
    /// What the initramfs has besides `/init` and the modules.
    pub files: Fill,
    pub disks: &'static [Disk],
    /// Words to add to the kernel's command line.
    pub command_line: fn(&Binaries) -> Result<String, Error>,
    /// A program in the initramfs that takes over as process 1 once the modules are loaded. It must
    /// end up executing `vm-init`, which then runs the scenarios wherever it finds itself.
    pub takes_over: Option<&'static str>,
    /// From starting QEMU to the first word of vm-init. Emulated on an idle machine: a few seconds.
    pub boot_limit: Duration,
    /// From the last result to the end of QEMU. Usually a moment.
    pub off_limit: Duration,
    /// A scenario that takes long needs a machine of [`Tier::Ci`].
    pub tier: Tier,
}

/// The commands that boot a machine. SEALMOUNT_TESTS selects scenarios by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// `tests/run` boots the machine on the oldest and the newest kernel, `tests/run ci` on every
    /// kernel.
    Quick,
    /// Only `tests/run ci` boots the machine: it has a scenario that takes more than half a minute
    /// under emulation.
    Ci,
}

impl Machine {
    /// No modules, no disks. To be varied: `Machine { name: "…", ..Machine::BARE }`.
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
    };
}

/// A virtual disk. Every boot gets it as it was built; what the guest writes is thrown away.
#[derive(Debug)]
pub struct Disk {
    /// How the guest finds it, with `Guest::disk`. At most 20 bytes: it is the disk's serial number.
    pub name: &'static str,
    pub format: Format,
    pub size_mib: u64,
    pub fill: Fill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Ext4,
    /// With the feature that fs-verity needs. Enabling it on files is left to the guest.
    Ext4Verity,
    Btrfs,
    Fat,
    /// Zeros; `fill` is not called.
    Blank,
}
