//! The text of `-o`: what is understood is understood in the same way once it is printed.
#![no_main]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use libfuzzer_sys::fuzz_target;
use sealmount::{MountOptions, OptionsError, Sloppy};

fuzz_target!(|text: &[u8]| {
    let text = OsStr::from_bytes(text);
    let strict = MountOptions::parse(text);
    match MountOptions::parse_sloppy(text) {
        Ok(Sloppy { options, unknown }) => {
            let printed = options.to_text();
            assert_eq!(MountOptions::parse(&printed).as_ref(), Ok(&options), "{printed:?}");
            let _ = (options.effective_verity(), options.is_read_only());
            match unknown.into_iter().next() {
                None => assert_eq!(strict, Ok(options)),
                Some(name) => assert_eq!(strict, Err(OptionsError::Unknown(name))),
            }
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            // What is not known is said before what is missing.
            let is_unknown = matches!(strict, Err(OptionsError::Unknown(_)));
            assert!(is_unknown || strict == Err(error), "{strict:?}");
        }
    }
});
