//! Copies a gzip file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| sealmount_fuzz::copy_beginning_with(&[0x1f, 0x8b], bytes));
