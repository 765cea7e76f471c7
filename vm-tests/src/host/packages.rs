//! Fetches Debian packages of another architecture, for programs that machines need.

use super::apt;
use super::say::say;
use crate::arch::Arch;
use crate::files::publish;
use crate::{Context, Error};
use std::fs;
use std::path::{Path, PathBuf};

/// The release of the packages. A newer release may split them in another way.
const SUITE: &str = "trixie";

/// Fetches packages with all packages that they depend on, and unpacks them. Returns their root directory, below
/// `kept`.
pub fn fetch(
    arch: &'static Arch,
    names: &[&str],
    kept: &Path,
    run: &Path,
) -> Result<PathBuf, Error> {
    let name = format!("{}-{}", names.join("-"), arch.debian);
    let dir = kept.join("packages").join(&name);
    if dir.is_dir() {
        return Ok(dir);
    }
    apt::with_lists(arch, run, |apt| {
        // Another thread may have fetched the packages meanwhile.
        if dir.is_dir() {
            return Ok(());
        }
        say(&format!("fetching {} of {}", names.join(", "), arch.debian));
        let temporary = run.join(format!("packages-{name}"));
        fs::create_dir(&temporary).context(|| temporary.display().to_string())?;
        apt.unpack_with_dependencies(SUITE, names, &temporary)
            .context(|| format!("cannot fetch {}", names.join(", ")))?;
        publish(&temporary, &dir)
    })?;
    Ok(dir)
}
