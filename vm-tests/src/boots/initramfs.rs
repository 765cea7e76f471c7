//! Adds files to the initramfs of a system. The kernel unpacks several archives, one over the other.

use crate::host::cpio::Archive;
use crate::{Context, Error};
use std::fs;
use std::path::Path;

/// The configuration of sealmount-setup-root.
pub const CONFIGURATION: &str = "usr/lib/composefs/setup-root-conf.toml";

/// Writes an initramfs with another file.
pub fn with_file(
    initramfs: &Path,
    to: &Path,
    path: &str,
    content: impl AsRef<[u8]>,
) -> Result<(), Error> {
    let mut archives = fs::read(initramfs).context(|| initramfs.display().to_string())?;
    // An archive starts at a multiple of four bytes.
    archives.resize(archives.len().next_multiple_of(4), 0);
    let mut archive = Archive::new(archives);
    for (end, _) in path.match_indices('/') {
        archive.directory(&path[..end], 0o755)?;
    }
    archive.file(path, 0o644, content.as_ref())?;
    fs::write(to, archive.finish()?).context(|| to.display().to_string())
}
