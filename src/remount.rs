//! A remount: new flags for an attached mount. All other options must be the options of the mount.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::kernel::fs_context::FsContext;
use crate::kernel::mount_table::{MountLine, data_layers, find_mount, has_flag, value};
use crate::kernel::procfs::Procfs;
use crate::kernel::{ErrorKind, Hint, KernelError, Operation, errno_text};
use crate::location::{DirectoryError, DirectoryRole, Location, is_same_file};
use crate::options::{MountFlags, MountOptions, OptionsError, RemountOptions};
use crate::overlay::{Atime, MountAttributes, Verity, mount_attributes};
use crate::record::{self, RecordError};
use crate::source::{MemoryKind, SizeLimit};
use crate::util::text::shown;

/// A composefs mount that is attached to a directory, by this process or another one.
///
/// ```no_run
/// use sealmount::AttachedMount;
///
/// let mount = AttachedMount::open("/mnt")?;
/// let mut flags = mount.flags();
/// flags.attributes.nosuid = true;
/// mount.remount(&flags)?;
/// # Ok::<(), sealmount::Error>(())
/// ```
#[derive(Debug)]
pub struct AttachedMount {
    fd: OwnedFd,
    path: PathBuf,
    line: MountLine,
}

/// A report on a remount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RemountReport {
    /// The flags immediately before the remount, also if another process has changed them since the mount was
    /// opened.
    pub before: MountFlags,
    /// The flags after the remount. Without an upper layer, they are read-only in any case.
    pub after: MountFlags,
}

impl AttachedMount {
    /// Opens the topmost mount on a directory, and checks that the mount is an overlay with object
    /// directories. Later changes of the path have no effect.
    ///
    /// # Errors
    ///
    /// [`RemountError`]: the directory is not the root of a mount, or the mount is not a composefs mount.
    pub fn open(mount_point: impl Into<Location>) -> Result<AttachedMount, RemountError> {
        let mount_point = mount_point.into();
        let fd = mount_point.open_directory(DirectoryRole::MountPoint)?;
        let path = mount_point.display_path();
        let statx = statx(&fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
            .map_err(|errno| KernelError::new(Operation::StatDirectory, errno).on(&path))?;
        if !statx.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Err(RemountError::NotAMount { path });
        }
        let line = read_line(&path, statx.stx_mnt_id)?;
        let is_off = |option| value(&line.superblock, option).is_some_and(|value| value == "off");
        if line.fs_type != "overlay" {
            return Err(RemountError::OtherFileSystem { path, file_system: line.fs_type });
        }
        if data_layers(&line.superblock).is_empty() || is_off("metacopy") || is_off("redirect_dir")
        {
            return Err(RemountError::OtherOverlay { path });
        }
        Ok(AttachedMount { fd, path, line })
    }

    /// Returns the flags that the mount and its superblock had when the mount was opened.
    pub fn flags(&self) -> MountFlags {
        let shown = self.line.attributes.iter().chain(&self.line.superblock);
        let flags = shown.filter(|(_, value)| value.is_none()).map(|(name, _)| name.as_os_str());
        MountFlags::shown_as(flags)
    }

    /// Returns whether the mount has an upper layer. Without an upper layer, the mount is read-only.
    pub fn has_upper_layer(&self) -> bool {
        value(&self.line.superblock, "upperdir").is_some()
    }

    /// Checks that the mount has all options that a remount cannot change, and returns the new flags.
    ///
    /// The kernel shows the layers, `verity=require` and SELinux contexts. `digest=`, `copy`, `size=` and
    /// `idmap=` are compared with the record ([`MountRecord`](crate::MountRecord)). Another path of a
    /// directory in use is accepted. `tryverity` and `check=` are accepted for each mount.
    ///
    /// # Errors
    ///
    /// [`RemountError`]: an option is unknown, is not an option of the mount, or cannot be compared.
    pub fn compare(&self, options: &RemountOptions) -> Result<MountFlags, RemountError> {
        let (flags, unknown) = self.compare_sloppy(options)?;
        match unknown.into_iter().next() {
            Some(name) => Err(OptionsError::Unknown(name).into()),
            None => Ok(flags),
        }
    }

