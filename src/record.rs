//! Records of the options that the kernel does not show: a file for each mount in /run/sealmount.
//!
//! The name of a file holds the unique ID of the mount (Linux 6.8), which the kernel does not use again until
//! the next boot. The file system of the directory is in memory and does not survive a boot. So a record
//! cannot describe a later mount. docs/design.md has the alternatives.

use std::ffi::{CStr, CString, OsString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, FsWord, Mode, OFlags, RawDir, Stat, StatFs, StatxFlags, fstat, fstatfs,
    mkdirat, openat, renameat, statfs, statx, unlinkat,
};
use rustix::io::{Errno, retry_on_intr};
use sealmount_sys::TMPFS_MAGIC;

use crate::kernel::procfs::Procfs;
use crate::kernel::{ErrorKind, Hint, KernelError, Operation};
use crate::location::{Location, is_same_file};
use crate::options::MountOptions;
use crate::overlay::OverlayOptions;
use crate::util::io::read_at;
use crate::util::text::shown;

const PARENT: &str = "/run";
const DIRECTORY: &str = "/run/sealmount";

/// The maximum number of records of other mount namespaces, with the new record. A mount namespace leaves its
/// records when it ends. This mount namespace has at most one record for each mount.
const MAX_OF_OTHER_ROOTS: usize = 256;

/// The size of a file that is not a record. Object directories have paths of up to 4096 bytes.
const TOO_LARGE: usize = 1024 * 1024;

/// The magic number of ramfs, of statfs(2). Without tmpfs, the /run of an initramfs is on a ramfs.
const RAMFS_MAGIC: FsWord = 0x8584_58f6_u32 as FsWord;

/// `STATX_MNT_ID_UNIQUE` (Linux 6.8), which rustix lacks.
const MNT_ID_UNIQUE: u32 = 0x4000;

/// The options of a mount that the kernel does not show: `digest=`, `copy`, `size=` and `idmap=`. A remount
/// compares its options with the record ([`AttachedMount::compare`](crate::AttachedMount::compare)).
///
/// ```no_run
/// # fn f(options: sealmount::MountOptions) -> Result<(), sealmount::Error> {
/// let mount = options.mount("/images/base.cfs")?;
/// let record = options.record(&mount)?;
/// mount.attach("/mnt")?;
/// if let Some(record) = record {
///     record.write()?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct MountRecord {
    name: RecordName,
    text: OsString,
}

impl MountOptions {
    /// Makes the record of a mount with these options. Returns `None` if the kernel shows all of the options.
    ///
    /// # Errors
    ///
    /// [`RecordError`]. Before Linux 6.8, a mount has no unique ID and cannot have a record.
    pub fn record(&self, mount: impl AsFd) -> Result<Option<MountRecord>, RecordError> {
        if self.digest.is_none()
            && self.copy.is_none()
            && self.size.is_none()
            && self.idmap.is_none()
        {
            return Ok(None);
        }
        let name = RecordName::of(mount, Operation::WriteRecord)?;
        Ok(Some(MountRecord { name, text: self.recorded().to_text() }))
    }

    /// Returns the options of the record, with absolute paths.
    fn recorded(&self) -> MountOptions {
        let absolute =
            |location: &Location| location.absolute_path().map_or(location.clone(), Location::Path);
        MountOptions {
            digest: self.digest,
            copy: self.copy,
            size: self.size,
            idmap: self.idmap.as_ref().map(absolute),
            overlay: OverlayOptions {
                objects: self.overlay.objects.iter().map(absolute).collect(),
                ..OverlayOptions::default()
            },
        }
    }
}

impl MountRecord {
    /// Writes the record to a file in /run/sealmount that only root can read. The mount must be attached:
    /// records of mounts that are not in the mount namespace are removed.
    ///
    /// # Errors
    ///
    /// [`RecordError`]: a system call failed, another user can write to /run/sealmount, the directory is not on a
    /// tmpfs or ramfs, or the mount namespace belongs to another user namespace.
    pub fn write(&self) -> Result<(), RecordError> {
        check_namespace(Operation::WriteRecord)?;
        let directory = make_directory()?;
        let failed = |errno| failed(Operation::WriteRecord, &self.name.path(), errno);
        remove_stale(&directory, self.name.root).map_err(failed)?;
        write(&directory, &self.name, self.text.as_bytes()).map_err(failed)
    }
}

