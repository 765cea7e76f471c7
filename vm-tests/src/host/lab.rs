//! Prepares the files of machines: directories, binaries and disks.

use super::{accelerator, disks, packages};
use crate::arch::{self, Arch, X86_64};
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
    /// The programs of the machines of each architecture.
    binaries: Vec<Binaries>,
    /// The images by the architecture, the name of the disk and the function that fills it.
    disks: Mutex<HashMap<(&'static str, &'static str, usize), PathBuf>>,
    has_kvm: bool,
    /// A program that runs QEMU. Its arguments are the command line of QEMU. Only tests of the harness
    /// set it.
    pub wrapper: Option<PathBuf>,
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
            binaries: arch::ALL
                .map(|arch| Binaries::new(arch, &kept, &run, packages::fetch))
                .into(),
            wrapper: None,
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

    /// Returns the programs of the machines of an architecture.
    pub fn binaries(&self, arch: &Arch) -> &Binaries {
        let mut all = self.binaries.iter();
        all.find(|binaries| binaries.arch == arch).expect("each architecture has its programs")
    }

    /// Returns the arguments of QEMU that select how the CPUs of a machine run.
    pub fn accelerator(&self, arch: &Arch) -> [&'static str; 4] {
        match self.has_kvm && *arch == X86_64 {
            true => accelerator::KVM,
            false => accelerator::emulation(arch),
        }
    }

    /// Returns the image of a disk, and builds it on the first call. All boots share the image, so
    /// callers must not write to it.
    pub fn disk(&self, arch: &'static Arch, disk: &Disk) -> Result<PathBuf, Error> {
        let mut disks = self.disks.lock().expect("no thread panics while it builds a disk");
        // Machines may give the same name to disks with different contents.
        let key = (arch.debian, disk.name, disk.fill as usize);
        if let Some(image) = disks.get(&key) {
            return Ok(image.clone());
        }
        let name = format!("{}-{}", disk.name, disks.len());
        let image = self.temporary(&format!("{name}.disk"));
        let content = self.filled(arch, &format!("{name}.content"), disk.fill)?;
        disks::build(disk, &content, &image)
            .context(|| format!("cannot make disk {}", disk.name))?;
        disks.insert(key, image.clone());
        Ok(image)
    }

    /// Creates a directory and fills it with `fill`.
    pub fn filled(&self, arch: &Arch, name: &str, fill: Fill) -> Result<PathBuf, Error> {
        let dir = self.temporary(name);
        fs::create_dir(&dir).context(|| format!("cannot make {}", dir.display()))?;
        fill(self.binaries(arch), &dir).context(|| format!("cannot fill {name}"))?;
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
