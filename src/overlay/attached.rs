//! Layers by path, for kernels that do not accept detached mounts by descriptor (Linux < 6.15). They are
//! attached in a private mount namespace, which ends with its thread, also if the process is killed.
//!
//! In that namespace a tmpfs, the scratch, lies on top of the root directory and is the working
//! directory. Layers without a path of their own are attached to directories of the scratch. overlayfs gets
//! the names of these directories.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    CWD, Dir, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags, fchmod, fchown, fgetxattr,
    flistxattr, fsetxattr, fstat, futimens, mkdirat, mknodat, openat,
};
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;

use crate::kernel::fs_context::{FsContext, STRING_MAX};
use crate::kernel::mount_table::{IMAGE, WHITEOUTS};
use crate::kernel::private_namespace::{attach_in_scratch, enter_scratch, open_clone};
use crate::kernel::{KernelError, Operation};
use crate::overlay::layers::{Layer, Layers};
use crate::overlay::method::LayerMethod;
use crate::overlay::reachable::{is_plain, path_to};
use crate::overlay::upper_paths::{PARENT, UpperPaths};

/// The two paths of a layer. At least one of them leads to the layer.
struct LayerPath {
    /// The real path, if it leads to the layer. findmnt(8) then shows the real path.
    path: Option<PathBuf>,
    /// A directory of the scratch, to which a clone of the layer's mount is attached.
    directory: String,
    clone: Option<OwnedFd>,
}

impl LayerPath {
    /// Finds the paths of a layer, in the mount namespace that the layer was opened in.
    fn new(layer: &Layer, directory: String) -> Result<LayerPath, KernelError> {
        let path = path_to(layer);
        let clone = match open_clone(&layer.fd) {
            Ok(clone) => Some(clone),
            // The layer was opened in another mount namespace, or its mount must not be cloned.
            Err(Errno::INVAL) if path.is_some() => None,
            Err(errno) => {
                let error = KernelError::new(Operation::AttachLayer, errno);
                return Err(error.on(layer.path()));
            }
        };
        Ok(LayerPath { path, directory, clone })
    }

    /// Returns the real path, or the directory of the scratch.
    fn path(&self, special: &[u8], use_paths: bool) -> &Path {
        let path = self.path.as_deref().filter(|path| use_paths && is_plain(path, special));
        path.unwrap_or(Path::new(&self.directory))
    }
}

/// The layers of an overlay and their paths.
pub(crate) struct AttachedLayers<'a> {
    /// The detached mount of the image.
    image: &'a OwnedFd,
    objects: Vec<LayerPath>,
    upper: Option<UpperPaths>,
    /// The names that must not show in the root of the overlay.
    hidden: BTreeSet<CString>,
}

