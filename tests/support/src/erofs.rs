//! Writes tiny composefs images, also images that no tool makes.

/// The size of a block, in bytes.
const BLOCK: usize = 4096;
/// The block at which the inodes start.
const INODES: usize = 1;
/// The number of an inode is its position in units of this size.
const SLOT: usize = 32;

/// The types of a file, in the entry of a directory.
pub const REGULAR: u8 = 1;
pub const DIRECTORY: u8 = 2;
pub const SYMLINK: u8 = 7;

/// An inode.
struct Node {
    mode: u16,
    /// The user and the group.
    owner: u32,
    size: u64,
    /// The names without `trusted.`, and the values.
    xattrs: Vec<(&'static str, Vec<u8>)>,
    entries: Entries,
}

enum Entries {
    None,
    /// Names, the indexes of their nodes, and the types.
    List(Vec<(String, usize, u8)>),
    /// The entries of another directory, in the same blocks.
    SharedWith(usize),
}

/// An image that is being made. The first node is the root directory.
#[derive(Default)]
pub struct ErofsImage {
    nodes: Vec<Node>,
}

impl ErofsImage {
    /// Makes an image with an empty root directory.
    pub fn new() -> ErofsImage {
        let mut image = ErofsImage::default();
        image.directory();
        image
    }

    /// Adds a directory without a name. Returns its index.
    pub fn directory(&mut self) -> usize {
        self.add(0o40755, 0, Vec::new(), Entries::List(Vec::new()))
    }

    /// Adds a directory without a name that only its owner may read. Returns its index.
    pub fn private_directory(&mut self, owner: u32) -> usize {
        let index = self.add(0o40700, 0, Vec::new(), Entries::List(Vec::new()));
        self.nodes[index].owner = owner;
        index
    }

    /// Adds a directory without a name that has the entries of another one. Returns its index.
    pub fn directory_sharing(&mut self, other: usize) -> usize {
        self.add(0o40755, 0, Vec::new(), Entries::SharedWith(other))
    }

    /// Adds a regular file without a name, with these xattrs of overlayfs. Returns its index.
    pub fn file(&mut self, size: u64, metacopy: Option<&[u8]>, redirect: Option<&[u8]>) -> usize {
        let xattrs = [("overlay.metacopy", metacopy), ("overlay.redirect", redirect)];
        let xattrs = xattrs.into_iter().filter_map(|(name, value)| Some((name, value?.to_vec())));
        self.add(0o100644, size, xattrs.collect(), Entries::None)
    }

    /// Adds a character device without a name, whose driver does not exist. Returns its index.
    pub fn device(&mut self, size: u64) -> usize {
        self.add(0o20644, size, Vec::new(), Entries::None)
    }

    fn add(
        &mut self,
        mode: u16,
        size: u64,
        xattrs: Vec<(&'static str, Vec<u8>)>,
        entries: Entries,
    ) -> usize {
        self.nodes.push(Node { mode, owner: 0, size, xattrs, entries });
        self.nodes.len() - 1
    }

    /// Gives a node a name in a directory.
    pub fn link(&mut self, directory: usize, name: impl Into<String>, node: usize) {
        let is_directory = !matches!(self.nodes[node].entries, Entries::None);
        let file_type = if is_directory { DIRECTORY } else { REGULAR };
        self.link_as(directory, name, node, file_type);
    }

    /// Gives a node a name in a directory, with any type.
    pub fn link_as(&mut self, directory: usize, name: impl Into<String>, node: usize, kind: u8) {
        match &mut self.nodes[directory].entries {
            Entries::List(entries) => entries.push((name.into(), node, kind)),
            _ => panic!("node {directory} has no entries of its own"),
        }
    }

    /// Returns the bytes of the image.
    pub fn finish(&self) -> Vec<u8> {
        let mut bytes = vec![0; INODES * BLOCK];
        let mut numbers = Vec::new();
        for node in &self.nodes {
            let size = 64 + xattrs(node).len();
            bytes.resize(bytes.len().next_multiple_of(SLOT), 0);
            // An inode with its xattrs does not cross the end of a block.
            if bytes.len() % BLOCK + size > BLOCK {
                bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
            }
            numbers.push((bytes.len() - INODES * BLOCK) / SLOT);
            bytes.resize(bytes.len() + size, 0);
        }
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        let mut places = Vec::new();
        for node in &self.nodes {
            let data = entries(node, &numbers);
            places.push((bytes.len() / BLOCK, data.len()));
            bytes.extend(data);
        }
        for (index, (node, number)) in self.nodes.iter().zip(&numbers).enumerate() {
            let place = match node.entries {
                Entries::SharedWith(other) => places[other],
                _ => places[index],
            };
            let inode = inode(node, place);
            bytes[INODES * BLOCK + number * SLOT..][..inode.len()].copy_from_slice(&inode);
        }
        let blocks = (bytes.len() / BLOCK) as u32;
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..][..value.len()].copy_from_slice(value);
        };
        // The header of composefs: magic, version.
        put(0, &0xd078_629a_u32.to_le_bytes());
        put(4, &1u32.to_le_bytes());
        // The superblock: magic, the bits of a block, the number of inodes and blocks, the first inode.
        put(1024, &0xe0f5_e1e2_u32.to_le_bytes());
        put(1024 + 12, &[12]);
        put(1024 + 14, &(numbers[0] as u16).to_le_bytes());
        put(1024 + 16, &(self.nodes.len() as u64).to_le_bytes());
        put(1024 + 36, &blocks.to_le_bytes());
        put(1024 + 40, &(INODES as u32).to_le_bytes());
        bytes
    }
}

