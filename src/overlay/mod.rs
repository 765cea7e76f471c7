//! The overlay of an image and its object directories: methods and their fallbacks.

mod attached;
mod error;
mod first_read;
mod layers;
mod method;
mod objects;
mod options;
mod stacking;

use std::ffi::OsString;
use std::fmt;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::digest::VerityUnavailable;
use crate::erofs::ErofsMount;
use crate::kernel::fs_context::{FsContext, STRING_MAX};
use crate::kernel::mount::Mount;
use crate::kernel::private_namespace::in_private_namespace;
use crate::kernel::{KernelError, Operation, Unsupported};
use crate::location::{DirectoryRole, Location};
use crate::objects::check::{Check, OnCheckProgress, VerityNeed};
use crate::objects::{CheckProgress, CheckReport, ObjectCheck};
use crate::source::Source;

use attached::AttachedLayers;
pub use error::OverlayError;
pub(crate) use first_read::Samples;
use first_read::{SampledFile, read_files, without_object};
use layers::{Layer, Layers, Upper};
pub use method::LayerMethod;
use objects::{check_samples, check_support};
pub use options::{
    Atime, MountAttributes, OverlayOptions, SelinuxContexts, SuperblockFlags, UpperLayer, Verity,
};
pub use stacking::Stacking;

/// The verification of the objects of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ObjectVerity {
    /// overlayfs checks every object against the digest in the image, and the kernel's fs-verity checks
    /// every read of the object.
    Enforced,
    /// Objects are not verified, because the options do not request it.
    NotRequested,
    /// Objects are not verified, because the options disable it ([`Verity::Off`]).
    Disabled,
    /// Objects are not verified ([`Verity::Try`]): the kernel's overlayfs does not know `verity=require`, or
    /// cannot open objects with it (Linux 7.0).
    UnsupportedByOverlay,
    /// Objects are not verified ([`Verity::Try`]): objects would fail the check.
    UnsupportedByObjects(VerityUnavailable),
}

impl fmt::Display for ObjectVerity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectVerity::Enforced => f.write_str("objects are verified (verity=require)"),
            ObjectVerity::NotRequested => f.write_str("objects are not verified: not requested"),
            ObjectVerity::Disabled => f.write_str("objects are not verified: disabled"),
            ObjectVerity::UnsupportedByOverlay => f.write_str(
                "objects are not verified: this kernel's overlayfs does not support verity=require",
            ),
            ObjectVerity::UnsupportedByObjects(reason @ VerityUnavailable::NoDigest) => {
                write!(f, "objects are not verified: {reason}")
            }
            ObjectVerity::UnsupportedByObjects(reason) => {
                write!(f, "objects are not verified: in an object directory, {reason}")
            }
        }
    }
}

/// A report on the mount of an overlay.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OverlayReport {
    /// The method that was used.
    pub method: LayerMethod,
    /// The methods that this kernel does not support, in the order of the attempts.
    pub unsupported: Vec<Unsupported<LayerMethod>>,
    /// The verification of the objects.
    pub verity: ObjectVerity,
    /// The result of a trial overlay on the mount.
    pub stacking: Stacking,
    /// The report of the check of the objects, with [`ObjectCheck::All`] and [`ObjectCheck::Content`].
    pub check: Option<CheckReport>,
}

/// Object directories and an upper layer, opened and checked: everything of an overlay except the image.
///
/// The fourth stage of a mount, made by [`OverlayOptions::open`]. An overlay can be opened before an image is
/// copied, so that a missing directory is found early. [`mount`](Overlay::mount) mounts the overlay on an
/// [`ErofsMount`].
///
/// ```no_run
/// use sealmount::{Image, OverlayOptions};
///
/// let image = Image::open("/images/base.cfs")?;
/// // Opened first: a missing directory is reported before the image is verified and mounted.
/// let overlay = OverlayOptions::new("/images/objects").open()?;
/// let erofs = image.trust()?.mount()?;
/// overlay.mount(&erofs)?.attach("/mnt")?;
/// # Ok::<(), sealmount::Error>(())
/// ```
#[derive(Debug)]
pub struct Overlay {
    layers: Layers,
    options: OverlayOptions,
    /// The result of the checks of the object directories, if it is known already.
    objects: Option<Result<(), VerityUnavailable>>,
}

