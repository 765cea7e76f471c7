//! A trusted source of a mount: the file that the kernel verifies, or a sealed copy. One copy serves many
//! mounts.

mod cgroup;
mod copy;
mod decompress;
mod error;
mod limits;
pub(crate) mod loop_device;
pub(crate) mod memory;
mod options;

use std::fmt;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::digest::Digest;
use crate::digest::parallel::{Halted, OnProgress, of_sealed_memfd};
use crate::image::compression::is_supported;
use crate::image::{Compression, Content, Format, Header, Image, ImageProblem};
use crate::kernel::procfs::Procfs;
use crate::kernel::{KernelError, Operation};
use crate::location::Location;
use crate::util::pages::ends_within_page;

pub use error::SourceError;
use loop_device::LoopDevice;
pub use loop_device::LoopDeviceError;
use memory::{SealedMemory, memory_name};
pub use options::{CopyOptions, MemoryKind, SizeLimit};

/// The progress of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// The number of bytes that are copied or hashed.
    pub done: u64,
    /// The size of the image, in bytes, or 0 while the size of a compressed image is not known yet.
    pub total: u64,
}

/// The verifier of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VerifiedBy {
    /// The kernel's fs-verity, which verifies every read of the file.
    Kernel,
    /// sealmount, from the bytes in sealed memory.
    Userspace,
}

impl fmt::Display for VerifiedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            VerifiedBy::Kernel => "measured by the kernel's fs-verity",
            VerifiedBy::Userspace => "computed by sealmount",
        })
    }
}

/// A verified digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// The fs-verity digest of the image.
    pub digest: Digest,
    /// The verifier: the kernel or sealmount.
    pub by: VerifiedBy,
}

impl Verified {
    fn by_kernel(digest: Digest) -> Verified {
        Verified { digest, by: VerifiedBy::Kernel }
    }

    fn in_userspace(digest: Digest) -> Verified {
        Verified { digest, by: VerifiedBy::Userspace }
    }
}

/// The properties of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceReport {
    /// The path of the image, for messages.
    pub image: PathBuf,
    /// The size of the image, in bytes, without trailing data.
    pub size: u64,
    /// The format of the image.
    pub format: Format,
    /// The compression of the file that was copied.
    pub compression: Option<Compression>,
    /// The memory that holds the image, or `None` if the file is mounted.
    pub memory: Option<MemoryKind>,
    /// Whether the image was copied. A sealed memfd is used in place.
    pub copied: bool,
    /// The verified digest, or `None` if no digest was expected.
    pub verified: Option<Verified>,
}

/// The bytes that are mounted: a file that the kernel verifies, a sealed copy, or a file that the caller
/// trusts.
///
/// The second stage of a mount, made by [`Image::copy`], [`Image::verify`] or [`Image::trust`].
/// [`mount`](Source::mount) can be called any number of times. All mounts share the copy, and the loop device
/// if the kernel needs a loop device. Clones are cheap. The kernel frees the memory and the loop device after
/// the last clone and the last mount.
///
/// As [`AsFd`], the source is the file itself. The descriptor of a sealed memfd can be handed to another
/// process. That process can mount or verify the memfd, but cannot change it.
///
/// ```
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/images/v1/image.cfs");
/// use sealmount::{CopyOptions, Image, MemoryKind};
///
/// let mut options = CopyOptions::new(MemoryKind::Memfd);
/// options.digest =
///     Some("9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1".parse()?);
/// let source = Image::open(path)?.copy(&options)?;
/// assert_eq!(source.digest(), options.digest);
///
/// // The sealed memfd is an image too, here or in another process. It is used in place.
/// # use std::os::fd::AsFd;
/// let memfd = source.as_fd().try_clone_to_owned()?;
/// assert!(Image::open(memfd)?.is_sealed());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Source(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: Arc<OwnedFd>,
    location: Location,
    header: Header,
    report: SourceReport,
    ends_within_page: bool,
    procfs: Option<Arc<Procfs>>,
    loop_device: Mutex<Option<Arc<LoopDevice>>>,
}

