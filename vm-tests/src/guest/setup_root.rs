//! Boots roots that sealmount-setup-root sets up, without systemd. [`boot_init`](super::boot_init) runs the
//! program and switches to the root.

use super::boot::{BOOTS, IMAGE, NO_VERITY, OBJECTS, Root, data, note};
use super::fixtures::HELPER;
use super::probe;
use crate::binaries::Binaries;
use crate::machine::{Disk, Format, Machine, Tier};
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::mount::{MountFlags, mount_remount};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::Path;
use test_support::mountinfo::{loop_devices, mount_at};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "setup_root_mounts_root_with_state",
        machine: &SETS_UP_ROOT,
        time_limit: Scenario::TIME_LIMIT,
        run: setup_root_mounts_root_with_state,
    },
    Scenario {
        name: "setup_root_mounts_transient_root",
        machine: &TRANSIENT,
        time_limit: Scenario::TIME_LIMIT,
        run: setup_root_mounts_transient_root,
    },
    Scenario {
        name: "setup_root_rejects_wrong_digest",
        machine: &WRONG_DIGEST,
        time_limit: Scenario::TIME_LIMIT,
        run: setup_root_rejects_wrong_digest,
    },
];

/// The word on the kernel command line with which boot-init runs the program.
pub const SETUP_ROOT: &str = "setup_root";
pub const PROGRAM: &str = "/sbin/sealmount-setup-root";
/// The second mount of the disk.
const KEPT_DISK: &str = "/run/initramfs/sealmount/disk";

static SETS_UP_ROOT: Machine = Machine {
    name: "setup-root",
    files: |binaries, initramfs| {
        let root = root(binaries)?;
        root.fill_initramfs(binaries, initramfs)?;
        let images = initramfs.join("usr/lib/sealmount/images");
        fs::create_dir_all(&images)?;
        fs::rename(initramfs.join(&IMAGE[1..]), images.join(format!("{}.cfs", root.digest)))?;
        Ok(symlink(HELPER, initramfs.join(&PROGRAM[1..]))?)
    },
    disks: &[Disk {
        name: OBJECTS,
        format: Format::Ext4Verity,
        size_mib: 64,
        fill: |binaries, disk| {
            let root = root(binaries)?;
            root.fill_objects(&disk.join("composefs/objects"))?;
            let state = disk.join(state(&root.digest.to_string()));
            fs::create_dir_all(state.join("var"))?;
            Ok(fs::write(state.join("var/kept"), "kept")?)
        },
    }],
    command_line: |binaries| Ok(format!("composefs={} {SETUP_ROOT}=1", root(binaries)?.digest)),
    modules: BOOTS.modules,
    takes_over: BOOTS.takes_over,
    on_faulty_kernels: true,
    on_large_pages: true,
    ..Machine::BARE
};

/// The machine whose configuration keeps changes in a tmpfs.
static TRANSIENT: Machine = Machine {
    name: "setup-root-transient",
    files: |binaries, initramfs| {
        (SETS_UP_ROOT.files)(binaries, initramfs)?;
        let directory = initramfs.join("usr/lib/composefs");
        fs::create_dir_all(&directory)?;
        let config = "root.transient = true\netc.transient = true\ntmpfs.size = '64m'\n";
        Ok(fs::write(directory.join("setup-root-conf.toml"), config)?)
    },
    command_line: SETS_UP_ROOT.command_line,
    disks: SETS_UP_ROOT.disks,
    modules: BOOTS.modules,
    takes_over: BOOTS.takes_over,
    ..Machine::BARE
};

static WRONG_DIGEST: Machine = Machine {
    name: "setup-root-wrong-digest",
    tier: Tier::Ends,
    command_line: |_| Ok(format!("composefs={} {SETUP_ROOT}=1", "0".repeat(64))),
    files: SETS_UP_ROOT.files,
    disks: SETS_UP_ROOT.disks,
    modules: BOOTS.modules,
    takes_over: BOOTS.takes_over,
    ..Machine::BARE
};

fn root(binaries: &Binaries) -> Result<Root, Error> {
    let files =
        vec![("usr/data".to_owned(), 0o644, data()), ("etc/fstab".to_owned(), 0o644, data())];
    Root::new(binaries, files, &["sysroot", "var"])
}

fn state(digest: &str) -> String {
    format!("state/deploy/{digest}")
}

