//! Checks objects with fs-verity: a read returns the content that the image was made of, or an error.

use super::fixtures::{self, Fixture, V1, V2};
use super::machines::{ERASED, STANDARD};
use super::mounted::{self, MEMORIES, Mounted, TREE, Traces, with_copy, with_digest, with_verity};
use super::probe;
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use sealmount::{
    Algorithm, Digest, Error as MountError, ErrorKind, MountOptions, ObjectVerity, OverlayError,
    VerifiedBy, Verity, VerityUnavailable,
};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "verity_on_ext4_is_enforced_or_rejected",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| enforced(guest, "ext4-verity"),
    },
    Scenario {
        name: "verity_on_btrfs_is_enforced_or_rejected",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| enforced(guest, "btrfs"),
    },
    Scenario {
        name: "verity_rejects_bad_objects_on_ext4",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| bad_objects(guest, "ext4-verity"),
    },
    Scenario {
        name: "verity_rejects_bad_objects_on_btrfs",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: |guest| bad_objects(guest, "btrfs"),
    },
    Scenario {
        name: "verity_rejects_objects_of_sampled_files",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: verity_rejects_objects_of_sampled_files,
    },
    Scenario {
        name: "verity_reports_damaged_disk_on_read",
        machine: &ERASED,
        time_limit: Scenario::TIME_LIMIT,
        run: verity_reports_damaged_disk_on_read,
    },
    Scenario {
        name: "verity_result_is_reported_by_helper",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: verity_result_is_reported_by_helper,
    },
];

/// Returns whether objects of the image can have fs-verity on a disk that [`fixtures::fill`] filled. If
/// not, checks that sealmount rejects `verity`.
pub fn can_verify(fixture: &Fixture, disk: &Path) -> Result<bool, Error> {
    let algorithm = fixture.digest()?.algorithm();
    if probe::fs_verity(disk, algorithm)? {
        return Ok(true);
    }
    println!("{algorithm} fs-verity is not supported on {}", disk.display());
    let none = MountOptions::new(fixture.objects_in(disk));
    match mounted::mount(&with_verity(&none, Verity::Require), &fixture.image_in(disk))? {
        Err(MountError::Overlay(OverlayError::ObjectsVerityUnavailable { .. })) => Ok(false),
        other => {
            Err(format!("a mount with verity but without fs-verity returned {other:?}").into())
        }
    }
}

/// Mounts a disk and returns the images whose objects can have fs-verity there. If the kernel lacks the
/// file system, returns no images.
fn verifiable(guest: &Guest, disk: &str) -> Result<(PathBuf, Vec<&'static Fixture>), Error> {
    let mut fixtures = Vec::new();
    let Some(disk) = fixtures::mount_each(guest, &[disk])?.pop() else {
        return Ok((PathBuf::new(), fixtures));
    };
    for fixture in [&V1, &V2] {
        if can_verify(fixture, &disk)? {
            fixtures.push(fixture);
        }
    }
    Ok((disk, fixtures))
}

/// With `verity` or `digest=`, sealmount mounts a verified tree or rejects the mount. With `tryverity`,
/// sealmount mounts the tree and reports whether it is verified.
fn enforced(guest: &mut Guest, disk: &str) -> Result<(), Error> {
    let (disk, fixtures) = verifiable(guest, disk)?;
    let can_enforce = probe::overlayfs()?.verity;
    let place = disk.join("enforced");
    for fixture in fixtures {
        fixture.copy_with_verity(&disk, &place)?;
        let image = fixture.image_in(&place);
        let none = MountOptions::new(fixture.objects_in(&place));
        let [memfd, ramfs] = MEMORIES.map(|memory| with_copy(&none, memory));
        let digest = fixture.digest()?;
        fixtures::enable_verity(&image, digest.algorithm())?;
        let unverified = fixture.image_in(&disk);
        for (options, image, verified_by) in [
            (with_verity(&none, Verity::Require), &unverified, None),
            (with_digest(&none, digest), &image, Some(VerifiedBy::Kernel)),
            (with_digest(&memfd, digest), &unverified, Some(VerifiedBy::Userspace)),
            (with_digest(&ramfs, digest), &unverified, Some(VerifiedBy::Userspace)),
        ] {
            let before = Traces::now()?;
            let mounted = mounted::mount(&options, image)?;
            if can_enforce {
                let mounted = mounted?;
                assert_eq!(mounted.verity, Some(ObjectVerity::Enforced));
                assert_eq!(mounted.verified_by(), verified_by);
                mounted.assert_shows(fixture);
                mounted.unmount()?;
            } else {
                assert_names_first_kernel(mounted.err());
            }
            before.assert_same_now()?;
        }

        let mounted = mounted::mount(&with_verity(&none, Verity::Try), &image)??;
        let expected = match can_enforce {
            true => ObjectVerity::Enforced,
            false => ObjectVerity::UnsupportedByOverlay,
        };
        assert_eq!(mounted.verity, Some(expected));
        mounted.assert_shows(fixture);
        mounted.unmount()?;
    }
    Ok(())
}