/// Returns the recorded options of a mount, or `None` if the mount has no record.
pub(crate) fn find(mount: impl AsFd) -> Result<Option<MountOptions>, RecordError> {
    let name = RecordName::of(mount, Operation::ReadRecord)?;
    let path = name.path();
    let failed = |errno| failed(Operation::ReadRecord, &path, errno);
    check_namespace(Operation::ReadRecord)?;
    let Some(directory) = open_directory(Operation::ReadRecord)? else { return Ok(None) };
    // The root may have been another mount when the record was written, as in an initramfs.
    let mut found = None;
    for_each_record(&directory, |file_name, record, is_new| {
        if record.mount == name.mount && !is_new {
            found = Some(file_name.to_owned());
        }
    })
    .map_err(failed)?;
    let Some(file_name) = found else { return Ok(None) };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(&directory, &file_name, flags, Mode::empty()).map_err(failed)?;
    let stat = fstat(&file).map_err(failed)?;
    if !FileType::from_raw_mode(stat.st_mode).is_file() || !is_of_root_alone(&stat) {
        return Err(RecordError::new(Operation::ReadRecord, path, RecordProblem::Untrusted));
    }
    let mut text = vec![0; usize::try_from(stat.st_size).unwrap_or(TOO_LARGE).min(TOO_LARGE)];
    let length = read_at(&file, &mut text, 0).map_err(failed)?;
    text.truncate(length);
    let options = MountOptions::parse(OsString::from_vec(text));
    options
        .map(Some)
        .map_err(|_| RecordError::new(Operation::ReadRecord, path, RecordProblem::Damaged))
}

/// The name of a record.
#[derive(Debug, PartialEq, Eq)]
struct RecordName {
    /// The ID of the mount that was the root of the writer. Mount namespaces that share /run have different
    /// roots, so the record of a mount in another namespace is not stale.
    root: u64,
    mount: u64,
}

impl RecordName {
    fn of(mount: impl AsFd, operation: Operation) -> Result<RecordName, RecordError> {
        let root = unique_id(CWD, "/", AtFlags::empty(), operation)?;
        let mount = unique_id(mount, "", AtFlags::EMPTY_PATH, operation)?;
        Ok(RecordName { root, mount })
    }

    fn text(&self) -> String {
        format!("{}-{}", self.root, self.mount)
    }

    fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(self.text())
    }
}

/// Returns the unique ID of the mount of a file.
fn unique_id(
    directory: impl AsFd,
    path: &str,
    flags: AtFlags,
    operation: Operation,
) -> Result<u64, RecordError> {
    let statx = statx(directory, path, flags, StatxFlags::from_bits_retain(MNT_ID_UNIQUE))
        .map_err(|errno| failed(operation, Path::new(DIRECTORY), errno))?;
    match statx.stx_mask & MNT_ID_UNIQUE {
        // Linux < 6.8
        0 => Err(RecordError::new(operation, DIRECTORY, RecordProblem::NoUniqueId)),
        _ => Ok(statx.stx_mnt_id),
    }
}

/// Parses the file name of a record. Returns whether the record is being written.
fn parse_name(name: &[u8]) -> Option<(RecordName, bool)> {
    let name = std::str::from_utf8(name).ok()?;
    let whole = name.strip_suffix(NEW);
    let (root, mount) = whole.unwrap_or(name).split_once('-')?;
    let record = RecordName { root: root.parse().ok()?, mount: mount.parse().ok()? };
    Some((record, whole.is_some()))
}

/// The end of the name of a file that is being written.
const NEW: &str = ".new";

fn failed(operation: Operation, path: &Path, errno: Errno) -> RecordError {
    let problem = KernelError::new(operation, errno).on(path);
    RecordError::new(operation, path, RecordProblem::Kernel(Box::new(problem)))
}

fn is_of_root_alone(stat: &Stat) -> bool {
    stat.st_uid == 0 && stat.st_mode & 0o022 == 0
}

