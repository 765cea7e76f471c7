//! Systems that start: the first boot, the second boot, an upgrade, a UKI.

use crate::Error;
use crate::boots::checks::{
    Expected, IN_INITRAMFS, ON_DISK, expect_clean_end, expect_nothing_left, expect_running,
};
use crate::boots::disk;
use crate::boots::machine::{Boot, Disk, Outcome, Start};
use crate::boots::report::Report;
use crate::boots::state::{MEMORY_MIB, Reboots, State, boot};
use crate::boots::system::{DRACUT, System};
use crate::host::Lab;

/// Returns the expectation for the first deployment of a system.
fn first_deployment<'a>(system: &'a System, boots: &'a str) -> Expected<'a> {
    let System { kernel, digest, .. } = system;
    let image = if system.has_journal { IN_INITRAMFS } else { "" };
    Expected { kernel, digest, deployment: "first", boots, image }
}

/// Returns the expectation for the second deployment, whose image is on the disk.
fn second_deployment<'a>(system: &'a System, boots: &'a str) -> Expected<'a> {
    let System { kernel, second, .. } = system;
    Expected { kernel, digest: second, deployment: "second", boots, image: ON_DISK }
}

/// Checks a report, and the end of the boot.
fn expect(outcome: &Outcome, report: &Report, expected: &Expected<'_>) -> Result<(), Error> {
    expect_running(report, expected)
        .and_then(|()| expect_nothing_left(report))
        .map_err(|error| outcome.failure(&error.to_string()))?;
    expect_clean_end(outcome)
}

pub fn first_boot(state: &State, reboots: &Reboots) -> Result<(), Error> {
    let outcome = reboots.first(&state.systems)?;
    let system = state.systems.get(reboots.description)?;
    expect(outcome, outcome.report()?, &first_deployment(system, "1"))
}

pub fn second_boot(state: &State, reboots: &Reboots) -> Result<(), Error> {
    let (first, second) = (reboots.first(&state.systems)?, reboots.second(&state.systems)?);
    let (system, report) = (state.systems.get(reboots.description)?, second.report()?);
    expect(second, report, &first_deployment(system, "2"))?;
    report.expect("files", "readable")?;
    report.expect("machine id", first.report()?.get("machine id")?)
}

pub fn soft_reboot(state: &State) -> Result<(), Error> {
    let (outcome, _) = state.upgrade.soft_reboot(&state.systems)?;
    let system = state.systems.get(&DRACUT)?;
    let [first, second] = outcome.reports.as_slice() else {
        return Err(outcome.failure("expected the reports of two deployments"));
    };
    expect_running(first, &first_deployment(system, "1"))?;
    let next = second_deployment(system, "1");
    if !first.all("next").iter().any(|line| line.ends_with("root attached to /run/nextroot")) {
        return Err(outcome.failure("sealmount-setup-root did not attach the next root"));
    }
    // The journal of the second deployment has no run of sealmount-setup-root.
    expect(outcome, second, &Expected { image: "", ..next })
}

pub fn reboot(state: &State) -> Result<(), Error> {
    let (outcome, _) = state.upgrade.reboot(&state.systems)?;
    let system = state.systems.get(&DRACUT)?;
    expect(outcome, outcome.report()?, &second_deployment(system, "2"))
}

pub fn rollback(state: &State) -> Result<(), Error> {
    let (before, tree_before) = state.upgrade.soft_reboot(&state.systems)?;
    let (_, tree_after) = state.upgrade.reboot(&state.systems)?;
    let changed = tree_before.keys().chain(tree_after.keys());
    let mut changed = changed.filter(|path| tree_before.get(*path) != tree_after.get(*path));
    if let Some(path) = changed.next() {
        return Err(format!("the second deployment changed {} of the first", path.display()).into());
    }
    let (outcome, _) = state.upgrade.rollback(&state.systems)?;
    let (system, report) = (state.systems.get(&DRACUT)?, outcome.report()?);
    expect(outcome, report, &first_deployment(system, "2"))?;
    report.expect("machine id", before.reports[0].get("machine id")?)
}

pub fn uki(state: &State) -> Result<(), Error> {
    let system = state.systems.get(&DRACUT)?;
    let lab: &Lab = &state.systems.lab;
    let disk = disk::copy(&system.file("disk.ext4"), &lab.temporary("uki.disk"))?;
    let (start, memory_mib) = (Start::Firmware, MEMORY_MIB);
    let boot = Boot { name: "uki", system, disk: Disk::Kept(&disk), start, memory_mib };
    let outcome = boot.run(lab)?;
    expect(&outcome, outcome.report()?, &first_deployment(system, "1"))?;
    disk::expect_clean(&disk)
}

/// The most time of a set-up of a root, in percent of the time of the mount alone with the same copy. The ratio is
/// the median of the ratios of all rounds.
const RATIO_MAX_PERCENT: u64 = 150;

pub fn set_up_time(state: &State) -> Result<(), Error> {
    let system = state.systems.get(&DRACUT)?;
    let disk = system.file("disk.ext4");
    let words = format!("composefs={} boot_report.measure=15", system.digest);
    let outcome = boot(&state.systems, system, "time", Disk::Unchanged(&disk), &words)?;
    let report = outcome.report()?;
    let (set_up, alone) = (report.numbers("set-up")?, report.numbers("mount alone")?);
    let (rounds, others) = (set_up.len(), alone.len());
    if rounds < 9 || rounds != others {
        return Err(format!("{rounds} set-ups and {others} mounts were measured").into());
    }
    // A disturbance of the machine slows both sides of a round.
    let ratios = set_up.iter().zip(&alone).map(|(set_up, alone)| set_up * 100 / alone);
    let percent = median(ratios.collect());
    let (set_up, alone) = (median(set_up), median(alone));
    eprintln!("boots: set-up {set_up} us, mount alone {alone} us: {percent} %, {rounds} rounds");
    match percent > RATIO_MAX_PERCENT {
        true => Err(format!("the set-up needs {percent} % of the time of the mount alone").into()),
        false => Ok(()),
    }
}

fn median(mut numbers: Vec<u64>) -> u64 {
    numbers.sort_unstable();
    numbers[numbers.len() / 2]
}
