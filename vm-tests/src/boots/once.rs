//! A result that several tests share. The first test that needs the result computes it.

use crate::Error;
use std::sync::OnceLock;

pub struct Once<T>(OnceLock<Result<T, String>>);

impl<T> Default for Once<T> {
    fn default() -> Once<T> {
        Once(OnceLock::new())
    }
}

impl<T> Once<T> {
    /// Returns the result of the first call of `compute`. If another thread computes the result, waits for it.
    pub fn get(&self, compute: impl FnOnce() -> Result<T, Error>) -> Result<&T, Error> {
        let result = self.0.get_or_init(|| compute().map_err(|error| error.to_string()));
        result.as_ref().map_err(|error| error.as_str().into())
    }
}
