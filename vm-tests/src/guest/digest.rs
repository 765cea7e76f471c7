//! Images that are to have a digest: it is theirs, whoever finds out, or nothing is mounted.

use super::fixtures::{self, Fixture, V1, V2};
use super::machines::STANDARD;
use super::mounted::{self, MEMORIES, Traces, with_copy, with_digest, with_verity};
use super::probe;
use crate::files::copy;
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::mount::MountFlags;
use sealmount::{
    Algorithm, Digest, Error as Refused, Memory, MountOptions, NotVerity, VerifiedBy, Verity,
    compute_digest,
};
use std::fs;
use std::path::{Path, PathBuf};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "digest_by_kernel",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: by_kernel,
    },
    Scenario {
        name: "digest_by_copy",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: by_copy,
    },
    Scenario {
        name: "digest_one_bit",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: one_bit,
    },
    Scenario {
        name: "digest_helper",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: helper,
    },
];

const ALGORITHMS: [Algorithm; 2] = [Algorithm::Sha256, Algorithm::Sha512];

/// Where the machine's initramfs, a tmpfs, has the images.
const INITRAMFS: &str = "/";

/// With `noverity`: the objects are of no concern here, and every kernel can do it.
fn options(fixture: &Fixture, objects: &Path, digest: Digest) -> MountOptions {
    let none = MountOptions::new(fixture.objects_in(objects));
    with_digest(&with_verity(&none, Verity::Off), digest)
}

/// The digest of a file. That of a fixture, in its own algorithm, other people's tools have found.
fn digest_of(fixture: &Fixture, algorithm: Algorithm, content: &[u8]) -> Result<Digest, Error> {
    let digest = compute_digest(algorithm, content);
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
    }
    other
}

fn is_verified(
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

fn is_mismatch(options: &MountOptions, image: &Path, is: Digest) -> Result<(), Error> {
    let before = Traces::now()?;
    let asked = options.digest.ok_or("no digest to miss")?;
    match mounted::mount(options, image)? {
        Err(Refused::DigestMismatch { expected, found, image: named })
            if (*expected, *found) == (asked, is) && named == image => {}
        other => return Err(format!("not a mismatch of {asked} and {is}: {other:?}").into()),
    }
    before.assert_same_now()
}

fn is_unverified(options: &MountOptions, image: &Path, reason: NotVerity) -> Result<(), Error> {
    let before = Traces::now()?;
    match mounted::mount(options, image)? {
        Err(ref error @ Refused::ImageNotVerity { image: ref named, reason: given })
            if (named.as_path(), given) == (image, reason) =>
        {
            let hint = error.hint().unwrap_or_default();
            assert!(hint.contains("add the option copy"), "{hint:?}");
        }
        other => return Err(format!("not {reason:?}: {other:?}").into()),
    }
    before.assert_same_now()
}

/// Those that fs-verity of a disk has; none where there is no fs-verity.
fn known_algorithms(disk: &Path) -> Result<Vec<Algorithm>, Error> {
    let mut known = Vec::new();
    for algorithm in ALGORITHMS {
        match probe::fs_verity(disk, algorithm)? {
            true => known.push(algorithm),
            false => println!("no fs-verity with {algorithm} on {}", disk.display()),
        }
    }
    Ok(known)
}

/// The image has fs-verity: the kernel knows its digest, and the copy need not be hashed.
fn by_kernel(guest: &mut Guest) -> Result<(), Error> {
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
                is_verified(&options, &image, fixture, VerifiedBy::Kernel)?;
            }
            let wrong = options(fixture, &disk, differs_in_last_bit(digest));
            is_mismatch(&wrong, &image, digest)?;
            is_mismatch(&with_copy(&wrong, Memory::Memfd), &image, digest)?;

            for other in ALGORITHMS.into_iter().filter(|other| *other != algorithm) {
                let digest = digest_of(fixture, other, &content)?;
                let right = options(fixture, &disk, digest);
                is_unverified(&right, &image, NotVerity::OtherAlgorithm(other))?;
                let right = with_copy(&right, Memory::Memfd);
                is_verified(&right, &image, fixture, VerifiedBy::Copy)?;
                let wrong = options(fixture, &disk, differs_in_last_bit(digest));
                is_mismatch(&with_copy(&wrong, Memory::Memfd), &image, digest)?;
            }
        }
    }
    Ok(())
}

