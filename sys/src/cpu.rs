//! [sched_getcpu(3)](https://man7.org/linux/man-pages/man3/sched_getcpu.3.html) of the C library. On kernels
//! before 6.4, rustix reads /proc/self/auxv to find the vDSO, and panics without /proc.

use std::ffi::c_int;

unsafe extern "C" {
    safe fn sched_getcpu() -> c_int;
}

/// Returns the CPU that the calling thread runs on at this moment, as numbered in a
/// [cpu_set_t](https://man7.org/linux/man-pages/man3/CPU_SET.3.html).
pub fn current_cpu() -> Option<usize> {
    usize::try_from(sched_getcpu()).ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn current_cpu_returns_an_allowed_cpu() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        assert!(allowed.is_set(super::current_cpu().unwrap()));
    }
}
