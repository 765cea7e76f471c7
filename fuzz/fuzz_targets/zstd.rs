//! A file that begins as a Zstandard one does, through the copy.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(|bytes: &[u8]| -> Corpus {
    if !matches!(bytes, [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]) {
        return Corpus::Reject;
    }
    sealmount_fuzz::copy(bytes);
    Corpus::Keep
});
