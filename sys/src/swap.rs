//! Swap areas: [swapon(2)](https://man7.org/linux/man-pages/man2/swapon.2.html).

use std::ffi::{CStr, c_char, c_int};

use rustix::io;

unsafe extern "C" {
    /// Both are of the C library, which std links anyway.
    fn swapon(path: *const c_char, flags: c_int) -> c_int;
    fn swapoff(path: *const c_char) -> c_int;
}

/// swapon(2): starts to swap to a device or file that has the signature of a swap area.
///
/// # Errors
///
/// `EINVAL`: there is no signature. `EBUSY`: it is in use. `EPERM`: no `CAP_SYS_ADMIN`.
pub fn swap_on(path: &CStr) -> io::Result<()> {
    // SAFETY: the path ends in a NUL; nothing is written to it and nobody keeps it.
    result(unsafe { swapon(path.as_ptr(), 0) })
}

/// swapoff(2): reads back into memory all that was swapped there, and stops.
///
/// # Errors
///
/// `EINVAL`: it is not in use. `ENOMEM`: there is not enough memory for what is in it.
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
