//! The registers of a traced thread that has stopped at the entry or the exit of a system call.

use nix::libc::c_long;
use nix::unistd::Pid;

use architecture::All;

/// The registers at a stop. A method that changes a register changes the register of the thread.
pub struct Registers {
    thread: Pid,
    all: All,
}

impl Registers {
    pub fn read(thread: Pid) -> nix::Result<Registers> {
        Ok(Registers { thread, all: architecture::read(thread)? })
    }

    /// Returns the number of the system call, at its entry.
    pub fn number(&self) -> c_long {
        architecture::number(&self.all)
    }

    pub fn arguments(&mut self) -> [u64; 6] {
        architecture::arguments(&mut self.all).map(|argument| *argument)
    }

    /// Changes an argument, at the entry of the call.
    pub fn set_argument(&mut self, argument: usize, value: u64) -> nix::Result<()> {
        *architecture::arguments(&mut self.all)[argument] = value;
        architecture::write(self.thread, self.all)
    }

    /// Gives an argument its value from before the call, at the exit of the call.
    pub fn restore_argument(&mut self, argument: usize, value: u64) -> nix::Result<()> {
        match argument == 0 && architecture::RESULT_REPLACES_FIRST_ARGUMENT {
            true => Ok(()),
            false => self.set_argument(argument, value),
        }
    }

    /// Lets the kernel execute no call, at the entry of the call.
    pub fn skip(&mut self) -> nix::Result<()> {
        architecture::skip(self.thread, self.all)
    }

    /// Changes the result, at the exit of the call. An errno is negative.
    pub fn set_result(&mut self, value: i64) -> nix::Result<()> {
        *architecture::result(&mut self.all) = value as u64;
        architecture::write(self.thread, self.all)
    }
}

#[cfg(target_arch = "x86_64")]
mod architecture {
    use nix::libc::c_long;
    use nix::unistd::Pid;

    pub use nix::libc::user_regs_struct as All;
    pub use nix::sys::ptrace::{getregs as read, setregs as write};

    pub const RESULT_REPLACES_FIRST_ARGUMENT: bool = false;

    pub fn number(all: &All) -> c_long {
        all.orig_rax as c_long
    }

    pub fn arguments(all: &mut All) -> [&mut u64; 6] {
        let All { rdi, rsi, rdx, r10, r8, r9, .. } = all;
        [rdi, rsi, rdx, r10, r8, r9]
    }

    pub fn result(all: &mut All) -> &mut u64 {
        &mut all.rax
    }

    pub fn skip(thread: Pid, all: All) -> nix::Result<()> {
        // No system call has this number.
        write(thread, All { orig_rax: u64::MAX, ..all })
    }
}

#[cfg(target_arch = "aarch64")]
mod architecture {
    use nix::errno::Errno;
    use nix::libc::c_long;
    use nix::unistd::Pid;

    pub use nix::libc::user_regs_struct as All;
    pub use nix::sys::ptrace::{getregs as read, setregs as write};

    pub const RESULT_REPLACES_FIRST_ARGUMENT: bool = true;

    pub fn number(all: &All) -> c_long {
        all.regs[8] as c_long
    }

    pub fn arguments(all: &mut All) -> [&mut u64; 6] {
        let [x0, x1, x2, x3, x4, x5, ..] = &mut all.regs;
        [x0, x1, x2, x3, x4, x5]
    }

    pub fn result(all: &mut All) -> &mut u64 {
        &mut all.regs[0]
    }

    pub fn skip(thread: Pid, _: All) -> nix::Result<()> {
        let thread = rustix::process::Pid::from_raw(thread.as_raw()).ok_or(Errno::ESRCH)?;
        // No system call has this number.
        sealmount_sys::set_traced_call(thread, -1)
            .map_err(|error| Errno::from_raw(error.raw_os_error()))
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod architecture {
    use nix::libc::c_long;
    use nix::unistd::Pid;

    /// No value of this type exists.
    pub use std::convert::Infallible as All;

    pub const RESULT_REPLACES_FIRST_ARGUMENT: bool = false;

    pub fn read(_: Pid) -> nix::Result<All> {
        panic!("cannot trace {}: only x86_64 and aarch64 are supported", std::env::consts::ARCH);
    }

    pub fn write(_: Pid, all: All) -> nix::Result<()> {
        match all {}
    }

    pub fn number(all: &All) -> c_long {
        match *all {}
    }

    pub fn arguments(all: &mut All) -> [&mut u64; 6] {
        match *all {}
    }

    pub fn result(all: &mut All) -> &mut u64 {
        match *all {}
    }

    pub fn skip(_: Pid, all: All) -> nix::Result<()> {
        match all {}
    }
}
