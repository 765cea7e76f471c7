//! What the running kernel can do, found out by system calls and with nothing of sealmount's: the
//! scenarios expect that of it, whatever its version and however it was built.

use super::fixtures::{self, V1, enable_verity};
use super::machines::STANDARD;
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, unmount,
};
use sealmount::{Algorithm, Rung};
use sealmount_sys::loop_device;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "probes",
    machine: &STANDARD,
    time_limit: Scenario::TIME_LIMIT,
    run: find_what_is_known,
}];

/// Whether files below a mounted directory can have fs-verity.
pub fn fs_verity(directory: &Path, algorithm: Algorithm) -> Result<bool, Error> {
    let scratch = directory.join("probe");
    fs::write(&scratch, "probe").context(|| scratch.display().to_string())?;
    let enabled = enable_verity(&scratch, algorithm);
    fs::remove_file(&scratch)?;
    match enabled {
        Ok(()) => Ok(true),
        // The last: the hash is not there, which some kernels have as a module.
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOPKG) => Ok(false),
        Err(errno) => Err(format!("cannot enable fs-verity on {scratch:?}: {errno}").into()),
    }
}

/// The best way to mount the EROFS in a file.
pub fn best_source(image: &Path) -> Result<Rung, Error> {
    let ladder = [Rung::SourceByDescriptor, Rung::SourceByPath, Rung::SourceByLoopDevice];
    for rung in ladder {
        match (rung, erofs(image, rung)) {
            (_, Ok(_)) => return Ok(rung),
            (Rung::SourceByDescriptor, Err(Errno::INVAL)) => {}
            (Rung::SourceByPath, Err(Errno::NOTBLK)) => {}
            (_, Err(errno)) => return Err(format!("probing {image:?}, {rung:?}: {errno}").into()),
        }
    }
    Err("a loop device is no source".into())
}

/// Whether a mount of EROFS can be idmapped.
pub fn idmap(image: &Path, user_namespace: &Path) -> Result<bool, Error> {
    let mount = erofs(image, best_source(image)?)?;
    match sealmount_sys::mount_setattr_idmap(mount, File::open(user_namespace)?) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(errno) => Err(format!("cannot idmap EROFS: {errno}").into()),
    }
}

/// A detached mount of a file, in one way.
fn erofs(image: &Path, source: Rung) -> Result<OwnedFd, Errno> {
    let file = open(image, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let _device;
    match source {
        Rung::SourceByDescriptor => fsconfig_set_fd(&context, "source", &file)?,
        Rung::SourceByPath => fsconfig_set_string(&context, "source", image)?,
        _ => {
            let control = open("/dev/loop-control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
            let path = format!("/dev/loop{}", loop_device::get_free(control)?);
            let device = open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            loop_device::configure(&device, &file, 4096, b"probe")?;
            fsconfig_set_string(&context, "source", &path)?;
            _device = device;
        }
    }
    fsconfig_set_flag(&context, "ro")?;
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Whether a mount can be made that follows no symbolic links (5.14).
pub fn nosymfollow() -> Result<bool, Error> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&tmpfs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW;
    match fsmount(tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes) {
        Ok(_) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(errno) => Err(format!("cannot mount a tmpfs: {errno}").into()),
    }
}

/// What overlayfs can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlayfs {
    /// The best way to give it layers.
    pub layers: Rung,
    /// `verity=require`
    pub verity: bool,
}

/// Makes overlays of a tmpfs, which is gone then.
pub fn overlayfs() -> Result<Overlayfs, Error> {
    let place = Path::new("/tmp");
    mount("probe", place, "tmpfs", MountFlags::empty(), None).context(|| "/tmp".into())?;
    let found = overlayfs_of(place).context(|| "probing overlayfs".into());
    unmount(place, UnmountFlags::empty())?;
    found
}

fn overlayfs_of(place: &Path) -> Result<Overlayfs, Error> {
    for name in ["a", "b"] {
        fs::create_dir(place.join(name))?;
    }
    let context = || fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC);
    let set = |key, value: &str| fsconfig_set_string(context()?, key, value);
    let (a, b) = (place.join("a").display().to_string(), place.join("b").display().to_string());

    // mount(2)'s parser takes any word, and looks at it when the superblock is made.
    let own_parser = match set("no-such-option", "") {
        Ok(()) => false,
        Err(Errno::INVAL) => true,
        Err(errno) => return Err(errno.into()),
    };
    let layers = if !own_parser {
        Rung::LowerLayersInOneString
    } else if takes_detached_mount(&b)? {
        Rung::LayersByDescriptor
    } else {
        match set("lowerdir+", &a) {
            Ok(()) => Rung::LayersByPath,
            Err(Errno::INVAL) => Rung::LayersInOneString,
            Err(errno) => return Err(errno.into()),
        }
    };

    let overlay = |verity: bool| {
        let context = context()?;
        fsconfig_set_string(&context, "lowerdir", format!("{a}:{b}"))?;
        fsconfig_set_string(&context, "metacopy", "on")?;
        if verity {
            fsconfig_set_string(&context, "verity", "require")?;
        }
        fsconfig_create(&context)
    };
    overlay(false)?;
    let verity = match overlay(true) {
        Ok(()) => true,
        Err(Errno::INVAL) => false,
        Err(errno) => return Err(errno.into()),
    };
    Ok(Overlayfs { layers, verity })
}

