//! Tests forged results that do not come from the kernel, and forged paths that lead to other files.
//! sealmount mounts only the verified image.
// test_support::sandboxing supports little-endian architectures only.
#![cfg(target_endian = "little")]

mod fuse;

use std::fs::{self, File, OpenOptions};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::Output;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use sealmount::{
    Digest, Error, Event, LayerMethod, MemoryKind, Method, MountOptions, OverlayError, SourceError,
    VerifiedBy, Verity, VerityUnavailable,
};
use test_support::{
    Fixture, V1, V2, assert_is_manifest, assert_no_loop_device, mount_and_events, mount_at,
    mount_composefs, run, sandbox, umount,
};

const MODES: [Option<MemoryKind>; 3] = [None, Some(MemoryKind::Memfd), Some(MemoryKind::Ramfs)];

/// Returns an image that shows another tree and has another digest.
fn other_image() -> Vec<u8> {
    let image = fs::read(V1.image()).unwrap();
    let text = b"hello from";
    let at = image.windows(text.len()).position(|window| window == text).unwrap();
    let mut other = image;
    other[at..at + text.len()].copy_from_slice(b"HELLO FROM");
    other
}

fn verified(fixture: &Fixture, copy: Option<MemoryKind>) -> MountOptions {
    let mut options = fixture.copy_options();
    options.copy = copy;
    options
}

/// FUSE passes FS_IOC_MEASURE_VERITY to the server of the file system, which can be any program.
#[test]
fn image_digest_from_fuse_is_ignored() {
    let Some(sandbox) = sandbox!() else { return };
    let Digest::Sha256(digest) = V1.digest() else { unreachable!() };
    let place = sandbox.directory("fuse");
    let content = other_image();
    let found = sealmount::Digest::of_bytes(V1.digest().algorithm(), &content);
    let server = fuse::serve(&place, "image.cfs", content, digest);
    let image = place.join("image.cfs");
    // The server returns the expected digest, so the mount would succeed if sealmount used the digest.
    let measured = sealmount_sys::fsverity::measure(File::open(&image).unwrap());
    assert_eq!(measured.unwrap().digest(), digest);
    for copy in MODES {
        match (copy, verified(&V1, copy).mount(&image).unwrap_err()) {
            (
                None,
                Error::Source(SourceError::VerityUnavailable {
                    reason: VerityUnavailable::Unsupported,
                    ..
                }),
            ) => {}
            (Some(_), Error::Source(SourceError::DigestMismatch { found: named, .. }))
                if *named == found => {}
            (_, error) => panic!("{copy:?}: {error}"),
        }
    }
    umount(&place);
    server.join().unwrap();
}

/// The digest of an object must not come from a FUSE server either.
#[test]
fn object_digest_from_fuse_is_ignored() {
    let Some(sandbox) = sandbox!() else { return };
    let objects = sandbox.directory("objects");
    let prefix = sandbox.directory("objects/ab");
    let server = fuse::serve(&prefix, "object", vec![0; 100], [0; 32]);
    let mut options = MountOptions::new(&objects);
    options.overlay.verity = Some(Verity::Require);
    let error = options.mount(V1.image()).unwrap_err();
    let Error::Overlay(OverlayError::ObjectsVerityUnavailable { reason, .. }) = error else {
        panic!("{error}")
    };
    assert_eq!(reason, VerityUnavailable::Unsupported);
    umount(&prefix);
    server.join().unwrap();
}

/// Runs the helper while another directory is mounted on `directory`.
fn run_with_mounted_on(
    directory: &str,
    other: &Path,
    image: &Path,
    mount_point: &Path,
    options: &MountOptions,
) -> Output {
    mount_bind(other, directory).unwrap();
    let output = std::panic::catch_unwind(|| {
        mount_composefs!([
            image.as_os_str(),
            mount_point.as_os_str(),
            "-v".as_ref(),
            "-o".as_ref(),
            &options.to_text(),
        ])
    });
    unmount(directory, UnmountFlags::DETACH).unwrap();
    output.unwrap()
}

/// With `-N` or in a chroot, another process decides which files lie at /proc, and so at
/// `/proc/self/fd/N`.
#[test]
fn forged_proc_is_not_used_with_digest() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let proc = sandbox.directory("proc");
    let other = sandbox.file("other.cfs", &other_image());
    for process in ["self", "thread-self"] {
        let fds = proc.join(process).join("fd");
        fs::create_dir_all(&fds).unwrap();
        for number in 3..40 {
            fs::hard_link(&other, fds.join(number.to_string())).unwrap();
        }
    }
    // Opening a FIFO without a writer could block.
    run("mkfifo", [proc.join("meminfo"), proc.join("self/cgroup")]);
    for copy in [Some(MemoryKind::Memfd), Some(MemoryKind::Ramfs)] {
        let options = verified(&V1, copy);
        let output = run_with_mounted_on("/proc", &proc, &V1.image(), &mount_point, &options);
        assert!(output.status.success(), "{output:?}");
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }
    // Without a digest, sealmount verified no file, so sealmount may use a path at /proc.
    let mut options = verified(&V1, Some(MemoryKind::Ramfs));
    options.digest = None;
    let output = run_with_mounted_on("/proc", &proc, &V1.image(), &mount_point, &options);
    assert!(output.status.success(), "{output:?}");
    umount(&mount_point);
}

