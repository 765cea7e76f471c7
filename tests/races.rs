//! What others do meanwhile: many mounts at once, and files, directories and mount points that change
//! while they are used. What can be had at one certain moment is: in a [`Step`] of the mount.

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
    Algorithm, DirectoryRole, Error, ImageError, Memory, MountOptions, Operation, Step,
    compute_digest, open_mount_point,
};
use sealmount_sys::loop_device;

use test_support::{
    Sandbox, V1, V2, assert_is_manifest, assert_no_loop_device, large_image, loop_devices,
    mount_at, mount_composefs, mounts, run, sandbox, through, umount,
};

/// Runs `work`, and `other` over and over until it is done.
fn meanwhile<T>(other: impl Fn() + Sync, work: impl FnOnce() -> T) -> T {
    /// Also where `work` panics: the scope waits for its threads.
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

/// A file with what is in another, compressed by a program of this name.
fn compressed(sandbox: &Sandbox, program: &str, image: &Path) -> PathBuf {
    sandbox.file(program, &through(&[program, "-c"], &fs::read(image).unwrap()))
}

fn copy_into(memory: Memory) -> MountOptions {
    let mut options = V1.copy_options();
    options.copy = Some(memory);
    options
}

/// Mounts by processes and by threads at the same time, in every mode.
const EACH: usize = 100;

#[test]
fn mounts_by_the_hundred_do_not_come_in_each_others_way() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.path("image.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let images = [&image, &image, &image, &compressed(&sandbox, "zstd", &image)];
    let options =
        [V1.options(), copy_into(Memory::Memfd), copy_into(Memory::Ramfs), V1.copy_options()];
    let mount_points: Vec<_> =
        (0..2 * EACH).map(|number| sandbox.directory(&number.to_string())).collect();
    let (for_processes, for_threads) = mount_points.split_at(EACH);
    let taken = AtomicU32::new(0);

    meanwhile(
        || take_a_loop_device(&taken),
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
    assert!(taken.into_inner() > 0, "nobody came in their way");
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

/// What others do with loop devices.
fn take_a_loop_device(taken: &AtomicU32) {
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

/// Mounts an image, changing something when it was opened and before it is copied.
fn changed_when_opened(
    options: &MountOptions,
    image: &Path,
    change: impl Fn(),
) -> Result<sealmount::DetachedMount, Error> {
    let mut is_changed = false;
    let result = options.mount_with(image, &mut |step| {
        if let Step::ImageOpened { .. } = step {
            change();
            is_changed = true;
        }
    });
    assert!(is_changed);
    result
}

#[test]
fn an_image_that_changes_between_opening_and_copying_is_refused() {
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
    for memory in [Memory::Memfd, Memory::Ramfs] {
        for has_digest in [true, false] {
            let mut options = copy_into(memory);
            options.digest = options.digest.filter(|_| has_digest);
            for new_size in [0, 4096, size - 1, size + 1, 2 * size] {
                fs::copy(V1.image(), &image).unwrap();
                let error = changed_when_opened(&options, &image, set_size(new_size)).unwrap_err();
                assert!(matches!(error, Error::ImageChanged { .. }), "{new_size}: {error}");
            }
            fs::copy(V1.image(), &image).unwrap();
            match (has_digest, changed_when_opened(&options, &image, one_bit)) {
                (true, Err(Error::DigestMismatch { .. })) | (false, Ok(_)) => {}
                (_, result) => panic!("{result:?}"),
            }
        }
    }
    assert_no_loop_device(image.to_str().unwrap());
}

#[test]
fn an_image_that_is_replaced_after_opening_is_still_the_one_that_was_opened() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, other) = (sandbox.path("image.cfs"), sandbox.path("other.cfs"));
    let mount_point = sandbox.directory("mnt");
    let replace = || {
        fs::write(&other, "something else").unwrap();
        fs::rename(&other, &image).unwrap();
    };
    let remove = || fs::remove_file(&image).unwrap();
    for options in [V1.options(), copy_into(Memory::Memfd), copy_into(Memory::Ramfs)] {
        for change in [&replace as &dyn Fn(), &remove] {
            fs::copy(V1.image(), &image).unwrap();
            let mount = changed_when_opened(&options, &image, change).unwrap();
            mount.attach(&mount_point).unwrap();
            assert_is_manifest(&mount_point);
            umount(&mount_point);
        }
    }
}

/// How often a race is run whose moment cannot be chosen.
const ROUNDS: usize = 100;

#[test]
fn a_path_that_names_one_image_after_another_gives_one_of_them_whole() {
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
                0 => (Some(Memory::Memfd), false),
                1 => (Some(Memory::Memfd), true),
                2 => (Some(Memory::Ramfs), false),
                3 => (Some(Memory::Ramfs), true),
                _ => (None, false),
            };
            let mut options = V1.copy_options();
            options.basedirs.push(V2.objects().into());
            options.copy = memory;
            options.digest = options.digest.filter(|_| has_digest);
            match options.mount(&image) {
                Ok(mount) => {
                    mount.attach(&mount_point).unwrap();
                    assert_is_manifest(&mount_point);
                    // Only V2 has it as a hard link.
                    let links = fs::metadata(mount_point.join("data/70000")).unwrap().nlink();
                    assert!(!has_digest || links == 1, "V2 is not what the digest is of");
                    umount(&mount_point);
                }
                Err(Error::DigestMismatch { found, .. }) if has_digest => {
                    assert_eq!(*found, compute_digest(Algorithm::Sha256, &plain[1]));
                }
                Err(Error::Image { problem: ImageError::NotAFile("FIFO"), .. }) => {}
                Err(Error::Image { problem: ImageError::Compressed(_), .. })
                    if memory.is_none() => {}
                Err(error) => panic!("{error}"),
            }
        }
    });
}

