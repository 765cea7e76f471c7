//! [sysinfo(2)](https://man7.org/linux/man-pages/man2/sysinfo.2.html)

use std::ffi::c_int;

use linux_raw_sys::system::sysinfo as Sysinfo;
use rustix::io;

unsafe extern "C" {
    /// Of the C library, which std links anyway.
    fn sysinfo(info: *mut WithPadding) -> c_int;
}

/// 32-bit machines have bytes behind the fields, which the binding leaves out.
#[repr(C)]
struct WithPadding {
    info: Sysinfo,
    padding: [u64; 4],
}

/// The memory of the machine, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// All of it.
    pub total: u64,
    /// What nobody uses at this moment, not even as page cache.
    pub free: u64,
}

/// sysinfo(2), as rustix has it, but for a seccomp filter that denies it: there rustix panics.
#[allow(clippy::unnecessary_cast)] // c_ulong has 32 bits on 32-bit machines.
pub fn memory() -> io::Result<Memory> {
    // SAFETY: the structure consists of integers, for which zero is a value.
    let mut answer: WithPadding = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes a struct sysinfo, for which there is room.
    if unsafe { sysinfo(&mut answer) } != 0 {
        let error = std::io::Error::last_os_error();
        return Err(io::Errno::from_io_error(&error).unwrap_or(io::Errno::INVAL));
    }
    let info = answer.info;
    let bytes = |units| units as u64 * u64::from(info.mem_unit);
    Ok(Memory { total: bytes(info.totalram), free: bytes(info.freeram) })
}

#[cfg(test)]
mod tests {
    #[test]
    fn less_is_free_than_there_is() {
        let memory = super::memory().unwrap();
        assert!(0 < memory.free && memory.free < memory.total, "{memory:?}");
    }
}