impl<'a> AttachedLayers<'a> {
    /// Finds the paths of the layers, in the mount namespace that they were opened in.
    pub fn new(
        image: &'a OwnedFd,
        layers: &Layers,
        methods: &[LayerMethod],
    ) -> Result<AttachedLayers<'a>, KernelError> {
        let objects = layers.objects.iter().enumerate();
        let objects = objects.map(|(number, layer)| LayerPath::new(layer, number.to_string()));
        let upper = layers.upper.as_ref().map(UpperPaths::new).transpose()?;
        let hidden = match methods.contains(&LayerMethod::LowerOnly) {
            true => names_to_hide(image, layers).map_err(whiteouts_error)?,
            false => BTreeSet::new(),
        };
        let objects = objects.collect::<Result<_, _>>()?;
        Ok(AttachedLayers { image, objects, upper, hidden })
    }

    /// Attaches the layers to directories of the scratch, in the namespace where the overlay is made.
    /// Changes the working directory of the thread.
    pub fn attach(&self) -> Result<(), KernelError> {
        let failed = |errno| KernelError::new(Operation::AttachLayer, errno);
        enter_scratch(Operation::AttachLayer)?;
        attach_in_scratch(IMAGE, self.image).map_err(failed)?;
        for paths in &self.objects {
            if let Some(clone) = &paths.clone {
                attach_in_scratch(&paths.directory, clone).map_err(failed)?;
            }
        }
        if let Some(parent) = self.upper.as_ref().and_then(UpperPaths::parent) {
            attach_in_scratch(PARENT, parent).map_err(failed)?;
        }
        if !self.hidden.is_empty() {
            self.make_whiteouts().map_err(whiteouts_error)?;
        }
        Ok(())
    }

    /// Sets the options of a method, with real paths if they lead to the layers.
    pub fn set(
        &self,
        context: &FsContext,
        method: LayerMethod,
        use_paths: bool,
    ) -> Result<(), KernelError> {
        if method == LayerMethod::Paths {
            context.set_string("lowerdir+", IMAGE)?;
            for paths in &self.objects {
                context.set_string("datadir+", paths.path(b"", use_paths))?;
            }
        } else {
            context.set_string("lowerdir", self.lowerdir(method, use_paths))?;
        }
        if let Some(upper) = &self.upper {
            let [upperdir, workdir] = upper.get(use_paths);
            context.set_string("upperdir", upperdir)?;
            context.set_string("workdir", workdir)?;
        }
        Ok(())
    }

    /// Returns all lower layers in one string, with real paths if they fit.
    fn lowerdir(&self, method: LayerMethod, use_paths: bool) -> OsString {
        let separator = if method == LayerMethod::OneString { "::" } else { ":" };
        let join = |path: &dyn Fn(&LayerPath) -> PathBuf| {
            let mut lowerdir = OsString::new();
            if !self.hidden.is_empty() {
                lowerdir.push(WHITEOUTS);
                lowerdir.push(":");
            }
            lowerdir.push(IMAGE);
            for paths in &self.objects {
                lowerdir.push(separator);
                lowerdir.push(path(paths));
            }
            lowerdir
        };
        let with_paths = join(&|paths| paths.path(b"\\:,", use_paths).to_owned());
        match with_paths.len() <= STRING_MAX {
            true => with_paths,
            false => join(&|paths| PathBuf::from(&paths.directory)),
        }
    }

    /// Makes a layer above the image. A whiteout hides its name in the layers below. It does not stop a
    /// redirect, which looks for the object below the image. The root of the uppermost layer gives the root
    /// of the overlay its attributes.
    fn make_whiteouts(&self) -> Result<(), Errno> {
        mkdirat(CWD, WHITEOUTS, Mode::RWXU)?;
        let layer = open_readable(CWD, WHITEOUTS)?;
        for name in &self.hidden {
            mknodat(&layer, name.as_c_str(), FileType::CharacterDevice, Mode::empty(), 0)?;
        }
        copy_attributes(&open_readable(self.image, ".")?, &layer)
    }
}

/// Returns the names to hide. Without data-only layers (before Linux 6.5) the objects lie in the overlay's
/// root, below the image. V1 images hide them with whiteouts, V2 images do not.
fn names_to_hide(image: &OwnedFd, layers: &Layers) -> Result<BTreeSet<CString>, Errno> {
    let in_image = entries(image)?;
    let prefixes = (0..=255u8).flat_map(|byte| CString::new(format!("{byte:02x}")));
    let mut names: BTreeSet<CString> = prefixes.collect();
    for layer in &layers.objects {
        names.extend(entries(&layer.fd)?);
    }
    Ok(names.difference(&in_image).cloned().collect())
}

fn whiteouts_error(errno: Errno) -> KernelError {
    KernelError::new(Operation::MakeWhiteouts, errno)
}

fn open_readable(directory: impl AsFd, path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(directory, path, flags, Mode::empty())
}

/// Returns the names in a directory.
fn entries(directory: &OwnedFd) -> Result<BTreeSet<CString>, Errno> {
    let is_dots = |name: &CStr| name == c"." || name == c"..";
    Dir::new(open_readable(directory, ".")?)?
        .map(|entry| Ok(entry?.file_name().to_owned()))
        .filter(|name| !name.as_deref().is_ok_and(is_dots))
        .collect()
}

/// Copies owner, mode, times and extended attributes of a directory to another directory.
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
