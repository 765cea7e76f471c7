//! Copies in a cgroup with a limit of memory, in both versions of cgroups.

use super::fixtures::V1;
use super::machines::{SOLITARY, STANDARD};
use super::swap::large_image;
use super::system::{helper, no_loop_devices, rejected, succeeded};
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs;
use std::path::Path;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "copy_above_cgroup_v2_limit_is_rejected",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: copy_above_cgroup_v2_limit_is_rejected,
    },
    Scenario {
        name: "copy_above_cgroup_v1_limit_is_rejected",
        machine: &SOLITARY,
        time_limit: Scenario::TIME_LIMIT,
        run: copy_above_cgroup_v1_limit_is_rejected,
    },
];

/// A limit below the size of the image.
const TOO_LOW: &str = "6291456";
const ENOUGH: &str = "67108864";

const ROOT: &str = "/tmp/cgroup";

fn copy_above_cgroup_v2_limit_is_rejected(_: &mut Guest) -> Result<(), Error> {
    fs::create_dir_all(ROOT)?;
    mount("cgroup2", ROOT, "cgroup2", MountFlags::empty(), Some(c"nsdelegate"))?;
    for directory in ["", "outer"] {
        let directory = Path::new(ROOT).join(directory);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("cgroup.subtree_control"), "+memory")?;
    }
    check("memory.max", "max")?;
    // sealmount must not change the options of the hierarchy.
    let mounts = crate::files::read("/proc/self/mounts")?;
    assert!(
        mounts.lines().any(|line| line.contains(ROOT) && line.contains("nsdelegate")),
        "{mounts}"
    );
    Ok(unmount(ROOT, UnmountFlags::DETACH)?)
}

fn copy_above_cgroup_v1_limit_is_rejected(guest: &mut Guest) -> Result<(), Error> {
    fs::create_dir_all(ROOT)?;
    match mount("cgroup", ROOT, "cgroup", MountFlags::empty(), Some(c"memory")) {
        // Linux 6.11 and later without CONFIG_MEMCG_V1
        Err(Errno::INVAL | Errno::NODEV) if guest.kernel_at_least(6, 11)? => {
            println!("this kernel does not support the memory controller in cgroup v1");
            return Ok(());
        }
        result => result.context(|| "cannot mount the memory controller".into())?,
    }
    check("memory.limit_in_bytes", "-1")?;
    Ok(unmount(ROOT, UnmountFlags::DETACH)?)
}

/// Copies an image of 8 MiB in a cgroup. `limit_file` is the name of the file with the limit.
fn check(limit_file: &str, no_limit: &str) -> Result<(), Error> {
    let outer = Path::new(ROOT).join("outer");
    let inner = outer.join("inner");
    fs::create_dir_all(&inner)?;
    let (image, mount_point) = (Path::new("/tmp/limited.cfs"), Path::new("/mnt/limited"));
    fs::write(image, large_image(3)?)?;
    fs::create_dir_all(mount_point)?;
    let limit = |directory: &Path, limit: &str| {
        fs::write(directory.join(limit_file), limit).context(|| format!("cannot set {limit}"))
    };
    let copy = |memory: &str| {
        let objects = V1.objects_in(Path::new("/"));
        helper(image, mount_point, &format!("copy={memory},basedir={}", objects.display()))
    };
    fs::write(inner.join("cgroup.procs"), "0")?;
    for memory in ["memfd", "ramfs"] {
        for (outer_limit, inner_limit, named) in
            [(ENOUGH, TOO_LOW, "the cgroup /outer/inner has "), (TOO_LOW, no_limit, "/outer has ")]
        {
            limit(&inner, no_limit)?;
            limit(&outer, outer_limit)?;
            limit(&inner, inner_limit)?;
            let limit_text = format!("with a limit of {TOO_LOW} bytes");
            rejected(&copy(memory)?, 2, &[named, &limit_text, "MemoryMax="])?;
        }
        limit(&outer, ENOUGH)?;
        succeeded(&copy(memory)?)?;
        unmount(mount_point, UnmountFlags::empty())?;
    }
    no_loop_devices()?;
    fs::write(Path::new(ROOT).join("cgroup.procs"), "0")?;
    fs::remove_dir(&inner)?;
    fs::remove_dir(&outer)?;
    fs::remove_file(image)?;
    Ok(fs::remove_dir(mount_point)?)
}
