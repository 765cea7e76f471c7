//! Tests many mounts at once, and files, directories and mount points that change during a mount. If
//! the moment of a change matters, the change happens between two stages.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use rustix::fs::{CWD, MemfdFlags, RenameFlags, ftruncate, memfd_create, renameat_with};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use sealmount::{
    Algorithm, AttachProblem, CopyOptions, Digest, DirectoryRole, Error, Image, ImageProblem,
    MemoryKind, MountOptions, Operation, SourceError, open_mount_point,
};
use sealmount_sys::loop_device;

use test_support::{
    Sandbox, V1, V2, assert_is_manifest, assert_no_loop_device, image_problem, large_image,
    loop_devices, mount_at, mount_composefs, mounts, run, sandbox, through, umount,
};

/// Runs `work`, and runs `other` repeatedly until `work` ends.
fn meanwhile<T>(other: impl Fn() + Sync, work: impl FnOnce() -> T) -> T {
    /// Ends the threads on drop, because the scope waits for them even if `work` panics.
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let done = AtomicBool::new(false);
    let (done, other) = (&done, &other);
    thread::scope(|scope| {
        let _done = Done(done);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                other();
            }
        });
        work()
    })
}

/// Returns a file with the content of `image`, compressed by this program.
fn compressed(sandbox: &Sandbox, program: &str, image: &Path) -> PathBuf {
    sandbox.file(program, &through(&[program, "-c"], &fs::read(image).unwrap()))
}

fn copy_into(memory: MemoryKind) -> MountOptions {
    let mut options = V1.copy_options();
    options.copy = Some(memory);
    options
}

/// The number of processes, and the number of threads, that mount at the same time.
const EACH: usize = 100;

#[test]
fn parallel_mounts_stay_independent() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.path("image.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let images = [&image, &image, &image, &compressed(&sandbox, "zstd", &image)];
    let options = [
        V1.options(),
        copy_into(MemoryKind::Memfd),
        copy_into(MemoryKind::Ramfs),
        V1.copy_options(),
    ];
    let mount_points: Vec<_> =
        (0..2 * EACH).map(|number| sandbox.directory(&number.to_string())).collect();
    let (for_processes, for_threads) = mount_points.split_at(EACH);
    let taken = AtomicU32::new(0);

    meanwhile(
        || allocate_loop_device(&taken),
        || {
            let start = |(number, mount_point): (usize, &PathBuf)| {
                Command::new(env!("CARGO_BIN_EXE_mount-composefs"))
                    .args([images[number % 4], mount_point])
                    .arg("-o")
                    .arg(options[number % 4].to_text())
                    .stderr(Stdio::piped())
                    .spawn()
                    .unwrap()
            };
            let helpers: Vec<_> = for_processes.iter().enumerate().map(start).collect();
            let barrier = Barrier::new(EACH);
            thread::scope(|scope| {
                for (number, mount_point) in for_threads.iter().enumerate() {
                    let (options, image) = (&options[number % 4], images[number % 4]);
                    let barrier = &barrier;
                    scope.spawn(move || {
                        barrier.wait();
                        options.mount(image).unwrap().attach(mount_point).unwrap();
                    });
                }
            });
            for helper in helpers {
                let output = helper.wait_with_output().unwrap();
                assert!(output.status.success(), "{output:?}");
            }
        },
    );
    assert!(taken.into_inner() > 0, "no other program took a loop device");
    for (number, mount_point) in mount_points.iter().enumerate() {
        assert_eq!(fs::read(mount_point.join("data/70000")).unwrap().len(), 70_000);
        if number % 17 == 0 {
            assert_is_manifest(mount_point);
        }
        umount(mount_point);
    }
    assert!(!mounts().iter().any(|mount| mount_points.contains(&mount.mount_point)));
    assert_no_loop_device(sandbox.path("").to_str().unwrap());
}

