//! Parses the first bytes of an image. The first 2048 bytes must give the same result as all bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealmount::fuzzing::parse_header;

fuzz_target!(|start: &[u8]| {
    let result = parse_header(start);
    assert_eq!(parse_header(&start[..start.len().min(2048)]), result);
    match result {
        Ok(size) => {
            let blocks = u32::from_le_bytes(start[1060..1064].try_into().unwrap());
            assert_eq!(size, u64::from(blocks) * 4096);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
