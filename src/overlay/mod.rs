//! The overlay of an image and its object directories.

mod attached;
mod error;
mod first_read;
mod layers;
mod method;
mod mounting;
mod objects;
mod options;
mod reachable;
mod stacking;
mod upper_paths;

use std::ffi::OsString;
use std::ops::ControlFlow;

use rustix::io::Errno;

use crate::digest::VerityUnavailable;
use crate::erofs::ErofsMount;
use crate::kernel::mount::Mount;
use crate::kernel::{Operation, Unsupported};
use crate::location::{DirectoryRole, Location};
use crate::objects::check::{Check, OnCheckProgress, VerityNeed};
use crate::objects::{CheckProgress, CheckReport, ObjectCheck};
use crate::source::Source;

pub use error::OverlayError;
pub(crate) use first_read::Samples;
use first_read::{SampledFile, without_object};
use layers::{Layer, Layers, Upper};
pub use method::LayerMethod;
pub(crate) use mounting::ImageLayer;
pub use mounting::ObjectVerity;
use mounting::{Mounted, Mounting};
use objects::{check_samples, check_support};
pub(crate) use options::mount_attributes;
pub use options::{
    Atime, MountAttributes, OverlayOptions, SelinuxContexts, SuperblockFlags, UpperLayer, Verity,
};
pub use stacking::Stacking;

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
        let (store, directories) = (self.layers.store()?, self.layers.object_paths());
        let report = Check { image, store, directories, check, verity }.run(events)?;
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
        self.options.effective_verity(image.source().digest())
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
