//! The set-up of a root file system, from the kernel command line to a detached tree of mounts.

use std::fmt;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::fstat;
use rustix::io::Errno;

use crate::attach::DetachedMount;
use crate::boot::command_line::{CommandLine, CommandLineError, CopyChoice};
use crate::boot::config::RootConfig;
use crate::boot::disk::{Deployment, Disk};
use crate::boot::error::SetupError;
use crate::boot::place::{Candidate, Place, candidates};
use crate::boot::prepared::PreparedRoot;
use crate::boot::tree::{attach_tmpfs, build, transient_layer};
use crate::digest::Digest;
use crate::erofs::check_permission;
use crate::error::Error;
use crate::event::Event;
use crate::kernel::private_namespace::{enter_scratch, in_private_namespace};
use crate::kernel::{ErrorKind, KernelError, Operation};
use crate::location::Location;
use crate::options::MountOptions;
use crate::overlay::UpperLayer;
use crate::source::MemoryKind;
use crate::util::text::shown;

/// The description of a root file system.
///
/// ```
/// use sealmount::boot::{CommandLine, RootConfig, RootSetup};
///
/// let text = "composefs=3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95";
/// let mut setup = RootSetup::new(CommandLine::parse(text)?);
/// setup.config = RootConfig::parse("root.transient = true")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RootSetup {
    /// The directory that the disk is mounted on. The default is /sysroot.
    pub sysroot: PathBuf,
    /// The directory of images in the initramfs. The default is /usr/lib/sealmount/images.
    pub images: PathBuf,
    /// The words of the kernel command line.
    pub command_line: CommandLine,
    /// The configuration of the system.
    pub config: RootConfig,
}

/// An event of [`RootSetup::prepare`]. The text of an event is one line.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SetupEvent {
    /// The image is found.
    #[non_exhaustive]
    ImageFound {
        /// The path of the image.
        image: PathBuf,
        /// The digest that the image must have.
        digest: Digest,
    },
    /// An event of the mount of the image.
    Mount(Event),
    /// The disk has no fs-verity, so the image is copied into memory and verified there.
    ImageNeedsCopy,
}

impl fmt::Display for SetupEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SetupEvent::ImageFound { image, digest } => {
                write!(f, "image {}: must have the digest {digest}", shown(image))
            }
            SetupEvent::Mount(event) => event.fmt(f),
            SetupEvent::ImageNeedsCopy => {
                f.write_str("the kernel cannot verify the image on the disk: copying the image")
            }
        }
    }
}

type OnEvent<'a> = &'a mut (dyn FnMut(SetupEvent) + Send);

impl RootSetup {
    /// Returns the default set-up for a kernel command line.
    pub fn new(command_line: CommandLine) -> RootSetup {
        RootSetup {
            sysroot: "/sysroot".into(),
            images: "/usr/lib/sealmount/images".into(),
            command_line,
            config: RootConfig::default(),
        }
    }

    /// Finds, verifies and mounts the image, and builds the whole root file system, without attaching it
    /// anywhere. Reports each step to `events`, which one new thread calls.
    ///
    /// The disk must be mounted at [`sysroot`](RootSetup::sysroot). If /etc or /var is on a disk that is
    /// read-only, the disk becomes writable.
    ///
    /// # Errors
    ///
    /// [`SetupError`]. No mount is left. Directories of a layer on the disk may be left.
    pub fn prepare(&self, events: OnEvent) -> Result<PreparedRoot, SetupError> {
        check_permission()?;
        in_private_namespace(|has_same_paths| match has_same_paths {
            true => Ok(self.build(events)),
            // In a chroot whose root directory is not the root of a mount.
            false => Err(KernelError::new(Operation::PrivateNamespace, Errno::INVAL)),
        })?
    }

    fn build(&self, events: OnEvent) -> Result<PreparedRoot, SetupError> {
        let disk = Disk::open(&self.sysroot)?;
        let objects = Arc::new(disk.objects(self.command_line.objects.as_deref())?);
        let candidates = candidates(&self.command_line, &self.images, &disk)?;
        if self.config.needs_disk() {
            disk.make_writable()?;
        }
        enter_scratch(Operation::AttachDirectory)?;
        if self.config.needs_tmpfs() {
            attach_tmpfs(self.config.tmpfs_size)?;
        }
        let options = self.mount_options(&objects)?;
        let (mount, digest) = mount_first(candidates, options, self.command_line.copy, events)?;
        let root = mount.into_fd()?;
        let deployment = Deployment::new(&disk, &digest);
        let tree = build(&root, &disk, &deployment, &self.config)?;
        let stat = fstat(&objects)
            .map_err(|errno| KernelError::new(Operation::StatDirectory, errno).on(&self.sysroot))?;
        let disk = disk.clone_mount()?;
        Ok(PreparedRoot::new(tree, disk, stat.st_dev))
    }

    fn mount_options(&self, objects: &Arc<OwnedFd>) -> Result<MountOptions, SetupError> {
        let mut options = MountOptions::new(Location::Fd(objects.clone()));
        options.size = self.command_line.size;
        options.overlay.check = self.command_line.check;
        if self.config.transient {
            let layer = transient_layer("root")?;
            options.overlay.upper = Some(UpperLayer::new(layer.upperdir, layer.workdir));
        }
        Ok(options)
    }
}

/// Mounts the first image that has its digest, and returns the digest.
fn mount_first(
    candidates: Vec<Candidate>,
    options: MountOptions,
    copy: Option<CopyChoice>,
    events: OnEvent,
) -> Result<(DetachedMount, Digest), SetupError> {
    let mut first_error = None;
    for candidate in candidates {
        let mut options = options.clone();
        let digest = candidate.expected.digest;
        options.digest = Some(digest);
        options.overlay.verity = Some(candidate.expected.verity);
        options.overlay.source = Some(format!("composefs:{digest}").into());
        candidate.set_copy(copy, &mut options);
        // A size limit is for a copy.
        options.size = options.size.filter(|_| options.copy.is_some());
        let image = candidate.image.display_path();
        events(SetupEvent::ImageFound { image, digest });
        let mut result = mount(&candidate, &options, events);
        if let Err(Error::Source(error)) = &result
            && error.kind() == ErrorKind::VerityUnavailable
            && copy.is_none()
        {
            events(SetupEvent::ImageNeedsCopy);
            options.copy = Some(MemoryKind::Ramfs);
            result = mount(&candidate, &options, events);
        }
        match result {
            Ok(mount) => return Ok((mount, digest)),
            Err(error)
                if candidate.place == Place::OnlyInInitramfs
                    && error.kind() == ErrorKind::DigestMismatch =>
            {
                first_error.get_or_insert(error);
            }
            Err(error) => return Err(error.into()),
        }
    }
    match first_error {
        Some(error) => Err(error.into()),
        None => Err(CommandLineError::NoImage.into()),
    }
}

fn mount(
    candidate: &Candidate,
    options: &MountOptions,
    events: OnEvent,
) -> Result<DetachedMount, Error> {
    options.mount_with_events(candidate.image.clone(), &mut |event| {
        // The progress of a copy or a check is not a step.
        if !matches!(event, Event::Copying(_) | Event::Checking(_)) {
            events(SetupEvent::Mount(event));
        }
        ControlFlow::Continue(())
    })
}
