//! Provides the programs of machines: static executables of this workspace, and programs of Debian with their
//! libraries.

use crate::arch::{Arch, X86_64};
use crate::files::copy;
use crate::programs::{self, output};
use crate::{Context, Error};
use std::collections::{BTreeMap, HashMap};
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Fetches packages of an architecture with their dependencies, and returns a directory with their files. The
/// first path is kept for later runs, and the second path only exists during this run.
pub type FetchPackages = fn(&'static Arch, &[&str], &Path, &Path) -> Result<PathBuf, Error>;

/// The programs of the machines of one architecture. [`Binaries::get`] builds each static executable of this
/// workspace on its first call.
#[derive(Debug)]
pub struct Binaries {
    pub arch: &'static Arch,
    kept: PathBuf,
    run: PathBuf,
    fetch: FetchPackages,
    built: Mutex<HashMap<(String, String), PathBuf>>,
}

impl Binaries {
    /// Returns an empty collection. The directory `kept` is for later runs, and `run` for this run.
    pub fn new(arch: &'static Arch, kept: &Path, run: &Path, fetch: FetchPackages) -> Binaries {
        Binaries { arch, kept: kept.into(), run: run.into(), fetch, built: Mutex::default() }
    }

    /// Returns the path of an executable of a package of this workspace.
    pub fn get(&self, package: &str, name: &str) -> Result<PathBuf, Error> {
        let mut built = self.built.lock().expect("no build panics while it holds the lock");
        let key = (package.to_owned(), name.to_owned());
        if !built.contains_key(&key) {
            let path = build(self.arch, package, name, &self.kept.join("cargo"))?;
            built.insert(key.clone(), path);
        }
        Ok(built[&key].clone())
    }

    /// Copies an executable to a path in the files of a machine.
    pub fn install(&self, package: &str, name: &str, to: &Path) -> Result<(), Error> {
        copy(&self.get(package, name)?, to)
    }

    /// Returns the files of programs and of their libraries, by their paths in a machine. The programs are in
    /// Debian packages. The host provides the programs of its own architecture.
    pub fn programs(
        &self,
        packages: &[&str],
        paths: &[&str],
    ) -> Result<BTreeMap<PathBuf, PathBuf>, Error> {
        if *self.arch != X86_64 {
            let root = (self.fetch)(self.arch, packages, &self.kept, &self.run)?;
            return programs::with_libraries_in(&root, paths);
        }
        let mut files = BTreeMap::new();
        for path in paths.iter().map(PathBuf::from) {
            files.extend(programs::libraries(&path)?.into_iter().map(|path| (path.clone(), path)));
            files.insert(path.clone(), path);
        }
        Ok(files)
    }
}

fn build(arch: &Arch, package: &str, name: &str, target_dir: &Path) -> Result<PathBuf, Error> {
    let mut cargo = cargo_build(arch);
    if package == "sealmount" {
        // The feature includes all decoders, as in the installed mount helper.
        cargo.args(["--features", "helper"]);
    }
    cargo
        .args(["--quiet", "--release", "--locked"])
        .args(["--package", package, "--bin", name, "--target-dir"])
        .arg(target_dir)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        // A change of RUSTFLAGS between two test runs would discard the cached build.
        .env_remove("RUSTFLAGS");
    output(&mut cargo).map_err(with_hint).context(|| {
        format!("cannot build the static {name} of package {package} for {}", arch.target)
    })?;
    Ok(target_dir.join(arch.target).join("release").join(name))
}

/// Returns the command `cargo build` for static executables of an architecture.
fn cargo_build(arch: &Arch) -> Command {
    if *arch == X86_64 {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // This variable overrides all other compiler flags. The flags of the tests, such as coverage
        // flags, must not reach a machine.
        cargo.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
        cargo.args(["build", "--target", arch.target]);
        return cargo;
    }
    let mut cross = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cross"));
    cross.args(["cargo", arch.target, "build"]);
    cross
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
