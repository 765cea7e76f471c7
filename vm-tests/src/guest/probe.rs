//! Probes the features of the running kernel with plain system calls, without sealmount. The
//! expectations of the scenarios depend on these probes, not on the version and configuration of the
//! kernel.

use super::fixtures::{self, V1, enable_verity};
use super::machines::STANDARD;
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, open, openat, readlinkat, statat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen, mount, move_mount, open_tree, unmount,
};
use sealmount::{Algorithm, LayerMethod, SourceMethod};
use sealmount_sys::{loop_device, page_size};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "probes_return_documented_features",
    machine: &STANDARD,
    time_limit: Scenario::TIME_LIMIT,
    run: probes_return_documented_features,
}];

/// Returns whether files below a mounted directory can have fs-verity.
pub fn fs_verity(directory: &Path, algorithm: Algorithm) -> Result<bool, Error> {
    let scratch = directory.join("probe");
    fs::write(&scratch, "probe").context(|| scratch.display().to_string())?;
    let enabled = enable_verity(&scratch, algorithm);
    fs::remove_file(&scratch)?;
    match enabled {
        Ok(()) => Ok(true),
        // NOPKG means that the module of the hash is not loaded.
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOPKG) => Ok(false),
        Err(errno) => Err(format!("cannot enable fs-verity on {scratch:?}: {errno}").into()),
    }
}

/// Returns the newest method by which the kernel mounts the EROFS in a file and reads the mount.
pub fn newest_source(image: &Path) -> Result<SourceMethod, Error> {
    last(sources(image, |_| Ok(true))?)
}

/// Returns the newest method by which the kernel mounts the EROFS in a file and reads the mount, so that two
/// overlays can be stacked on the mount.
pub fn best_source(image: &Path) -> Result<SourceMethod, Error> {
    last(tried_sources(image)?)
}

/// Returns the methods up to the one of [`best_source`]. If the kernel cannot read the file by its
/// descriptor, the list does not have the path of the descriptor, by which the kernel reads in the same way.
pub fn tried_sources(image: &Path) -> Result<Vec<SourceMethod>, Error> {
    sources(image, stacks)
}

/// Runs a probe with a copy of the image that is padded to whole pages, as sealmount pads a copy in a ramfs.
pub fn padded<T>(image: &Path, probe: impl FnOnce(&Path) -> Result<T, Error>) -> Result<T, Error> {
    let padded = image.with_extension("padded");
    let mut content = fs::read(image)?;
    content.resize(content.len().next_multiple_of(page_size()), 0);
    fs::write(&padded, content).context(|| padded.display().to_string())?;
    let found = probe(&padded);
    fs::remove_file(&padded)?;
    found
}

fn last(tried: Vec<SourceMethod>) -> Result<SourceMethod, Error> {
    tried.last().copied().ok_or("no source method".into())
}

fn sources(
    image: &Path,
    is_good: impl Fn(&OwnedFd) -> Result<bool, Error>,
) -> Result<Vec<SourceMethod>, Error> {
    let mut tried = Vec::new();
    for method in [SourceMethod::Descriptor, SourceMethod::DescriptorPath] {
        tried.push(method);
        match (method, erofs(image, method)) {
            (_, Ok(mount)) => match (reads_all_files(&mount)?, is_good(&mount)?) {
                (true, true) => return Ok(tried),
                (true, false) => {}
                (false, _) => break,
            },
            // The kernel cannot read the page with the superblock.
            (_, Err(Errno::IO)) => break,
            (SourceMethod::Descriptor, Err(Errno::INVAL)) => {}
            (SourceMethod::DescriptorPath, Err(Errno::NOTBLK)) => {}
            (_, Err(errno)) => {
                return Err(format!("cannot probe {method:?} with {image:?}: {errno}").into());
            }
        }
    }
    tried.push(SourceMethod::LoopDevice);
    erofs(image, SourceMethod::LoopDevice)
        .context(|| "the kernel rejects every source method".into())?;
    Ok(tried)
}

/// Returns whether the kernel reads all inodes, directories, symbolic links and files of a mount.
fn reads_all_files(erofs: &OwnedFd) -> Result<bool, Error> {
    // The descriptor of a mount is only a path.
    let root = openat(erofs, ".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    match read_below(&root) {
        Ok(()) => Ok(true),
        Err(Errno::IO) => Ok(false),
        Err(errno) => Err(format!("cannot probe the files of an EROFS mount: {errno}").into()),
    }
}

