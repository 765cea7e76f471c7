//! The overlayfs that joins image and objects: the ladder of its layers.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fs::{AtFlags, StatxFlags, fstat, statx};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::error::{DirectoryRole, Error, KernelError, Operation};
use crate::fs_context::{FsContext, STRING_MAX};
use crate::location::Location;
use crate::named_layers::{NamedLayers, in_private_namespace};
use crate::options::{Atime, MountOptions, SuperblockFlags, UpperLayer, Verity};
use crate::step::{ObjectVerity, Rung, Step};

/// A directory that becomes a layer.
pub(crate) struct Layer<'a> {
    location: &'a Location,
    /// Opened with O_PATH. A kernel whose fsconfig takes layers by descriptor takes such ones; any
    /// other answers EBADF, which can have no other cause.
    fd: OwnedFd,
}

impl<'a> Layer<'a> {
    pub fn open(location: &'a Location, role: DirectoryRole) -> Result<Layer<'a>, Error> {
        Ok(Layer { location, fd: location.open_directory(role)? })
    }

    pub fn location(&self) -> &Location {
        self.location
    }

    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

/// An upperdir and its workdir.
pub(crate) struct Upper<'a> {
    pub upperdir: Layer<'a>,
    pub workdir: Layer<'a>,
}

impl<'a> Upper<'a> {
    pub fn open(upper: &'a UpperLayer) -> Result<Upper<'a>, Error> {
        Ok(Upper {
            upperdir: Layer::open(&upper.upperdir, DirectoryRole::Upper)?,
            workdir: Layer::open(&upper.workdir, DirectoryRole::Work)?,
        })
    }
}

/// Finds what overlayfs refuses with an errno that says little, and at best a line in the kernel's log:
/// one directory for two layers (ELOOP, EINVAL), and a workdir on another mount (EINVAL).
pub(crate) fn check_layers(objects: &[Layer], upper: Option<&Upper>) -> Result<(), Error> {
    let failed = |layer: &Layer, errno| {
        KernelError::new(Operation::LookAtDirectory, errno).on(layer.location.name())
    };
    let mut layers: Vec<_> = objects.iter().map(|layer| (DirectoryRole::Objects, layer)).collect();
    if let Some(Upper { upperdir, workdir }) = upper {
        layers.extend([(DirectoryRole::Upper, upperdir), (DirectoryRole::Work, workdir)]);
        let mount_id = |layer: &Layer| {
            let fd = layer.fd.as_fd();
            statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
                .map(|statx| statx.stx_mnt_id)
                .map_err(|errno| failed(layer, errno))
        };
        if mount_id(upperdir)? != mount_id(workdir)? {
            let (upperdir, workdir) = (upperdir.location.name(), workdir.location.name());
            return Err(Error::WorkOnOtherMount { upperdir, workdir });
        }
    }
    let mut seen: Vec<(_, DirectoryRole, &Layer)> = Vec::new();
    for (role, layer) in layers {
        let stat = fstat(&layer.fd).map_err(|errno| failed(layer, errno))?;
        let identity = (stat.st_dev, stat.st_ino);
        if let Some((_, other_role, other)) = seen.iter().find(|(other, ..)| *other == identity) {
            let (path, other_path) = (layer.location.name(), other.location.name());
            return Err(Error::SameDirectory { role, path, other_role: *other_role, other_path });
        }
        seen.push((identity, role, layer));
    }
    Ok(())
}

/// What the overlay is made of.
pub(crate) struct Overlay<'a> {
    /// The detached mount of the image.
    pub image: OwnedFd,
    pub objects: Vec<Layer<'a>>,
    pub upper: Option<Upper<'a>>,
    pub options: &'a MountOptions,
    /// What mountinfo shows as the source.
    pub source: OsString,
    /// What messages call the image.
    pub name: PathBuf,
}

impl Overlay<'_> {
    /// Mounts the overlay, detached.
    ///
    /// The ladder. Detached layers by descriptor: 6.15. Before, EINVAL for the superblock ("failed
    /// to clone lowerpath") where descriptors are taken (6.13), EBADF for O_PATH descriptors where
    /// overlayfs parses its own options (6.5), EOPNOTSUPP where it does not. From there on down the
    /// layers must be attached, and have names, in the mount namespace of the caller.
    ///
    /// `lowerdir+` and `datadir+`: 6.7. Before, EINVAL for an unknown option, and one string.
    /// Data-only layers in it: 6.5, with overlayfs' own parser.
    pub fn mount(
        &self,
        verity: Verity,
        steps: &mut dyn FnMut(Step),
    ) -> Result<(OwnedFd, ObjectVerity), Error> {
        let rung = Rung::LayersByDescriptor;
        let by_descriptor = |context: &FsContext| self.set_by_descriptor(context);
        let missing = match self.create_with(verity, &by_descriptor) {
            Err(Error::Kernel(error)) if is_missing(rung, &error) => *error,
            result => return taken(result, rung, steps),
        };
        let named_rungs: &[Rung] = match missing.errno {
            Errno::OPNOTSUPP => &[Rung::LowerLayersInOneString],
            _ => &[Rung::LayersByPath, Rung::LayersInOneString],
        };
        steps(Step::NotTaken { rung, error: missing });

        let layers = NamedLayers::new(self, named_rungs)?;
        let (not_taken, rung, result) = in_private_namespace(|use_paths| {
            layers.attach()?;
            let mut not_taken = Vec::new();
            for rung in named_rungs {
                let by_name = |context: &FsContext| layers.set(context, *rung, use_paths);
                match self.create_with(verity, &by_name) {
                    Err(Error::Kernel(error)) if is_missing(*rung, &error) => {
                        not_taken.push(Step::NotTaken { rung: *rung, error: *error });
                    }
                    result => return Ok((not_taken, *rung, result)),
                }
            }
            // Not reached: the last rung is never missing.
            Err(KernelError::new(Operation::CreateSuperblock, Errno::OPNOTSUPP).on("overlay"))
        })?;
        not_taken.into_iter().for_each(&mut *steps);
        taken(result, rung, steps)
    }

