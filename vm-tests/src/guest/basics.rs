//! That the machines are what the other scenarios take them for.

use super::{Guest, fixtures, probe, read};
use crate::Error;
use crate::host::Lab;
use crate::scenario::{Disk, Format, Machine, Scenario};
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

static BARE: Machine = Machine::BARE;

static TAKES_OVER: Machine = Machine {
    name: "takes-over",
    files: |lab, root| lab.install_binary("vm-tests", "vm-init", &root.join("sbin/init")),
    command_line: |_| Ok("vm-tests.word=given".into()),
    takes_over: Some("/sbin/init"),
    ..Machine::BARE
};

const CONTENT: &str = "what the host put here\n";

fn fill_initramfs(lab: &Lab, root: &Path) -> Result<(), Error> {
    fixtures::fill(lab, root)?;
    lab.install_binary("sealmount", "mount-composefs", &root.join(&fixtures::HELPER[1..]))
}

fn fill_disk(lab: &Lab, dir: &Path) -> Result<(), Error> {
    fixtures::fill(lab, dir)?;
    fs::create_dir(dir.join("directory"))?;
    fs::write(dir.join("directory/file"), CONTENT)?;
    fs::write(dir.join("empty"), "")?;
    Ok(())
}

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
