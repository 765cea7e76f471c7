//! Runs the first stage: process 1 of an initramfs, after vm-init loaded the modules.

use super::boot::{DIGEST, IMAGE, NO_VERITY, NOTES, OBJECTS};
use super::setup_root::{PROGRAM, SETUP_ROOT};
use super::system;
use crate::machine::Format;
use crate::scenario::Guest;
use crate::{Context, Error};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move, unmount};
use rustix::process::{chdir, chroot};
use sealmount_sys::fsverity;
use std::convert::Infallible;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

pub fn main() {
    let Err(error) = boot();
    eprintln!("boot-init: no root: {error}");
    let _ = fs::write(Path::new(NOTES).join("no_root"), error.to_string());
    // A real initramfs would start a shell here.
    let error = Command::new("/init").exec();
    eprintln!("boot-init: cannot execute /init: {error}");
}

fn boot() -> Result<Infallible, Error> {
    mount("run", "/run", "tmpfs", MountFlags::empty(), None).context(|| "/run".into())?;
    fs::create_dir(NOTES)?;
    let guest = Guest::here();
    let disk = guest.mount_disk(OBJECTS, Format::Ext4Verity, MountFlags::empty())?;
    let sets_up_root = guest.command_line(SETUP_ROOT).is_some();
    let objects = disk.join(if sets_up_root { "composefs/objects" } else { "objects" });
    for prefix in fs::read_dir(&objects)? {
        for object in fs::read_dir(prefix?.path())? {
            let object = File::open(object?.path())?;
            match fsverity::enable(object, fsverity::HASH_ALG_SHA256) {
                Ok(()) => {}
                Err(errno @ (Errno::OPNOTSUPP | Errno::NOTTY)) => note(NO_VERITY, errno)?,
                Err(errno) => {
                    return Err(format!("cannot enable fs-verity on an object: {errno}").into());
                }
            }
        }
    }
    if sets_up_root {
        set_up_root(&guest, &disk)?;
        return switch_root();
    }
    mount_root(&guest, &objects)?;
    // The root keeps the file system in use, but must not need this mount.
    unmount(&disk, UnmountFlags::empty())
        .context(|| "cannot unmount the disk with the objects".into())?;
    note("cached_kib.mounted", cached_kib()?)?;
    switch_root()
}

/// Mounts the root with the strictest options that the kernel supports.
fn mount_root(guest: &Guest, objects: &Path) -> Result<(), Error> {
    let digest = guest.command_line(DIGEST).ok_or("the kernel command line has no digest")?;
    let mut stderr = String::new();
    for (name, verity) in [("verity", ",verity"), ("digest", ""), ("noverity", ",noverity")] {
        let options = format!("basedir={},copy{verity},digest={digest}", objects.display());
        let output = system::helper(Path::new(IMAGE), Path::new("/sysroot"), &options)?;
        stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        eprint!("{stderr}");
        note(name, format_args!("{}\n{stderr}", output.status))?;
        if output.status.success() {
            return Ok(());
        }
    }
    Err(stderr.into())
}

/// Runs sealmount-setup-root, first with the kernel command line. On a kernel without fs-verity, that fails, and
/// the second run does not require fs-verity.
fn set_up_root(guest: &Guest, disk: &Path) -> Result<(), Error> {
    let digest = guest.command_line("composefs").ok_or("the kernel command line has no digest")?;
    mount_move(disk, "/sysroot").context(|| "cannot move the disk".into())?;
    let mut stderr = String::new();
    for (name, command_line) in
        [("setup", None), ("optional", Some(format!("composefs=?{digest}")))]
    {
        let mut command = Command::new(PROGRAM);
        if let Some(command_line) = command_line {
            command.args(["--cmdline", &command_line]);
        }
        let output = command.output().context(|| format!("cannot run {PROGRAM}"))?;
        stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let stdout = String::from_utf8_lossy(&output.stdout);
        eprint!("{stdout}{stderr}");
        note(name, format_args!("{}\n{stdout}{stderr}", output.status))?;
        if output.status.success() {
            return Ok(());
        }
    }
    Err(stderr.into())
}

/// Empties the initramfs and continues in /sysroot.
fn switch_root() -> Result<Infallible, Error> {
    let old_root = File::open("/")?;
    for dir in ["dev", "proc", "sys", "run"] {
        mount_move(format!("/{dir}"), format!("/sysroot/{dir}"))
            .context(|| format!("cannot move /{dir}"))?;
    }
    empty(Path::new("/"), old_root.metadata()?.dev())?;
    chdir("/sysroot")?;
    mount_move(".", "/").context(|| "cannot move the root".into())?;
    chroot(".")?;
    chdir("/")?;
    note("cached_kib.emptied", cached_kib()?)?;
    // The scenario inspects the old root through this descriptor.
    note("old_root", old_root.as_raw_fd())?;
    fcntl_setfd(&old_root, FdFlags::empty())?;
    let error = Command::new("/sbin/init").exec();
    Err(format!("cannot execute the root's /sbin/init: {error}").into())
}

/// Removes all files below a directory that are on its file system.
fn empty(dir: &Path, device: u64) -> Result<(), Error> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path)?;
        match (metadata.is_dir(), metadata.dev() == device) {
            (_, false) => continue,
            (true, true) => {
                empty(&path, device)?;
                fs::remove_dir(&path).context(|| path.display().to_string())?;
            }
            (false, true) => fs::remove_file(&path).context(|| path.display().to_string())?,
        }
    }
    Ok(())
}

/// Returns the memory of cached files, which includes an initramfs (tmpfs or ramfs). The free memory is
/// not usable: CPUs keep lists of freed pages, which count as free only later.
fn cached_kib() -> Result<u64, Error> {
    system::meminfo("Cached")
}

fn note(name: &str, text: impl std::fmt::Display) -> Result<(), Error> {
    fs::write(Path::new(NOTES).join(name), text.to_string())
        .context(|| format!("cannot write the note {name}"))
}
