//! Static executables of this workspace, for machines that have no libraries.

use crate::files::copy;
use crate::programs::output;
use crate::{Context, Error};
use std::collections::HashMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Static executables, each built when first asked for.
#[derive(Debug)]
pub struct Binaries {
    target_dir: PathBuf,
    built: Mutex<HashMap<(String, String), PathBuf>>,
}

impl Binaries {
    /// Uses this directory for the builds.
    pub fn new(target_dir: PathBuf) -> Binaries {
        Binaries { target_dir, built: Mutex::default() }
    }

    /// Returns the path of an executable of a package of this workspace.
    pub fn get(&self, package: &str, name: &str) -> Result<PathBuf, Error> {
        let mut built = self.built.lock().expect("no build panics");
        let key = (package.to_owned(), name.to_owned());
        if !built.contains_key(&key) {
            let path = build(package, name, &self.target_dir)?;
            built.insert(key.clone(), path);
        }
        Ok(built[&key].clone())
    }

    /// Copies an executable to where a machine is to find it.
    pub fn install(&self, package: &str, name: &str, to: &Path) -> Result<(), Error> {
        copy(&self.get(package, name)?, to)
    }
}

fn build(package: &str, name: &str, target_dir: &Path) -> Result<PathBuf, Error> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--quiet", "--release", "--locked", "--target", TARGET])
        .args(["--package", package, "--bin", name, "--target-dir"])
        .arg(target_dir)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        // It overrides all other ways to set flags: whatever the tests are built with (coverage, say)
        // does not belong in a machine.
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        // So that these builds do not differ from one test run to the next and stay cached.
        .env_remove("RUSTFLAGS");
    output(&mut cargo)
        .map_err(with_hint)
        .context(|| format!("cannot build the static {name} of package {package}"))?;
    Ok(target_dir.join(TARGET).join("release").join(name))
}

/// What to install, if that is what is wrong.
fn with_hint(error: Error) -> Error {
    let message = error.to_string();
    match message.contains("cannot find -l") || message.contains("unable to find library -l") {
        true => format!(
            "{message}\nStatic libraries are missing. Install libc.a: on Debian, the package \
             libc6-dev; on Fedora, glibc-static"
        )
        .into(),
        false => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::programs::command;

    #[test]
    fn a_missing_library_is_to_be_installed() {
        let missing = output(command("cc").args(["-static", "-lno-such-library"])).unwrap_err();
        let message = with_hint(missing).to_string();
        assert!(message.contains("libc6-dev"), "{message}");
        let other = output(command("cc").arg("/no/such/file.c")).unwrap_err();
        assert!(!with_hint(other).to_string().contains("libc6-dev"));
    }
}
