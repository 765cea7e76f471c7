//! Mounts with a digest: sealmount mounts the image only if the kernel or sealmount itself finds that the
//! image has this digest.

use super::fixtures::{self, Fixture, V1, V2};
use super::machines::{CONTENTS, STANDARD};
use super::mounted::{self, MEMORIES, Traces, with_copy, with_digest, with_verity};
use super::probe;
use crate::files::copy;
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::mount::MountFlags;
use sealmount::{
    Algorithm, Digest, Error as MountError, ErrorKind, Image, MemoryKind, MountOptions,
    SourceError, VerifiedBy, Verity, VerityUnavailable,
};
use std::fs;
use std::path::{Path, PathBuf};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "digest_with_fs_verity_uses_kernel",
        machine: &CONTENTS,
        time_limit: Scenario::TIME_LIMIT,
        run: digest_with_fs_verity_uses_kernel,
    },
    Scenario {
        name: "header_is_read_again_after_verification",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: header_is_read_again_after_verification,
    },
    Scenario {
        name: "digest_without_fs_verity_uses_copy",
        machine: &CONTENTS,
        time_limit: Scenario::TIME_LIMIT,
        run: digest_without_fs_verity_uses_copy,
    },
    Scenario {
        name: "digest_rejects_single_bit_change",
        machine: &CONTENTS,
        time_limit: Scenario::TIME_LIMIT,
        run: digest_rejects_single_bit_change,
    },
    Scenario {
        name: "digest_errors_are_reported_by_helper",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: digest_errors_are_reported_by_helper,
    },
];

const ALGORITHMS: [Algorithm; 2] = [Algorithm::Sha256, Algorithm::Sha512];

/// The directory of the images in the machine's initramfs, which is a tmpfs.
const INITRAMFS: &str = "/";

/// Returns options with a digest and `noverity`, which every kernel supports. These scenarios test only
/// the image.
fn options(fixture: &Fixture, objects: &Path, digest: Digest) -> MountOptions {
    let none = MountOptions::new(fixture.objects_in(objects));
    with_digest(&with_verity(&none, Verity::Off), digest)
}

/// Computes the digest of an image. For the algorithm of the fixture, checks the result against the
/// digest that other tools computed.
fn digest_of(fixture: &Fixture, algorithm: Algorithm, content: &[u8]) -> Result<Digest, Error> {
    let digest = Digest::of_bytes(algorithm, content);
    if fixture.digest()?.algorithm() == algorithm {
        assert_eq!(digest, fixture.digest()?);
    }
    Ok(digest)
}

fn differs_in_last_bit(digest: Digest) -> Digest {
    let mut other = digest;
    match &mut other {
        Digest::Sha256(bytes) => bytes[31] ^= 1,
        Digest::Sha512(bytes) => bytes[63] ^= 1,
        other => panic!("this scenario does not support {other:?}"),
    }
    other
}

fn assert_verified(
    options: &MountOptions,
    image: &Path,
    shows: &Fixture,
    by: VerifiedBy,
) -> Result<(), Error> {
    let mounted = mounted::mount(options, image)??;
    assert_eq!(mounted.verified_by(), Some(by));
    mounted.assert_shows(shows);
    mounted.unmount()
}

fn assert_mismatch(options: &MountOptions, image: &Path, is: Digest) -> Result<(), Error> {
    let before = Traces::now()?;
    let requested = options.digest.ok_or("the options have no digest")?;
    match mounted::mount(options, image)? {
        Err(MountError::Source(SourceError::DigestMismatch {
            expected,
            found,
            image: named,
            ..
        })) if (*expected, *found) == (requested, is) && named == image => {}
        other => {
            return Err(format!(
                "expected a mismatch of {requested} and {is}, but mount returned {other:?}"
            )
            .into());
        }
    }
    before.assert_same_now()
}

fn assert_unverified(
    options: &MountOptions,
    image: &Path,
    reason: VerityUnavailable,
) -> Result<(), Error> {
    let before = Traces::now()?;
    match mounted::mount(options, image)? {
        Err(MountError::Source(
            ref error @ SourceError::VerityUnavailable { image: ref named, reason: given, .. },
        )) if (named.as_path(), given) == (image, reason) => {
            assert_eq!(error.kind(), ErrorKind::VerityUnavailable);
            let hint = error.hint().ok_or("the error has no hint")?;
            assert!(hint.for_options().contains("add the option copy"), "{hint:?}");
        }
        other => return Err(format!("expected {reason:?}, but mount returned {other:?}").into()),
    }
    before.assert_same_now()
}

