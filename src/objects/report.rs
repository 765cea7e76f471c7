//! A check of the objects of an image, and its report.

use std::fmt;
use std::path::PathBuf;

use rustix::fs::FileType;

use crate::digest::{Digest, VerityUnavailable};
use crate::kernel::KernelError;
use crate::objects::reference::ImageObject;
use crate::util::text::shown;

/// A check of the objects of an image before the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ObjectCheck {
    /// `check=none`: no check.
    Off,
    /// `check=sample`: if the options request verity, up to four objects of each directory are sampled for
    /// fs-verity. Up to four files of the image are then read through the mount, before the mount is
    /// returned.
    Sample,
    /// `check=all`: every object of the image exists, is a regular file and has the right size. If the
    /// options request verity, the kernel's fs-verity digest of the object is the digest in the image, and
    /// files are read through the mount as with [`Sample`](ObjectCheck::Sample).
    All,
    /// `check=content`: as [`All`](ObjectCheck::All). Also reads every object and computes its fs-verity
    /// digest, on all CPUs.
    Content,
}

impl ObjectCheck {
    /// Returns the value of the option `check=`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            ObjectCheck::Off => "none",
            ObjectCheck::Sample => "sample",
            ObjectCheck::All => "all",
            ObjectCheck::Content => "content",
        }
    }
}

impl fmt::Display for ObjectCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "check={}", self.name())
    }
}

/// The progress of a check of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckProgress {
    /// The number of files, directories and links of the image that are done.
    pub done: u64,
    /// The number of inodes in the superblock of the image, or 0 if the superblock has no number. Files with
    /// several names have one inode, so `done` can be larger.
    pub total: u64,
    /// The number of bytes of objects that are read, with [`ObjectCheck::Content`].
    pub bytes: u64,
    /// The number of bytes to read, or 0 if contents are not checked. While directories are left to read, the
    /// number is an estimate: the bytes that are found, divided by the share of inodes that are found.
    pub total_bytes: u64,
}

/// The reason why an object fails a check.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ObjectProblem {
    /// No object directory has the object.
    Missing,
    /// The object is not a regular file: a directory, a link or a special file.
    #[non_exhaustive]
    NotRegularFile {
        /// The type of the file.
        found: &'static str,
    },
    /// The object has another size than the file in the image.
    #[non_exhaustive]
    WrongSize {
        /// The size of the object, in bytes.
        found: u64,
    },
    /// The options require verity, and the object does not have fs-verity.
    VerityUnavailable(VerityUnavailable),
    /// The kernel's fs-verity digest of the object is not the digest in the image.
    #[non_exhaustive]
    WrongVerityDigest {
        /// The digest that the kernel measured.
        found: Digest,
    },
    /// The content of the object does not have the digest in the image.
    #[non_exhaustive]
    WrongContent {
        /// The digest of the content.
        found: Digest,
    },
    /// The size of the object changed while the object was read.
    Changed,
    /// The options require verity, and the image does not hold the digest of the object.
    NoDigest,
    /// overlayfs rejects the reference: the path is not absolute, has a component `.` or `..`, or the xattrs
    /// are malformed.
    InvalidReference,
    /// The kernel cannot open or read the object.
    Unreadable(Box<KernelError>),
}

impl ObjectProblem {
    /// Returns the kind of the problem.
    pub fn kind(&self) -> ObjectProblemKind {
        match self {
            ObjectProblem::Missing => ObjectProblemKind::Missing,
            ObjectProblem::NotRegularFile { .. } => ObjectProblemKind::NotRegularFile,
            ObjectProblem::WrongSize { .. } => ObjectProblemKind::WrongSize,
            ObjectProblem::VerityUnavailable(_) => ObjectProblemKind::VerityUnavailable,
            ObjectProblem::WrongVerityDigest { .. } => ObjectProblemKind::WrongVerityDigest,
            ObjectProblem::WrongContent { .. } => ObjectProblemKind::WrongContent,
            ObjectProblem::Changed => ObjectProblemKind::Changed,
            ObjectProblem::NoDigest => ObjectProblemKind::NoDigest,
            ObjectProblem::InvalidReference => ObjectProblemKind::InvalidReference,
            ObjectProblem::Unreadable(_) => ObjectProblemKind::Unreadable,
        }
    }

    pub(crate) fn not_regular(file_type: FileType) -> ObjectProblem {
        let found = match file_type {
            FileType::Directory => "directory",
            FileType::Symlink => "symbolic link",
            FileType::Fifo => "FIFO",
            FileType::Socket => "socket",
            FileType::CharacterDevice => "character device",
            FileType::BlockDevice => "block device",
            _ => "special file",
        };
        ObjectProblem::NotRegularFile { found }
    }
}

