//! Tests the library with real mounts on the running kernel.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use sealmount::{
    Atime, AttachProblem, CopyOptions, Digest, DirectoryRole, ErofsError, Error, ErrorKind, Event,
    Format, Hint, Image, ImageError, ImageProblem, LayerMethod, Location, MemoryKind, Method,
    MountOptions, ObjectVerity, Operation, OverlayError, SizeLimit, SourceError, SourceMethod,
    UpperLayer, VerifiedBy, Verity, VerityUnavailable,
};

use test_support::{
    Fixture, V1, V2, assert_has_hard_link, assert_is_manifest, assert_is_manifest_mapped,
    assert_no_loop_device, image_problem, loop_devices, mount_and_events, mount_at, mounts,
    sandbox, umount,
};

#[test]
fn both_formats_mount_with_and_without_copy() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    for fixture in [V1, V2] {
        let mut ramfs = fixture.copy_options();
        ramfs.copy = Some(MemoryKind::Ramfs);
        for options in [fixture.options(), fixture.copy_options(), ramfs] {
            let mount = options.mount(fixture.image()).unwrap();
            mount.attach(&mount_point).unwrap();
            assert_is_manifest(&mount_point);
            if fixture.digest == V2.digest {
                assert_has_hard_link(&mount_point);
            }
            umount(&mount_point);
        }
    }
}

#[test]
fn copy_stays_intact_without_its_source() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let source = sandbox.tmpfs("source");
    let image = source.join("image.cfs");

    let attach = |options: MountOptions| {
        fs::copy(V1.image(), &image).unwrap();
        options.mount(&image).unwrap().attach(&mount_point).unwrap();
    };
    // Without a copy, the mount keeps the file system of the image busy.
    attach(V1.options());
    assert_eq!(unmount(&source, UnmountFlags::empty()), Err(Errno::BUSY));
    umount(&mount_point);
    assert_no_loop_device(image.to_str().unwrap());

    for memory in [MemoryKind::Memfd, MemoryKind::Ramfs] {
        let source = sandbox.tmpfs(&format!("source of {memory:?}"));
        copy_outlives(memory, &source, &mount_point);
    }
}

fn copy_outlives(memory: MemoryKind, source: &Path, mount_point: &Path) {
    let image = source.join("image.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let mut options = V1.copy_options();
    options.copy = Some(memory);
    options.mount(&image).unwrap().attach(mount_point).unwrap();
    let mut file = OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all(&[0xff; 8192]).unwrap();
    file.set_len(100).unwrap();
    drop(file);
    fs::remove_file(&image).unwrap();
    umount(source);
    assert_is_manifest(mount_point);
    umount(mount_point);
}

#[test]
fn loop_device_of_copy_stays_until_last_unmount() {
    let Some(sandbox) = sandbox!() else { return };
    let (one, other) = (sandbox.directory("one"), sandbox.directory("other"));
    let image = sandbox.path("named.cfs");
    fs::copy(V1.image(), &image).unwrap();
    V1.copy_options().mount(&image).unwrap().attach(&one).unwrap();
    test_support::run("mount", ["--bind".as_ref(), one.as_os_str(), other.as_os_str()]);

    let name = format!("/memfd:sealmount:{} (deleted)\n", image.display());
    assert_eq!(loop_devices(image.to_str().unwrap()), [name]);
    umount(&one);
    assert_is_manifest(&other);
    assert_eq!(loop_devices(image.to_str().unwrap()).len(), 1);
    umount(&other);
    assert_no_loop_device(image.to_str().unwrap());
}

/// Checks the seals of the copy and the attributes of the loop device, as the kernel shows them.
#[test]
fn copy_uses_sealed_memfd_and_read_only_loop_device() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.path("sealed.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let name = format!("/memfd:sealmount:{} (deleted)", image.display());
    let mut copy = CopyOptions::new(MemoryKind::Memfd);
    copy.digest = Some(V1.digest());
    let source = Image::open(&image).unwrap().copy(&copy).unwrap();
    let mut memfds = 0;
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let link = fs::read_link(entry.unwrap().path());
        memfds += usize::from(link.is_ok_and(|target| target.as_os_str() == name.as_str()));
    }
    assert_eq!(memfds, 1);
    use rustix::fs::SealFlags as S;
    let seals = rustix::fs::fcntl_get_seals(&source).unwrap();
    assert!(seals.contains(S::SEAL | S::SHRINK | S::GROW | S::WRITE), "{seals:?}");
    let mount = source.mount().unwrap();
    drop(source);
    let device = mount.report().loop_device.clone().unwrap();
    let device = Path::new("/sys/block").join(device.file_name().unwrap());
    let attribute = |name: &str| fs::read_to_string(device.join(name)).unwrap().trim().to_owned();
    for (name, value) in [
        ("ro", "1"),
        ("loop/autoclear", "1"),
        ("loop/dio", "0"),
        ("loop/offset", "0"),
        ("loop/sizelimit", "0"),
        ("queue/logical_block_size", "4096"),
        ("size", "48"),
    ] {
        assert_eq!(attribute(name), value, "{name}");
    }
    drop(mount);
    assert_no_loop_device(image.to_str().unwrap());
}

