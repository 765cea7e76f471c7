//! The code that the targets share: an image file of the fuzzer's bytes, and copies of the image.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};
use sealmount::{
    Algorithm, Digest, Error, ErrorKind, Location, MemoryKind, MountOptions, SizeLimit, Verity,
};

/// The maximum size of a copy. The limit avoids the time to allocate memory for a large size in a
/// header. The limit is two spans of the Merkle tree with SHA-256, and four with SHA-512.
pub const LIMIT: SizeLimit = SizeLimit::Bytes(1 << 20);

/// Returns an open file of these bytes. All executions share the file, because making a file needs more
/// time than most executions. The targets pass the file by descriptor, as a caller of the library may.
pub fn image(bytes: &[u8]) -> Location {
    thread_local! {
        static FILE: RefCell<Option<(File, Location)>> = const { RefCell::new(None) };
    }
    FILE.with_borrow_mut(|file| {
        let (file, location) = file.get_or_insert_with(|| {
            let file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
            (file.try_clone().unwrap(), Location::from(file))
        });
        file.write_all_at(bytes, 0).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        location.clone()
    })
}

/// Returns options for a copy. With these options, only the image can cause an error.
pub fn copy_options() -> MountOptions {
    let mut options = MountOptions::new("/");
    options.copy = Some(MemoryKind::Memfd);
    options.size = Some(LIMIT);
    options.overlay.verity = Some(Verity::Off);
    options
}

/// Copies a compressed image with and without a digest. The copy with the right digest must equal the
/// copy without a digest. With another digest, sealmount must reject the image.
///
/// The function adds the magic number to bytes of another format, so that every execution reaches the
/// decoder. A skippable frame of zstd needs no magic number.
pub fn copy_beginning_with(magic: &[u8], bytes: &[u8]) {
    let is_skippable = matches!(bytes, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]);
    let image = match bytes.starts_with(magic) || is_skippable && magic.starts_with(&[0x28]) {
        true => image(bytes),
        false => image(&[magic, bytes].concat()),
    };
    let mut options = copy_options();
    let Ok(content) = sealmount::fuzzing::prepare(&options, &image) else { return };
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        options.digest = Some(Digest::of_bytes(algorithm, &content));
        assert_eq!(sealmount::fuzzing::prepare(&options, &image).unwrap(), content);
    }
    options.digest = Some(Digest::Sha256([0; 32]));
    let result = sealmount::fuzzing::prepare(&options, &image);
    let kind = result.as_ref().map_err(Error::kind).err();
    assert_eq!(kind, Some(ErrorKind::DigestMismatch), "{result:?}");
}
