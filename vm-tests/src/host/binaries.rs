//! Static executables of this workspace, for machines that have no libraries.

use super::programs::output;
use crate::{Context, Error};
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

pub fn build(package: &str, name: &str, target_dir: &Path) -> Result<PathBuf, Error> {
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
        .context(|| format!("cannot build the static {name} of package {package}"))?;
    Ok(target_dir.join(TARGET).join("release").join(name))
}
