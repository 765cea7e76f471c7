//! That the machines are what the other scenarios take them for.

use super::machines::{CONTENT, STANDARD};
use super::{fixtures, probe};
use crate::Error;
use crate::files::read;
use crate::machine::{Format, Machine};
use crate::scenario::{Guest, Scenario};
use rustix::mount::MountFlags;
use sealmount::Algorithm;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

pub const SCENARIOS: &[Scenario] = &[
    Scenario { name: "boots", machine: &STANDARD, time_limit: Scenario::TIME_LIMIT, run: boots },
    Scenario {
        name: "verity_disk",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: verity_disk,
    },
    Scenario {
        name: "every_disk",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: every_disk,
    },
    Scenario {
        name: "bare_boots",
        machine: &BARE,
        time_limit: Scenario::TIME_LIMIT,
        run: bare_boots,
    },
    Scenario {
        name: "takes_over",
        machine: &TAKES_OVER,
        time_limit: Scenario::TIME_LIMIT,
        run: takes_over,
    },
];

static BARE: Machine = Machine::BARE;

static TAKES_OVER: Machine = Machine {
    name: "takes-over",
    files: |binaries, root| binaries.install("vm-tests", "vm-init", &root.join("sbin/init")),
    command_line: |_| Ok("vm-tests.word=given".into()),
    takes_over: Some("/sbin/init"),
    ..Machine::BARE
};

fn boots(guest: &mut Guest) -> Result<(), Error> {
    for name in ["erofs", "overlay", "ext4", "vfat"] {
        if !guest.has_file_system(name)? {
            return Err(format!("{name} is not in /proc/filesystems").into());
        }
    }
    if !Path::new("/dev/loop-control").exists() {
        return Err("there is no /dev/loop-control".into());
    }
    Ok(())
}

fn verity_disk(guest: &mut Guest) -> Result<(), Error> {
    let disk = guest.mount_disk("ext4-verity", Format::Ext4Verity, MountFlags::empty())?;
    has_content(&disk)?;
    // Present if the kernel's ext4 can do it, whatever is mounted.
    let shown = fs::exists("/sys/fs/ext4/features/verity")?;
    assert_eq!(probe::fs_verity(&disk, Algorithm::Sha256)?, shown);
    match (has_verity_feature(guest, "ext4-verity")?, has_verity_feature(guest, "ext4")?) {
        (true, false) => Ok(()),
        found => Err(format!("fs-verity on the disks for it and not for it: {found:?}").into()),
    }
}

/// Bit 15 of the superblock's compatible-if-read-only features.
fn has_verity_feature(guest: &Guest, disk: &str) -> Result<bool, Error> {
    let mut features = [0; 4];
    File::open(guest.disk(disk)?)?.read_exact_at(&mut features, 1024 + 100)?;
    Ok(u32::from_le_bytes(features) & 0x8000 != 0)
}

fn every_disk(guest: &mut Guest) -> Result<(), Error> {
    let disks = fixtures::mount_each(guest, &["ext4", "btrfs", "fat"])?;
    disks.iter().try_for_each(|disk| has_content(disk))
}

fn has_content(dir: &Path) -> Result<(), Error> {
    let file = dir.join("directory/file");
    let content = fs::read_to_string(&file)?;
    if content != CONTENT || fs::metadata(dir.join("empty"))?.len() != 0 {
        return Err(
            format!("{} has not the content it was given: {content:?}", dir.display()).into()
        );
    }
    Ok(())
}

fn bare_boots(guest: &mut Guest) -> Result<(), Error> {
    let modules = read("/proc/modules")?;
    match (modules.is_empty(), guest.disk("ext4")) {
        (true, Err(_)) => Ok(()),
        _ => Err(format!("a bare machine has modules or disks: {modules}").into()),
    }
}

fn takes_over(guest: &mut Guest) -> Result<(), Error> {
    let init = fs::read_link("/proc/1/exe")?;
    if init != Path::new("/sbin/init") {
        return Err(format!("process 1 is {}", init.display()).into());
    }
    match guest.command_line("vm-tests.word").as_deref() {
        Some("given") => Ok(()),
        other => Err(format!("the machine's word on the kernel command line is {other:?}").into()),
    }
}
