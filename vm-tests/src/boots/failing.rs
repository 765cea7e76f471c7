//! Systems that do not start, and the words on their console.

use crate::Error;
use crate::boots::disk;
use crate::boots::initramfs::{CONFIGURATION, with_file};
use crate::boots::machine::{Boot, Disk, Outcome, Start};
use crate::boots::state::{MEMORY_MIB, State, boot};
use crate::boots::system::{DRACUT, INITRAMFS_TOOLS, System, WITHOUT_VERITY};
use std::path::Path;

/// With these words, dracut switches the system off instead of starting a shell. With initramfs-tools, the kernel
/// panics then, and QEMU ends.
const NO_SHELL: &str = "rd.shell=0 rd.emergency=poweroff";

/// Returns the digest of an image that does not exist.
fn other(digest: &str) -> String {
    let first = if digest.starts_with('0') { '1' } else { '0' };
    format!("{first}{}", &digest[1..])
}

/// Boots the dracut system without changes of its disk.
fn boot_dracut(state: &State, name: &str, words: &str) -> Result<Outcome, Error> {
    let system = state.systems.get(&DRACUT)?;
    let disk = system.file("disk.ext4");
    let words = format!("{words} {NO_SHELL}");
    boot(&state.systems, system, name, Disk::Unchanged(&disk), &words)
}

/// Checks for a message and the unit that failed.
fn expect_message(outcome: &Outcome, texts: &[&str]) -> Result<(), Error> {
    outcome.expect_failure(texts)?;
    // systemd shortens the name of the unit.
    outcome.expect_console(&["[FAILED] Failed to start sealmount-setup-ro", "  hint: "])
}

pub fn wrong_digest(state: &State) -> Result<(), Error> {
    let digest = &state.systems.get(&DRACUT)?.digest;
    let wrong = other(digest);
    let outcome = boot_dracut(state, "wrong-digest", &format!("composefs={wrong}"))?;
    let message =
        format!("cannot verify the image: its fs-verity digest is {digest}, expected {wrong}");
    expect_message(&outcome, &[&message])
}

pub fn wrong_digest_with_initramfs_tools(state: &State) -> Result<(), Error> {
    let system = state.systems.get(&INITRAMFS_TOOLS)?;
    let (wrong, disk) = (other(&system.digest), system.file("disk.ext4"));
    let words = format!("composefs={wrong}");
    let name = "wrong-digest-initramfs-tools";
    let outcome = boot(&state.systems, system, name, Disk::Unchanged(&disk), &words)?;
    outcome.expect_failure(&[
        &format!(
            "cannot verify the image: its fs-verity digest is {}, expected {wrong}",
            system.digest
        ),
        "sealmount: no root file system",
    ])
}

pub fn missing_image(state: &State) -> Result<(), Error> {
    let (system, lab) = (state.systems.get(&DRACUT)?, &state.systems.lab);
    let wrong = other(&system.digest);
    // The only image of an initramfs may have any name. Here the initramfs has two images.
    let initramfs = lab.temporary("missing-image.initramfs");
    let image = format!("usr/lib/sealmount/images/{}.cfs", other(&wrong));
    with_file(&system.file("initramfs"), &initramfs, &image, "another image")?;
    let outcome = boot_with_initramfs(
        state,
        system,
        "missing-image",
        &initramfs,
        &format!("composefs={wrong} {NO_SHELL}"),
    )?;
    let places = "neither in /usr/lib/sealmount/images nor in /sysroot/composefs/images";
    expect_message(&outcome, &[&format!("cannot find the image {wrong}: {places}")])
}

fn boot_with_initramfs(
    state: &State,
    system: &System,
    name: &str,
    initramfs: &Path,
    words: &str,
) -> Result<Outcome, Error> {
    let disk = system.file("disk.ext4");
    let (disk, start) = (Disk::Unchanged(&disk), Start::Kernel { initramfs, words });
    Boot { name, system, disk, start, memory_mib: MEMORY_MIB }.run(&state.systems.lab)
}

