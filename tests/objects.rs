//! Tests the list of the objects of an image, and the checks of objects before a mount.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, lgetxattr, mknodat};
use rustix::thread::{
    CapabilitySet, CpuSet, capabilities, sched_getcpu, sched_setaffinity, set_capabilities,
};
use sealmount::{
    Algorithm, CheckReport, Digest, ErofsMount, Error, ErrorKind, Event, Image, ImageObject,
    MountOptions, ObjectCheck, ObjectProblem, ObjectProblemKind, ObjectsError, OverlayError,
    OverlayOptions, Verity,
};
use test_support::erofs::{REGULAR, SYMLINK};
use test_support::{
    ErofsImage, Fixture, Sandbox, V1, V2, mount_and_events, run, sandbox, user_namespace,
};

const CHECKS: [ObjectCheck; 2] = [ObjectCheck::All, ObjectCheck::Content];

fn bare(image: &Path) -> ErofsMount {
    Image::open(image).unwrap().trust().unwrap().mount().unwrap()
}

/// Copies the objects of an image, so that they can be changed.
fn copied_objects(sandbox: &Sandbox, name: &str, fixture: &Fixture) -> PathBuf {
    let objects = sandbox.directory(name);
    let source = format!("{}/.", fixture.objects().display());
    run("cp", ["-r", &source, objects.to_str().unwrap()]);
    objects
}

fn check(
    image: &ErofsMount,
    objects: &[&Path],
    check: ObjectCheck,
) -> Result<CheckReport, OverlayError> {
    let mut options = OverlayOptions::default();
    options.objects = objects.iter().map(|path| (*path).into()).collect();
    options.open().unwrap().check_objects(image, check, &mut |_| ControlFlow::Continue(()))
}

/// Returns the report of a check that must fail.
#[track_caller]
fn failed(image: &ErofsMount, objects: &[&Path], kind: ObjectCheck) -> CheckReport {
    match check(image, objects, kind).unwrap_err() {
        error @ OverlayError::ObjectsDamaged { .. } => {
            assert_eq!(error.kind(), ErrorKind::ObjectsDamaged);
            error.check_report().unwrap().clone()
        }
        error => panic!("{error}"),
    }
}

fn objects_of(image: &ErofsMount) -> Vec<ImageObject> {
    image.objects().map(Result::unwrap).collect()
}

/// Returns the object that a file of the image needs.
fn object_of(image: &ErofsMount, path: &str) -> PathBuf {
    objects_of(image).into_iter().find(|object| object.path == Path::new(path)).unwrap().object
}

/// Lists the files with xattrs of overlayfs by the standard library.
fn listed_by_path(root: &Path) -> BTreeSet<(PathBuf, Vec<u8>, u64, Vec<u8>)> {
    let mut found = BTreeSet::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            if metadata.is_dir() {
                directories.push(path);
                continue;
            }
            let xattr = |name: &str| {
                let mut value = vec![0; 5000];
                let length = lgetxattr(&path, name, &mut value).ok()?;
                value.truncate(length);
                Some(value)
            };
            if let Some(metacopy) = xattr("trusted.overlay.metacopy") {
                let redirect = xattr("trusted.overlay.redirect").unwrap();
                let path = Path::new("/").join(path.strip_prefix(root).unwrap());
                found.insert((path, redirect, metadata.len(), metacopy));
            }
        }
    }
    found
}

#[test]
fn object_list_reports_each_file_with_an_object() {
    let Some(sandbox) = sandbox!() else { return };
    for fixture in [V1, V2] {
        let image = bare(&fixture.image());
        let objects = objects_of(&image);
        let listed = objects.iter().map(|found| {
            let digest = found.digest.unwrap();
            let (id, hexadecimal) = match digest {
                Digest::Sha256(digest) => (1, digest.to_vec()),
                Digest::Sha512(digest) => (2, digest.to_vec()),
                _ => unreachable!(),
            };
            let metacopy = [&[0, 4 + hexadecimal.len() as u8, 0, id], &hexadecimal[..]].concat();
            let redirect = format!("/{}", found.object.display()).into_bytes();
            (found.path.clone(), redirect, found.size, metacopy)
        });
        let listed: BTreeSet<_> = listed.collect();
        assert_eq!(listed.len(), 19);
        for object in &objects {
            let content = fs::read(fixture.objects().join(&object.object)).unwrap();
            let digest = object.digest.unwrap();
            assert_eq!(Digest::of_bytes(digest.algorithm(), &content), digest);
            assert_eq!(content.len() as u64, object.size);
        }
        let mount_point = sandbox.directory(&fixture.digest[..8]);
        image.try_clone().unwrap().into_detached().attach(&mount_point).unwrap();
        assert_eq!(listed, listed_by_path(&mount_point));
    }
}