#[test]
fn same_image_mounts_many_times() {
    let Some(sandbox) = sandbox!() else { return };
    let attach = |options: &MountOptions, name: String| {
        let mount_point = sandbox.directory(&name);
        options.mount(V2.image()).unwrap().attach(&mount_point).unwrap();
        mount_point
    };
    let mount_points: Vec<_> = (0..8)
        .flat_map(|n| {
            [
                attach(&V2.options(), format!("plain{n}")),
                attach(&V2.copy_options(), format!("copy{n}")),
            ]
        })
        .collect();
    for mount_point in &mount_points {
        assert_is_manifest(mount_point);
        umount(mount_point);
    }
}

#[test]
fn detached_mount_reads_moves_and_leaves_nothing() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.path("dropped.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let before = format!("{:?}", mounts());

    let mount = V1.copy_options().mount(&image).unwrap();
    assert_eq!(loop_devices(image.to_str().unwrap()).len(), 1);
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
    let hello = rustix::fs::openat(&mount, "hello.txt", flags, rustix::fs::Mode::empty()).unwrap();
    let mut text = String::new();
    File::from(hello).read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello from a composefs image\n");
    drop(mount);
    assert_eq!(format!("{:?}", mounts()), before);
    assert_no_loop_device(image.to_str().unwrap());

    let mount: OwnedFd = V1.options().mount(&image).unwrap().into_fd().unwrap();
    let mount_point = sandbox.directory("mnt");
    rustix::mount::move_mount(
        &mount,
        "",
        rustix::fs::CWD,
        &mount_point,
        rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .unwrap();
    assert_is_manifest(&mount_point);
}

#[test]
fn paths_given_as_descriptors_mount() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let open = |path: &Path| Location::from(File::open(path).unwrap());
    let (upperdir, workdir) = (sandbox.directory("upper"), sandbox.directory("work"));
    for mut options in [V1.options(), V1.copy_options()] {
        options.overlay.objects = vec![open(&V1.objects())];
        options.overlay.upper = Some(UpperLayer::new(open(&upperdir), open(&workdir)));
        options.mount(open(&V1.image())).unwrap().attach(open(&mount_point)).unwrap();
        assert_eq!(mount_at(&mount_point).unwrap().source, "composefs");
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }
}

#[test]
fn deleted_image_with_long_name_mounts_by_descriptor() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let path = sandbox.path(&"x".repeat(255));
    for memory in [MemoryKind::Memfd, MemoryKind::Ramfs] {
        fs::copy(V1.image(), &path).unwrap();
        let image = File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let mut options = V1.copy_options();
        options.copy = Some(memory);
        options.mount(image).unwrap().attach(&mount_point).unwrap();
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }
}

#[test]
fn upper_layer_keeps_changes() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let mut options = V1.copy_options();
    options.overlay.upper =
        Some(UpperLayer::new(sandbox.directory("upper"), sandbox.directory("work")));
    options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    assert!(mount_at(&mount_point).unwrap().options.contains(&"rw".into()));
    assert_is_manifest(&mount_point);
    fs::write(mount_point.join("new"), "new").unwrap();
    fs::remove_file(mount_point.join("hello.txt")).unwrap();
    let big = mount_point.join("data/4097");
    OpenOptions::new().append(true).open(&big).unwrap().write_all(b"more").unwrap();
    umount(&mount_point);

    options.overlay.read_only = true;
    options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    assert_eq!(fs::read(mount_point.join("new")).unwrap(), b"new");
    assert!(!mount_point.join("hello.txt").exists());
    assert_eq!(fs::metadata(&big).unwrap().size(), 4101);
    let write = fs::write(mount_point.join("new"), "newer").unwrap_err();
    assert_eq!(write.raw_os_error(), Some(Errno::ROFS.raw_os_error()));
}

