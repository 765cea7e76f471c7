//! Tests the reads of sampled files through a finished mount, the trial overlay on the mount, and the undo of
//! a remount. A tracer imitates the kernels that fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use test_support::tracer::{self, Action, Call, End};
use test_support::{Sandbox, V1, assert_is_manifest, mount_at, sandbox, umount};

const MEASURE_VERITY: u64 = 0xc004_6686;
const FSCONFIG_SET_FD: u64 = 5;
const FSCONFIG_CMD_CREATE: u64 = 6;
const FSCONFIG_CMD_RECONFIGURE: u64 = 7;

/// The files that sealmount samples in the image V1.
const SAMPLED: [&str; 4] = ["data/4096", "data/4097", "data/65", "data/70000"];

/// A run of the helper on the image V1.
struct Helper {
    sandbox: Sandbox,
}

impl Helper {
    fn new() -> Option<Helper> {
        let sandbox = sandbox!()?;
        for directory in ["mnt", "upper", "work"] {
            sandbox.directory(directory);
        }
        test_support::run(
            "cp",
            ["-r", V1.objects().to_str().unwrap(), &in_sandbox(&sandbox, "objects")],
        );
        Some(Helper { sandbox })
    }

    fn mount_point(&self) -> PathBuf {
        self.sandbox.path("mnt")
    }

    /// Runs the helper with `-v`. Returns the end of the process and its messages.
    fn run(&self, options: &str, decide: &mut dyn FnMut(&Call) -> Action) -> (End, String) {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", r#"kill -STOP $$; exec "$@""#, "sh"])
            .args([env!("CARGO_BIN_EXE_mount-composefs"), "-v"])
            .args([V1.image(), self.mount_point()])
            .args(["-o", &format!("basedir={}{options}", in_sandbox(&self.sandbox, "objects"))]);
        tracer::run(command, Duration::from_secs(60), &mut |call| decide(call).into())
    }

    /// Checks that the helper rejected the mount with this message and this hint.
    #[track_caller]
    fn assert_rejected(&self, (end, text): (End, String), message: &str, hint: &str) {
        assert_eq!(end, End::Exited(32), "{text}");
        assert!(text.contains(message) && text.contains(hint), "{text}");
        assert_eq!(mount_at(&self.mount_point()), None);
    }

    /// Checks that the helper mounted the tree, with this message.
    #[track_caller]
    fn assert_mounted(&self, (end, text): (End, String), message: &str) {
        assert_eq!(end, End::Exited(0), "{text}");
        assert!(text.contains(message), "{text}");
        assert_is_manifest(&self.mount_point());
        umount(&self.mount_point());
    }

    /// Returns the object of the first sampled file, relative to the object directory.
    fn object(&self) -> String {
        let content = self.sandbox.path("objects");
        let size = SAMPLED[0].strip_prefix("data/").unwrap().parse::<u64>().unwrap();
        let output = test_support::run(
            "find",
            [
                content.to_str().unwrap(),
                "-type",
                "f",
                "-size",
                &format!("{size}c"),
                "-printf",
                "%P",
            ],
        );
        assert_eq!(output.len(), 65, "{output}");
        output
    }
}

fn in_sandbox(sandbox: &Sandbox, name: &str) -> String {
    sandbox.path(name).to_str().unwrap().to_owned()
}

/// The measurement of an object by an imitated file system with fs-verity.
#[derive(Clone, Copy, PartialEq)]
enum Measured {
    /// The digest in the name of the object.
    Right,
    Wrong,
    NotEnabled,
}

/// Imitates a file system whose objects have fs-verity. After the first attempt to open a file through the
/// mount, measurements return `late`. overlayfs is not imitated: overlayfs fails with EIO, because the
/// objects have no fs-verity.
fn with_verity(late: Measured) -> impl FnMut(&Call) -> Action {
    let mut measured = Measured::Right;
    move |call| match call.number {
        libc::SYS_openat2 => {
            measured = late;
            Action::Proceed
        }
        libc::SYS_ioctl if call.arguments[1] == MEASURE_VERITY => {
            let file = call.file(0).filter(|file| file.is_file());
            match file.filter(|_| measured != Measured::NotEnabled) {
                Some(object) => {
                    Action::Answer(2, [&[1, 0, 32, 0][..], &digest(&object, measured)].concat())
                }
                None => Action::Fail(Errno::ENODATA),
            }
        }
        // An empty mask requests only the attributes, so struct statx holds only STATX_ATTR_VERITY.
        libc::SYS_statx if call.arguments[3] == 0 => {
            let mut statx = vec![0; 256];
            statx[8..16].copy_from_slice(&(libc::STATX_ATTR_VERITY as u64).to_le_bytes());
            Action::Answer(4, statx)
        }
        _ => Action::Proceed,
    }
}