#[test]
fn check_of_intact_objects_reports_totals() {
    let Some(_sandbox) = sandbox!() else { return };
    for (fixture, kind) in [(V1, CHECKS[0]), (V1, CHECKS[1]), (V2, CHECKS[0]), (V2, CHECKS[1])] {
        let report = check(&bare(&fixture.image()), &[&fixture.objects()], kind).unwrap();
        // Two files share an object.
        assert_eq!((report.files, report.objects, report.bytes), (19, 18, 91658));
        assert_eq!((report.failed, report.without_digest, report.failures.len()), (0, 0, 0));
        let text =
            format!("{kind}: 18 of 18 objects passed (all objects: 91658 bytes, for 19 files)");
        assert_eq!(report.to_string(), text);
    }
}

#[test]
fn damaged_objects_are_reported_by_kind() {
    let Some(sandbox) = sandbox!() else { return };
    let objects = copied_objects(&sandbox, "objects", &V1);
    let image = bare(&V1.image());
    let object = |path: &str| objects.join(object_of(&image, path));
    fs::remove_file(object("/usr/bin/tool")).unwrap();
    let replace = |path: &str, make: &dyn Fn(&Path)| {
        fs::remove_file(object(path)).unwrap();
        make(&object(path));
    };
    let fifo = |path: &Path| mknodat(CWD, path, FileType::Fifo, Mode::RWXU, 0).unwrap();
    replace("/usr/bin/setuid", &|path| fs::create_dir(path).unwrap());
    replace("/data/65", &fifo);
    replace("/data/4096", &|path| symlink(V1.image(), path).unwrap());
    let open = |path: &str| OpenOptions::new().write(true).open(object(path)).unwrap();
    open("/data/4097").set_len(4098).unwrap();
    open("/data/70000").write_all_at(b"?", 69_999).unwrap();

    let mut expected = vec![
        ("/data/4096", "not a regular file, but a symbolic link"),
        ("/data/4097", "the size is 4098 bytes, expected 4097 bytes"),
        ("/data/65", "not a regular file, but a FIFO"),
        ("/usr/bin/setuid", "not a regular file, but a directory"),
        ("/usr/bin/tool", "missing"),
    ];
    for kind in CHECKS {
        if kind == ObjectCheck::Content {
            expected.insert(3, ("/data/70000", "the content has the digest "));
        }
        let report = failed(&image, &[&objects], kind);
        let found: Vec<_> = report.failures.iter().map(ToString::to_string).collect();
        assert_eq!(report.failed as usize, expected.len(), "{found:?}");
        for (found, (path, problem)) in found.iter().zip(&expected) {
            // A missing object has no directory.
            let object = match *problem {
                "missing" => object_of(&image, path),
                _ => object(path),
            };
            let start = format!("{path} needs {}: {problem}", object.display());
            assert!(found.starts_with(&start), "{found} {start}");
        }
        let count = |kind| report.failed_by_kind.iter().find(|(other, _)| *other == kind);
        let contents = u64::from(kind == ObjectCheck::Content);
        let wrong_content = count(ObjectProblemKind::WrongContent).map_or(0, |(_, count)| *count);
        assert_eq!(wrong_content, contents);
        assert_eq!(count(ObjectProblemKind::NotRegularFile).unwrap().1, 3);
    }
}

#[test]
fn many_failures_are_reported_in_order_of_paths() {
    let Some(sandbox) = sandbox!() else { return };
    let empty = sandbox.directory("empty");
    let image = bare(&V1.image());
    let mut seen = BTreeSet::new();
    let mut first = objects_of(&image);
    first.retain(|object| seen.insert(object.object.clone()));
    for _ in 0..20 {
        let report = failed(&image, &[&empty], ObjectCheck::All);
        assert_eq!((report.failed, report.failures.len()), (18, 10));
        assert_eq!(report.failed_by_kind, [(ObjectProblemKind::Missing, 18)]);
        let named: Vec<_> = report.failures.into_iter().map(|failure| failure.object).collect();
        assert_eq!(named, first[..10]);
    }
}

