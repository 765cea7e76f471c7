//! The library, with real mounts on the running kernel.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};
use sealmount::{
    Atime, DirectoryRole, Errno, Error, ImageError, Location, Memory, MountAttributes,
    MountOptions, NotVerity, ObjectVerity, Operation, Rung, Step, UpperLayer, VerifiedBy, Verity,
};

use test_support::{
    Fixture, V1, V2, assert_has_hard_link, assert_is_manifest, assert_is_manifest_mapped,
    assert_no_loop_device, loop_devices, mount_at, mounts, sandbox, umount,
};

#[test]
fn both_formats_plain_and_copied_show_the_manifest() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    for fixture in [V1, V2] {
        let mut ramfs = fixture.copy_options();
        ramfs.copy = Some(Memory::Ramfs);
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
fn a_copy_uses_nothing_of_its_source() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let source = sandbox.tmpfs("source");
    let image = source.join("image.cfs");

    let attach = |options: MountOptions| {
        fs::copy(V1.image(), &image).unwrap();
        options.mount(&image).unwrap().attach(&mount_point).unwrap();
    };
    // So that the test can tell: without copy the file system is in use.
    attach(V1.options());
    assert_eq!(unmount(&source, UnmountFlags::empty()), Err(Errno::BUSY));
    umount(&mount_point);
    assert_no_loop_device(image.to_str().unwrap());

    for memory in [Memory::Memfd, Memory::Ramfs] {
        let source = sandbox.tmpfs(&format!("source of {memory:?}"));
        copy_outlives(memory, &source, &mount_point);
    }
}

