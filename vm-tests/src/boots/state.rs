//! The boots that several tests share: the first boot of a system, and the boots after it on the same disk.

use crate::Error;
use crate::boots::disk::{self, Tree};
use crate::boots::machine::{Boot, Disk, Outcome, Start};
use crate::boots::once::Once;
use crate::boots::system::{DRACUT, Description, INITRAMFS_TOOLS, LONG_TERM, System, Systems};
use std::path::PathBuf;

/// The memory of a machine.
pub const MEMORY_MIB: u32 = 1024;

/// The state of a run.
pub struct State {
    pub systems: Systems,
    pub dracut: Reboots,
    pub initramfs_tools: Reboots,
    pub long_term: Reboots,
    pub upgrade: Upgrade,
}

impl State {
    pub fn new(systems: Systems) -> State {
        State {
            systems,
            dracut: Reboots::new(&DRACUT),
            initramfs_tools: Reboots::new(&INITRAMFS_TOOLS),
            long_term: Reboots::new(&LONG_TERM),
            upgrade: Upgrade::default(),
        }
    }
}

/// Boots a system with a digest and more words.
pub fn boot(
    systems: &Systems,
    system: &System,
    name: &str,
    disk: Disk<'_>,
    words: &str,
) -> Result<Outcome, Error> {
    let initramfs = system.file("initramfs");
    let start = Start::Kernel { initramfs: &initramfs, words };
    Boot { name, system, disk, start, memory_mib: MEMORY_MIB }.run(&systems.lab)
}

/// Two boots of a system with the same disk.
pub struct Reboots {
    pub description: &'static Description,
    disk: Once<PathBuf>,
    first: Once<Outcome>,
    second: Once<Outcome>,
}

impl Reboots {
    fn new(description: &'static Description) -> Reboots {
        let (disk, first, second) = Default::default();
        Reboots { description, disk, first, second }
    }

    fn disk(&self, systems: &Systems) -> Result<&PathBuf, Error> {
        self.disk.get(|| {
            let system = systems.get(self.description)?;
            let to = systems.lab.temporary(&format!("{}.disk", self.description.name));
            disk::copy(&system.file("disk.ext4"), &to)
        })
    }

    /// Boots the system from a disk that no system has used.
    pub fn first(&self, systems: &Systems) -> Result<&Outcome, Error> {
        self.first.get(|| self.boot(systems, "first"))
    }

    /// Boots the system again.
    pub fn second(&self, systems: &Systems) -> Result<&Outcome, Error> {
        self.second.get(|| {
            self.first(systems)?;
            self.boot(systems, "second")
        })
    }

    /// Boots the system, and checks that the disk is clean after that.
    fn boot(&self, systems: &Systems, step: &str) -> Result<Outcome, Error> {
        let (system, disk) = (systems.get(self.description)?, self.disk(systems)?);
        let name = format!("{}-{step}", self.description.name);
        let words = format!("composefs={}", system.digest);
        let outcome = boot(systems, system, &name, Disk::Kept(disk), &words)?;
        disk::expect_clean(disk).map_err(|error| outcome.failure(&error.to_string()))?;
        Ok(outcome)
    }
}

/// The boots of an upgrade. All boots have the same disk.
#[derive(Default)]
pub struct Upgrade {
    disk: Once<PathBuf>,
    soft_reboot: Once<(Outcome, Tree)>,
    reboot: Once<(Outcome, Tree)>,
    rollback: Once<(Outcome, Tree)>,
}

impl Upgrade {
    /// Boots the first deployment, which restarts only the programs, in the second deployment.
    pub fn soft_reboot(&self, systems: &Systems) -> Result<&(Outcome, Tree), Error> {
        self.soft_reboot.get(|| {
            let system = systems.get(&DRACUT)?;
            let words = format!("composefs={} boot_report.next={}", system.digest, system.second);
            self.boot(systems, "soft-reboot", &words)
        })
    }

    /// Boots the second deployment.
    pub fn reboot(&self, systems: &Systems) -> Result<&(Outcome, Tree), Error> {
        self.reboot.get(|| {
            self.soft_reboot(systems)?;
            let words = format!("composefs={}", systems.get(&DRACUT)?.second);
            self.boot(systems, "reboot", &words)
        })
    }

    /// Boots the first deployment again.
    pub fn rollback(&self, systems: &Systems) -> Result<&(Outcome, Tree), Error> {
        self.rollback.get(|| {
            self.reboot(systems)?;
            let words = format!("composefs={}", systems.get(&DRACUT)?.digest);
            self.boot(systems, "rollback", &words)
        })
    }

    /// Boots the system. Returns also the state of the first deployment after that.
    fn boot(&self, systems: &Systems, step: &str, words: &str) -> Result<(Outcome, Tree), Error> {
        let system = systems.get(&DRACUT)?;
        let disk = self.disk.get(|| {
            disk::copy(&system.file("disk.ext4"), &systems.lab.temporary("upgrade.disk"))
        })?;
        let outcome = boot(systems, system, &format!("upgrade-{step}"), Disk::Kept(disk), words)?;
        disk::expect_clean(disk).map_err(|error| outcome.failure(&error.to_string()))?;
        let scratch = systems.lab.temporary(&format!("upgrade-{step}.tree"));
        let tree = disk::tree(disk, &format!("/state/deploy/{}", system.digest), &scratch)?;
        Ok((outcome, tree))
    }
}