impl OverlayOptions {
    /// Opens the directories and checks them.
    ///
    /// With [`Verity::Require`] and [`ObjectCheck::Sample`], up to four objects of each directory are
    /// sampled. A directory is rejected if one of its sampled objects lacks fs-verity. With
    /// [`ObjectCheck::All`] and [`ObjectCheck::Content`], only the file system of each directory is checked
    /// here. The objects are checked when the image is mounted. Later changes of the paths have no effect.
    ///
    /// # Errors
    ///
    /// [`OverlayError`]
    pub fn open(&self) -> Result<Overlay, OverlayError> {
        if self.objects.is_empty() {
            return Err(OverlayError::NoObjects);
        }
        let open = |location: &Location| Layer::open(location, DirectoryRole::Objects);
        let layers = Layers {
            objects: self.objects.iter().map(open).collect::<Result<_, _>>()?,
            upper: self.upper.as_ref().map(Upper::open).transpose()?,
        };
        layers.check()?;
        let mut overlay = Overlay { layers, options: self.clone(), objects: None };
        if let Some(verity) = self.verity {
            overlay.objects = overlay.check_directories(verity)?;
        }
        Ok(overlay)
    }
}

/// The image of an overlay.
pub(crate) enum ImageLayer<'a> {
    /// The overlay may use up the mount.
    Owned(ErofsMount),
    /// The mount stays with the caller.
    Borrowed(&'a ErofsMount),
}

impl ImageLayer<'_> {
    fn get(&self) -> &ErofsMount {
        match self {
            ImageLayer::Owned(mount) => mount,
            ImageLayer::Borrowed(mount) => mount,
        }
    }

    /// Returns a detached mount that can be attached.
    fn into_fd(self) -> Result<OwnedFd, OverlayError> {
        let mount = match self {
            ImageLayer::Owned(mount) => mount,
            ImageLayer::Borrowed(mount) => mount.try_clone()?,
        };
        mount.into_mount().0.into_fd().map_err(|(_, error)| error.into())
    }
}

impl Overlay {
    /// Checks every object that an image refers to.
    ///
    /// The calling thread calls `events` with the progress, at most a hundred times a second. If `events`
    /// returns [`ControlFlow::Break`], the check ends. At most eight new threads share the work. With
    /// [`ObjectCheck::Content`], the method also reads each object. With any other value of `check`, the
    /// method works as with [`ObjectCheck::All`].
    ///
    /// [`OverlayOptions::verity`] decides whether each object needs fs-verity. No overlay is mounted, so a
    /// program can check an update before a restart of the system:
    ///
    /// ```no_run
    /// use std::ops::ControlFlow;
    ///
    /// use sealmount::{Error, Image, ObjectCheck, OverlayOptions};
    ///
    /// fn check() -> Result<(), Error> {
    ///     let overlay = OverlayOptions::new("/images/objects").open()?;
    ///     let erofs = Image::open("/images/update.cfs")?.trust()?.mount()?;
    ///     let mut progress = |_| ControlFlow::Continue(());
    ///     let report = overlay.check_objects(&erofs, ObjectCheck::All, &mut progress)?;
    ///     println!("{report}");
    ///     Ok(())
    /// }
    ///
    /// if let Err(error) = check() {
    ///     eprintln!("{error}");
    ///     for failure in error.check_report().iter().flat_map(|report| &report.failures) {
    ///         eprintln!("  {failure}");
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// [`OverlayError::ObjectsDamaged`], with the report, if objects fail the check.
    /// [`OverlayError::Objects`] if the image cannot be read, or if `events` ended the check.
    pub fn check_objects(
        &self,
        image: &ErofsMount,
        check: ObjectCheck,
        events: &mut dyn FnMut(CheckProgress) -> ControlFlow<()>,
    ) -> Result<CheckReport, OverlayError> {
        let verity = match self.verity_of(image) {
            Verity::Require => VerityNeed::Required,
            Verity::Try => VerityNeed::IfAvailable,
            Verity::Off => VerityNeed::None,
        };
        let report = Check { image, store: self.layers.store()?, check, verity }.run(events)?;
        if report.failed > 0 {
            let (image, report) = (image.source().path().to_owned(), Box::new(report));
            return Err(OverlayError::ObjectsDamaged { image, report });
        }
        Ok(report)
    }

