//! Loop devices: [loop(4)](https://man7.org/linux/man-pages/man4/loop.4.html).

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd};

use linux_raw_sys::loop_device::{
    LO_FLAGS_AUTOCLEAR, LO_FLAGS_READ_ONLY, LO_NAME_SIZE, LOOP_CONFIGURE, LOOP_CTL_GET_FREE,
    loop_config,
};
use rustix::io;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, ioctl};

/// `LOOP_CTL_GET_FREE` hands its answer back as the return value of ioctl(2), which none of
/// rustix's patterns does.
struct GetFree;

// SAFETY: LOOP_CTL_GET_FREE takes no argument and answers with a number.
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

/// `LOOP_CTL_GET_FREE` (Linux 3.1): the number N of a /dev/loopN that is free at this moment, made
/// if there was none. `control` is /dev/loop-control.
///
/// The number is only a proposal: anyone may take the device before the caller does.
pub fn get_free(control: impl AsFd) -> io::Result<u32> {
    // SAFETY: see GetFree.
    unsafe { ioctl(control, GetFree) }
}

/// `LOOP_CONFIGURE` (Linux 5.8): makes `backing_file` the content of the loop device `device`,
/// read-only, in blocks of `block_size` bytes, through the page cache (no direct I/O), and let go
/// of when the last user of the device closes it (`LO_FLAGS_AUTOCLEAR`).
///
/// `name` is what `LOOP_GET_STATUS64` shows as `lo_file_name`; more than 63 bytes are cut off.
///
/// # Errors
///
/// `EBUSY`: somebody else took the device. `ENXIO`, `EAGAIN`: it is going or coming; another try
/// may do.
pub fn configure(
    device: impl AsFd,
    backing_file: impl AsFd,
    block_size: u32,
    name: &[u8],
) -> io::Result<()> {
    let backing_file = backing_file.as_fd().as_raw_fd();
    // SAFETY: loop_config consists of integers, for which zero is a value.
    let mut config: loop_config = unsafe { std::mem::zeroed() };
    config.fd = u32::try_from(backing_file).map_err(|_| io::Errno::BADF)?;
    config.block_size = block_size;
    config.info.lo_flags = LO_FLAGS_READ_ONLY as u32 | LO_FLAGS_AUTOCLEAR as u32;
    let length = name.len().min(LO_NAME_SIZE as usize - 1);
    config.info.lo_file_name[..length].copy_from_slice(&name[..length]);
    // SAFETY: the opcode is LOOP_CONFIGURE, whose argument is a struct loop_config.
    unsafe { ioctl(device, Setter::<{ LOOP_CONFIGURE as Opcode }, _>::new(config)) }
}
