//! A deployment of composefs-rs, with each value of its configuration.

use crate::Error;
use crate::boots::disk;
use crate::boots::initramfs::{CONFIGURATION, with_file};
use crate::boots::machine::{Boot, Disk, Outcome, Start};
use crate::boots::state::{MEMORY_MIB, State};
use crate::boots::system::COMPOSEFS_RS;

/// A configuration, and the system that it makes.
pub struct Case {
    /// The name of the consoles.
    pub name: &'static str,
    pub configuration: &'static str,
    /// A part of the line about each mount. Empty text means that the directory is not a mount.
    pub mounts: [(&'static str, &'static str); 3],
    /// The files of the deployment on the disk that the report changed.
    pub changed: &'static [&'static str],
    /// The unit that fails. systemd-logind of Debian needs a writable /var.
    pub failed_unit: &'static str,
}

const ROOT: &str = " overlay ro,";
const ROOT_TRANSIENT: &str = " overlay rw,";
const OVERLAY_ETC: &str = "composefs-etc overlay rw,";
const OVERLAY_VAR: &str = "composefs-var overlay rw,";
const ON_DISK: &str = " ext4 rw,";

/// The defaults.
pub const DEFAULT: Case = Case {
    name: "composefs-rs-default",
    configuration: "",
    mounts: [("mount /", ROOT), ("mount /etc", OVERLAY_ETC), ("mount /var", ON_DISK)],
    changed: &["etc/upper/boots", "var/lib/boots"],
    failed_unit: "",
};

pub const BIND: Case = Case {
    name: "composefs-rs-bind",
    configuration: "etc.mount = 'bind'\nvar.mount = 'overlay'\n",
    mounts: [("mount /", ROOT), ("mount /etc", ON_DISK), ("mount /var", OVERLAY_VAR)],
    changed: &["etc/boots", "var/upper/lib/boots"],
    failed_unit: "",
};

pub const NONE: Case = Case {
    name: "composefs-rs-none",
    configuration: "etc.mount = 'none'\nvar.mount = 'none'\n",
    mounts: [("mount /", ROOT), ("mount /etc", ""), ("mount /var", "")],
    changed: &[],
    failed_unit: "systemd-logind.service",
};

pub const TRANSIENT: Case = Case {
    name: "composefs-rs-transient",
    configuration: "etc.mount = 'transient'\nvar.transient = true\n",
    mounts: [("mount /", ROOT), ("mount /etc", OVERLAY_ETC), ("mount /var", OVERLAY_VAR)],
    changed: &[],
    failed_unit: "",
};

pub const TRANSIENT_ROOT: Case = Case {
    name: "composefs-rs-transient-root",
    configuration: "[root]\ntransient = true\n[etc]\nmount = 'none'\n",
    mounts: [("mount /", ROOT_TRANSIENT), ("mount /etc", ""), ("mount /var", ON_DISK)],
    changed: &["var/lib/boots"],
    failed_unit: "",
};

/// All files that a report can change.
const CHANGEABLE: [&str; 4] =
    ["etc/upper/boots", "etc/boots", "var/lib/boots", "var/upper/lib/boots"];

/// Boots the system with a configuration, and checks its mounts and the place of its changes.
pub fn boot(state: &State, case: &Case) -> Result<(), Error> {
    let (system, lab) = (state.systems.get(&COMPOSEFS_RS)?, &state.systems.lab);
    let name = case.name;
    let initramfs = lab.temporary(&format!("{name}.initramfs"));
    with_file(&system.file("initramfs"), &initramfs, CONFIGURATION, case.configuration)?;
    let disk = disk::copy(&system.file("disk.ext4"), &lab.temporary(&format!("{name}.disk")))?;
    let words = format!("composefs.digest=v1-sha512-12:{}", system.digest);
    let start = Start::Kernel { initramfs: &initramfs, words: &words };
    let boot = Boot { name, system, disk: Disk::Kept(&disk), start, memory_mib: MEMORY_MIB };
    let outcome = boot.run(lab)?;
    expect_report(&outcome, case).map_err(|error| outcome.failure(&error.to_string()))?;
    disk::expect_clean(&disk)?;
    for file in CHANGEABLE {
        let path = format!("/state/deploy/{}/{file}", system.digest);
        if disk::exists(&disk, &path)? != case.changed.contains(&file) {
            return Err(format!("{file}: expected changes only of {:?}", case.changed).into());
        }
    }
    Ok(())
}

fn expect_report(outcome: &Outcome, case: &Case) -> Result<(), Error> {
    let report = outcome.report()?;
    report.expect("deployment", "first")?;
    report.expect_parts("mount /", &["verity=require"])?;
    report.expect_parts("mount /sysroot", &[" ext4 ro,"])?;
    for (name, part) in case.mounts {
        match part {
            "" => report.expect(name, "")?,
            part => report.expect_parts(name, &[part])?,
        }
    }
    report.expect("failed units", case.failed_unit)?;
    report.expect("state", if case.failed_unit.is_empty() { "running" } else { "degraded" })
}