    /// Compares as [`compare`](Self::compare) does, and also returns the names of unknown options. The option
    /// `-s` of mount(8) needs these names.
    ///
    /// # Errors
    ///
    /// As [`compare`](Self::compare).
    pub fn compare_sloppy(
        &self,
        options: &RemountOptions,
    ) -> Result<(MountFlags, Vec<OsString>), RemountError> {
        let mut unknown = Vec::new();
        for (name, given) in &options.others {
            let named = self.line.superblock.iter().filter(|(shown, _)| shown == name);
            match (named.clone().count(), named.clone().any(|(_, shown)| shown == given)) {
                (0, _) => unknown.push(name.clone()),
                (_, true) => {}
                (_, false) => return Err(self.other_value(name, given.as_deref())),
            }
        }
        self.compare_record(&options.expected)?;
        self.compare_layers(options)?;
        self.compare_verity(&options.expected)?;
        for (name, context) in options.expected.overlay.selinux_contexts.iter() {
            if value(&self.line.superblock, name) != Some(context) {
                return Err(self.other_value(name, Some(context)));
            }
        }
        self.new_flags(options).map(|flags| (flags, unknown))
    }

    fn compare_layers(&self, options: &RemountOptions) -> Result<(), RemountError> {
        let objects = &options.expected.overlay.objects;
        if !objects.is_empty() && !self.has_objects(objects) {
            let paths = |paths: &[&OsStr]| Some(paths.join(OsStr::new(":")));
            let given: Vec<_> = objects.iter().map(Location::display_path).collect();
            let given: Vec<_> = given.iter().map(|path| path.as_os_str()).collect();
            let shown = data_layers(&self.line.superblock);
            return Err(self.change("basedir", paths(&shown), paths(&given)));
        }
        for (name, given) in [("upperdir", &options.upperdir), ("workdir", &options.workdir)] {
            let Some(given) = given else { continue };
            match value(&self.line.superblock, name) {
                Some(shown) if is_same_directory(given, shown.as_ref()) => {}
                _ => return Err(self.other_value(name, Some(given.as_os_str()))),
            }
        }
        Ok(())
    }

    fn has_objects(&self, objects: &[Location]) -> bool {
        let given: Vec<_> = objects.iter().filter_map(Location::absolute_path).collect();
        let are_same = |paths: &[PathBuf]| {
            paths.len() == given.len()
                && given.iter().zip(paths).all(|(given, path)| is_same_directory(given, path))
        };
        let shown: Vec<_> = data_layers(&self.line.superblock).iter().map(PathBuf::from).collect();
        // The kernel shows other names for paths that it cannot show or that are too long.
        let recorded = || record::find(&self.fd).ok().flatten();
        let paths_of = |options: MountOptions| {
            options.overlay.objects.iter().filter_map(Location::absolute_path).collect::<Vec<_>>()
        };
        are_same(&shown) || recorded().is_some_and(|options| are_same(&paths_of(options)))
    }

    fn compare_verity(&self, expected: &MountOptions) -> Result<(), RemountError> {
        let is_required = value(&self.line.superblock, "verity").is_some_and(|v| v == "require");
        match (expected.overlay.verity, expected.effective_verity(), is_required) {
            (None, Verity::Off, _) | (_, Verity::Try, _) => Ok(()),
            (_, Verity::Require, true) | (_, Verity::Off, false) => Ok(()),
            (_, Verity::Require, false) => Err(self.lacks("verity")),
            (_, Verity::Off, true) => Err(self.has_instead("verity", "noverity")),
        }
    }

