//! Images of any size.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise};
use sealmount::{Algorithm, Digest};
use test_support::V1;

use crate::bench::Bench;
use crate::programs::Program;
use crate::sizes::MIB;
use crate::timing::Random;

/// The windows of the compressing programs, which a decoder keeps in memory: the defaults of zstd and xz,
/// and the only window of gzip.
pub const ZSTD_WINDOW: usize = 2 * MIB;
pub const XZ_WINDOW: usize = 8 * MIB;
pub const GZIP_WINDOW: usize = 32 * 1024;

/// An image, and its compressed files. A program that is not installed makes no file.
pub struct Image {
    pub path: PathBuf,
    pub size: usize,
    pub digest: Digest,
    pub zstd: Option<PathBuf>,
    pub xz: Option<PathBuf>,
    pub gzip: Option<PathBuf>,
}

impl Image {
    /// Creates the bundled V1 image with a superblock that gives this size. EROFS never reads the bytes
    /// behind the original image.
    pub fn create(bench: &Bench, size: usize) -> io::Result<Image> {
        println!("an image of {} MB…", size / MIB);
        let mut content = fs::read(V1.image())?;
        content[1060..1064].copy_from_slice(&(size as u32 / 4096).to_le_bytes());
        fill(&mut content, size);
        let path = bench.sandbox.file(&format!("{}.cfs", size / MIB), &content);
        let digest = Digest::of_bytes(Algorithm::Sha256, &content);
        drop(content);
        let compressed = |program: &Option<Program>, arguments: &[&str], suffix| {
            let program = program.as_ref()?;
            let mut command = program.command();
            let status = command.args(arguments).args(["--keep", "--force"]).arg(&path).status();
            assert!(status.is_ok_and(|status| status.success()), "{command:?}");
            Some(path.with_extension(suffix))
        };
        let programs = &bench.programs;
        // The default preset needs ten times as long and saves a fifth more.
        let xz = ["--threads=0", "--lzma2=preset=1,dict=8MiB"];
        let image = Image {
            size,
            digest,
            zstd: compressed(&programs.zstd, &["--quiet", "--zstd=wlog=21"], "cfs.zst"),
            xz: compressed(&programs.xz, &xz, "cfs.xz"),
            gzip: compressed(&programs.gzip, &["--fast"], "cfs.gz"),
            path,
        };
        File::open(&image.path)?.sync_all()?;
        Ok(image)
    }
}

/// Drops a file from the page cache.
pub fn make_cold(path: &Path) {
    fadvise(File::open(path).unwrap(), 0, None, Advice::DontNeed).unwrap();
}

/// Appends bytes like the inodes of an image, 256 bytes each. A quarter are digests, which cannot be
/// compressed. The other bytes compress well.
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
