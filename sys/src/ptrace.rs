//! [ptrace(2)](https://man7.org/linux/man-pages/man2/ptrace.2.html), for the tests of sealmount.

use std::ffi::{c_int, c_long};

use linux_raw_sys::elf_uapi::NT_ARM_SYSTEM_CALL;
use linux_raw_sys::general::{__NR_ptrace, iovec};
use linux_raw_sys::ptrace::PTRACE_SETREGSET;
use rustix::io;
use rustix::thread::Pid;

unsafe extern "C" {
    /// syscall(2) of the C library, which std links. rustix does not wrap ptrace.
    fn syscall(number: c_long, ...) -> c_long;
}

/// Changes the number of the system call at whose entry a traced thread has stopped (`PTRACE_SETREGSET` with
/// `NT_ARM_SYSTEM_CALL`). With the number -1, the kernel executes no call. A change of the register x8 has no
/// effect: the kernel has read the register before the stop.
///
/// # Errors
///
/// `ESRCH`: the caller does not trace the thread, or the thread has not stopped.
pub fn set_traced_call(thread: Pid, number: i32) -> io::Result<()> {
    let mut number: c_int = number;
    let mut value =
        iovec { iov_base: (&raw mut number).cast(), iov_len: size_of::<c_int>() as u64 };
    // SAFETY: the arguments have the types of ptrace(2). The kernel reads the number and writes only the
    // length in `value`. The call changes a thread of another process: a thread cannot trace a thread of its
    // own process.
    let result = unsafe {
        syscall(
            __NR_ptrace as c_long,
            PTRACE_SETREGSET as c_long,
            c_long::from(thread.as_raw_nonzero().get()),
            c_long::from(NT_ARM_SYSTEM_CALL),
            &raw mut value,
        )
    };
    match result {
        0 => Ok(()),
        _ => {
            Err(io::Errno::from_io_error(&std::io::Error::last_os_error())
                .unwrap_or(io::Errno::INVAL))
        }
    }
}
