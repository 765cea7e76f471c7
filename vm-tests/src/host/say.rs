//! Prints messages of the host while machines run.

use std::io::Write;

/// Prints a line in one write, so that the lines of two threads cannot mix.
pub fn say(text: &str) {
    let _ = std::io::stderr().write_all(format!("vm-tests: {text}\n").as_bytes());
}