fn read_below(directory: &OwnedFd) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        let inode = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(inode.st_mode) {
            FileType::Directory => read_below(&openat(directory, name, flags, Mode::empty())?)?,
            FileType::Symlink => drop(readlinkat(directory, name, Vec::new())?),
            FileType::RegularFile => {
                let file = openat(directory, name, flags, Mode::empty())?;
                let mut buffer = [0; 1 << 14];
                while rustix::io::read(&file, &mut buffer)? > 0 {}
            }
            _ => {}
        }
    }
    Ok(())
}

/// Returns whether the kernel mounts an overlay on an overlay on a mount. Attaches the mount meanwhile.
fn stacks(erofs: &OwnedFd) -> Result<bool, Error> {
    let root = Path::new("/probe-stacking");
    for name in ["erofs", "empty", "first", "second"] {
        fs::create_dir_all(root.join(name))?;
    }
    move_mount(
        erofs,
        "",
        rustix::fs::CWD,
        root.join("erofs"),
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    let overlay = |below: &str, on: &str| {
        let root = root.display();
        let options = format!("lowerdir={root}/{below}:{root}/empty");
        let options = std::ffi::CString::new(options).expect("the path has no NUL");
        mount("overlay", format!("{root}/{on}"), "overlay", MountFlags::empty(), options.as_c_str())
    };
    overlay("erofs", "first")?;
    let second = overlay("first", "second");
    for name in ["second", "first", "erofs"] {
        if name != "second" || second.is_ok() {
            unmount(root.join(name), UnmountFlags::DETACH)?;
        }
    }
    match second {
        Ok(()) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(errno) => Err(format!("cannot probe stacking: {errno}").into()),
    }
}

/// Returns whether a mount of EROFS can be idmapped.
pub fn idmap(image: &Path, user_namespace: &Path) -> Result<bool, Error> {
    let mount = erofs(image, best_source(image)?)?;
    match sealmount_sys::mount_setattr_idmap(mount, File::open(user_namespace)?) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(errno) => Err(format!("cannot idmap EROFS: {errno}").into()),
    }
}