fn digest(object: &Path, measured: Measured) -> Vec<u8> {
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let digits = name(object.parent().unwrap()) + &name(object);
    let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
    let mut digest: Vec<u8> = (0..digits.len()).step_by(2).map(byte).collect();
    if measured == Measured::Wrong {
        digest[0] ^= 1;
    }
    digest
}

/// Linux 7.0 does not open an object that has fs-verity.
#[test]
fn broken_overlayfs_is_rejected_with_verity() {
    let Some(helper) = Helper::new() else { return };
    helper.assert_rejected(
        helper.run(",verity", &mut with_verity(Measured::Right)),
        "/data/4096: cannot enforce verity: overlayfs fails with EIO, although the object of the file has \
         the right fs-verity digest\n",
        "hint: use another kernel",
    );
}

#[test]
fn broken_overlayfs_mounts_with_tryverity() {
    let Some(helper) = Helper::new() else { return };
    for layers in ["", ",upperdir=UPPER,workdir=WORK"] {
        let layers = layers
            .replace("UPPER", &in_sandbox(&helper.sandbox, "upper"))
            .replace("WORK", &in_sandbox(&helper.sandbox, "work"));
        let run = helper.run(&format!(",tryverity{layers}"), &mut with_verity(Measured::Right));
        helper.assert_mounted(
            run,
            "objects are not verified when they are read: this kernel's overlayfs",
        );
    }
}

#[test]
fn sampled_object_without_verity_is_rejected() {
    let Some(helper) = Helper::new() else { return };
    let message = format!(
        "{}: cannot enforce verity: fs-verity is not enabled on the file\n",
        helper.object()
    );
    let run = helper.run(",verity", &mut with_verity(Measured::NotEnabled));
    helper.assert_rejected(run, &message, "hint: enable fs-verity on every object");
    let run = helper.run(",tryverity", &mut with_verity(Measured::NotEnabled));
    helper.assert_mounted(
        run,
        "objects are not verified when they are read: in an object directory, fs-verity is not",
    );
}

#[test]
fn sampled_object_with_other_digest_is_rejected() {
    let Some(helper) = Helper::new() else { return };
    let message =
        format!("{}: cannot verify the object: its fs-verity digest is ", helper.object());
    let run = helper.run(",verity", &mut with_verity(Measured::Wrong));
    helper.assert_rejected(run, &message, "hint: restore the object");
}

#[test]
fn missing_object_is_rejected_with_verity() {
    let Some(helper) = Helper::new() else { return };
    let object = helper.object();
    fs::remove_file(helper.sandbox.path("objects").join(&object)).unwrap();
    let message = format!(
        "/data/4096: cannot open the file through the mount: no object directory has its object {object}\n"
    );
    let run = helper.run(",verity", &mut with_verity(Measured::Right));
    helper.assert_rejected(run, &message, "hint: copy the object into an object directory");
}

#[test]
fn missing_object_is_reported_without_verity() {
    let Some(helper) = Helper::new() else { return };
    let object = helper.object();
    fs::remove_file(helper.sandbox.path("objects").join(&object)).unwrap();
    let (end, text) = helper.run("", &mut |_| Action::Proceed);
    assert_eq!(end, End::Exited(0), "{text}");
    let message = format!(
        "mount.composefs: file /data/4096 cannot be read: no object directory has its object {object}\n"
    );
    assert!(text.contains(&message), "{text}");
    umount(&helper.mount_point());
}

