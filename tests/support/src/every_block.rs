//! Writes images of a given length, in which a file or a directory depends on every block near the end.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::erofs::{DIRECTORY, REGULAR};

/// The position of the superblock.
const SUPERBLOCK: usize = 1024;
/// The position of the root inode. Its directory follows.
const ROOT: usize = 1152;
/// The position of the other inodes of the head.
const INODES: usize = 1536;
/// The number of an inode is its position in units of this size, which is the size of a compact inode.
const SLOT: usize = 32;
/// The highest number of blocks with a file or directory of their own. A page of 65,536 bytes has 16 blocks
/// of 4096 bytes.
const OWN_MAX: usize = 16;

/// The layouts of the data of an inode, in its first word.
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2 << 1;

/// The content of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The data of a file.
    Data,
    /// An inode, and the content of its file up to the end of the block.
    Inode,
    /// The entries of a directory.
    Directory,
}

/// The number of different images of a length.
pub const VARIANTS: usize = 3;

/// An image, and its tree.
#[derive(Debug)]
pub struct EveryBlock {
    pub bytes: Vec<u8>,
    files: BTreeMap<PathBuf, Vec<u8>>,
    directories: BTreeMap<PathBuf, Vec<String>>,
}

impl EveryBlock {
    /// Makes a composefs image of this many blocks of 4096 bytes. The variant, less than [`VARIANTS`], decides
    /// which kind of block is the last one.
    pub fn composefs(blocks: usize, variant: usize) -> EveryBlock {
        let mut image = EveryBlock::erofs(12, blocks, variant);
        // The header of composefs: magic, version.
        image.put(0, &0xd078_629a_u32.to_le_bytes());
        image.put(4, &1u32.to_le_bytes());
        image.share_all();
        image
    }

    /// Makes a plain EROFS image of this many blocks of 512 bytes, at least four. Unlike images with blocks
    /// of 4096 bytes, such an image can end within a page of 4096 bytes.
    pub fn small_blocks(blocks: usize, variant: usize) -> EveryBlock {
        let mut image = EveryBlock::erofs(9, blocks, variant);
        image.share_all();
        image
    }

    fn erofs(block_bits: u8, blocks: usize, variant: usize) -> EveryBlock {
        let block_size = 1 << block_bits;
        let mut image = EveryBlock {
            bytes: vec![0; blocks * block_size],
            files: BTreeMap::new(),
            directories: BTreeMap::new(),
        };
        // Magic, the bits of a block, the numbers of the root inode, of all inodes and of blocks.
        image.put(SUPERBLOCK, &0xe0f5_e1e2_u32.to_le_bytes());
        image.put(SUPERBLOCK + 12, &[block_bits]);
        image.put(SUPERBLOCK + 14, &((ROOT / SLOT) as u16).to_le_bytes());
        image.put(SUPERBLOCK + 16, &(OWN_MAX as u64).to_le_bytes());
        image.put(SUPERBLOCK + 36, &(blocks as u32).to_le_bytes());

        // The file `all` has every byte of the image.
        image.put_inode(INODES, FLAT_PLAIN, REGULAR, blocks * block_size, 0);
        let mut entries = vec![("all".to_owned(), INODES, REGULAR)];
        let head = (INODES + (OWN_MAX + 1) * SLOT).div_ceil(block_size);
        let own = head.max(blocks.saturating_sub(OWN_MAX))..blocks;
        for (number, block) in own.enumerate() {
            let inode = INODES + (number + 1) * SLOT;
            entries.push(image.add_block(block, block_size, inode, kind(block + variant)));
        }
        image
            .directories
            .insert("".into(), entries.iter().map(|(name, ..)| name.clone()).collect());
        let directory = directory(ROOT, entries);
        image.put_inode(ROOT, FLAT_INLINE, DIRECTORY, directory.len(), 0);
        image.put(ROOT + SLOT, &directory);
        image
    }

