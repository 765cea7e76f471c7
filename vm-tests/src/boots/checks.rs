//! The checks of a system that runs.

use crate::Error;
use crate::boots::machine::Outcome;
use crate::boots::report::Report;

/// The deployment that must run.
pub struct Expected<'a> {
    pub kernel: &'a str,
    pub digest: &'a str,
    /// The value of /usr/lib/deployment.
    pub deployment: &'a str,
    /// The number of boots of the deployment on this disk.
    pub boots: &'a str,
    /// A text of the journal that names the place of the image. Empty text means any place.
    pub image: &'a str,
}

/// The text that sealmount-setup-root reports about an image in the initramfs.
pub const IN_INITRAMFS: &str = "image copied into a read-only ramfs: ";
/// The text that sealmount-setup-root reports about an image on the disk.
pub const ON_DISK: &str = ", measured by the kernel";

/// The most memory of files that only memory holds, in KiB. An initramfs has more than 50,000 KiB, and the journal
/// of a boot less than 10,000 KiB.
const MEMORY_MAX_KIB: u64 = 20_000;

/// Texts of a console that show that a unit failed or that the disk has an error.
const FAILURES: [&str; 3] = ["[FAILED]", "Dependency failed", "EXT4-fs error"];
/// The start of the messages of systemd-shutdown, and texts that show a complaint behind it.
const SHUTDOWN: &str = "systemd-shutdown[1]: ";
const COMPLAINTS: [&str; 2] = ["Could not ", "Failed "];

/// Checks the report of a system that runs from a verified image.
pub fn expect_running(report: &Report, expected: &Expected<'_>) -> Result<(), Error> {
    let source = format!("composefs:{} overlay ro,", expected.digest);
    report.expect("state", "running")?;
    report.expect("failed units", "")?;
    report.expect("kernel", expected.kernel)?;
    report.expect("deployment", expected.deployment)?;
    report.expect_parts("mount /", &[&source, "verity=require"])?;
    report.expect_parts("mount /etc", &["composefs-etc overlay rw,"])?;
    report.expect_parts("mount /var", &[" ext4 rw,"])?;
    report.expect_parts("mount /sysroot", &[" ext4 ro,"])?;
    report.expect("usr", "read-only")?;
    report.expect("boots in /etc", expected.boots)?;
    report.expect("boots in /var/lib", expected.boots)?;
    if !expected.image.is_empty()
        && !report.all("journal").iter().any(|line| line.contains(expected.image))
    {
        let journal = report.all("journal").join("\n");
        return Err(format!("the journal lacks {:?}:\n{journal}", expected.image).into());
    }
    match report.get("machine id")?.len() {
        32 => Ok(()),
        _ => Err(format!("machine id: {:?}", report.get("machine id")?).into()),
    }
}

/// Checks that the memory of the initramfs is free, and that no loop device is left.
pub fn expect_nothing_left(report: &Report) -> Result<(), Error> {
    report.expect("loop devices", "")?;
    let memory = report.number("memory Shmem")? + report.number("memory Unevictable")?;
    match memory > MEMORY_MAX_KIB {
        true => Err(format!("files in memory have {memory} KiB, expected {MEMORY_MAX_KIB}").into()),
        false => Ok(()),
    }
}

/// Checks that systemd-shutdown unmounted and detached everything, without a complaint.
pub fn expect_clean_end(outcome: &Outcome) -> Result<(), Error> {
    outcome.expect_absent_after("", &FAILURES)?;
    outcome.expect_absent_after(SHUTDOWN, &COMPLAINTS)?;
    let words = "All filesystems, swaps, loop devices, MD devices and DM devices detached.";
    outcome.expect_console(&[words])
}
