//! A file that begins as a gzip one does, through the copy.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(|bytes: &[u8]| -> Corpus {
    if !matches!(bytes, [0x1f, 0x8b, ..]) {
        return Corpus::Reject;
    }
    sealmount_fuzz::copy(bytes);
    Corpus::Keep
});
