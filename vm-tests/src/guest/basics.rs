//! Checks the properties of machines that the other scenarios rely on.

use super::machines::{CONTENT, STANDARD};
use super::{fixtures, probe};
use crate::Error;
use crate::files::read;
use crate::machine::{Format, Machine, Tier};
use crate::scenario::{Guest, Scenario};
use rustix::mount::MountFlags;
use sealmount::Algorithm;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "standard_machine_has_its_drivers",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: standard_machine_has_its_drivers,
    },
    Scenario {
        name: "verity_disk_alone_has_verity_feature",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: verity_disk_alone_has_verity_feature,
    },
    Scenario {
        name: "every_disk_keeps_its_files",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: every_disk_keeps_its_files,
    },
    Scenario {
        name: "bare_machine_has_no_modules_or_disks",
        machine: &BARE,
        time_limit: Scenario::TIME_LIMIT,
        run: bare_machine_has_no_modules_or_disks,
    },
    Scenario {
        name: "given_init_runs_as_process_1",
        machine: &TAKES_OVER,
        time_limit: Scenario::TIME_LIMIT,
        run: given_init_runs_as_process_1,
    },
];

static BARE: Machine = Machine::BARE;

static TAKES_OVER: Machine = Machine {
    name: "takes-over",
    tier: Tier::Ends,
    files: |binaries, root| binaries.install("vm-tests", "vm-init", &root.join("sbin/init")),
    command_line: |_| Ok("vm-tests.word=given".into()),
    takes_over: Some("/sbin/init"),
    ..Machine::BARE
};

fn standard_machine_has_its_drivers(guest: &mut Guest) -> Result<(), Error> {
    for name in ["erofs", "overlay", "ext4", "vfat"] {
        if !guest.has_file_system(name)? {
            return Err(format!("{name} is not in /proc/filesystems").into());
        }
    }
    if !Path::new("/dev/loop-control").exists() {
        return Err("/dev/loop-control is missing".into());
    }
    Ok(())
}

fn verity_disk_alone_has_verity_feature(guest: &mut Guest) -> Result<(), Error> {
    let disk = guest.mount_disk("ext4-verity", Format::Ext4Verity, MountFlags::empty())?;
    has_content(&disk)?;
    // The file exists if ext4 of this kernel supports fs-verity, whether or not a disk is mounted.
    let shown = fs::exists("/sys/fs/ext4/features/verity")?;
    assert_eq!(probe::fs_verity(&disk, Algorithm::Sha256)?, shown);
    match (has_verity_feature(guest, "ext4-verity")?, has_verity_feature(guest, "ext4")?) {
        (true, false) => Ok(()),
        found => Err(format!("verity feature on ext4-verity and ext4: {found:?}").into()),
    }
}

/// Returns whether the superblock has bit 15 of the read-only compatible features.
fn has_verity_feature(guest: &Guest, disk: &str) -> Result<bool, Error> {
    let mut features = [0; 4];
    File::open(guest.disk(disk)?)?.read_exact_at(&mut features, 1024 + 100)?;
    Ok(u32::from_le_bytes(features) & 0x8000 != 0)
}

fn every_disk_keeps_its_files(guest: &mut Guest) -> Result<(), Error> {
    let disks = fixtures::mount_each(guest, &["ext4", "btrfs", "fat"])?;
    disks.iter().try_for_each(|disk| has_content(disk))
}

fn has_content(dir: &Path) -> Result<(), Error> {
    let file = dir.join("directory/file");
    let content = fs::read_to_string(&file)?;
    if content != CONTENT || fs::metadata(dir.join("empty"))?.len() != 0 {
        return Err(format!("{} has the wrong content: {content:?}", dir.display()).into());
    }
    Ok(())
}

fn bare_machine_has_no_modules_or_disks(guest: &mut Guest) -> Result<(), Error> {
    let modules = read("/proc/modules")?;
    match (modules.is_empty(), guest.disk("ext4")) {
        (true, Err(_)) => Ok(()),
        _ => Err(format!("a bare machine has modules or disks: {modules}").into()),
    }
}

fn given_init_runs_as_process_1(guest: &mut Guest) -> Result<(), Error> {
    let init = fs::read_link("/proc/1/exe")?;
    if init != Path::new("/sbin/init") {
        return Err(format!("process 1 is {}", init.display()).into());
    }
    match guest.command_line("vm-tests.word").as_deref() {
        Some("given") => Ok(()),
        other => Err(format!("vm-tests.word on the kernel command line is {other:?}").into()),
    }
}