/// overlayfs uses the first regular file, also if the size or the content of the file is wrong.
#[test]
fn object_is_checked_in_its_first_directory() {
    let Some(sandbox) = sandbox!() else { return };
    let first = sandbox.directory("first");
    let second = copied_objects(&sandbox, "second", &V1);
    let image = bare(&V1.image());
    check(&image, &[&first, &second], ObjectCheck::Content).unwrap();

    let tool = object_of(&image, "/usr/bin/tool");
    fs::create_dir_all(first.join(&tool)).unwrap();
    check(&image, &[&first, &second], ObjectCheck::Content).unwrap();

    fs::remove_dir(first.join(&tool)).unwrap();
    fs::write(first.join(&tool), "").unwrap();
    for kind in CHECKS {
        let report = failed(&image, &[&first, &second], kind);
        let problem = &report.failures[0].problem;
        assert!(matches!(problem, ObjectProblem::WrongSize { found: 0, .. }), "{problem:?}");
        assert_eq!(report.failures[0].directory, Some(first.clone()));
        let text = report.failures[0].to_string();
        let path = first.join(&tool).display().to_string();
        assert!(text.contains(&format!(" needs {path}: the size is 0 bytes")), "{text}");
        check(&image, &[&second, &first], kind).unwrap();
    }
}

/// overlayfs follows neither symbolic links nor mounts in an object directory.
#[test]
fn object_behind_link_or_mount_is_reported() {
    let Some(sandbox) = sandbox!() else { return };
    let objects = copied_objects(&sandbox, "objects", &V1);
    let image = bare(&V1.image());
    let tool = object_of(&image, "/usr/bin/tool");
    let prefix = objects.join(tool.parent().unwrap());
    fs::rename(&prefix, sandbox.path("moved")).unwrap();
    symlink(sandbox.path("moved"), &prefix).unwrap();
    let report = failed(&image, &[&objects], ObjectCheck::All);
    let problem = &report.failures[0].problem;
    assert!(matches!(problem, ObjectProblem::NotRegularFile { .. }), "{problem:?}");

    fs::remove_file(&prefix).unwrap();
    fs::create_dir(&prefix).unwrap();
    rustix::mount::mount_bind(sandbox.path("moved"), &prefix).unwrap();
    let report = failed(&image, &[&objects], ObjectCheck::All);
    let problem = &report.failures[0].problem;
    assert!(matches!(problem, ObjectProblem::Unreadable(_)), "{problem:?}");
    // The same object is reachable by path, which the check must not use.
    assert!(objects.join(&tool).is_file());
}

fn options(objects: &Path, check: Option<ObjectCheck>) -> MountOptions {
    let mut options = MountOptions::new(objects);
    options.overlay.check = check;
    options
}

#[test]
fn missing_object_rejects_mount_as_check_requests() {
    let Some(sandbox) = sandbox!() else { return };
    let empty = sandbox.directory("empty");
    for check in [None, Some(ObjectCheck::Off), Some(ObjectCheck::Sample)] {
        let mount = options(&empty, check).mount(V1.image()).unwrap();
        assert!(mount.report().unwrap().overlay.as_ref().unwrap().check.is_none());
    }
    for kind in CHECKS {
        let error = options(&empty, Some(kind)).mount(V1.image()).unwrap_err();
        let image = V1.image();
        let cause = "cannot use the objects: 18 of 18 objects failed the check";
        assert_eq!(error.to_string(), format!("{}: {cause}", image.display()));
        assert_eq!(error.check_report().unwrap().failures.len(), 10);
        assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::InvalidData);

        let (result, events) = mount_and_events(&options(&V1.objects(), Some(kind)), &image);
        let mount = result.unwrap();
        let report = mount.report().unwrap().overlay.as_ref().unwrap().check.as_ref().unwrap();
        assert_eq!((report.check, report.objects), (kind, 18));
        let is_report = |event: &&Event| matches!(event, Event::ObjectsChecked(_));
        let event = events.iter().find(is_report).unwrap();
        assert_eq!(event.to_string(), report.to_string());
    }
}

#[test]
fn check_none_with_verity_mounts_without_samples() {
    let Some(_sandbox) = sandbox!() else { return };
    let mut options = options(&V1.objects(), None);
    options.overlay.verity = Some(Verity::Require);
    assert_eq!(options.mount(V1.image()).unwrap_err().kind(), ErrorKind::VerityUnavailable);
    options.overlay.check = Some(ObjectCheck::Off);
    options.mount(V1.image()).unwrap();
}