/// A source without the properties of its image.
struct Parts {
    file: Arc<OwnedFd>,
    header: Header,
    memory: Option<MemoryKind>,
    copied: bool,
    verified: Option<Verified>,
}

impl Parts {
    /// Returns the file of the image itself.
    fn in_place(image: &Image, verified: Option<Verified>) -> Result<Parts, SourceError> {
        // The kernel verified the file after its header was read, so the header is read once more.
        let is_verified_since = verified.is_some_and(|found| found.by == VerifiedBy::Kernel);
        let header = match image.header() {
            Some(header) if !is_verified_since => *header,
            _ => image.header_in(&image.file)?,
        };
        Ok(Parts {
            file: image.file.clone(),
            header,
            memory: image.is_sealed().then_some(MemoryKind::Memfd),
            copied: false,
            verified,
        })
    }

    fn copied(memory: SealedMemory, header: Header, verified: Option<Verified>) -> Parts {
        let (file, kind) = memory.into_parts();
        Parts { file: Arc::new(file), header, memory: Some(kind), copied: true, verified }
    }

    fn of(self, image: &Image) -> Source {
        Source(Arc::new(Inner {
            report: SourceReport {
                image: image.path().to_owned(),
                size: self.header.size(),
                format: self.header.format(),
                compression: image.compression(),
                memory: self.memory,
                copied: self.copied,
                verified: self.verified,
            },
            // A copy that EROFS mounts as a file is padded.
            ends_within_page: !self.copied && ends_within_page(image.file_size()),
            file: self.file,
            location: image.location.clone(),
            header: self.header,
            procfs: image.procfs.clone(),
            loop_device: Mutex::new(None),
        }))
    }
}

impl Image {
    /// Copies the image into memory, decompresses it if needed, and seals the copy. Afterwards the file is
    /// not in use any more.
    ///
    /// With a digest, the copy is hashed on the way, and rejected if it has another digest. A file whose
    /// digest the kernel enforces is not hashed a second time.
    ///
    /// A sealed memfd ([`is_sealed`](Image::is_sealed)) is not copied into another memfd: it is used in
    /// place, and hashed in place if there is a digest.
    ///
    /// # Errors
    ///
    /// See [`SourceError`]. No memory stays allocated.
    pub fn copy(&self, options: &CopyOptions) -> Result<Source, SourceError> {
        self.copy_with_progress(options, &mut |_| ControlFlow::Continue(()))
    }