/// Returns the algorithms that fs-verity supports on a disk.
fn known_algorithms(disk: &Path) -> Result<Vec<Algorithm>, Error> {
    let mut known = Vec::new();
    for algorithm in ALGORITHMS {
        match probe::fs_verity(disk, algorithm)? {
            true => known.push(algorithm),
            false => println!("{algorithm} fs-verity is not supported on {}", disk.display()),
        }
    }
    Ok(known)
}

/// If the image has fs-verity, the kernel knows its digest, and sealmount does not hash the copy.
fn digest_with_fs_verity_uses_kernel(guest: &mut Guest) -> Result<(), Error> {
    for disk in fixtures::mount_each(guest, &["ext4-verity", "btrfs"])? {
        let known = known_algorithms(&disk)?;
        for (fixture, algorithm) in [&V1, &V2]
            .into_iter()
            .flat_map(|fixture| known.iter().map(move |algorithm| (fixture, *algorithm)))
        {
            let image = disk.join(format!("digest/{}.{algorithm}", fixture.name));
            copy(&fixture.image_in(&disk), &image)?;
            let content = fs::read(&image)?;
            fixtures::enable_verity(&image, algorithm)?;
            let digest = digest_of(fixture, algorithm, &content)?;
            let right = options(fixture, &disk, digest);
            let [memfd, ramfs] = MEMORIES.map(|memory| with_copy(&right, memory));
            for options in [right, memfd, ramfs] {
                assert_verified(&options, &image, fixture, VerifiedBy::Kernel)?;
            }
            let wrong = options(fixture, &disk, differs_in_last_bit(digest));
            assert_mismatch(&wrong, &image, digest)?;
            assert_mismatch(&with_copy(&wrong, MemoryKind::Memfd), &image, digest)?;

            for other in ALGORITHMS.into_iter().filter(|other| *other != algorithm) {
                let digest = digest_of(fixture, other, &content)?;
                let right = options(fixture, &disk, digest);
                assert_unverified(&right, &image, VerityUnavailable::OtherAlgorithm(other))?;
                let right = with_copy(&right, MemoryKind::Memfd);
                assert_verified(&right, &image, fixture, VerifiedBy::Userspace)?;
                let wrong = options(fixture, &disk, differs_in_last_bit(digest));
                assert_mismatch(&with_copy(&wrong, MemoryKind::Memfd), &image, digest)?;
            }
        }
    }
    Ok(())
}

/// The header of an opened image is not verified: the file may change until it has fs-verity. Here the flag
/// for ACLs does, without which EROFS is mounted with noacl.
fn header_is_read_again_after_verification(guest: &mut Guest) -> Result<(), Error> {
    for disk in fixtures::mount_each(guest, &["ext4-verity", "btrfs"])? {
        if !probe::fs_verity(&disk, Algorithm::Sha256)? {
            continue;
        }
        let right = fs::read(V1.image_in(&disk))?;
        let mut wrong = right.clone();
        assert_eq!(wrong[8], 1, "COMPOSEFS_HAS_ACL is set");
        wrong[8] = 0;
        let path = disk.join("header.cfs");
        fs::write(&path, &wrong)?;
        let image = Image::open(&path)?;
        fs::write(&path, &right)?;
        fixtures::enable_verity(&path, Algorithm::Sha256)?;
        let erofs = image.verify(V1.digest()?)?.mount()?;
        assert!(!erofs.report().noacl, "the header that was read first counts");
    }
    Ok(())
}

/// If the image has no fs-verity, sealmount hashes the copy. Without a copy the image is rejected.
fn digest_without_fs_verity_uses_copy(guest: &mut Guest) -> Result<(), Error> {
    let objects = fixtures::mount_objects(guest, "ext4")?;
    let tmpfs = tmpfs()?;
    for fixture in [&V1, &V2] {
        copy(&fixture.image_in(Path::new(INITRAMFS)), &fixture.image_in(&tmpfs))?;
    }
    let mut places = vec![
        (objects.clone(), VerityUnavailable::Unsupported),
        (fixtures::mount_objects(guest, "fat")?, VerityUnavailable::Unsupported),
        (tmpfs, VerityUnavailable::Unsupported),
        (INITRAMFS.into(), VerityUnavailable::Unsupported),
    ];
    for disk in fixtures::mount_each(guest, &["ext4-verity", "btrfs"])? {
        let reason = match known_algorithms(&disk)?.is_empty() {
            true => VerityUnavailable::Unsupported,
            false => VerityUnavailable::NotEnabled,
        };
        places.push((disk, reason));
    }
    for (place, reason) in &places {
        for fixture in [&V1, &V2] {
            let image = fixture.image_in(place);
            let content = fs::read(&image)?;
            for algorithm in ALGORITHMS {
                let digest = digest_of(fixture, algorithm, &content)?;
                let right = options(fixture, &objects, digest);
                assert_unverified(&right, &image, *reason)?;
                let wrong = options(fixture, &objects, differs_in_last_bit(digest));
                assert_unverified(&wrong, &image, *reason)?;
                for memory in MEMORIES {
                    let right = with_copy(&right, memory);
                    assert_verified(&right, &image, fixture, VerifiedBy::Userspace)?;
                    assert_mismatch(&with_copy(&wrong, memory), &image, digest)?;
                }
            }
        }
    }
    Ok(())
}