#[test]
fn conflicting_layers_are_rejected_by_path() {
    let Some(sandbox) = sandbox!() else { return };
    let (one, other) = (sandbox.directory("one"), sandbox.directory("other"));
    let (objects, tmpfs) = (V1.objects(), sandbox.tmpfs("tmpfs"));
    std::os::unix::fs::symlink(&objects, sandbox.path("link")).unwrap();
    let link = sandbox.path("link");
    let rejected = |basedirs: &[&Path], upper: Option<(&Path, &Path)>| {
        let mut options = MountOptions::new(basedirs[0]);
        options
            .overlay
            .objects
            .extend(basedirs[1..].iter().map(|basedir| Location::from(*basedir)));
        options.overlay.upper = upper.map(|(upperdir, workdir)| UpperLayer::new(upperdir, workdir));
        error_of(&options, &V1.image())
    };
    let cases = [
        (rejected(&[&objects, &link], None), [&link, &objects]),
        (rejected(&[&objects], Some((&one, &one))), [&one, &one]),
        (rejected(&[&objects, &one], Some((&one, &other))), [&one, &one]),
        (rejected(&[&objects, &one], Some((&other, &one))), [&one, &one]),
    ];
    for (error, [found, before]) in cases {
        let Error::Overlay(OverlayError::SameDirectory { path, other_path, .. }) = &error else {
            panic!("{error}")
        };
        assert_eq!(error.kind(), ErrorKind::InvalidOptions);
        assert_eq!([path, other_path], [found, before], "{error}");
    }
    let error = rejected(&[&objects], Some((&one, &tmpfs)));
    let Error::Overlay(OverlayError::WorkdirOnOtherMount { upperdir, workdir, .. }) = &error else {
        panic!("{error}")
    };
    assert_eq!([upperdir, workdir], [&one, &tmpfs]);
    // Only the kernel detects this conflict. The message names the image, and the hint names the cause.
    let error = rejected(&[&objects], Some((&one, &sandbox.directory("one/within"))));
    assert!(error.to_string().starts_with(V1.image().to_str().unwrap()), "{error}");
    assert!(error.to_string().contains("overlay"), "{error}");
    assert!(error.hint().unwrap().to_string().contains("within"), "{:?}", error.hint());
}

/// Checks that SELinux contexts reach overlayfs, which rejects them on a kernel without SELinux.
#[test]
fn selinux_contexts_are_passed_to_overlayfs() {
    let Some(_sandbox) = sandbox!() else { return };
    for name in ["context", "fscontext", "defcontext", "rootcontext"] {
        let text = format!("basedir={},{name}=a:b:c:s0\\,c1", V1.objects().display());
        match MountOptions::parse(text).unwrap().mount(V1.image()) {
            Ok(_) => assert!(Path::new("/sys/fs/selinux").exists(), "{name}: ignored"),
            Err(error) => {
                let option = format!("{name}=a:b:c:s0,c1");
                let Some(kernel) = error.kernel() else { panic!("{name}: {error}") };
                assert_eq!(kernel.operation(), Operation::SetOption, "{error}");
                assert_eq!(kernel.object(), Some(Path::new(&option)));
                assert_eq!(error.kind(), ErrorKind::InvalidOptions);
                assert!(error.hint().unwrap().to_string().contains("SELinux"));
            }
        }
    }
}

#[test]
fn rw_without_upper_layer_mounts_read_only() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let options = MountOptions::parse(format!("basedir={},rw", V1.objects().display())).unwrap();
    options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    let write = fs::write(mount_point.join("hello.txt"), "x").unwrap_err();
    assert_eq!(write.raw_os_error(), Some(Errno::ROFS.raw_os_error()));
    assert!(!mount_at(&mount_point).unwrap().options.contains(&"rw".into()));
}

