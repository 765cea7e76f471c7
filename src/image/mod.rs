//! An opened image: header, size, format and compression are known, and not verified.

pub(crate) mod compression;
pub(crate) mod header;
pub(crate) mod window;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    CWD, FileType, Mode, OFlags, RawMode, SealFlags, fcntl_get_seals, fstat, fstatfs, openat,
};
use sealmount_sys::TMPFS_MAGIC;

use crate::digest::VerityStatus;
use crate::digest::measure::measure;
use crate::kernel::procfs::Procfs;
use crate::kernel::{ErrorKind, Hint, KernelError, Operation};
use crate::location::Location;
use crate::util::io::read_at;
use crate::util::text::shown;

pub use compression::Compression;
use header::{Accept, HEADER_SIZE};
pub use header::{Format, Header, ImageProblem};

/// The reason why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file is not an image that can be mounted.
    #[error("{}: cannot mount the image: {problem}", shown(image))]
    #[non_exhaustive]
    Invalid {
        /// The path of the image.
        image: PathBuf,
        /// The reason.
        problem: ImageProblem,
    },

    /// A system call failed.
    #[error(transparent)]
    Kernel(Box<KernelError>),
}

impl ImageError {
    /// Returns the failed system call, if the error is one.
    pub fn kernel(&self) -> Option<&KernelError> {
        match self {
            ImageError::Kernel(error) => Some(error),
            _ => None,
        }
    }

    /// Returns the [errno](https://man7.org/linux/man-pages/man3/errno.3.html) of the failed system call, if
    /// there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.kernel().map(KernelError::raw_os_error)
    }

    /// Returns the category of the error, for the decision of a program.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ImageError::Invalid { problem: ImageProblem::CompressionUnsupported(_), .. } => {
                ErrorKind::Unsupported
            }
            ImageError::Invalid { problem: ImageProblem::Compressed(_), .. } => {
                ErrorKind::InvalidOptions
            }
            ImageError::Invalid { .. } => ErrorKind::NotAnImage,
            ImageError::Kernel(error) => error.kind(),
        }
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        Some(match self {
            ImageError::Invalid { problem: ImageProblem::Compressed(_), .. } => {
                Hint::of_types_or_options("mount a copy: Image::copy", "add the option copy")
            }
            ImageError::Invalid {
                problem: ImageProblem::CompressionUnsupported(format), ..
            } => Hint::new(match format {
                Compression::Zstd => {
                    "build sealmount with the feature zstd, or decompress the image"
                }
                Compression::Xz => "build sealmount with the feature xz, or decompress the image",
                Compression::Gzip => {
                    "build sealmount with the feature gzip, or decompress the image"
                }
            }),
            ImageError::Invalid { problem: ImageProblem::NotAFile("block device"), .. } => {
                Hint::new("give the file of the image itself, without the option loop")
            }
            ImageError::Invalid { problem: ImageProblem::PlainErofs, .. } => {
                Hint::of_types_or_options(
                    "use Image::open_erofs to mount a plain EROFS image",
                    "mount a plain EROFS image with -t erofs",
                )
            }
            ImageError::Kernel(error) => return error.hint(),
            _ => return None,
        })
    }
}

impl From<KernelError> for ImageError {
    fn from(error: KernelError) -> ImageError {
        ImageError::Kernel(Box::new(error))
    }
}

/// An opened image, not verified.
///
/// The first stage of a mount. [`copy`](Image::copy), [`verify`](Image::verify) and [`trust`](Image::trust)
/// make a [`Source`](crate::Source) of the image. Clones share the descriptor.
///
/// ```
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/images/v1/image.cfs");
/// use sealmount::Image;
///
/// let image = Image::open(path)?;
/// println!("{}: {:?} bytes, {:?}", image.path().display(), image.size(), image.format());
/// # assert_eq!(image.size(), Some(image.file_size()));
/// # Ok::<(), sealmount::ImageError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Image {
    pub(crate) file: Arc<OwnedFd>,
    pub(crate) location: Location,
    path: PathBuf,
    file_size: u64,
    pub(crate) content: Content,
    is_sealed: bool,
    accept: Accept,
    /// The procfs that the image was opened through. Its paths lead to the opened file.
    pub(crate) procfs: Option<Arc<Procfs>>,
}

