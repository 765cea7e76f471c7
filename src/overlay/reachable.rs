//! The real paths of layers.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::kernel::fs_context::STRING_MAX;
use crate::location::is_same_file;
use crate::overlay::layers::Layer;

/// Returns the given path of a layer, if the path still leads to the layer and is not too long for
/// fsconfig(2).
pub(crate) fn path_to(layer: &Layer) -> Option<PathBuf> {
    let path = layer.location.absolute_path()?;
    let reopened = openat(CWD, &path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let fits = path.as_os_str().len() <= STRING_MAX;
    (fits && is_same_file(reopened, &layer.fd).unwrap_or(false)).then_some(path)
}

/// Returns whether a path holds none of the bytes that overlayfs would interpret.
pub(crate) fn is_plain(path: &Path, special: &[u8]) -> bool {
    !path.as_os_str().as_bytes().iter().any(|byte| special.contains(byte))
}
