//! The pipeline: image → memory → source → EROFS → overlay → attach.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{MoveMountFlags, move_mount};

use crate::compression::{Compression, is_supported};
use crate::copy;
use crate::decompress;
use crate::digest::{Digest, Measured, measure};
use crate::erofs::{self, Source};
use crate::error::{DirectoryRole, Error, KernelError, NotVerity, Operation};
use crate::image::{self, CompressedImage, Header, Image, ImageError, Opened};
use crate::location::Location;
use crate::memory::SealedMemory;
use crate::objects;
use crate::options::{MountOptions, Verity};
use crate::overlay::{Layer, Overlay, Upper, check_layers};
use crate::procfs::Procfs;
use crate::step::{ObjectVerity, Progress, Step, VerifiedBy};

/// What is mounted: opened, checked and, where a digest was asked for, verified.
pub(crate) struct Prepared<'a> {
    pub source: Source,
    pub header: Header,
    objects: Vec<Layer<'a>>,
    upper: Option<Upper<'a>>,
    user_namespace: Option<OwnedFd>,
    verity: Verity,
    /// With `tryverity`, why nothing of it is enforced.
    unsupported: Option<NotVerity>,
}

impl MountOptions {
    /// Mounts an image with these options, without attaching it anywhere.
    ///
    /// Takes `CAP_SYS_ADMIN` in the initial user namespace. Everything that can be checked is
    /// checked before the kernel is asked for a mount.
    ///
    /// # Errors
    ///
    /// Every [`Error`] but [`Error::Directory`] for a mount point. Nothing is left behind then, nor
    /// where the process is killed half-way.
    pub fn mount(&self, image: impl Into<Location>) -> Result<DetachedMount, Error> {
        self.mount_with(image, &mut |_| {})
    }

    /// As [`mount`](Self::mount), and tells `steps` what was done.
    ///
    /// # Errors
    ///
    /// As [`mount`](Self::mount).
    pub fn mount_with(
        &self,
        image: impl Into<Location>,
        steps: &mut dyn FnMut(Step),
    ) -> Result<DetachedMount, Error> {
        let location = image.into();
        self.check()?;
        // Where something is to be verified, names must be those of what was.
        let is_verified = self.digest.is_some();
        let procfs = if is_verified { Procfs::open()? } else { None };
        let Prepared { source, header, objects, upper, user_namespace, verity, unsupported } =
            self.prepare(&location, procfs.as_ref(), steps)?;
        let name = location.name();
        let image = erofs::mount(&source, &header, &name, is_verified, procfs.as_ref(), steps)?;
        // The mount holds what it needs of it.
        drop(source);
        if let (Some(user_namespace), Some(idmap)) = (user_namespace, &self.idmap) {
            sealmount_sys::mount_setattr_idmap(&image, user_namespace)
                .map_err(|errno| KernelError::new(Operation::IdmapMount, errno).on(idmap.name()))?;
            steps(Step::Idmapped { user_namespace: idmap.name() });
        }

        let source = self.source_name(&location);
        let overlay = Overlay { image, objects, upper, options: self, source, name };
        let (fd, enforced) = overlay.mount(verity, steps)?;
        let verity = match (unsupported, self.verity) {
            (Some(reason), _) => ObjectVerity::UnsupportedByObjects(reason),
            (None, Some(Verity::Off)) => ObjectVerity::Noverity,
            (None, _) => enforced,
        };
        steps(Step::Verity(verity));
        Ok(DetachedMount { fd, verity })
    }

