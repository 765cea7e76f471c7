//! The mounts and the loop devices of the running kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A line of /proc/thread-self/mountinfo.
#[derive(Debug, PartialEq)]
pub struct Mount {
    pub mount_point: PathBuf,
    /// The options of the mount, then the options of the superblock.
    pub options: Vec<String>,
    pub fs_type: String,
    pub source: String,
}

/// Returns the mounts in the namespace of the calling thread.
pub fn mounts() -> Vec<Mount> {
    let parse = |line: &str| {
        let (mount, superblock) = line.split_once(" - ").unwrap();
        let mount: Vec<_> = mount.split(' ').collect();
        let superblock: Vec<_> = superblock.split(' ').collect();
        let options = mount[5].split(',').chain(superblock[2].split(','));
        Mount {
            mount_point: unescape(mount[4]).into(),
            options: options.map(unescape).collect(),
            fs_type: superblock[0].into(),
            source: unescape(superblock[1]),
        }
    };
    fs::read_to_string("/proc/thread-self/mountinfo").unwrap().lines().map(parse).collect()
}

/// Decodes spaces and similar characters, which the kernel writes as three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap().to_owned();
    for part in parts {
        plain.push(char::from(u8::from_str_radix(&part[..3], 8).unwrap()));
        plain.push_str(&part[3..]);
    }
    plain
}

/// Returns the topmost mount on a directory.
pub fn mount_at(mount_point: &Path) -> Option<Mount> {
    mounts().into_iter().rfind(|mount| mount.mount_point == mount_point)
}

/// Returns the backing files of all used loop devices, if the path of the file contains `text`.
pub fn loop_devices(text: &str) -> Vec<String> {
    fs::read_dir("/sys/block")
        .unwrap()
        .filter_map(|device| {
            fs::read_to_string(device.unwrap().path().join("loop/backing_file")).ok()
        })
        .filter(|backing_file| backing_file.contains(text))
        .collect()
}

/// Asserts that no loop device has a backing file whose path contains `text`. The kernel releases a
/// loop device a moment after its last use.
pub fn assert_no_loop_device(text: &str) {
    for _ in 0..200 {
        if loop_devices(text).is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("still in use: {:?}", loop_devices(text));
}