    /// Checks every object of an image, if the options request this check.
    pub(crate) fn check_before_mount(
        &self,
        image: &ErofsMount,
        events: OnCheckProgress,
    ) -> Result<Option<CheckReport>, OverlayError> {
        match self.options.effective_check() {
            ObjectCheck::Off | ObjectCheck::Sample => Ok(None),
            check => self.check_objects(image, check, events).map(Some),
        }
    }

    /// Returns the verification of objects for an image: the option, or its default.
    fn verity_of(&self, image: &ErofsMount) -> Verity {
        self.options.verity.unwrap_or(match image.source().digest() {
            Some(_) => Verity::Require,
            None => Verity::Off,
        })
    }

    /// Checks that the kernel can verify the objects: the file system of each directory and, with
    /// [`ObjectCheck::Sample`], up to four objects. Returns `None` if the options do not request this check.
    /// With [`Verity::Require`], an object that cannot be verified is an error.
    fn check_directories(
        &self,
        verity: Verity,
    ) -> Result<Option<Result<(), VerityUnavailable>>, OverlayError> {
        let check_directory = match self.options.effective_check() {
            ObjectCheck::Off => return Ok(None),
            ObjectCheck::Sample => check_samples,
            ObjectCheck::All | ObjectCheck::Content => check_support,
        };
        if verity == Verity::Off {
            return Ok(None);
        }
        for layer in &self.layers.objects {
            match (check_directory(layer), verity) {
                (Ok(()), _) => {}
                (Err(OverlayError::ObjectsVerityUnavailable { reason, .. }), Verity::Try) => {
                    return Ok(Some(Err(reason)));
                }
                (Err(error), _) => return Err(error),
            }
        }
        Ok(Some(Ok(())))
    }

    /// Mounts the overlay on an image, detached. `check` is the report of
    /// [`check_before_mount`](Self::check_before_mount). Notes unsupported methods in `unsupported`, also if
    /// the mount fails.
    pub(crate) fn mount_noting(
        &self,
        image: ImageLayer,
        check: Option<CheckReport>,
        samples: &Samples,
        unsupported: &mut Vec<Unsupported<LayerMethod>>,
    ) -> Result<(Mount, OverlayReport), OverlayError> {
        let verity = self.verity_of(image.get());
        let objects = match (check.as_ref().and_then(|report| report.unverified), self.objects) {
            (Some(reason), _) => Some(Err(reason)),
            (None, Some(objects)) => Some(objects),
            (None, None) => self.check_directories(verity)?,
        };
        let verity = if matches!(objects, Some(Err(_))) { Verity::Off } else { verity };
        let files = match verity {
            Verity::Off => &[],
            _ if self.options.effective_check() == ObjectCheck::Off => &[],
            Verity::Try => samples.of(image.get()).unwrap_or_default(),
            Verity::Require => samples.of(image.get())?,
        };
        let mounting = Mounting {
            layers: &self.layers,
            options: &self.options,
            source: self.source_name(image.get().source()),
            path: image.get().source().path().to_owned(),
            verity,
            files,
            is_to_stack: image.get().is_from_file() && !self.layers.are_on_overlay(),
        };
        let Mounted { fd, method, verity: enforced, stacking } =
            mounting.mount(image, unsupported).map_err(|error| self.explained(error))?;
        let verity = match (objects, self.options.verity) {
            (Some(Err(reason)), _) => ObjectVerity::UnsupportedByObjects(reason),
            (_, Some(Verity::Off)) => ObjectVerity::Disabled,
            _ => enforced,
        };
        let unsupported = unsupported.clone();
        Ok((Mount::new(fd), OverlayReport { method, unsupported, verity, stacking, check }))
    }