/// An image that is larger than what one thread reads at a time, and the same with every other byte
/// behind the file system changed.
fn two_images() -> [Vec<u8>; 2] {
    let one = large_image(2 << 20);
    let mut other = one.clone();
    other[64 << 10..].iter_mut().step_by(2).for_each(|byte| *byte = !*byte);
    [one, other]
}

/// What the loop device of a copy holds.
fn copied(options: &MountOptions, image: &Path) -> Result<Vec<u8>, Error> {
    let mut device = None;
    let mount = options.mount_with(image, &mut |step| {
        if let Step::LoopDevice { device: path } = step {
            device = Some(path);
        }
    })?;
    let content = fs::read(device.unwrap()).unwrap();
    drop(mount);
    Ok(content)
}

#[test]
fn an_image_that_is_written_to_meanwhile_is_what_its_digest_says_or_refused() {
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
            options.digest =
                (round % 2 == 0).then(|| compute_digest(Algorithm::Sha256, &images[round / 2 % 2]));
            match (options.digest, copied(&options, &image)) {
                (Some(digest), Ok(content)) => {
                    assert_eq!(compute_digest(Algorithm::Sha256, &content), digest);
                }
                (Some(_), Err(Error::DigestMismatch { .. })) => {}
                // Every byte is one that was there.
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
fn an_image_that_is_truncated_meanwhile_is_whole_or_refused() {
    let Some(sandbox) = sandbox!() else { return };
    let [content, _] = two_images();
    let digest = compute_digest(Algorithm::Sha256, &content);
    let image = sandbox.file("image", &content);
    let compressed: Vec<_> =
        ["zstd", "xz", "gzip"].map(|program| compressed(&sandbox, program, &image)).into();
    let mut refused = 0;
    for path in [vec![image], compressed].concat() {
        let whole = fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let truncate = || {
            file.set_len(whole.len() as u64 / 3).unwrap();
            file.write_all_at(&whole, 0).unwrap();
            thread::sleep(std::time::Duration::from_millis(1));
        };
        meanwhile(truncate, || {
            // Further, until a race was lost: it takes some rounds where two cores have time.
            for round in 0..100 * ROUNDS {
                if round >= ROUNDS / 2 && refused > 0 {
                    break;
                }
                let mut options = V1.copy_options();
                options.digest = (round % 2 == 0).then_some(digest);
                match (options.digest, copied(&options, &path)) {
                    (Some(_), Ok(copied)) => assert!(copied == content),
                    // In the middle of it, what was cut off and not yet written again reads as zeros.
                    (None, Ok(copied)) => assert_eq!(copied.len(), content.len()),
                    (_, Err(error)) => {
                        let is_documented = matches!(
                            error,
                            Error::ImageChanged { .. }
                                | Error::Decompress { .. }
                                | Error::DigestMismatch { .. }
                                | Error::Image { .. }
                        );
                        assert!(is_documented, "{error}");
                        refused += 1;
                    }
                }
            }
        });
        assert_no_loop_device(path.to_str().unwrap());
    }
    assert!(refused > 0, "no race was lost");
}

#[test]
fn a_file_that_is_truncated_under_its_mount_gives_errors_and_no_crash() {
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
                Err(Error::Image { .. } | Error::Kernel(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
    });
}

#[test]
fn object_directories_that_are_swapped_are_never_mixed() {
    let Some(sandbox) = sandbox!() else { return };
    let (objects, empty) = (sandbox.directory("objects"), sandbox.directory("empty"));
    run("cp", ["-r", &format!("{}/.", V1.objects().display()), objects.to_str().unwrap()]);
    let mount_point = sandbox.directory("mnt");
    let swap = || renameat_with(CWD, &objects, CWD, &empty, RenameFlags::EXCHANGE).unwrap();
    let mut options = copy_into(Memory::Memfd);
    options.basedirs = vec![objects.clone().into()];

    // The one that was there when it was opened.
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
fn a_mount_point_that_goes_away_is_an_error_and_nothing_is_left() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.path("image.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let mount_point = sandbox.directory("mnt");
    let before = format!("{:?}", mounts());
    let opened = open_mount_point(&mount_point).unwrap();
    let mount =
        changed_when_opened(&V1.copy_options(), &image, || fs::remove_dir(&mount_point).unwrap())
            .unwrap();
    match mount.attach(opened).unwrap_err() {
        Error::Directory { role: DirectoryRole::MountPoint, errno: Errno::NOENT, .. } => {}
        Error::Kernel(error) => {
            assert_eq!((error.operation, error.errno), (Operation::Attach, Errno::NOENT));
        }
        error => panic!("{error}"),
    }
    assert_eq!(format!("{:?}", mounts()), before);
    assert_no_loop_device(image.to_str().unwrap());
}

#[test]
fn a_mount_point_that_is_moved_or_mounted_over_is_still_the_one_that_was_opened() {
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

    // As mount(8) does: on top of what is there.
    let opened = open_mount_point(&mount_point).unwrap();
    let mount = V1.options().mount(V1.image()).unwrap();
    run("mount", ["-t", "tmpfs", "tmpfs", mount_point.to_str().unwrap()]);
    mount.attach(opened).unwrap();
    assert_is_manifest(&mount_point);
    umount(&mount_point);
    assert_eq!(mount_at(&mount_point).unwrap().fs_type, "tmpfs");
}

#[test]
fn a_mount_point_that_comes_and_goes_is_mounted_on_or_refused() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let remove = || {
        // Busy while it is mounted on.
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
fn a_thread_with_a_mount_namespace_of_its_own_mounts_there_and_nowhere_else() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let before = format!("{:?}", mounts());
    for options in [V1.options(), copy_into(Memory::Memfd), copy_into(Memory::Ramfs)] {
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
    // A mount made in one namespace, detached, can be attached in another.
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