/// Allocates a loop device for a moment, like another program.
fn allocate_loop_device(taken: &AtomicU32) {
    let control = File::options().read(true).write(true).open("/dev/loop-control").unwrap();
    let backing = memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&backing, 4096).unwrap();
    let Ok(number) = loop_device::get_free(&control) else { return };
    let Ok(device) = File::open(format!("/dev/loop{number}")) else { return };
    if loop_device::configure(&device, &backing, 4096, b"other").is_ok() {
        taken.fetch_add(1, Ordering::Relaxed);
        thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Mounts an image. Calls `change` after sealmount has opened the image and the object directories, and
/// before the copy.
fn changed_when_opened(
    options: &MountOptions,
    image: &Path,
    change: impl Fn(),
) -> Result<sealmount::DetachedMount, Error> {
    let image = Image::open(image)?;
    let mut overlay = options.overlay.clone();
    overlay.verity = Some(options.effective_verity());
    let overlay = overlay.open()?;
    change();
    let source = match (options.copy, options.digest) {
        (Some(memory), digest) => {
            let mut copy = CopyOptions::new(memory);
            (copy.size, copy.digest) = (options.size, digest);
            image.copy(&copy)?
        }
        (None, Some(digest)) => image.verify(digest)?,
        (None, None) => image.trust()?,
    };
    Ok(overlay.mount(&source.mount()?)?)
}

/// Returns whether the size of the file changed during the copy.
fn is_changed(error: &Error) -> bool {
    matches!(error, Error::Source(SourceError::Changed { .. }))
}

#[test]
fn image_resized_between_open_and_copy_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.path("changing.cfs");
    let set_size = |size| {
        let image = &image;
        move || File::options().write(true).open(image).unwrap().set_len(size).unwrap()
    };
    let one_bit = || {
        let file = File::options().read(true).write(true).open(&image).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 20_000).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 20_000).unwrap();
    };
    let size = fs::metadata(V1.image()).unwrap().len();
    for memory in [MemoryKind::Memfd, MemoryKind::Ramfs] {
        for has_digest in [true, false] {
            let mut options = copy_into(memory);
            options.digest = options.digest.filter(|_| has_digest);
            for new_size in [0, 4096, size - 1, size + 1, 2 * size] {
                fs::copy(V1.image(), &image).unwrap();
                let error = changed_when_opened(&options, &image, set_size(new_size)).unwrap_err();
                assert!(is_changed(&error), "{new_size}: {error}");
            }
            fs::copy(V1.image(), &image).unwrap();
            match (has_digest, changed_when_opened(&options, &image, one_bit)) {
                (true, Err(Error::Source(SourceError::DigestMismatch { .. }))) | (false, Ok(_)) => {
                }
                (_, result) => panic!("{result:?}"),
            }
        }
    }
    assert_no_loop_device(image.to_str().unwrap());
}

#[test]
fn replaced_or_removed_image_stays_pinned() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, other) = (sandbox.path("image.cfs"), sandbox.path("other.cfs"));
    let mount_point = sandbox.directory("mnt");
    let replace = || {
        fs::write(&other, "something else").unwrap();
        fs::rename(&other, &image).unwrap();
    };
    let remove = || fs::remove_file(&image).unwrap();
    for options in [V1.options(), copy_into(MemoryKind::Memfd), copy_into(MemoryKind::Ramfs)] {
        for change in [&replace as &dyn Fn(), &remove] {
            fs::copy(V1.image(), &image).unwrap();
            let mount = changed_when_opened(&options, &image, change).unwrap();
            mount.attach(&mount_point).unwrap();
            assert_is_manifest(&mount_point);
            umount(&mount_point);
        }
    }
}

/// The number of rounds of a race whose moment the test cannot choose.
const ROUNDS: usize = 100;