/// The kind of an [`ObjectProblem`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ObjectProblemKind {
    /// [`ObjectProblem::Missing`]
    Missing,
    /// [`ObjectProblem::NotRegularFile`]
    NotRegularFile,
    /// [`ObjectProblem::WrongSize`]
    WrongSize,
    /// [`ObjectProblem::VerityUnavailable`]
    VerityUnavailable,
    /// [`ObjectProblem::WrongVerityDigest`]
    WrongVerityDigest,
    /// [`ObjectProblem::WrongContent`]
    WrongContent,
    /// [`ObjectProblem::Changed`]
    Changed,
    /// [`ObjectProblem::NoDigest`]
    NoDigest,
    /// [`ObjectProblem::InvalidReference`]
    InvalidReference,
    /// [`ObjectProblem::Unreadable`]
    Unreadable,
}

impl fmt::Display for ObjectProblemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ObjectProblemKind::Missing => "missing",
            ObjectProblemKind::NotRegularFile => "not a regular file",
            ObjectProblemKind::WrongSize => "wrong size",
            ObjectProblemKind::VerityUnavailable => "without fs-verity",
            ObjectProblemKind::WrongVerityDigest => "wrong fs-verity digest",
            ObjectProblemKind::WrongContent => "wrong content",
            ObjectProblemKind::Changed => "changed while read",
            ObjectProblemKind::NoDigest => "without a digest in the image",
            ObjectProblemKind::InvalidReference => "invalid reference",
            ObjectProblemKind::Unreadable => "unreadable",
        })
    }
}

/// An object that fails a check. The text is one line.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ObjectFailure {
    /// The object, and the first file of the image that needs the object, in the order of
    /// [`ErofsMount::objects`](crate::ErofsMount::objects). With [`ObjectProblem::InvalidReference`], the
    /// path of the object is empty.
    pub object: ImageObject,
    /// The object directory that has the object, or `None` if no directory has the object. Of several
    /// directories with a regular file of this name, overlayfs uses the first one.
    pub directory: Option<PathBuf>,
    /// The problem.
    pub problem: ObjectProblem,
}

impl fmt::Display for ObjectFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ImageObject { path, object, size, digest } = &self.object;
        if let ObjectProblem::InvalidReference = self.problem {
            return write!(f, "{}: the reference to the object is invalid", shown(path));
        }
        let object = match &self.directory {
            Some(directory) => directory.join(object),
            None => object.clone(),
        };
        write!(f, "{} needs {}: ", shown(path), shown(&object))?;
        match &self.problem {
            ObjectProblem::NotRegularFile { found } => {
                write!(f, "not a regular file, but a {found}")
            }
            ObjectProblem::WrongSize { found } => {
                write!(f, "the size is {found} bytes, expected {size} bytes")
            }
            ObjectProblem::VerityUnavailable(reason) => reason.fmt(f),
            ObjectProblem::WrongVerityDigest { found } => {
                write!(f, "the fs-verity digest is {found}")?;
                expected(f, *digest)
            }
            ObjectProblem::WrongContent { found } => {
                write!(f, "the content has the digest {found}")?;
                expected(f, *digest)
            }
            ObjectProblem::Unreadable(error) => error.fmt(f),
            problem => problem.kind().fmt(f),
        }
    }
}

fn expected(f: &mut fmt::Formatter<'_>, digest: Option<Digest>) -> fmt::Result {
    digest.map_or(Ok(()), |digest| write!(f, ", expected {digest}"))
}

/// The report of a check of objects. The text is one line with the totals.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CheckReport {
    /// The check.
    pub check: ObjectCheck,
    /// The number of files of the image that have an object. A file with several names counts several times.
    pub files: u64,
    /// The number of objects. An object that several files share counts once.
    pub objects: u64,
    /// The sum of the sizes of the objects in the image, in bytes.
    pub bytes: u64,
    /// The number of objects whose digest the image does not hold. Only existence and size are checked.
    pub without_digest: u64,
    /// The reason why the kernel cannot verify the objects, with [`Verity::Try`](crate::Verity::Try).
    pub unverified: Option<VerityUnavailable>,
    /// The number of objects that fail the check.
    pub failed: u64,
    /// The number of objects that fail, by the kind of the problem.
    pub failed_by_kind: Vec<(ObjectProblemKind, u64)>,
    /// The first failures, at most ten, in the order of [`ErofsMount::objects`](crate::ErofsMount::objects).
    pub failures: Vec<ObjectFailure>,
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CheckReport { check, files, objects, bytes, failed, .. } = self;
        let passed = objects - failed;
        write!(
            f,
            "{check}: {passed} of {objects} objects passed (all objects: {bytes} bytes, for {files} files)"
        )?;
        match (self.check, self.without_digest) {
            (_, 0) => Ok(()),
            (ObjectCheck::Content, count) => {
                write!(f, ", {count} objects without a digest in the image")
            }
            _ => Ok(()),
        }
    }
}
