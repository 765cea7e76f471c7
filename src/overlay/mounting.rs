//! One mount of an overlay: methods and their fallbacks.

use std::ffi::OsString;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::io::Errno;

use crate::digest::VerityUnavailable;
use crate::erofs::ErofsMount;
use crate::kernel::fs_context::{FsContext, STRING_MAX};
use crate::kernel::private_namespace::in_private_namespace;
use crate::kernel::{KernelError, Operation, Unsupported};
use crate::overlay::attached::AttachedLayers;
use crate::overlay::error::OverlayError;
use crate::overlay::first_read::{SampledFile, read_files};
use crate::overlay::layers::{Layer, Layers};
use crate::overlay::method::LayerMethod;
use crate::overlay::options::{OverlayOptions, Verity, mount_attributes};
use crate::overlay::stacking::{self, Stacking};

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
        if let ObjectVerity::Enforced = self {
            return f.write_str("objects are verified when they are read (verity=require)");
        }
        f.write_str("objects are not verified when they are read: ")?;
        match self {
            ObjectVerity::Enforced | ObjectVerity::NotRequested => f.write_str("not requested"),
            ObjectVerity::Disabled => f.write_str("disabled"),
            ObjectVerity::UnsupportedByOverlay => {
                f.write_str("this kernel's overlayfs does not support verity=require")
            }
            ObjectVerity::UnsupportedByObjects(reason @ VerityUnavailable::NoDigest) => {
                reason.fmt(f)
            }
            ObjectVerity::UnsupportedByObjects(reason) => {
                write!(f, "in an object directory, {reason}")
            }
        }
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
    pub fn get(&self) -> &ErofsMount {
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

/// One mount of an overlay.
pub(crate) struct Mounting<'a> {
    pub layers: &'a Layers,
    pub options: &'a OverlayOptions,
    /// The source that mountinfo shows.
    pub source: OsString,
    /// The path of the image, for messages.
    pub path: PathBuf,
    pub verity: Verity,
    /// The files to read before the mount is handed over.
    pub files: &'a [SampledFile],
    /// Whether sealmount tries another overlay on the mount.
    pub is_to_stack: bool,
}

/// A finished overlay.
pub(crate) struct Mounted {
    pub fd: OwnedFd,
    pub method: LayerMethod,
    pub verity: ObjectVerity,
    pub stacking: Stacking,
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
    pub fn mount(
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