pub fn missing_disk(state: &State) -> Result<(), Error> {
    let digest = &state.systems.get(&DRACUT)?.digest;
    let words = format!("composefs={digest} root=LABEL=missing rd.timeout=10");
    let outcome = boot_dracut(state, "missing-disk", &words)?;
    outcome.expect_failure(&[
        "Timed out waiting for device",
        "/dev/disk/by-label/missing",
        "Dependency failed for sealmount-se",
    ])
}

/// Boots the dracut system from a changed disk, with a check of the objects.
fn boot_changed(
    state: &State,
    name: &str,
    check: &str,
    change: fn(&Path, &str) -> Result<(), Error>,
) -> Result<(Outcome, String), Error> {
    let system = state.systems.get(&DRACUT)?;
    let disk = state.systems.lab.temporary(&format!("{name}.disk"));
    disk::copy(&system.file("disk.ext4"), &disk)?;
    let object = disk::any_object(&disk)?;
    change(&disk, &object)?;
    let words = format!("composefs={} sealmount.check={check} {NO_SHELL}", system.digest);
    let outcome = boot(&state.systems, system, name, Disk::Unchanged(&disk), &words)?;
    let (_, short) = object.rsplit_once("objects/").unwrap_or_default();
    Ok((outcome, short.to_owned()))
}

pub fn missing_object(state: &State) -> Result<(), Error> {
    let (outcome, object) = boot_changed(state, "missing-object", "all", disk::remove)?;
    expect_message(&outcome, &[&format!(" needs {object}: missing"), "failed: 1 missing"])
}

pub fn decayed_object(state: &State) -> Result<(), Error> {
    let (outcome, object) = boot_changed(state, "decayed-object", "content", disk::decay)?;
    expect_message(&outcome, &[&object, "failed: 1 "])
}

pub fn small_limit(state: &State) -> Result<(), Error> {
    let digest = &state.systems.get(&DRACUT)?.digest;
    let words = format!("composefs={digest} sealmount.size=1k");
    let outcome = boot_dracut(state, "small-limit", &words)?;
    expect_message(
        &outcome,
        &["cannot copy the image: ", "and the limit for the copy is ", "raise sealmount.size="],
    )
}

pub fn full_tmpfs(state: &State) -> Result<(), Error> {
    let (system, lab) = (state.systems.get(&DRACUT)?, &state.systems.lab);
    let initramfs = lab.temporary("full-tmpfs.initramfs");
    let configuration = "root.transient = true\netc.transient = true\ntmpfs.size = '8m'\n";
    with_file(&system.file("initramfs"), &initramfs, CONFIGURATION, configuration)?;
    let words = format!("composefs={} boot_report.fill=1", system.digest);
    let outcome = boot_with_initramfs(state, system, "full-tmpfs", &initramfs, &words)?;
    let report = outcome.report()?;
    report.expect_parts("full", &["No space left on device"])?;
    for (name, value) in
        [("state", "running"), ("state when full", "running"), ("written after that", "text")]
    {
        report.expect(name, value).map_err(|error| outcome.failure(&error.to_string()))?;
    }
    Ok(())
}

pub fn no_verity(state: &State) -> Result<(), Error> {
    let system = state.systems.get(&WITHOUT_VERITY)?;
    let disk = system.file("disk.ext4");
    let words = format!("composefs={} {NO_SHELL}", system.digest);
    let outcome = boot(&state.systems, system, "no-verity", Disk::Unchanged(&disk), &words)?;
    expect_message(
        &outcome,
        &["cannot enforce verity: verity=require needs Linux 6.6", "put ? before the digest"],
    )
}

pub fn optional_verity(state: &State) -> Result<(), Error> {
    let system = state.systems.get(&WITHOUT_VERITY)?;
    let disk = disk::copy(
        &system.file("disk.ext4"),
        &state.systems.lab.temporary("optional-verity.disk"),
    )?;
    let words = format!("composefs=?{}", system.digest);
    let outcome = boot(&state.systems, system, "optional-verity", Disk::Kept(&disk), &words)?;
    let report = outcome.report()?;
    for (name, value) in [("state", "running"), ("failed units", ""), ("usr", "read-only")] {
        report.expect(name, value).map_err(|error| outcome.failure(&error.to_string()))?;
    }
    report.expect("kernel", &system.kernel)?;
    disk::expect_clean(&disk)
}