/// Returns the extended inode and its xattrs. The data has a first block and a size.
fn inode(node: &Node, (block, data): (usize, usize)) -> Vec<u8> {
    let xattrs = xattrs(node);
    let size = if data > 0 { data as u64 } else { node.size };
    let count = if xattrs.is_empty() { 0 } else { (xattrs.len() - 12) / 4 + 1 };
    let mut inode = vec![0; 64];
    let mut put =
        |offset: usize, value: &[u8]| inode[offset..][..value.len()].copy_from_slice(value);
    // Extended, with plain data.
    put(0, &1u16.to_le_bytes());
    put(2, &(count as u16).to_le_bytes());
    put(4, &node.mode.to_le_bytes());
    put(8, &size.to_le_bytes());
    put(16, &(block as u32).to_le_bytes());
    put(24, &node.owner.to_le_bytes());
    put(28, &node.owner.to_le_bytes());
    put(44, &2u32.to_le_bytes());
    inode.extend(xattrs);
    inode
}

/// Returns the inline xattrs of a node: a header, and then length, prefix, name and value of each.
fn xattrs(node: &Node) -> Vec<u8> {
    /// `trusted.`
    const PREFIX: u8 = 4;
    if node.xattrs.is_empty() {
        return Vec::new();
    }
    let mut bytes = vec![0; 12];
    for (name, value) in &node.xattrs {
        bytes.extend([name.len() as u8, PREFIX]);
        bytes.extend((value.len() as u16).to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Returns the blocks of a directory: entries of 12 bytes, and then their names.
fn entries(node: &Node, numbers: &[usize]) -> Vec<u8> {
    let Entries::List(list) = &node.entries else { return Vec::new() };
    let own = [(".".to_owned(), 0, DIRECTORY), ("..".to_owned(), 0, DIRECTORY)];
    let mut list: Vec<_> = list.iter().cloned().chain(own).collect();
    list.sort();
    let mut blocks = Vec::new();
    let mut rest = &list[..];
    while !rest.is_empty() {
        let mut size = 0;
        let fits = |(name, ..): &&(String, usize, u8)| {
            size += 12 + name.len();
            size <= BLOCK
        };
        let (block, after) = rest.split_at(rest.iter().take_while(fits).count());
        rest = after;
        let mut name_offset = 12 * block.len();
        for (name, node, kind) in block {
            blocks.extend((numbers[*node] as u64).to_le_bytes());
            blocks.extend((name_offset as u16).to_le_bytes());
            blocks.extend([*kind, 0]);
            name_offset += name.len();
        }
        block.iter().for_each(|(name, ..)| blocks.extend(name.as_bytes()));
        blocks.resize(blocks.len().next_multiple_of(BLOCK), 0);
    }
    blocks
}
