//! Layers by name, for kernels that do not take them by descriptor: in a mount namespace that nobody
//! else sees, and that is gone with the thread that made it, also when the process is killed.
//!
//! In that namespace a tmpfs, the scratch, lies on top of the root directory and is the working
//! directory. The layers that have no path of their own are attached to directories in it, whose
//! names are what overlayfs is told.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    CWD, Dir, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags, fchmod, fchown, fgetxattr,
    flistxattr, fsetxattr, fstat, futimens, mkdirat, mknodat, openat,
};
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::error::{KernelError, Operation};
use crate::fs_context::{FsContext, STRING_MAX};
use crate::location::is_same_file;
use crate::overlay::{Layer, Overlay};
use crate::procfs::Procfs;
use crate::step::Rung;
use crate::thread::in_thread;

const IMAGE: &str = "image";
const WHITEOUTS: &str = "whiteouts";

/// Runs `work` in a thread with a mount namespace of its own.
///
/// `work` is told whether the paths of the caller still lead where they did. They do not where the
/// caller's root is a directory that nothing is mounted on (a chroot): the thread has then gone to the
/// root of the namespace, because propagation is a matter of mounts and their roots.
pub(crate) fn in_private_namespace<T: Send>(
    work: impl FnOnce(bool) -> Result<T, KernelError> + Send,
) -> Result<T, KernelError> {
    let failed = |errno| KernelError::new(Operation::PrivateNamespace, errno);
    in_thread(|| {
        sealmount_sys::unshare_mount_namespace().map_err(failed)?;
        // Or what is attached would propagate to where the namespace was copied from.
        match sealmount_sys::mount_setattr_private() {
            Err(Errno::INVAL) => {
                Procfs::require()?
                    .open_mount_namespace()
                    .and_then(sealmount_sys::enter_mount_namespace)
                    .and_then(|()| sealmount_sys::mount_setattr_private())
                    .map_err(failed)?;
                work(false)
            }
            result => {
                result.map_err(failed)?;
                work(true)
            }
        }
    })
}

/// What a layer is called. It has one of the two names at least.
struct Names {
    /// Its real path, which is what people want to see in findmnt(8), if one leads to it.
    path: Option<PathBuf>,
    /// A directory of the scratch, that a clone of its mount is attached to.
    directory: String,
    clone: Option<OwnedFd>,
}

impl Names {
    /// To be called in the mount namespace that the layer was opened in.
    fn new(layer: &Layer, directory: String) -> Result<Names, KernelError> {
        let path = path_to(layer);
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let clone = match open_tree(layer.fd(), "", flags) {
            Ok(clone) => Some(clone),
            // It was opened in a mount namespace that is not this one, or must not be cloned.
            Err(Errno::INVAL) if path.is_some() => None,
            Err(errno) => {
                let error = KernelError::new(Operation::AttachLayer, errno);
                return Err(error.on(layer.location().name()));
            }
        };
        Ok(Names { path, directory, clone })
    }

    /// The path, if there is one and it holds no byte that would be read as more than a part of it.
    fn path_without(&self, special: &[u8]) -> Option<&Path> {
        let bytes = self.path.as_ref()?.as_os_str().as_bytes();
        if bytes.iter().any(|byte| special.contains(byte)) { None } else { self.path.as_deref() }
    }

    /// The same, or the directory.
    fn name(&self, special: &[u8], use_paths: bool) -> &Path {
        let path = self.path_without(special).filter(|_| use_paths);
        path.unwrap_or(Path::new(&self.directory))
    }
}

/// The layers of an overlay and their names.
pub(crate) struct NamedLayers<'a> {
    image: &'a OwnedFd,
    objects: Vec<Names>,
    /// upperdir and workdir
    upper: Option<[Names; 2]>,
    /// What must not show in the root of the overlay.
    hidden: BTreeSet<CString>,
}

impl<'a> NamedLayers<'a> {
    /// To be called in the mount namespace that the layers were opened in.
    pub fn new(overlay: &'a Overlay, rungs: &[Rung]) -> Result<NamedLayers<'a>, KernelError> {
        let objects = overlay.objects.iter().enumerate();
        let objects = objects.map(|(number, layer)| Names::new(layer, number.to_string()));
        let upper = match &overlay.upper {
            Some(upper) => Some([
                Names::new(&upper.upperdir, "upper".into())?,
                Names::new(&upper.workdir, "work".into())?,
            ]),
            None => None,
        };
        let hidden = match rungs.contains(&Rung::LowerLayersInOneString) {
            true => to_hide(overlay).map_err(whiteouts_error)?,
            false => BTreeSet::new(),
        };
        let objects = objects.collect::<Result<_, _>>()?;
        Ok(NamedLayers { image: &overlay.image, objects, upper, hidden })
    }

    /// Attaches the layers to directories of the scratch. To be called in the namespace that the
    /// overlay is made in; changes the working directory of the thread.
    pub fn attach(&self) -> Result<(), KernelError> {
        let failed = |errno| KernelError::new(Operation::AttachLayer, errno);
        let scratch = FsContext::open("tmpfs")?;
        scratch.create()?;
        let scratch = scratch.mount(MountAttrFlags::empty())?;
        // Paths do not lead through what is mounted on the root: they start below it.
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&scratch, "", CWD, "/", flags).map_err(failed)?;
        rustix::process::fchdir(&scratch).map_err(failed)?;

        attach_to(IMAGE, self.image).map_err(failed)?;
        for names in self.objects.iter().chain(self.upper.iter().flatten()) {
            if let Some(clone) = &names.clone {
                attach_to(&names.directory, clone).map_err(failed)?;
            }
        }
        if !self.hidden.is_empty() {
            self.make_whiteouts().map_err(whiteouts_error)?;
        }
        Ok(())
    }