#[test]
fn repeatedly_replaced_image_mounts_whole() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, next) = (sandbox.path("image.cfs"), sandbox.path("next.cfs"));
    let mount_point = sandbox.directory("mnt");
    fs::copy(V1.image(), &image).unwrap();
    let zstd = [V1, V2].map(|fixture| compressed(&sandbox, "zstd", &fixture.image()));
    let zstd = zstd.map(|path| fs::read(path).unwrap());
    let plain = [V1, V2].map(|fixture| fs::read(fixture.image()).unwrap());

    let replace = || {
        for content in [&plain[1], &zstd[0], &zstd[1], &plain[0]] {
            fs::write(&next, content).unwrap();
            fs::rename(&next, &image).unwrap();
        }
        run("mkfifo", [&next]);
        fs::rename(&next, &image).unwrap();
    };
    meanwhile(replace, || {
        for round in 0..ROUNDS {
            let (memory, has_digest) = match round % 5 {
                0 => (Some(MemoryKind::Memfd), false),
                1 => (Some(MemoryKind::Memfd), true),
                2 => (Some(MemoryKind::Ramfs), false),
                3 => (Some(MemoryKind::Ramfs), true),
                _ => (None, false),
            };
            let mut options = V1.copy_options();
            options.overlay.objects.push(V2.objects().into());
            options.copy = memory;
            options.digest = options.digest.filter(|_| has_digest);
            match options.mount(&image) {
                Ok(mount) => {
                    mount.attach(&mount_point).unwrap();
                    assert_is_manifest(&mount_point);
                    // Only the V2 image has the hard link.
                    let links = fs::metadata(mount_point.join("data/70000")).unwrap().nlink();
                    assert!(!has_digest || links == 1, "the digest of V1 does not match V2");
                    umount(&mount_point);
                }
                Err(Error::Source(SourceError::DigestMismatch { found, .. })) if has_digest => {
                    assert_eq!(*found, Digest::of_bytes(Algorithm::Sha256, &plain[1]));
                }
                Err(error) => match image_problem(&error) {
                    Some(ImageProblem::NotAFile("FIFO")) => {}
                    Some(ImageProblem::Compressed(_)) if memory.is_none() => {}
                    _ => panic!("{error}"),
                },
            }
        }
    });
}

/// Returns an image that is larger than the piece that one thread reads at a time. Also returns a
/// variant that differs in every other byte after the file system.
fn two_images() -> [Vec<u8>; 2] {
    let one = large_image(2 << 20);
    let mut other = one.clone();
    other[64 << 10..].iter_mut().step_by(2).for_each(|byte| *byte = !*byte);
    [one, other]
}

/// Returns the content of the loop device of a copy.
fn copied(options: &MountOptions, image: &Path) -> Result<Vec<u8>, Error> {
    let mount = options.mount(image)?;
    let device = mount.report().unwrap().erofs.loop_device.as_ref().unwrap();
    let content = fs::read(device).unwrap();
    drop(mount);
    Ok(content)
}

#[test]
fn image_under_writes_keeps_digest_or_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let images = two_images();
    let image = sandbox.file("written.cfs", &images[0]);
    let file = File::options().write(true).open(&image).unwrap();
    let write = || {
        for content in [&images[1], &images[0]] {
            for at in (64 << 10..content.len()).step_by(100_000) {
                let end = content.len().min(at + 100_000);
                file.write_all_at(&content[at..end], at as u64).unwrap();
            }
        }
    };
    meanwhile(write, || {
        for round in 0..ROUNDS {
            let mut options = V1.copy_options();
            options.digest = (round % 2 == 0)
                .then(|| Digest::of_bytes(Algorithm::Sha256, &images[round / 2 % 2]));
            match (options.digest, copied(&options, &image)) {
                (Some(digest), Ok(content)) => {
                    assert_eq!(Digest::of_bytes(Algorithm::Sha256, &content), digest);
                }
                (Some(_), Err(Error::Source(SourceError::DigestMismatch { .. }))) => {}
                // Every byte belongs to one of the two images.
                (None, Ok(content)) => {
                    assert_eq!(content.len(), images[0].len());
                    let is_one = |(n, byte): (usize, &u8)| images.iter().any(|i| i[n] == *byte);
                    assert!(content.iter().enumerate().all(is_one));
                }
                (_, Err(error)) => panic!("{error}"),
            }
        }
    });
    assert_no_loop_device(image.to_str().unwrap());
}