fn copy_outlives(memory: Memory, source: &Path, mount_point: &Path) {
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
fn the_loop_device_of_a_copy_has_a_name_and_goes_with_the_last_unmount() {
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

/// What the library asked the kernel for, as the kernel shows it.
#[test]
fn a_copy_is_sealed_and_its_loop_device_read_only() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.path("sealed.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let name = format!("/memfd:sealmount:{} (deleted)", image.display());
    let mut seals = Vec::new();
    let mut device = None;
    let mount = V1.copy_options().mount_with(&image, &mut |step| match step {
        Step::Copied { .. } => {
            for entry in fs::read_dir("/proc/self/fd").unwrap() {
                let link = entry.unwrap().path();
                if fs::read_link(&link).is_ok_and(|target| target.as_os_str() == name.as_str()) {
                    seals.push(rustix::fs::fcntl_get_seals(File::open(link).unwrap()).unwrap());
                }
            }
        }
        Step::LoopDevice { device: path } => device = Some(path),
        _ => {}
    });
    use rustix::fs::SealFlags as S;
    let [seals] = seals[..] else { panic!("{} memfds have that name", seals.len()) };
    assert!(seals.contains(S::SEAL | S::SHRINK | S::GROW | S::WRITE), "{seals:?}");
    let device = device.unwrap();
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
fn one_image_is_mounted_many_times() {
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
fn a_detached_mount_can_be_used_handed_on_and_dropped() {
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

    let mount: OwnedFd = V1.options().mount(&image).unwrap().into_fd();
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
fn everything_can_be_given_by_descriptor() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let open = |path: &Path| Location::from(File::open(path).unwrap());
    let (upperdir, workdir) = (sandbox.directory("upper"), sandbox.directory("work"));
    for mut options in [V1.options(), V1.copy_options()] {
        options.basedirs = vec![open(&V1.objects())];
        options.upper = Some(UpperLayer { upperdir: open(&upperdir), workdir: open(&workdir) });
        options.mount(open(&V1.image())).unwrap().attach(open(&mount_point)).unwrap();
        assert_eq!(mount_at(&mount_point).unwrap().source, "composefs");
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }
}

#[test]
fn a_deleted_image_with_a_long_name_can_be_given_by_descriptor() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let path = sandbox.path(&"x".repeat(255));
    for memory in [Memory::Memfd, Memory::Ramfs] {
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
fn an_upper_layer_takes_changes_and_keeps_them() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let mut options = V1.copy_options();
    options.upper = Some(UpperLayer {
        upperdir: sandbox.directory("upper").into(),
        workdir: sandbox.directory("work").into(),
    });
    options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    assert!(mount_at(&mount_point).unwrap().options.contains(&"rw".into()));
    assert_is_manifest(&mount_point);
    fs::write(mount_point.join("new"), "new").unwrap();
    fs::remove_file(mount_point.join("hello.txt")).unwrap();
    let big = mount_point.join("data/4097");
    OpenOptions::new().append(true).open(&big).unwrap().write_all(b"more").unwrap();
    umount(&mount_point);

    options.read_only = true;
    options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    assert_eq!(fs::read(mount_point.join("new")).unwrap(), b"new");
    assert!(!mount_point.join("hello.txt").exists());
    assert_eq!(fs::metadata(&big).unwrap().size(), 4101);
    let write = fs::write(mount_point.join("new"), "newer").unwrap_err();
    assert_eq!(write.raw_os_error(), Some(Errno::ROFS.raw_os_error()));
}

#[test]
fn layers_that_do_not_go_together_are_refused_by_name() {
    let Some(sandbox) = sandbox!() else { return };
    let (one, other) = (sandbox.directory("one"), sandbox.directory("other"));
    let (objects, tmpfs) = (V1.objects(), sandbox.tmpfs("tmpfs"));
    std::os::unix::fs::symlink(&objects, sandbox.path("link")).unwrap();
    let link = sandbox.path("link");
    let refused = |basedirs: &[&Path], upper: Option<(&Path, &Path)>| {
        let mut options = MountOptions::new(basedirs[0]);
        options.basedirs.extend(basedirs[1..].iter().map(|basedir| Location::from(*basedir)));
        options.upper = upper.map(|(upperdir, workdir)| UpperLayer {
            upperdir: upperdir.into(),
            workdir: workdir.into(),
        });
        error_of(&options, &V1.image())
    };
    let cases = [
        (refused(&[&objects, &link], None), [&link, &objects]),
        (refused(&[&objects], Some((&one, &one))), [&one, &one]),
        (refused(&[&objects, &one], Some((&one, &other))), [&one, &one]),
        (refused(&[&objects, &one], Some((&other, &one))), [&one, &one]),
    ];
    for (error, [found, before]) in cases {
        let Error::SameDirectory { path, other_path, .. } = &error else { panic!("{error}") };
        assert_eq!([path, other_path], [found, before], "{error}");
    }
    let error = refused(&[&objects], Some((&one, &tmpfs)));
    let Error::WorkOnOtherMount { upperdir, workdir } = &error else { panic!("{error}") };
    assert_eq!([upperdir, workdir], [&one, &tmpfs]);
    // What the kernel alone can tell: it names the image, and what to look at.
    let error = refused(&[&objects], Some((&one, &sandbox.directory("one/within"))));
    assert!(error.to_string().starts_with(V1.image().to_str().unwrap()), "{error}");
    assert!(error.to_string().contains("overlay"), "{error}");
    assert!(error.hint().unwrap().contains("within"), "{:?}", error.hint());
}

/// They reach overlayfs, which has no use for them on a kernel without SELinux.
#[test]
fn selinux_contexts_are_handed_to_overlayfs() {
    let Some(_sandbox) = sandbox!() else { return };
    for name in ["context", "fscontext", "defcontext", "rootcontext"] {
        let text = format!("basedir={},{name}=a:b:c:s0\\,c1", V1.objects().display());
        match MountOptions::parse(text).unwrap().mount(V1.image()) {
            Ok(_) => assert!(Path::new("/sys/fs/selinux").exists(), "{name}: passed over"),
            Err(Error::Kernel(error)) => {
                let option = format!("{name}=a:b:c:s0,c1");
                let object = error.object.clone().unwrap();
                assert_eq!((error.operation, object), (Operation::SetOption, option.into()));
                assert!(Error::from(error).hint().unwrap().contains("SELinux"));
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }
}

#[test]
fn without_an_upper_layer_rw_is_read_only() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let options = MountOptions::parse(format!("basedir={},rw", V1.objects().display())).unwrap();
    options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    let write = fs::write(mount_point.join("hello.txt"), "x").unwrap_err();
    assert_eq!(write.raw_os_error(), Some(Errno::ROFS.raw_os_error()));
    assert!(!mount_at(&mount_point).unwrap().options.contains(&"rw".into()));
}

#[test]
fn attributes_are_in_force() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let mut options = V1.options();
    options.attributes = MountAttributes::all();
    options.atime = Atime::Noatime;
    options.superblock_flags = sealmount::SuperblockFlags::SYNC;
    // Its source is shown without symbolic links, which is how libmount looks for it.
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
fn objects_are_found_in_the_first_directory_that_has_them() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let empty = sandbox.directory("odd, name: \\ and all");
    let mut options = V1.options();
    options.basedirs.insert(0, empty.clone().into());
    options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    assert_is_manifest(&mount_point);
    umount(&mount_point);
    // The same through the text.
    let options = MountOptions::parse(options.to_text()).unwrap();
    options.mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    assert_is_manifest(&mount_point);
}

#[test]
fn an_image_with_a_long_and_odd_path_is_mounted() {
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
fn an_idmapped_mount_has_other_owners() {
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
    assert!(matches!(options.mount(V1.image()), Err(Error::NotUserNamespace { .. })));
    options.idmap = Some("/proc/self/ns/user".into());
    let error = options.mount(V1.image()).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::PERM), "the initial namespace: {error}");
}

/// The steps of a mount that must succeed.
fn steps_of(options: &MountOptions, image: &Path) -> Vec<Step> {
    let mut steps = Vec::new();
    options.mount_with(image, &mut |step| steps.push(step)).unwrap();
    steps
}

#[test]
fn steps_tell_what_was_done() {
    let Some(_sandbox) = sandbox!() else { return };
    let steps = steps_of(&V2.copy_options(), &V2.image());
    assert!(matches!(&steps[0], Step::ImageOpened { size: 16384, composefs_version: 2, .. }));
    assert!(matches!(
        &steps[1],
        Step::DigestVerified { digest, by: VerifiedBy::Copy } if *digest == V2.digest(),
    ));
    assert!(matches!(&steps[2], Step::Copied { size: 16384, memory: Memory::Memfd }));
    assert!(matches!(&steps[3], Step::LoopDevice { .. }));
    assert!(matches!(&steps[4], Step::Taken { rung: Rung::SourceByLoopDevice }));
    assert!(matches!(steps.last(), Some(Step::Verity(ObjectVerity::Noverity))));

    // Without copy a loop device is the last way, and never taken in silence.
    let steps = steps_of(&V1.options(), &V1.image());
    let taken = steps.iter().filter(|step| matches!(step, Step::Taken { .. })).count();
    let by_loop_device = steps.iter().any(|step| matches!(step, Step::LoopDevice { .. }));
    let refused_by_path =
        |step: &Step| matches!(step, Step::NotTaken { rung: Rung::SourceByPath, .. });
    assert_eq!(taken, 2);
    assert_eq!(by_loop_device, steps.iter().any(refused_by_path));
}

#[test]
fn an_image_on_tmpfs_is_mounted_through_a_loop_device() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.tmpfs("tmpfs").join("image.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let steps = steps_of(&V1.options(), &image);
    let refused = |step: &Step| {
        let Step::NotTaken { rung: Rung::SourceByPath, error } = step else { return false };
        error.errno == Errno::NOTBLK
    };
    assert!(steps.iter().any(refused), "{steps:?}");
    assert!(steps.iter().any(|step| matches!(step, Step::LoopDevice { .. })), "{steps:?}");
}

/// The error of a mount that must fail, and leaves nothing.
fn error_of(options: &MountOptions, image: &Path) -> Error {
    let before = format!("{:?}", mounts());
    let error = options.mount(image).unwrap_err();
    assert_eq!(format!("{:?}", mounts()), before);
    let message = error.to_string();
    assert!(!message.is_empty() && !message.contains('\n'), "{message:?}");
    error
}

#[test]
fn what_is_no_image_is_refused() {
    let Some(sandbox) = sandbox!() else { return };
    let v1 = fs::read(V1.image()).unwrap();
    let patched = |offset: usize, value: u8| {
        let mut image = v1.clone();
        image[offset] = value;
        image
    };
    let cases: [(&str, Vec<u8>, ImageError); 8] = [
        ("empty", vec![], ImageError::Empty),
        ("text", b"#!/bin/sh\necho hello\n".repeat(100), ImageError::NotComposefs),
        ("erofs", patched(0, 0), ImageError::PlainErofs),
        ("future", patched(4, 9), ImageError::HeaderVersion(9)),
        ("no-erofs", patched(1024, 0), ImageError::NoSuperblock),
        ("short", v1[..8192].to_vec(), ImageError::TooShort { size: 8192, expected: 24576 }),
        ("long", [&v1[..], b"x"].concat(), ImageError::TooLong { size: 24577, expected: 24576 }),
        ("start", v1[..100].to_vec(), ImageError::NoSuperblock),
    ];
    for (name, content, expected) in cases {
        let image = sandbox.file(name, &content);
        for options in [V1.options(), V1.copy_options()] {
            match error_of(&options, &image) {
                Error::Image { image: path, problem } => {
                    assert_eq!((&path, &problem), (&image, &expected));
                }
                error => panic!("{name}: {error}"),
            }
        }
    }
    test_support::run("mkfifo", [sandbox.path("fifo")]);
    for path in [sandbox.path("fifo").as_path(), Path::new("/dev/zero"), Path::new("/")] {
        let error = error_of(&V1.options(), path);
        let refused = Error::Image { image: path.into(), problem: ImageError::NotAFile("") };
        assert_eq!(std::mem::discriminant(&error), std::mem::discriminant(&refused), "{error}");
    }
    let missing = error_of(&V1.options(), &sandbox.path("missing"));
    assert_eq!(missing.errno(), Some(Errno::NOENT));
    assert!(missing.to_string().contains(sandbox.path("missing").to_str().unwrap()), "{missing}");
}

#[test]
fn directories_that_are_none_are_refused_by_name() {
    let Some(sandbox) = sandbox!() else { return };
    let (file, missing) = (sandbox.file("file", b""), sandbox.path("missing"));
    for (path, expected) in [(&file, Errno::NOTDIR), (&missing, Errno::NOENT)] {
        let mut options = V1.options();
        options.basedirs.push(path.into());
        assert_directory(error_of(&options, &V1.image()), DirectoryRole::Objects, path, expected);
        let mut options = V1.options();
        let upper = UpperLayer { upperdir: path.into(), workdir: sandbox.path("").into() };
        options.upper = Some(upper);
        assert_directory(error_of(&options, &V1.image()), DirectoryRole::Upper, path, expected);
        let error = V1.options().mount(V1.image()).unwrap().attach(path).unwrap_err();
        assert_directory(error, DirectoryRole::MountPoint, path, expected);
    }
}

fn assert_directory(error: Error, role: DirectoryRole, path: &Path, errno: Errno) {
    match &error {
        Error::Directory { role: found, path: at, errno: with } => {
            assert_eq!((*found, at.as_path(), *with), (role, path, errno), "{error}");
        }
        error => panic!("{error}"),
    }
}

#[test]
fn a_digest_decides() {
    let Some(sandbox) = sandbox!() else { return };
    for fixture in [V1, V2] {
        let good = fs::read(fixture.image()).unwrap();
        let size = good.len();
        for offset in [9, 1030, 4096, size / 2, size - 1] {
            let mut bad = good.clone();
            bad[offset] ^= 0x10;
            let image = sandbox.file("bad", &bad);
            let error = error_of(&fixture.copy_options(), &image);
            let Error::DigestMismatch { expected, found, .. } = error else { panic!("{error}") };
            assert_eq!(*expected, fixture.digest());
            assert_eq!(*found, sealmount::compute_digest(expected.algorithm(), &bad));
            assert_no_loop_device(image.to_str().unwrap());
        }
    }
}

#[test]
fn a_digest_without_copy_needs_the_kernel() {
    let Some(_sandbox) = sandbox!() else { return };
    let mut options = V1.copy_options();
    options.copy = None;
    let error = error_of(&options, &V1.image());
    assert!(matches!(error, Error::ImageNotVerity { .. }), "{error}");
    assert!(error.hint().unwrap().contains("copy"));
}

fn with_verity(fixture: &Fixture, verity: Verity) -> MountOptions {
    let mut options = fixture.options();
    options.verity = Some(verity);
    options
}

#[test]
fn verity_that_would_fail_every_read_is_refused() {
    let Some(sandbox) = sandbox!() else { return };
    // tmpfs has no fs-verity on any kernel.
    let objects = sandbox.tmpfs("tmpfs");
    let mut options = with_verity(&V1, Verity::Require);
    options.basedirs = vec![objects.into()];
    let unsupported = |error: Error| {
        matches!(error, Error::ObjectsNotVerity { reason: NotVerity::Unsupported, .. })
    };
    assert!(unsupported(error_of(&options, &V1.image())));
    // A digest asks for it too.
    options.verity = None;
    options.copy = Some(Memory::Memfd);
    options.digest = Some(V1.digest());
    assert!(unsupported(error_of(&options, &V1.image())));
    options.verity = Some(Verity::Try);
    assert!(unsupported(error_of(&options, &V1.image())));

    // The checked out objects have none either, whatever their file system can.
    let error = error_of(&with_verity(&V1, Verity::Require), &V1.image());
    assert!(matches!(error, Error::ObjectsNotVerity { .. }), "{error}");
}

#[test]
fn tryverity_tells_that_nothing_is_enforced() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let objects = sandbox.tmpfs("tmpfs");
    test_support::run(
        "cp",
        ["-r", &format!("{}/.", V1.objects().display()), objects.to_str().unwrap()],
    );
    let mut options = with_verity(&V1, Verity::Try);
    options.basedirs = vec![objects.into()];
    let mount = options.mount(V1.image()).unwrap();
    assert_eq!(mount.verity(), ObjectVerity::UnsupportedByObjects(NotVerity::Unsupported));
    mount.attach(&mount_point).unwrap();
    assert_is_manifest(&mount_point);
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
    // The last part of a path, and one before.
    let objects = link("link to objects", V1.objects().parent().unwrap()).join("objects");
    let mut options = MountOptions::new(link("link to a link", &objects));
    options.upper = Some(UpperLayer {
        upperdir: link("link to upper", &upperdir).into(),
        workdir: link("link to work", &workdir).into(),
    });
    let (image, target) = (link("link to image", &V1.image()), link("link to mnt", &mount_point));
    for copy in [None, Some(Memory::Memfd), Some(Memory::Ramfs)] {
        options.copy = copy;
        options.mount(&image).unwrap().attach(&target).unwrap();
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }

    let dangling = link("dangling", Path::new("/nowhere"));
    let circle = sandbox.path("circle");
    let circle = link("circle", &circle);
    for (path, errno) in [(dangling, Errno::NOENT), (circle, Errno::LOOP)] {
        let errnos = [
            options.mount(&path).unwrap_err().errno(),
            MountOptions::new(&path).mount(&image).unwrap_err().errno(),
            V1.options().mount(&image).unwrap().attach(&path).unwrap_err().errno(),
        ];
        assert_eq!(errnos, [Some(errno); 3], "{}", path.display());
    }
}

#[test]
fn permissions_are_those_of_the_image() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    V1.options().mount(V1.image()).unwrap().attach(&mount_point).unwrap();
    let setuid = fs::metadata(mount_point.join("usr/bin/setuid")).unwrap();
    assert_eq!(setuid.permissions().mode() & 0o7777, 0o4755);
}
