//! Mounts images for the scenarios, checks the mounts, and finds traces that a removed or failed mount
//! left.

use super::fixtures::{Fixture, HELPER, V2};
use crate::{Context, Error};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use sealmount::{
    Digest, Event, MemoryKind, MountOptions, ObjectVerity, Operation, VerifiedBy, Verity,
};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use test_support::manifest::{ROOT, assert_has_hard_link, assert_is_manifest, assert_root_is};
use test_support::mountinfo::{self, Mount};

/// The mount point of scenarios that need only one mount point.
pub const TREE: &str = "/tree";

/// The kinds of memory for copies of an image.
pub const MEMORIES: [MemoryKind; 2] = [MemoryKind::Memfd, MemoryKind::Ramfs];

/// A mount and the events of the library.
#[derive(Debug)]
pub struct Mounted {
    root: PathBuf,
    /// All events except progress.
    pub events: Vec<Event>,
    pub verity: Option<ObjectVerity>,
}

/// Mounts an image on [`TREE`]. The outer error means that the scenario itself failed.
pub fn mount(
    options: &MountOptions,
    image: &Path,
) -> Result<Result<Mounted, sealmount::Error>, Error> {
    mount_on(options, image, Path::new(TREE))
}

pub fn mount_on(
    options: &MountOptions,
    image: &Path,
    root: &Path,
) -> Result<Result<Mounted, sealmount::Error>, Error> {
    fs::create_dir_all(root)?;
    println!("{}: {}", image.display(), options.to_text().display());
    let mut events = Vec::new();
    let mount = options.mount_with_events(image, &mut |event| {
        if !matches!(event, Event::Copying(_) | Event::Checking(_)) {
            println!("  {event}");
            events.push(event);
        }
        ControlFlow::Continue(())
    });
    Ok(match mount {
        Ok(mount) => {
            let verity = mount.verity();
            let root = root.to_owned();
            mount.attach(&root).map(|()| Mounted { root, events, verity }).map_err(Into::into)
        }
        Err(error) => {
            println!("  {error}");
            Err(error)
        }
    })
}

/// Returns whether `error` reports this failed system call.
pub fn is_failure(error: &sealmount::Error, operation: Operation, errno: Errno) -> bool {
    let found = error.kernel().map(|error| (error.operation(), error.raw_os_error()));
    found == Some((operation, errno.raw_os_error()))
}

impl Mounted {
    /// Returns whether the kernel or sealmount computed the digest of the image.
    pub fn verified_by(&self) -> Option<VerifiedBy> {
        self.events.iter().find_map(|event| match event {
            Event::DigestVerified { by, .. } => Some(*by),
            _ => None,
        })
    }

    /// Checks the tree of a mount without an upper layer.
    pub fn assert_shows(&self, fixture: &Fixture) {
        assert_is_manifest(&self.root);
        assert_root_is(&self.root, ROOT);
        if fixture.name == V2.name {
            assert_has_hard_link(&self.root);
        }
    }

    pub fn unmount(self) -> Result<(), Error> {
        let root = self.root;
        unmount(&root, UnmountFlags::empty())
            .context(|| format!("cannot unmount {}", root.display()))
    }
}

pub fn with_copy(options: &MountOptions, memory: MemoryKind) -> MountOptions {
    let mut options = options.clone();
    options.copy = Some(memory);
    options
}

pub fn with_verity(options: &MountOptions, verity: Verity) -> MountOptions {
    let mut options = options.clone();
    options.overlay.verity = Some(verity);
    options
}

pub fn with_digest(options: &MountOptions, digest: Digest) -> MountOptions {
    let mut options = options.clone();
    options.digest = Some(digest);
    options
}

/// Runs the helper. Returns its exit status and its standard error.
pub fn mount_with_helper(image: &Path, arguments: &[&str]) -> Result<(Option<i32>, String), Error> {
    fs::create_dir_all(TREE)?;
    let output = Command::new(HELPER)
        .args([image, Path::new(TREE)])
        .args(arguments)
        .output()
        .context(|| format!("cannot execute {HELPER}"))?;
    let text = String::from_utf8(output.stderr)?;
    print!("{} {arguments:?}: {:?}\n{text}", image.display(), output.status);
    Ok((output.status.code(), text))
}

/// The resources of a mount that a bug could leave behind.
#[derive(Debug, PartialEq)]
pub struct Traces {
    mounts: Vec<Mount>,
    loop_devices: Vec<String>,
    open_files: usize,
}

impl Traces {
    pub fn now() -> Result<Traces, Error> {
        Ok(Traces {
            mounts: mountinfo::mounts(),
            loop_devices: mountinfo::loop_devices(""),
            open_files: fs::read_dir("/proc/self/fd")?.count(),
        })
    }

    /// Checks that the resources are unchanged. Waits, because the kernel releases a loop device
    /// shortly after its last use.
    pub fn assert_same_now(&self) -> Result<(), Error> {
        let started = Instant::now();
        while *self != Traces::now()? && started.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(*self, Traces::now()?);
        Ok(())
    }
}
