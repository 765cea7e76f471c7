//! A thread for what must not show in others: a working directory, a mount namespace.

use rustix::io::Errno;

use crate::allocation::{STACK_SIZE, room_for_threads};
use crate::error::{KernelError, Operation};

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