#[test]
fn image_truncated_during_copy_is_whole_or_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let [content, _] = two_images();
    let digest = Digest::of_bytes(Algorithm::Sha256, &content);
    let image = sandbox.file("image", &content);
    let compressed: Vec<_> =
        ["zstd", "xz", "gzip"].map(|program| compressed(&sandbox, program, &image)).into();
    let mut rejected = 0;
    for path in [vec![image], compressed].concat() {
        let whole = fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let truncate = || {
            file.set_len(whole.len() as u64 / 3).unwrap();
            file.write_all_at(&whole, 0).unwrap();
            thread::sleep(std::time::Duration::from_millis(1));
        };
        meanwhile(truncate, || {
            // At least one mount must meet the change. Two busy CPUs need more rounds to meet the
            // change.
            for round in 0..100 * ROUNDS {
                if round >= ROUNDS / 2 && rejected > 0 {
                    break;
                }
                let mut options = V1.copy_options();
                options.digest = (round % 2 == 0).then_some(digest);
                match (options.digest, copied(&options, &path)) {
                    (Some(_), Ok(copied)) => assert!(copied == content),
                    // Within the image, bytes read as zeros between the truncation and the rewrite.
                    (None, Ok(copied)) => assert_eq!(copied.len(), content.len()),
                    (_, Err(error)) => {
                        let is_documented = matches!(
                            error,
                            Error::Source(
                                SourceError::Changed { .. }
                                    | SourceError::Decompress { .. }
                                    | SourceError::DigestMismatch { .. },
                            )
                        );
                        assert!(is_documented || image_problem(&error).is_some(), "{error}");
                        rejected += 1;
                    }
                }
            }
        });
        assert_no_loop_device(path.to_str().unwrap());
    }
    assert!(rejected > 0, "every mount was faster than the change");
}

#[test]
fn image_truncated_while_mounted_causes_no_crash() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.path("image.cfs");
    let mount_point = sandbox.directory("mnt");
    let truncate = || {
        File::options().write(true).open(&image).unwrap().set_len(8192).unwrap();
        fs::copy(V1.image(), &image).unwrap();
    };
    fs::copy(V1.image(), &image).unwrap();
    meanwhile(truncate, || {
        for _ in 0..ROUNDS {
            match V1.options().mount(&image) {
                Ok(mount) => {
                    mount.attach(&mount_point).unwrap();
                    let _ = fs::read(mount_point.join("data/70000"));
                    umount(&mount_point);
                }
                Err(error) => {
                    let is_expected = image_problem(&error).is_some() || error.kernel().is_some();
                    assert!(is_expected, "{error}");
                }
            }
        }
    });
}

#[test]
fn swapped_object_directories_are_never_mixed() {
    let Some(sandbox) = sandbox!() else { return };
    let (objects, empty) = (sandbox.directory("objects"), sandbox.directory("empty"));
    run("cp", ["-r", &format!("{}/.", V1.objects().display()), objects.to_str().unwrap()]);
    let mount_point = sandbox.directory("mnt");
    let swap = || renameat_with(CWD, &objects, CWD, &empty, RenameFlags::EXCHANGE).unwrap();
    let mut options = copy_into(MemoryKind::Memfd);
    options.overlay.objects = vec![objects.clone().into()];

    // The mount uses the directory that was at the path when sealmount opened the path.
    let mount = changed_when_opened(&options, &V1.image(), swap).unwrap();
    mount.attach(&mount_point).unwrap();
    assert_is_manifest(&mount_point);
    umount(&mount_point);
    swap();

    meanwhile(swap, || {
        for _ in 0..ROUNDS {
            options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
            match fs::read(mount_point.join("data/70000")) {
                Ok(_) => assert_is_manifest(&mount_point),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NotFound);
                    let other = fs::read(mount_point.join("data/4097")).unwrap_err();
                    assert_eq!(other.kind(), ErrorKind::NotFound);
                }
            }
            umount(&mount_point);
        }
    });
}