fn assert_names_first_kernel(error: Option<MountError>) {
    let Some(MountError::Overlay(error @ OverlayError::VerityUnsupported)) = error else {
        panic!("{error:?}")
    };
    assert_eq!(error.kind(), ErrorKind::VerityUnavailable);
    assert!(error.to_string().contains("Linux 6.6"), "{error}");
    let hint = error.hint();
    assert!(hint.is_some_and(|hint| hint.for_options().contains("verity=try")), "{hint:?}");
}

/// A change of an object.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Harm {
    /// The object has the right content, but no fs-verity.
    WithoutVerity,
    /// The object has the content of another object, and fs-verity.
    OtherContent,
    Missing,
}

impl Harm {
    /// Returns the errno with which overlayfs fails when the file is opened. overlayfs checks nothing
    /// earlier.
    fn errno(self) -> Errno {
        match self {
            Harm::WithoutVerity | Harm::OtherContent => Errno::IO,
            Harm::Missing => Errno::NOENT,
        }
    }

    /// Changes an object. `other` is another object.
    fn apply(self, object: &Path, other: &Path, algorithm: Algorithm) -> Result<(), Error> {
        let content = fs::read(object)?;
        fs::remove_file(object)?;
        match self {
            Harm::WithoutVerity => fs::write(object, &content)?,
            Harm::OtherContent => {
                fs::copy(other, object)?;
                fixtures::enable_verity(object, algorithm)?;
            }
            Harm::Missing => {}
        }
        Ok(())
    }

    /// Checks that sealmount rejected the mount, and that the error names this change of this object.
    fn assert_rejected(self, error: Option<MountError>, object: &Path) {
        let Some(MountError::Overlay(error)) = error else {
            panic!("{} {self:?} {error:?}", object.display())
        };
        let is_expected = match (self, &error) {
            (
                Harm::WithoutVerity,
                OverlayError::ObjectsVerityUnavailable {
                    path,
                    reason: VerityUnavailable::NotEnabled,
                    ..
                },
            )
            | (Harm::OtherContent, OverlayError::ObjectMismatch { path, .. }) => path == object,
            (Harm::Missing, OverlayError::ObjectMissing { object: missing, .. }) => {
                object.ends_with(missing)
            }
            _ => false,
        };
        assert!(is_expected, "{} {self:?} {error:?}", object.display());
    }
}

/// Checks that only files with the content of the changed object return an error, or that sealmount rejects
/// the object.
///
/// At mount time, sealmount samples the first objects and detects only missing fs-verity. So the scenario
/// changes the first object, then the last object. sealmount also reads the files of [`SAMPLED`], and
/// detects every change of their objects. With `tryverity`, sealmount mounts without fs-verity and reports
/// the reason.
fn bad_objects(guest: &mut Guest, disk: &str) -> Result<(), Error> {
    let (disk, fixtures) = verifiable(guest, disk)?;
    let can_enforce = probe::overlayfs()?.verity;
    for fixture in fixtures {
        let algorithm = fixture.digest()?.algorithm();
        for harm in [Harm::WithoutVerity, Harm::OtherContent, Harm::Missing] {
            for is_first in [true, false] {
                let place = disk.join(format!("{harm:?}-{is_first}"));
                fixture.copy_with_verity(&disk, &place)?;
                let objects = fixtures::objects(&fixture.objects_in(&place))?;
                let number = if is_first { 0 } else { objects.len() - 1 };
                let (object, other) = (&objects[number], &objects[objects.len() / 2]);
                let content = fs::read(object)?;
                harm.apply(object, other, algorithm)?;
                let none = MountOptions::new(fixture.objects_in(&place));
                let verity = with_verity(&none, Verity::Require);
                let before = Traces::now()?;
                let mounted = mounted::mount(&verity, &fixture.image_in(&place))?;
                if harm == Harm::WithoutVerity && is_first {
                    assert_not_enabled(mounted.err(), object);
                    let verity = with_verity(&none, Verity::Try);
                    let mounted = mounted::mount(&verity, &fixture.image_in(&place))??;
                    let reason = VerityUnavailable::NotEnabled;
                    let expected = ObjectVerity::UnsupportedByObjects(reason);
                    assert_eq!(mounted.verity, Some(expected));
                    mounted.assert_shows(fixture);
                    mounted.unmount()?;
                } else if can_enforce && is_sampled(&content) {
                    harm.assert_rejected(mounted.err(), object);
                } else if can_enforce {
                    let mounted = mounted?;
                    assert_eq!(mounted.verity, Some(ObjectVerity::Enforced));
                    assert_only_unreadable(mounted, fixture, &disk, &content, harm.errno())
                        .context(|| format!("{} {harm:?} {is_first}", fixture.name))?;
                } else {
                    assert_names_first_kernel(mounted.err());
                }
                before.assert_same_now()?;
            }
        }
    }
    Ok(())
}

