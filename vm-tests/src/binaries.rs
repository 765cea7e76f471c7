//! Builds static executables of this workspace for machines, which have no libraries.

use crate::files::copy;
use crate::programs::output;
use crate::{Context, Error};
use std::collections::HashMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Static executables of this workspace. [`Binaries::get`] builds each one on its first call.
#[derive(Debug)]
pub struct Binaries {
    target_dir: PathBuf,
    built: Mutex<HashMap<(String, String), PathBuf>>,
}

impl Binaries {
    /// Returns an empty collection that builds in `target_dir`.
    pub fn new(target_dir: PathBuf) -> Binaries {
        Binaries { target_dir, built: Mutex::default() }
    }

    /// Returns the path of an executable of a package of this workspace.
    pub fn get(&self, package: &str, name: &str) -> Result<PathBuf, Error> {
        let mut built = self.built.lock().expect("no build panics while it holds the lock");
        let key = (package.to_owned(), name.to_owned());
        if !built.contains_key(&key) {
            let path = build(package, name, &self.target_dir)?;
            built.insert(key.clone(), path);
        }
        Ok(built[&key].clone())
    }

    /// Copies an executable to a path in the files of a machine.
    pub fn install(&self, package: &str, name: &str, to: &Path) -> Result<(), Error> {
        copy(&self.get(package, name)?, to)
    }
}

fn build(package: &str, name: &str, target_dir: &Path) -> Result<PathBuf, Error> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    if package == "sealmount" {
        // The feature includes all decoders, as in the installed mount helper.
        cargo.args(["build", "--features", "helper"]);
    } else {
        cargo.arg("build");
    }
    cargo
        .args(["--quiet", "--release", "--locked", "--target", TARGET])
        .args(["--package", package, "--bin", name, "--target-dir"])
        .arg(target_dir)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        // This variable overrides all other compiler flags. The flags of the tests, such as coverage
        // flags, must not reach a machine.
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        // A change of RUSTFLAGS between two test runs would discard the cached build.
        .env_remove("RUSTFLAGS");
    output(&mut cargo)
        .map_err(with_hint)
        .context(|| format!("cannot build the static {name} of package {package}"))?;
    Ok(target_dir.join(TARGET).join("release").join(name))
}

/// Adds the package to install if the linker did not find a static library.
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
    fn missing_library_reports_package_to_install() {
        let missing = output(command("cc").args(["-static", "-lno-such-library"])).unwrap_err();
        let message = with_hint(missing).to_string();
        assert!(message.contains("libc6-dev"), "{message}");
        let other = output(command("cc").arg("/no/such/file.c")).unwrap_err();
        assert!(!with_hint(other).to_string().contains("libc6-dev"));
    }
}