#[test]
fn mount_attributes_are_reported_and_enforced() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let mut options = V1.options();
    let attributes = &mut options.overlay.attributes;
    for attribute in [
        &mut attributes.nosuid,
        &mut attributes.nodev,
        &mut attributes.noexec,
        &mut attributes.nosymfollow,
        &mut attributes.nodiratime,
    ] {
        *attribute = true;
    }
    options.overlay.atime = Atime::Noatime;
    options.overlay.superblock_flags.sync = true;
    // sealmount resolves symbolic links in the source, because libmount looks for the canonical path.
    let link = sandbox.path("link");
    std::os::unix::fs::symlink(V1.image(), &link).unwrap();
    options.mount(link).unwrap().attach(&mount_point).unwrap();
    let mount = mount_at(&mount_point).unwrap();
    for option in
        ["ro", "nosuid", "nodev", "noexec", "nosymfollow", "noatime", "nodiratime", "sync"]
    {
        assert!(mount.options.contains(&option.into()), "{option}: {mount:?}");
    }
    assert_eq!(mount.fs_type, "overlay");
    assert_eq!(mount.source, fs::canonicalize(V1.image()).unwrap().to_str().unwrap());
    let tool = Command::new(mount_point.join("usr/bin/tool")).spawn().unwrap_err();
    assert_eq!(tool.raw_os_error(), Some(Errno::ACCESS.raw_os_error()));
    let link = fs::read(mount_point.join("usr/lib/link")).unwrap_err();
    assert_eq!(link.raw_os_error(), Some(Errno::LOOP.raw_os_error()));
}

#[test]
fn object_missing_in_first_basedir_uses_next() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let empty = sandbox.directory("odd, name: \\ and all");
    let mut options = V1.options();
    options.overlay.objects.insert(0, empty.clone().into());
    options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    assert_is_manifest(&mount_point);
    umount(&mount_point);
    // Options parsed from text must mount the same tree.
    let options = MountOptions::parse(options.to_text()).unwrap();
    options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    assert_is_manifest(&mount_point);
}

#[test]
fn image_with_long_and_odd_path_mounts() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let long = sandbox.directory(&"x".repeat(250)).join("odd\n,:\\ name");
    fs::copy(V1.image(), &long).unwrap();
    for options in [V1.options(), V1.copy_options()] {
        options.mount(&long).unwrap().attach(&mount_point).unwrap();
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }
}

#[test]
fn idmap_maps_owners_and_rejects_other_namespaces() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let (_process, namespace) = test_support::user_namespace();
    for mut options in [V1.options(), V2.copy_options()] {
        let fixture = if options.copy.is_none() { V1 } else { V2 };
        options.idmap = Some(namespace.as_str().into());
        options.mount(fixture.image()).unwrap().attach(&mount_point).unwrap();
        assert_is_manifest_mapped(&mount_point, 100_000);
        umount(&mount_point);
    }

    let mut options = V1.options();
    options.idmap = Some("/proc/self/ns/mnt".into());
    let error = options.mount(V1.image()).unwrap_err();
    assert!(matches!(error, Error::Erofs(ErofsError::NotUserNamespace { .. })), "{error}");
    assert_eq!(error.kind(), ErrorKind::InvalidOptions);
    options.idmap = Some("/proc/self/ns/user".into());
    let error = options.mount(V1.image()).unwrap_err();
    assert_errno(&error, Errno::PERM);
    assert_eq!(error.kernel().unwrap().operation(), Operation::IdmapMount, "{error}");
}

#[track_caller]
fn assert_errno(error: &Error, errno: Errno) {
    assert_eq!(error.raw_os_error(), Some(errno.raw_os_error()), "{error}");
}

/// Returns the events of a mount that must succeed, without the reports of progress.
fn events_of(options: &MountOptions, image: &Path) -> Vec<Event> {
    let (result, events) = mount_and_events(options, image);
    result.unwrap();
    events
}

#[test]
fn each_event_of_a_mount_is_reported() {
    let Some(_sandbox) = sandbox!() else { return };
    let events = events_of(&V2.copy_options(), &V2.image());
    assert!(matches!(
        &events[0],
        Event::ImageOpened { size: 16384, format: Format::Composefs { version: 2, .. }, .. }
    ));
    assert!(matches!(
        &events[1],
        Event::DigestVerified { digest, by: VerifiedBy::Userspace, .. } if *digest == V2.digest(),
    ));
    assert!(matches!(&events[2], Event::Copied { size: 16384, memory: MemoryKind::Memfd, .. }));
    assert!(matches!(&events[3], Event::LoopDevice { .. }));
    assert!(matches!(
        &events[4],
        Event::MethodUsed { method: Method::Source(SourceMethod::LoopDevice), .. },
    ));
    assert!(matches!(
        &events[5],
        Event::MethodUsed { method: Method::Layers(LayerMethod::Descriptors), .. },
    ));
    assert!(matches!(events.last(), Some(Event::Verity(ObjectVerity::Disabled))));

    // Without a copy, a loop device is the last method. An event reports each earlier method.
    let events = events_of(&V1.options(), &V1.image());
    let used = events.iter().filter(|event| matches!(event, Event::MethodUsed { .. })).count();
    let by_loop_device = events.iter().any(|event| matches!(event, Event::LoopDevice { .. }));
    assert_eq!(used, 2);
    assert_eq!(by_loop_device, path_is_unsupported(&events).is_some());
}