    /// Sets the options of a rung; with real paths where they lead to the layers.
    pub fn set(&self, context: &FsContext, rung: Rung, use_paths: bool) -> Result<(), KernelError> {
        if rung == Rung::LayersByPath {
            context.set_string("lowerdir+", IMAGE)?;
            for names in &self.objects {
                context.set_string("datadir+", names.name(b"", use_paths))?;
            }
        } else {
            context.set_string("lowerdir", self.lowerdir(rung, use_paths))?;
        }
        if let Some([upperdir, workdir]) = &self.upper {
            // overlayfs unescapes these, and the comma belongs to mount(2)'s parser.
            context.set_string("upperdir", upperdir.name(b"\\,", use_paths))?;
            context.set_string("workdir", workdir.name(b"\\,", use_paths))?;
        }
        Ok(())
    }

    /// All lower layers in one string: with paths if it is not too long then.
    fn lowerdir(&self, rung: Rung, use_paths: bool) -> OsString {
        let separator = if rung == Rung::LayersInOneString { "::" } else { ":" };
        let join = |name: &dyn Fn(&Names) -> PathBuf| {
            let mut lowerdir = OsString::new();
            if !self.hidden.is_empty() {
                lowerdir.push(WHITEOUTS);
                lowerdir.push(":");
            }
            lowerdir.push(IMAGE);
            for names in &self.objects {
                lowerdir.push(separator);
                lowerdir.push(name(names));
            }
            lowerdir
        };
        let with_paths = join(&|names| names.name(b"\\:,", use_paths).to_owned());
        match with_paths.len() <= STRING_MAX {
            true => with_paths,
            false => join(&|names| PathBuf::from(&names.directory)),
        }
    }

    /// Makes a layer to lie above the image. A whiteout hides what is below it in the overlay, and
    /// does not come in the way of a redirect, which looks for the object below the image. The root
    /// of the uppermost layer gives that of the overlay its attributes.
    fn make_whiteouts(&self) -> Result<(), Errno> {
        mkdirat(CWD, WHITEOUTS, Mode::RWXU)?;
        let layer = open_readable(CWD, WHITEOUTS)?;
        for name in &self.hidden {
            mknodat(&layer, name.as_c_str(), FileType::CharacterDevice, Mode::empty(), 0)?;
        }
        copy_attributes(&open_readable(self.image, ".")?, &layer)
    }
}

/// Without data-only layers (before 6.5) the objects lie in the overlay's root, below the image. V1
/// images hide them with whiteouts, V2 images do not: the names that need hiding.
fn to_hide(overlay: &Overlay) -> Result<BTreeSet<CString>, Errno> {
    let in_image = entries(&overlay.image)?;
    let prefixes = (0..=255u8).flat_map(|byte| CString::new(format!("{byte:02x}")));
    let mut names: BTreeSet<CString> = prefixes.collect();
    for layer in &overlay.objects {
        names.extend(entries(layer.fd())?);
    }
    Ok(names.difference(&in_image).cloned().collect())
}

fn whiteouts_error(errno: Errno) -> KernelError {
    KernelError::new(Operation::MakeWhiteouts, errno)
}

/// The path that a layer was given by, where that still leads to it, and fsconfig(2) takes one of
/// that length.
fn path_to(layer: &Layer) -> Option<PathBuf> {
    let path = layer.location().absolute_path()?;
    let reopened = openat(CWD, &path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let fits = path.as_os_str().len() <= STRING_MAX;
    (fits && is_same_file(reopened, layer.fd()).unwrap_or(false)).then_some(path)
}

fn attach_to(directory: &str, mount: &OwnedFd) -> Result<(), Errno> {
    mkdirat(CWD, directory, Mode::RWXU)?;
    move_mount(mount, "", CWD, directory, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

fn open_readable(directory: impl AsFd, path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(directory, path, flags, Mode::empty())
}

/// The names in a directory.
fn entries(directory: &OwnedFd) -> Result<BTreeSet<CString>, Errno> {
    let is_dots = |name: &CStr| name == c"." || name == c"..";
    Dir::new(open_readable(directory, ".")?)?
        .map(|entry| Ok(entry?.file_name().to_owned()))
        .filter(|name| !name.as_deref().is_ok_and(is_dots))
        .collect()
}

/// Owner, mode, times and extended attributes of one directory for another.
fn copy_attributes(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    let mut names = vec![0; 64 * 1024];
    let length = flistxattr(from, &mut names)?;
    for name in names[..length].split_inclusive(|byte| *byte == 0) {
        let name = CStr::from_bytes_with_nul(name).map_err(|_| Errno::INVAL)?;
        if name.to_bytes().starts_with(b"trusted.overlay.") {
            continue;
        }
        let mut value = vec![0; 64 * 1024];
        let length = fgetxattr(from, name, &mut value)?;
        fsetxattr(to, name, &value[..length], XattrFlags::empty())?;
    }
    let stat = fstat(from)?;
    fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
    let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    futimens(
        to,
        &Timestamps {
            last_access: time(stat.st_atime, stat.st_atime_nsec as _),
            last_modification: time(stat.st_mtime, stat.st_mtime_nsec as _),
        },
    )
}
