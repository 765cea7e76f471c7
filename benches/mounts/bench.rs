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
    /// Where everything is mounted.
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

    /// Runs something that takes memory for as long as it lasts: right before it so much is free, and
    /// once more right behind it.
    ///
    /// A kernel in a virtual machine may give memory back to the host that was free for a moment (free
    /// page reporting). Taking it again costs more than filling it, and nobody can tell when that
    /// happens. So it is in use until just before; and a page here and there stays in use, because what
    /// is given back are whole huge pages.
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

/// Memory, in bytes. The kernel keeps apart what it can move elsewhere and what not.
pub enum Taken {
    /// Of a memfd, a tmpfs and of files on disk.
    PageCache(usize),
    Ramfs(usize),
}

impl Taken {
    /// A page, and what is between two such: a part of a huge page.
    const KEPT: usize = 4096;
    const BETWEEN_KEPT: usize = MIB / 4;

    pub fn by_copy(kind: &str, bytes: usize) -> Taken {
        match kind {
            "ramfs" => Taken::Ramfs(bytes),
            _ => Taken::PageCache(bytes),
        }
    }
}
