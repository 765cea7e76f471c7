//! Provides the images that the scenarios mount, their objects and user namespaces.

use crate::binaries::Binaries;
use crate::files::{copy_tree, read};
use crate::machine::Format;
use crate::scenario::Guest;
use crate::{Context, Error};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use sealmount::{Algorithm, Digest};
use sealmount_sys::fsverity;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use test_support::manifest::{V1_DIGEST, V2_DIGEST};

/// One of the two bundled images. The methods expect its directory below a given directory.
#[derive(Debug)]
pub struct Fixture {
    pub name: &'static str,
    pub digest: &'static str,
}

pub const V1: Fixture = Fixture { name: "v1", digest: V1_DIGEST };
pub const V2: Fixture = Fixture { name: "v2-sha512", digest: V2_DIGEST };

impl Fixture {
    pub fn image_in(&self, directory: &Path) -> PathBuf {
        directory.join(self.name).join("image.cfs")
    }

    pub fn objects_in(&self, directory: &Path) -> PathBuf {
        directory.join(self.name).join("objects")
    }

    pub fn digest(&self) -> Result<Digest, Error> {
        Ok(self.digest.parse()?)
    }

    /// Copies the image and its objects to a new directory, and enables fs-verity on the copied
    /// objects.
    pub fn copy_with_verity(&self, from: &Path, to: &Path) -> Result<(), Error> {
        copy_tree(&from.join(self.name), &to.join(self.name))?;
        for object in objects(&self.objects_in(to))? {
            let algorithm = self.digest()?.algorithm();
            enable_verity(&object, algorithm)
                .context(|| format!("cannot enable {algorithm} fs-verity on {object:?}"))?;
        }
        Ok(())
    }
}

/// The path of the mount helper in the machines that have the helper.
pub const HELPER: &str = "/sbin/mount.composefs";

/// Returns the objects of a directory, in the order in which the kernel lists them.
pub fn objects(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let list = |directory: &Path| -> Result<Vec<PathBuf>, Error> {
        let entries = fs::read_dir(directory).context(|| directory.display().to_string())?;
        entries.map(|entry| Ok(entry?.path())).collect()
    };
    let mut objects = Vec::new();
    for prefix in list(directory)? {
        objects.extend(list(&prefix)?);
    }
    Ok(objects)
}

pub fn enable_verity(file: &Path, algorithm: Algorithm) -> Result<(), Errno> {
    let id = match algorithm {
        Algorithm::Sha256 => fsverity::HASH_ALG_SHA256,
        Algorithm::Sha512 => fsverity::HASH_ALG_SHA512,
        other => panic!("this scenario does not support {other}"),
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    fsverity::enable(rustix::fs::open(file, flags, Mode::empty())?, id)
}

/// Fills a disk or an initramfs with both images and their objects.
pub fn fill(_: &Binaries, directory: &Path) -> Result<(), Error> {
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/images");
    for fixture in [&V1, &V2] {
        copy_tree(&images.join(fixture.name), &directory.join(fixture.name))?;
    }
    Ok(())
}

/// Mounts a disk that [`fill`] filled, read-write.
pub fn mount_objects(guest: &Guest, disk: &str) -> Result<PathBuf, Error> {
    let format = match disk {
        "btrfs" => Format::Btrfs,
        "fat" => Format::Fat,
        _ => Format::Ext4,
    };
    guest.mount_disk(disk, format, MountFlags::empty())
}

/// Mounts each disk as [`mount_objects`] does, except disks whose file system the kernel lacks.
pub fn mount_each(guest: &Guest, disks: &[&str]) -> Result<Vec<PathBuf>, Error> {
    let mut mounted = Vec::new();
    for disk in disks {
        match *disk == "btrfs" && !guest.has_file_system("btrfs")? {
            true => println!("this kernel does not support btrfs"),
            false => mounted.push(mount_objects(guest, disk)?),
        }
    }
    Ok(mounted)
}

/// A user namespace, which ends when the value is dropped.
pub struct UserNamespace {
    process: Child,
}

impl UserNamespace {
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/user", self.process.id()))
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Creates a user namespace that maps ID 0 to `first_id`, and 65,535 more IDs in the same order.
pub fn user_namespace(first_id: u32) -> Result<UserNamespace, Error> {
    let what = || "cannot make a user namespace".into();
    let mut process = Command::new("/proc/self/exe")
        .arg("--user-namespace")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context(what)?;
    let mut ready = [0];
    process
        .stdout
        .as_mut()
        .ok_or("the process has no standard output")?
        .read_exact(&mut ready)
        .context(what)?;
    for map in ["uid_map", "gid_map"] {
        let path = format!("/proc/{}/{map}", process.id());
        fs::write(&path, format!("0 {first_id} 65536")).context(|| path.clone())?;
        read(&path)?;
    }
    Ok(UserNamespace { process })
}
