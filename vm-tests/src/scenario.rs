//! A scenario, and the machine as the scenario sees it.

use crate::files::read;
use crate::machine::{Format, Machine};
use crate::{Context, Error};
use rustix::mount::{MountFlags, mount};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A test that runs inside a virtual machine.
///
/// It runs as root in a process and a mount namespace of its own, so its mounts, open files, working
/// directory and panics end with it. What it does to disks and to the kernel stays until the machine
/// is switched off: a scenario that would disturb others belongs in a machine of its own.
#[derive(Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub machine: &'static Machine,
    /// Generous: emulation is slow, and slower where others compile.
    pub time_limit: Duration,
    pub run: fn(&mut Guest) -> Result<(), Error>,
}

impl Scenario {
    pub const TIME_LIMIT: Duration = Duration::from_secs(60);
}

/// What a scenario knows of the machine it runs in.
#[derive(Debug)]
pub struct Guest {
    _private: (),
}

impl Guest {
    /// Describes the machine that this process runs in.
    pub(crate) fn here() -> Guest {
        Guest { _private: () }
    }

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

/// Returns the value of `KEY=VALUE` on the kernel's command line.
pub(crate) fn command_line(key: &str) -> Result<Option<String>, Error> {
    let words = read("/proc/cmdline")?;
    Ok(words.split_whitespace().find_map(|word| {
        let (name, value) = word.split_once('=')?;
        (name == key).then(|| value.to_owned())
    }))
}
