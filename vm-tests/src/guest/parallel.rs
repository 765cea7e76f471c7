//! Makes many mounts at the same time. Each needs a loop device, because EROFS cannot mount images on a
//! tmpfs directly.

use super::fixtures::{HELPER, V1};
use super::machines::SOLITARY;
use super::system::{no_loop_devices, unload};
use super::{probe, system};
use crate::machine::{Machine, Tier};
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use sealmount::SourceMethod;
use sealmount_sys::loop_device;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;
use test_support::manifest::assert_is_manifest;
use test_support::mountinfo::{loop_devices, mounts};

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "parallel_mounts_all_get_loop_devices",
    machine: &PARALLEL,
    time_limit: Duration::from_secs(240),
    run: parallel_mounts_all_get_loop_devices,
}];

static PARALLEL: Machine =
    Machine { name: "parallel", tier: Tier::Ci, on_large_pages: false, ..SOLITARY };

const MOUNTS: usize = 64;
const ROUNDS: usize = 10;
/// The number of other processes that use loop devices meanwhile.
const OTHERS: usize = 3;
/// The argument with which vm-init becomes one of these processes.
pub const TAKE_LOOP_DEVICES: &str = "--take-loop-devices";

fn parallel_mounts_all_get_loop_devices(_: &mut Guest) -> Result<(), Error> {
    // The kernel logs every use of a loop device, and the console is slow.
    let log_level = fs::read("/proc/sys/kernel/printk")?;
    fs::write("/proc/sys/kernel/printk", "4")?;
    let result = ten_rounds();
    fs::write("/proc/sys/kernel/printk", log_level)?;
    result
}

fn ten_rounds() -> Result<(), Error> {
    // A copy in a memfd always needs a loop device. A future kernel may mount files on a tmpfs without
    // a loop device.
    let image = V1.image_in(Path::new("/"));
    let without = probe::best_source(&image)? != SourceMethod::LoopDevice;
    let least_devices = if without { MOUNTS / 2 } else { MOUNTS };
    let before = (mounts().len(), directories()?);
    let mut taken = 0;
    for round in 0..ROUNDS {
        // The kernel creates loop devices on demand and keeps them. Unloading the module removes them,
        // so every round starts with too few. If the driver is built in, only the first round does.
        let is_new = unload("loop")?.is_some() || round == 0;
        let free = fs::read_dir("/sys/block")?.flatten();
        let free = free.filter(|entry| entry.file_name().as_bytes().starts_with(b"loop")).count();
        println!("round {round}: {free} loop devices before");
        if is_new && free >= MOUNTS {
            return Err(format!("cannot exhaust the loop devices: {free} are free").into());
        }
        taken += mount_among_others(round, least_devices)
            .context(|| format!("round {round} of {ROUNDS}"))?;
        no_loop_devices()?;
        let after = (mounts().len(), directories()?);
        if after != before {
            return Err(
                format!("mounts and directories changed from {before:?} to {after:?}").into()
            );
        }
    }
    println!("other processes configured {taken} loop devices");
    match taken >= MOUNTS {
        true => Ok(()),
        false => Err("other processes configured too few loop devices".into()),
    }
}

/// Mounts while other processes use loop devices. Returns how many devices those processes configured.
fn mount_among_others(round: usize, least_devices: usize) -> Result<usize, Error> {
    let other = |_| {
        Command::new("/proc/self/exe")
            .arg(TAKE_LOOP_DEVICES)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context(|| "cannot start another user of loop devices".into())
    };
    let others = (0..OTHERS).map(other).collect::<Result<Vec<_>, Error>>()?;
    let result = mount_at_once(round, least_devices);
    let mut taken = 0;
    for other in others {
        // wait_with_output closes the standard input of the process, which ends the process.
        let output = other.wait_with_output()?;
        let count = String::from_utf8(output.stdout)?;
        let failure = || format!("another user of loop devices ended with {}", output.status);
        taken += count.trim().parse::<usize>().context(failure)?;
    }
    result.map(|()| taken)
}

/// Starts [`MOUNTS`] helpers, half of them with `copy`. Checks and removes their mounts.
fn mount_at_once(round: usize, least_devices: usize) -> Result<(), Error> {
    let root = Path::new("/tmp/parallel");
    fs::create_dir_all(root)?;
    let mount_points: Vec<PathBuf> = (0..MOUNTS).map(|n| root.join(n.to_string())).collect();
    mount_points.iter().try_for_each(fs::create_dir)?;
    let objects = V1.objects_in(Path::new("/"));
    let start = |(number, mount_point): (usize, &PathBuf)| {
        let copy = match number % 2 {
            0 => format!(",copy,noverity,digest={}", V1.digest),
            _ => String::new(),
        };
        Command::new(HELPER)
            .args([&V1.image_in(Path::new("/")), mount_point])
            .arg("-o")
            .arg(format!("basedir={}{copy}", objects.display()))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context(|| format!("cannot start {HELPER}"))
    };
    let helpers: Vec<_> = mount_points.iter().enumerate().map(start).collect();
    let mut failures = Vec::new();
    for helper in helpers {
        let output = helper?.wait_with_output()?;
        failures.extend(system::succeeded(&output).err().map(|error| error.to_string()));
    }
    if !failures.is_empty() {
        return Err(format!("{} of {MOUNTS} mounts failed: {failures:?}", failures.len()).into());
    }

    let devices = loop_devices("image.cfs").len();
    let mounted = mounts().iter().filter(|mount| mount.mount_point.starts_with(root)).count();
    if mounted != MOUNTS || !(least_devices..=MOUNTS).contains(&devices) {
        return Err(format!(
            "expected {MOUNTS} mounts, but found {mounted} with {devices} loop devices"
        )
        .into());
    }
    for mount_point in &mount_points {
        // The small file is stored in the image, the large file in an object.
        if fs::read_to_string(mount_point.join("hello.txt"))?.is_empty()
            || fs::read(mount_point.join("data/70000"))?.len() != 70_000
        {
            return Err(format!("{} has the wrong content", mount_point.display()).into());
        }
    }
    assert_is_manifest(&mount_points[round * 7 % MOUNTS]);
    for mount_point in &mount_points {
        unmount(mount_point, UnmountFlags::empty()).context(|| "cannot unmount".into())?;
        fs::remove_dir(mount_point)?;
    }
    fs::remove_dir(root)?;
    Ok(())
}

/// Configures and releases free loop devices until standard input is closed. Ignores lost races. Prints
/// the number of configured devices.
pub fn take_loop_devices() -> Result<(), Error> {
    let enough = thread::spawn(|| std::io::stdin().read_line(&mut String::new()));
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    let backing = memfd_create("other", MemfdFlags::CLOEXEC)?;
    ftruncate(&backing, 4096)?;
    let mut taken = 0;
    while !enough.is_finished() {
        let number = match loop_device::get_free(&control) {
            Err(Errno::AGAIN | Errno::INTR) => continue,
            number => number?,
        };
        let Ok(device) = File::open(format!("/dev/loop{number}")) else { continue };
        if loop_device::configure(&device, &backing, 4096, b"other").is_ok() {
            taken += 1;
        }
        thread::sleep(Duration::from_millis(10));
    }
    println!("{taken}");
    Ok(())
}

/// Lists the directories in which a mount could leave a directory behind.
fn directories() -> Result<Vec<Vec<std::ffi::OsString>>, Error> {
    let list = |directory| {
        let entries = fs::read_dir(directory)?;
        let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        Ok(names)
    };
    ["/", "/tmp", "/mnt"].into_iter().map(list).collect()
}
