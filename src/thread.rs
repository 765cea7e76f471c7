//! Threads: one for what must not show in others (a working directory, a mount namespace), and several
//! that share work.

use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;
use rustix::thread::{sched_getaffinity, sched_setaffinity};
use sealmount_sys::current_processor;

use crate::allocation::{STACK_SIZE, room_for_threads};
use crate::error::{Error, KernelError, Operation};

/// Runs `work` in a thread of its own, which shares all descriptors with the caller's.
///
/// The size of its stack is not what the variable RUST_MIN_STACK says: a caller's environment is not to
/// decide whether a mount succeeds.
pub(crate) fn in_thread<T: Send>(
    work: impl FnOnce() -> Result<T, KernelError> + Send,
) -> Result<T, KernelError> {
    let failed = |errno| KernelError::new(Operation::StartThread, errno);
    if room_for_threads(1).map_err(failed)? == 0 {
        return Err(failed(Errno::NOMEM));
    }
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new()
                .stack_size(STACK_SIZE)
                .spawn_scoped(scope, work)
                .map_err(|error| failed(Errno::from_io_error(&error).unwrap_or(Errno::AGAIN)))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// How often to yield to a thread that has not started yet. Seldom more than a few times, unless the
/// machine is busy.
const YIELDS_MAX: usize = 1000;

/// Does what each of `helpers` does in a thread, and `own_work` in this one. Where no thread can be
/// had, the others do the work.
pub(crate) fn in_threads<Work>(
    helpers: impl Iterator<Item = Work>,
    own_work: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error>
where
    Work: FnOnce() -> Result<(), Error> + Send,
{
    let this = std::thread::current();
    let started = AtomicUsize::new(0);
    let processor = current_processor();
    std::thread::scope(|scope| {
        let (this, started) = (&this, &started);
        let helpers: Vec<_> = helpers
            .map_while(|work| {
                let thread = std::thread::Builder::new().stack_size(STACK_SIZE);
                let work = move || {
                    leave(processor);
                    started.fetch_add(1, Ordering::Release);
                    this.unpark();
                    work()
                };
                thread.spawn_scoped(scope, work).ok()
            })
            .collect();
        // Until each has the memory that it takes to start: `own_work` may take what is left. Asleep only
        // where yielding is of no use, as a real-time thread: who is woken may find itself on the
        // processor of the one that woke it, see `leave`.
        let mut yields = 0;
        while started.load(Ordering::Acquire) < helpers.len() {
            if yields < YIELDS_MAX {
                std::thread::yield_now();
                yields += 1;
            } else {
                std::thread::park();
            }
        }
        let mut result = own_work();
        for helper in helpers {
            let other = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(other);
        }
        result
    })
}

/// Moves this thread to another processor than this one, if that is where it is.
///
/// Linux may put a new thread on the processor of the one that made it, and leave another idle for
/// some milliseconds until it looks for what waits: as long as a small image takes (docs/design.md).
fn leave(processor: Option<usize>) {
    let (Some(processor), Ok(allowed)) = (processor, sched_getaffinity(None)) else { return };
    let mut others = allowed;
    others.unset(processor);
    // EINVAL: there is no other. And back, so that the kernel may move it later.
    if sched_setaffinity(None, &others).is_ok() {
        let _ = sched_setaffinity(None, &allowed);
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::CpuSet;

    use super::*;

    /// Where each of so many helpers may run while it works, and how often `own_work` was done.
    fn processors_of_helpers(helpers: usize) -> (Vec<CpuSet>, usize) {
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut own = 0;
        let helper = || {
            sender.send(sched_getaffinity(None).unwrap()).unwrap();
            Ok(())
        };
        in_threads(std::iter::repeat_n(&helper, helpers), || {
            own += 1;
            Ok(())
        })
        .unwrap();
        (receiver.try_iter().collect(), own)
    }

    #[test]
    fn helpers_may_run_wherever_this_thread_may() {
        let allowed = sched_getaffinity(None).unwrap();
        assert_eq!(processors_of_helpers(3), (vec![allowed; 3], 1));
    }

    #[test]
    fn one_processor_is_enough() {
        // Of this thread alone, which the test harness made for this test.
        let mut one = CpuSet::new();
        one.set(current_processor().unwrap());
        sched_setaffinity(None, &one).unwrap();
        assert_eq!(processors_of_helpers(3), (vec![one; 3], 1));
    }
}
