//! Inspects the running system, runs the helper and unloads modules.

use super::fixtures::HELPER;
use crate::files::read;
use crate::{Context, Error, first_stage};
use rustix::system::{delete_module, finit_module};
use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use test_support::mountinfo::loop_devices;

/// Returns a value of /proc/meminfo, in KiB.
pub fn meminfo(name: &str) -> Result<u64, Error> {
    let text = read("/proc/meminfo")?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let value = value.and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok());
    value.ok_or_else(|| format!("/proc/meminfo has no {name}").into())
}

/// Waits until no loop device is in use. The kernel releases a device shortly after its last use.
pub fn no_loop_devices() -> Result<(), Error> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match loop_devices("") {
            none if none.is_empty() => return Ok(()),
            left if Instant::now() > deadline => {
                return Err(format!("loop devices still in use: {left:?}").into());
            }
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Runs the helper and returns its output.
pub fn helper(image: &Path, mount_point: &Path, options: &str) -> Result<Output, Error> {
    let arguments = [image.as_os_str(), mount_point.as_os_str(), OsStr::new("-o")];
    let output = Command::new(HELPER).args(arguments).arg(options).output();
    output.context(|| format!("cannot run {HELPER}"))
}

/// Checks that the helper failed with this exit status and printed all of these texts.
pub fn rejected(output: &Output, status: i32, expected: &[&str]) -> Result<(), Error> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    println!("rejected with {}: {}", output.status, stderr.trim_end());
    let missing: Vec<_> = expected.iter().filter(|text| !stderr.contains(**text)).collect();
    if output.status.code() == Some(status) && missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "expected exit status {status}, but found {}. The output lacks {missing:?}: {stderr}",
        output.status
    )
    .into())
}

/// Checks that the helper succeeded.
pub fn succeeded(output: &Output) -> Result<(), Error> {
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "the helper failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )
        .into()),
    }
}

/// An unloaded module. Dropping the value loads the module again.
#[derive(Debug)]
pub struct Unloaded {
    module: File,
}

impl Drop for Unloaded {
    fn drop(&mut self) {
        if let Err(error) = finit_module(&self.module, c"", 0) {
            eprintln!("cannot load a module again: {error}");
        }
    }
}

/// Unloads an unused module. Returns `None` if the module is built in.
pub fn unload(name: &str) -> Result<Option<Unloaded>, Error> {
    if !read("/proc/modules")?.lines().any(|line| line.split(' ').next() == Some(name)) {
        return Ok(None);
    }
    let is_module = |path: &PathBuf| {
        let file_name = path.file_name().unwrap_or_default().to_string_lossy();
        let found = file_name.split_once('-').map(|(_, found)| found.trim_end_matches(".ko"));
        found == Some(name)
    };
    let path =
        fs::read_dir(first_stage::MODULES)?.flatten().map(|entry| entry.path()).find(is_module);
    let module =
        File::open(path.ok_or_else(|| format!("the initramfs has no file of the module {name}"))?)?;
    // The kernel may still be releasing a file system that was just unmounted.
    let deadline = Instant::now() + Duration::from_secs(5);
    let c_name = CString::new(name)?;
    while let Err(error) = delete_module(&c_name, 0) {
        if Instant::now() > deadline {
            return Err(format!("cannot unload {name}: {error}").into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(Some(Unloaded { module }))
}
