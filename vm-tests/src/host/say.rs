//! Messages of the host while machines run.

use std::io::Write;

/// Tells whoever runs the tests, in one write: other threads have things to say too.
pub fn say(text: &str) {
    let _ = std::io::stderr().write_all(format!("vm-tests: {text}\n").as_bytes());
}
