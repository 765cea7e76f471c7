//! What the targets share: an image file made of the fuzzer's bytes, and its way into memory.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};
use sealmount::{
    Algorithm, Digest, Error, Location, Memory, MountOptions, SizeLimit, Verity, compute_digest,
};

/// The most memory that a copy may take, so that a header with a large size does not cost the time
/// to reserve it. Two spans of the Merkle tree with SHA-256, four with SHA-512.
pub const LIMIT: SizeLimit = SizeLimit::Bytes(1 << 20);

/// An open file of these bytes: one for all executions, because making one takes longer than most
/// of what is done with it. It is given as a descriptor, as a caller of the library may do.
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

/// Options that copy, and for which everything but the image is in order.
pub fn copy_options() -> MountOptions {
    let mut options = MountOptions::new("/");
    options.copy = Some(Memory::Memfd);
    options.size = Some(LIMIT);
    options.verity = Some(Verity::Off);
    options
}

/// Copies a compressed image with and without a digest. What is copied without one must be what is
/// copied with its own digest, and refused with another.
///
/// What does not begin as such a file gets its first bytes, so that no execution is for nothing. A
/// skippable frame of zstd may come first as it is.
pub fn copy_beginning_with(magic: &[u8], bytes: &[u8]) {
    let is_skippable = matches!(bytes, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]);
    let image = match bytes.starts_with(magic) || is_skippable && magic.starts_with(&[0x28]) {
        true => image(bytes),
        false => image(&[magic, bytes].concat()),
    };
    let mut options = copy_options();
    let Ok(content) = sealmount::fuzzing::prepare(&options, &image) else { return };
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        options.digest = Some(compute_digest(algorithm, &content));
        assert_eq!(sealmount::fuzzing::prepare(&options, &image).unwrap(), content);
    }
    options.digest = Some(Digest::Sha256([0; 32]));
    let result = sealmount::fuzzing::prepare(&options, &image);
    assert!(matches!(result, Err(Error::DigestMismatch { .. })), "{result:?}");
}
