//! Remounts: by the helper in an initramfs, and by mount(8) and systemd-remount-fs in the root of a booted
//! system.

use super::boot::{BOOTS, IMAGE, OBJECTS, Root};
use super::fixtures::{self, HELPER, V1};
use super::machines::STANDARD;
use super::mounted::{TREE, mount_with_helper};
use super::{probe, system};
use crate::binaries::Binaries;
use crate::machine::{Disk, Format, Machine, Tier};
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::fs::{Mode, OFlags, open};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;
use test_support::mountinfo::mount_at;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "remount_changes_flags_alone",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: changes_flags_alone,
    },
    Scenario {
        name: "remount_compares_hidden_options",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: compares_hidden_options,
    },
    Scenario {
        name: "remount_by_systemd_changes_root",
        machine: &SYSTEMD,
        time_limit: Duration::from_secs(120),
        run: systemd_changes_root,
    },
];

/// A machine whose root has an fstab, mount(8), systemd-remount-fs and the helper.
static SYSTEMD: Machine = Machine {
    name: "remount-root",
    tier: Tier::Ends,
    files: |binaries, initramfs| root(binaries)?.fill_initramfs(binaries, initramfs),
    disks: &[Disk {
        name: OBJECTS,
        format: Format::Ext4Verity,
        size_mib: 128,
        fill: |binaries, disk| root(binaries)?.fill_disk(disk),
    }],
    command_line: |binaries| Ok(format!("{}={}", super::boot::DIGEST, root(binaries)?.digest)),
    ..Machine { modules: BOOTS.modules, takes_over: BOOTS.takes_over, ..Machine::BARE }
};

const MOUNT: &str = "/usr/bin/mount";
const SYSTEMD_REMOUNT_FS: &str = "/usr/lib/systemd/systemd-remount-fs";
/// The packages of these programs.
const PACKAGES: [&str; 2] = ["mount", "systemd"];

fn root(binaries: &Binaries) -> Result<Root, Error> {
    let name = |path: &Path| path.display().to_string().trim_start_matches('/').to_owned();
    let mut files = Vec::new();
    for (path, file) in binaries.programs(&PACKAGES, &[MOUNT, SYSTEMD_REMOUNT_FS])? {
        let content = fs::read(&file).context(|| file.display().to_string())?;
        if path == Path::new(MOUNT) {
            // systemd < 257 executes this path.
            files.push(("bin/mount".into(), 0o755, content.clone()));
        }
        files.push((name(&path), 0o755, content));
    }
    let helper = fs::read(binaries.get("sealmount", "mount-composefs")?)?;
    files.push((name(Path::new(HELPER)), 0o755, helper));
    let fstab =
        format!("{IMAGE} / composefs defaults,nodev,basedir=/mnt/{OBJECTS}/objects,nofail 0 1\n");
    files.push(("etc/fstab".into(), 0o644, fstab.into()));
    Root::new(binaries, files, &[])
}

/// Returns the flags of a mount, then of its superblock.
fn flags(mount_point: &str) -> Result<String, Error> {
    let mount = mount_at(Path::new(mount_point)).ok_or("no mount")?;
    println!("{}: {}", mount.mount_point.display(), mount.options.join(","));
    let is_flag = |option: &String| !option.contains('=') && option != "seclabel";
    Ok(mount.options.into_iter().filter(is_flag).collect::<Vec<_>>().join(","))
}

fn expect_flags(mount_point: &str, expected: &str) -> Result<(), Error> {
    match flags(mount_point)? {
        found if found == expected => Ok(()),
        found => Err(format!("{mount_point} has the flags {found}, expected {expected}").into()),
    }
}

/// Remounts by the helper, which must exit with this status and print `text`.
fn remount(status: i32, options: &str, text: &str) -> Result<(), Error> {
    let (found, stderr) =
        mount_with_helper(Path::new("x"), &["-v", "-o", &format!("remount,{options}")])?;
    match found == Some(status) && stderr.contains(text) {
        true => Ok(()),
        false => Err(format!("{options}: expected {status} and {text:?}, found {found:?}").into()),
    }
}

fn changes_flags_alone(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    let (image, objects) = (V1.image_in(&disk), V1.objects_in(&disk));
    // A path with these bytes is never shown as it is.
    let unusual = disk.join("a,b:c\\d");
    fs::create_dir(&unusual)?;
    let [upper, work] = ["upper", "work"].map(|name| disk.join(name));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let (objects, unusual) = (objects.display(), unusual.display());
    let (upper, work) = (upper.display(), work.display());
    let escaped = unusual.to_string().replace('\\', "\\\\").replace(',', "\\,").replace(':', "\\:");
    let layers = format!("basedir={objects},upperdir={upper},workdir={work}");
    let (status, _) = mount_with_helper(&image, &["-o", &format!("{layers},nosuid,lazytime")])?;
    assert_eq!(status, Some(0));
    remount(0, &format!("rw,nodev,noatime,sync,{layers}"), "remounted from rw,nosuid")?;
    expect_flags(TREE, "rw,nodev,noatime,rw,sync")?;
    remount(0, &format!("ro,nosymfollow,{layers},noverity"), "remounted")?;
    expect_flags(TREE, "ro,noatime,nosymfollow,ro")?;
    remount(1, &format!("rw,basedir={objects}:{escaped}"), "not basedir=")?;
    remount(1, &format!("rw,upperdir={work}"), "not upperdir=")?;
    remount(1, "rw,verity", "the mount has no verity")?;
    remount(1, "rw,dirsync", "the mount has no dirsync")?;
    remount(1, "rw,index=bogus", "index")?;
    expect_flags(TREE, "ro,noatime,nosymfollow,ro")?;
    remount(0, "rw,relatime", "remounted")?;
    // A file that is open for writing keeps the mount writable.
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = open(Path::new(TREE).join("open"), flags, Mode::RUSR)?;
    remount(2, "ro,nosuid", "Device or resource busy")?;
    expect_flags(TREE, "rw,relatime,rw")?;
    drop(file);
    rustix::mount::unmount(TREE, rustix::mount::UnmountFlags::empty())?;

    let two = format!("basedir={escaped}:{objects}");
    let (status, _) = mount_with_helper(&image, &["-o", &two])?;
    assert_eq!(status, Some(0));
    println!("{:?}", mount_at(Path::new(TREE)));
    remount(0, "rw", "read-only: there is no upperdir")?;
    expect_flags(TREE, "ro,relatime,ro")?;
    Ok(())
}

