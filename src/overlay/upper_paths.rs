//! The paths of an upper layer, for kernels that do not accept its descriptors (Linux < 6.13).

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, StatxFlags, openat, statat, statx};
use rustix::io::Errno;

use crate::kernel::private_namespace::open_clone;
use crate::kernel::{KernelError, Operation};
use crate::location::is_same_file;
use crate::overlay::layers::Upper;
use crate::overlay::reachable::{is_plain, path_to};

/// The directory of the scratch to which a clone of the parent directory is attached.
pub(crate) const PARENT: &str = "upper";

/// overlayfs unescapes both paths, and mount(2)'s parser splits at commas.
const SPECIAL: &[u8] = b"\\,";

/// The paths of upperdir and workdir.
///
/// overlayfs needs both directories on one mount. Two clones are two mounts. So the paths without a real path
/// lead through one clone of the parent directory of both.
pub(crate) struct UpperPaths {
    /// The real paths, if they lead to the layers. findmnt(8) then shows the real paths.
    real: Option<[PathBuf; 2]>,
    /// A clone of the mount, at the parent directory, and the paths in the scratch.
    parent: Option<(OwnedFd, [PathBuf; 2])>,
}

impl UpperPaths {
    /// Finds the paths, in the mount namespace that the layers were opened in.
    pub fn new(upper: &Upper) -> Result<UpperPaths, KernelError> {
        let layers = [&upper.upperdir, &upper.workdir];
        let real = layers.map(|layer| path_to(layer).filter(|path| is_plain(path, SPECIAL)));
        let real = match real {
            [Some(upperdir), Some(workdir)] => Some([upperdir, workdir]),
            _ => None,
        };
        let parent = clone_of_parent(layers.map(|layer| &layer.fd), real.as_ref());
        let parent = parent.map_err(|errno| {
            KernelError::new(Operation::AttachLayer, errno).on(upper.upperdir.path())
        })?;
        Ok(UpperPaths { real, parent })
    }

    /// Returns the clone of the parent directory, if there is one.
    pub fn parent(&self) -> Option<&OwnedFd> {
        self.parent.as_ref().map(|(clone, _)| clone)
    }

    /// Returns upperdir and workdir: the real paths, or paths in the scratch.
    pub fn get(&self, use_paths: bool) -> [&Path; 2] {
        let in_scratch = self.parent.as_ref().map(|(_, paths)| paths);
        let paths = match use_paths {
            true => self.real.as_ref().or(in_scratch),
            false => in_scratch.or(self.real.as_ref()),
        };
        paths.map_or([Path::new(""); 2], |[upperdir, workdir]| [upperdir, workdir])
    }
}

/// Clones the mount of two directories at their common parent. Returns the clone and the paths of the
/// directories in the scratch. Returns `None` if there is no such clone and the real paths can serve.
fn clone_of_parent(
    directories: [&OwnedFd; 2],
    real: Option<&[PathBuf; 2]>,
) -> Result<Option<(OwnedFd, [PathBuf; 2])>, Errno> {
    let [parent, other] = directories.map(parent_of);
    let parent = match (parent?, other?) {
        (Some(parent), Some(other)) if is_same_file(&parent, &other)? => parent,
        _ => return real.map(|_| None).ok_or(Errno::XDEV),
    };
    let mut paths = [PathBuf::new(), PathBuf::new()];
    for (number, directory) in directories.into_iter().enumerate() {
        let name = name_in(&parent, directory, real.and_then(|paths| paths[number].file_name()))?;
        paths[number] = Path::new(PARENT).join(OsStr::from_bytes(name.to_bytes()));
    }
    match open_clone(&parent) {
        // The layers were opened in another mount namespace, or their mount must not be cloned.
        Err(Errno::INVAL) if real.is_some() => Ok(None),
        clone => Ok(Some((clone?, paths))),
    }
}

/// Opens the parent of a directory. Returns `None` for the root of a mount.
fn parent_of(directory: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = openat(directory, "..", flags, Mode::empty())?;
    let mount_id = |fd: &OwnedFd| {
        statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).map(|statx| statx.stx_mnt_id)
    };
    let is_below = mount_id(&parent)? == mount_id(directory)? && !is_same_file(&parent, directory)?;
    Ok(is_below.then_some(parent))
}

/// Returns the name of a directory in its parent. The last part of the real path is not the name if it is
/// a symbolic link.
fn name_in(
    parent: &OwnedFd,
    directory: &OwnedFd,
    of_path: Option<&OsStr>,
) -> Result<CString, Errno> {
    let wanted = rustix::fs::fstat(directory)?;
    let is_name = |name: &CStr| match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(false),
        found => found.map(|found| (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)),
    };
    if let Some(name) = of_path.and_then(|name| CString::new(name.as_bytes()).ok())
        && is_name(&name)?
    {
        return Ok(name);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    for entry in Dir::new(openat(parent, ".", flags, Mode::empty())?)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_special = name.to_bytes().iter().any(|byte| SPECIAL.contains(byte));
        if ![c".", c".."].contains(&name) && !is_special && is_name(name)? {
            return Ok(name.to_owned());
        }
    }
    Err(Errno::NOENT)
}
