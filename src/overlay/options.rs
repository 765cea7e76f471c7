//! The options of an overlay.

use std::ffi::OsString;

use rustix::mount::MountAttrFlags;

use crate::digest::Digest;
use crate::kernel::SELINUX_CONTEXTS;
use crate::location::Location;
use crate::objects::ObjectCheck;

/// The options of an overlay of an image and its object directories.
///
/// ```
/// use sealmount::{OverlayOptions, UpperLayer};
///
/// let mut options = OverlayOptions::new("/var/lib/images/objects");
/// options.upper = Some(UpperLayer::new("/run/containers/1/upper", "/run/containers/1/work"));
/// options.attributes.nosuid = true;
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OverlayOptions {
    /// `basedir=`: the object directories, at least one. Each object is read from the first directory that
    /// contains it.
    pub objects: Vec<Location>,
    /// `verity=`: the verification of objects against the fs-verity digests in the image. `None` means
    /// [`Verity::Require`] if the digest of the image was verified, else [`Verity::Off`].
    pub verity: Option<Verity>,
    /// `check=`: the check of the objects before the mount. `None` means [`ObjectCheck::Sample`].
    pub check: Option<ObjectCheck>,
    /// `upperdir=`, `workdir=`: a layer that receives changes. Without it the mount is read-only.
    pub upper: Option<UpperLayer>,
    /// `ro`: read-only, also with an upper layer.
    pub read_only: bool,
    /// `nosuid`, `nodev`, `noexec`, `nosymfollow`, `nodiratime`.
    pub attributes: MountAttributes,
    /// `relatime`, `noatime`, `strictatime`.
    pub atime: Atime,
    /// `sync`, `dirsync`, `lazytime`, `mand`.
    pub superblock_flags: SuperblockFlags,
    /// `context=`, `fscontext=`, `defcontext=`, `rootcontext=`.
    pub selinux_contexts: SelinuxContexts,
    /// The source of the mount that findmnt(8) shows. `None` means the path of the image without symbolic
    /// links, or `composefs` if the image was given by descriptor. mount(8) passes the source as an
    /// operand, so it is not part of the text of options.
    pub source: Option<OsString>,
}

impl OverlayOptions {
    /// Returns the default options with one object directory.
    pub fn new(objects: impl Into<Location>) -> OverlayOptions {
        OverlayOptions { objects: vec![objects.into()], ..OverlayOptions::default() }
    }

    /// Returns the verification of objects for an image with this digest: [`verity`](Self::verity), or its
    /// default.
    pub(crate) fn effective_verity(&self, digest: Option<Digest>) -> Verity {
        self.verity.unwrap_or(match digest {
            Some(_) => Verity::Require,
            None => Verity::Off,
        })
    }

    /// Returns the check of the objects: [`check`](Self::check), or its default.
    pub fn effective_check(&self) -> ObjectCheck {
        self.check.unwrap_or(ObjectCheck::Sample)
    }

    /// Returns whether the mount cannot be written to.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.upper.is_none()
    }
}

/// The verification of objects: overlayfs checks them against the fs-verity digests in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verity {
    /// `verity`: every object is checked when it is opened (Linux 6.6). If this is not possible, the mount is
    /// rejected. Except with [`ObjectCheck::Off`], up to four files of the image are read before the mount is
    /// returned. If one of these files cannot be read, the mount is rejected.
    Require,
    /// `tryverity`: objects are checked if kernel, file system and objects allow it. Otherwise objects are
    /// not checked, and [`DetachedMount::verity`](crate::DetachedMount::verity) returns the reason.
    Try,
    /// `noverity`: objects are not checked.
    Off,
}

/// A layer that receives changes. Both directories are on one mount, and neither lies within the other.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UpperLayer {
    /// `upperdir=`: the directory that holds the changes.
    pub upperdir: Location,
    /// `workdir=`: an empty directory for overlayfs itself.
    pub workdir: Location,
}

impl UpperLayer {
    /// Returns a layer of two directories.
    pub fn new(upperdir: impl Into<Location>, workdir: impl Into<Location>) -> UpperLayer {
        UpperLayer { upperdir: upperdir.into(), workdir: workdir.into() }
    }
}

/// SELinux contexts, as in [mount(8)](https://man7.org/linux/man-pages/man8/mount.8.html). overlayfs gets
/// them unchanged. A kernel without SELinux rejects them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SelinuxContexts {
    /// `context=`: the context of every file.
    pub context: Option<OsString>,
    /// `fscontext=`: the context of the superblock.
    pub fscontext: Option<OsString>,
    /// `defcontext=`: the context of files without a context.
    pub defcontext: Option<OsString>,
    /// `rootcontext=`: the context of the root directory.
    pub rootcontext: Option<OsString>,
}

impl SelinuxContexts {
    /// Returns the contexts that are set, with their names.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, &OsString)> {
        let values = [&self.context, &self.fscontext, &self.defcontext, &self.rootcontext];
        SELINUX_CONTEXTS.into_iter().zip(values).filter_map(|(name, v)| Some((name, v.as_ref()?)))
    }

    pub(crate) fn get_mut(&mut self, name: &[u8]) -> Option<(&'static str, &mut Option<OsString>)> {
        let values =
            [&mut self.context, &mut self.fscontext, &mut self.defcontext, &mut self.rootcontext];
        SELINUX_CONTEXTS.into_iter().zip(values).find(|(context, _)| context.as_bytes() == name)
    }
}

/// The rule for updates of access times on reads, as in
/// [mount(8)](https://man7.org/linux/man-pages/man8/mount.8.html). Only a mount with an upper layer can store
/// an access time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Atime {
    /// `relatime`: if the access time is older than the last change, or than a day.
    #[default]
    Relatime,
    /// `noatime`: never.
    Noatime,
    /// `strictatime`: always.
    Strictatime,
}

/// Attributes of a mount: `MOUNT_ATTR_*` of
/// [mount_setattr(2)](https://man7.org/linux/man-pages/man2/mount_setattr.2.html).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MountAttributes {
    /// `nosuid`: set-user-ID bits and file capabilities have no effect.
    pub nosuid: bool,
    /// `nodev`: device nodes cannot be opened.
    pub nodev: bool,
    /// `noexec`: programs cannot be executed.
    pub noexec: bool,
    /// `nosymfollow` (Linux 5.14): symbolic links are not followed.
    pub nosymfollow: bool,
    /// `nodiratime`: access times of directories are not updated.
    pub nodiratime: bool,
}

/// Flags of the overlayfs superblock, of use with an upper layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SuperblockFlags {
    /// `sync`: writes are synchronous.
    pub sync: bool,
    /// `dirsync`: changes of directories are synchronous.
    pub dirsync: bool,
    /// `lazytime`: times are written late.
    pub lazytime: bool,
    /// `mand`: mandatory locks, which Linux 5.15 and later do not have.
    pub mand: bool,
}

/// Returns the attributes of a mount, for fsmount(2) and mount_setattr(2).
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
