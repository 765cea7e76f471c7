//! Runs a program under ptrace(2). A callback decides about each system call of the program.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::{self, c_long};
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::registers::Registers;

/// A system call before the kernel executes the call.
pub struct Call {
    thread: Pid,
    pub number: c_long,
    pub arguments: [u64; 6],
    /// The number of earlier calls of the same number, in all threads.
    pub nth: usize,
}

impl Call {
    /// Returns the string that an argument points to.
    pub fn text(&self, argument: usize) -> Option<String> {
        let mut bytes = [0; 256];
        let memory = File::open(format!("/proc/{}/mem", self.thread)).ok()?;
        let length = memory.read_at(&mut bytes, self.arguments[argument]).ok()?;
        let text = bytes[..length].split(|byte| *byte == 0).next()?;
        String::from_utf8(text.to_vec()).ok()
    }

    /// Returns the number that an argument points to.
    pub fn number_at(&self, argument: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        let memory = File::open(format!("/proc/{}/mem", self.thread)).ok()?;
        memory.read_exact_at(&mut bytes, self.arguments[argument]).ok()?;
        Some(u64::from_ne_bytes(bytes))
    }

    /// Returns the path of the file that an argument refers to by descriptor.
    pub fn file(&self, argument: usize) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/fd/{}", self.thread, self.arguments[argument])).ok()
    }
}

/// The action of the tracer on a system call.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// The kernel executes the call.
    Proceed,
    /// The call is not executed and fails with this errno.
    Fail(Errno),
    /// The call is not executed and returns 0. The tracer writes these bytes where the argument of this
    /// number points to. If the process has no memory there, the call fails with EFAULT.
    Answer(usize, Vec<u8>),
    /// The kernel executes the call after the tracer has written these bytes where the argument of this
    /// number points to.
    Rewrite(usize, Vec<u8>),
    /// The kernel executes the call with at most this value as the third argument, the length.
    Shorten(u64),
    /// The process gets the signal before the call.
    Signal(Signal),
}

/// The action on a call, and whether the tracer stops tracing after the call.
pub struct Decision {
    pub action: Action,
    pub is_last: bool,
}

impl From<Action> for Decision {
    fn from(action: Action) -> Decision {
        Decision { action, is_last: false }
    }
}

/// The end of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Exited(i32),
    Killed(Signal),
    /// The program was still running at the time limit.
    Hung,
}

/// The task of the tracer when a thread returns from the kernel.
enum AtExit {
    Nothing,
    Return(i64),
    Restore { argument: usize, value: u64 },
}

/// Runs a program until the program and all its threads and children have ended. Returns the output on
/// standard error.
///
/// A process that requests tracing of itself from its start needs `unsafe`. So the command must first
/// stop itself with SIGSTOP, and must execute the program after SIGCONT.
#[allow(clippy::zombie_processes)] // The tracer waits for the child and its threads.
pub fn run(
    mut command: Command,
    time_limit: Duration,
    decide: &mut dyn FnMut(&Call) -> Decision,
) -> (End, String) {
    let stderr = rustix::fs::memfd_create("stderr", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut stderr = File::from(stderr);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr.try_clone().unwrap());
    // With cargo's LD_LIBRARY_PATH, the loader would look in a hundred directories.
    let child = command.env_clear().spawn().unwrap();
    let leader = Pid::from_raw(child.id() as i32);
    waitpid(leader, Some(WaitPidFlag::WUNTRACED)).unwrap();
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(leader, options).unwrap();
    kill(leader, Signal::SIGCONT).unwrap();

    let (finished, is_finished) = mpsc::channel::<()>();
    let hung = AtomicBool::new(false);
    let end = std::thread::scope(|scope| {
        let process = rustix::process::Pid::from_child(&child);
        let process =
            rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()).unwrap();
        let hung = &hung;
        scope.spawn(move || {
            if is_finished.recv_timeout(time_limit) == Err(RecvTimeoutError::Timeout) {
                hung.store(true, Ordering::Relaxed);
                let _ = rustix::process::pidfd_send_signal(&process, rustix::process::Signal::KILL);
            }
        });
        let end = Tracer::new(leader).follow(decide);
        drop(finished);
        end
    });
    let mut text = Vec::new();
    stderr.rewind().unwrap();
    stderr.read_to_end(&mut text).unwrap();
    let end = if hung.into_inner() { End::Hung } else { end };
    (end, String::from_utf8_lossy(&text).into_owned())
}

struct Tracer {
    leader: Pid,
    /// The threads, each with its task if the thread is in the kernel.
    threads: HashMap<Pid, Option<AtExit>>,
    /// Whether the tracer sees calls: from the execution of the program until the last decision.
    is_tracing: bool,
    counts: HashMap<c_long, usize>,
}

impl Tracer {
    fn new(leader: Pid) -> Tracer {
        let threads = HashMap::from([(leader, None)]);
        Tracer { leader, threads, is_tracing: false, counts: HashMap::new() }
    }

