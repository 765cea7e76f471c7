//! Threads: a thread with state that other threads must not see (a working directory, a mount namespace), and
//! threads that share work.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::io::Errno;
use rustix::thread::{sched_getaffinity, sched_setaffinity};
use sealmount_sys::current_cpu;

use crate::util::memory::{STACK_SIZE, threads_that_fit};

/// The highest number of threads that share work. Writes to one file take turns, so more threads would only
/// wait.
const THREADS_MAX: usize = 8;

/// Returns the number of threads that are useful on this machine
/// ([sched_getaffinity(2)](https://man7.org/linux/man-pages/man2/sched_getaffinity.2.html)).
///
/// The standard library would also look for limits of a cgroup, by paths below /proc and /sys. In a
/// foreign mount namespace a FIFO may be there.
pub(crate) fn useful_threads() -> usize {
    let cpus = sched_getaffinity(None).map_or(1, |set| set.count() as usize);
    cpus.clamp(1, THREADS_MAX)
}

/// Runs `work` in a new thread, which shares all descriptors with the calling thread. Fails if the
/// thread cannot be started.
///
/// The stack size is fixed: the variable RUST_MIN_STACK in a caller's environment must not decide
/// whether a mount succeeds.
pub(crate) fn run_in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, Errno> {
    if threads_that_fit(1)? == 0 {
        return Err(Errno::NOMEM);
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .stack_size(STACK_SIZE)
            .spawn_scoped(scope, work)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// The highest number of yields to a thread that has not started yet. On an idle machine, a few yields are
/// enough.
const YIELDS_MAX: usize = 1000;

/// Runs each of `helpers` in a new thread and `own_work` in the calling thread. If a thread cannot be
/// started, the running ones take over its share.
pub(crate) fn run_parallel<Work, E: Send>(
    helpers: impl Iterator<Item = Work>,
    own_work: impl FnOnce() -> Result<(), E>,
) -> Result<(), E>
where
    Work: FnOnce() -> Result<(), E> + Send,
{
    let this = std::thread::current();
    let started = AtomicUsize::new(0);
    let cpu = current_cpu();
    std::thread::scope(|scope| {
        let (this, started) = (&this, &started);
        let helpers: Vec<_> = helpers
            .map_while(|work| {
                let thread = std::thread::Builder::new().stack_size(STACK_SIZE);
                let work = move || {
                    leave_cpu(cpu);
                    started.fetch_add(1, Ordering::Release);
                    this.unpark();
                    work()
                };
                thread.spawn_scoped(scope, work).ok()
            })
            .collect();
        // Waits until each helper has the memory that it needs to start, because `own_work` may use the rest.
        // A woken thread may run on the CPU of the thread that woke it, see `leave_cpu`. So the wait yields,
        // and sleeps only if yielding has no effect, as in a real-time thread.
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

/// Tells threads to stop.
#[derive(Default)]
pub(crate) struct Stop(AtomicBool);

impl Stop {
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Returns a guard that stops the threads when it is dropped, unless its own thread finished.
    pub fn unless_finished(&self) -> StopGuard<'_> {
        StopGuard(self)
    }
}

/// Stops the threads on an error, and when its thread unwinds.
pub(crate) struct StopGuard<'a>(&'a Stop);

impl StopGuard<'_> {
    pub fn finished(self) {
        std::mem::forget(self);
    }
}

impl Drop for StopGuard<'_> {
    fn drop(&mut self) {
        self.0.set();
    }
}

/// Moves the calling thread to another CPU if it runs on this one.
///
/// Linux may put a new thread on the CPU of its parent. Another CPU then stays idle until the scheduler looks
/// for waiting threads some milliseconds later. A small image is copied in less time (docs/design.md).
fn leave_cpu(cpu: Option<usize>) {
    let (Some(cpu), Ok(allowed)) = (cpu, sched_getaffinity(None)) else { return };
    let mut others = allowed;
    others.unset(cpu);
    // EINVAL: there is no other CPU. The affinity is restored so that the kernel may move the thread.
    if sched_setaffinity(None, &others).is_ok() {
        let _ = sched_setaffinity(None, &allowed);
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::CpuSet;

    use super::*;

    /// Returns the CPUs that each helper may run on, and the number of runs of `own_work`.
    fn cpus_of_helpers(helpers: usize) -> (Vec<CpuSet>, usize) {
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut own = 0;
        let helper = || {
            sender.send(sched_getaffinity(None).unwrap()).unwrap();
            Ok::<_, Errno>(())
        };
        run_parallel(std::iter::repeat_n(&helper, helpers), || {
            own += 1;
            Ok(())
        })
        .unwrap();
        (receiver.try_iter().collect(), own)
    }

    #[test]
    fn helper_threads_keep_affinity_of_caller() {
        let allowed = sched_getaffinity(None).unwrap();
        assert_eq!(cpus_of_helpers(3), (vec![allowed; 3], 1));
    }

    #[test]
    fn helper_threads_on_single_cpu_finish() {
        // The test harness made this thread for this test alone.
        let mut one = CpuSet::new();
        one.set(current_cpu().unwrap());
        sched_setaffinity(None, &one).unwrap();
        assert_eq!(cpus_of_helpers(3), (vec![one; 3], 1));
    }
}
