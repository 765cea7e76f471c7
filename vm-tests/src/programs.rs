//! Finds and runs the programs that the host needs, and names the packages of missing programs.

use crate::{Context, Error};
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The needed programs, each with its Debian package. The list does not depend on settings, so no later
/// run can miss a program.
const NEEDED: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mkfs.vfat", "dosfstools"),
    ("mcopy", "mtools"),
    ("depmod", "kmod"),
    ("gzip", "gzip"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("setpriv", "util-linux"),
    ("timeout", "coreutils"),
    ("mount", "mount"),
    ("ldd", "libc-bin"),
    ("systemctl", "systemd"),
];
pub const NEEDED_TO_FETCH: &[(&str, &str)] =
    &[("apt-get", "apt"), ("apt-cache", "apt"), ("dpkg-deb", "dpkg")];

/// Fails with the names of the missing programs.
pub fn check() -> Result<(), Error> {
    check_these(NEEDED)
}

pub fn check_these(needed: &[(&str, &str)]) -> Result<(), Error> {
    let missing: Vec<_> = needed.iter().filter(|(program, _)| find(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(program, _)| *program).collect();
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    Err(format!(
        "missing programs: {}. On Debian: vm-tests/install-deps (or apt-get install {})",
        names.join(", "),
        packages.join(" ")
    )
    .into())
}

/// Searches PATH and the directories of system programs, which a PATH often lacks.
fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

/// Returns a command for a program in PATH or in a directory of system programs.
pub fn command(program: &str) -> Command {
    Command::new(find(program).unwrap_or_else(|| program.into()))
}

/// Returns the paths of the shared libraries of a program, and of its loader.
pub fn libraries(program: &Path) -> Result<Vec<PathBuf>, Error> {
    let text = String::from_utf8(output(command("ldd").arg(program))?)?;
    // A line has a name, maybe an arrow and a path, and an address.
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(PathBuf::from).collect())
}

/// Runs a command and returns its standard output. An error contains the standard error output.
pub fn output(command: &mut Command) -> Result<Vec<u8>, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output =
        command.stdin(Stdio::null()).output().context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} failed ({}): {}", output.status, stderr.trim()).into());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_programs_report_each_package_once() {
        let error = check_these(&[("sh", "dash"), ("no-such-a", "some"), ("no-such-b", "some")]);
        let message = error.unwrap_err().to_string();
        assert!(message.contains("no-such-a, no-such-b."), "{message}");
        assert!(message.contains("apt-get install some)"), "{message}");
    }
}
