//! The memory and the cores of the machine.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use crate::sizes::MIB;

/// /proc/meminfo, in bytes.
pub struct MemInfo(HashMap<String, u64>);

impl MemInfo {
    pub fn read() -> MemInfo {
        let text = fs::read_to_string("/proc/meminfo").unwrap();
        let parse = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_owned(), value.split_whitespace().next()?.parse::<u64>().ok()? * 1024))
        };
        MemInfo(text.lines().filter_map(parse).collect())
    }

    /// Reads it after each core has added its pending counts, if the kernel supports that.
    pub fn read_all() -> MemInfo {
        let _ = fs::write("/proc/sys/vm/stat_refresh", "1");
        MemInfo::read()
    }

    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

pub fn available() -> u64 {
    MemInfo::read().get("MemAvailable")
}

/// Returns the memory of tmpfs files, memfds and ramfs, in bytes.
pub fn held() -> u64 {
    let info = MemInfo::read();
    info.get("Shmem") + info.get("Unevictable")
}

/// Waits until no more memory is held than before: the kernel frees unmounted memory a moment later.
/// Other processes may use memory meanwhile, so the wait ends after half a second.
pub fn wait_until_freed(before: u64) {
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(10));
        if held() < before + MIB as u64 {
            return;
        }
    }
}

pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