    /// Compares the options that the kernel does not show.
    fn compare_record(&self, expected: &MountOptions) -> Result<(), RemountError> {
        let named = hidden_options(expected).into_iter().filter(|(_, given)| given.is_some());
        let named: Vec<_> = named.collect();
        let Some((option, _)) = named.first() else { return Ok(()) };
        let not_recorded =
            |problem| RemountError::NotRecorded { path: self.path.clone(), option, problem };
        let recorded = match record::find(&self.fd) {
            Ok(Some(recorded)) => hidden_options(&recorded),
            Ok(None) => return Err(not_recorded(None)),
            Err(error) => return Err(not_recorded(Some(Box::new(error)))),
        };
        for (option, given) in named {
            let found = recorded.iter().find(|(name, _)| *name == option);
            let found = found.and_then(|(_, value)| value.clone());
            if found != given {
                return Err(self.change(option, found, given));
            }
        }
        Ok(())
    }

    fn new_flags(&self, options: &RemountOptions) -> Result<MountFlags, RemountError> {
        let (mut flags, now) = (options.flags, self.flags());
        if !options.names_atime {
            flags.atime = now.atime;
            flags.attributes.nodiratime = now.attributes.nodiratime;
        }
        if !options.names_dirsync {
            flags.superblock_flags.dirsync = now.superblock_flags.dirsync;
        }
        self.check_dirsync(&flags).map(|()| flags)
    }

    /// Rejects a change of dirsync, which no call of the kernel makes: fsconfig(2) fails with EINVAL, and
    /// mount(2) ignores the flag.
    fn check_dirsync(&self, flags: &MountFlags) -> Result<(), RemountError> {
        match (self.flags().superblock_flags.dirsync, flags.superblock_flags.dirsync) {
            (true, false) => Err(self.has_instead("dirsync", "nodirsync")),
            (false, true) => Err(self.lacks("dirsync")),
            _ => Ok(()),
        }
    }

    /// Rejects an option with this value. The mount has the option with another value or not at all.
    fn change(
        &self,
        option: impl AsRef<OsStr>,
        found: Option<OsString>,
        given: Option<OsString>,
    ) -> RemountError {
        let option = option.as_ref();
        let found = found.map(|value| option_text(option, Some(&value)));
        self.rejects(option, found, option_text(option, given.as_deref()))
    }

    /// Rejects an option that the kernel shows with another value or not at all.
    fn other_value(&self, option: impl AsRef<OsStr>, given: Option<&OsStr>) -> RemountError {
        let shown = self.line.superblock.iter().find(|(name, _)| name == option.as_ref());
        let found = shown.map(|(name, value)| option_text(name, value.as_deref()));
        let option = option.as_ref();
        self.rejects(option, found, option_text(option, given))
    }

    fn has_instead(&self, found: &str, given: &str) -> RemountError {
        self.rejects(given.as_ref(), Some(found.into()), given.into())
    }

    /// Rejects an option, given as the text `given`. The mount has `found` in its place.
    fn rejects(&self, option: &OsStr, found: Option<OsString>, given: OsString) -> RemountError {
        RemountError::Change { path: self.path.clone(), option: option.to_owned(), found, given }
    }

    fn lacks(&self, option: &str) -> RemountError {
        self.change(option, None, None)
    }