    /// Fills a block. Returns the entry of the root directory: name, position of the inode and type.
    fn add_block(
        &mut self,
        block: usize,
        block_size: usize,
        inode: usize,
        kind: Kind,
    ) -> (String, usize, u8) {
        let name = format!("{block:02}");
        let position = block * block_size;
        let content = |length| (0..length).map(|n| (n * 7 + n / 251 + block) as u8).collect();
        match kind {
            Kind::Data => {
                let content: Vec<u8> = content(block_size);
                self.put_inode(inode, FLAT_PLAIN, REGULAR, content.len(), block);
                self.put(position, &content);
                self.files.insert(name.clone().into(), content);
                (name, inode, REGULAR)
            }
            Kind::Inode => {
                let content: Vec<u8> = content(block_size - SLOT);
                self.put_inode(position, FLAT_INLINE, REGULAR, content.len(), 0);
                self.put(position + SLOT, &content);
                self.files.insert(name.clone().into(), content);
                (name, position, REGULAR)
            }
            Kind::Directory => {
                let names: Vec<_> = ["one", "three", "two"].map(str::to_owned).into();
                let links = names.iter().map(|name| (name.clone(), INODES, REGULAR)).collect();
                self.put_inode(inode, FLAT_PLAIN, DIRECTORY, block_size, block);
                self.put(position, &directory(inode, links));
                self.directories.insert(name.clone().into(), names);
                (name, inode, DIRECTORY)
            }
        }
    }

    /// Notes the content of the file `all`, and of its other links, when the image is complete.
    fn share_all(&mut self) {
        for (directory, names) in &self.directories {
            let names =
                names.iter().filter(|name| !directory.as_os_str().is_empty() || *name == "all");
            for name in names {
                self.files.insert(directory.join(name), self.bytes.clone());
            }
        }
    }

    fn put_inode(&mut self, position: usize, layout: u16, kind: u8, size: usize, block: usize) {
        let (mode, links) = if kind == DIRECTORY { (0o40755_u16, 2_u16) } else { (0o100644, 1) };
        self.put(position, &layout.to_le_bytes());
        self.put(position + 4, &mode.to_le_bytes());
        self.put(position + 6, &links.to_le_bytes());
        self.put(position + 8, &(size as u32).to_le_bytes());
        self.put(position + 16, &(block as u32).to_le_bytes());
    }

    fn put(&mut self, position: usize, bytes: &[u8]) {
        self.bytes[position..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Compares a mounted tree with the image. Returns the first difference.
    pub fn compare(&self, root: &Path) -> Result<(), String> {
        for (path, expected) in &self.directories {
            let listed: Result<Vec<_>, _> = fs::read_dir(root.join(path)).and_then(|entries| {
                entries.map(|entry| Ok(entry?.file_name().into_string().unwrap())).collect()
            });
            let mut names = listed.map_err(|error| format!("{path:?}: {error}"))?;
            names.sort();
            let mut expected = expected.clone();
            expected.sort();
            if names != expected {
                return Err(format!("{path:?} has the names {names:?}, expected {expected:?}"));
            }
        }
        for (path, expected) in &self.files {
            match fs::read(root.join(path)) {
                Ok(content) if content == *expected => {}
                Ok(_) => return Err(format!("{path:?} has other bytes")),
                Err(error) => return Err(format!("{path:?}: {error}")),
            }
        }
        Ok(())
    }
}

fn kind(number: usize) -> Kind {
    [Kind::Data, Kind::Inode, Kind::Directory][number % VARIANTS]
}

/// Returns the entries of a directory with this inode, in the order of the names, and then the names.
fn directory(inode: usize, mut entries: Vec<(String, usize, u8)>) -> Vec<u8> {
    entries.extend([".", ".."].map(|name| (name.to_owned(), inode, DIRECTORY)));
    entries.sort();
    let mut bytes = Vec::new();
    let mut name_offset = 12 * entries.len();
    for (name, position, kind) in &entries {
        bytes.extend(((position / SLOT) as u64).to_le_bytes());
        bytes.extend((name_offset as u16).to_le_bytes());
        bytes.extend([*kind, 0]);
        name_offset += name.len();
    }
    entries.iter().for_each(|(name, ..)| bytes.extend(name.as_bytes()));
    bytes
}
