//! Parses the text of `-o`. The printed options must parse to the same options.
#![no_main]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use libfuzzer_sys::fuzz_target;
use sealmount::{MountOptions, OptionsError, Sloppy};

fuzz_target!(|text: &[u8]| {
    let text = OsStr::from_bytes(text);
    let strict = MountOptions::parse(text);
    match MountOptions::parse_sloppy(text) {
        Ok(Sloppy { options, unknown, .. }) => {
            let printed = options.to_text();
            assert_eq!(MountOptions::parse(&printed).as_ref(), Ok(&options), "{printed:?}");
            let _ = (options.effective_verity(), options.overlay.is_read_only());
            match unknown.into_iter().next() {
                None => assert_eq!(strict, Ok(options)),
                Some(name) => assert_eq!(strict, Err(OptionsError::Unknown(name))),
            }
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            // sealmount reports an unknown option before a missing option.
            let is_unknown = matches!(strict, Err(OptionsError::Unknown(_)));
            assert!(is_unknown || strict == Err(error), "{strict:?}");
        }
    }
});
