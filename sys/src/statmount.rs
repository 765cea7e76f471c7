//! [statmount(2)](https://man7.org/linux/man-pages/man2/statmount.2.html) (Linux 6.8).

use std::ffi::{c_long, c_uint};

use linux_raw_sys::general::{__NR_statmount, MNT_ID_REQ_SIZE_VER0, mnt_id_req, statmount};
use rustix::io;

unsafe extern "C" {
    /// syscall(2) of the C library, which std links. Neither rustix nor the C library wraps statmount.
    fn syscall(number: c_long, ...) -> c_long;
}

/// Checks that the mount namespace of the caller has a mount with this unique ID (`STATX_MNT_ID_UNIQUE`).
///
/// # Errors
///
/// - `ENOENT`: the mount namespace does not have the mount.
/// - `ENOSYS`: the kernel lacks statmount.
/// - `EPERM`: the mount is out of reach, and the caller lacks `CAP_SYS_ADMIN`.
pub fn statmount_exists(mount_id: u64) -> io::Result<()> {
    let request = mnt_id_req {
        size: MNT_ID_REQ_SIZE_VER0,
        spare: 0,
        mnt_id: mount_id,
        // No field is requested.
        param: 0,
        mnt_ns_id: 0,
    };
    const NO_FLAGS: c_uint = 0;
    let mut buffer = [0_u8; size_of::<statmount>()];
    // SAFETY: the arguments have the types of statmount(2). The kernel reads MNT_ID_REQ_SIZE_VER0 bytes of
    // the request, and writes at most the length of the buffer.
    let result = unsafe {
        syscall(
            __NR_statmount as c_long,
            &raw const request,
            buffer.as_mut_ptr(),
            buffer.len(),
            NO_FLAGS,
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