    /// Changes the flags of the mount and its superblock. A flag that is not set is cleared.
    ///
    /// Without an upper layer, the mount stays read-only. As for a new mount, this is not an error. The flags
    /// of the superblock, and `read_only`, hold for all mounts of the superblock.
    ///
    /// # Errors
    ///
    /// [`RemountError`]. The flags are then the same as before, except with [`RemountError::NotUndone`].
    pub fn remount(mut self, flags: &MountFlags) -> Result<RemountReport, RemountError> {
        // Another process may have changed the flags since the mount was opened.
        self.line = read_line(&self.path, self.line.id)?;
        self.check_dirsync(flags)?;
        let before = self.flags();
        let mut after = *flags;
        after.read_only |= !self.has_upper_layer();
        let attributes = |flags: &MountFlags, read_only| {
            mount_attributes(read_only, flags.attributes, flags.atime)
        };
        let is_read_only = has_flag(&self.line.attributes, "ro");
        let old = attributes(&before, is_read_only);
        let new = attributes(&after, after.read_only);
        // Also if the table shows the same attributes, because they may change at any time.
        self.set_attributes(new)?;
        match self.change_superblock(&before, &after) {
            Ok(()) => Ok(RemountReport { before, after }),
            Err(error) if new == old => Err(error.into()),
            Err(error) => Err(self.undo(old, error)),
        }
    }

    /// Sets the old attributes again after an error.
    fn undo(&self, old: MountAttrFlags, error: KernelError) -> RemountError {
        match self.set_attributes(old) {
            Ok(()) => error.into(),
            Err(undo) => {
                let (source, undo) = (Box::new(error), Box::new(undo));
                RemountError::NotUndone { path: self.path.clone(), source, undo }
            }
        }
    }

    fn set_attributes(&self, attributes: MountAttrFlags) -> Result<(), KernelError> {
        let all = mount_attributes(true, ALL_ATTRIBUTES, Atime::Strictatime)
            | MountAttrFlags::MOUNT_ATTR__ATIME;
        // The kernel changes the rule for access times only if all of its bits are cleared.
        let clear = (all - attributes) | MountAttrFlags::MOUNT_ATTR__ATIME;
        sealmount_sys::mount_setattr_flags(&self.fd, attributes.bits(), clear.bits())
            .map_err(|errno| KernelError::new(Operation::ChangeAttributes, errno).on(&self.path))
    }

    /// Changes the flags of the superblock that differ.
    fn change_superblock(
        &self,
        before: &MountFlags,
        after: &MountFlags,
    ) -> Result<(), KernelError> {
        let (old, new) = (before.superblock_flags, after.superblock_flags);
        let changes = [
            (has_flag(&self.line.superblock, "ro"), after.read_only, "ro", "rw"),
            (old.sync, new.sync, "sync", "async"),
            (old.lazytime, new.lazytime, "lazytime", "nolazytime"),
            (old.mand, new.mand, "mand", "nomand"),
        ];
        let changes: Vec<_> = changes.iter().filter(|(old, new, ..)| old != new).collect();
        if changes.is_empty() {
            return Ok(());
        }
        let context = FsContext::pick("overlay", &self.fd)?.for_image(&self.path);
        for (_, is_set, set, clear) in changes {
            context.set_flag(if *is_set { set } else { clear })?;
        }
        context.reconfigure(Operation::ChangeSuperblock)
    }
}

impl AsFd for AttachedMount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

const ALL_ATTRIBUTES: MountAttributes = MountAttributes {
    nosuid: true,
    nodev: true,
    noexec: true,
    nosymfollow: true,
    nodiratime: true,
};

/// Reads the line of a mount in the table of mounts.
fn read_line(path: &Path, id: u64) -> Result<MountLine, RemountError> {
    let out_of_reach = || RemountError::OutOfReach { path: path.to_owned() };
    find_mount(&read_mount_table()?, id).ok_or_else(out_of_reach)
}

/// Reads the table of mounts through a private procfs, because /proc may be forged.
fn read_mount_table() -> Result<Vec<u8>, KernelError> {
    let failed = |errno| KernelError::new(Operation::ReadMountTable, errno);
    let mut file = File::from(Procfs::require()?.open_mount_table().map_err(failed)?);
    let mut table = Vec::new();
    match file.read_to_end(&mut table) {
        Ok(_) => Ok(table),
        Err(error) => Err(failed(Errno::from_io_error(&error).unwrap_or(Errno::NOMEM))),
    }
}

