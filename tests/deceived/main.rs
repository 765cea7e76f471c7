//! Answers that are not the kernel's, and names that lead to what somebody else has put there: none of
//! them gets anything mounted but what was verified.

mod fuse;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::Output;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use sealmount::{Digest, Error, Memory, MountOptions, NotVerity, Rung, Step, VerifiedBy, Verity};
use test_support::{
    Fixture, V1, V2, assert_is_manifest, assert_no_loop_device, mount_at, mount_composefs, run,
    sandbox, umount,
};

const MODES: [Option<Memory>; 3] = [None, Some(Memory::Memfd), Some(Memory::Ramfs)];

/// An image that shows another tree, and has not the digest.
fn other_image() -> Vec<u8> {
    let image = fs::read(V1.image()).unwrap();
    let text = b"hello from";
    let at = image.windows(text.len()).position(|window| window == text).unwrap();
    let mut other = image;
    other[at..at + text.len()].copy_from_slice(b"HELLO FROM");
    other
}

fn verified(fixture: &Fixture, copy: Option<Memory>) -> MountOptions {
    let mut options = fixture.copy_options();
    options.copy = copy;
    options
}

/// The server of a FUSE file system is asked for the digest of a file, and may be anyone's program.
#[test]
fn a_fuse_server_does_not_vouch_for_an_image() {
    let Some(sandbox) = sandbox!() else { return };
    let Digest::Sha256(digest) = V1.digest() else { unreachable!() };
    let place = sandbox.directory("fuse");
    let content = other_image();
    let found = sealmount::compute_digest(V1.digest().algorithm(), &content);
    let server = fuse::serve(&place, "image.cfs", content, digest);
    let image = place.join("image.cfs");
    // It does answer, so that the test can tell.
    let measured = sealmount_sys::fsverity::measure(File::open(&image).unwrap());
    assert_eq!(measured.unwrap().digest(), digest);
    for copy in MODES {
        match (copy, verified(&V1, copy).mount(&image).unwrap_err()) {
            (None, Error::ImageNotVerity { reason: NotVerity::Unsupported, .. }) => {}
            (Some(_), Error::DigestMismatch { found: named, .. }) if *named == found => {}
            (_, error) => panic!("{copy:?}: {error}"),
        }
    }
    umount(&place);
    server.join().unwrap();
}

/// Nor for objects.
#[test]
fn a_fuse_server_does_not_vouch_for_objects() {
    let Some(sandbox) = sandbox!() else { return };
    let objects = sandbox.directory("objects");
    let prefix = sandbox.directory("objects/ab");
    let server = fuse::serve(&prefix, "object", vec![0; 100], [0; 32]);
    let mut options = MountOptions::new(&objects);
    options.verity = Some(Verity::Require);
    let error = options.mount(V1.image()).unwrap_err();
    let Error::ObjectsNotVerity { reason: NotVerity::Unsupported, .. } = error else {
        panic!("{error}")
    };
    umount(&prefix);
    server.join().unwrap();
}