/// Returns the errno that means that this kernel cannot mount the path of a descriptor.
fn path_is_unsupported(events: &[Event]) -> Option<i32> {
    let path = Method::Source(SourceMethod::DescriptorPath);
    events.iter().find_map(|event| match event {
        Event::MethodUnsupported { method, error, .. } if *method == path => {
            Some(error.raw_os_error())
        }
        _ => None,
    })
}

#[test]
fn event_callback_that_breaks_cancels_the_mount() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.path("cancelled.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let before = format!("{:?}", mounts());
    let events = events_of(&V1.copy_options(), &image).len();
    assert!(events >= 6, "{events} events");
    for end in 0..events {
        let mut seen = 0;
        let result = V1.copy_options().mount_with_events(&image, &mut |event| {
            seen += usize::from(!matches!(event, Event::Copying(_)));
            if seen > end { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "event {end}: {error}");
        assert_eq!(error.hint(), None);
        assert_eq!(seen, end + 1);
    }
    // A break during the copy ends the mount too.
    let result = V1.copy_options().mount_with_events(&image, &mut |event| match event {
        Event::Copying(_) => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(format!("{:?}", mounts()), before);
    assert_no_loop_device(image.to_str().unwrap());
}

#[test]
fn image_on_tmpfs_mounts_through_loop_device() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.tmpfs("tmpfs").join("image.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let events = events_of(&V1.options(), &image);
    assert_eq!(path_is_unsupported(&events), Some(Errno::NOTBLK.raw_os_error()), "{events:?}");
    assert!(events.iter().any(|event| matches!(event, Event::LoopDevice { .. })), "{events:?}");
}

/// Returns the error of a mount that must fail and leave no mount.
fn error_of(options: &MountOptions, image: &Path) -> Error {
    let before = format!("{:?}", mounts());
    let error = options.mount(image).unwrap_err();
    assert_eq!(format!("{:?}", mounts()), before);
    let message = error.to_string();
    assert!(!message.is_empty() && !message.contains('\n'), "{message:?}");
    error
}

#[test]
fn invalid_image_is_rejected_with_reason() {
    let Some(sandbox) = sandbox!() else { return };
    let v1 = fs::read(V1.image()).unwrap();
    let patched = |offset: usize, value: u8| {
        let mut image = v1.clone();
        image[offset] = value;
        image
    };
    let cases: [(&str, Vec<u8>, ImageProblem); 8] = [
        ("empty", vec![], ImageProblem::Empty),
        ("text", b"#!/bin/sh\necho hello\n".repeat(100), ImageProblem::NotComposefs),
        ("erofs", patched(0, 0), ImageProblem::PlainErofs),
        ("future", patched(4, 9), ImageProblem::HeaderVersion(9)),
        ("no-erofs", patched(1024, 0), ImageProblem::NoSuperblock),
        ("short", v1[..8192].to_vec(), ImageProblem::TooShort { size: 8192, expected: 24576 }),
        ("long", [&v1[..], b"x"].concat(), ImageProblem::TooLong { size: 24577, expected: 24576 }),
        ("start", v1[..100].to_vec(), ImageProblem::NoSuperblock),
    ];
    for (name, content, expected) in cases {
        let image = sandbox.file(name, &content);
        for options in [V1.options(), V1.copy_options()] {
            match error_of(&options, &image) {
                Error::Image(ImageError::Invalid { image: path, problem, .. }) => {
                    assert_eq!((&path, &problem), (&image, &expected));
                }
                error => panic!("{name}: {error}"),
            }
        }
    }
    test_support::run("mkfifo", [sandbox.path("fifo")]);
    for path in [sandbox.path("fifo").as_path(), Path::new("/dev/zero"), Path::new("/")] {
        let error = error_of(&V1.options(), path);
        assert!(matches!(image_problem(&error), Some(ImageProblem::NotAFile(_))), "{error}");
        assert_eq!(error.kind(), ErrorKind::NotAnImage);
    }
    let missing = error_of(&V1.options(), &sandbox.path("missing"));
    assert_errno(&missing, Errno::NOENT);
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(missing.to_string().contains(sandbox.path("missing").to_str().unwrap()), "{missing}");
}

#[test]
fn missing_or_non_directory_path_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let (file, missing) = (sandbox.file("file", b""), sandbox.path("missing"));
    for (path, expected) in [(&file, Errno::NOTDIR), (&missing, Errno::NOENT)] {
        let mut options = V1.options();
        options.overlay.objects.push(path.into());
        assert_directory(error_of(&options, &V1.image()), DirectoryRole::Objects, path, expected);
        let mut options = V1.options();
        let upper = UpperLayer::new(path, sandbox.path(""));
        options.overlay.upper = Some(upper);
        assert_directory(error_of(&options, &V1.image()), DirectoryRole::Upper, path, expected);
        let error = V1.options().mount(V1.image()).unwrap().attach(path).unwrap_err();
        assert_directory(error.into(), DirectoryRole::MountPoint, path, expected);
    }
}

fn assert_directory(error: Error, role: DirectoryRole, path: &Path, errno: Errno) {
    match &error {
        Error::Overlay(OverlayError::Directory(directory))
        | Error::Attach(AttachProblem::Directory(directory)) => {
            let found = (directory.role(), directory.path(), directory.raw_os_error());
            assert_eq!(found, (role, path, errno.raw_os_error()), "{error}");
            assert_eq!(error.kind(), ErrorKind::NotFound);
        }
        error => panic!("{error}"),
    }
}

#[test]
fn image_with_wrong_digest_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    for fixture in [V1, V2] {
        let good = fs::read(fixture.image()).unwrap();
        let size = good.len();
        for offset in [9, 1030, 4096, size / 2, size - 1] {
            let mut bad = good.clone();
            bad[offset] ^= 0x10;
            let image = sandbox.file("bad", &bad);
            let error = error_of(&fixture.copy_options(), &image);
            assert_eq!(error.kind(), ErrorKind::DigestMismatch);
            let Error::Source(SourceError::DigestMismatch { expected, found, .. }) = error else {
                panic!("{error}")
            };
            assert_eq!(*expected, fixture.digest());
            assert_eq!(*found, Digest::of_bytes(expected.algorithm(), &bad));
            assert_no_loop_device(image.to_str().unwrap());
        }
    }
}

#[test]
fn digest_without_copy_or_fs_verity_is_rejected() {
    let Some(_sandbox) = sandbox!() else { return };
    let mut options = V1.copy_options();
    options.copy = None;
    let error = error_of(&options, &V1.image());
    let is_unavailable = matches!(error, Error::Source(SourceError::VerityUnavailable { .. }));
    assert!(is_unavailable, "{error}");
    assert_eq!(error.kind(), ErrorKind::VerityUnavailable);
    assert!(error.hint().unwrap().to_string().contains("Image::copy"));
}

fn with_verity(fixture: &Fixture, verity: Verity) -> MountOptions {
    let mut options = fixture.options();
    options.overlay.verity = Some(verity);
    options
}

#[test]
fn verity_without_object_fs_verity_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    // tmpfs has no fs-verity on any kernel.
    let objects = sandbox.tmpfs("tmpfs");
    let mut options = with_verity(&V1, Verity::Require);
    options.overlay.objects = vec![objects.into()];
    let reason_of = |error: Error| match error {
        Error::Overlay(OverlayError::ObjectsVerityUnavailable { reason, .. }) => reason,
        error => panic!("{error}"),
    };
    let unsupported = VerityUnavailable::Unsupported;
    assert_eq!(reason_of(error_of(&options, &V1.image())), unsupported);
    // A digest requires verity too, without the option.
    options.overlay.verity = None;
    options.copy = Some(MemoryKind::Memfd);
    options.digest = Some(V1.digest());
    assert_eq!(reason_of(error_of(&options, &V1.image())), unsupported);

    // The objects in the source tree have no fs-verity on any file system.
    let error = error_of(&with_verity(&V1, Verity::Require), &V1.image());
    assert_eq!(error.kind(), ErrorKind::VerityUnavailable);
    reason_of(error);
}

#[test]
fn tryverity_without_fs_verity_reports_unverified() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let objects = sandbox.tmpfs("tmpfs");
    test_support::run(
        "cp",
        ["-r", &format!("{}/.", V1.objects().display()), objects.to_str().unwrap()],
    );
    let mut options = with_verity(&V1, Verity::Try);
    options.overlay.objects = vec![objects.into()];
    // With a digest, the image must match. sealmount enforces verity of the objects only where the
    // kernel can.
    for digest in [None, Some(V1.digest())] {
        options.digest = digest;
        options.copy = digest.map(|_| MemoryKind::Memfd);
        let mount = options.mount(V1.image()).unwrap();
        let expected = ObjectVerity::UnsupportedByObjects(VerityUnavailable::Unsupported);
        assert_eq!(mount.verity(), Some(expected));
        assert_eq!(mount.report().unwrap().source.verified.map(|found| found.digest), digest);
        mount.attach(&mount_point).unwrap();
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }
    options.digest = Some(V2.digest());
    let error = error_of(&options, &V1.image());
    assert_eq!(error.kind(), ErrorKind::DigestMismatch, "{error}");
}

