//! The guest side: the scenarios, and what they are given.
//!
//! A scenario is a function and an entry in a list of its module, which is named in [`scenarios`]:
//!
//! ```ignore
//! pub const SCENARIOS: &[Scenario] = &[Scenario {
//!     name: "digest_wrong",
//!     machine: &STANDARD, // or one of its own: Machine { name: "…", ..STANDARD }
//!     time_limit: Scenario::TIME_LIMIT,
//!     run: digest_wrong,
//! }];
//! ```
//!
//! Its standard output and standard error are the console, which is shown when it fails.

mod basics;
mod boot;
mod copies;
mod digest;
mod faults;
mod fixtures;
mod init;
mod injected;
mod missing;
mod mounted;
mod objects;
mod parallel;
mod pinned;
mod probe;
mod rungs;
mod swap;
mod system;
mod trees;
mod verity;

use crate::scenario::{Format, Scenario};
use crate::{Context, Error};
use rustix::mount::{MountFlags, mount};
use std::fs;
use std::path::{Path, PathBuf};

pub use boot::main as boot_init;
pub use faults::FAULTS;
pub use init::main;

/// Where the host puts what [`main`] needs in the initramfs. A later root does not have it.
pub mod first_stage {
    /// The modules, named so that their order is the order to load them in.
    pub const MODULES: &str = "/vm-tests/modules";
    /// A text file: the path of the program that takes over as process 1.
    pub const TAKES_OVER: &str = "/vm-tests/takes-over";
}

/// The word of the kernel command line that gives the boot's token.
pub const TOKEN: &str = "vm-tests.token";

/// Every scenario that runs on every kernel.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> + Clone {
    [
        basics::SCENARIOS,
        probe::SCENARIOS,
        trees::SCENARIOS,
        rungs::SCENARIOS,
        verity::SCENARIOS,
        injected::SCENARIOS,
        digest::SCENARIOS,
        pinned::SCENARIOS,
        copies::SCENARIOS,
        objects::SCENARIOS,
        boot::SCENARIOS,
        parallel::SCENARIOS,
        missing::SCENARIOS,
        swap::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}

/// What a scenario knows of the machine it runs in.
#[derive(Debug)]
pub struct Guest {
    _private: (),
}

impl Guest {
    /// The running kernel's, as `uname -r`.
    pub fn kernel_release(&self) -> String {
        rustix::system::uname().release().to_string_lossy().into_owned()
    }

    /// Whether the running kernel is this one or a later one: decides what is expected of it, and
    /// never what is done.
    pub fn kernel_at_least(&self, major: u32, minor: u32) -> Result<bool, Error> {
        let release = self.kernel_release();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(found_major)), Some(Ok(found_minor))) => {
                Ok((found_major, found_minor) >= (major, minor))
            }
            _ => Err(format!("a kernel release without two numbers: {release:?}").into()),
        }
    }

    /// The value of `KEY=VALUE` on the kernel's command line.
    pub fn command_line(&self, key: &str) -> Option<String> {
        command_line(key).ok().flatten()
    }

    /// Whether the kernel has a file system of this type, built in or loaded.
    pub fn has_file_system(&self, name: &str) -> Result<bool, Error> {
        let list = read("/proc/filesystems")?;
        Ok(list.lines().any(|line| line.split_whitespace().next_back() == Some(name)))
    }

    /// The block device of a disk of the machine, by its name.
    pub fn disk(&self, name: &str) -> Result<PathBuf, Error> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").context(|| "cannot list /sys/block".into())? {
            let entry = entry?;
            let Ok(serial) = fs::read_to_string(entry.path().join("serial")) else {
                continue;
            };
            if serial.trim_end() == name {
                return Ok(Path::new("/dev").join(entry.file_name()));
            }
            found.push(serial.trim_end().to_owned());
        }
        Err(format!("no disk {name:?}; there are {found:?}").into())
    }

    /// Mounts a disk of the machine on a new directory below /mnt.
    pub fn mount_disk(
        &self,
        name: &str,
        format: Format,
        flags: MountFlags,
    ) -> Result<PathBuf, Error> {
        let device = self.disk(name)?;
        let file_system = match format {
            Format::Ext4 | Format::Ext4Verity => "ext4",
            Format::Btrfs => "btrfs",
            Format::Fat => "vfat",
            Format::Blank => return Err(format!("disk {name} has no file system").into()),
        };
        let dir = Path::new("/mnt").join(name);
        fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
        mount(&device, &dir, file_system, flags, None).context(|| {
            format!("cannot mount {} on {} as {file_system}", device.display(), dir.display())
        })?;
        Ok(dir)
    }
}

fn command_line(key: &str) -> Result<Option<String>, Error> {
    let words = read("/proc/cmdline")?;
    Ok(words.split_whitespace().find_map(|word| {
        let (name, value) = word.split_once('=')?;
        (name == key).then(|| value.to_owned())
    }))
}

fn read(path: &str) -> Result<String, Error> {
    fs::read_to_string(path).context(|| format!("cannot read {path}"))
}
