//! Reads and copies files, with errors that name the path.

use crate::{Context, Error};
use std::fs;
use std::path::Path;

pub fn read(path: &str) -> Result<String, Error> {
    fs::read_to_string(path).context(|| format!("cannot read {path}"))
}

/// Copies a file with its mode, and creates the missing parent directories.
pub fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let what = || format!("cannot copy {} to {}", from.display(), to.display());
    fs::create_dir_all(to.parent().unwrap_or(to)).context(what)?;
    fs::copy(from, to).context(what)?;
    Ok(())
}

/// Renames a complete directory to the name that other runs look for, so that they never see an incomplete
/// one. Another run may have made an equivalent directory first.
pub fn publish(complete: &Path, to: &Path) -> Result<(), Error> {
    let what = || format!("cannot rename {} to {}", complete.display(), to.display());
    fs::create_dir_all(to.parent().unwrap_or(to)).context(what)?;
    match fs::rename(complete, to) {
        Err(_) if to.is_dir() => Ok(()),
        result => result.context(what),
    }
}

/// Copies the files and directories in a directory, recursively.
pub fn copy_tree(from: &Path, to: &Path) -> Result<(), Error> {
    fs::create_dir_all(to).context(|| format!("cannot make {}", to.display()))?;
    for entry in fs::read_dir(from).context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy_tree(&entry.path(), &to)?,
            false => copy(&entry.path(), &to)?,
        }
    }
    Ok(())
}