    /// Makes the overlay with as much of fs-verity as is asked for and can be had.
    ///
    /// Whether overlayfs knows `verity=require` (6.6) shows in EINVAL: for the option or, where it
    /// parses them all at the end, for the superblock. That this is the reason shows in that it
    /// works without.
    fn create_with(
        &self,
        verity: Verity,
        set_layers: &dyn Fn(&FsContext) -> Result<(), KernelError>,
    ) -> Result<(OwnedFd, ObjectVerity), Error> {
        if verity == Verity::Off {
            return Ok((self.create(false, set_layers)?, ObjectVerity::Off));
        }
        let error = match self.create(true, set_layers) {
            Ok(mount) => return Ok((mount, ObjectVerity::Enforced)),
            Err(error) => error,
        };
        if !may_be_for_verity(&error) {
            return Err(error.into());
        }
        match (self.create(false, set_layers), verity) {
            (Ok(mount), Verity::Try) => Ok((mount, ObjectVerity::UnsupportedByOverlay)),
            (Ok(_), _) => Err(Error::VerityUnsupported),
            (Err(_), _) => Err(error.into()),
        }
    }

    fn set_by_descriptor(&self, context: &FsContext) -> Result<(), KernelError> {
        let set = |key, layer: &Layer| context.set_fd(key, &layer.fd, &layer.location.name());
        context.set_fd("lowerdir+", &self.image, &self.name)?;
        self.objects.iter().try_for_each(|layer| set("datadir+", layer))?;
        if let Some(upper) = &self.upper {
            set("upperdir", &upper.upperdir)?;
            set("workdir", &upper.workdir)?;
        }
        Ok(())
    }

    fn create(
        &self,
        verity: bool,
        set_layers: &dyn Fn(&FsContext) -> Result<(), KernelError>,
    ) -> Result<OwnedFd, KernelError> {
        let context = FsContext::open("overlay")?.of(&self.name);
        // First: it is here that most kernels differ.
        set_layers(&context)?;
        // A path that is too long for fsconfig is too long for a line of findmnt as well.
        let source = Some(&self.source).filter(|source| source.len() <= STRING_MAX);
        context.set_string("source", source.map_or("composefs".as_ref(), OsString::as_os_str))?;
        context.set_string("metacopy", "on")?;
        context.set_string("redirect_dir", "on")?;
        if verity {
            context.set_string("verity", "require")?;
        }
        for (key, flag) in [
            ("sync", SuperblockFlags::SYNC),
            ("dirsync", SuperblockFlags::DIRSYNC),
            ("lazytime", SuperblockFlags::LAZYTIME),
            ("mand", SuperblockFlags::MAND),
        ] {
            if self.options.superblock_flags.contains(flag) {
                context.set_flag(key)?;
            }
        }
        for (key, value) in self.options.selinux_contexts.iter() {
            context.set_string(key, value)?;
        }
        if self.options.is_read_only() {
            context.set_flag("ro")?;
        }
        context.create()?;
        context.mount(mount_attributes(self.options))
    }
}

fn taken<T>(result: Result<T, Error>, rung: Rung, steps: &mut dyn FnMut(Step)) -> Result<T, Error> {
    if result.is_ok() {
        steps(Step::Taken { rung });
    }
    result
}

/// Whether an error says that the kernel does not have this rung of the ladder.
fn is_missing(rung: Rung, error: &KernelError) -> bool {
    match (rung, error.operation, error.errno) {
        (Rung::LayersByDescriptor, Operation::SetOption, errno) => {
            matches!(errno, Errno::BADF | Errno::OPNOTSUPP)
        }
        (Rung::LayersByDescriptor, Operation::CreateSuperblock, Errno::INVAL) => true,
        (Rung::LayersByPath, Operation::SetOption, Errno::INVAL) => error
            .object
            .as_ref()
            .is_some_and(|option| option.as_os_str().as_bytes().starts_with(b"lowerdir+")),
        _ => false,
    }
}

/// Whether an error may say that overlayfs does not know `verity=require`.
fn may_be_for_verity(error: &KernelError) -> bool {
    let is_verity =
        || error.object.as_ref().is_some_and(|option| option.as_os_str() == "verity=require");
    error.errno == Errno::INVAL
        && match error.operation {
            Operation::SetOption => is_verity(),
            operation => operation == Operation::CreateSuperblock,
        }
}

fn mount_attributes(options: &MountOptions) -> MountAttrFlags {
    // The bits are the kernel's in both.
    let mut attributes = MountAttrFlags::from_bits_retain(options.attributes.bits());
    attributes |= match options.atime {
        Atime::Relatime => MountAttrFlags::MOUNT_ATTR_RELATIME,
        Atime::Noatime => MountAttrFlags::MOUNT_ATTR_NOATIME,
        Atime::Strictatime => MountAttrFlags::MOUNT_ATTR_STRICTATIME,
    };
    if options.is_read_only() {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    attributes
}
