//! Runs every stage before the first mount. The input is the text of the options, a NUL byte, and the
//! image.
#![no_main]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use libfuzzer_sys::fuzz_target;
use sealmount::{Location, MemoryKind, MountOptions, SizeLimit, Sloppy};

/// Replaces a path of the fuzzer, because the target runs as root. The new path is missing, a file, or
/// a directory.
fn tame(location: &mut Location) {
    let name = location.to_string();
    let tame = match name.bytes().fold(0, u8::wrapping_add) % 4 {
        0 => "/nonexistent",
        1 => "/proc/self/ns/user",
        _ => "/",
    };
    *location = tame.into();
}

fuzz_target!(|input: &[u8]| {
    let end = input.iter().position(|byte| *byte == 0).unwrap_or(input.len());
    let (text, rest) = input.split_at(end);
    let parsed = MountOptions::parse_sloppy(OsStr::from_bytes(text));
    let Ok(Sloppy { mut options, .. }) = parsed else { return };
    let overlay = &mut options.overlay;
    let upper =
        overlay.upper.iter_mut().flat_map(|upper| [&mut upper.upperdir, &mut upper.workdir]);
    overlay.objects.iter_mut().chain(&mut options.idmap).chain(upper).for_each(tame);
    if options.copy.is_some() {
        // A copy in a ramfs would need a mount.
        options.copy = Some(MemoryKind::Memfd);
        options.size = match options.size {
            // The size 0 means no limit.
            Some(SizeLimit::Bytes(1..0x10_0000)) => options.size,
            _ => Some(sealmount_fuzz::LIMIT),
        };
    }
    let image = sealmount_fuzz::image(rest.get(1..).unwrap_or_default());
    match sealmount::fuzzing::prepare(&options, &image) {
        Ok(content) => assert!(content.len() % 4096 == 0),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            let _ = (error.kind(), error.hint(), error.raw_os_error());
        }
    }
});