    /// All that is done before the kernel is asked for a mount of the image.
    pub(crate) fn prepare(
        &self,
        location: &Location,
        procfs: Option<&Procfs>,
        steps: &mut dyn FnMut(Step),
    ) -> Result<Prepared<'_>, Error> {
        let image = image::open(location, procfs)?;
        let objects = self.open_objects()?;
        let upper = self.upper.as_ref().map(Upper::open).transpose()?;
        check_layers(&objects, upper.as_ref())?;
        let user_namespace = self.idmap.as_ref().map(open_user_namespace).transpose()?;
        let (verity, unsupported) = self.check_objects(&objects)?;
        let (source, header) = match image {
            Opened::Plain(image, header) => {
                steps(image_opened(&image.name, &header, None));
                self.verified_source(image, steps)?
            }
            Opened::Compressed(image) => self.decompressed_source(image, steps)?,
        };
        Ok(Prepared { source, header, objects, upper, user_namespace, verity, unsupported })
    }

    fn open_objects(&self) -> Result<Vec<Layer<'_>>, Error> {
        self.basedirs.iter().map(|basedir| Layer::open(basedir, DirectoryRole::Objects)).collect()
    }

    /// What of fs-verity is to be enforced, given what the object directories can do; with
    /// `tryverity`, also why nothing is.
    fn check_objects(&self, objects: &[Layer]) -> Result<(Verity, Option<NotVerity>), Error> {
        let verity = self.effective_verity();
        if verity == Verity::Off {
            return Ok((verity, None));
        }
        for layer in objects {
            match (objects::check_verity(layer.location(), layer.fd()), verity) {
                (Ok(()), _) => {}
                // Objects that could have it and do not are wrong for tryverity as well.
                (
                    Err(Error::ObjectsNotVerity {
                        reason: reason @ NotVerity::Unsupported, ..
                    }),
                    Verity::Try,
                ) => {
                    return Ok((Verity::Off, Some(reason)));
                }
                (Err(error), _) => return Err(error),
            }
        }
        Ok((verity, None))
    }

    /// The image, or a copy of it: with the digest that was asked for.
    fn verified_source(
        &self,
        image: Image,
        steps: &mut dyn FnMut(Step),
    ) -> Result<(Source, Header), Error> {
        let mut verified_by = None;
        if let Some(digest) = self.digest {
            verified_by = match (check_measurement(&image, digest), self.copy) {
                (Ok(()), _) => Some(VerifiedBy::Kernel),
                // The copy's digest decides.
                (Err(_), Some(_)) => Some(VerifiedBy::Copy),
                (Err(error), None) => return Err(error),
            };
        }
        let copy = match self.copy {
            None => None,
            Some(memory) => {
                // What the kernel verifies when it is read need not be hashed.
                let unverified = self.digest.filter(|_| verified_by == Some(VerifiedBy::Copy));
                let progress = Progress::new(image.size, steps);
                Some(copy::into_memory(&image, memory, self.size, unverified, progress)?)
            }
        };
        let header = image.header_in(copy.as_ref().map_or(&image.file, SealedMemory::file))?;
        if let (Some(digest), Some(by)) = (self.digest, verified_by) {
            steps(Step::DigestVerified { digest, by });
        }
        match (copy, self.copy) {
            (Some(copy), Some(memory)) => {
                steps(Step::Copied { size: header.size(), memory });
                Ok((Source::Memory(copy), header))
            }
            _ => Ok((Source::File(image), header)),
        }
    }

    /// What is in a compressed image, in memory: with the digest that was asked for.
    fn decompressed_source(
        &self,
        image: CompressedImage,
        steps: &mut dyn FnMut(Step),
    ) -> Result<(Source, Header), Error> {
        let Some(memory) = self.copy else {
            // Not to be told to copy what cannot be copied.
            let problem = match is_supported(image.format) {
                true => ImageError::Compressed(image.format),
                false => ImageError::CompressionUnsupported(image.format),
            };
            return Err(Error::Image { image: image.name, problem });
        };
        let (copy, header) =
            decompress::into_memory(&image, memory, self.size, self.digest, steps)?;
        steps(image_opened(&image.name, &header, Some(image.format)));
        if let Some(digest) = self.digest {
            steps(Step::DigestVerified { digest, by: VerifiedBy::Copy });
        }
        steps(Step::Copied { size: header.size(), memory });
        Ok((Source::Memory(copy), header))
    }

    fn source_name(&self, image: &Location) -> OsString {
        match (&self.source, image) {
            (Some(source), _) => source.clone(),
            // As mount(8) hands it on, and compares it: without symbolic links.
            (None, Location::Path(path)) => std::fs::canonicalize(path)
                .or_else(|_| std::path::absolute(path))
                .unwrap_or_else(|_| path.clone())
                .into_os_string(),
            (None, Location::Fd(_)) => "composefs".into(),
        }
    }
}