/// Checks that a mount works without a procfs at /proc.
#[test]
fn mount_without_proc_uses_same_methods() {
    let Some(sandbox) = sandbox!() else { return };
    let (mount_point, empty) = (sandbox.directory("mnt"), sandbox.directory("empty"));
    let message_with = |empty: &Path, on: &str| {
        let options = V1.options();
        let output = run_with_mounted_on(on, empty, &V1.image(), &mount_point, &options);
        assert!(output.status.success(), "{output:?}");
        assert_is_manifest(&mount_point);
        umount(&mount_point);
        String::from_utf8(output.stderr).unwrap()
    };
    // The helper must print the same text with an empty directory on /proc and on an unused directory.
    let aside = sandbox.directory("aside");
    assert_eq!(message_with(&empty, "/proc"), message_with(&empty, aside.to_str().unwrap()));
}

/// The node at the path of a loop device must be the node of this loop device.
#[test]
fn forged_loop_device_node_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let dev = sandbox.directory("dev");
    let control = sandbox.file("dev/loop-control", b"");
    mount_bind("/dev/loop-control", &control).unwrap();
    let image = sandbox.file("image.cfs", &fs::read(V1.image()).unwrap());
    let other = sandbox.file("other.cfs", &other_image());
    let fifo = sandbox.path("fifo");
    run("mkfifo", [&fifo]);
    let null = sandbox.file("dev/null", b"");
    mount_bind("/dev/null", &null).unwrap();
    for target in [&other, &fifo, Path::new("null")] {
        for number in 0..300 {
            let device = dev.join(format!("loop{number}"));
            let _ = fs::remove_file(&device);
            symlink(target, device).unwrap();
        }
        let options = verified(&V1, Some(MemoryKind::Memfd));
        rustix::mount::mount_bind_recursive(&dev, "/dev").unwrap();
        let output = mount_composefs!([
            image.as_os_str(),
            mount_point.as_os_str(),
            "-o".as_ref(),
            &options.to_text(),
        ]);
        unmount("/dev", UnmountFlags::DETACH).unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(32), "{message}");
        assert!(message.contains("the node is not the loop device of this name"), "{message}");
        assert!(mount_at(&mount_point).is_none());
        assert_no_loop_device(image.to_str().unwrap());
    }
}

/// sealmount reads the header again from the verified copy, because the file can change.
#[test]
fn header_changed_after_open_is_read_from_copy() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    for copy in [Some(MemoryKind::Memfd), Some(MemoryKind::Ramfs)] {
        let mut image = fs::read(V1.image()).unwrap();
        // COMPOSEFS_HAS_ACL: without the flag, sealmount mounts EROFS with noacl.
        assert_eq!(image[8], 1);
        image[8] = 0;
        let path = sandbox.file("image.cfs", &image);
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        let mut events = Vec::new();
        let mount = verified(&V1, copy)
            .mount_with_events(&path, &mut |event| {
                if let Event::ImageOpened { .. } = event {
                    writer.write_all_at(&[1], 8).unwrap();
                }
                events.push(event);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert!(!events.iter().any(|event| matches!(event, Event::WithoutAcls)), "{events:?}");
        let by_copy = |event: &Event| {
            matches!(event, Event::DigestVerified { by: VerifiedBy::Userspace, .. })
        };
        assert!(events.iter().any(by_copy), "{events:?}");
        mount.attach(&mount_point).unwrap();
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }
}

/// Mounts in a chroot whose root is not a mount, with a kernel that does not support layers by
/// descriptor.
#[test]
fn mount_in_chroot_uses_layers_by_path() {
    let Some(sandbox) = sandbox!() else { return };
    let root = sandbox.directory("root");
    mount_bind("/dev", sandbox.directory("root/dev")).unwrap();
    for fixture in [&V1, &V2] {
        let name = root.join(fixture.digest);
        fs::create_dir(&name).unwrap();
        run("cp", ["-r".as_ref(), fixture.objects().as_os_str(), name.as_os_str()]);
        fs::copy(fixture.image(), name.join("image.cfs")).unwrap();
        fs::create_dir(name.join("mnt")).unwrap();
    }
    std::thread::scope(|scope| {
        let chrooted = scope.spawn(|| {
            const FSCONFIG_SET_FD: u32 = 5;
            sealmount_sys::unshare_working_directory().unwrap();
            rustix::process::chroot(&root).unwrap();
            rustix::process::chdir("/").unwrap();
            test_support::sandboxing::deny_argument(
                libc::SYS_fsconfig,
                1,
                FSCONFIG_SET_FD,
                Errno::BADF,
            );
            for fixture in [&V1, &V2] {
                let place = Path::new("/").join(fixture.digest);
                let mut options = verified(fixture, Some(MemoryKind::Memfd));
                options.overlay.objects = vec![place.join("objects").into()];
                let (mount, events) = mount_and_events(&options, place.join("image.cfs"));
                let method = events.iter().rev().find_map(|event| match event {
                    Event::MethodUsed { method, .. } => Some(*method),
                    _ => None,
                });
                assert_eq!(method, Some(Method::Layers(LayerMethod::Paths)));
                let mount = mount.unwrap();
                let report = mount.report().unwrap().overlay.as_ref().unwrap();
                assert_eq!(report.method, LayerMethod::Paths);
                assert_eq!(report.unsupported[0].method, LayerMethod::Descriptors);
                mount.attach(place.join("mnt")).unwrap();
            }
        });
        chrooted.join().unwrap();
    });
    for fixture in [&V1, &V2] {
        let mount_point = root.join(fixture.digest).join("mnt");
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }
}
