//! Writes an initramfs: a cpio archive in the `newc` format, which the kernel unpacks.

use crate::{Context, Error};
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// An unfinished archive. Root owns every file in the archive.
#[derive(Debug)]
pub struct Archive<W: Write> {
    to: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    pub fn new(to: W) -> Self {
        Archive { to, entries: 0 }
    }

    pub fn directory(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.entry(path.as_bytes(), DIRECTORY | mode, &[])
    }

    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path.as_bytes(), REGULAR | mode, content)
    }

    /// Adds the content of a directory at the root of the archive.
    pub fn tree(&mut self, root: &Path) -> Result<(), Error> {
        let mut pending = vec![root.to_owned()];
        while let Some(dir) = pending.pop() {
            let what = || format!("cannot archive {}", dir.display());
            for entry in fs::read_dir(&dir).context(what)? {
                let path = entry.context(what)?.path();
                let name = path
                    .strip_prefix(root)
                    .expect("the path is below the root")
                    .as_os_str()
                    .as_bytes();
                let metadata = path.symlink_metadata().context(what)?;
                let mode = metadata.permissions().mode() & 0o7777;
                if metadata.is_dir() {
                    self.entry(name, DIRECTORY | mode, &[]).context(what)?;
                    pending.push(path);
                } else if metadata.is_symlink() {
                    let target = fs::read_link(&path).context(what)?;
                    self.entry(name, SYMLINK | 0o777, target.as_os_str().as_bytes())
                        .context(what)?;
                } else if metadata.is_file() {
                    self.entry(name, REGULAR | mode, &fs::read(&path).context(what)?)
                        .context(what)?;
                } else {
                    return Err(format!(
                        "cannot archive {}: mode {:o}",
                        path.display(),
                        metadata.mode()
                    )
                    .into());
                }
            }
        }
        Ok(())
    }

    pub fn finish(mut self) -> io::Result<W> {
        self.entry(b"TRAILER!!!", 0, &[])?;
        Ok(self.to)
    }

    fn entry(&mut self, path: &[u8], mode: u32, content: &[u8]) -> io::Result<()> {
        let too_large = |_| {
            io::Error::new(
                io::ErrorKind::FileTooLarge,
                "a file in a cpio archive must be smaller than 4 GiB",
            )
        };
        let size = u32::try_from(content.len()).map_err(too_large)?;
        let name_size = u32::try_from(path.len() + 1).map_err(too_large)?;
        // The kernel makes hard links of files with equal inode numbers.
        self.entries += 1;
        let (inode, links) = (self.entries, 1);
        let (user, group, modified, device, check) = (0, 0, 0, 0, 0);
        write!(self.to, "070701")?;
        for field in [
            inode, mode, user, group, links, modified, size, device, device, device, device,
            name_size, check,
        ] {
            write!(self.to, "{field:08x}")?;
        }
        self.to.write_all(path)?;
        // The header has 110 bytes. The name and the content are each padded to a multiple of four.
        self.to.write_all(&[0; 4][..1 + padding(110 + path.len() + 1)])?;
        self.to.write_all(content)?;
        self.to.write_all(&[0; 4][..padding(content.len())])
    }
}

fn padding(length: usize) -> usize {
    length.wrapping_neg() % 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Entry = (String, u32, Vec<u8>);

    /// Reads an archive by the format documentation of the kernel, and checks every field that is used.
    fn read(mut archive: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut inodes = Vec::new();
        let mut offset = 0;
        let mut take = |length: usize| {
            let (taken, rest) = archive.split_at(length);
            (archive, offset) = (rest, offset + length);
            (taken.to_vec(), offset)
        };
        loop {
            let header = String::from_utf8(take(110).0).unwrap();
            assert_eq!(&header[..6], "070701");
            let field = |n: usize| u32::from_str_radix(&header[6 + 8 * n..][..8], 16).unwrap();
            let (mut name, after) = take(field(11) as usize);
            assert_eq!(name.pop(), Some(0));
            take(after.wrapping_neg() % 4);
            let (content, after) = take(field(6) as usize);
            take(after.wrapping_neg() % 4);
            if name == b"TRAILER!!!" {
                return entries;
            }
            assert!(!inodes.contains(&field(0)));
            inodes.push(field(0));
            entries.push((String::from_utf8(name).unwrap(), field(1), content));
        }
    }

    proptest! {
        #[test]
        fn archive_written_and_read_stays_equal(
            entries in prop::collection::vec(("[a-z/.]{1,20}", 0..0o7777u32, any::<Vec<u8>>()), 0..8)
        ) {
            let mut archive = Archive::new(Vec::new());
            for (path, mode, content) in &entries {
                archive.file(path, *mode, content).unwrap();
            }
            let bytes = archive.finish().unwrap();
            let expected: Vec<Entry> =
                entries.into_iter().map(|(path, mode, content)| (path, REGULAR | mode, content)).collect();
            prop_assert_eq!(read(&bytes), expected);
        }
    }
}