/// Checks that the mount namespace belongs to the user namespace of the caller. The owner of another one could
/// mount any directory of the system on the directory of the records.
fn check_namespace(operation: Operation) -> Result<(), RecordError> {
    let path = Path::new(DIRECTORY);
    let failed = |errno| failed(operation, path, errno);
    let kernel = |error: KernelError| {
        RecordError::new(operation, path, RecordProblem::Kernel(Box::new(error)))
    };
    let procfs = Procfs::require().map_err(kernel)?;
    let namespace = procfs.open_mount_namespace().map_err(failed)?;
    let owner = sealmount_sys::owner_of_namespace(namespace).map_err(failed)?;
    let own = procfs.open_user_namespace().map_err(failed)?;
    match is_same_file(owner, own).map_err(failed)? {
        true => Ok(()),
        false => Err(RecordError::new(operation, path, RecordProblem::OtherUserNamespace)),
    }
}

/// Opens the directory of the records. Returns `None` if it does not exist.
fn open_directory(operation: Operation) -> Result<Option<OwnedFd>, RecordError> {
    let path = Path::new(DIRECTORY);
    let failed = |errno| failed(operation, path, errno);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match openat(CWD, path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        directory => directory.map_err(failed)?,
    };
    if !is_of_root_alone(&fstat(&directory).map_err(failed)?) {
        return Err(RecordError::new(operation, path, RecordProblem::Untrusted));
    }
    check_memory(operation, path, fstatfs(&directory))?;
    Ok(Some(directory))
}

/// Checks that a directory does not survive a boot, after which the kernel uses the IDs of mounts again.
fn check_memory(
    operation: Operation,
    path: &Path,
    statfs: Result<StatFs, Errno>,
) -> Result<(), RecordError> {
    match statfs.map_err(|errno| failed(operation, path, errno))?.f_type {
        TMPFS_MAGIC | RAMFS_MAGIC => Ok(()),
        _ => Err(RecordError::new(operation, path, RecordProblem::NotInMemory)),
    }
}

fn make_directory() -> Result<OwnedFd, RecordError> {
    let failed = |errno| failed(Operation::WriteRecord, Path::new(DIRECTORY), errno);
    if let Some(directory) = open_directory(Operation::WriteRecord)? {
        return Ok(directory);
    }
    check_memory(Operation::WriteRecord, Path::new(PARENT), statfs(PARENT))?;
    match mkdirat(CWD, DIRECTORY, Mode::RWXU) {
        // Another mount made the directory.
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(failed(errno)),
    }
    open_directory(Operation::WriteRecord)?.ok_or_else(|| failed(Errno::NOENT))
}

/// Calls `visit` with the file name of each record, its parsed name, and whether it is being written.
fn for_each_record(
    directory: &OwnedFd,
    mut visit: impl FnMut(&CStr, RecordName, bool),
) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(directory, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if let Some((record, is_new)) = parse_name(entry.file_name().to_bytes()) {
            visit(entry.file_name(), record, is_new);
        }
    }
    Ok(())
}

/// Removes the records of this root whose mounts are gone from the mount namespace. If there are too many
/// records of other roots, removes the oldest one: its mount namespace may be gone.
fn remove_stale(directory: &OwnedFd, root: u64) -> Result<(), Errno> {
    let remove = |file_name: &CStr| {
        // Another process may have removed the record.
        let _ = unlinkat(directory, file_name, AtFlags::empty());
    };
    let mut others = 0;
    let mut oldest: Option<(u64, CString)> = None;
    for_each_record(directory, |file_name, record, _| {
        if record.root != root {
            others += 1;
            // The kernel counts the unique IDs up.
            if oldest.as_ref().is_none_or(|(mount, _)| record.mount < *mount) {
                oldest = Some((record.mount, file_name.to_owned()));
            }
        } else if sealmount_sys::statmount_exists(record.mount) == Err(Errno::NOENT) {
            remove(file_name);
        }
    })?;
    if let Some((_, file_name)) = oldest.filter(|_| others >= MAX_OF_OTHER_ROOTS) {
        remove(&file_name);
    }
    Ok(())
}

/// Writes a record under another name and renames the file, so a reader never sees a part of a record.
fn write(directory: &OwnedFd, name: &RecordName, text: &[u8]) -> Result<(), Errno> {
    let (name, new) = (name.text(), name.text() + NEW);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = openat(directory, &new, flags, Mode::RUSR | Mode::WUSR)?;
    let result = match retry_on_intr(|| rustix::io::write(&file, text)) {
        Ok(length) if length == text.len() => renameat(directory, &new, directory, &name),
        // A file system in memory writes less only if it is full.
        Ok(_) => Err(Errno::NOSPC),
        Err(errno) => Err(errno),
    };
    if result.is_err() {
        let _ = unlinkat(directory, &new, AtFlags::empty());
    }
    result
}