/// Makes an image with one file, and its object: zeros of this size. Returns the image and the object
/// directory.
fn with_zeros(sandbox: &Sandbox, size: u64, digest: Digest) -> (PathBuf, PathBuf) {
    let mut image = ErofsImage::new();
    let Digest::Sha256(bytes) = digest else { unreachable!() };
    let metacopy = [&[0, 36, 0, 1][..], &bytes].concat();
    let file = image.file(size, Some(&metacopy), Some(b"/ab/cd"));
    image.link(0, "zeros", file);
    let objects = sandbox.directory("zeros");
    fs::create_dir(objects.join("ab")).unwrap();
    fs::File::create(objects.join("ab/cd")).unwrap().set_len(size).unwrap();
    (sandbox.file("zeros.cfs", &image.finish()), objects)
}

#[test]
fn object_of_any_size_keeps_its_digest() {
    let Some(sandbox) = sandbox!() else { return };
    let image = |digest: Digest, size: u64| {
        let (image, objects) = with_zeros(&sandbox, size, digest);
        let result = check(&bare(&image), &[&objects], ObjectCheck::Content);
        fs::remove_dir_all(objects).unwrap();
        result
    };
    for size in [0, 1, 4096, 4097, 262_144, 262_145, 600_000, 8 << 20, (8 << 20) + 1, 20 << 20] {
        let digest = Digest::of_bytes(Algorithm::Sha256, &vec![0; size]);
        image(digest, size as u64).unwrap();
        let report = image(Digest::Sha256([1; 32]), size as u64).unwrap_err();
        let problem = &report.check_report().unwrap().failures[0].problem;
        match problem {
            ObjectProblem::WrongContent { found, .. } => assert_eq!(*found, digest),
            problem => panic!("{size}: {problem:?}"),
        }
    }
}

/// Opening a device can have an effect. The driver of this device does not exist, so opening it would end the
/// search for missing objects.
#[test]
fn device_with_entry_of_a_file_is_not_opened() {
    let Some(sandbox) = sandbox!() else { return };
    let mut image = ErofsImage::new();
    let device = image.device(100);
    image.link_as(0, "device", device, REGULAR);
    let file = image.file(100, Some(b""), Some(b"/ab/cd"));
    image.link(0, "file", file);
    let image = sandbox.file("image.cfs", &image.finish());
    let mut missing = Vec::new();
    let options = options(&sandbox.directory("objects"), None);
    let mounted = options.mount_with_events(image, &mut |event| {
        if let Event::ObjectMissing { file, .. } = event {
            missing.push(file);
        }
        ControlFlow::Continue(())
    });
    mounted.unwrap();
    assert_eq!(missing, [Path::new("/file")]);
}

/// Without the capability, the kernel hides the xattrs of overlayfs.
#[test]
fn check_without_capability_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, objects) = (bare(&V1.image()), sandbox.directory("objects"));
    let rejected = std::thread::scope(|scope| {
        let check = || {
            let mut sets = capabilities(None).unwrap();
            sets.effective.remove(CapabilitySet::SYS_ADMIN);
            set_capabilities(None, sets).unwrap();
            let listed = image.objects().next().unwrap().unwrap_err();
            (check(&image, &[&objects], ObjectCheck::All).unwrap_err(), listed)
        };
        scope.spawn(check).join().unwrap()
    });
    assert_eq!(rejected.0.kind(), ErrorKind::PermissionDenied, "{}", rejected.0);
    assert_eq!(rejected.1.kind(), ErrorKind::PermissionDenied, "{}", rejected.1);
}

/// A user namespace without the owner of a directory may not read the directory.
#[test]
fn check_of_idmapped_mount_reads_all_directories() {
    let Some(sandbox) = sandbox!() else { return };
    let mut image = ErofsImage::new();
    let directory = image.private_directory(70_000);
    image.link(0, "directory", directory);
    let file = image.file(100, Some(b""), Some(b"/ab/cd"));
    image.link(directory, "file", file);
    let image = sandbox.file("image.cfs", &image.finish());
    let objects = sandbox.directory("objects");
    fs::create_dir(objects.join("ab")).unwrap();
    fs::write(objects.join("ab/cd"), [0; 100]).unwrap();
    let (mut process, namespace) = user_namespace();
    let mut options = options(&objects, Some(ObjectCheck::All));
    options.idmap = Some(PathBuf::from(namespace).into());
    let mounted = options.mount(image);
    process.kill().unwrap();
    process.wait().unwrap();
    mounted.unwrap();
}

