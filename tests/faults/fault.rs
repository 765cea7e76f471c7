//! The fault of a run, and the recorded system call of the fault.

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use test_support::tracer::{Action, Call};

use super::calls::SystemCall;
use super::scenarios::FSCONFIG_CMD_CREATE;

/// A call that fails this often in one run counts as retried forever.
pub const FOR_EVER: usize = 5000;

/// A system call of a run without a fault.
pub struct Recorded {
    pub call: &'static SystemCall,
    pub nth: usize,
    pub length: u64,
    /// The key of fsconfig(2).
    pub key: Option<String>,
    /// Whether the call is the command of fsconfig(2) that makes a superblock.
    pub is_create: bool,
    /// Whether the call is the check of the permission: a superblock of EROFS without any option.
    pub is_permission_check: bool,
    /// Whether the call is part of the trial of an overlay on the finished mount.
    pub is_trial: bool,
    /// The file system of the last fsopen(2), and whether an overlay was made.
    fs_type: Option<String>,
    has_overlay: bool,
    /// Whether the call is `fcntl(F_GET_SEALS)` on the image.
    pub is_seal_query: bool,
    /// Whether the call is one of many similar calls in a row.
    pub is_one_of_many: bool,
    /// Whether the call comes before the helper's own code, from the dynamic loader, the C library or
    /// Rust's runtime.
    pub is_start: bool,
    /// Whether the call queries the memory of the machine.
    pub is_machine_query: bool,
    /// Whether the call is `fcntl(F_GETFD)`. std checks descriptors with this call only in debug
    /// builds.
    pub is_debug_check: bool,
}

/// The fault of a run. The number of the call and the count of earlier calls of that number identify
/// the call. With threads, that count differs less between runs than the position among all calls.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    None,
    Errno {
        number: i64,
        nth: usize,
        errno: Errno,
    },
    /// This call and all later calls of the same number fail.
    ForEver {
        number: i64,
        nth: usize,
        errno: Errno,
    },
    /// The call reads or writes only this number of bytes.
    Short {
        number: i64,
        nth: usize,
        length: u64,
    },
    /// This call and all later calls of the same number read or write in pieces.
    ShortForEver {
        number: i64,
        nth: usize,
        piece: Piece,
    },
    /// The process gets a signal before the call.
    Signal {
        number: i64,
        nth: usize,
        signal: Signal,
    },
}

/// The length to which a read or write is shortened.
#[derive(Clone, Copy, Debug)]
pub enum Piece {
    Half,
    Bytes(u64),
}

impl Recorded {
    pub fn new(call: &Call, arguments: &[String], previous: Option<&Recorded>) -> Recorded {
        let file = match call.number {
            libc::SYS_openat | libc::SYS_statx => call.text(1).filter(|path| !path.is_empty()),
            _ => None,
        };
        let file = file.map(PathBuf::from).or_else(|| call.file(0)).unwrap_or_default();
        let is_argument = || call.text(1).is_some_and(|path| arguments.contains(&path));
        let was_start = previous.is_none_or(|previous| previous.is_start);
        let had_overlay = previous.is_some_and(|previous| previous.has_overlay);
        let fs_type = match call.number {
            libc::SYS_fsopen => call.text(0),
            _ => previous.and_then(|previous| previous.fs_type.clone()),
        };
        let is_of = |expected| fs_type.as_deref() == Some(expected);
        let is_attach = call.number == libc::SYS_move_mount
            && call.arguments[4] & libc::MOVE_MOUNT_T_EMPTY_PATH as u64 != 0;
        let is_create =
            call.number == libc::SYS_fsconfig && call.arguments[1] == FSCONFIG_CMD_CREATE;
        let follows_fsopen =
            previous.is_some_and(|previous| previous.call.number == libc::SYS_fsopen);
        Recorded {
            is_trial: had_overlay && !is_attach,
            has_overlay: had_overlay || is_of("overlay") && call.number == libc::SYS_fsmount,
            call: SystemCall::of(call.number),
            nth: call.nth,
            length: call.arguments[2],
            key: (call.number == libc::SYS_fsconfig).then(|| call.text(2)).flatten(),
            is_create,
            is_permission_check: is_create && follows_fsopen && is_of("erofs"),
            fs_type,
            is_seal_query: call.number == libc::SYS_fcntl
                && call.arguments[1] == libc::F_GET_SEALS as u64,
            is_one_of_many: false,
            // The helper's own code starts with the first open of a path from its arguments.
            is_start: was_start && !(call.number == libc::SYS_openat && is_argument()),
            is_machine_query: file == Path::new("/proc/meminfo"),
            is_debug_check: call.number == libc::SYS_fcntl
                && call.arguments[1] == libc::F_GETFD as u64,
        }
    }

    /// Returns whether the fault may end the process. No program survives a failure of the loader, of
    /// an allocation, or an abort of its C library.
    pub fn may_die(&self) -> bool {
        self.is_start || self.call.manages_memory() || self.call.may_abort()
    }
}

impl Fault {
    /// Returns whether only one call fails.
    pub fn is_single(self) -> bool {
        !matches!(self, Fault::ForEver { .. } | Fault::ShortForEver { .. })
    }

    /// Returns whether the fault is a short read or write, which a working kernel may return too.
    pub fn is_harmless(self) -> bool {
        matches!(self, Fault::Short { length: 1.., .. } | Fault::ShortForEver { .. })
    }

    /// Returns the action for a call. `injected` counts the calls that do not proceed.
    pub fn action(self, call: &Call, injected: &mut usize) -> Action {
        let is_this = |number, nth| (call.number, call.nth) == (number, nth);
        let action = match self {
            // The recorded call is not FUTEX_WAKE, but another run can have FUTEX_WAKE at the same
            // position.
            Fault::Errno { .. } | Fault::ForEver { .. } if is_wake(call) => return Action::Proceed,
            Fault::Errno { number, nth, errno } if is_this(number, nth) => Action::Fail(errno),
            Fault::Short { number, nth, length } if is_this(number, nth) => Action::Shorten(length),
            Fault::ShortForEver { number, nth, piece }
                if call.number == number && call.nth >= nth =>
            {
                match piece {
                    Piece::Half => Action::Shorten((call.arguments[2] / 2).max(1)),
                    Piece::Bytes(bytes) if bytes < call.arguments[2] => Action::Shorten(bytes),
                    Piece::Bytes(_) => return Action::Proceed,
                }
            }
            Fault::Signal { number, nth, signal } if is_this(number, nth) => Action::Signal(signal),
            Fault::ForEver { number, nth, errno } if call.number == number && call.nth >= nth => {
                match *injected {
                    FOR_EVER => Action::Signal(Signal::SIGTERM),
                    _ => Action::Fail(errno),
                }
            }
            // Skips the four seconds of waiting for loop devices.
            Fault::ForEver { .. } if call.number == libc::SYS_clock_nanosleep => {
                return Action::Answer(0, Vec::new());
            }
            _ => return Action::Proceed,
        };
        *injected += 1;
        action
    }
}

/// Returns whether the call is FUTEX_WAKE. The C library does not check for errors of the call. Without
/// the call, the waiter sleeps forever.
fn is_wake(call: &Call) -> bool {
    let operation = (call.arguments[1] as i32) & libc::FUTEX_CMD_MASK;
    call.number == libc::SYS_futex && operation == libc::FUTEX_WAKE
}