/// The reason why the options of a mount are not recorded, or not read.
#[derive(Debug)]
pub struct RecordError {
    operation: Operation,
    path: PathBuf,
    problem: RecordProblem,
}

/// The problem of a [`RecordError`].
#[derive(Debug)]
#[non_exhaustive]
pub enum RecordProblem {
    /// The kernel has no unique IDs of mounts (Linux 6.8), so a record could describe a later mount.
    NoUniqueId,
    /// The record or its directory does not belong to root, or other users can write to it.
    Untrusted,
    /// The directory is not on a tmpfs or ramfs. After a boot, a record could describe another mount.
    NotInMemory,
    /// The mount namespace does not belong to the user namespace of the caller. The owner of the mount namespace
    /// can put another directory in front of /run/sealmount.
    OtherUserNamespace,
    /// The record is not the text of options.
    Damaged,
    /// A system call failed.
    Kernel(Box<KernelError>),
}

impl RecordError {
    fn new(operation: Operation, path: impl Into<PathBuf>, problem: RecordProblem) -> RecordError {
        RecordError { operation, path: path.into(), problem }
    }

    /// Returns the record, or the directory of the records.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the reason.
    pub fn problem(&self) -> &RecordProblem {
        &self.problem
    }

    /// Returns the failed system call, if the error is one.
    pub fn kernel(&self) -> Option<&KernelError> {
        match &self.problem {
            RecordProblem::Kernel(error) => Some(error),
            _ => None,
        }
    }

    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        match &self.problem {
            RecordProblem::NoUniqueId | RecordProblem::NotInMemory => ErrorKind::Unsupported,
            RecordProblem::Untrusted | RecordProblem::OtherUserNamespace => {
                ErrorKind::PermissionDenied
            }
            RecordProblem::Damaged => ErrorKind::Io,
            RecordProblem::Kernel(error) => error.kind(),
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        match &self.problem {
            RecordProblem::NoUniqueId => Some(Hint::new("use Linux 6.8 or later")),
            RecordProblem::Untrusted => Some(Hint::new(
                "remove /run/sealmount, and find the program that changed the directory",
            )),
            RecordProblem::NotInMemory => Some(Hint::new("mount a tmpfs on /run")),
            RecordProblem::OtherUserNamespace | RecordProblem::Damaged => None,
            RecordProblem::Kernel(error) => error.hint(),
        }
    }
}

impl std::fmt::Display for RecordError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = shown(&self.path);
        match &self.problem {
            RecordProblem::NoUniqueId => {
                let operation = self.operation;
                write!(f, "{path}: cannot {operation}: unique IDs of mounts need Linux 6.8")
            }
            RecordProblem::Untrusted => {
                write!(f, "{path}: cannot use the record: users other than root can change it")
            }
            RecordProblem::NotInMemory => {
                let operation = self.operation;
                write!(f, "{path}: cannot {operation}: the file system is not a tmpfs or ramfs")
            }
            RecordProblem::OtherUserNamespace => {
                let operation = self.operation;
                write!(
                    f,
                    "{path}: cannot {operation}: the mount namespace belongs to another user namespace"
                )
            }
            RecordProblem::Damaged => {
                write!(f, "{path}: cannot use the record: the content is damaged")
            }
            RecordProblem::Kernel(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for RecordError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(self.kernel()?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn name_of_record_keeps_root_and_mount(root: u64, mount: u64) {
            let name = RecordName { root, mount }.text();
            let parsed = |is_new| Some((RecordName { root, mount }, is_new));
            prop_assert_eq!(parse_name(name.as_bytes()), parsed(false));
            let new = name + NEW;
            prop_assert_eq!(parse_name(new.as_bytes()), parsed(true));
        }

        #[test]
        fn any_file_name_parses_without_panic(name: Vec<u8>) {
            parse_name(&name);
        }
    }

    #[test]
    fn record_keeps_hidden_options_alone() {
        let text = "basedir=/a:/b,digest=9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1,\
                    copy=ramfs,size=25%,idmap=/proc/1/ns/user";
        let given = MountOptions::parse(format!("{text},ro,nosuid,verity")).unwrap();
        let recorded = MountOptions::parse(given.recorded().to_text()).unwrap();
        assert_eq!(recorded, MountOptions::parse(text).unwrap());
    }
}