#[test]
fn cancelled_check_ends_soon() {
    let Some(sandbox) = sandbox!() else { return };
    let digest = Digest::Sha256([0; 32]);
    // Hashing the object would take an hour.
    let (image, objects) = with_zeros(&sandbox, 1 << 40, digest);
    let options = options(&objects, Some(ObjectCheck::Content));
    let check = || {
        let started = Instant::now();
        let mut calls = 0;
        let result = options.mount_with_events(&image, &mut |event| match event {
            Event::Checking(_) => {
                calls += 1;
                if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            }
            _ => ControlFlow::Continue(()),
        });
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert_eq!(calls, 3);
        assert!(started.elapsed() < Duration::from_secs(60));
    };
    check();
    // The calls come from the thread that mounts, also if there is a CPU for one thread only.
    let on_one_cpu = || {
        let mut cpu = CpuSet::new();
        cpu.set(sched_getcpu());
        sched_setaffinity(None, &cpu).unwrap();
        check();
    };
    std::thread::scope(|scope| scope.spawn(on_one_cpu).join().unwrap());
}

#[test]
fn progress_of_contents_reports_bytes() {
    let Some(sandbox) = sandbox!() else { return };
    // The object is hashed on all CPUs, after all names are counted.
    let size = 400 << 20;
    let (image, objects) = with_zeros(&sandbox, size, Digest::Sha256([0; 32]));
    for kind in CHECKS {
        let mut found = Vec::new();
        let result = options(&objects, Some(kind)).mount_with_events(&image, &mut |event| {
            if let Event::Checking(progress) = event {
                found.push((progress.bytes, progress.total_bytes));
            }
            ControlFlow::Continue(())
        });
        assert_eq!(result.is_ok(), kind == ObjectCheck::All);
        if kind == ObjectCheck::All {
            assert!(found.iter().all(|progress| *progress == (0, 0)), "{found:?}");
            continue;
        }
        assert!(found.is_sorted_by_key(|(bytes, _)| *bytes), "{found:?}");
        assert!(found.iter().all(|(bytes, total)| bytes <= total && *total <= size), "{found:?}");
        found.retain(|(bytes, total)| *total == size && (size / 4..size * 3 / 4).contains(bytes));
        assert!(!found.is_empty());
    }
}

/// Returns the error of a check of all objects of an image, with empty object directories.
fn error_of(sandbox: &Sandbox, image: &ErofsImage) -> Error {
    let image = sandbox.file("hostile.cfs", &image.finish());
    let objects = sandbox.path("empty");
    fs::create_dir_all(&objects).unwrap();
    let by_list = bare(&image).objects().find_map(Result::err);
    let error = options(&objects, Some(ObjectCheck::All)).mount(&image).unwrap_err();
    if let Error::Overlay(OverlayError::Objects(error)) = &error {
        // The paths may differ, because threads read directories in any order.
        let kind = std::mem::discriminant(error);
        assert_eq!(by_list.as_ref().map(std::mem::discriminant), Some(kind), "{by_list:?}");
    }
    error
}

fn objects_error(error: Error) -> ObjectsError {
    assert_eq!(error.kind(), ErrorKind::NotAnImage, "{error}");
    match error {
        Error::Overlay(OverlayError::Objects(error)) => error,
        error => panic!("{error}"),
    }
}

#[test]
fn directory_loop_in_image_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let mut inside_itself = ErofsImage::new();
    let directory = inside_itself.directory();
    inside_itself.link(0, "a", directory);
    inside_itself.link(directory, "again", directory);
    let mut root_inside = ErofsImage::new();
    let directory = root_inside.directory();
    root_inside.link(0, "a", directory);
    root_inside.link(directory, "root", 0);
    let mut two_names = ErofsImage::new();
    let directory = two_names.directory();
    two_names.link(0, "a", directory);
    two_names.link(0, "b", directory);
    for image in [inside_itself, root_inside, two_names] {
        let error = objects_error(error_of(&sandbox, &image));
        assert!(matches!(error, ObjectsError::DirectoryLoop { .. }), "{error}");
    }
}

#[test]
fn directories_that_share_entries_are_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let mut image = ErofsImage::new();
    let file = image.file(1, None, None);
    let first = image.directory();
    (0..200).for_each(|number| image.link(first, format!("{number}"), file));
    image.link(0, "first", first);
    for number in 0..500 {
        let other = image.directory_sharing(first);
        image.link(0, format!("{number}"), other);
    }
    let error = objects_error(error_of(&sandbox, &image));
    assert!(matches!(error, ObjectsError::TooManyEntries { .. }), "{error}");
}