#[test]
fn removed_mount_point_fails_and_leaves_nothing() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.path("image.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let mount_point = sandbox.directory("mnt");
    let before = format!("{:?}", mounts());
    let opened = open_mount_point(&mount_point).unwrap();
    let mount =
        changed_when_opened(&V1.copy_options(), &image, || fs::remove_dir(&mount_point).unwrap())
            .unwrap();
    let error = mount.attach(opened).unwrap_err();
    match error.problem() {
        AttachProblem::Directory(directory) => {
            assert_eq!(directory.role(), DirectoryRole::MountPoint);
            assert_eq!(directory.raw_os_error(), Errno::NOENT.raw_os_error());
        }
        AttachProblem::Kernel(error) => {
            assert_eq!(error.operation(), Operation::Attach);
            assert_eq!(error.raw_os_error(), Errno::NOENT.raw_os_error());
        }
        error => panic!("{error}"),
    }
    // The mount survives the failure, and a caller can attach the mount elsewhere.
    let other = sandbox.directory("other");
    error.into_mount().attach(&other).unwrap();
    assert_is_manifest(&other);
    umount(&other);
    assert_eq!(format!("{:?}", mounts()), before);
    assert_no_loop_device(image.to_str().unwrap());
}

#[test]
fn moved_or_overmounted_mount_point_stays_pinned() {
    let Some(sandbox) = sandbox!() else { return };
    let (mount_point, moved) = (sandbox.directory("mnt"), sandbox.path("moved"));
    let opened = open_mount_point(&mount_point).unwrap();
    let mount = V1.options().mount(V1.image()).unwrap();
    fs::rename(&mount_point, &moved).unwrap();
    fs::create_dir(&mount_point).unwrap();
    mount.attach(opened).unwrap();
    assert!(mount_at(&mount_point).is_none());
    assert_is_manifest(&moved);
    umount(&moved);

    // The mount covers a newer mount, as with mount(8).
    let opened = open_mount_point(&mount_point).unwrap();
    let mount = V1.options().mount(V1.image()).unwrap();
    run("mount", ["-t", "tmpfs", "tmpfs", mount_point.to_str().unwrap()]);
    mount.attach(opened).unwrap();
    assert_is_manifest(&mount_point);
    umount(&mount_point);
    assert_eq!(mount_at(&mount_point).unwrap().fs_type, "tmpfs");
}

#[test]
fn recreated_mount_point_mounts_or_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let remove = || {
        // The removal of a mount point fails with EBUSY.
        if fs::remove_dir(&mount_point).is_ok() {
            fs::create_dir(&mount_point).unwrap();
        }
    };
    meanwhile(remove, || {
        for _ in 0..ROUNDS {
            let options = V1.options().to_text();
            let image = V1.image();
            let output = mount_composefs!([
                image.as_os_str(),
                mount_point.as_ref(),
                "-o".as_ref(),
                &options
            ]);
            match output.status.code() {
                Some(0) => umount(&mount_point),
                Some(32) => {
                    let message = String::from_utf8(output.stderr).unwrap();
                    assert!(message.contains("No such file or directory"), "{message}");
                    assert!(message.contains(mount_point.to_str().unwrap()), "{message}");
                }
                _ => panic!("{output:?}"),
            }
        }
    });
    assert!(mount_at(&mount_point).is_none());
}

#[test]
fn thread_in_own_namespace_mounts_only_there() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let before = format!("{:?}", mounts());
    for options in [V1.options(), copy_into(MemoryKind::Memfd), copy_into(MemoryKind::Ramfs)] {
        let (mounted, checked) = (Barrier::new(3), Barrier::new(3));
        thread::scope(|scope| {
            scope.spawn(|| {
                sealmount_sys::unshare_mount_namespace().unwrap();
                options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
                mounted.wait();
                assert_is_manifest(&mount_point);
                checked.wait();
                umount(&mount_point);
            });
            scope.spawn(|| {
                mounted.wait();
                assert!(mount_at(&mount_point).is_none());
                assert!(fs::read_dir(&mount_point).unwrap().next().is_none());
                checked.wait();
            });
            mounted.wait();
            assert_eq!(format!("{:?}", mounts()), before);
            checked.wait();
        });
    }
    // A process can make a mount in one namespace and attach the mount in another namespace.
    let mount = thread::scope(|scope| {
        let other = scope.spawn(|| {
            sealmount_sys::unshare_mount_namespace().unwrap();
            V1.copy_options().mount(V1.image()).unwrap()
        });
        other.join().unwrap()
    });
    mount.attach(&mount_point).unwrap();
    assert_is_manifest(&mount_point);
    unmount(&mount_point, UnmountFlags::DETACH).unwrap();
    assert!(loop_devices(mount_point.to_str().unwrap()).is_empty());
}
