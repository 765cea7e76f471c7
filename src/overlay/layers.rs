//! The directories that become layers.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, FsWord, StatxFlags, fstat, fstatfs, statx};

use crate::kernel::{KernelError, Operation};
use crate::location::{DirectoryRole, Location};
use crate::objects::store::Store;
use crate::overlay::error::OverlayError;
use crate::overlay::options::UpperLayer;

/// The magic number of overlayfs, of statfs(2).
const OVERLAYFS_SUPER_MAGIC: FsWord = 0x794c_7630;

/// A directory that becomes a layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub location: Location,
    /// Opened with O_PATH, which fsconfig(2) accepts from Linux 6.13. An older kernel fails with EBADF, which
    /// has no other cause.
    pub fd: OwnedFd,
}

impl Layer {
    pub fn open(location: &Location, role: DirectoryRole) -> Result<Layer, OverlayError> {
        Ok(Layer { location: location.clone(), fd: location.open_directory(role)? })
    }

    pub fn path(&self) -> PathBuf {
        self.location.display_path()
    }

    /// Returns whether the directory is on an overlayfs, as far as statfs(2) can tell.
    pub fn is_on_overlay(&self) -> bool {
        fstatfs(&self.fd).is_ok_and(|statfs| statfs.f_type == OVERLAYFS_SUPER_MAGIC)
    }
}

/// An upperdir and its workdir.
#[derive(Debug)]
pub(crate) struct Upper {
    pub upperdir: Layer,
    pub workdir: Layer,
}

impl Upper {
    pub fn open(upper: &UpperLayer) -> Result<Upper, OverlayError> {
        Ok(Upper {
            upperdir: Layer::open(&upper.upperdir, DirectoryRole::Upper)?,
            workdir: Layer::open(&upper.workdir, DirectoryRole::Work)?,
        })
    }
}

/// The layers of an overlay, except the image.
#[derive(Debug)]
pub(crate) struct Layers {
    pub objects: Vec<Layer>,
    pub upper: Option<Upper>,
}

impl Layers {
    /// Returns the paths of the object directories, for messages.
    pub fn object_paths(&self) -> Vec<PathBuf> {
        self.objects.iter().map(Layer::path).collect()
    }

    /// Returns whether a directory is on an overlayfs.
    pub fn are_on_overlay(&self) -> bool {
        let upper = self.upper.iter().map(|upper| &upper.upperdir);
        self.objects.iter().chain(upper).any(Layer::is_on_overlay)
    }

    /// Returns the object directories, for a search by the rules of overlayfs.
    pub fn store(&self) -> Result<Store<'_>, KernelError> {
        Store::new(self.objects.iter().map(|layer| layer.fd.as_fd()))
            .map_err(|errno| KernelError::new(Operation::StatDirectory, errno))
    }

    /// Rejects layers for which overlayfs fails with an ambiguous errno: one directory for two layers (ELOOP,
    /// EINVAL), and a workdir on another mount (EINVAL).
    pub fn check(&self) -> Result<(), OverlayError> {
        let failed = |layer: &Layer, errno| {
            KernelError::new(Operation::StatDirectory, errno).on(layer.path())
        };
        let objects = self.objects.iter().map(|layer| (DirectoryRole::Objects, layer));
        let mut layers: Vec<_> = objects.collect();
        if let Some(Upper { upperdir, workdir }) = &self.upper {
            layers.extend([(DirectoryRole::Upper, upperdir), (DirectoryRole::Work, workdir)]);
            let mount_id = |layer: &Layer| {
                let fd = layer.fd.as_fd();
                statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
                    .map(|statx| statx.stx_mnt_id)
                    .map_err(|errno| failed(layer, errno))
            };
            if mount_id(upperdir)? != mount_id(workdir)? {
                let (upperdir, workdir) = (upperdir.path(), workdir.path());
                return Err(OverlayError::WorkdirOnOtherMount { upperdir, workdir });
            }
        }
        let mut seen: Vec<(_, DirectoryRole, &Layer)> = Vec::new();
        for (role, layer) in layers {
            let stat = fstat(&layer.fd).map_err(|errno| failed(layer, errno))?;
            let identity = (stat.st_dev, stat.st_ino);
            if let Some((_, other_role, other)) = seen.iter().find(|(id, ..)| *id == identity) {
                let (path, other_path) = (layer.path(), other.path());
                let other_role = *other_role;
                return Err(OverlayError::SameDirectory { role, path, other_role, other_path });
            }
            seen.push((identity, role, layer));
        }
        Ok(())
    }
}
