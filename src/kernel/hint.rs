//! Instructions that accompany errors.

use std::fmt;

/// An instruction for a person who reads an error.
///
/// The text of a hint names types of the library. [`for_options`](Hint::for_options) returns the same
/// instruction with mount options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    library: &'static str,
    options: &'static str,
}

impl Hint {
    /// Makes a hint with one text for programs and for people at a shell.
    pub(crate) const fn new(text: &'static str) -> Hint {
        Hint { library: text, options: text }
    }

    /// Makes a hint that names types of the library, with another text that names mount options.
    pub(crate) const fn of_types_or_options(library: &'static str, options: &'static str) -> Hint {
        Hint { library, options }
    }

    /// Returns the instruction with mount options, as the mount helper prints it.
    pub const fn for_options(&self) -> &'static str {
        self.options
    }
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.library)
    }
}
