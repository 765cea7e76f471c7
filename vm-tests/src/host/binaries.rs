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
    use crate::host::programs::command;

    #[test]
    fn a_missing_library_is_to_be_installed() {
        let missing = output(command("cc").args(["-static", "-lno-such-library"])).unwrap_err();
        let message = with_hint(missing).to_string();
        assert!(message.contains("libc6-dev"), "{message}");
        let other = output(command("cc").arg("/no/such/file.c")).unwrap_err();
        assert!(!with_hint(other).to_string().contains("libc6-dev"));
    }
}
