//! What can be seen of the running system.

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

/// A line of /proc/meminfo, in KiB.
pub fn meminfo(name: &str) -> Result<u64, Error> {
    let text = read("/proc/meminfo")?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let value = value.and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok());
    value.ok_or_else(|| format!("/proc/meminfo has no {name}").into())
}

/// The kernel lets go of a loop device a moment after the last use.
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

/// Starts the helper; its output is piped.
pub fn helper(image: &Path, mount_point: &Path, options: &str) -> Result<Output, Error> {
    let arguments = [image.as_os_str(), mount_point.as_os_str(), OsStr::new("-o")];
    let output = Command::new(HELPER).args(arguments).arg(options).output();
    output.context(|| format!("cannot run {HELPER}"))
}

/// That the helper failed with this exit status, and said all of this.
pub fn refused(output: &Output, status: i32, said: &[&str]) -> Result<(), Error> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    println!("refused with {}: {}", output.status, stderr.trim_end());
    let missing: Vec<_> = said.iter().filter(|text| !stderr.contains(**text)).collect();
    if output.status.code() == Some(status) && missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "not refused with exit status {status} and {missing:?}, but {}: {stderr}",
        output.status
    )
    .into())
}

/// That the helper succeeded.
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

/// A module that was unloaded, and is loaded again when this is dropped.
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

/// Unloads a module that nobody uses. None: it is built in.
pub fn unload(name: &str) -> Result<Option<Unloaded>, Error> {
    if !read("/proc/modules")?.lines().any(|line| line.split(' ').next() == Some(name)) {
        return Ok(None);
    }
    let is_it = |path: &PathBuf| {
        let file_name = path.file_name().unwrap_or_default().to_string_lossy();
        let found = file_name.split_once('-').map(|(_, found)| found.trim_end_matches(".ko"));
        found == Some(name)
    };
    let path = fs::read_dir(first_stage::MODULES)?.flatten().map(|entry| entry.path()).find(is_it);
    let module = File::open(path.ok_or_else(|| format!("no file of the module {name}"))?)?;
    // What was unmounted a moment ago may not be gone yet.
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
