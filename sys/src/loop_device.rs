//! Loop devices: [loop(4)](https://man7.org/linux/man-pages/man4/loop.4.html).

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd};

use linux_raw_sys::loop_device::{
    LO_FLAGS_AUTOCLEAR, LO_FLAGS_READ_ONLY, LO_NAME_SIZE, LOOP_CONFIGURE, LOOP_CTL_GET_FREE,
    loop_config,
};
use rustix::io;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, ioctl};

/// `LOOP_CTL_GET_FREE` returns its result as the return value of ioctl(2), unlike the patterns of rustix.
struct GetFree;

// SAFETY: LOOP_CTL_GET_FREE has no argument and returns a number.
unsafe impl Ioctl for GetFree {
    type Output = u32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE as Opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(number: IoctlOutput, _: *mut c_void) -> io::Result<u32> {
        u32::try_from(number).map_err(|_| io::Errno::RANGE)
    }
}

/// Returns the number N of a /dev/loopN that is free at this moment (`LOOP_CTL_GET_FREE`, Linux 3.1). The
/// kernel makes a device if no device is free. `control` is /dev/loop-control.
///
/// The number is only a proposal: another process may take the device first.
///
/// # Errors
///
/// The errno of ioctl(2), for example `ENOTTY`: `control` is not /dev/loop-control.
pub fn get_free(control: impl AsFd) -> io::Result<u32> {
    // SAFETY: see GetFree.
    unsafe { ioctl(control, GetFree) }
}

/// Attaches `backing_file` to the loop device `device` (`LOOP_CONFIGURE`, Linux 5.8): read-only, in blocks of
/// `block_size` bytes, through the page cache (no direct I/O). The kernel releases the file when the last
/// user closes the device (`LO_FLAGS_AUTOCLEAR`).
///
/// `LOOP_GET_STATUS64` shows the first 63 bytes of `name` as `lo_file_name`.
///
/// # Errors
///
/// `EBUSY`: another process took the device. `ENXIO`, `EAGAIN`: the device is being made or removed; a
/// later attempt may succeed.
pub fn configure(
    device: impl AsFd,
    backing_file: impl AsFd,
    block_size: u32,
    name: &[u8],
) -> io::Result<()> {
    let backing_file = backing_file.as_fd().as_raw_fd();
    // SAFETY: loop_config consists of integers, for which zero is valid.
    let mut config: loop_config = unsafe { std::mem::zeroed() };
    config.fd = u32::try_from(backing_file).map_err(|_| io::Errno::BADF)?;
    config.block_size = block_size;
    config.info.lo_flags = LO_FLAGS_READ_ONLY as u32 | LO_FLAGS_AUTOCLEAR as u32;
    let length = name.len().min(LO_NAME_SIZE as usize - 1);
    config.info.lo_file_name[..length].copy_from_slice(&name[..length]);
    // SAFETY: the opcode is LOOP_CONFIGURE, whose argument is a struct loop_config.
    unsafe { ioctl(device, Setter::<{ LOOP_CONFIGURE as Opcode }, _>::new(config)) }
}