/// Whether a mount that is attached nowhere can be a layer, by its descriptor.
fn takes_detached_mount(other_layer: &str) -> Result<bool, Errno> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&tmpfs)?;
    let detached = fsmount(tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let other = open(other_layer, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let set = |layer| fsconfig_set_fd(&context, "lowerdir+", layer);
    match set(&detached).and_then(|()| set(&other)).and_then(|()| fsconfig_create(&context)) {
        Ok(()) => Ok(true),
        Err(Errno::BADF | Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// The kernels that Debian builds are known: on them the probes must find what they have. On all
/// others they are for reading.
fn find_what_is_known(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let user_namespace = fixtures::user_namespace(100_000)?;
    let (on_disk, in_memory) = (V1.image_in(&disk), V1.image_in(Path::new("/")));
    let sources = [best_source(&on_disk)?, best_source(&in_memory)?];
    let idmap = idmap(&on_disk, &user_namespace.path())?;
    let overlayfs = overlayfs()?;
    let mut verity = Vec::new();
    for disk in fixtures::mount_each(guest, &["ext4-verity", "btrfs"])? {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            verity.push(fs_verity(&disk, algorithm)?);
        }
    }
    println!(
        "EROFS from a file on disk and in memory: {sources:?}; idmapped: {idmap}; {overlayfs:?}; \
         fs-verity on ext4 and btrfs, with SHA-256 and SHA-512: {verity:?}"
    );
    let release = guest.kernel_release();
    if !release.ends_with("-cloud-amd64") {
        return Ok(());
    }
    use Rung::*;
    let (source, layers) = if guest.kernel_at_least(7, 3)? {
        (SourceByDescriptor, LayersByDescriptor)
    } else if guest.kernel_at_least(6, 15)? {
        (SourceByPath, LayersByDescriptor)
    } else if guest.kernel_at_least(6, 12)? {
        (SourceByPath, LayersByPath)
    } else if guest.kernel_at_least(6, 7)? {
        (SourceByLoopDevice, LayersByPath)
    } else if guest.kernel_at_least(6, 5)? {
        (SourceByLoopDevice, LayersInOneString)
    } else {
        (SourceByLoopDevice, LowerLayersInOneString)
    };
    assert_eq!(overlayfs, Overlayfs { layers, verity: guest.kernel_at_least(6, 6)? });
    assert_eq!(sources[0], source);
    // A kernel to come may mount files of a tmpfs too.
    assert!(sources[1] == SourceByLoopDevice || guest.kernel_at_least(7, 4)?, "{sources:?}");
    assert_eq!(idmap, guest.kernel_at_least(5, 19)?);
    assert_eq!(verity, [true; 4]);
    Ok(())
}
