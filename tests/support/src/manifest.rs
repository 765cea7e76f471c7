//! The tree that the two bundled images show, and assertions about a mounted tree.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::Digest as _;

pub const V1_DIGEST: &str = "9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1";
pub const V2_DIGEST: &str = "5634d90907575dc59b08f3ca22a7bb7d035e4f15b390bce7bd3891e93a70af70\
                             aaba414c439f5ac7deabd04fc15e9a0d9a6e91d07c044694b5521b966ceebd2a";

/// An entry of the manifest.
#[derive(Debug, PartialEq)]
struct Entry {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
    /// 0 for a directory.
    size: u64,
    rdev: u64,
    /// SHA-256 of a file, or the target of a symbolic link.
    content: String,
    xattrs: BTreeMap<String, String>,
}

fn manifest() -> BTreeMap<PathBuf, Entry> {
    let json: serde_json::Value =
        serde_json::from_str(include_str!("../../images/manifest.json")).unwrap();
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let entry = |value: &serde_json::Value| Entry {
        mode: u32::from_str_radix(text(&value[0]).trim_start_matches("0o"), 8).unwrap(),
        uid: number(&value[1]) as u32,
        gid: number(&value[2]) as u32,
        mtime: number(&value[3]) as i64,
        size: number(&value[4]),
        rdev: number(&value[5]),
        content: text(&value[6]),
        xattrs: value[7]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, value)| (name.clone(), text(value)))
            .collect(),
    };
    json.as_object().unwrap().iter().map(|(path, value)| (path.into(), entry(value))).collect()
}

/// Returns all entries below a directory.
fn tree(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut entries = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let file_type = metadata.file_type();
            let content = if file_type.is_file() {
                let content = fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
                hex(&sha2::Sha256::digest(content))
            } else if file_type.is_symlink() {
                String::from_utf8(fs::read_link(&path).unwrap().into_os_string().into_vec())
                    .unwrap()
            } else {
                String::new()
            };
            if file_type.is_dir() {
                directories.push(path.clone());
            }
            let entry = Entry {
                mode: metadata.mode(),
                uid: metadata.uid(),
                gid: metadata.gid(),
                mtime: metadata.mtime(),
                size: if file_type.is_dir() { 0 } else { metadata.size() },
                rdev: metadata.rdev(),
                content,
                xattrs: xattrs(&path),
            };
            entries.insert(path.strip_prefix(root).unwrap().to_owned(), entry);
        }
    }
    entries
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the extended attributes, except the ones that overlayfs itself sets.
fn xattrs(path: &Path) -> BTreeMap<String, String> {
    let mut names = vec![0; 64 * 1024];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap();
    names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty() && !name.starts_with(b"trusted.overlay."))
        .map(|name| {
            let mut value = vec![0; 64 * 1024];
            let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value).unwrap();
            (String::from_utf8(name.to_vec()).unwrap(), hex(&value[..length]))
        })
        .collect()
}

/// Asserts that the tree is exactly the tree of the manifest: names, types, modes, owners, times,
/// sizes, devices, contents and link targets. The comparison includes xattrs, with ACLs and
/// capabilities.
pub fn assert_is_manifest(root: &Path) {
    assert_is_manifest_mapped(root, 0);
}

/// Asserts that the tree is the tree of the manifest, with all owners moved up.
pub fn assert_is_manifest_mapped(root: &Path, first_id: u32) {
    let mut expected = manifest();
    for entry in expected.values_mut() {
        entry.uid += first_id;
        entry.gid += first_id;
        if first_id != 0 {
            // The kernel maps the owners in the other extended attributes too.
            entry.xattrs.retain(|name, _| name.starts_with("user."));
        }
    }
    let mut found = tree(root);
    if first_id != 0 {
        found.values_mut().for_each(|entry| {
            entry.xattrs.retain(|name, _| name.starts_with("user."));
        });
    }
    assert_eq!(expected.len(), 123);
    let names = |tree: &BTreeMap<PathBuf, Entry>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected));
    for (path, entry) in &expected {
        assert_eq!(&found[path], entry, "{path:?}");
    }
}

/// The attributes of the root directory in an image. The manifest leaves them out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Root {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
}

/// The root directory of both images.
pub const ROOT: Root = Root { mode: 0o40755, uid: 0, gid: 0, mtime: 1_700_000_000 };

/// Asserts that the root of the mount has these attributes, and no xattrs. With an upper layer, the
/// root is the upperdir.
pub fn assert_root_is(root: &Path, expected: Root) {
    let metadata = fs::metadata(root).unwrap();
    let found = Root {
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: metadata.mtime(),
    };
    assert_eq!((found, xattrs(root)), (expected, BTreeMap::new()));
}

/// Asserts that the two names that the manifest has for one file are a hard link. Only the V2 image has
/// the hard link: mkcomposefs wrote two files of one content into the V1 image.
pub fn assert_has_hard_link(root: &Path) {
    let links = ["data/70000", "data/hardlink"];
    let [one, other] = links.map(|link| fs::symlink_metadata(root.join(link)).unwrap());
    assert_eq!((one.ino(), one.nlink()), (other.ino(), 2));
}
