//! A mount as the scenarios look at it, and what a mount that is gone or was refused must not leave.

use super::fixtures::{Fixture, HELPER, V2};
use crate::{Context, Error};
use rustix::mount::{UnmountFlags, unmount};
use sealmount::{Digest, Memory, MountOptions, ObjectVerity, Step, VerifiedBy, Verity};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use test_support::manifest::{ROOT, assert_has_hard_link, assert_is_manifest, assert_root_is};
use test_support::mountinfo::{self, Mount};

/// Where they are mounted, if one is enough.
pub const TREE: &str = "/tree";

/// The kinds of memory that an image can be copied to.
pub const MEMORIES: [Memory; 2] = [Memory::Memfd, Memory::Ramfs];

/// A mount, and what the library told of it.
#[derive(Debug)]
pub struct Mounted {
    root: PathBuf,
    pub steps: Vec<Step>,
    pub verity: ObjectVerity,
}

/// Mounts an image on [`TREE`]. The outer error is the scenario's.
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
    let mut steps = Vec::new();
    let mount = options.mount_with(image, &mut |step| {
        println!("  {step}");
        steps.push(step);
    });
    Ok(match mount {
        Ok(mount) => {
            let verity = mount.verity();
            mount.attach(root).map(|()| Mounted { root: root.to_owned(), steps, verity })
        }
        Err(error) => {
            println!("  {error}");
            Err(error)
        }
    })
}

impl Mounted {
    /// Who found out that the image has the digest asked for.
    pub fn verified_by(&self) -> Option<VerifiedBy> {
        self.steps.iter().find_map(|step| match step {
            Step::DigestVerified { by, .. } => Some(*by),
            _ => None,
        })
    }

    /// Of a mount without upper layer.
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

pub fn with_copy(options: &MountOptions, memory: Memory) -> MountOptions {
    let mut options = options.clone();
    options.copy = Some(memory);
    options
}

pub fn with_verity(options: &MountOptions, verity: Verity) -> MountOptions {
    let mut options = options.clone();
    options.verity = Some(verity);
    options
}

pub fn with_digest(options: &MountOptions, digest: Digest) -> MountOptions {
    let mut options = options.clone();
    options.digest = Some(digest);
    options
}

/// What the helper printed on standard error, and its exit status.
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

/// What a mount takes that outlasts it if somebody is careless.
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

    /// That nothing came or went since. The kernel lets go of a loop device a moment after its last
    /// use.
    pub fn assert_same_now(&self) -> Result<(), Error> {
        let started = Instant::now();
        while *self != Traces::now()? && started.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(*self, Traces::now()?);
        Ok(())
    }
}