    fn follow(mut self, decide: &mut dyn FnMut(&Call) -> Decision) -> End {
        let mut end = End::Hung;
        // Other tests, in other threads of this process, have their own children.
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        while !self.threads.is_empty() {
            let status = match waitpid(None, Some(flags)) {
                // A new thread can end before the stop of its maker reports the thread. Then no thread
                // is left.
                Err(Errno::ECHILD) => break,
                status => status.unwrap(),
            };
            let (thread, signal) = match status {
                WaitStatus::Exited(thread, status) => {
                    self.threads.remove(&thread);
                    if thread == self.leader {
                        end = End::Exited(status);
                    }
                    continue;
                }
                WaitStatus::Signaled(thread, signal, _) => {
                    self.threads.remove(&thread);
                    if thread == self.leader {
                        end = End::Killed(signal);
                    }
                    continue;
                }
                WaitStatus::PtraceSyscall(thread) => {
                    // ESRCH: a signal has killed the thread meanwhile.
                    let _ = self.at_call(thread, decide);
                    (thread, None)
                }
                WaitStatus::PtraceEvent(thread, _, event) => {
                    self.threads.entry(thread).or_insert(None);
                    self.at_event(thread, event);
                    (thread, None)
                }
                WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
                status => panic!("{status:?}"),
            };
            // The tracer stops tracing a thread only after the thread has returned from the kernel.
            let is_inside = self.threads.get(&thread).is_some_and(Option::is_some);
            let _ = match self.is_tracing || is_inside {
                true => ptrace::syscall(thread, signal),
                false => ptrace::cont(thread, signal),
            };
        }
        end
    }

    fn at_event(&mut self, thread: Pid, event: i32) {
        if event == Event::PTRACE_EVENT_EXEC as i32 {
            self.is_tracing = true;
            // The next stop of the thread is the return from execve(2).
            self.threads.insert(thread, Some(AtExit::Nothing));
        } else if event != Event::PTRACE_EVENT_STOP as i32
            && let Ok(new) = ptrace::getevent(thread)
        {
            #[allow(clippy::unnecessary_cast, reason = "the type depends on the architecture")]
            self.threads.entry(Pid::from_raw(new as i32)).or_insert(None);
        }
    }

    fn at_call(
        &mut self,
        thread: Pid,
        decide: &mut dyn FnMut(&Call) -> Decision,
    ) -> nix::Result<()> {
        let mut registers = Registers::read(thread)?;
        let state = self.threads.entry(thread).or_insert(None);
        match state.take() {
            None => {
                let count = self.counts.entry(registers.number()).or_default();
                let call = Call {
                    thread,
                    number: registers.number(),
                    arguments: registers.arguments(),
                    nth: *count,
                };
                *count += 1;
                let Decision { action, is_last } = decide(&call);
                self.is_tracing = !is_last;
                *state = Some(AtExit::Nothing);
                *state = Some(enter(&call, &mut registers, action, self.leader)?);
            }
            Some(AtExit::Nothing) => {}
            Some(AtExit::Return(value)) => registers.set_result(value)?,
            Some(AtExit::Restore { argument, value }) => {
                registers.restore_argument(argument, value)?;
            }
        }
        Ok(())
    }
}

fn enter(
    call: &Call,
    registers: &mut Registers,
    action: Action,
    process: Pid,
) -> nix::Result<AtExit> {
    let mut change_argument = |argument: usize, value| {
        registers.set_argument(argument, value)?;
        Ok(AtExit::Restore { argument, value: call.arguments[argument] })
    };
    match action {
        Action::Proceed => Ok(AtExit::Nothing),
        // brk(2) has no errors. With the address 0, the call changes nothing and returns the current
        // break.
        Action::Fail(_) if call.number == libc::SYS_brk => change_argument(0, 0),
        Action::Fail(errno) => {
            registers.skip()?;
            Ok(AtExit::Return(-(errno as i64)))
        }
        Action::Rewrite(argument, bytes) => {
            write(call, argument, &bytes)?;
            Ok(AtExit::Nothing)
        }
        Action::Answer(argument, bytes) => {
            registers.skip()?;
            match write(call, argument, &bytes) {
                Ok(()) => Ok(AtExit::Return(0)),
                // The kernel fails with the same errno. rustix calls statx(2) with a null pointer to
                // find out whether the kernel has the call.
                Err(Errno::EFAULT) => Ok(AtExit::Return(-(Errno::EFAULT as i64))),
                Err(errno) => Err(errno),
            }
        }
        Action::Shorten(length) => change_argument(2, length.min(call.arguments[2])),
        Action::Signal(signal) => {
            kill(process, signal)?;
            Ok(AtExit::Nothing)
        }
    }
}