    /// Copies the image as [`copy`](Image::copy) does, and calls `progress` meanwhile.
    ///
    /// The calling thread calls `progress`, at most a hundred times a second, and once when all bytes are
    /// done. The callback may take any time and call any function: other threads continue to copy. If the
    /// callback returns [`ControlFlow::Break`], or panics, all threads stop within 128 KiB (512 KiB of a
    /// compressed image) and the memory is freed.
    ///
    /// The highest number of threads, the calling thread included:
    ///
    /// | image | with a digest | without |
    /// |---|---|---|
    /// | not compressed | 8 | 1 |
    /// | compressed | 4 | 4 |
    ///
    /// # Errors
    ///
    /// As [`copy`](Image::copy); [`SourceError::Cancelled`] if the callback ended the copy.
    pub fn copy_with_progress(
        &self,
        options: &CopyOptions,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Source, SourceError> {
        let mut progress = Throttle::new(progress);
        let source = self.copy_throttled(options, &mut progress)?;
        // The other threads may have done the last piece, or all pieces.
        let total = match self.content {
            Content::Plain(_) => self.file_size(),
            Content::Compressed(_) => source.report().size,
        };
        match progress.finish(total) {
            ControlFlow::Continue(()) => Ok(source),
            ControlFlow::Break(()) => Err(SourceError::Cancelled { image: self.path().to_owned() }),
        }
    }

    fn copy_throttled(
        &self,
        options: &CopyOptions,
        progress: &mut Throttle,
    ) -> Result<Source, SourceError> {
        match self.content {
            Content::Compressed(format) => {
                let mut progress = |done, total| progress.at(done, total);
                let (memory, header) =
                    decompress::into_memory(self, format, options, &mut progress)?;
                let verified = options.digest.map(Verified::in_userspace);
                Ok(Parts::copied(memory, header, verified).of(self))
            }
            Content::Plain(_) => {
                let total = self.file_size();
                let progress = &mut |done| progress.at(done, total);
                if self.is_sealed() && options.memory == MemoryKind::Memfd {
                    return self.in_place(options.digest, progress);
                }
                self.copied(options, progress)
            }
        }
    }

    fn copied(&self, options: &CopyOptions, progress: OnProgress) -> Result<Source, SourceError> {
        // If the kernel enforces the digest, it verifies the bytes that the copy reads.
        let verified = match options.digest {
            Some(digest) if self.check_measurement(digest).is_ok() => {
                Some(Verified::by_kernel(digest))
            }
            digest => digest.map(Verified::in_userspace),
        };
        let to_hash = verified.filter(|verified| verified.by == VerifiedBy::Userspace);
        let expected = to_hash.map(|verified| verified.digest);
        let memory = copy::into_memory(self, options, expected, progress)?;
        let header = self.header_in(memory.file())?;
        Ok(Parts::copied(memory, header, verified).of(self))
    }

    /// Uses a sealed memfd. Hashes it if there is a digest.
    fn in_place(
        &self,
        digest: Option<Digest>,
        progress: OnProgress,
    ) -> Result<Source, SourceError> {
        if let Some(expected) = digest {
            let file = self.file.as_fd();
            let found = of_sealed_memfd(expected.algorithm(), file, self.file_size(), progress)
                .map_err(|error: HashError| error.of(self.path()))?;
            if found != expected {
                return Err(SourceError::mismatch(self.path(), expected, found));
            }
        }
        let verified = digest.map(Verified::in_userspace);
        Ok(Parts::in_place(self, verified)?.of(self))
    }

    /// Verifies the image without a copy: the kernel's fs-verity must enforce this digest on the file.
    ///
    /// A sealed memfd cannot change, so its digest is computed in place, on all CPUs.
    ///
    /// # Errors
    ///
    /// [`SourceError::DigestMismatch`]; [`SourceError::VerityUnavailable`] if the file has no fs-verity;
    /// [`SourceError::Image`] if the file is compressed.
    pub fn verify(&self, digest: Digest) -> Result<Source, SourceError> {
        self.require_uncompressed()?;
        if self.is_sealed() {
            return self.in_place(Some(digest), &mut |_| ControlFlow::Continue(()));
        }
        self.check_measurement(digest)?;
        Ok(Parts::in_place(self, Some(Verified::by_kernel(digest)))?.of(self))
    }

    /// Uses the file without verification. A process that can write to the file can change the content of the
    /// mount.
    ///
    /// # Errors
    ///
    /// [`SourceError::Image`] if the file is compressed.
    pub fn trust(&self) -> Result<Source, SourceError> {
        self.require_uncompressed()?;
        Ok(Parts::in_place(self, None)?.of(self))
    }

    fn require_uncompressed(&self) -> Result<(), SourceError> {
        match self.content {
            Content::Plain(_) => Ok(()),
            // The advice to copy would not help if this build has no decoder.
            Content::Compressed(format) if is_supported(format) => {
                Err(SourceError::invalid(self.path(), ImageProblem::Compressed(format)))
            }
            Content::Compressed(format) => {
                Err(SourceError::invalid(self.path(), ImageProblem::CompressionUnsupported(format)))
            }
        }
    }

    /// Checks that the kernel enforces this digest on the file.
    fn check_measurement(&self, expected: Digest) -> Result<(), SourceError> {
        match self.verity()?.digest(expected.algorithm()) {
            Ok(found) if found == expected => Ok(()),
            Ok(found) => Err(SourceError::mismatch(self.path(), expected, found)),
            Err(reason) => {
                Err(SourceError::VerityUnavailable { image: self.path().to_owned(), reason })
            }
        }
    }
}

/// The reason why an image could not be hashed in place.
enum HashError {
    Halted(Halted),
    Read(std::io::Error),
}

impl HashError {
    fn of(self, image: &Path) -> SourceError {
        match self {
            HashError::Halted(halted) => SourceError::from_halted(image, halted),
            HashError::Read(error) => match rustix::io::Errno::from_io_error(&error) {
                Some(errno) => KernelError::new(Operation::ReadImage, errno).on(image).into(),
                None => SourceError::Changed { image: image.to_owned() },
            },
        }
    }
}

impl From<Halted> for HashError {
    fn from(halted: Halted) -> HashError {
        HashError::Halted(halted)
    }
}

impl From<std::io::Error> for HashError {
    fn from(error: std::io::Error) -> HashError {
        HashError::Read(error)
    }
}

impl Source {
    /// Returns the properties of the source.
    pub fn report(&self) -> &SourceReport {
        &self.0.report
    }

