//! The EROFS of an image: the ladder of its source.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::error::{Error, KernelError, Operation};
use crate::fs_context::FsContext;
use crate::image::{Header, Image};
use crate::location::proc_fd_path;
use crate::loop_device::LoopDevice;
use crate::memory::{SealedMemory, memory_name};
use crate::options::Memory;
use crate::procfs::Procfs;
use crate::step::{Rung, Step};

/// What is mounted. Where a digest was asked for, it has been verified.
#[derive(Debug)]
pub(crate) enum Source {
    File(Image),
    Memory(SealedMemory),
}

impl Source {
    pub fn file(&self) -> &OwnedFd {
        match self {
            Source::File(image) => &image.file,
            Source::Memory(memory) => memory.file(),
        }
    }

    /// EROFS mounts no file of a tmpfs, up to 7.3, and that is what a memfd is.
    fn is_memfd(&self) -> bool {
        matches!(self, Source::Memory(memory) if memory.kind() == Memory::Memfd)
    }
}

/// Mounts the EROFS in `source`, detached.
///
/// The ladder: the file by descriptor (7.3; before, EINVAL "Non-string source" for the option; on
/// tmpfs, EINVAL "source is unsupported" for the superblock); by a name of the descriptor (6.12; before,
/// on tmpfs, and where CONFIG_EROFS_FS_BACKED_BY_FILE is off, ENOTBLK; without procfs in the kernel,
/// ENODEV); a loop device. A memfd goes there at once.
///
/// EINVAL for the superblock is also the answer to a damaged image. That one gets it again from the
/// next rung, and is refused there.
pub(crate) fn mount(
    source: &Source,
    header: &Header,
    name: &Path,
    is_verified: bool,
    procfs: Option<&Procfs>,
    steps: &mut dyn FnMut(Step),
) -> Result<OwnedFd, Error> {
    if header.has_no_acl() {
        steps(Step::WithoutAcls);
    }
    let file = source.file();
    let from = |set_source: &dyn Fn(&FsContext) -> Result<(), KernelError>| {
        mount_from(header, name, set_source)
    };
    let mut refusal = None;
    if !source.is_memfd() {
        match from(&|context| context.set_fd("source", file, name)) {
            Err(error) if is_missing(&error) => {
                steps(Step::NotTaken { rung: Rung::SourceByDescriptor, error });
            }
            result => return taken(result, Rung::SourceByDescriptor, steps),
        }
        let by_path = |link: &Path| from(&|context| context.set_string("source", link));
        match with_name(file, is_verified, procfs, by_path) {
            Err(error) if is_missing(&error) => {
                refusal = Some(error.clone()).filter(|error| error.errno == Errno::INVAL);
                steps(Step::NotTaken { rung: Rung::SourceByPath, error });
            }
            result => return taken(result, Rung::SourceByPath, steps),
        }
    }
    let device = match (LoopDevice::attach(file, &memory_name(name)), refusal) {
        // What is missing here was not the reason.
        (Err(_), Some(refusal)) => return Err(refusal.into()),
        (device, _) => device?,
    };
    steps(Step::LoopDevice { device: device.path.clone() });
    let mount = from(&|context| context.set_string("source", &device.path))?;
    device.check_is_source_of(&mount)?;
    taken(Ok(mount), Rung::SourceByLoopDevice, steps)
}

/// Runs `work` with a name of the file, by which the kernel finds it once more.
///
/// What was verified must be what is found. Where nothing was, a name in whatever lies at /proc is as good
/// as the path that the image was opened by; docs/design.md has what the other one costs.
fn with_name(
    file: &OwnedFd,
    is_verified: bool,
    procfs: Option<&Procfs>,
    work: impl Fn(&Path) -> Result<OwnedFd, KernelError> + Send,
) -> Result<OwnedFd, KernelError> {
    if !is_verified {
        match work(&proc_fd_path(file)) {
            // There is no /proc.
            Err(error) if error.errno == Errno::NOENT => {}
            result => return result,
        }
    }
    match procfs {
        Some(procfs) => procfs.with_name(file, work),
        None => Procfs::require()?.with_name(file, work),
    }
}

fn mount_from(
    header: &Header,
    name: &Path,
    set_source: &dyn Fn(&FsContext) -> Result<(), KernelError>,
) -> Result<OwnedFd, KernelError> {
    let context = FsContext::open("erofs")?.of(name);
    set_source(&context)?;
    context.set_flag("ro")?;
    if header.has_no_acl() {
        // Saves looking for ACLs on every access.
        context.set_flag("noacl")?;
    }
    context.create()?;
    context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Whether an error may say that the kernel does not take a source in this way.
fn is_missing(error: &KernelError) -> bool {
    match error.operation {
        Operation::SetOption | Operation::CreateSuperblock => {
            matches!(error.errno, Errno::INVAL | Errno::NOTBLK)
        }
        // No procfs in the kernel.
        Operation::OpenFileSystem => error.errno == Errno::NODEV && error.is_on("proc"),
        _ => false,
    }
}

fn taken(
    result: Result<OwnedFd, KernelError>,
    rung: Rung,
    steps: &mut dyn FnMut(Step),
) -> Result<OwnedFd, Error> {
    let mount = result?;
    steps(Step::Taken { rung });
    Ok(mount)
}
