//! Threads for what must not show in others: a working directory, a mount namespace.

use rustix::io::Errno;

use crate::error::{KernelError, Operation};

/// Several times what is needed. The default is what the variable RUST_MIN_STACK says, and a caller's
/// environment is not to decide whether a mount succeeds.
const STACK_SIZE: usize = 256 * 1024;

/// Runs `work` in a thread of its own, which shares all descriptors with the caller's.
pub(crate) fn in_thread<T: Send>(
    work: impl FnOnce() -> Result<T, KernelError> + Send,
) -> Result<T, KernelError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .stack_size(STACK_SIZE)
            .spawn_scoped(scope, work)
            .map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
            KernelError::new(Operation::StartThread, errno)
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
