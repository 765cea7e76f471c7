//! A mount in one call: runs the stages in order.

use std::ops::ControlFlow;

use crate::attach::{DetachedMount, MountReport};
use crate::erofs::{
    ErofsError, ErofsMount, ErofsReport, SourceMethod, UserNamespace, check_permission,
};
use crate::error::Error;
use crate::event::{Event, Method};
use crate::image::Image;
use crate::kernel::mount::Mount;
use crate::kernel::procfs::Procfs;
use crate::kernel::{KernelError, Unsupported};
use crate::location::Location;
use crate::objects::CheckReport;
use crate::options::MountOptions;
use crate::overlay::{
    ImageLayer, LayerMethod, Overlay, OverlayError, OverlayReport, Samples, Verity,
};
use crate::source::{Source, SourceReport, Verified};

impl MountOptions {
    /// Mounts an image with these options, without attaching it anywhere.
    ///
    /// The method runs the stages in order: [`Image`], [`Source`], [`ErofsMount`], [`Overlay`],
    /// [`DetachedMount`]. Mounting needs `CAP_SYS_ADMIN` in the initial user namespace. The method checks
    /// this permission before it opens the image. All directories are opened and checked before the image is
    /// copied.
    ///
    /// If the kernel stacks no other overlay on the mount ([`Stacking`](crate::Stacking)), the method mounts
    /// the image once more, through a loop device. If there is no loop device, the method returns the first
    /// mount.
    ///
    /// The method writes no record of the options for a later remount. A program that needs a record makes
    /// it with [`MountOptions::record`] ([`MountRecord`](crate::MountRecord)).
    ///
    /// # Errors
    ///
    /// [`Error`]. No mount, device or file is left, also if the process is killed.
    pub fn mount(&self, image: impl Into<Location>) -> Result<DetachedMount, Error> {
        let callback = &mut |_| ControlFlow::Continue(());
        self.mount_reporting(image.into(), &mut Events { callback, are_wanted: false })
    }

    /// Mounts an image as [`mount`](Self::mount) does, and reports each [`Event`] to `events`.
    ///
    /// The calling thread calls `events`: for each event once, and during a copy at most a hundred times a
    /// second. The callback may take any time and call any function, but it must not change the mount
    /// namespace. If it returns [`ControlFlow::Break`], the mount ends. During a copy all threads then stop
    /// within a piece (see [`Image::copy_with_progress`]), and all memory is freed. A panic of the callback
    /// also ends the mount, and is passed on.
    ///
    /// Unlike `mount`, this method looks for sampled files whose object is missing, and reports them with
    /// [`Event::ObjectMissing`]. With [`Verity::Require`], both methods reject the mount instead.
    ///
    /// Besides the threads of a copy or of a check of every object, a mount starts at most one thread at a
    /// time. A private procfs needs a thread. Before Linux 6.15, a private mount namespace needs a thread
    /// too.
    ///
    /// # Errors
    ///
    /// As [`mount`](Self::mount); [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled) if `events` ended
    /// the mount.
    pub fn mount_with_events(
        &self,
        image: impl Into<Location>,
        events: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<DetachedMount, Error> {
        self.mount_reporting(image.into(), &mut Events { callback: events, are_wanted: true })
    }

    fn mount_reporting(
        &self,
        image: Location,
        events: &mut Events,
    ) -> Result<DetachedMount, Error> {
        self.check()?;
        check_permission()?;
        // With a digest, every path given to the kernel must lead to the file that was verified. /proc may
        // be forged, so a private procfs is used.
        let procfs = if self.digest.is_some() { Procfs::open()? } else { None };
        let (source, overlay, user_namespace) = self.prepare(image, procfs, events)?;

        let mut unsupported = Vec::new();
        let result = source.mount_noting(&mut unsupported);
        events.send_unsupported(unsupported, Method::Source)?;
        let erofs = result?;
        let samples = Samples::default();
        let missing = match events.are_wanted && self.effective_verity() != Verity::Require {
            true => overlay.files_without_object(&erofs, &samples),
            false => Vec::new(),
        };

        let mut progress = |progress| (events.callback)(Event::Checking(progress));
        let check = overlay.check_before_mount(&erofs, &mut progress)?;
        if let Some(report) = &check {
            events.send(Event::ObjectsChecked(report.clone()))?;
        }
        // After the check: a process without a mapping in the namespace may not read every directory.
        let erofs = idmapped(erofs, user_namespace.as_ref())?;
        let mut attempt = Attempt::new(&overlay, erofs, check.clone(), &samples);
        if let Some(error) = attempt.stacking_error()
            && let Ok(erofs) = source.mount_by_loop_device(attempt.unsupported_sources(error))
        {
            let method = Method::Source(attempt.erofs.method);
            events.send(Event::MethodUnsupported { method, error: error.clone() })?;
            // An upper layer belongs to one mount at a time.
            drop(attempt);
            let erofs = idmapped(erofs, user_namespace.as_ref())?;
            attempt = Attempt::new(&overlay, erofs, check, &samples);
        }
        events.send_erofs(&attempt.erofs)?;
        events.send_unsupported(attempt.unsupported, Method::Layers)?;
        let (mount, overlay) = attempt.result?;
        events.send_overlay(&overlay)?;
        for file in missing {
            events.send(Event::ObjectMissing {
                file: file.shown_path(),
                object: file.object().to_owned(),
            })?;
        }
        let report = MountReport {
            source: source.report().clone(),
            erofs: attempt.erofs,
            overlay: Some(overlay),
        };
        Ok(DetachedMount::new(mount, report))
    }

    /// Runs the stages before the first mount: opens and checks the image and the directories, then verifies
    /// or copies the image.
    pub(crate) fn prepare(
        &self,
        location: Location,
        procfs: Option<Procfs>,
        events: &mut Events,
    ) -> Result<(Source, Overlay, Option<UserNamespace>), Error> {
        let image = match procfs {
            Some(procfs) => Image::open_through(location, procfs)?,
            None => Image::open(location)?,
        };
        let mut options = self.overlay.clone();
        // The objects are checked before the image is verified, so the expected digest decides already.
        if self.digest.is_some() {
            options.verity = Some(self.effective_verity());
        }
        let overlay = options.open()?;
        let user_namespace = self.idmap.as_ref().map(UserNamespace::open).transpose()?;
        if let (Some(size), Some(format)) = (image.size(), image.format()) {
            let (image, compression) = (image.path().to_owned(), None);
            events.send(Event::ImageOpened { image, size, compression, format })?;
        }
        let source = match (self.copy_options(), self.digest) {
            (Some(copy), _) => image.copy_with_progress(&copy, &mut |progress| {
                (events.callback)(Event::Copying(progress))
            })?,
            (None, Some(digest)) => image.verify(digest)?,
            (None, None) => image.trust()?,
        };
        events.send_source(source.report())?;
        Ok((source, overlay, user_namespace))
    }
}

/// Gives an EROFS mount the mapping of a user namespace, if there is one.
fn idmapped(
    erofs: ErofsMount,
    user_namespace: Option<&UserNamespace>,
) -> Result<ErofsMount, ErofsError> {
    match user_namespace {
        Some(namespace) => erofs.into_idmapped(namespace),
        None => Ok(erofs),
    }
}

/// The mount of an overlay on an EROFS mount.
struct Attempt {
    erofs: ErofsReport,
    unsupported: Vec<Unsupported<LayerMethod>>,
    result: Result<(Mount, OverlayReport), OverlayError>,
}

impl Attempt {
    fn new(
        overlay: &Overlay,
        erofs: ErofsMount,
        check: Option<CheckReport>,
        samples: &Samples,
    ) -> Attempt {
        let report = erofs.report().clone();
        let mut unsupported = Vec::new();
        let image = ImageLayer::Owned(erofs);
        let result = overlay.mount_noting(image, check, samples, &mut unsupported);
        Attempt { erofs: report, unsupported, result }
    }

