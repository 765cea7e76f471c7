//! [sched_getcpu(3)](https://man7.org/linux/man-pages/man3/sched_getcpu.3.html), of the C library: to find
//! out where the vDSO is, rustix reads /proc/self/auxv on kernels before 6.4, and panics if there is none.

use std::ffi::c_int;

unsafe extern "C" {
    safe fn sched_getcpu() -> c_int;
}

/// The processor that the calling thread runs on at this moment, as it is numbered in a
/// [cpu_set_t](https://man7.org/linux/man-pages/man3/CPU_SET.3.html).
pub fn current_processor() -> Option<usize> {
    usize::try_from(sched_getcpu()).ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_is_one_that_is_allowed() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        assert!(allowed.is_set(super::current_processor().unwrap()));
    }
}
