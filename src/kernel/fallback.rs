//! Methods that this kernel does not support.

use crate::kernel::KernelError;

/// A method that was tried and that this kernel does not support. The next method was tried then.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Unsupported<Method> {
    /// The method.
    pub method: Method,
    /// The kernel's error, whose errno means "not supported by this kernel".
    pub error: KernelError,
}

impl<Method> Unsupported<Method> {
    pub(crate) fn new(method: Method, error: KernelError) -> Unsupported<Method> {
        Unsupported { method, error }
    }
}