#[test]
fn error_text_keeps_control_characters_escaped() {
    let Some(sandbox) = sandbox!() else { return };
    let odd = |name: &str| sandbox.path(&format!("a\n\x1b[31m{name}"));
    let image = odd("image");
    fs::copy(V1.image(), &image).unwrap();
    let damaged = odd("damaged");
    fs::write(&damaged, "text").unwrap();
    let truncated = odd("truncated");
    fs::write(&truncated, b"\x28\xb5\x2f\xfd").unwrap();
    let mut mismatch = V1.copy_options();
    mismatch.digest = Some("0".repeat(64).parse().unwrap());
    let mut limited = V1.copy_options();
    limited.size = Some(SizeLimit::Bytes(4096));
    let mut unverified = V1.copy_options();
    unverified.copy = None;
    let mut upper = V1.options();
    upper.overlay.upper = Some(UpperLayer::new(odd("upper"), odd("work")));
    let mut same = MountOptions::new(sandbox.path(""));
    same.overlay.objects.push(format!("{}/a\n\x1b[31mlink", sandbox.path("").display()).into());
    std::os::unix::fs::symlink(".", odd("link")).unwrap();
    let mut no_verity = V1.options();
    no_verity.overlay.verity = Some(Verity::Require);
    no_verity.overlay.objects = vec![odd("objects").into()];
    fs::create_dir(odd("objects")).unwrap();
    fs::create_dir(odd("objects").join("ab")).unwrap();
    fs::write(odd("objects").join("ab/c"), "object").unwrap();
    let mut not_a_namespace = V1.options();
    not_a_namespace.idmap = Some(image.clone().into());

    let attach = V1.options().mount(V1.image()).unwrap().attach(odd("mount point")).unwrap_err();
    let errors: Vec<Error> = vec![
        error_of(&V1.options(), &odd("missing")),
        error_of(&V1.options(), &damaged),
        error_of(&V1.copy_options(), &truncated),
        error_of(&V1.options(), &truncated),
        error_of(&mismatch, &image),
        error_of(&limited, &image),
        error_of(&unverified, &image),
        error_of(&MountOptions::new(odd("missing")), &image),
        error_of(&upper, &image),
        error_of(&same, &image),
        error_of(&no_verity, &image),
        error_of(&not_a_namespace, &image),
        MountOptions::parse("a\n\x1b[31m=1").unwrap_err().into(),
        MountOptions::parse("basedir=/,size=a\n\x1b[31m").unwrap_err().into(),
        sealmount::enter_mount_namespace(odd("namespace")).unwrap_err().into(),
        attach.into(),
    ];
    for error in errors {
        let text = error.to_string();
        assert!(text.contains("a\\x0a\\x1b[31m"), "{text:?}");
        assert!(!text.contains(char::is_control), "{text:?}");
    }
}