/// The files of both images that sealmount reads before it hands over a mount with verity, and their sizes.
const SAMPLED: [(&str, usize); 4] =
    [("data/4096", 4096), ("data/4097", 4097), ("data/65", 65), ("data/70000", 70000)];

/// A file that sealmount does not sample. No sampled file has its content.
pub const NOT_SAMPLED: &str = "usr/bin/tool";

fn is_sampled(content: &[u8]) -> bool {
    SAMPLED.iter().any(|(_, size)| *size == content.len())
}

/// Changes the object of a sampled file that is not a sampled object. Only the read through the mount
/// detects the change.
fn verity_rejects_objects_of_sampled_files(guest: &mut Guest) -> Result<(), Error> {
    let (disk, fixtures) = verifiable(guest, "ext4-verity")?;
    if !probe::overlayfs()?.verity {
        println!("overlayfs does not support verity=require");
        return Ok(());
    }
    for fixture in fixtures {
        let algorithm = fixture.digest()?.algorithm();
        for harm in [Harm::WithoutVerity, Harm::OtherContent, Harm::Missing] {
            let place = disk.join(format!("sampled-{harm:?}"));
            fixture.copy_with_verity(&disk, &place)?;
            let objects = fixtures::objects(&fixture.objects_in(&place))?;
            let is_file = |object: &&PathBuf| fs::read(object).is_ok_and(|read| is_sampled(&read));
            let object = objects[4..]
                .iter()
                .find(is_file)
                .ok_or("all sampled files have sampled objects")?;
            let content = fs::read(object)?;
            harm.apply(object, &objects[0], algorithm)?;

            let none = MountOptions::new(fixture.objects_in(&place));
            let image = fixture.image_in(&place);
            let before = Traces::now()?;
            let mounted = mounted::mount(&with_verity(&none, Verity::Require), &image)?;
            harm.assert_rejected(mounted.err(), object);
            before.assert_same_now()?;

            let mounted = mounted::mount(&with_verity(&none, Verity::Try), &image)??;
            if harm == Harm::WithoutVerity {
                let reason = VerityUnavailable::NotEnabled;
                assert_eq!(mounted.verity, Some(ObjectVerity::UnsupportedByObjects(reason)));
                mounted.assert_shows(fixture);
                mounted.unmount()?;
            } else {
                assert_eq!(mounted.verity, Some(ObjectVerity::Enforced));
                assert_only_unreadable(mounted, fixture, &disk, &content, harm.errno())?;
            }
            before.assert_same_now()?;
        }
    }
    Ok(())
}

/// Changes a bit of an object on the disk, below the file system. fs-verity detects the change when the
/// object is read, even if overlayfs does not check objects.
fn verity_reports_damaged_disk_on_read(guest: &mut Guest) -> Result<(), Error> {
    let whole = fixtures::mount_objects(guest, "ext4")?;
    let (disk, fixtures) = verifiable(guest, "ext4-verity")?;
    if fixtures.is_empty() {
        return Ok(());
    }
    let place = disk.join("damaged");
    for fixture in &fixtures {
        fixture.copy_with_verity(&disk, &place)?;
    }
    // Both images have the same contents.
    let objects = fixtures::objects(&V1.objects_in(&place))?;
    let content = fs::read(objects.last().ok_or("the image has no objects")?)?;
    unmount(&disk, UnmountFlags::empty())?;
    let start = &content[..content.len().min(4096)];
    let device = File::options().read(true).write(true).open(guest.disk("ext4-verity")?)?;
    let (mut block, mut damaged) = ([0; 4096], 0);
    for offset in (0..).step_by(block.len()) {
        if device.read_at(&mut block, offset)? < block.len() {
            break;
        }
        if block.starts_with(start) {
            device.write_all_at(&[block[0] ^ 1], offset)?;
            damaged += 1;
        }
    }
    // The disk has the object of each image, and copies with fs-verity.
    assert_eq!(damaged, 2 + fixtures.len());
    device.sync_all()?;

    fixtures::mount_objects(guest, "ext4-verity")?;
    for fixture in fixtures {
        let none = MountOptions::new(fixture.objects_in(&place));
        let options = with_verity(&none, Verity::Try);
        let mounted = mounted::mount(&options, &fixture.image_in(&place))??;
        assert_only_unreadable(mounted, fixture, &whole, &content, Errno::IO)?;
    }
    Ok(())
}