/// Returns whether two paths are equal or lead to the same directory.
fn is_same_directory(given: &Path, shown: &Path) -> bool {
    let open = |path| openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok();
    let is_same = |(one, other)| is_same_file(one, other).unwrap_or(false);
    given == shown || open(given).zip(open(shown)).is_some_and(is_same)
}

/// Returns the text of an option, with its value if it has one.
fn option_text(option: &OsStr, value: Option<&OsStr>) -> OsString {
    let mut text = option.to_owned();
    if let Some(value) = value {
        text.push("=");
        text.push(value);
    }
    text
}

fn difference(option: &OsStr, found: Option<&OsStr>, given: &OsStr) -> String {
    match found {
        Some(found) => format!("the mount has {}, not {}", shown(found), shown(given)),
        None => format!("the mount has no {}", shown(option)),
    }
}

/// Returns the options that the kernel does not show, with their values.
fn hidden_options(options: &MountOptions) -> [(&'static str, Option<OsString>); 4] {
    let copy = |memory| match memory {
        MemoryKind::Memfd => OsString::from("memfd"),
        MemoryKind::Ramfs => OsString::from("ramfs"),
    };
    let size = |limit| match limit {
        SizeLimit::Bytes(bytes) => OsString::from(bytes.to_string()),
        SizeLimit::Percent(percent) => OsString::from(format!("{percent}%")),
    };
    let path = |location: &Location| {
        location.absolute_path().unwrap_or_else(|| location.display_path()).into_os_string()
    };
    [
        ("digest", options.digest.map(|digest| digest.to_string().into())),
        ("copy", options.copy.map(copy)),
        ("size", options.size.map(size)),
        ("idmap", options.idmap.as_ref().map(path)),
    ]
}

/// The reason why a mount is not remounted. The flags of the mount are the same as before, except with
/// [`RemountError::NotUndone`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemountError {
    /// An option is unknown.
    #[error(transparent)]
    Options(#[from] OptionsError),

    /// The directory cannot be opened.
    #[error(transparent)]
    Directory(#[from] DirectoryError),

    /// The directory is not the root of a mount.
    #[error("{}: cannot remount: the directory is not a mount point", shown(path))]
    #[non_exhaustive]
    NotAMount {
        /// The path of the directory.
        path: PathBuf,
    },

    /// The mount table of the process does not contain the mount: its root directory hides the mount.
    #[error("{}: cannot remount: the mount is out of reach of this process", shown(path))]
    #[non_exhaustive]
    OutOfReach {
        /// The path of the directory.
        path: PathBuf,
    },

    /// The mount is not an overlay.
    #[error(
        "{}: cannot remount: the file system is {}, not composefs",
        shown(path),
        shown(file_system)
    )]
    #[non_exhaustive]
    OtherFileSystem {
        /// The path of the directory.
        path: PathBuf,
        /// The type of the file system.
        file_system: OsString,
    },

    /// The mount is an overlay that does not read objects.
    #[error(
        "{}: cannot remount: the mount is an overlay without object directories, not composefs",
        shown(path)
    )]
    #[non_exhaustive]
    OtherOverlay {
        /// The path of the directory.
        path: PathBuf,
    },

    /// A remount cannot change the option, and the mount has another value or does not have the option.
    #[error("{}: cannot remount: {}", shown(path), difference(option, found.as_deref(), given))]
    #[non_exhaustive]
    Change {
        /// The path of the directory.
        path: PathBuf,
        /// The name of the option.
        option: OsString,
        /// The option of the mount with its value, or `None` if the mount does not have the option.
        found: Option<OsString>,
        /// The given option with its value.
        given: OsString,
    },

    /// The option cannot be compared with the mount, because the kernel does not show the option and there is
    /// no record of it.
    #[error(
        "{}: cannot compare the option {option} with the mount: {}",
        shown(path),
        problem.as_ref().map_or("the mount has no record".into(), ToString::to_string)
    )]
    #[non_exhaustive]
    NotRecorded {
        /// The path of the directory.
        path: PathBuf,
        /// The name of the option.
        option: &'static str,
        /// The reason why the record cannot be used, or `None` if there is no record.
        problem: Option<Box<RecordError>>,
    },

    /// The kernel changed the attributes of the mount, did not change its superblock, and did not set the old
    /// attributes again. The mount has the new attributes, and the superblock has its old flags.
    #[error(
        "{}: cannot undo a part of the remount: {} (the remount failed: {source})",
        shown(path),
        errno_text(undo.errno)
    )]
    #[non_exhaustive]
    NotUndone {
        /// The path of the directory.
        path: PathBuf,
        /// The failed change of the superblock.
        source: Box<KernelError>,
        /// The failed undo.
        undo: Box<KernelError>,
    },

    /// A system call failed.
    #[error(transparent)]
    Kernel(Box<KernelError>),
}

