//! [getauxval(3)](https://man7.org/linux/man-pages/man3/getauxval.3.html)

use std::ffi::c_ulong;

use linux_raw_sys::auxvec::AT_SECURE;

unsafe extern "C" {
    // Looks up a number in the auxiliary vector of the process. Any number is allowed.
    safe fn getauxval(kind: c_ulong) -> c_ulong;
}

/// Returns `AT_SECURE`: whether the process got new privileges when it executed its program. The reason can
/// be a set-user-ID or set-group-ID file, file capabilities, or a security module.
pub fn is_secure_execution() -> bool {
    getauxval(c_ulong::from(AT_SECURE)) != 0
}