/// Runs the helper while something else lies on a directory.
fn with_something_on(
    directory: &str,
    something: &Path,
    image: &Path,
    mount_point: &Path,
    options: &MountOptions,
) -> Output {
    mount_bind(something, directory).unwrap();
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

/// `/proc/self/fd/N` is whatever lies at /proc, which is somebody else's with `-N` and in a chroot.
#[test]
fn what_lies_at_proc_is_not_asked_for_a_descriptor() {
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
    // Where it is waited for: a FIFO that nobody writes to.
    run("mkfifo", [proc.join("meminfo"), proc.join("self/cgroup")]);
    for copy in [Some(Memory::Memfd), Some(Memory::Ramfs)] {
        let options = verified(&V1, copy);
        let output = with_something_on("/proc", &proc, &V1.image(), &mount_point, &options);
        assert!(output.status.success(), "{output:?}");
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }
    // Without a digest nothing was verified that could be exchanged, and a name at /proc will do.
    let mut options = verified(&V1, Some(Memory::Ramfs));
    options.digest = None;
    let output = with_something_on("/proc", &proc, &V1.image(), &mount_point, &options);
    assert!(output.status.success(), "{output:?}");
    umount(&mount_point);
}

/// Without anything at /proc nothing is missing.
#[test]
fn without_proc_everything_is_mounted_in_the_same_way() {
    let Some(sandbox) = sandbox!() else { return };
    let (mount_point, empty) = (sandbox.directory("mnt"), sandbox.directory("empty"));
    let said = |empty: &Path, on: &str| {
        let options = V1.options();
        let output = with_something_on(on, empty, &V1.image(), &mount_point, &options);
        assert!(output.status.success(), "{output:?}");
        assert_is_manifest(&mount_point);
        umount(&mount_point);
        String::from_utf8(output.stderr).unwrap()
    };
    // On a directory that nobody looks at, and on /proc.
    let aside = sandbox.directory("aside");
    assert_eq!(said(&empty, "/proc"), said(&empty, aside.to_str().unwrap()));
}

/// What has the name of a loop device must be one.
#[test]
fn what_lies_at_dev_is_no_loop_device() {
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
        let options = verified(&V1, Some(Memory::Memfd));
        rustix::mount::mount_bind_recursive(&dev, "/dev").unwrap();
        let output = mount_composefs!([
            image.as_os_str(),
            mount_point.as_os_str(),
            "-o".as_ref(),
            &options.to_text(),
        ]);
        unmount("/dev", UnmountFlags::DETACH).unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("not the loop device of this name"), "{message}");
        assert!(mount_at(&mount_point).is_none());
        assert_no_loop_device(image.to_str().unwrap());
    }
}

/// What the header says is taken from what was verified, not from what was read before.
#[test]
fn a_header_that_was_another_one_at_first_counts_for_nothing() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    for copy in [Some(Memory::Memfd), Some(Memory::Ramfs)] {
        let mut image = fs::read(V1.image()).unwrap();
        // COMPOSEFS_HAS_ACL: without it, EROFS would be told that there are none.
        assert_eq!(image[8], 1);
        image[8] = 0;
        let path = sandbox.file("image.cfs", &image);
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        let mut steps = Vec::new();
        let mount = verified(&V1, copy)
            .mount_with(&path, &mut |step| {
                if let Step::ImageOpened { .. } = step {
                    writer.write_all_at(&[1], 8).unwrap();
                }
                steps.push(step);
            })
            .unwrap();
        assert!(!steps.iter().any(|step| matches!(step, Step::WithoutAcls)), "{steps:?}");
        let by_copy =
            |step: &Step| matches!(step, Step::DigestVerified { by: VerifiedBy::Copy, .. });
        assert!(steps.iter().any(by_copy), "{steps:?}");
        mount.attach(&mount_point).unwrap();
        assert_is_manifest(&mount_point);
        umount(&mount_point);
    }
}

/// A chroot whose root is a directory like any other, on kernels that take no layers by descriptor.
#[test]
fn in_a_chroot_layers_are_attached_too() {
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
            test_support::sandboxing::refuse_argument(
                libc::SYS_fsconfig,
                1,
                FSCONFIG_SET_FD,
                Errno::BADF,
            );
            for fixture in [&V1, &V2] {
                let place = Path::new("/").join(fixture.digest);
                let mut options = verified(fixture, Some(Memory::Memfd));
                options.basedirs = vec![place.join("objects").into()];
                let mut rungs = Vec::new();
                let mount = options
                    .mount_with(place.join("image.cfs"), &mut |step| {
                        if let Step::Taken { rung } = step {
                            rungs.push(rung);
                        }
                    })
                    .unwrap();
                assert_eq!(rungs.last(), Some(&Rung::LayersByPath));
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