    /// Returns sampled files of the image whose object is in no object directory. If the image cannot be
    /// read, or with [`ObjectCheck::Off`], returns no files.
    pub(crate) fn files_without_object<'a>(
        &self,
        image: &ErofsMount,
        samples: &'a Samples,
    ) -> Vec<&'a SampledFile> {
        if self.options.effective_check() == ObjectCheck::Off {
            return Vec::new();
        }
        samples.of(image).and_then(|files| without_object(files, &self.layers)).unwrap_or_default()
    }

    /// Names an object directory on an overlayfs in an error without a reason of the kernel. overlayfs writes
    /// "maximum fs stacking depth exceeded" only to the log of the machine.
    fn explained(&self, error: OverlayError) -> OverlayError {
        match error {
            OverlayError::Kernel(error)
                if error.operation == Operation::CreateSuperblock
                    && error.errno == Errno::INVAL
                    && error.log.is_empty() =>
            {
                match self.layers.objects.iter().find(|layer| layer.is_on_overlay()) {
                    Some(layer) => {
                        OverlayError::ObjectsOnOverlay { path: layer.path(), source: error }
                    }
                    None => OverlayError::Kernel(error),
                }
            }
            error => error,
        }
    }

    /// Returns the source that findmnt(8) shows.
    fn source_name(&self, image: &Source) -> OsString {
        match (&self.options.source, image.location()) {
            (Some(source), _) => source.clone(),
            // mount(8) passes and compares the path without symbolic links.
            (None, Location::Path(path)) => std::fs::canonicalize(path)
                .or_else(|_| std::path::absolute(path))
                .unwrap_or_else(|_| path.clone())
                .into_os_string(),
            (None, Location::Fd(_)) => "composefs".into(),
        }
    }
}

/// One mount of an overlay.
struct Mounting<'a> {
    layers: &'a Layers,
    options: &'a OverlayOptions,
    /// The source that mountinfo shows.
    source: OsString,
    /// The path of the image, for messages.
    path: std::path::PathBuf,
    verity: Verity,
    /// The files to read before the mount is handed over.
    files: &'a [SampledFile],
    /// Whether sealmount tries another overlay on the mount.
    is_to_stack: bool,
}

/// A finished overlay.
struct Mounted {
    fd: OwnedFd,
    method: LayerMethod,
    verity: ObjectVerity,
    stacking: Stacking,
}

