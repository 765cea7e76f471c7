//! What the fuzz targets in fuzz/ see of the inside. Not part of the library: only cargo-fuzz sets
//! `cfg(fuzzing)`.

use crate::digest::compute_digest;
use crate::error::Error;
use crate::image::{Header, ImageError, read_at};
use crate::location::Location;
use crate::options::MountOptions;

/// What [`Header::parse`] makes of the first bytes of an image: its size.
pub fn parse_header(start: &[u8]) -> Result<u64, ImageError> {
    Header::parse(start).map(|header| header.size())
}

/// Does all that [`MountOptions::mount`] does before it asks the kernel for a mount, but for a procfs
/// of its own, which is one. Returns the bytes that would be mounted.
pub fn prepare(options: &MountOptions, image: &Location) -> Result<Vec<u8>, Error> {
    let prepared = options.prepare(image, None, &mut |_| {})?;
    let mut content = vec![0; prepared.header.size() as usize];
    let length = read_at(prepared.source.file(), &mut content, 0).unwrap();
    assert_eq!(length, content.len(), "the header gives a size that is not that of the image");
    if let Some(digest) = options.digest {
        assert_eq!(compute_digest(digest.algorithm(), &content), digest);
    }
    Ok(content)
}
