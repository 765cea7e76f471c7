//! Swap areas: [swapon(2)](https://man7.org/linux/man-pages/man2/swapon.2.html).

use std::ffi::{CStr, c_char, c_int};

use rustix::io;

unsafe extern "C" {
    /// Both functions are part of the C library, which std links anyway.
    fn swapon(path: *const c_char, flags: c_int) -> c_int;
    fn swapoff(path: *const c_char) -> c_int;
}

/// Starts to swap to a device or file with the signature of a swap area (swapon(2)).
///
/// # Errors
///
/// `EINVAL`: the signature is missing. `EBUSY`: the area is in use. `EPERM`: `CAP_SYS_ADMIN` is missing.
pub fn swap_on(path: &CStr) -> io::Result<()> {
    // SAFETY: the path ends in a NUL. The kernel does not write to it and does not keep it.
    result(unsafe { swapon(path.as_ptr(), 0) })
}

/// Reads the contents of a swap area back into memory, and stops swapping there (swapoff(2)).
///
/// # Errors
///
/// `EINVAL`: the area is not in use. `ENOMEM`: memory is too small for its contents.
pub fn swap_off(path: &CStr) -> io::Result<()> {
    // SAFETY: as above.
    result(unsafe { swapoff(path.as_ptr()) })
}

fn result(result: c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => {
            let error = std::io::Error::last_os_error();
            Err(io::Errno::from_io_error(&error).unwrap_or(io::Errno::INVAL))
        }
    }
}
