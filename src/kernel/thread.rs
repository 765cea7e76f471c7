//! A thread for one piece of work, with the error of a system call.

use crate::kernel::error::{KernelError, Operation};
use crate::util::threads::run_in_thread;

/// Runs `work` in a new thread: for state that other threads must not share.
pub(crate) fn in_new_thread<T: Send>(
    work: impl FnOnce() -> Result<T, KernelError> + Send,
) -> Result<T, KernelError> {
    run_in_thread(work).map_err(|errno| KernelError::new(Operation::StartThread, errno))?
}