fn tmpfs() -> Result<PathBuf, Error> {
    let place = Path::new("/mnt/digest");
    fs::create_dir_all(place)?;
    rustix::mount::mount("tmpfs", place, "tmpfs", MountFlags::empty(), None)?;
    Ok(place.into())
}

/// EROFS mounts each of these damaged images. Only the digest protects against the changes.
fn digest_rejects_single_bit_change(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    let known = known_algorithms(&disk)?;
    let tmpfs = tmpfs()?;
    for fixture in [&V1, &V2] {
        let content = fs::read(fixture.image_in(&disk))?;
        for (place, offset) in places(&content)? {
            let mut damaged = content.clone();
            damaged[offset] ^= 1;
            for algorithm in ALGORITHMS {
                let requested = digest_of(fixture, algorithm, &content)?;
                let is = Digest::of_bytes(algorithm, &damaged);
                assert_ne!(is, requested);
                let options = options(fixture, &disk, requested);
                let name = format!("{}.{place}.{algorithm}", fixture.name);

                let image = tmpfs.join(&name);
                fs::write(&image, &damaged)?;
                for memory in MEMORIES {
                    assert_mismatch(&with_copy(&options, memory), &image, is)
                        .context(|| name.clone())?;
                }

                if !known.contains(&algorithm) {
                    continue;
                }
                let image = disk.join("digest").join(&name);
                fs::create_dir_all(disk.join("digest"))?;
                fs::write(&image, &damaged)?;
                fixtures::enable_verity(&image, algorithm)?;
                assert_mismatch(&options, &image, is).context(|| name.clone())?;
                let copy = with_copy(&options, MemoryKind::Memfd);
                assert_mismatch(&copy, &image, is).context(|| name)?;
            }
        }
    }
    Ok(())
}

/// Returns the offset of one byte in each part of an image that sealmount does not check when it opens
/// the image.
fn places(image: &[u8]) -> Result<[(&'static str, usize); 5], Error> {
    const SUPERBLOCK: usize = 1024;
    let number = |offset: usize, size: usize| {
        image[offset..offset + size]
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | *byte as usize)
    };
    let (root_nid, first_inode_block) = (number(SUPERBLOCK + 14, 2), number(SUPERBLOCK + 40, 4));
    let root = first_inode_block * 4096 + root_nid * 32;
    // The name appears only in a directory, so the offset is in a directory.
    let name = b"comma,colon:space name";
    let names = image.windows(name.len()).position(|window| window == name);
    Ok([
        // This byte is in the last word, which has no meaning yet.
        ("header", 31),
        // This byte belongs to the UUID.
        ("superblock", SUPERBLOCK + 48),
        // This byte contains the permissions in the mode of the root directory.
        ("inode", root + 4),
        ("directory", names.ok_or("the image does not contain the name")?),
        ("last-byte", image.len() - 1),
    ])
}

/// Checks the messages and the exit status of the mount helper.
fn digest_errors_are_reported_by_helper(guest: &mut Guest) -> Result<(), Error> {
    let objects = V1.objects_in(&fixtures::mount_objects(guest, "ext4")?);
    let image = V1.image_in(Path::new(INITRAMFS));
    let wrong = differs_in_last_bit(V1.digest()?);
    for (words, digest, message) in [
        (
            "copy",
            wrong,
            format!("its fs-verity digest is {}, expected {wrong}\n  hint: ", V1.digest),
        ),
        (
            "nodev",
            V1.digest()?,
            "cannot verify the image without a copy: the kernel or the file system does not support".into(),
        ),
        ("nodev", V1.digest()?, "hint: add the option copy".into()),
    ] {
        let before = Traces::now()?;
        let options = format!("basedir={},noverity,{words},digest={digest}", objects.display());
        let (status, text) = mounted::mount_with_helper(&image, &["-o", &options])?;
        assert_eq!(status, Some(32), "{text}");
        assert!(text.contains(&message), "the output lacks {message:?}: {text}");
        before.assert_same_now()?;
    }
    Ok(())
}