/// The kernel shows verity, and a record holds digest and copy. A record needs the unique IDs of Linux 6.8.
fn compares_hidden_options(guest: &mut Guest) -> Result<(), Error> {
    fs::create_dir_all("/run")?;
    rustix::mount::mount("run", "/run", "tmpfs", rustix::mount::MountFlags::empty(), None)?;
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    let verified = disk.join("verified");
    fs::create_dir(&verified)?;
    let has_verity = V1.copy_with_verity(&disk, &verified).is_ok() && probe::overlayfs()?.verity;
    let directory = if has_verity { &verified } else { &disk };
    let verity = if has_verity { "verity" } else { "noverity" };
    let hidden = format!("copy,digest={}", V1.digest);
    let basedir = format!("basedir={}", V1.objects_in(directory).display());
    let options = format!("{basedir},{hidden},{verity}");
    let (status, message) = mount_with_helper(&V1.image_in(&disk), &["-v", "-o", &options])?;
    assert_eq!(status, Some(0));
    let has_records = guest.kernel_at_least(6, 8)?;
    assert_eq!(message.contains("options recorded for a remount"), has_records);
    remount(0, &format!("{basedir},{verity}"), "remounted")?;
    let (other, text) = match has_verity {
        true => ("noverity", "the mount has verity, not noverity"),
        false => ("verity", "the mount has no verity"),
    };
    remount(1, other, text)?;
    if !has_records {
        let text =
            "cannot read the recorded options of the mount: unique IDs of mounts need Linux 6.8";
        return remount(1, &options, text);
    }
    remount(0, &options, "remounted")?;
    remount(1, &format!("{verity},digest={}", "0".repeat(64)), "not digest=")?;
    remount(1, "copy=ramfs", "has copy=memfd, not copy=ramfs")?;
    fs::remove_dir_all("/run/sealmount")?;
    remount(1, &options, "the mount has no record")
}

/// Enters the namespace of process 1. The mounts of another namespace are other mounts.
fn enter_namespace_of_init() -> Result<(), Error> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let namespace = open("/proc/1/ns/mnt", flags, Mode::empty())?;
    sealmount_sys::enter_mount_namespace(namespace).context(|| "cannot enter /proc/1/ns/mnt".into())
}

fn run(program: &str, arguments: &[&str], fstab: Option<&str>) -> Result<Output, Error> {
    let mut command = Command::new(program);
    if let Some(fstab) = fstab {
        command.env("LIBMOUNT_FSTAB", fstab).env("SYSTEMD_FSTAB", fstab);
    }
    let output = command.args(arguments).output().context(|| format!("cannot run {program}"))?;
    println!("{program} {arguments:?}: {}", output.status);
    print!("{}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

fn systemd_changes_root(guest: &mut Guest) -> Result<(), Error> {
    enter_namespace_of_init()?;
    expect_flags("/", "ro,relatime,ro")?;
    // The line of fstab has `defaults`, so mount(8) passes rw to the helper.
    system::succeeded(&run(SYSTEMD_REMOUNT_FS, &[], None)?)?;
    expect_flags("/", "ro,nodev,relatime,ro")?;
    system::succeeded(&run(MOUNT, &["-o", "remount,ro,nosuid", "/"], None)?)?;
    expect_flags("/", "ro,nosuid,nodev,relatime,ro")?;

    let fstab = "/run/fstab";
    let digest = guest.command_line(super::boot::DIGEST).ok_or("no digest")?;
    let write = |options: &str| fs::write(fstab, format!("{IMAGE} / composefs {options} 0 1\n"));
    // The first stage mounted with noverity if the kernel cannot verify the objects.
    let is_verified = mount_at(Path::new("/"))
        .is_some_and(|mount| mount.options.iter().any(|option| option == "verity=require"));
    let verity = if is_verified { "verity" } else { "noverity" };
    write(&format!("ro,copy,{verity},digest={digest},noatime"))?;
    let output = run(SYSTEMD_REMOUNT_FS, &[], Some(fstab))?;
    // The status of systemd-remount-fs is 1 for any failure.
    let other_digest = match guest.kernel_at_least(6, 8)? {
        true => {
            system::succeeded(&output)?;
            expect_flags("/", "ro,noatime,ro")?;
            "the mount has digest="
        }
        false => {
            system::rejected(&output, 1, &["unique IDs of mounts need Linux 6.8"])?;
            "cannot compare the option digest"
        }
    };
    let before = flags("/")?;
    write(&format!("ro,{verity},digest={}", "0".repeat(64)))?;
    system::rejected(&run(SYSTEMD_REMOUNT_FS, &[], Some(fstab))?, 1, &[other_digest])?;
    expect_flags("/", &before)
}
