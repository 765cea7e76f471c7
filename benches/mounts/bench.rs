//! The programs, directories and rounds of all measurements, and memory for them.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use test_support::{Sandbox, umount};

use crate::machine;
use crate::programs::{Program, Programs};
use crate::sizes::MIB;
use crate::timing::{Effort, whole_process};

/// The programs, directories and rounds of all measurements.
pub struct Bench {
    pub effort: Effort,
    pub programs: Programs,
    pub sandbox: Sandbox,
    /// The mount point of all mounts.
    pub mnt: PathBuf,
    pub tmpfs: PathBuf,
    pub ramfs: PathBuf,
}

impl Bench {
    /// Mounts; returns the time of the whole process in milliseconds.
    pub fn mount(&self, program: &Program, options: &str, image: &Path) -> f64 {
        let mut command = program.command();
        whole_process(command.args(["-o", options]).arg(image).arg(&self.mnt))
    }

    pub fn unmount(&self) {
        umount(&self.mnt);
    }

    /// Runs work that allocates this memory. The same memory is in use until just before.
    ///
    /// The kernel of a virtual machine may give free memory back to its host after a while (free page
    /// reporting). Getting the memory back costs more than filling it. So the memory is in use until just
    /// before. A page in each quarter of a megabyte stays in use, because the kernel gives back whole huge
    /// pages.
    pub fn with_memory<T>(&self, memory: &[Taken], run: impl FnOnce() -> T) -> T {
        let before = machine::held();
        let mut kept = Vec::new();
        for (number, taken) in memory.iter().enumerate() {
            let (directory, bytes) = match taken {
                Taken::PageCache(bytes) => (&self.tmpfs, bytes),
                Taken::Ramfs(bytes) => (&self.ramfs, bytes),
            };
            let path = directory.join("to-be-freed");
            let mut to_be_freed = File::create(&path).unwrap();
            kept.push(directory.join(format!("kept-{number}")));
            let mut to_be_kept = File::create(&kept[number]).unwrap();
            for _ in 0..bytes.div_ceil(Taken::BETWEEN_KEPT) {
                to_be_freed.write_all(&[1; Taken::BETWEEN_KEPT]).unwrap();
                to_be_kept.write_all(&[1; Taken::KEPT]).unwrap();
            }
            drop(to_be_freed);
            fs::remove_file(&path).unwrap();
        }
        let result = run();
        kept.iter().for_each(|path| fs::remove_file(path).unwrap());
        machine::wait_until_freed(before);
        result
    }
}

/// Memory, in bytes. The kernel separates movable memory from unmovable memory.
pub enum Taken {
    /// A memfd, a tmpfs, and files on disk.
    PageCache(usize),
    Ramfs(usize),
}

impl Taken {
    /// A page, and the distance of two such pages: a part of a huge page.
    const KEPT: usize = 4096;
    const BETWEEN_KEPT: usize = MIB / 4;

    pub fn by_copy(kind: &str, bytes: usize) -> Taken {
        match kind {
            "ramfs" => Taken::Ramfs(bytes),
            _ => Taken::PageCache(bytes),
        }
    }
}