/// Creates a detached mount of the EROFS in a file, with one method.
pub fn erofs(image: &Path, source: SourceMethod) -> Result<OwnedFd, Errno> {
    let file = open(image, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let _device;
    match source {
        SourceMethod::Descriptor => fsconfig_set_fd(&context, "source", &file)?,
        SourceMethod::DescriptorPath => fsconfig_set_string(&context, "source", image)?,
        _ => {
            let control = open("/dev/loop-control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
            let path = format!("/dev/loop{}", loop_device::get_free(control)?);
            let device = open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            loop_device::configure(&device, &file, 512, b"probe")?;
            fsconfig_set_string(&context, "source", &path)?;
            _device = device;
        }
    }
    fsconfig_set_flag(&context, "ro")?;
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Returns whether a mount can have the attribute nosymfollow (5.14).
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

/// Returns whether a detached mount can be cloned (6.15).
pub fn clones_detached_mounts() -> Result<bool, Error> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    match open_tree(detached_tmpfs()?, "", flags) {
        Ok(_) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(errno) => Err(format!("cannot clone a detached mount: {errno}").into()),
    }
}

/// Returns whether a mount can be attached beneath another mount (6.5). The kernel rejects that on the
/// root mount of a namespace, so the probe makes two mounts.
pub fn attaches_beneath() -> Result<bool, Error> {
    let (lower, upper) = (Path::new("/tmp"), Path::new("/tmp/upper"));
    mount("probe", lower, "tmpfs", MountFlags::empty(), None).context(|| "/tmp".into())?;
    fs::create_dir(upper)?;
    mount("probe", upper, "tmpfs", MountFlags::empty(), None)?;
    // MOVE_MOUNT_BENEATH
    let beneath = MoveMountFlags::from_bits_retain(0x200)
        | MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    let directory = open(upper, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let moved = move_mount(detached_tmpfs()?, "", &directory, "", beneath);
    drop(directory);
    unmount(lower, UnmountFlags::DETACH)?;
    match moved {
        Ok(()) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(errno) => Err(format!("cannot attach a mount beneath another: {errno}").into()),
    }
}

fn detached_tmpfs() -> Result<OwnedFd, Errno> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&tmpfs)?;
    fsmount(tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
}

/// The features of overlayfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlayfs {
    /// The newest method to set the layers of overlayfs.
    pub layers: LayerMethod,
    /// Whether overlayfs supports `verity=require`.
    pub verity: bool,
}

/// Probes the features of overlayfs on a tmpfs, which is unmounted afterwards.
pub fn overlayfs() -> Result<Overlayfs, Error> {
    let place = Path::new("/tmp");
    mount("probe", place, "tmpfs", MountFlags::empty(), None).context(|| "/tmp".into())?;
    let found = overlayfs_of(place).context(|| "cannot probe overlayfs".into());
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

    // The parser of mount(2) accepts any word, and checks words only when the superblock is created.
    let own_parser = match set("no-such-option", "") {
        Ok(()) => false,
        Err(Errno::INVAL) => true,
        Err(errno) => return Err(errno.into()),
    };
    let layers = if !own_parser {
        LayerMethod::LowerOnly
    } else if accepts_detached_mount(&b)? {
        LayerMethod::Descriptors
    } else {
        match set("lowerdir+", &a) {
            Ok(()) => LayerMethod::Paths,
            Err(Errno::INVAL) => LayerMethod::OneString,
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

/// Returns whether overlayfs accepts the descriptor of a detached mount as a layer.
fn accepts_detached_mount(other_layer: &str) -> Result<bool, Errno> {
    let detached = detached_tmpfs()?;
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let other = open(other_layer, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let set = |layer| fsconfig_set_fd(&context, "lowerdir+", layer);
    match set(&detached).and_then(|()| set(&other)).and_then(|()| fsconfig_create(&context)) {
        Ok(()) => Ok(true),
        Err(Errno::BADF | Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// The ends of the releases of Debian kernels that the run fetches.
const DEBIAN_FLAVOURS: [&str; 3] = ["-cloud-amd64", "-cloud-arm64", "-arm64-16k"];

/// The probes must find the documented features of Debian kernels. On other kernels, this scenario only
/// prints the features.
fn probes_return_documented_features(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4")?;
    let user_namespace = fixtures::user_namespace(100_000)?;
    let (on_disk, in_memory) = (V1.image_in(&disk), V1.image_in(Path::new("/")));
    let sources = [best_source(&on_disk)?, best_source(&in_memory)?];
    let idmap = idmap(&on_disk, &user_namespace.path())?;
    let overlayfs = overlayfs()?;
    let (clones, beneath) = (clones_detached_mounts()?, attaches_beneath()?);
    let mut verity = Vec::new();
    for disk in fixtures::mount_each(guest, &["ext4-verity", "btrfs"])? {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            verity.push(fs_verity(&disk, algorithm)?);
        }
    }
    println!(
        "EROFS from a file on disk and in memory: {sources:?}; idmapped: {idmap}; {overlayfs:?}; \
         clones of detached mounts: {clones}; beneath another mount: {beneath}; fs-verity on ext4 and \
         btrfs, with SHA-256 and SHA-512: {verity:?}"
    );
    let release = guest.kernel_release();
    if !DEBIAN_FLAVOURS.iter().any(|flavour| release.ends_with(flavour)) {
        return Ok(());
    }
    let version = release.split(['-', '+']).next();
    let (source, layers) = if matches!(version, Some("6.17.13" | "6.18.5")) {
        // An EROFS from a file counts as a level of stacking.
        (SourceMethod::LoopDevice, LayerMethod::Descriptors)
    } else if guest.kernel_at_least(7, 3)? {
        (SourceMethod::Descriptor, LayerMethod::Descriptors)
    } else if guest.kernel_at_least(6, 15)? {
        (SourceMethod::DescriptorPath, LayerMethod::Descriptors)
    } else if guest.kernel_at_least(6, 12)? {
        (SourceMethod::DescriptorPath, LayerMethod::Paths)
    } else if guest.kernel_at_least(6, 7)? {
        (SourceMethod::LoopDevice, LayerMethod::Paths)
    } else if guest.kernel_at_least(6, 5)? {
        (SourceMethod::LoopDevice, LayerMethod::OneString)
    } else {
        (SourceMethod::LoopDevice, LayerMethod::LowerOnly)
    };
    assert_eq!(overlayfs, Overlayfs { layers, verity: guest.kernel_at_least(6, 6)? });
    // Linux 7.3.4 with large pages cannot read the last page of a file. A later version may be mended.
    let is_large = page_size() > 4096 && guest.kernel_at_least(7, 3)?;
    assert!(
        sources[0] == source || is_large && sources[0] == SourceMethod::LoopDevice,
        "{sources:?}"
    );
    // A future kernel may mount files on a tmpfs directly.
    assert!(sources[1] == SourceMethod::LoopDevice || guest.kernel_at_least(7, 4)?, "{sources:?}");
    assert_eq!(idmap, guest.kernel_at_least(5, 19)?);
    assert_eq!(clones, guest.kernel_at_least(6, 15)?);
    assert_eq!(beneath, guest.kernel_at_least(6, 5)?);
    assert_eq!(verity, [true; 4]);
    Ok(())
}
