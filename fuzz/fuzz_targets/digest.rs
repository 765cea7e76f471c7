//! Parses a digest. The printed digest must have the same digits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealmount::Digest;

fuzz_target!(|text: &str| {
    match text.parse::<Digest>() {
        Ok(digest) => {
            let digits = text.rsplit(':').next().unwrap();
            assert_eq!(digest.to_string(), digits.to_ascii_lowercase());
            assert_eq!(digest.as_bytes().len() * 2, digits.len());
            assert_eq!(format!("{digest:?}").parse(), Ok(digest));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