    /// Returns the error of the kernel if no other overlay can be mounted on this mount.
    fn stacking_error(&self) -> Option<&KernelError> {
        self.result.as_ref().ok()?.1.stacking.error()
    }

    /// Returns the unsupported methods, with the method of this mount.
    fn unsupported_sources(&self, error: &KernelError) -> Vec<Unsupported<SourceMethod>> {
        let this = Unsupported::new(self.erofs.method, error.clone());
        self.erofs.unsupported.iter().cloned().chain([this]).collect()
    }
}

/// The caller's callback.
pub(crate) struct Events<'a> {
    pub callback: &'a mut dyn FnMut(Event) -> ControlFlow<()>,
    /// Whether the caller wants events that need work of their own.
    pub are_wanted: bool,
}

impl Events<'_> {
    fn send(&mut self, event: Event) -> Result<(), Error> {
        match (self.callback)(event) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }

    /// Reports methods that this kernel does not support.
    fn send_unsupported<M>(
        &mut self,
        methods: Vec<Unsupported<M>>,
        method_of: fn(M) -> Method,
    ) -> Result<(), Error> {
        methods.into_iter().try_for_each(|Unsupported { method, error }| {
            self.send(Event::MethodUnsupported { method: method_of(method), error })
        })
    }

    fn send_source(&mut self, report: &SourceReport) -> Result<(), Error> {
        let SourceReport { size, format, compression, .. } = *report;
        if compression.is_some() {
            let image = report.image.clone();
            self.send(Event::ImageOpened { image, size, compression, format })?;
        }
        if let Some(Verified { digest, by }) = report.verified {
            self.send(Event::DigestVerified { digest, by })?;
        }
        match report.memory {
            Some(memory) if report.copied => self.send(Event::Copied { size, memory }),
            Some(_) => self.send(Event::UsedInPlace),
            None => Ok(()),
        }
    }

    fn send_erofs(&mut self, report: &ErofsReport) -> Result<(), Error> {
        if report.noacl {
            self.send(Event::WithoutAcls)?;
        }
        if let Some(device) = &report.loop_device {
            self.send(Event::LoopDevice { device: device.clone() })?;
        }
        self.send(Event::MethodUsed { method: Method::Source(report.method) })?;
        match &report.user_namespace {
            Some(path) => self.send(Event::Idmapped { user_namespace: path.clone() }),
            None => Ok(()),
        }
    }

    fn send_overlay(&mut self, report: &OverlayReport) -> Result<(), Error> {
        self.send(Event::MethodUsed { method: Method::Layers(report.method) })?;
        self.send(Event::Verity(report.verity))?;
        match report.stacking.error() {
            Some(error) => self.send(Event::NotStackable { error: error.clone() }),
            None => Ok(()),
        }
    }
}
