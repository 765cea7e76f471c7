//! Images of any size.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise};
use sealmount::{Algorithm, Digest, compute_digest};

use crate::Bench;
use crate::common::V1;
use crate::timing::Random;

pub const MIB: usize = 1024 * 1024;

/// An image, and what the zstd and xz programs make of it where they are installed.
pub struct Image {
    pub path: PathBuf,
    pub size: usize,
    pub digest: Digest,
    pub zstd: Option<PathBuf>,
    pub xz: Option<PathBuf>,
}

impl Image {
    /// The bundled V1 image with a superblock that gives it this size. Nothing looks at what is
    /// behind its own end.
    pub fn create(bench: &Bench, size: usize) -> io::Result<Image> {
        println!("an image of {} MB…", size / MIB);
        let mut content = fs::read(V1.image())?;
        content[1060..1064].copy_from_slice(&(size as u32 / 4096).to_le_bytes());
        fill(&mut content, size);
        let path = bench.sandbox.file(&format!("{}.cfs", size / MIB), &content);
        let digest = compute_digest(Algorithm::Sha256, &content);
        drop(content);
        let compressed =
            |program: &Option<crate::programs::Program>, arguments: &[&str], suffix| {
                let program = program.as_ref()?;
                let status = program.command().args(arguments).arg(&path).status();
                assert!(status.is_ok_and(|status| status.success()), "{arguments:?}");
                Some(path.with_extension(suffix))
            };
        let zstd = compressed(&bench.programs.zstd, &["--quiet", "--keep"], "cfs.zst");
        // The window of the default, which takes ten times as long and saves a fifth more.
        let options = ["--threads=0", "--lzma2=preset=1,dict=8MiB", "--keep"];
        let xz = compressed(&bench.programs.xz, &options, "cfs.xz");
        File::open(&path)?.sync_all()?;
        Ok(Image { path, size, digest, zstd, xz })
    }
}

/// Takes a file out of the page cache.
pub fn make_cold(path: &Path) {
    fadvise(File::open(path).unwrap(), 0, None, Advice::DontNeed).unwrap();
}

/// Something like the inodes of an image, 256 bytes each: a quarter are digests, which cannot be
/// compressed, of the rest little is left.
fn fill(content: &mut Vec<u8>, size: usize) {
    let mut random = Random::default();
    content.reserve(size);
    let mut number = 0_u32;
    while content.len() < size {
        let digest = [(); 4].map(|()| random.next().to_le_bytes());
        let name = [(); 4].map(|()| format!("{:016x}", random.next())).concat();
        content.extend_from_slice(&number.to_le_bytes());
        content.extend_from_slice(&[0xa4, 0x81, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        content.extend_from_slice(format!("/usr/lib/modules/{number:08}/kernel.ko").as_bytes());
        content.extend_from_slice(b"trusted.overlay.metacopy");
        content.extend_from_slice(digest.as_flattened());
        content.extend_from_slice(b"trusted.overlay.redirect/");
        content.extend_from_slice(name.as_bytes());
        number += 1;
        content.resize(content.len().next_multiple_of(256), 0);
    }
    content.truncate(size);
}
