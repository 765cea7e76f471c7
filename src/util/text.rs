//! Text that stays on one line, with any quoted content.

use std::ffi::OsStr;
use std::fmt::{self, Write};

/// Quotes a path, an option or a message of the kernel: control characters, line separators and
/// characters that reverse the direction of text are escaped.
pub(crate) fn shown<T: AsRef<OsStr> + ?Sized>(text: &T) -> Shown<'_> {
    Shown(text.as_ref())
}

/// The result of [`shown`].
pub(crate) struct Shown<'a>(&'a OsStr);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.to_string_lossy().chars() {
            match character {
                control if control.is_control() => write!(f, "\\x{:02x}", u32::from(control))?,
                '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                    write!(f, "\\u{{{:x}}}", u32::from(character))?;
                }
                plain => f.write_char(plain)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        let text = shown("a\nb\x1b[31m\u{9b}\u{202e}é\\").to_string();
        assert_eq!(text, "a\\x0ab\\x1b[31m\\x9b\\u{202e}é\\");
    }

    proptest! {
        #[test]
        fn any_bytes_stay_on_one_line(bytes: Vec<u8>) {
            let text = shown(&OsString::from_vec(bytes)).to_string();
            prop_assert!(!text.chars().any(char::is_control));
        }
    }
}