/// The contents of the file.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content {
    Plain(Header),
    /// The header is not known before the file is decompressed.
    Compressed(Compression),
}

impl Image {
    /// Opens a composefs image, plain or compressed, and checks its header and size.
    ///
    /// If a path does not lead to a regular file, the path is rejected before the file is opened for reading.
    /// Opening a FIFO could block, and opening a device could have an effect. A descriptor must be readable.
    /// The position of the descriptor is not used and does not change.
    ///
    /// # Errors
    ///
    /// [`ImageError::Invalid`] if the file is not a composefs image, is truncated or has trailing data;
    /// [`ImageError::Kernel`] if a system call fails.
    pub fn open(image: impl Into<Location>) -> Result<Image, ImageError> {
        Image::open_with(image.into(), Accept::Composefs, None)
    }

    /// Opens an EROFS image: a composefs image or a plain EROFS image. A plain EROFS image that is not
    /// compressed may have trailing data behind its last block.
    ///
    /// # Errors
    ///
    /// [`ImageError::Invalid`] if the file is not an EROFS image or is truncated; [`ImageError::Kernel`] if a
    /// system call fails.
    pub fn open_erofs(image: impl Into<Location>) -> Result<Image, ImageError> {
        Image::open_with(image.into(), Accept::AnyErofs, None)
    }

    /// Opens a composefs image through a private procfs. If another file replaces the image at this moment,
    /// that file is not opened.
    pub(crate) fn open_through(location: Location, procfs: Procfs) -> Result<Image, ImageError> {
        Image::open_with(location, Accept::Composefs, Some(Arc::new(procfs)))
    }

    fn open_with(
        location: Location,
        accept: Accept,
        procfs: Option<Arc<Procfs>>,
    ) -> Result<Image, ImageError> {
        let path = location.display_path();
        let failed =
            |operation, errno| ImageError::from(KernelError::new(operation, errno).on(&path));
        let invalid = |problem| ImageError::Invalid { image: path.clone(), problem };

        let file = match &location {
            Location::Path(path) => {
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                let found = openat(CWD, path, flags, Mode::empty())
                    .map_err(|errno| failed(Operation::OpenImage, errno))?;
                let stat = fstat(&found).map_err(|errno| failed(Operation::OpenImage, errno))?;
                require_regular(stat.st_mode).map_err(invalid)?;
                let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
                match &procfs {
                    Some(procfs) => procfs.reopen(&found, flags),
                    None => openat(CWD, path, flags, Mode::empty()),
                }
            }
            Location::Fd(fd) => rustix::io::fcntl_dupfd_cloexec(fd, 0),
        }
        .map_err(|errno| failed(Operation::OpenImage, errno))?;
        // The seals are read first. If the file is sealed, its content cannot change after this point.
        let is_sealed = is_sealed(&file);
        let stat = fstat(&file).map_err(|errno| failed(Operation::OpenImage, errno))?;
        require_regular(stat.st_mode).map_err(invalid)?;

        let mut start = [0; HEADER_SIZE];
        let length =
            read_at(&file, &mut start, 0).map_err(|errno| failed(Operation::ReadImage, errno))?;
        let start = &start[..length];
        // The size of a regular file is not negative.
        let file_size = stat.st_size as u64;
        let content = match Compression::of(start) {
            Some(format) => Content::Compressed(format),
            None => {
                let header = Header::parse(start, accept).map_err(invalid)?;
                header.check_size(file_size).map_err(invalid)?;
                Content::Plain(header)
            }
        };
        let file = Arc::new(file);
        Ok(Image { file, location, path, file_size, content, is_sealed, accept, procfs })
    }

