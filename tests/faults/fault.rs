//! What goes wrong in a run, and at which of the recorded system calls.

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use test_support::tracer::{Action, Call};

use super::calls::SystemCall;
use super::scenarios::FSCONFIG_CMD_CREATE;

/// A call that was made to fail so often in one run is taken to be retried for ever.
pub const FOR_EVER: usize = 5000;

/// A system call of a run without a fault.
pub struct Recorded {
    pub call: &'static SystemCall,
    pub nth: usize,
    pub length: u64,
    /// The key of fsconfig(2), and whether it is the command that makes a superblock.
    pub key: Option<String>,
    pub is_create: bool,
    /// In a row of calls that differ in nothing that matters.
    pub is_one_of_many: bool,
    /// Before the helper's own code: the dynamic loader, the C library, Rust's runtime.
    pub is_start: bool,
    /// Finds out how much memory there is.
    pub is_about_machine: bool,
    /// `fcntl(F_GETFD)`, by which std checks descriptors in debug builds, and in these alone.
    pub is_debug_check: bool,
}

/// What goes wrong in a run. A call is told by its number and how many of that number came before:
/// where there are threads, that is steadier than its place among all.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    None,
    Errno {
        number: i64,
        nth: usize,
        errno: Errno,
    },
    /// That call and all later ones of its kind.
    ForEver {
        number: i64,
        nth: usize,
        errno: Errno,
    },
    /// As many bytes are read or written, and no more.
    Short {
        number: i64,
        nth: usize,
        length: u64,
    },
    /// That call and all later ones of its kind read or write in pieces.
    ShortForEver {
        number: i64,
        nth: usize,
        piece: Piece,
    },
    /// Before that call.
    Signal {
        number: i64,
        nth: usize,
        signal: Signal,
    },
}

/// How much a read or write that is cut short does.
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
        Recorded {
            call: SystemCall::of(call.number),
            nth: call.nth,
            length: call.arguments[2],
            key: (call.number == libc::SYS_fsconfig).then(|| call.text(2)).flatten(),
            is_create: call.number == libc::SYS_fsconfig
                && call.arguments[1] == FSCONFIG_CMD_CREATE,
            is_one_of_many: false,
            // The first thing that the helper does is to open what its arguments name.
            is_start: was_start && !(call.number == libc::SYS_openat && is_argument()),
            is_about_machine: file == Path::new("/proc/meminfo"),
            is_debug_check: call.number == libc::SYS_fcntl
                && call.arguments[1] == libc::F_GETFD as u64,
        }
    }

    /// No program outlives that it cannot be loaded, that it gets no memory, or that its C library
    /// gives up.
    pub fn may_die(&self) -> bool {
        self.is_start || self.call.is_of_memory() || self.call.is_of_threads()
    }
}

impl Fault {
    /// Only one call is made to fail.
    pub fn is_single(self) -> bool {
        !matches!(self, Fault::ForEver { .. } | Fault::ShortForEver { .. })
    }

    /// What a kernel does without anything being wrong: some bytes are read or written, if not all.
    pub fn is_harmless(self) -> bool {
        matches!(self, Fault::Short { length: 1.., .. } | Fault::ShortForEver { .. })
    }

    /// What becomes of a call; `injected` counts those that are not simply made.
    pub fn action(self, call: &Call, injected: &mut usize) -> Action {
        let is_this = |number, nth| (call.number, call.nth) == (number, nth);
        let action = match self {
            // In another run than the recorded one, this place may be that of another operation.
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
            // Four seconds of waiting for loop devices: not in each of these.
            Fault::ForEver { .. } if call.number == libc::SYS_clock_nanosleep => {
                return Action::Answer(0, Vec::new());
            }
            _ => return Action::Proceed,
        };
        *injected += 1;
        action
    }
}

/// FUTEX_WAKE has no error to return, and the C library does not look for one: a call that was not made
/// leaves its waiter asleep for good, whatever the helper does.
fn is_wake(call: &Call) -> bool {
    let operation = (call.arguments[1] as i32) & libc::FUTEX_CMD_MASK;
    call.number == libc::SYS_futex && operation == libc::FUTEX_WAKE
}
