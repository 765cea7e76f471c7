//! A scenario, and its view of the machine.

use crate::files::read;
use crate::machine::{Format, Machine};
use crate::{Context, Error};
use rustix::mount::{MountFlags, mount};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A test that runs inside a virtual machine.
///
/// A scenario runs as root in its own process and mount namespace, so its mounts, open files, working
/// directory and panics end with it. Changes to disks and to the kernel stay until the machine is off.
/// A scenario that would disturb other scenarios needs its own machine.
#[derive(Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub machine: &'static Machine,
    /// The limit of the run time. The default is generous, because emulation is slow, above all beside
    /// compilers.
    pub time_limit: Duration,
    pub run: fn(&mut Guest) -> Result<(), Error>,
}

impl Scenario {
    pub const TIME_LIMIT: Duration = Duration::from_secs(60);
}

/// The view that a scenario has of its machine.
#[derive(Debug)]
pub struct Guest {
    _private: (),
}

impl Guest {
    /// Returns the machine of this process.
    pub(crate) fn here() -> Guest {
        Guest { _private: () }
    }

    /// Returns the release of the running kernel, as `uname -r` prints it.
    pub fn kernel_release(&self) -> String {
        rustix::system::uname().release().to_string_lossy().into_owned()
    }

    /// Returns whether the running kernel has this version or a later one. A scenario may derive its
    /// expectations from the version, but must not act on it.
    pub fn kernel_at_least(&self, major: u32, minor: u32) -> Result<bool, Error> {
        let release = self.kernel_release();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(found_major)), Some(Ok(found_minor))) => {
                Ok((found_major, found_minor) >= (major, minor))
            }
            _ => {
                Err(format!("the kernel release does not start with two numbers: {release:?}")
                    .into())
            }
        }
    }

    /// Returns the value of `KEY=VALUE` on the kernel command line.
    pub fn command_line(&self, key: &str) -> Option<String> {
        command_line(key).ok().flatten()
    }

    /// Returns whether the kernel supports a file system type, built in or from a loaded module.
    pub fn has_file_system(&self, name: &str) -> Result<bool, Error> {
        let list = read("/proc/filesystems")?;
        Ok(list.lines().any(|line| line.split_whitespace().next_back() == Some(name)))
    }

    /// Returns the block device of the disk with this name.
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
        Err(format!("no disk {name:?}; the machine has the disks {found:?}").into())
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

/// Returns the value of `KEY=VALUE` on the kernel command line.
pub(crate) fn command_line(key: &str) -> Result<Option<String>, Error> {
    let words = read("/proc/cmdline")?;
    Ok(words.split_whitespace().find_map(|word| {
        let (name, value) = word.split_once('=')?;
        (name == key).then(|| value.to_owned())
    }))
}