/// overlayfs ignores a file that is not regular, and looks in the next directory.
#[test]
fn object_behind_a_fifo_is_found() {
    let Some(helper) = Helper::new() else { return };
    let object = helper.object();
    let original = helper.sandbox.path("objects").join(&object);
    let second = helper.sandbox.directory("second");
    fs::create_dir(second.join(object.split_once('/').unwrap().0)).unwrap();
    fs::rename(&original, second.join(&object)).unwrap();
    mknodat(CWD, &original, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let options = format!(":{},verity", second.display());
    helper.assert_rejected(
        helper.run(&options, &mut with_verity(Measured::Right)),
        "although the object of the file has the right fs-verity digest\n",
        "hint: use another kernel",
    );
    let (end, text) = helper.run("", &mut |_| Action::Proceed);
    assert_eq!(end, End::Exited(0), "{text}");
    let message = format!("no object directory has its object {object}\n");
    assert!(text.contains(&message), "{text}");
    umount(&helper.mount_point());
}

/// An upper layer may have a FIFO, a device, a link or a whiteout at the path of a sampled file.
#[test]
fn replaced_files_are_not_opened() {
    let Some(helper) = Helper::new() else { return };
    let upper = helper.sandbox.path("upper");
    fs::create_dir(upper.join("data")).unwrap();
    let make = |name: &str, kind, device| {
        mknodat(CWD, upper.join(name), kind, Mode::RWXU, device).unwrap();
    };
    make(SAMPLED[0], FileType::Fifo, 0);
    // A whiteout, and the device of /dev/zero.
    make(SAMPLED[1], FileType::CharacterDevice, 0);
    make(SAMPLED[2], FileType::CharacterDevice, rustix::fs::makedev(1, 5));
    std::os::unix::fs::symlink("/proc/kmsg", upper.join(SAMPLED[3])).unwrap();
    let options = format!(
        ",verity,upperdir={},workdir={}",
        upper.display(),
        in_sandbox(&helper.sandbox, "work")
    );
    let mut opened = Vec::new();
    let mut verity = with_verity(Measured::Right);
    let (end, text) = helper.run(&options, &mut |call| {
        if call.number == libc::SYS_openat2 {
            let flags = call.number_at(2).unwrap();
            opened.push((call.text(1).unwrap(), flags & libc::O_PATH as u64 != 0));
        }
        verity(call)
    });
    assert_eq!(end, End::Exited(0), "{text}");
    let expected = SAMPLED.map(|path| (path.to_owned(), true));
    assert_eq!(opened, expected);
    umount(&helper.mount_point());
}

/// A mount does not need the permission to read files, so a denied read has no effect.
#[test]
fn denied_reads_of_files_still_mount() {
    let Some(helper) = Helper::new() else { return };
    for errno in [Errno::EACCES, Errno::EPERM] {
        let mut verity = with_verity(Measured::Right);
        let (end, text) = helper.run(",verity", &mut |call| match call.number {
            libc::SYS_openat2 => Action::Fail(errno),
            _ => verity(call),
        });
        assert_eq!(end, End::Exited(0), "{text}");
        umount(&helper.mount_point());
    }
}

/// If the superblock cannot be changed, the helper sets the old attributes of the mount again.
#[test]
fn failed_undo_of_remount_is_reported() {
    let Some(helper) = Helper::new() else { return };
    let upper = in_sandbox(&helper.sandbox, "upper");
    let work = in_sandbox(&helper.sandbox, "work");
    let layers = format!(",upperdir={upper},workdir={work}");
    let (end, text) = helper.run(&layers, &mut |_| Action::Proceed);
    assert_eq!(end, End::Exited(0), "{text}");
    let mut attributes = 0;
    let run = helper.run(&format!("{layers},remount,nosuid,sync"), &mut |call| match call.number {
        libc::SYS_fsconfig if call.arguments[1] == FSCONFIG_CMD_RECONFIGURE => {
            Action::Fail(Errno::EIO)
        }
        libc::SYS_mount_setattr => {
            attributes += 1;
            if attributes == 2 { Action::Fail(Errno::EBUSY) } else { Action::Proceed }
        }
        _ => Action::Proceed,
    });
    let (end, text) = run;
    assert_eq!((end, attributes), (End::Exited(32), 2), "{text}");
    let message =
        "mnt: cannot undo a part of the remount: Device or resource busy (the remount failed: ";
    assert!(text.contains(message) && text.contains("hint: remount with the flags"), "{text}");
    let options = mount_at(&helper.mount_point()).unwrap().options;
    assert!(options.contains(&"nosuid".into()) && !options.contains(&"sync".into()), "{options:?}");
    umount(&helper.mount_point());
}

/// Imitates a kernel on which an EROFS from a file counts as a level of stacking. The superblock of an
/// overlay with two `lowerdir+` fails.
fn without_stacking() -> impl FnMut(&Call) -> Action {
    let mut lower = 0;
    move |call| match call.number {
        libc::SYS_fsopen => {
            lower = 0;
            Action::Proceed
        }
        libc::SYS_fsconfig if call.arguments[1] == FSCONFIG_SET_FD => {
            lower += usize::from(call.text(2).as_deref() == Some("lowerdir+"));
            Action::Proceed
        }
        libc::SYS_fsconfig if call.arguments[1] == FSCONFIG_CMD_CREATE && lower == 2 => {
            Action::Fail(Errno::EINVAL)
        }
        _ => Action::Proceed,
    }
}

/// The report of missing objects, the mount, and the mount by a loop device share the sampled files.
#[test]
fn files_of_image_are_sampled_once() {
    let Some(helper) = Helper::new() else { return };
    let (mut verity, mut stacking) = (with_verity(Measured::Right), without_stacking());
    let mut samples = 0;
    let run = helper.run(",tryverity", &mut |call| {
        if call.number == libc::SYS_openat && call.text(1).as_deref() == Some("./data/4096") {
            samples += 1;
        }
        match stacking(call) {
            Action::Proceed => verity(call),
            action => action,
        }
    });
    assert!(run.1.contains("EROFS source by loop device: used\n"), "{}", run.1);
    assert_eq!(samples, 1);
    helper.assert_mounted(
        run,
        "objects are not verified when they are read: this kernel's overlayfs",
    );
}

#[test]
fn unstackable_mount_uses_loop_device() {
    let Some(helper) = Helper::new() else { return };
    let mut user_namespace = test_support::user_namespace();
    let upper = format!(
        ",upperdir={},workdir={}",
        in_sandbox(&helper.sandbox, "upper"),
        in_sandbox(&helper.sandbox, "work")
    );
    for options in ["", ",copy=ramfs", &upper] {
        let run = helper.run(options, &mut without_stacking());
        assert!(run.1.contains("EROFS source by loop device: used\n"), "{}", run.1);
        assert!(!run.1.contains("path of the descriptor: used"), "{}", run.1);
        helper.assert_mounted(
            run,
            "EROFS source by path of the descriptor: not supported by this kernel, trying the next method",
        );
    }
    let (end, text) = helper.run(&format!(",idmap={}", user_namespace.1), &mut without_stacking());
    assert_eq!(end, End::Exited(0), "{text}");
    test_support::assert_is_manifest_mapped(&helper.mount_point(), 100_000);
    umount(&helper.mount_point());
    let _ = (user_namespace.0.kill(), user_namespace.0.wait());
}

#[test]
fn unstackable_mount_without_loop_is_reported() {
    let Some(helper) = Helper::new() else { return };
    let mut kernel = without_stacking();
    let run = helper.run("", &mut |call| {
        let is_control = call.text(1).as_deref() == Some("/dev/loop-control");
        match call.number {
            libc::SYS_openat if is_control => Action::Fail(Errno::ENOENT),
            _ => kernel(call),
        }
    });
    helper.assert_mounted(run, "no overlay can be mounted on the mount");
}

/// A trial that fails for another reason has no effect.
#[test]
fn failed_trial_keeps_the_mount() {
    let Some(helper) = Helper::new() else { return };
    for errno in [Errno::ENOMEM, Errno::EPERM, Errno::EINTR] {
        let mut kernel = without_stacking();
        let run = helper.run("", &mut |call| match kernel(call) {
            Action::Fail(_) => Action::Fail(errno),
            action => action,
        });
        assert!(!run.1.contains("loop device"), "{}", run.1);
        helper.assert_mounted(run, "EROFS source by path of the descriptor: used");
    }
}