impl Mounting<'_> {
    /// Mounts the overlay, detached.
    ///
    /// The methods, newest first. An errno in parentheses means "not supported".
    /// 1. Detached mounts by descriptor, Linux 6.15 (from 6.13, EINVAL "failed to clone lowerpath" for the
    ///    superblock; from 6.5, EBADF for O_PATH descriptors; before, EOPNOTSUPP). All other methods need
    ///    layers that are attached, and have paths, in the caller's mount namespace.
    /// 2. `lowerdir+` and `datadir+`, Linux 6.7 (EINVAL for an unknown option).
    /// 3. One string with data-only layers, Linux 6.5.
    /// 4. One string without data-only layers: only after EOPNOTSUPP.
    fn mount(
        &self,
        image: ImageLayer,
        unsupported: &mut Vec<Unsupported<LayerMethod>>,
    ) -> Result<Mounted, OverlayError> {
        let method = LayerMethod::Descriptors;
        let by_descriptor = |context: &FsContext| self.set_by_descriptor(context, image.get());
        let error = match self.create_with_verity(&by_descriptor) {
            Err(OverlayError::Kernel(error)) if means_unsupported(method, &error) => *error,
            result => {
                let (fd, verity) = result?;
                let stacking = match self.is_to_stack {
                    true => stacking::try_on(&fd, image.get(), &self.path),
                    false => Stacking::NotTried,
                };
                return Ok(Mounted { fd, method, verity, stacking });
            }
        };
        let methods: &[LayerMethod] = match error.errno {
            Errno::OPNOTSUPP => &[LayerMethod::LowerOnly],
            _ => &[LayerMethod::Paths, LayerMethod::OneString],
        };
        unsupported.push(Unsupported::new(method, error));

        let image = image.into_fd()?;
        let attached = AttachedLayers::new(&image, self.layers, methods)?;
        let (more_unsupported, method, result, stacking) = in_private_namespace(|use_paths| {
            attached.attach()?;
            let mut unsupported = Vec::new();
            for method in methods {
                let by_path = |context: &FsContext| attached.set(context, *method, use_paths);
                match self.create_with_verity(&by_path) {
                    Err(OverlayError::Kernel(error)) if means_unsupported(*method, &error) => {
                        unsupported.push(Unsupported::new(*method, *error));
                    }
                    result => {
                        let stacking = match self.is_to_stack && result.is_ok() {
                            true => stacking::try_in_scratch(&self.path),
                            false => Stacking::NotTried,
                        };
                        return Ok((unsupported, *method, result, stacking));
                    }
                }
            }
            // Not reached: an error of the last method never means "unsupported".
            Err(KernelError::new(Operation::CreateSuperblock, Errno::OPNOTSUPP).on("overlay"))
        })?;
        unsupported.extend(more_unsupported);
        result.map(|(fd, verity)| Mounted { fd, method, verity, stacking })
    }

    /// Makes the overlay, with `verity=require` if the options request it and overlayfs knows it.
    ///
    /// Before Linux 6.6, overlayfs does not know `verity=require` and fails with EINVAL. It fails for the
    /// option, or for the superblock if it parses all options at the end. If the overlay can be made without
    /// the option, the option was the reason.
    ///
    /// Linux 7.0 knows the option, and does not open objects that have fs-verity. So this function also reads
    /// sampled files.
    fn create_with_verity(
        &self,
        set_layers: &dyn Fn(&FsContext) -> Result<(), KernelError>,
    ) -> Result<(OwnedFd, ObjectVerity), OverlayError> {
        if self.verity == Verity::Off {
            return Ok((self.create(false, set_layers)?, ObjectVerity::NotRequested));
        }
        let error = match self.create(true, set_layers) {
            Ok(mount) => match self.read_files(&mount)? {
                ObjectVerity::Enforced => return Ok((mount, ObjectVerity::Enforced)),
                verity => {
                    // An upper layer belongs to one mount at a time.
                    drop(mount);
                    return Ok((self.create(false, set_layers)?, verity));
                }
            },
            Err(error) => error,
        };
        if !may_be_for_verity(&error) {
            return Err(error.into());
        }
        match (self.create(false, set_layers), self.verity) {
            (Ok(mount), Verity::Try) => Ok((mount, ObjectVerity::UnsupportedByOverlay)),
            (Ok(_), _) => Err(OverlayError::VerityUnsupported),
            (Err(_), _) => Err(error.into()),
        }
    }

    /// Reads sampled files through a mount with `verity=require`. Returns the verity that the mount can have.
    ///
    /// With [`Verity::Try`], an error has an effect only if objects or kernel do not support verity.
    fn read_files(&self, mount: &OwnedFd) -> Result<ObjectVerity, OverlayError> {
        let error = match read_files(mount, self.files, self.layers) {
            Ok(()) => return Ok(ObjectVerity::Enforced),
            Err(error) if self.verity == Verity::Require => return Err(error),
            Err(error) => error,
        };
        Ok(match error {
            OverlayError::ObjectsVerityUnavailable { reason, .. } => {
                ObjectVerity::UnsupportedByObjects(reason)
            }
            OverlayError::VerityBroken { .. } => ObjectVerity::UnsupportedByOverlay,
            // The file cannot be read, with verity or without.
            _ => ObjectVerity::Enforced,
        })
    }

    fn set_by_descriptor(
        &self,
        context: &FsContext,
        image: &ErofsMount,
    ) -> Result<(), KernelError> {
        let set = |key, layer: &Layer| context.set_fd(key, &layer.fd, &layer.path());
        context.set_fd("lowerdir+", image.as_fd(), &self.path)?;
        self.layers.objects.iter().try_for_each(|layer| set("datadir+", layer))?;
        if let Some(upper) = &self.layers.upper {
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
        let context = FsContext::open("overlay")?.for_image(&self.path);
        // The layers come first, because most kernels differ in the layers that they accept.
        set_layers(&context)?;
        // A path that is too long for fsconfig is too long for a line of findmnt as well.
        let source = Some(&self.source).filter(|source| source.len() <= STRING_MAX);
        context.set_string("source", source.map_or("composefs".as_ref(), OsString::as_os_str))?;
        context.set_string("metacopy", "on")?;
        context.set_string("redirect_dir", "on")?;
        if verity {
            context.set_string("verity", "require")?;
        }
        let flags = self.options.superblock_flags;
        for (key, is_set) in [
            ("sync", flags.sync),
            ("dirsync", flags.dirsync),
            ("lazytime", flags.lazytime),
            ("mand", flags.mand),
        ] {
            if is_set {
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
        let OverlayOptions { attributes, atime, .. } = *self.options;
        context.mount(mount_attributes(self.options.is_read_only(), attributes, atime))
    }
}

/// Returns whether an error means that the kernel does not support the method.
fn means_unsupported(method: LayerMethod, error: &KernelError) -> bool {
    match (method, error.operation, error.errno) {
        (LayerMethod::Descriptors, Operation::SetOption, errno) => {
            matches!(errno, Errno::BADF | Errno::OPNOTSUPP)
        }
        (LayerMethod::Descriptors, Operation::CreateSuperblock, Errno::INVAL) => true,
        (LayerMethod::Paths, Operation::SetOption, Errno::INVAL) => error
            .object
            .as_ref()
            .is_some_and(|option| option.as_os_str().as_bytes().starts_with(b"lowerdir+")),
        _ => false,
    }
}

/// Returns whether an error may mean that overlayfs does not know `verity=require`.
fn may_be_for_verity(error: &KernelError) -> bool {
    error.errno == Errno::INVAL
        && match error.operation {
            Operation::SetOption => error.is_on("verity=require"),
            operation => operation == Operation::CreateSuperblock,
        }
}

pub(crate) fn mount_attributes(
    read_only: bool,
    attributes: MountAttributes,
    atime: Atime,
) -> MountAttrFlags {
    let MountAttributes { nosuid, nodev, noexec, nosymfollow, nodiratime } = attributes;
    let atime = match atime {
        Atime::Relatime => MountAttrFlags::MOUNT_ATTR_RELATIME,
        Atime::Noatime => MountAttrFlags::MOUNT_ATTR_NOATIME,
        Atime::Strictatime => MountAttrFlags::MOUNT_ATTR_STRICTATIME,
    };
    [
        (nosuid, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (nodev, MountAttrFlags::MOUNT_ATTR_NODEV),
        (noexec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (nosymfollow, MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW),
        (nodiratime, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
        (read_only, MountAttrFlags::MOUNT_ATTR_RDONLY),
    ]
    .into_iter()
    .fold(atime, |flags, (is_set, flag)| if is_set { flags | flag } else { flags })
}
