//! What the tests with real mounts share: a mount namespace and a directory of their own, and what
//! can be seen of mounts.
#![allow(dead_code, unused_imports)] // Each test binary uses a part of it.

mod manifest;
pub mod refusals;
pub mod visible;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use sealmount::{Digest, MountOptions, Verity};

pub use manifest::{assert_has_hard_link, assert_is_manifest, assert_is_manifest_mapped};
pub use visible::{Mount, loop_devices, mount_at, mounts};

/// Setting this variable lets the tests that need root pass without running.
const SKIP: &str = "SEALMOUNT_SKIP_ROOT_TESTS";

/// The two images of the manifest's tree.
pub const V1: Fixture = Fixture { name: "v1", digest: manifest::V1_DIGEST };
pub const V2: Fixture = Fixture { name: "v2-sha512", digest: manifest::V2_DIGEST };

pub struct Fixture {
    name: &'static str,
    pub digest: &'static str,
}

impl Fixture {
    fn directory(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images").join(self.name)
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

/// A directory, and a mount namespace for this thread and the processes that it starts.
pub struct Sandbox {
    directory: tempfile::TempDir,
}

impl Sandbox {
    /// `None`: skipped, because the variable above allows it.
    pub fn new() -> Option<Sandbox> {
        if !rustix::process::geteuid().is_root() {
            assert!(
                std::env::var_os(SKIP).is_some(),
                "this test mounts, which takes root: run it as root, or set {SKIP} to skip it",
            );
            return None;
        }
        sealmount_sys::unshare_mount_namespace().unwrap();
        sealmount_sys::mount_setattr_private().unwrap();
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Some(Sandbox { directory })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A new empty directory.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        path
    }

    /// A file of this content.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// A new file system in memory.
    pub fn tmpfs(&self, name: &str) -> PathBuf {
        let path = self.directory(name);
        run("mount", ["-t", "tmpfs", "tmpfs", path.to_str().unwrap()]);
        path
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // What the test left mounted, the last one first.
        for mount in mounts().iter().rev() {
            if mount.mount_point.starts_with(self.directory.path()) {
                let _ = unmount(&mount.mount_point, UnmountFlags::DETACH);
            }
        }
    }
}

/// Runs a program that must succeed; returns what it printed.
pub fn run<S: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = S>,
) -> String {
    let mut command = Command::new(program);
    let output = command.args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Unmounts what nobody uses. A process that another test is starting at this moment holds, until it
/// executes its program, a copy of every descriptor there is.
pub fn umount(mount_point: &Path) {
    for _ in 0..500 {
        match unmount(mount_point, UnmountFlags::empty()) {
            Err(Errno::BUSY) => std::thread::sleep(Duration::from_millis(20)),
            result => return result.unwrap(),
        }
    }
    panic!("{} is in use", mount_point.display());
}

/// The same with umount(8), which may be given a mount's source too.
pub fn umount_8(target: &Path) {
    for _ in 0..500 {
        let output = Command::new("umount").arg(target).env("LC_ALL", "C").output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        if !message.contains("target is busy") {
            assert!(output.status.success(), "umount {}: {output:?}", target.display());
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{} is in use", target.display());
}

/// What a program makes of these bytes.
pub fn through(program: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program[0])
        .args(&program[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program[0]));
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success());
    output.stdout
}

/// Runs the helper.
pub fn mount_composefs<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mount-composefs")).args(arguments).output().unwrap()
}

/// The kernel lets go of a loop device a moment after the last use.
pub fn assert_no_loop_device(text: &str) {
    for _ in 0..200 {
        if loop_devices(text).is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("still in use: {:?}", loop_devices(text));
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

/// A user namespace that maps 0 to 100000 and so on, and the process that holds it until its
/// standard input is closed.
pub fn user_namespace() -> (Child, String) {
    let mut process = Command::new("unshare")
        .args(["--user", "sh", "-c", "echo; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    process.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{map}", process.id()), "0 100000 65536").unwrap();
    }
    let namespace = format!("/proc/{}/ns/user", process.id());
    (process, namespace)
}