#[test]
fn hint_names_types_or_mount_options() {
    let Some(sandbox) = sandbox!() else { return };
    let mut without_copy = V1.copy_options();
    without_copy.copy = None;
    let mut limited = V1.copy_options();
    limited.size = Some(SizeLimit::Bytes(4096));
    let mut size_alone = V1.options();
    size_alone.size = limited.size;
    let required = with_verity(&V1, Verity::Require);
    let mut plain_erofs = fs::read(V1.image()).unwrap();
    plain_erofs[0] = 0;
    let plain_erofs = sandbox.file("erofs", &plain_erofs);
    // The text for a Rust program names a type or a method. The text for mount(8) names an option.
    let cases: [(Error, &str, &str); 6] = [
        (error_of(&without_copy, &V1.image()), "Image::copy", "the option copy"),
        (error_of(&limited, &V1.image()), "CopyOptions::size", "size="),
        (error_of(&size_alone, &V1.image()), "MountOptions::copy", "the option copy"),
        (error_of(&MountOptions::default(), &V1.image()), "OverlayOptions::objects", "basedir="),
        (error_of(&required, &V1.image()), "Verity::Off", "noverity"),
        (error_of(&V1.options(), &plain_erofs), "Image::open_erofs", "-t erofs"),
    ];
    for (error, library, options) in cases {
        let hint: Hint = error.hint().unwrap_or_else(|| panic!("{error}"));
        assert!(hint.to_string().contains(library), "{error}: {hint}");
        assert!(hint.for_options().contains(options), "{error}: {}", hint.for_options());
        assert!(!hint.for_options().contains("::"), "{}", hint.for_options());
    }
    // Both texts give the same advice about the system.
    let missing = V1.options().mount(V1.image()).unwrap().attach(sandbox.path("missing"));
    let hint = missing.unwrap_err().hint().unwrap();
    assert_eq!(hint.to_string(), hint.for_options());
}

