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
/// tmpfs, EINVAL "source is unsupported" for the superblock); by its path under /proc/self/fd
/// (6.12; before, and on tmpfs, ENOTBLK; without /proc, ENOENT); a loop device. A memfd goes there
/// at once.
///
/// EINVAL for the superblock is also the answer to a damaged image. That one gets it again from the
/// next rung, and is refused there.
pub(crate) fn mount(
    source: &Source,
    header: &Header,
    name: &Path,
    steps: &mut dyn FnMut(Step),
) -> Result<OwnedFd, Error> {
    let file = source.file();
    if !source.is_memfd() {
        match mount_from(header, |context| context.set_fd("source", file)) {
            Err(error) if is_missing_descriptor(&error) => {
                steps(Step::NotTaken { rung: Rung::SourceByDescriptor, error });
            }
            result => return taken(result, Rung::SourceByDescriptor, steps),
        }
        let path = proc_fd_path(file);
        match mount_from(header, |context| context.set_string("source", &path)) {
            Err(error) if matches!(error.errno, Errno::NOTBLK | Errno::NOENT) => {
                steps(Step::NotTaken { rung: Rung::SourceByPath, error });
            }
            result => return taken(result, Rung::SourceByPath, steps),
        }
    }
    let device = LoopDevice::attach(file, &memory_name(name))?;
    steps(Step::LoopDevice { device: device.path.clone() });
    let result = mount_from(header, |context| context.set_string("source", &device.path));
    taken(result, Rung::SourceByLoopDevice, steps)
}

fn mount_from(
    header: &Header,
    set_source: impl FnOnce(&FsContext) -> Result<(), KernelError>,
) -> Result<OwnedFd, KernelError> {
    let context = FsContext::open("erofs")?;
    set_source(&context)?;
    context.set_flag("ro")?;
    if header.has_no_acl() {
        // Saves looking for ACLs on every access.
        context.set_flag("noacl")?;
    }
    context.create()?;
    context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Whether an error may say that the kernel does not take this source by descriptor.
fn is_missing_descriptor(error: &KernelError) -> bool {
    let operations = [Operation::SetOption, Operation::CreateSuperblock];
    error.errno == Errno::INVAL && operations.contains(&error.operation)
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
