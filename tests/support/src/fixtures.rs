//! The two bundled images.

use std::fs;
use std::path::{Path, PathBuf};

use sealmount::{Digest, MemoryKind, MountOptions, Verity};

use crate::manifest;

/// The two images of the manifest's tree.
pub const V1: Fixture = Fixture { name: "v1", digest: manifest::V1_DIGEST };
pub const V2: Fixture = Fixture { name: "v2-sha512", digest: manifest::V2_DIGEST };

pub struct Fixture {
    name: &'static str,
    pub digest: &'static str,
}

impl Fixture {
    fn directory(&self) -> PathBuf {
        // The path has no `..`, because findmnt(8) shows the canonical path.
        Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("images").join(self.name)
    }

    pub fn image(&self) -> PathBuf {
        self.directory().join("image.cfs")
    }

    pub fn objects(&self) -> PathBuf {
        self.directory().join("objects")
    }

    pub fn digest(&self) -> Digest {
        self.digest.parse().unwrap()
    }

    /// Returns options with the objects, without a copy and without a digest.
    pub fn options(&self) -> MountOptions {
        MountOptions::new(self.objects())
    }

    /// Returns options with a copy and the digest. The objects in the source tree have no fs-verity.
    pub fn copy_options(&self) -> MountOptions {
        let mut options = self.options();
        options.copy = Some(MemoryKind::Memfd);
        options.digest = Some(self.digest());
        options.overlay.verity = Some(Verity::Off);
        options
    }
}

/// Returns a V1 image whose superblock gives this size, a multiple of 4096. EROFS never reads the bytes
/// behind the original image.
pub fn large_image(size: usize) -> Vec<u8> {
    let mut image = fs::read(V1.image()).unwrap();
    image[1060..1064].copy_from_slice(&(size as u32 / 4096).to_le_bytes());
    // The content is neither periodic nor random.
    image.extend((image.len()..size).map(|n| (n / 4096 * 31 + n / 7) as u8));
    image
}
