//! Internals for the fuzz targets in fuzz/. Not part of the library: only cargo-fuzz sets `cfg(fuzzing)`.

use std::ops::ControlFlow;

use crate::digest::Digest;
use crate::error::Error;
use crate::image::ImageProblem;
use crate::image::header::{Accept, Header};
use crate::location::Location;
use crate::mount::Events;
use crate::options::MountOptions;
use crate::util::io::read_at;

/// Returns the size of an image, in bytes, from its first bytes.
pub fn parse_header(start: &[u8]) -> Result<u64, ImageProblem> {
    let _ = Header::parse(start, Accept::AnyErofs).map(|header| header.size());
    Header::parse(start, Accept::Composefs).map(|header| header.size())
}

/// Runs the stages of a mount up to the first mount, without a private procfs, which is a mount. Returns
/// the bytes that would be mounted.
pub fn prepare(options: &MountOptions, image: &Location) -> Result<Vec<u8>, Error> {
    let mut ignored = |_| ControlFlow::Continue(());
    let (source, ..) = options.prepare(
        image.clone(),
        None,
        &mut Events { callback: &mut ignored, are_wanted: false },
    )?;
    let mut content = vec![0; source.report().size as usize];
    let length = read_at(&source, &mut content, 0).unwrap();
    assert_eq!(length, content.len(), "the header gives another size than the image has");
    if let Some(digest) = options.digest {
        assert_eq!(Digest::of_bytes(digest.algorithm(), &content), digest);
    }
    Ok(content)
}