fn setup_root_mounts_root_with_state(guest: &mut Guest) -> Result<(), Error> {
    let digest = guest.command_line("composefs").ok_or("no digest")?;
    let enforced = note(NO_VERITY).is_none() && probe::overlayfs()?.verity;
    let last = if enforced { note("setup") } else { note("optional") };
    let report = last.ok_or("the program has not run")?;
    if !report.starts_with("exit status: 0\n") || !report.contains("read-only ramfs") {
        return Err(format!("the program reported {report:?}").into());
    }
    // Without `?`, a system that cannot enforce verity is rejected.
    if let (false, Some(report)) = (enforced, note("setup"))
        && (!report.starts_with("exit status: 83\n") || !report.contains("cannot enforce verity"))
    {
        return Err(format!("the program reported {report:?}").into());
    }

    let mount = mount_at(Path::new("/")).ok_or("mountinfo has no root")?;
    let has = |option: &str| mount.options.iter().any(|other| other == option);
    if mount.source != format!("composefs:{digest}")
        || !has("ro")
        || has("verity=require") != enforced
    {
        return Err(format!("the root has the wrong source or options: {mount:?}").into());
    }
    for file in ["/usr/data", "/etc/fstab"] {
        if fs::read(file)? != data() {
            return Err(format!("{file} has the wrong content").into());
        }
    }
    let state = Path::new(KEPT_DISK).join(state(&digest));
    fs::write("/etc/hostname", "changed")?;
    fs::write("/var/log", "changed")?;
    for (file, content) in
        [("etc/upper/hostname", "changed"), ("var/log", "changed"), ("var/kept", "kept")]
    {
        let found = fs::read_to_string(state.join(file)).context(|| file.into())?;
        if found != content {
            return Err(format!("{file} is {found:?}").into());
        }
    }
    match fs::write("/sysroot/file", "") {
        Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => {}
        other => return Err(format!("a write to /sysroot returned {other:?}").into()),
    }
    is_clean_at_the_end()?;
    // systemd reports a loop device that it cannot detach at the end.
    let devices = loop_devices("");
    match report.contains("loop device /dev/") == devices.is_empty() {
        true => Err(format!("the loop devices {devices:?} contradict {report:?}").into()),
        false => Ok(()),
    }
}

/// Makes the disk read-only, as systemd does when the system stops.
fn is_clean_at_the_end() -> Result<(), Error> {
    mount_remount(KEPT_DISK, MountFlags::RDONLY, "")
        .context(|| "cannot make the disk read-only".into())?;
    match fs::write("/var/log", "later") {
        Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => {}
        other => return Err(format!("a write to the read-only disk returned {other:?}").into()),
    }
    Ok(mount_remount(KEPT_DISK, MountFlags::empty(), "")?)
}

fn setup_root_mounts_transient_root(guest: &mut Guest) -> Result<(), Error> {
    let digest = guest.command_line("composefs").ok_or("no digest")?;
    let state = Path::new(KEPT_DISK).join(state(&digest));
    for (file, in_state) in
        [("/new", "new"), ("/etc/new", "etc/upper/new"), ("/usr/data", "usr/data")]
    {
        fs::write(file, "changed").context(|| file.into())?;
        if fs::read_to_string(file)? != "changed" || state.join(in_state).exists() {
            return Err(format!("{file} is not in the tmpfs").into());
        }
    }
    fs::write("/var/new", "changed")?;
    match state.join("var/new").exists() {
        true => Ok(()),
        false => Err("/var is not on the disk".into()),
    }
}

fn setup_root_rejects_wrong_digest(_: &mut Guest) -> Result<(), Error> {
    let has_verity = note(NO_VERITY).is_none();
    for (name, is_enforced) in [("setup", true), ("optional", false)] {
        // sealmount samples the objects before it copies the image, so that error comes first.
        let (status, text) = match is_enforced && !has_verity {
            true => (83, "cannot enforce verity"),
            false => (80, "its fs-verity digest is "),
        };
        let report = note(name).ok_or_else(|| format!("no report of {name}"))?;
        let expected = format!("exit status: {status}\n");
        if !report.starts_with(&expected) || !report.contains(text) {
            return Err(format!("{name}: the program reported {report:?}").into());
        }
    }
    let mount = mount_at(Path::new("/sysroot")).ok_or("the disk is not mounted")?;
    match (mount.fs_type.as_str(), loop_devices("").as_slice()) {
        ("ext4", []) if !Path::new(KEPT_DISK).exists() => Ok(()),
        left => Err(format!("mounts or loop devices are left: {left:?}, {mount:?}").into()),
    }
}
