//! Copies a Zstandard file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| sealmount_fuzz::copy_beginning_with(&[0x28, 0xb5, 0x2f, 0xfd], bytes));
