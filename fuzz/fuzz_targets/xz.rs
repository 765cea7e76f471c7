//! Copies an xz file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| sealmount_fuzz::copy_beginning_with(b"\xfd7zXZ\0", bytes));
