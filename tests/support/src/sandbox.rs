//! A mount namespace and a directory for each test with real mounts.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};

use crate::mountinfo::mounts;
use crate::programs::run;

/// With this variable, tests that need root pass without running.
const SKIP: &str = "SEALMOUNT_SKIP_ROOT_TESTS";

/// A directory, and a mount namespace with an empty /run, for the calling thread and the processes that the
/// thread starts.
pub struct Sandbox {
    directory: tempfile::TempDir,
}

impl Sandbox {
    /// Makes a sandbox with a new directory in `parent`. Returns `None` if the process lacks root and
    /// the variable allows the caller to skip the test.
    pub fn new(parent: &Path) -> Option<Sandbox> {
        if !rustix::process::geteuid().is_root() {
            assert!(
                std::env::var_os(SKIP).is_some(),
                "this test mounts, which needs root: run it as root, or set {SKIP} to skip it",
            );
            return None;
        }
        sealmount_sys::unshare_mount_namespace().unwrap();
        sealmount_sys::mount_setattr_private().unwrap();
        // The helper and mount(8) write to /run.
        run("mount", ["-n", "-t", "tmpfs", "tmpfs", "/run"]);
        let directory = tempfile::tempdir_in(parent).unwrap();
        Some(Sandbox { directory })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes an empty directory.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        path
    }

    /// Makes a file with this content.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Installs the mount helper as /sbin/mount.composefs, in the mount namespace of the sandbox.
    pub fn install_helper(&self, helper: &Path) {
        let (upper, work) = (self.directory("sbin"), self.directory("sbin.work"));
        fs::copy(helper, upper.join("mount.composefs")).unwrap();
        let sbin = fs::canonicalize("/sbin").unwrap();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            sbin.display(),
            upper.display(),
            work.display(),
        );
        run("mount", ["-t", "overlay", "-o", &options, "overlay", sbin.to_str().unwrap()]);
    }

    /// Makes a directory and mounts a new tmpfs there.
    pub fn tmpfs(&self, name: &str) -> PathBuf {
        let path = self.directory(name);
        run("mount", ["-t", "tmpfs", "tmpfs", path.to_str().unwrap()]);
        path
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Unmounts the mounts that the test left, the newest first.
        for mount in mounts().iter().rev() {
            if mount.mount_point.starts_with(self.directory.path()) {
                let _ = unmount(&mount.mount_point, UnmountFlags::DETACH);
            }
        }
    }
}
