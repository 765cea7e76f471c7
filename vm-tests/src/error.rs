//! The error type, and a trait that adds the failed operation to an error.

/// The error type of this crate. The callers only print errors, so no error has a kind.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Adds the failed operation to an error.
pub trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: std::fmt::Display> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| format!("{}: {error}", what()).into())
    }
}
