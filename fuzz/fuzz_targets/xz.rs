//! A file that begins as a xz one does, through the copy.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| sealmount_fuzz::copy_beginning_with(b"\xfd7zXZ\0", bytes));
