//! [getauxval(3)](https://man7.org/linux/man-pages/man3/getauxval.3.html)

use std::ffi::c_ulong;

use linux_raw_sys::auxvec::{AT_PAGESZ, AT_SECURE};

unsafe extern "C" {
    // Looks up a number in the auxiliary vector of the process. Any number is allowed.
    safe fn getauxval(kind: c_ulong) -> c_ulong;
}

/// Returns `AT_SECURE`: whether the process got new privileges when it executed its program. The reason can
/// be a set-user-ID or set-group-ID file, file capabilities, or a security module.
pub fn is_secure_execution() -> bool {
    getauxval(c_ulong::from(AT_SECURE)) != 0
}

/// Returns `AT_PAGESZ`: the size of a page, in bytes. Makes no system call. rustix would read
/// /proc/self/auxv on some kernels.
pub fn page_size() -> usize {
    getauxval(c_ulong::from(AT_PAGESZ)) as usize
}

#[cfg(test)]
mod tests {
    #[test]
    fn page_size_is_the_size_of_smaps() {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let line = smaps.lines().find_map(|line| line.strip_prefix("KernelPageSize:")).unwrap();
        let kibibytes: usize = line.trim().strip_suffix(" kB").unwrap().parse().unwrap();
        assert_eq!(super::page_size(), kibibytes * 1024);
    }
}
