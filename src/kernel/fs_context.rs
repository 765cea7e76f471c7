//! The mount API of Linux 5.2: [fsopen(2)], [fsconfig(2)] and [fsmount(2)]. Errors hold the messages
//! that the kernel writes into the log of the context.
//!
//! [fsopen(2)]: https://man7.org/linux/man-pages/man2/fsopen.2.html
//! [fsconfig(2)]: https://man7.org/linux/man-pages/man2/fsconfig.2.html
//! [fsmount(2)]: https://man7.org/linux/man-pages/man2/fsmount.2.html

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, fsconfig_create, fsconfig_reconfigure,
    fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, fspick,
};

use crate::kernel::error::{KernelError, Operation};

/// The longest string that fsconfig(2) accepts, in bytes.
pub(crate) const STRING_MAX: usize = 255;

/// A file system that is being configured.
pub(crate) struct FsContext {
    fd: OwnedFd,
    fs_type: &'static str,
    /// The image that error messages name.
    image: Option<PathBuf>,
}

impl FsContext {
    pub fn open(fs_type: &'static str) -> Result<FsContext, KernelError> {
        match fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(fd) => Ok(FsContext { fd, fs_type, image: None }),
            Err(errno) => Err(KernelError::new(Operation::OpenFileSystem, errno).on(fs_type)),
        }
    }

    /// Opens the superblock of an existing mount
    /// ([fspick(2)](https://man7.org/linux/man-pages/man2/fspick.2.html), Linux 5.2).
    pub fn pick(fs_type: &'static str, mount: impl AsFd) -> Result<FsContext, KernelError> {
        let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
        match fspick(mount, "", flags) {
            Ok(fd) => Ok(FsContext { fd, fs_type, image: None }),
            Err(errno) => Err(KernelError::new(Operation::OpenFileSystem, errno).on(fs_type)),
        }
    }

    /// Names the image in the errors of this context.
    pub fn for_image(self, image: &Path) -> FsContext {
        FsContext { image: Some(image.to_owned()), ..self }
    }

    pub fn set_flag(&self, key: &str) -> Result<(), KernelError> {
        fsconfig_set_flag(&self.fd, key).map_err(|errno| self.option_error(errno, key.into()))
    }

    pub fn set_string(&self, key: &str, value: impl AsRef<OsStr>) -> Result<(), KernelError> {
        let value = value.as_ref();
        fsconfig_set_string(&self.fd, key, value)
            .map_err(|errno| self.option_error(errno, option_text(key, value)))
    }

    /// Sets an option to a descriptor. Messages show `path`.
    pub fn set_fd(&self, key: &str, fd: impl AsFd, path: &Path) -> Result<(), KernelError> {
        fsconfig_set_fd(&self.fd, key, fd)
            .map_err(|errno| self.option_error(errno, option_text(key, path.as_os_str())))
    }

    /// Makes the superblock (`FSCONFIG_CMD_CREATE`). After a failure the context cannot be used again.
    pub fn create(&self) -> Result<(), KernelError> {
        fsconfig_create(&self.fd).map_err(|errno| self.error(Operation::CreateSuperblock, errno))
    }

    /// Changes the superblock of a context made by [`FsContext::pick`] (`FSCONFIG_CMD_RECONFIGURE`).
    pub fn reconfigure(&self, operation: Operation) -> Result<(), KernelError> {
        fsconfig_reconfigure(&self.fd).map_err(|errno| self.error(operation, errno))
    }

    /// Makes a detached mount of the superblock.
    pub fn mount(self, attributes: MountAttrFlags) -> Result<OwnedFd, KernelError> {
        fsmount(&self.fd, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(|errno| self.error(Operation::CreateMount, errno))
    }

    fn option_error(&self, errno: Errno, option: OsString) -> KernelError {
        let mut error = self.error(Operation::SetOption, errno);
        error.object = Some(option.into());
        error
    }

    fn error(&self, operation: Operation, errno: Errno) -> KernelError {
        let mut error = KernelError::new(operation, errno);
        error.object = self.image.clone();
        error.file_system = Some(self.fs_type);
        error.log = self.read_log();
        error
    }

    /// Returns the messages of the context's log, each without the letter of its severity. The kernel removes
    /// them from the log.
    fn read_log(&self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0; 1024];
        // A read returns one message, and ENODATA after the last one. The kernel keeps at most eight.
        while let Ok(length @ 1..) = rustix::io::read(&self.fd, &mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]);
            let text = text.trim_end();
            let severities = ["e ", "w ", "i "];
            let message = severities.iter().find_map(|letter| text.strip_prefix(letter));
            messages.push(message.unwrap_or(text).to_owned());
        }
        messages
    }
}

fn option_text(key: &str, value: &OsStr) -> OsString {
    let mut text = OsString::from(key);
    text.push("=");
    text.push(value);
    text
}
