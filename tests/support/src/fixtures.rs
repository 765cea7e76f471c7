//! The two bundled images.

use std::fs;
use std::path::{Path, PathBuf};

use sealmount::{Digest, MountOptions, Verity};

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
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../images").join(self.name)
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

    /// With the objects, and nothing else asked for.
    pub fn options(&self) -> MountOptions {
        MountOptions::new(self.objects())
    }

    /// With copy and the digest. The objects have no fs-verity where the project is checked out.
    pub fn copy_options(&self) -> MountOptions {
        let mut options = self.options();
        options.copy = Some(sealmount::Memory::Memfd);
        options.digest = Some(self.digest());
        options.verity = Some(Verity::Off);
        options
    }
}

/// A V1 image whose superblock gives it this size, a multiple of 4096; what is behind the real one is
/// never looked at.
pub fn large_image(size: usize) -> Vec<u8> {
    let mut image = fs::read(V1.image()).unwrap();
    image[1060..1064].copy_from_slice(&(size as u32 / 4096).to_le_bytes());
    // Not periodic, and not random either.
    image.extend((image.len()..size).map(|n| (n / 4096 * 31 + n / 7) as u8));
    image
}
