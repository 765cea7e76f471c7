//! Prepares the files of machines: directories, binaries and disks.

use super::{accelerator, disks};
use crate::binaries::Binaries;
use crate::machine::{Disk, Fill};
use crate::{Context, Error, programs};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A directory whose content later runs use, and a directory that the end of this run removes.
#[derive(Debug)]
pub struct Lab {
    kept: PathBuf,
    run: PathBuf,
    pub binaries: Binaries,
    /// The images by the name of the disk and the function that fills it.
    disks: Mutex<HashMap<(&'static str, usize), PathBuf>>,
    pub has_kvm: bool,
    /// The program that runs a machine. Tests of the harness replace it.
    pub qemu: PathBuf,
}

impl Lab {
    /// Creates the directories below `target`, the target directory of cargo.
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
            has_kvm: accelerator::kvm_works(&run),
            binaries: Binaries::new(kept.join("cargo")),
            qemu: "qemu-system-x86_64".into(),
            kept,
            run,
            disks: Mutex::default(),
        })
    }

    /// Returns a path whose content later runs can use.
    pub fn kept(&self, name: &str) -> PathBuf {
        self.kept.join(name)
    }

    /// Returns a path that exists only during this run.
    pub fn temporary(&self, name: &str) -> PathBuf {
        self.run.join(name)
    }

    /// Returns the image of a disk, and builds it on the first call. All boots share the image, so
    /// callers must not write to it.
    pub fn disk(&self, disk: &Disk) -> Result<PathBuf, Error> {
        let mut disks = self.disks.lock().expect("no thread panics while it builds a disk");
        // Machines may give the same name to disks with different contents.
        let key = (disk.name, disk.fill as usize);
        if let Some(image) = disks.get(&key) {
            return Ok(image.clone());
        }
        let name = format!("{}-{}", disk.name, disks.len());
        let image = self.temporary(&format!("{name}.disk"));
        let content = self.filled(&format!("{name}.content"), disk.fill)?;
        disks::build(disk, &content, &image)
            .context(|| format!("cannot make disk {}", disk.name))?;
        disks.insert(key, image.clone());
        Ok(image)
    }

    /// Creates a directory and fills it with `fill`.
    pub fn filled(&self, name: &str, fill: Fill) -> Result<PathBuf, Error> {
        let dir = self.temporary(name);
        fs::create_dir(&dir).context(|| format!("cannot make {}", dir.display()))?;
        fill(&self.binaries, &dir).context(|| format!("cannot fill {name}"))?;
        Ok(dir)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.run);
    }
}

/// Removes the directories of runs that were killed before they could clean up.
fn remove_abandoned_runs(kept: &Path) {
    for entry in fs::read_dir(kept).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let run = name.to_str().and_then(|name| name.strip_prefix("run-")?.split_once('-'));
        if run.is_some_and(|(process, _)| !Path::new("/proc").join(process).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
