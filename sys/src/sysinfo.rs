//! [sysinfo(2)](https://man7.org/linux/man-pages/man2/sysinfo.2.html) and
//! [getrlimit(2)](https://man7.org/linux/man-pages/man2/getrlimit.2.html). If a seccomp filter denies one of
//! them, rustix panics.

use std::ffi::{c_int, c_long};

use linux_raw_sys::general::{__NR_prlimit64, RLIM64_INFINITY, RLIMIT_FSIZE, rlimit64};
use linux_raw_sys::system::sysinfo as Sysinfo;
use rustix::io;

unsafe extern "C" {
    /// Both functions are part of the C library, which std links anyway.
    fn sysinfo(info: *mut WithPadding) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

/// On 32-bit machines bytes follow the fields, which the binding leaves out.
#[repr(C)]
struct WithPadding {
    info: Sysinfo,
    padding: [u64; 4],
}

/// The memory of the machine, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct SystemMemory {
    /// The whole memory.
    pub total: u64,
    /// The memory that is not used at this moment, not even as page cache.
    pub free: u64,
}

/// Returns the memory of the machine (sysinfo(2)).
///
/// # Errors
///
/// The errno of a seccomp filter that denies sysinfo(2).
#[allow(clippy::unnecessary_cast)] // c_ulong has 32 bits on 32-bit machines.
pub fn memory() -> io::Result<SystemMemory> {
    // SAFETY: the structure consists of integers, for which zero is valid.
    let mut answer: WithPadding = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes a struct sysinfo, for which there is room.
    if unsafe { sysinfo(&mut answer) } != 0 {
        let error = std::io::Error::last_os_error();
        return Err(io::Errno::from_io_error(&error).unwrap_or(io::Errno::INVAL));
    }
    let info = answer.info;
    let bytes = |units| units as u64 * u64::from(info.mem_unit);
    Ok(SystemMemory { total: bytes(info.totalram), free: bytes(info.freeram) })
}

/// Returns `RLIMIT_FSIZE`, in bytes: the largest file that the process may write. `None` means no limit.
///
/// # Errors
///
/// The errno of a seccomp filter that denies prlimit(2).
pub fn file_size_limit() -> io::Result<Option<u64>> {
    let mut limit = rlimit64 { rlim_cur: 0, rlim_max: 0 };
    let nothing = std::ptr::null::<rlimit64>();
    // SAFETY: the arguments have the types of prlimit(2): the calling process, no new limit to read, and
    // room for the old limit.
    let result =
        unsafe { syscall(__NR_prlimit64 as c_long, 0 as c_int, RLIMIT_FSIZE, nothing, &mut limit) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        return Err(io::Errno::from_io_error(&error).unwrap_or(io::Errno::INVAL));
    }
    Ok(Some(limit.rlim_cur).filter(|limit| *limit != RLIM64_INFINITY as u64))
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_reports_less_free_than_total() {
        let memory = super::memory().unwrap();
        assert!(0 < memory.free && memory.free < memory.total, "{memory:?}");
    }
}