    /// Returns the path of the image, for messages.
    pub fn path(&self) -> &Path {
        &self.0.report.image
    }

    /// Returns the verified fs-verity digest, or `None` if no digest was expected.
    pub fn digest(&self) -> Option<Digest> {
        self.0.report.verified.map(|verified| verified.digest)
    }

    pub(crate) fn header(&self) -> &Header {
        &self.0.header
    }

    /// Returns whether EROFS may have to read the last page of a file that ends within this page.
    pub(crate) fn ends_within_page(&self) -> bool {
        self.0.ends_within_page
    }

    pub(crate) fn location(&self) -> &Location {
        &self.0.location
    }

    /// Returns the procfs that the image was opened through.
    pub(crate) fn procfs(&self) -> Option<&Procfs> {
        self.0.procfs.as_deref()
    }

    /// Returns the loop device of the source. Attaches the file at the first call.
    pub(crate) fn loop_device(&self) -> Result<Arc<LoopDevice>, LoopDeviceError> {
        let mut device = self.0.loop_device.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = &*device {
            return Ok(device.clone());
        }
        let block_size = self.header().block_size();
        let attached = LoopDevice::attach(&self.0.file, block_size, &memory_name(self.path()))?;
        Ok(device.insert(Arc::new(attached)).clone())
    }
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

/// Calls a callback at most a hundred times a second, and when the work is finished.
struct Throttle<'a> {
    callback: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    next: Option<Instant>,
    /// The number of bytes in the last call.
    reported: Option<u64>,
}

impl<'a> Throttle<'a> {
    const INTERVAL: Duration = Duration::from_millis(10);

    fn new(callback: &'a mut dyn FnMut(Progress) -> ControlFlow<()>) -> Throttle<'a> {
        Throttle { callback, next: None, reported: None }
    }

    fn at(&mut self, done: u64, total: u64) -> ControlFlow<()> {
        let now = Instant::now();
        if self.next.is_some_and(|next| now < next) {
            return ControlFlow::Continue(());
        }
        self.next = Some(now + Throttle::INTERVAL);
        self.call(done, total)
    }

    /// Reports that all bytes are done, if the last call has not reported it.
    fn finish(&mut self, total: u64) -> ControlFlow<()> {
        if self.reported == Some(total) {
            return ControlFlow::Continue(());
        }
        self.call(total, total)
    }

    fn call(&mut self, done: u64, total: u64) -> ControlFlow<()> {
        self.reported = Some(done);
        (self.callback)(Progress { done, total })
    }
}