/// Writes bytes where an argument points to. Fails with EFAULT if the thread has no memory there.
fn write(call: &Call, argument: usize, bytes: &[u8]) -> nix::Result<()> {
    let memory = format!("/proc/{}/mem", call.thread);
    let memory = File::options().write(true).open(memory).map_err(|_| Errno::ESRCH)?;
    memory.write_all_at(bytes, call.arguments[argument]).map_err(|_| Errno::EFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(program: &[&str], decide: &mut dyn FnMut(&Call) -> Action) -> (End, String) {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", r#"kill -STOP $$; exec "$@""#, "sh"]).args(program);
        run(command, Duration::from_secs(60), &mut |call| decide(call).into())
    }

    fn opens(call: &Call, path: &str) -> bool {
        call.number == libc::SYS_openat && call.text(1).as_deref() == Some(path)
    }

    #[test]
    fn failed_call_returns_errno() {
        let path = "/proc/self/comm";
        let (end, text) = trace(&["cat", path], &mut |call| match opens(call, path) {
            true => Action::Fail(Errno::ELOOP),
            false => Action::Proceed,
        });
        assert_eq!(end, End::Exited(1), "{text}");
        assert!(text.contains("Too many levels of symbolic links"), "{text}");
    }

    /// The second `true` keeps the shell from executing uname(1) in its own process.
    #[test]
    fn answered_call_of_child_returns_bytes() {
        let mut name = [0; 6 * 65];
        name[4 * 65..][..8].copy_from_slice(b"answered");
        let program = ["sh", "-c", "uname -m >&2; true"];
        let (end, text) = trace(&program, &mut |call| match call.number {
            libc::SYS_uname => Action::Answer(0, name.to_vec()),
            _ => Action::Proceed,
        });
        assert_eq!((end, text.as_str()), (End::Exited(0), "answered\n"));
    }

    /// The first argument of openat(2) is a descriptor, not a pointer.
    #[test]
    fn answer_without_memory_fails_with_efault() {
        let path = "/proc/self/comm";
        let (end, text) = trace(&["cat", path], &mut |call| match opens(call, path) {
            true => Action::Answer(0, vec![0]),
            false => Action::Proceed,
        });
        assert_eq!(end, End::Exited(1), "{text}");
        assert!(text.contains("Bad address"), "{text}");
    }

    #[test]
    fn rewritten_path_is_opened() {
        let path = "/proc/self/absent";
        let program = ["sh", "-c", &format!("exec cat {path} >&2")];
        let (end, text) = trace(&program, &mut |call| match opens(call, path) {
            true => Action::Rewrite(1, b"/proc/self/comm\0".to_vec()),
            false => Action::Proceed,
        });
        assert_eq!((end, text.as_str()), (End::Exited(0), "cat\n"));
    }

    #[test]
    fn shortened_read_transfers_less() {
        let program = ["dd", "if=/dev/zero", "of=/dev/null", "bs=1000", "count=3"];
        let mut reads = 0;
        let (end, text) = trace(&program, &mut |call| {
            let is_data = call.number == libc::SYS_read && call.arguments[2] == 1000;
            reads += usize::from(is_data);
            match is_data && reads == 2 {
                true => Action::Shorten(7),
                false => Action::Proceed,
            }
        });
        assert_eq!(end, End::Exited(0), "{text}");
        assert!(text.contains("2+1 records in") && text.contains("2007 bytes"), "{text}");
    }

    #[test]
    fn failed_brk_leaves_the_break() {
        let mut attempts = 0;
        let (end, text) = trace(&["sort", "/proc/self/comm"], &mut |call| match call.number {
            libc::SYS_brk => {
                attempts += 1;
                Action::Fail(Errno::ENOMEM)
            }
            _ => Action::Proceed,
        });
        assert_eq!((end, text.as_str()), (End::Exited(0), ""));
        assert!(attempts > 1, "{attempts} attempts");
    }

    #[test]
    fn signal_ends_program_before_call() {
        let path = "/proc/self/comm";
        let (end, text) = trace(&["cat", path], &mut |call| match opens(call, path) {
            true => Action::Signal(Signal::SIGKILL),
            false => Action::Proceed,
        });
        assert_eq!((end, text.as_str()), (End::Killed(Signal::SIGKILL), ""));
    }

    #[test]
    fn last_decision_ends_tracing() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "kill -STOP $$; exec cat /proc/self/comm >&2"]);
        let mut calls = 0;
        let (end, text) = run(command, Duration::from_secs(60), &mut |_| {
            calls += 1;
            Decision { action: Action::Proceed, is_last: true }
        });
        assert_eq!((end, text.as_str(), calls), (End::Exited(0), "cat\n", 1));
    }

    #[test]
    fn program_is_killed_at_time_limit() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "kill -STOP $$; exec sleep 60"]);
        let (end, _) = run(command, Duration::from_millis(200), &mut |_| Action::Proceed.into());
        assert_eq!(end, End::Hung);
    }
}