/// The image has no fs-verity, because nobody enabled it or because its file system has none: what
/// is copied is hashed, and without copy nothing can be said of it.
fn by_copy(guest: &mut Guest) -> Result<(), Error> {
    let objects = fixtures::mount_objects(guest, "ext4")?;
    let tmpfs = tmpfs()?;
    for fixture in [&V1, &V2] {
        copy(&fixture.image_in(Path::new(INITRAMFS)), &fixture.image_in(&tmpfs))?;
    }
    let mut places = vec![
        (objects.clone(), NotVerity::Unsupported),
        (fixtures::mount_objects(guest, "fat")?, NotVerity::Unsupported),
        (tmpfs, NotVerity::Unsupported),
        (INITRAMFS.into(), NotVerity::Unsupported),
    ];
    for disk in fixtures::mount_each(guest, &["ext4-verity", "btrfs"])? {
        let reason = match known_algorithms(&disk)?.is_empty() {
            true => NotVerity::Unsupported,
            false => NotVerity::NotEnabled,
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
                is_unverified(&right, &image, *reason)?;
                let wrong = options(fixture, &objects, differs_in_last_bit(digest));
                is_unverified(&wrong, &image, *reason)?;
                for memory in MEMORIES {
                    let right = with_copy(&right, memory);
                    is_verified(&right, &image, fixture, VerifiedBy::Copy)?;
                    is_mismatch(&with_copy(&wrong, memory), &image, digest)?;
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

/// In places that nothing but the digest protects: EROFS mounts all of these images.
fn one_bit(guest: &mut Guest) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    let known = known_algorithms(&disk)?;
    let tmpfs = tmpfs()?;
    for fixture in [&V1, &V2] {
        let content = fs::read(fixture.image_in(&disk))?;
        for (place, offset) in places(&content)? {
            let mut damaged = content.clone();
            damaged[offset] ^= 1;
            for algorithm in ALGORITHMS {
                let asked = digest_of(fixture, algorithm, &content)?;
                let is = compute_digest(algorithm, &damaged);
                assert_ne!(is, asked);
                let options = options(fixture, &disk, asked);
                let name = format!("{}.{place}.{algorithm}", fixture.name);

                let image = tmpfs.join(&name);
                fs::write(&image, &damaged)?;
                for memory in MEMORIES {
                    is_mismatch(&with_copy(&options, memory), &image, is)
                        .context(|| name.clone())?;
                }

                if !known.contains(&algorithm) {
                    continue;
                }
                let image = disk.join("digest").join(&name);
                fs::create_dir_all(disk.join("digest"))?;
                fs::write(&image, &damaged)?;
                fixtures::enable_verity(&image, algorithm)?;
                is_mismatch(&options, &image, is).context(|| name.clone())?;
                let copy = with_copy(&options, Memory::Memfd);
                is_mismatch(&copy, &image, is).context(|| name)?;
            }
        }
    }
    Ok(())
}

/// A byte of each part of an image, of those that opening it does not check.
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
    // No inode and no path in another file has it: it stands in a directory.
    let name = b"comma,colon:space name";
    let names = image.windows(name.len()).position(|window| window == name);
    Ok([
        // The last word, of no meaning yet.
        ("header", 31),
        // Of the UUID.
        ("superblock", SUPERBLOCK + 48),
        // Of the root's mode: the permissions.
        ("inode", root + 4),
        ("directory", names.ok_or("the directory is not where it was looked for")?),
        ("last-byte", image.len() - 1),
    ])
}

/// Messages and exit status of the mount helper.
fn helper(guest: &mut Guest) -> Result<(), Error> {
    let objects = V1.objects_in(&fixtures::mount_objects(guest, "ext4")?);
    let image = V1.image_in(Path::new(INITRAMFS));
    let wrong = differs_in_last_bit(V1.digest()?);
    for (words, digest, message) in [
        ("copy", wrong, format!("its fs-verity digest is {}, not {wrong}\n  hint: ", V1.digest)),
        ("nodev", V1.digest()?, "against digest= without copy: its file system does not".into()),
        ("nodev", V1.digest()?, "hint: add the option copy".into()),
    ] {
        let before = Traces::now()?;
        let options = format!("basedir={},noverity,{words},digest={digest}", objects.display());
        let (status, text) = mounted::mount_with_helper(&image, &["-o", &options])?;
        assert_eq!(status, Some(32), "{text}");
        assert!(text.contains(&message), "{message:?} is not in: {text}");
        before.assert_same_now()?;
    }
    Ok(())
}