fn assert_not_enabled(error: Option<MountError>, object: &Path) {
    match error {
        Some(MountError::Overlay(OverlayError::ObjectsVerityUnavailable {
            path,
            reason: VerityUnavailable::NotEnabled,
            ..
        })) if path == object => {}
        _ => panic!("{} {error:?}", object.display()),
    }
}

/// Checks that all files match a mount with `whole` objects. Only files with this content return an error.
fn assert_only_unreadable(
    mounted: Mounted,
    fixture: &Fixture,
    whole: &Path,
    content: &[u8],
    errno: Errno,
) -> Result<(), Error> {
    let found = contents()?;
    mounted.unmount()?;
    let mounted =
        mounted::mount(&MountOptions::new(fixture.objects_in(whole)), &fixture.image_in(whole))??;
    let whole = contents()?;
    mounted.unmount()?;
    assert_only_harmed(&found, whole, content, errno);
    Ok(())
}

/// Checks that the contents match a whole tree. Only files with this content return an error.
pub fn assert_only_harmed(found: &Contents, whole: Contents, content: &[u8], errno: Errno) {
    let mut expected = whole;
    let mut harmed = 0;
    for read in expected.values_mut().filter(|read| read.as_deref() == Ok(content)) {
        *read = Err(errno);
        harmed += 1;
    }
    assert!(harmed > 0, "no file has the content");
    let names = |tree: &Contents| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(&expected));
    for (path, read) in &expected {
        let sizes = |read: &Result<Vec<u8>, Errno>| read.as_ref().map(Vec::len).map_err(|e| *e);
        let both = (sizes(&found[path]), sizes(read));
        assert!(found[path] == *read, "{}: {both:?}", path.display());
    }
}

pub type Contents = BTreeMap<PathBuf, Result<Vec<u8>, Errno>>;

/// Reads every regular file of the mounted tree twice, because a file that fails once must fail again.
pub fn contents() -> Result<Contents, Error> {
    let read = |path: &Path| {
        fs::read(path).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::PROTO))
    };
    let mut contents = Contents::new();
    let mut directories = vec![PathBuf::from(TREE)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            if kind.is_dir() {
                directories.push(path);
            } else if kind.is_file() {
                let content = read(&path);
                assert!(content == read(&path), "{}", path.display());
                contents.insert(path, content);
            }
        }
    }
    Ok(contents)
}

/// Checks the messages and the exit status of the mount helper for the same options.
fn verity_result_is_reported_by_helper(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    if !can_verify(&V1, &disk)? {
        return Ok(());
    }
    let can_enforce = probe::overlayfs()?.verity;
    let place = disk.join("helper");
    V1.copy_with_verity(&disk, &place)?;
    let image = V1.image_in(&place);
    let basedir = format!("basedir={}", V1.objects_in(&place).display());
    let run = |options: &str| -> Result<(Option<i32>, String), Error> {
        let before = Traces::now()?;
        let options = format!("{basedir},{options}");
        let (status, text) = mounted::mount_with_helper(&image, &["-v", "-o", &options])?;
        if status == Some(0) {
            test_support::manifest::assert_is_manifest(Path::new(TREE));
            unmount(TREE, UnmountFlags::empty())?;
        }
        before.assert_same_now()?;
        Ok((status, text))
    };

    fixtures::enable_verity(&image, V1.digest()?.algorithm())?;
    let digest = format!("digest={}", V1.digest);
    for options in ["verity", &digest, &format!("copy,{digest}")] {
        let (status, text) = run(options)?;
        let (expected, words) = match can_enforce {
            true => (0, "objects are verified when they are read (verity=require)"),
            false => (32, "cannot enforce verity: verity=require needs Linux 6.6\n  hint: "),
        };
        assert_eq!(status, Some(expected), "{text}");
        assert!(text.contains(words), "{text}");
    }
    let (status, text) = run("tryverity")?;
    let words = match can_enforce {
        true => "objects are verified when they are read (verity=require)",
        false => {
            "objects are not verified when they are read: this kernel's overlayfs does not support \
             verity=require"
        }
    };
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains(words), "{text}");

    // The object has a correct name. The name is the digest, but proves nothing about fs-verity.
    let object = &fixtures::objects(&V1.objects_in(&place))?[0];
    let content = fs::read(object)?;
    let digest = Digest::of_bytes(V1.digest()?.algorithm(), &content).to_string();
    assert!(object.ends_with(format!("{}/{}", &digest[..2], &digest[2..])), "{digest}");
    fs::remove_file(object)?;
    fs::write(object, content)?;
    let (status, text) = run("verity")?;
    assert_eq!(status, Some(32), "{text}");
    let words = format!("{}: cannot enforce verity: fs-verity is not enabled", object.display());
    assert!(text.contains(&words), "{text}");
    Ok(())
}