#[test]
fn path_longer_than_path_max_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let mut image = ErofsImage::new();
    let mut parent = 0;
    for _ in 0..20 {
        let directory = image.directory();
        image.link(parent, "d".repeat(250), directory);
        parent = directory;
    }
    let error = objects_error(error_of(&sandbox, &image));
    assert!(matches!(error, ObjectsError::PathTooLong { .. }), "{error}");
    assert!(error.to_string().len() < 1000, "{error}");
}

#[test]
fn invalid_reference_is_reported_as_a_failure() {
    let Some(sandbox) = sandbox!() else { return };
    let good = &[0, 4, 0, 0][..];
    let long = [b"/", &[b'a'; 3000][..]].concat();
    let references: &[(&[u8], Option<&[u8]>)] = &[
        (good, Some(b"ab/cd")),
        (good, Some(b"/../ab")),
        (good, Some(b"/ab/./cd")),
        (good, Some(b"/ab//cd")),
        (good, Some(b"/")),
        (good, Some(b"/ab\0cd")),
        (good, None),
        (&[0, 5, 0, 0], Some(b"/ab/cd")),
        (&[0, 36, 0, 1], Some(b"/ab/cd")),
    ];
    let mut image = ErofsImage::new();
    for (number, (metacopy, redirect)) in references.iter().enumerate() {
        let file = image.file(1, Some(metacopy), *redirect);
        image.link(0, format!("{number}"), file);
    }
    let file = image.file(1, Some(good), Some(&long));
    image.link(0, "long", file);
    let error = error_of(&sandbox, &image);
    let report = error.check_report().unwrap();
    let expected = [(ObjectProblemKind::InvalidReference, 9), (ObjectProblemKind::Unreadable, 1)];
    assert_eq!(report.failed_by_kind, expected, "{:?}", report.failures);
    let text = report.failures[0].to_string();
    assert_eq!(text, "/0: the reference to the object is invalid");
}

/// The type in the entry of a directory is a hint for programs. overlayfs uses the inode.
#[test]
fn file_with_false_entry_type_is_still_checked() {
    let Some(sandbox) = sandbox!() else { return };
    let mut image = ErofsImage::new();
    let file = image.file(1, Some(b""), Some(b"/ab/cd"));
    image.link_as(0, "link", file, SYMLINK);
    let directory = image.directory();
    image.link_as(0, "directory", directory, SYMLINK);
    let file = image.file(1, Some(b""), Some(b"/ab/ce"));
    image.link(directory, "file", file);
    let error = error_of(&sandbox, &image);
    let named = |failure: &sealmount::ObjectFailure| failure.object.path.clone();
    let paths: Vec<_> = error.check_report().unwrap().failures.iter().map(named).collect();
    assert_eq!(paths, [Path::new("/link"), Path::new("/directory/file")]);
}

#[test]
fn absurd_size_is_rejected_without_reading() {
    let Some(sandbox) = sandbox!() else { return };
    let (_, objects) = with_zeros(&sandbox, 1 << 40, Digest::Sha256([0; 32]));
    let mut image = ErofsImage::new();
    for (number, size) in [i64::MAX as u64, 1 << 62, (1 << 40) - 1].into_iter().enumerate() {
        let metacopy = [&[0, 36, 0, 1][..], &[7; 32]].concat();
        let file = image.file(size, Some(&metacopy), Some(b"/ab/cd"));
        image.link(0, format!("{number}"), file);
    }
    let image = bare(&sandbox.file("absurd.cfs", &image.finish()));
    let report = failed(&image, &[&objects], ObjectCheck::Content);
    assert_eq!(report.failed_by_kind, [(ObjectProblemKind::WrongSize, 3)]);
}

#[test]
fn object_without_digest_is_reported_with_verity() {
    let Some(sandbox) = sandbox!() else { return };
    let objects = sandbox.directory("objects");
    fs::create_dir(objects.join("ab")).unwrap();
    fs::write(objects.join("ab/cd"), "x").unwrap();
    let mut image = ErofsImage::new();
    let file = image.file(1, Some(b""), Some(b"/ab/cd"));
    image.link(0, "file", file);
    let image = bare(&sandbox.file("image.cfs", &image.finish()));
    let report = check(&image, &[&objects], ObjectCheck::Content).unwrap();
    assert_eq!((report.objects, report.without_digest), (1, 1));
    assert!(report.to_string().ends_with(", 1 objects without a digest in the image"), "{report}");
}
