//! A file that begins as a xz one does, through the copy.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(|bytes: &[u8]| -> Corpus {
    if !matches!(bytes, [0xfd, b'7', b'z', b'X', b'Z', 0, ..]) {
        return Corpus::Reject;
    }
    sealmount_fuzz::copy(bytes);
    Corpus::Keep
});
