//! Writes a small composefs image byte by byte. Not every distribution packages a tool for that, and
//! tests must not build their images with the code under test.
//!
//! Format: <https://docs.kernel.org/filesystems/erofs.html>, erofs_fs.h of Linux, and the output of
//! mkcomposefs.

use sealmount::{Algorithm, Digest};
use std::collections::BTreeMap;

const BLOCK: usize = 4096;
/// The space of an inode and its xattrs.
const SLOT: usize = 256;
/// The unit of inode numbers.
const NID: usize = 32;

/// The kind of file at a path of the tree.
#[derive(Debug)]
pub enum Node {
    Directory,
    /// A regular file. Its content is an object.
    File {
        mode: u16,
        size: usize,
        digest: Digest,
    },
    Whiteout,
}

impl Node {
    pub fn file(mode: u16, content: &[u8]) -> Node {
        let digest = Digest::of_bytes(Algorithm::Sha256, content);
        Node::File { mode, size: content.len(), digest }
    }

    fn dirent_type(&self) -> u8 {
        match self {
            Node::File { .. } => 1,
            Node::Directory => 2,
            Node::Whiteout => 3,
        }
    }
}

/// Returns the path of an object in its object directory.
pub fn object_path(digest: &Digest) -> String {
    let digest = digest.to_string();
    let hex = digest.rsplit(':').next().unwrap_or(&digest);
    format!("{}/{}", &hex[..2], &hex[2..])
}

/// Returns an image of `blocks` blocks. Paths are relative, without `.`. The empty path is the root.
/// The tree must list every directory. A directory has space for about 100 entries.
pub fn image(mut tree: BTreeMap<String, Node>, blocks: usize) -> Vec<u8> {
    // If overlayfs has no data-only layers, the tree would show the object directories. Whiteouts hide
    // them.
    let prefixes: Vec<_> = tree.values().filter_map(object_prefix).collect();
    tree.extend(prefixes.into_iter().map(|prefix| (prefix, Node::Whiteout)));

    let nid = |path: &str| (BLOCK + SLOT * tree.range(..path.to_owned()).count()) / NID;
    let mut image = vec![0; blocks * BLOCK];
    put(&mut image, 0, &le32(&[0xd078_629a, 1]));
    put(&mut image, 1024, &le32(&[0xe0f5_e1e2]));
    image[1024 + 12] = BLOCK.ilog2() as u8;
    put(&mut image, 1024 + 14, &le16(&[nid("")]));
    put(&mut image, 1024 + 16, &le32(&[tree.len()]));
    put(&mut image, 1024 + 36, &le32(&[blocks]));
    // The feature for files in chunks, which may be holes.
    put(&mut image, 1024 + 80, &le32(&[4]));

    let mut next_block = 1 + (tree.len() * SLOT).div_ceil(BLOCK);
    for (path, node) in &tree {
        let at = nid(path) * NID;
        match node {
            Node::Directory => {
                let children = tree.iter().filter_map(|(child, node)| {
                    let name = match path.as_str() {
                        "" => child,
                        _ => child.strip_prefix(path.as_str())?.strip_prefix('/')?,
                    };
                    let is_child = !name.is_empty() && !name.contains('/');
                    is_child.then(|| (name.to_owned(), nid(child), node.dirent_type()))
                });
                let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
                let dots = [(".", path.as_str()), ("..", parent)]
                    .map(|(name, path)| (name.to_owned(), nid(path), 2));
                let content = directory(dots.into_iter().chain(children).collect());
                put(&mut image, at, &inode(0, 0, 0o040_755, 2, content.len(), next_block));
                put(&mut image, next_block * BLOCK, &content);
                next_block += 1;
            }
            Node::File { mode, size, digest } => {
                let mut body = xattrs(digest);
                let xattr_units = (body.len() - 12) / 4 + 1;
                // Layout 4 means chunks. This file has one chunk of 4 GiB, which is a hole.
                let mode = usize::from(0o100_000 | mode);
                put(&mut image, at, &inode(4, xattr_units, mode, 1, *size, 20));
                body.extend(u32::MAX.to_le_bytes());
                put(&mut image, at + NID, &body);
            }
            // A whiteout is a character device with number 0.
            Node::Whiteout => put(&mut image, at, &inode(0, 0, 0o020_000, 1, 0, 0)),
        }
    }
    image
}

fn object_prefix(node: &Node) -> Option<String> {
    let Node::File { digest, .. } = node else { return None };
    Some(object_path(digest)[..2].to_owned())
}

/// Returns a `struct erofs_inode_compact`.
fn inode(
    layout: usize,
    xattr_units: usize,
    mode: usize,
    links: usize,
    size: usize,
    data: usize,
) -> Vec<u8> {
    [le16(&[layout << 1, xattr_units, mode, links]), le32(&[size, 0, data])].concat()
}

/// Returns inline xattrs after their header of 12 bytes: the digest and the path of the object.
fn xattrs(digest: &Digest) -> Vec<u8> {
    // struct ovl_metacopy: version, length, flags, hash algorithm, digest.
    let hash = digest.as_bytes();
    let metacopy = [&[0, 4 + hash.len() as u8, 0, 1], hash].concat();
    let redirect = format!("/{}", object_path(digest)).into_bytes();
    let mut body = vec![0; 12];
    for (name, value) in [("overlay.metacopy", metacopy), ("overlay.redirect", redirect)] {
        // Prefix 4 is "trusted.".
        body.extend([name.len() as u8, 4]);
        body.extend(le16(&[value.len()]));
        body.extend(name.bytes().chain(value));
        body.resize(body.len().next_multiple_of(4), 0);
    }
    body
}

/// Returns a `struct erofs_dirent` for each entry, then the names. Both are in the order of the names.
fn directory(mut entries: Vec<(String, usize, u8)>) -> Vec<u8> {
    entries.sort();
    let mut name_offset = entries.len() * 12;
    let (mut dirents, mut names) = (Vec::new(), Vec::new());
    for (name, nid, dirent_type) in entries {
        dirents.extend(le32(&[nid, 0]));
        dirents.extend(le16(&[name_offset, usize::from(dirent_type)]));
        name_offset += name.len();
        names.extend(name.into_bytes());
    }
    [dirents, names].concat()
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..][..bytes.len()].copy_from_slice(bytes);
}

/// Returns the numbers in little-endian order. Each number must fit into 16 bits.
fn le16(numbers: &[usize]) -> Vec<u8> {
    numbers.iter().flat_map(|number| (*number as u16).to_le_bytes()).collect()
}

fn le32(numbers: &[usize]) -> Vec<u8> {
    numbers.iter().flat_map(|number| (*number as u32).to_le_bytes()).collect()
}
