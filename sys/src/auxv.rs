//! [getauxval(3)](https://man7.org/linux/man-pages/man3/getauxval.3.html)

use std::ffi::c_ulong;

use linux_raw_sys::auxvec::AT_SECURE;

unsafe extern "C" {
    // Looks a number up in what the kernel handed to the process, and takes any number.
    safe fn getauxval(kind: c_ulong) -> c_ulong;
}

/// `AT_SECURE`: whether executing the program gave the process privileges that it did not have: those
/// of a set-user-ID or set-group-ID file, or file capabilities; or whether a security module says so.
pub fn is_secure_execution() -> bool {
    getauxval(c_ulong::from(AT_SECURE)) != 0
}