impl RemountError {
    /// Returns the failed system call, if the error is one.
    pub fn kernel(&self) -> Option<&KernelError> {
        match self {
            RemountError::NotRecorded { problem: Some(error), .. } => error.kernel(),
            RemountError::Kernel(error) | RemountError::NotUndone { source: error, .. } => {
                Some(error)
            }
            _ => None,
        }
    }

    /// Returns the [errno](https://man7.org/linux/man-pages/man3/errno.3.html) of the failed system call, if
    /// there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            RemountError::Directory(error) => Some(error.raw_os_error()),
            _ => self.kernel().map(KernelError::raw_os_error),
        }
    }

    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        match self {
            RemountError::Options(error) => error.kind(),
            RemountError::Directory(error) => error.kind(),
            RemountError::Kernel(error) | RemountError::NotUndone { source: error, .. } => {
                error.kind()
            }
            RemountError::NotRecorded { .. }
            | RemountError::NotAMount { .. }
            | RemountError::OutOfReach { .. }
            | RemountError::OtherFileSystem { .. }
            | RemountError::OtherOverlay { .. }
            | RemountError::Change { .. } => ErrorKind::InvalidOptions,
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        Some(match self {
            RemountError::Options(error) => return error.hint(),
            RemountError::Directory(error) if error.kind() == ErrorKind::NotFound => {
                Hint::new("give the directory of a mount")
            }
            RemountError::Directory(error) => return error.hint(),
            RemountError::Kernel(error) => return error.hint(),
            RemountError::Change { option, .. } if option == "dirsync" || option == "nodirsync" => {
                Hint::new(
                    "unmount and mount again: the kernel cannot change dirsync of a superblock",
                )
            }
            RemountError::Change { option, .. } if option == "verity" => Hint::new(
                "leave out verity (with a digest, add noverity), or unmount and mount again with verity",
            ),
            RemountError::Change { .. } => {
                Hint::new("unmount and mount again, or leave out the option")
            }
            RemountError::NotRecorded { problem: None, .. } => Hint::new(
                "leave out the option, or unmount and mount again: the mount was made without digest, \
                 copy, size and idmap, with -n, by another program or in another mount namespace",
            ),
            RemountError::NotRecorded { .. } => {
                Hint::new("leave out digest, copy, size and idmap, or unmount and mount again")
            }
            RemountError::NotUndone { .. } => {
                Hint::new("remount with the flags that the mount must have")
            }
            RemountError::NotAMount { .. } => Hint::new("give the directory of a mount"),
            RemountError::OtherFileSystem { .. } | RemountError::OtherOverlay { .. } => {
                Hint::new("check the directory, and the type in fstab")
            }
            RemountError::OutOfReach { .. } => {
                Hint::new("call from the root directory of the mount namespace")
            }
        })
    }
}

impl From<KernelError> for RemountError {
    fn from(error: KernelError) -> RemountError {
        RemountError::Kernel(Box::new(error))
    }
}
