//! The host side: from a list of scenarios to the result of each on each kernel.

pub mod apt;
pub mod binaries;
pub mod composefs;
pub mod cpio;
pub mod disks;
pub mod initramfs;
pub mod kernels;
pub mod modules;
pub mod monitor;
pub mod programs;
pub mod qemu;
pub mod suite;

use crate::scenario::{Disk, Fill};
use crate::{Context, Error};
use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where machines are put together: a directory that keeps what is worth keeping between runs, and
/// one that is gone with this run.
#[derive(Debug)]
pub struct Lab {
    kept: PathBuf,
    run: PathBuf,
    binaries: Mutex<HashMap<(String, String), PathBuf>>,
    disks: Mutex<HashMap<&'static str, PathBuf>>,
    pub(crate) has_kvm: bool,
}

impl Lab {
    /// `target` is cargo's target directory.
    pub fn new(target: &Path) -> Result<Lab, Error> {
        if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
            return Err("the virtual machine tests run on x86-64 Linux only".into());
        }
        programs::check()?;
        let kept = target.join("vm");
        remove_abandoned_runs(&kept);
        static LABS: AtomicUsize = AtomicUsize::new(0);
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let run = kept.join(format!("run-{}-{number}", std::process::id()));
        for dir in [kept.join("log"), run.clone()] {
            fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(Lab {
            has_kvm: qemu::kvm_works(&run),
            kept,
            run,
            binaries: Mutex::default(),
            disks: Mutex::default(),
        })
    }

    /// A directory or file that later runs find again.
    pub fn kept(&self, name: &str) -> PathBuf {
        self.kept.join(name)
    }

    /// A directory or file of this run.
    pub fn temporary(&self, name: &str) -> PathBuf {
        self.run.join(name)
    }

    /// A static executable of a package of this workspace, built when first asked for.
    pub fn binary(&self, package: &str, name: &str) -> Result<PathBuf, Error> {
        let mut binaries = self.binaries.lock().expect("no build panics");
        let key = (package.to_owned(), name.to_owned());
        if !binaries.contains_key(&key) {
            let path = binaries::build(package, name, &self.kept("cargo"))?;
            binaries.insert(key.clone(), path);
        }
        Ok(binaries[&key].clone())
    }

    /// Copies a static executable to where a machine is to find it.
    pub fn install_binary(&self, package: &str, name: &str, to: &Path) -> Result<(), Error> {
        copy(&self.binary(package, name)?, to)
    }

    /// The image of a disk, built when first asked for. Not to be written to: boots share it.
    pub fn disk(&self, disk: &Disk) -> Result<PathBuf, Error> {
        let mut disks = self.disks.lock().expect("no build of a disk panics");
        if !disks.contains_key(disk.name) {
            let image = self.temporary(&format!("{}.disk", disk.name));
            let content = self.filled(&format!("{}.content", disk.name), disk.fill)?;
            disks::build(disk, &content, &image)
                .context(|| format!("cannot make disk {}", disk.name))?;
            disks.insert(disk.name, image);
        }
        Ok(disks[disk.name].clone())
    }

    /// A new directory with what `fill` puts into it.
    fn filled(&self, name: &str, fill: Fill) -> Result<PathBuf, Error> {
        let dir = self.temporary(name);
        fs::create_dir(&dir).context(|| format!("cannot make {}", dir.display()))?;
        fill(self, &dir).context(|| format!("cannot fill {name}"))?;
        Ok(dir)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.run);
    }
}

/// Those of processes that were killed and could not remove them.
fn remove_abandoned_runs(kept: &Path) {
    for entry in fs::read_dir(kept).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let run = name.to_str().and_then(|name| name.strip_prefix("run-")?.split_once('-'));
        if run.is_some_and(|(process, _)| !Path::new("/proc").join(process).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Tells whoever runs the tests, in one write: other threads have things to say too.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(format!("vm-tests: {text}\n").as_bytes());
}

/// Copies a file, with its mode, and makes the directories above it.
pub fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let what = || format!("cannot copy {} to {}", from.display(), to.display());
    fs::create_dir_all(to.parent().unwrap_or(to)).context(what)?;
    fs::copy(from, to).context(what)?;
    Ok(())
}

/// Copies a directory's files and directories, recursively.
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
