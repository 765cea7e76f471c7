//! The mounts of a root file system: the image, /etc, /var and the disk at /sysroot.
//!
//! The tree is built in a private mount namespace and cloned there. So the tree is attached in one step,
//! also before Linux 6.15, which attaches nothing to a detached mount.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{
    Access, AtFlags, CWD, Mode, OFlags, access, chmodat, fgetxattr, fsetxattr, mkdirat, openat,
};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MoveMountFlags, move_mount};
use sealmount_sys::mount_setattr_flags;

use crate::boot::config::{DirectoryMount, RootConfig};
use crate::boot::disk::{Deployment, Disk, LayerDirectories};
use crate::boot::error::SetupError;
use crate::kernel::fs_context::FsContext;
use crate::kernel::private_namespace::{attach_in_scratch, open_clone, open_recursive_clone};
use crate::kernel::{KernelError, Operation};
use crate::source::SizeLimit;

/// The directory of the scratch that the root is attached to.
const ROOT: &str = "root";
/// The directory of the scratch that the tmpfs is attached to.
const TMPFS: &str = "transient";
const SELINUX_LABEL: &str = "security.selinux";

/// Attaches a tmpfs to the scratch, for the layers that do not outlive the system.
///
/// After the policy of SELinux is loaded, the files of a tmpfs have the label of its root directory. The tmpfs
/// gets the label of the present root directory. Before that, SELinux accepts no label.
pub(crate) fn attach_tmpfs(size: Option<SizeLimit>) -> Result<(), KernelError> {
    let context = FsContext::open("tmpfs")?;
    context.set_string("source", "composefs-transient")?;
    context.set_string("mode", "0755")?;
    if let Some(size) = size {
        context.set_string("size", size.to_string())?;
    }
    if access("/sys/fs/selinux/enforce", Access::EXISTS).is_ok()
        && let Some(label) = label_of(Path::new("/"))
    {
        context.set_string("rootcontext", label)?;
    }
    context.create()?;
    attach(&context.mount(MountAttrFlags::empty())?, TMPFS)
}

/// Makes the directories of a layer in the tmpfs, and returns their paths.
pub(crate) fn transient_layer(name: &str) -> Result<LayerDirectories, KernelError> {
    let path = Path::new(TMPFS).join(name);
    let layer = LayerDirectories { upperdir: path.join("upper"), workdir: path.join("work") };
    for directory in [&path, &layer.upperdir, &layer.workdir] {
        let mode = Mode::from_raw_mode(0o755);
        mkdirat(CWD, directory, mode)
            .and_then(|()| chmodat(CWD, directory, mode, AtFlags::empty()))
            .map_err(|errno| KernelError::new(Operation::OpenState, errno).on(directory))?;
    }
    Ok(layer)
}

/// Attaches /sysroot, /etc and /var to the root, and clones the whole tree. The clone is detached.
pub(crate) fn build(
    root: &OwnedFd,
    disk: &Disk,
    deployment: &Deployment<'_>,
    config: &RootConfig,
) -> Result<OwnedFd, SetupError> {
    attach(root, ROOT)?;
    if let Some(directory) = directory_of(root, "sysroot")? {
        let clone = disk.clone_mount()?;
        mount_setattr_flags(&clone, MountAttrFlags::MOUNT_ATTR_RDONLY.bits(), 0)
            .map_err(|errno| failed(Operation::ChangeAttributes, "/sysroot", errno))?;
        attach_to(&clone, &directory, "/sysroot")?;
    }
    for (name, shown, mount) in [("etc", "/etc", config.etc), ("var", "/var", config.var)] {
        if mount == DirectoryMount::None {
            continue;
        }
        let directory =
            directory_of(root, name)?.ok_or(SetupError::DirectoryMissing { directory: name })?;
        let content = match mount {
            DirectoryMount::Bind => open_clone(deployment.directory(name)?)
                .map_err(|errno| failed(Operation::CloneTree, shown, errno))?,
            DirectoryMount::Overlay => overlay(name, &directory, &deployment.layer(name)?)?,
            _ => overlay(name, &directory, &transient_layer(name)?)?,
        };
        attach_to(&content, &directory, shown)?;
    }
    open_recursive_clone(root).map_err(|errno| failed(Operation::CloneTree, "/", errno).into())
}

/// Mounts an overlay of a directory of the root and a layer that receives changes.
fn overlay(
    name: &str,
    directory: &OwnedFd,
    layer: &LayerDirectories,
) -> Result<OwnedFd, SetupError> {
    copy_label(directory, &layer.upperdir)
        .map_err(|errno| KernelError::new(Operation::OpenState, errno).on(&layer.upperdir))?;
    let context = FsContext::open("overlay")?.for_image(Path::new("/").join(name).as_path());
    context.set_string("source", format!("composefs-{name}"))?;
    context.set_string("lowerdir", format!("{ROOT}/{name}"))?;
    context.set_string("upperdir", escaped(&layer.upperdir))?;
    context.set_string("workdir", escaped(&layer.workdir))?;
    context.create()?;
    Ok(context.mount(MountAttrFlags::empty())?)
}

/// Puts a backslash before each byte that overlayfs interprets.
fn escaped(path: &Path) -> OsString {
    let mut text = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        if b"\\:,".contains(byte) {
            text.push(b'\\');
        }
        text.push(*byte);
    }
    OsString::from_vec(text)
}

/// Gives a layer the SELinux label of the directory below it. The label of the layer decides.
fn copy_label(from: &OwnedFd, to: &Path) -> Result<(), Errno> {
    let readable = |directory: &OwnedFd| {
        openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    };
    let mut label = [0; 4096];
    let length = match fgetxattr(readable(from)?, SELINUX_LABEL, &mut label) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(()),
        result => result?,
    };
    let to = openat(CWD, to, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    fsetxattr(to, SELINUX_LABEL, &label[..length], rustix::fs::XattrFlags::empty())
}

/// Returns the SELinux label of a directory, if the directory has one.
fn label_of(path: &Path) -> Option<OsString> {
    let mut label = vec![0; 4096];
    let length = rustix::fs::getxattr(path, SELINUX_LABEL, &mut label).ok()?;
    label.truncate(length);
    // The kernel adds a NUL.
    let end = label.iter().position(|byte| *byte == 0).unwrap_or(label.len());
    label.truncate(end);
    Some(OsString::from_vec(label))
}

/// Opens a directory of the root, or returns `None` if the root has no such directory.
fn directory_of(root: &OwnedFd, name: &'static str) -> Result<Option<OwnedFd>, KernelError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(root, name, flags, Mode::empty()) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        result => result.map(Some).map_err(|errno| failed(Operation::StatDirectory, name, errno)),
    }
}

/// Attaches a detached mount to a new directory of the scratch.
fn attach(mount: &OwnedFd, directory: &'static str) -> Result<(), KernelError> {
    attach_in_scratch(directory, mount)
        .map_err(|errno| failed(Operation::AttachDirectory, directory, errno))
}

fn attach_to(mount: impl AsFd, directory: &OwnedFd, shown: &str) -> Result<(), KernelError> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", directory, "", flags)
        .map_err(|errno| failed(Operation::AttachDirectory, shown, errno))
}

fn failed(operation: Operation, path: &str, errno: Errno) -> KernelError {
    KernelError::new(operation, errno).on(path)
}