    /// Returns the path of the image, for messages. An image given by descriptor has the path that the
    /// kernel knows, or its path below /proc.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the size of the file when it was opened, in bytes.
    pub fn file_size(&self) -> u64 {
        self.file_size
    }

    /// Returns the compression of the file, or `None` if it is not compressed.
    pub fn compression(&self) -> Option<Compression> {
        match self.content {
            Content::Plain(_) => None,
            Content::Compressed(format) => Some(format),
        }
    }

    /// Returns the header of the image, or `None` if the file is compressed. The copy of a compressed
    /// image has a header.
    pub fn header(&self) -> Option<&Header> {
        match &self.content {
            Content::Plain(header) => Some(header),
            Content::Compressed(_) => None,
        }
    }

    /// Returns the size of the image, in bytes, or `None` if the file is compressed.
    pub fn size(&self) -> Option<u64> {
        self.header().map(Header::size)
    }

    /// Returns the format of the image, or `None` if the file is compressed.
    pub fn format(&self) -> Option<Format> {
        self.header().map(Header::format)
    }

    /// Returns whether the file is a memfd that no process can change any more. Such a memfd has the seals
    /// `F_SEAL_WRITE`, `F_SEAL_GROW` and `F_SEAL_SHRINK`
    /// ([fcntl(2)](https://man7.org/linux/man-pages/man2/F_GET_SEALS.2const.html), Linux 3.17). If the seals
    /// cannot be read, the file counts as not sealed.
    pub fn is_sealed(&self) -> bool {
        self.is_sealed
    }

    /// Measures the fs-verity digest of the file, which the kernel enforces
    /// ([`FS_IOC_MEASURE_VERITY`](https://docs.kernel.org/filesystems/fsverity.html#fs-ioc-measure-verity),
    /// Linux 5.4).
    ///
    /// # Errors
    ///
    /// [`ImageError::Kernel`]
    pub fn verity(&self) -> Result<VerityStatus, ImageError> {
        measure(&self.file).map_err(|errno| {
            KernelError::new(Operation::MeasureVerity, errno).on(&self.path).into()
        })
    }

    /// Reads the header once more, from the image or a copy that cannot change any more. The header that
    /// was read when the image was opened is not verified.
    pub(crate) fn header_in(&self, file: &OwnedFd) -> Result<Header, ImageError> {
        let invalid = |problem| ImageError::Invalid { image: self.path.clone(), problem };
        let mut start = [0; HEADER_SIZE];
        let length = read_at(file, &mut start, 0)
            .map_err(|errno| KernelError::new(Operation::ReadImage, errno).on(&self.path))?;
        let header = self.parse_header(&start[..length]).map_err(invalid)?;
        header.check_size(self.file_size).map_err(invalid)?;
        Ok(header)
    }

    /// Parses the start of the image, in the formats that the caller accepts.
    pub(crate) fn parse_header(&self, start: &[u8]) -> Result<Header, ImageProblem> {
        Header::parse(start, self.accept)
    }
}

/// The file of the image, as it was opened.
impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Returns whether a file is a memfd that no process can change. Only files in memory have seals. For any
/// other file, the kernel fails with EINVAL.
fn is_sealed(file: &OwnedFd) -> bool {
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK;
    fcntl_get_seals(file).is_ok_and(|found| found.contains(seals))
        // A memfd of huge pages has seals too, and cannot be attached to a loop device.
        && fstatfs(file).is_ok_and(|found| found.f_type == TMPFS_MAGIC)
}

fn require_regular(mode: RawMode) -> Result<(), ImageProblem> {
    Err(ImageProblem::NotAFile(match FileType::from_raw_mode(mode) {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "directory",
        FileType::BlockDevice => "block device",
        FileType::CharacterDevice => "character device",
        FileType::Fifo => "FIFO",
        FileType::Socket => "socket",
        _ => "file of another type",
    }))
}