/// The kernel stacks an overlay on one overlayfs, and not on two.
#[test]
fn image_and_objects_on_an_overlay_mount() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let overlay_on = |lower: &Path, name: &str| {
        let place = sandbox.tmpfs(name);
        let [upper, work, root] = ["upper", "work", "root"].map(|name| place.join(name));
        for directory in [&upper, &work, &root] {
            fs::create_dir(directory).unwrap();
        }
        let [lower, upper, work] = [lower, &upper, &work].map(Path::display);
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let arguments = ["-t", "overlay", "overlay", "-o", &options, root.to_str().unwrap()];
        test_support::run("mount", arguments);
        root
    };
    let once = overlay_on(V1.image().parent().unwrap(), "once");
    let twice = overlay_on(&once, "twice");
    for copy in [None, Some(MemoryKind::Memfd), Some(MemoryKind::Ramfs)] {
        let mut options = MountOptions::new(once.join("objects"));
        options.copy = copy;
        options.mount(twice.join("image.cfs")).unwrap().attach(&mount_point).unwrap();
        assert_is_manifest(&mount_point);
        umount(&mount_point);

        options.overlay.objects = vec![twice.join("objects").into()];
        match error_of(&options, &once.join("image.cfs")) {
            Error::Overlay(OverlayError::ObjectsOnOverlay { path, source, .. }) => {
                assert_eq!(path, twice.join("objects"));
                assert_eq!(source.raw_os_error(), Errno::INVAL.raw_os_error());
            }
            error => panic!("{error}"),
        }
    }
    assert_no_loop_device(sandbox.path("").to_str().unwrap());
}

#[test]
fn symbolic_links_in_paths_are_followed() {
    let Some(sandbox) = sandbox!() else { return };
    let link = |name: &str, target: &Path| {
        let link = sandbox.path(name);
        std::os::unix::fs::symlink(target, &link).unwrap();
        link
    };
    let mount_point = sandbox.directory("mnt");
    let (upperdir, workdir) = (sandbox.directory("upper"), sandbox.directory("work"));
    // Each path has a symbolic link as its last part or as an earlier part.
    let objects = link("link to objects", V1.objects().parent().unwrap()).join("objects");
    let mut options = MountOptions::new(link("link to a link", &objects));
    options.overlay.upper =
        Some(UpperLayer::new(link("link to upper", &upperdir), link("link to work", &workdir)));
    let (image, target) = (link("link to image", &V1.image()), link("link to mnt", &mount_point));
    for copy in [None, Some(MemoryKind::Memfd), Some(MemoryKind::Ramfs)] {
        options.copy = copy;
        options.mount(&image).unwrap().attach(&target).unwrap();
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }

    let dangling = link("dangling", Path::new("/nowhere"));
    let circle = sandbox.path("circle");
    let circle = link("circle", &circle);
    for (path, errno) in [(dangling, Errno::NOENT), (circle, Errno::LOOP)] {
        assert_errno(&options.mount(&path).unwrap_err(), errno);
        assert_errno(&MountOptions::new(&path).mount(&image).unwrap_err(), errno);
        let error = V1.options().mount(&image).unwrap().attach(&path).unwrap_err();
        assert_errno(&error.into(), errno);
    }
}

#[test]
fn mount_keeps_permissions_of_the_image() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    V1.options().mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    let setuid = fs::metadata(mount_point.join("usr/bin/setuid")).unwrap();
    assert_eq!(setuid.permissions().mode() & 0o7777, 0o4755);
}
