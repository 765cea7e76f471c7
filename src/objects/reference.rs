//! The reference of a file in an image to its object: two xattrs of overlayfs.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use sha2::{Digest as _, Sha256};

use crate::digest::{Algorithm, Digest};

/// A file of an image, and the object with its content.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageObject {
    /// The absolute path of the file in the image. Other files may refer to the same object.
    pub path: PathBuf,
    /// The path of the object, relative to an object directory.
    pub object: PathBuf,
    /// The size of the object, in bytes.
    pub size: u64,
    /// The fs-verity digest of the object. `None` means that the image does not hold the digest.
    pub digest: Option<Digest>,
}

/// The reference of a file to its object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reference {
    /// The number of the inode of the file.
    pub inode: u64,
    /// The path of the object, relative to an object directory, or `None` if overlayfs could not open the
    /// object of the reference.
    pub object: Option<PathBuf>,
    pub size: u64,
    pub digest: Option<Digest>,
}

/// The identity of an object and of the tests that the object needs. The key is a hash of full strength, so a
/// crafted image cannot hide an object behind the key of another object.
pub(crate) type ObjectKey = [u8; 32];

impl Reference {
    /// Makes a reference from the xattrs `trusted.overlay.metacopy` and `trusted.overlay.redirect`. `None`
    /// means that the xattr is missing, or too long to be valid.
    pub fn new(
        inode: u64,
        size: u64,
        metacopy: Option<&[u8]>,
        redirect: Option<&[u8]>,
    ) -> Reference {
        let digest = metacopy.and_then(parse_metacopy);
        let object = redirect.and_then(parse_redirect);
        match (digest, object) {
            (Some(digest), Some(object)) => Reference { inode, object: Some(object), size, digest },
            _ => Reference { inode, object: None, size, digest: None },
        }
    }

    pub fn key(&self) -> ObjectKey {
        let mut hasher = Sha256::new();
        match &self.object {
            Some(object) => {
                let object = object.as_os_str().as_bytes();
                hasher.update((object.len() as u64).to_le_bytes());
                hasher.update(object);
                hasher.update(self.size.to_le_bytes());
                match &self.digest {
                    Some(Digest::Sha256(digest)) => hasher.update(digest),
                    Some(Digest::Sha512(digest)) => hasher.update(digest),
                    None => {}
                }
            }
            // No path is empty, so no other key has this start.
            None => {
                hasher.update(0u64.to_le_bytes());
                hasher.update(self.inode.to_le_bytes());
            }
        }
        hasher.finalize().into()
    }
}

/// Parses `trusted.overlay.metacopy` by the rules of overlayfs. The value is empty, or has a version, a
/// length, flags and a hash algorithm of one byte each, and then the digest. Returns `None` if overlayfs
/// would reject the value.
fn parse_metacopy(value: &[u8]) -> Option<Option<Digest>> {
    let [version, length, flags, algorithm, digest @ ..] = value else {
        return value.is_empty().then_some(None);
    };
    if (*version, usize::from(*length), *flags) != (0, value.len(), 0) {
        return None;
    }
    let digest = match u16::from(*algorithm) {
        0 if digest.is_empty() => return Some(None),
        id if id == Algorithm::Sha256.id() => Digest::Sha256(digest.try_into().ok()?),
        id if id == Algorithm::Sha512.id() => Digest::Sha512(digest.try_into().ok()?),
        _ => return None,
    };
    Some(Some(digest))
}

/// Parses `trusted.overlay.redirect`. Returns the path without the first `/`, or `None` if the path is
/// relative or has a component that is empty, `.` or `..`.
fn parse_redirect(value: &[u8]) -> Option<PathBuf> {
    let path = value.strip_prefix(b"/")?;
    let is_plain = |component: &[u8]| !matches!(component, b"" | b"." | b"..");
    let is_valid = !path.contains(&0) && path.split(|byte| *byte == b'/').all(is_plain);
    is_valid.then(|| PathBuf::from(OsStr::from_bytes(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirect_with_odd_component_is_rejected() {
        assert_eq!(parse_redirect(b"/ab/cd"), Some("ab/cd".into()));
        assert_eq!(parse_redirect(b"/..a/.b"), Some("..a/.b".into()));
        for value in
            ["", "/", "ab", "ab/cd", "/ab/", "//ab", "/a//b", "/./a", "/a/..", "/../a", "/a\0"]
        {
            assert_eq!(parse_redirect(value.as_bytes()), None, "{value:?}");
        }
    }

    #[test]
    fn metacopy_follows_rules_of_overlayfs() {
        let with_digest = |algorithm: u8, size: usize| {
            [&[0, 4 + size as u8, 0, algorithm][..], &vec![7; size]].concat()
        };
        assert_eq!(parse_metacopy(b""), Some(None));
        assert_eq!(parse_metacopy(&with_digest(0, 0)), Some(None));
        assert_eq!(parse_metacopy(&with_digest(1, 32)), Some(Some(Digest::Sha256([7; 32]))));
        assert_eq!(parse_metacopy(&with_digest(2, 64)), Some(Some(Digest::Sha512([7; 64]))));
        for value in [
            vec![0],
            vec![0, 3, 0],
            vec![1, 4, 0, 0],
            vec![0, 5, 0, 0],
            vec![0, 4, 1, 0],
            with_digest(0, 32),
            with_digest(1, 31),
            with_digest(1, 64),
            with_digest(2, 32),
            with_digest(3, 32),
        ] {
            assert_eq!(parse_metacopy(&value), None, "{value:?}");
        }
    }

    #[test]
    fn different_references_have_different_keys() {
        let reference = |object: &str, size, digest| Reference {
            inode: 1,
            object: Some(object.into()),
            size,
            digest,
        };
        let invalid = |inode| Reference { inode, object: None, size: 1, digest: None };
        let references = [
            reference("ab/cd", 1, None),
            reference("ab/ce", 1, None),
            reference("ab/cd", 2, None),
            reference("ab/cd", 1, Some(Digest::Sha256([0; 32]))),
            reference("ab/cd", 1, Some(Digest::Sha512([0; 64]))),
            invalid(1),
            invalid(2),
        ];
        let keys: std::collections::BTreeSet<_> = references.iter().map(Reference::key).collect();
        assert_eq!(keys.len(), references.len());
        let other_file = Reference { inode: 2, ..reference("ab/cd", 1, None) };
        assert_eq!(other_file.key(), references[0].key());
    }
}
