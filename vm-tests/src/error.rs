//! The error type, and a trait that adds the failed operation to an error.

/// What went wrong, in words: nothing here is handled by kind, only shown.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Says what was being done when something went wrong.
pub trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: std::fmt::Display> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| format!("{}: {error}", what()).into())
    }
}