fn image_opened(image: &Path, header: &Header, compression: Option<Compression>) -> Step {
    Step::ImageOpened {
        image: image.to_owned(),
        size: header.size(),
        compression,
        composefs_version: header.composefs_version,
    }
}

/// Whether the kernel's fs-verity vouches for the image.
fn check_measurement(image: &Image, expected: Digest) -> Result<(), Error> {
    let measured = measure(&image.file)
        .map_err(|errno| KernelError::new(Operation::MeasureVerity, errno).on(&image.name))?;
    let reason = match measured {
        Measured::Digest(found) if found == expected => return Ok(()),
        Measured::Digest(found) if found.algorithm() == expected.algorithm() => {
            return Err(Error::mismatch(&image.name, expected, found));
        }
        Measured::Digest(_) | Measured::OtherAlgorithm(_) => {
            NotVerity::OtherAlgorithm(expected.algorithm())
        }
        Measured::NotEnabled => NotVerity::NotEnabled,
        Measured::Unsupported => NotVerity::Unsupported,
    };
    Err(Error::ImageNotVerity { image: image.name.clone(), reason })
}

fn open_user_namespace(location: &Location) -> Result<OwnedFd, Error> {
    let namespace = match location {
        Location::Path(path) => {
            openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
        }
        Location::Fd(fd) => rustix::io::fcntl_dupfd_cloexec(fd, 0),
    }
    .map_err(|errno| KernelError::new(Operation::OpenUserNamespace, errno).on(location.name()))?;
    if !sealmount_sys::is_user_namespace(&namespace) {
        return Err(Error::NotUserNamespace { path: location.name() });
    }
    Ok(namespace)
}

/// A mount that is attached nowhere: nobody sees it, and dropping it unmounts it.
///
/// Its descriptor is one of [fsmount(2)](https://man7.org/linux/man-pages/man2/fsmount.2.html): it
/// can be handed to another process, opened files relative to, or attached with move_mount(2).
#[derive(Debug)]
pub struct DetachedMount {
    fd: OwnedFd,
    verity: ObjectVerity,
}

impl DetachedMount {
    /// Attaches the mount to a directory with
    /// [move_mount(2)](https://man7.org/linux/man-pages/man2/move_mount.2.html), on top of what is
    /// mounted there. To find out before the work is done that the directory is missing, open it first
    /// ([`open_mount_point`]).
    ///
    /// # Errors
    ///
    /// [`Error::Directory`] where the mount point is missing or not a directory;
    /// [`Error::Kernel`]. The mount is gone then.
    pub fn attach(self, mount_point: impl Into<Location>) -> Result<(), Error> {
        let mount_point = mount_point.into();
        let directory = open_mount_point(&mount_point)?;
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&self.fd, "", &directory, "", flags).map_err(|errno| {
            KernelError::new(Operation::Attach, errno).on(mount_point.name()).into()
        })
    }

    /// Whether the objects are verified when they are read.
    pub fn verity(&self) -> ObjectVerity {
        self.verity
    }

    /// The descriptor of the mount, which goes when it is closed.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl From<DetachedMount> for OwnedFd {
    fn from(mount: DetachedMount) -> OwnedFd {
        mount.into_fd()
    }
}

impl AsFd for DetachedMount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens a directory to attach a mount to: find out early that it is missing, and attach to this
/// one whatever its path names later.
///
/// # Errors
///
/// [`Error::Directory`]
pub fn open_mount_point(mount_point: impl Into<Location>) -> Result<OwnedFd, Error> {
    mount_point.into().open_directory(DirectoryRole::MountPoint)
}

/// Enters a mount namespace (/proc/PID/ns/mnt) with
/// [setns(2)](https://man7.org/linux/man-pages/man2/setns.2.html): the paths of a mount are then those of
/// the namespace, and it is attached there. Root and working directory become the namespace's root.
///
/// # Errors
///
/// [`Error::Kernel`]; `EINVAL` where the process has several threads, or this is no mount namespace.
pub fn enter_mount_namespace(namespace: impl AsRef<Path>) -> Result<(), Error> {
    let namespace = namespace.as_ref();
    openat(CWD, namespace, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
        .and_then(sealmount_sys::enter_mount_namespace)
        .map_err(|errno| KernelError::new(Operation::EnterNamespace, errno).on(namespace).into())
}
