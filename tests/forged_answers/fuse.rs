//! A FUSE file system of one file, whose server returns a forged digest for FS_IOC_MEASURE_VERITY. The
//! server implements only the part of the protocol (linux/fuse.h) that the tests need.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread::{self, JoinHandle};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

const FILE: u64 = 2;

/// Mounts the file system on a directory. The server ends when the file system is unmounted.
pub fn serve(mount_point: &Path, name: &str, content: Vec<u8>, digest: [u8; 32]) -> JoinHandle<()> {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let device = device.expect("this test needs FUSE: the module fuse");
    let options =
        format!("fd={},rootmode=40755,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let options = std::ffi::CString::new(options).unwrap();
    mount("fuse", mount_point, "fuse", MountFlags::empty(), options.as_c_str()).unwrap();
    let server = Server { device, name: name.as_bytes().to_vec(), content, digest };
    thread::spawn(move || server.run())
}

struct Server {
    device: File,
    name: Vec<u8>,
    content: Vec<u8>,
    digest: [u8; 32],
}

impl Server {
    fn run(mut self) {
        let mut request = vec![0; 1 << 20];
        // ENODEV: the file system was unmounted.
        while let Ok(length) = self.device.read(&mut request) {
            let number = |at, size: usize| -> u64 {
                let bytes: &[u8] = &request[at..at + size];
                bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
            };
            // struct fuse_in_header: length, opcode, unique, node; 40 bytes in all.
            let (opcode, unique, node) = (number(4, 4), number(8, 8), number(16, 8));
            let body = &request[40..length];
            let answer: Result<Vec<u8>, Errno> = match opcode {
                // FORGET, INTERRUPT, BATCH_FORGET: the kernel expects no answer.
                2 | 36 | 42 => continue,
                // INIT: version 7.31, no flags, writes of 4096 bytes.
                26 => Ok(words(&[7, 31, 0, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
                // LOOKUP
                1 if body == [&self.name[..], b"\0"].concat() => {
                    let entry = [&FILE.to_le_bytes()[..], &[0; 32]].concat();
                    Ok([entry, self.attributes(FILE)].concat())
                }
                1 => Err(Errno::NOENT),
                // GETATTR
                3 => Ok([vec![0; 16], self.attributes(node)].concat()),
                // OPEN, OPENDIR
                14 | 27 => Ok(vec![0; 16]),
                // READ: handle, offset, size
                15 => {
                    let (offset, size) = (number(48, 8) as usize, number(56, 4) as usize);
                    let rest = self.content.get(offset..).unwrap_or_default();
                    Ok(rest[..size.min(rest.len())].to_vec())
                }
                // READDIR
                28 => Ok(directory_entry(&self.name, number(48, 8))),
                // IOCTL: handle, flags, command. A directory fails as on a file system with fs-verity.
                39 if number(52, 4) == 0xc004_6686 && node == FILE => {
                    Ok([&[0; 16][..], &[1, 0, 32, 0], &self.digest].concat())
                }
                39 if number(52, 4) == 0xc004_6686 => Err(Errno::NODATA),
                // FLUSH, RELEASE, RELEASEDIR, DESTROY
                25 | 18 | 29 | 38 => Ok(vec![]),
                _ => Err(Errno::NOSYS),
            };
            let (error, content) = match answer {
                Ok(content) => (0, content),
                Err(errno) => (-errno.raw_os_error(), vec![]),
            };
            // struct fuse_out_header
            let length = (16 + content.len()) as u32;
            let header = [&length.to_le_bytes()[..], &error.to_le_bytes(), &unique.to_le_bytes()];
            let _ = self.device.write(&[&header.concat()[..], &content].concat());
        }
    }

    /// Returns the struct fuse_attr of a node.
    fn attributes(&self, node: u64) -> Vec<u8> {
        let (size, mode) = match node {
            FILE => (self.content.len() as u64, 0o100_644),
            _ => (0, 0o40_755),
        };
        let times = [node, size, size.div_ceil(512), 0, 0, 0];
        let longs = times.iter().flat_map(|long| long.to_le_bytes());
        longs.chain(words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])).collect()
    }
}

/// Returns the struct fuse_dirent of the file, if the directory is read from its start.
fn directory_entry(name: &[u8], offset: u64) -> Vec<u8> {
    const DT_REG: u32 = 8;
    if offset != 0 {
        return vec![];
    }
    let mut entry = [FILE.to_le_bytes(), 1u64.to_le_bytes()].concat();
    entry.extend(words(&[name.len() as u32, DT_REG]));
    entry.extend(name);
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
