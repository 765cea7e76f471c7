//! Tests sealmount-setup-root with real mounts. The kernel of most machines has no fs-verity, so the digests
//! have a `?`. vm-tests boots the roots.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use sealmount::{Algorithm, Digest};
use test_support::composefs::{Node, image, object_path};
use test_support::tracer::{self, Action, End};
use test_support::{Mount, Sandbox, assert_no_loop_device, mount_at, mounts, sandbox};

const DATA: &[u8] =
    b"the content of a file that is large enough to be an object of its own, as others are";
/// The second mount of the disk.
const KEPT_DISK: &str = "/run/initramfs/sealmount/disk";
const FSTAB: &[u8] =
    b"# the fstab of the image, which is also large enough to be an object: no file systems";

/// A disk with a deployment, and a directory of images in the initramfs.
struct System {
    sandbox: Sandbox,
    program: PathBuf,
    sysroot: PathBuf,
    images: PathBuf,
    image: Vec<u8>,
    digest: String,
}

impl System {
    /// Makes a system whose only image is on the disk.
    fn new() -> Option<System> {
        let sandbox = sandbox!()?;
        let program = sandbox.path("sealmount-setup-root");
        symlink(env!("CARGO_BIN_EXE_mount-composefs"), &program).unwrap();
        let directories = ["", "etc", "sysroot", "usr", "var"];
        let mut tree = BTreeMap::from(directories.map(|path| (path.to_owned(), Node::Directory)));
        tree.insert("etc/fstab".into(), Node::file(0o644, FSTAB));
        tree.insert("usr/data".into(), Node::file(0o755, DATA));
        let image = image(tree, 64);
        let digest = Digest::of_bytes(Algorithm::Sha256, &image).to_string();

        let sysroot = sandbox.tmpfs("sysroot");
        for content in [DATA, FSTAB] {
            let digest = Digest::of_bytes(Algorithm::Sha256, content);
            let object = sysroot.join("composefs/objects").join(object_path(&digest));
            fs::create_dir_all(object.parent().unwrap()).unwrap();
            fs::write(object, content).unwrap();
        }
        fs::create_dir_all(sysroot.join("composefs/images")).unwrap();
        fs::write(sysroot.join("composefs/images").join(&digest), &image).unwrap();
        let images = sandbox.directory("images");
        let system = System { sandbox, program, sysroot, images, image, digest };
        fs::create_dir_all(system.state("var")).unwrap();
        fs::write(system.state("var/kept"), "kept").unwrap();
        Some(system)
    }

    /// Returns the path of a file of the deployment.
    fn state(&self, name: &str) -> PathBuf {
        self.sysroot.join("state/deploy").join(&self.digest).join(name)
    }

    /// Runs the program with this kernel command line and this configuration.
    fn run(&self, command_line: &str, config: &str, more: &[&str]) -> Output {
        let path = self.sandbox.path("setup-root-conf.toml");
        fs::write(&path, config).unwrap();
        Command::new(&self.program)
            .arg("--sysroot")
            .arg(&self.sysroot)
            .arg("--images")
            .arg(&self.images)
            .arg("--config")
            .arg(path)
            .args(["--cmdline", command_line])
            .args(more)
            .output()
            .unwrap()
    }

    /// Returns the word of the kernel command line that names the image.
    fn word(&self) -> String {
        format!("quiet composefs=?{} rw", self.digest)
    }

    fn succeeds(&self, command_line: &str, config: &str, more: &[&str]) -> String {
        let output = self.run(command_line, config, more);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        assert_eq!(stderr, "");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the program, which must fail with a status and a message, and must leave all mounts as they are.
    fn fails(&self, command_line: &str, config: &str, status: i32, texts: &[&str]) {
        let before = mounts_of(self);
        let output = self.run(command_line, config, &[]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{stderr}");
        for text in texts {
            assert!(stderr.contains(text), "{text:?} is not in {stderr:?}");
        }
        assert!(stderr.starts_with("sealmount-setup-root: "), "{stderr}");
        assert_eq!(mounts_of(self), before, "{stderr}");
        assert_no_loop_device(&self.digest);
    }

    fn in_root(&self, path: &str) -> PathBuf {
        self.sysroot.join(path)
    }

    /// Checks that the files of the image are in the root.
    fn assert_is_root(&self) {
        let mount = mount_at(&self.sysroot).unwrap();
        assert_eq!((mount.fs_type.as_str(), mount.source), ("overlay", self.source()));
        assert_eq!(fs::read(self.in_root("usr/data")).unwrap(), DATA);
        assert_eq!(fs::read(self.in_root("etc/fstab")).unwrap(), FSTAB);
    }

    fn source(&self) -> String {
        format!("composefs:{}", self.digest)
    }
}

/// Undoes a run: unmounts the root and the second mount of the disk.
fn undo(system: &System) {
    for mount_point in [&system.sysroot, Path::new(KEPT_DISK)] {
        let is_undone = |mount: Mount| mount.fs_type == "tmpfs" && mount_point == system.sysroot;
        while mount_at(mount_point).is_some_and(|mount| !is_undone(mount)) {
            unmount(mount_point, UnmountFlags::DETACH).unwrap();
        }
    }
    fs::remove_dir_all("/run/initramfs").ok();
}

/// Returns the mounts of the system, in order. Other programs of the machine may mount elsewhere.
fn mounts_of(system: &System) -> Vec<Mount> {
    let directories = [system.sandbox.path(""), "/run".into()];
    let is_of_system =
        |mount: &Mount| directories.iter().any(|path| mount.mount_point.starts_with(path));
    mounts().into_iter().filter(is_of_system).collect()
}

fn is_writable(directory: &Path) -> bool {
    let file = directory.join("new-file");
    fs::write(&file, "new").is_ok() && fs::remove_file(file).is_ok()
}

#[test]
fn image_on_disk_becomes_root() {
    let Some(system) = System::new() else { return };
    let report = system.succeeds(&system.word(), "", &[]);
    assert!(report.contains("copying the image"), "{report}");
    system.assert_is_root();
    assert!(!is_writable(&system.sysroot));

    // Changes of /etc are on the disk. The root directory of the layer is open to all users.
    let etc = system.in_root("etc");
    fs::write(etc.join("hostname"), "changed").unwrap();
    assert_eq!(fs::metadata(&etc).unwrap().permissions().mode() & 0o7777, 0o755);
    let disk = system.in_root("sysroot");
    let state = disk.join("state/deploy").join(&system.digest);
    assert_eq!(fs::read_to_string(state.join("etc/upper/hostname")).unwrap(), "changed");

    let var = system.in_root("var");
    assert_eq!(fs::read_to_string(var.join("kept")).unwrap(), "kept");
    assert!(is_writable(&var));
    assert!(!is_writable(&disk), "the disk is writable");
    // systemd makes the disk read-only through this mount.
    let kept = Path::new(KEPT_DISK);
    assert_eq!(fs::metadata(kept).unwrap().ino(), fs::metadata(&disk).unwrap().ino());
    assert_no_loop_device(&system.digest);
}

#[test]
fn image_in_initramfs_becomes_root() {
    for (name, is_on_disk) in [("HEX.cfs", true), ("HEX.cfs", false), ("any.cfs", false)] {
        let Some(system) = System::new() else { return };
        let name = name.replace("HEX", &system.digest);
        fs::write(system.images.join(&name), &system.image).unwrap();
        if !is_on_disk {
            fs::remove_file(system.sysroot.join("composefs/images").join(&system.digest)).unwrap();
        }
        let other = "0".repeat(64);
        let words = format!("composefs.digest=?v1-sha256-12:{other} {}", system.word());
        let report = system.succeeds(&words, "", &[]);
        assert!(report.contains(&name), "{report}");
        assert!(report.contains("copied into a read-only ramfs"), "{report}");
        system.assert_is_root();
    }
}

#[test]
fn each_configuration_gives_its_root() {
    for etc in ["none", "bind", "overlay", "transient"] {
        for var in ["none", "bind", "overlay", "transient"] {
            for transient in [false, true] {
                let Some(system) = System::new() else { return };
                fs::create_dir_all(system.state("etc")).unwrap();
                fs::write(system.state("etc/fstab"), FSTAB).unwrap();
                let config = format!(
                    "[root]\ntransient = {transient}\n[etc]\nmount = \"{etc}\"\n\
                     [var]\nmount = \"{var}\"\n[tmpfs]\nsize = \"8m\"\n"
                );
                system.succeeds(&system.word(), &config, &["--quiet"]);
                system.assert_is_root();
                assert_eq!(is_writable(&system.sysroot), transient, "{config}");
                for (name, mount) in [("etc", etc), ("var", var)] {
                    let directory = system.in_root(name);
                    let is_expected = mount != "none" || transient;
                    assert_eq!(is_writable(&directory), is_expected, "{name}: {config}");
                    fs::write(directory.join("marker"), "").ok();
                    let state =
                        system.in_root("sysroot/state/deploy").join(&system.digest).join(name);
                    let in_state = match mount {
                        "bind" => state.join("marker"),
                        _ => state.join("upper/marker"),
                    };
                    let is_kept = ["bind", "overlay"].contains(&mount);
                    assert_eq!(in_state.exists(), is_kept, "{name}: {config}");
                }
            }
        }
    }
}

#[test]
fn full_tmpfs_rejects_further_writes() {
    let Some(system) = System::new() else { return };
    system.succeeds(&system.word(), "root.transient = true\ntmpfs.size = '1m'\n", &[]);
    let file = system.in_root("large");
    let error = fs::write(&file, vec![1; 4 << 20]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    fs::remove_file(file).unwrap();
    assert!(is_writable(&system.sysroot));
}

#[test]
fn target_gets_the_root_and_the_disk_stays() {
    let Some(system) = System::new() else { return };
    let target = system.sandbox.directory("nextroot");
    // In a running system, the mount of the disk is read-only.
    mount_remount(&system.sysroot, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
    system.succeeds(&system.word(), "", &["--target", target.to_str().unwrap()]);
    assert_eq!(fs::read(target.join("usr/data")).unwrap(), DATA);
    assert!(is_writable(&target.join("etc")));
    assert!(is_writable(&target.join("var")));
    let disk = mount_at(&system.sysroot).unwrap();
    assert_eq!(disk.fs_type, "tmpfs");
    assert!(!is_writable(&system.sysroot));
    assert!(!Path::new("/run/initramfs").exists());
}

#[test]
fn read_only_disk_becomes_writable_if_needed() {
    for (config, is_needed) in [("", true), ("etc.mount = 'none'\nvar.mount = 'none'\n", false)] {
        let Some(system) = System::new() else { return };
        // A child of another test inherits the descriptors of written files until it executes its program.
        let read_only = || mount_remount(&system.sysroot, MountFlags::RDONLY, "");
        let is_busy = |_: &i32| read_only() == Err(rustix::io::Errno::BUSY);
        let wait = |_| std::thread::sleep(Duration::from_millis(5));
        (0..1000).take_while(is_busy).for_each(wait);
        read_only().unwrap();
        system.succeeds(&system.word(), config, &[]);
        assert_eq!(is_writable(Path::new(KEPT_DISK)), is_needed, "{config}");
    }
}

#[test]
fn failure_has_its_status_and_leaves_the_disk() {
    let Some(system) = System::new() else { return };
    let (word, digest) = (system.word(), system.digest.clone());
    let other = "0".repeat(64);
    system.fails("quiet", "", 1, &["no word composefs= or composefs.digest="]);
    system.fails(&format!("{word} sealmount.chek=all"), "", 1, &["sealmount.chek: unknown"]);
    system.fails(
        &word,
        "[etc]\nmount = 'tmpfs'\n",
        1,
        &["setup-root-conf.toml: line 2: cannot use"],
    );
    system.fails(
        &format!("composefs=?{other}"),
        "",
        81,
        &["cannot find the image 000000", "hint:"],
    );
    let missing = format!("{word} sealmount.objects=other/objects");
    system.fails(&missing, "", 83, &["other/objects", "the disk has no object directory"]);

    // The image on the disk has another name than its digest.
    let store = system.sysroot.join("composefs/images");
    fs::rename(store.join(&digest), store.join(&other)).unwrap();
    let expected = [&format!("is {digest}, expected {other}")[..]];
    system.fails(&format!("composefs=?{other}"), "", 80, &expected);
    fs::rename(store.join(&other), store.join(&digest)).unwrap();

    let object = Digest::of_bytes(Algorithm::Sha256, DATA);
    let object = system.sysroot.join("composefs/objects").join(object_path(&object));
    fs::write(&object, &DATA[1..]).unwrap();
    let all = format!("{word} sealmount.check=all");
    system.fails(&all, "", 83, &["/usr/data", "1 wrong size"]);
    fs::remove_file(object).unwrap();
    system.fails(&all, "", 83, &["/usr/data", "1 missing"]);

    fs::remove_dir_all(system.state("var")).unwrap();
    system.fails(&word, "", 84, &["the deployment has no such directory", "hint: make the"]);
}

#[test]
fn hint_has_words_of_the_kernel_command_line() {
    let Some(system) = System::new() else { return };
    let (word, strict) = (system.word(), format!("composefs={}", system.digest));
    let cases = [
        (format!("{word} sealmount.copy=memfd sealmount.size=1k"), 2, "raise sealmount.size="),
        (format!("{word} sealmount.copy=off"), 83, "remove sealmount.copy=off"),
        (format!("{strict} sealmount.copy=memfd"), 83, "use a disk with ext4"),
    ];
    for (words, status, hint) in cases {
        system.fails(&words, "", status, &["  hint: ", hint]);
    }
}

#[test]
fn missing_disk_is_reported() {
    let Some(mut system) = System::new() else { return };
    system.sysroot = system.sandbox.directory("empty");
    system.fails(&system.word(), "", 82, &["the disk is not mounted", "hint: check root="]);
    system.sysroot = system.sandbox.path("missing");
    system.fails(&system.word(), "", 82, &["the disk is not mounted"]);
}

#[test]
fn wrong_argument_is_rejected() {
    let Some(system) = System::new() else { return };
    let words = &system.word();
    for (arguments, text) in [
        (&["--frobnicate"][..], "--frobnicate"),
        (&["--sysroot", ""], "empty --sysroot"),
        (&["/mnt"], "/mnt"),
        (&["--cmdline", words, "--config", "/no/such/file"], "/no/such/file: cannot read the file"),
    ] {
        let output = Command::new(&system.program).args(arguments).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        assert!(stderr.contains(text), "{stderr}");
    }
    let help = Command::new(&system.program).arg("--help").output().unwrap();
    assert!(help.stdout.starts_with(b"Usage: sealmount-setup-root "));
}

/// The calls that make the root.
const DECISIVE: [libc::c_long; 14] = [
    libc::SYS_fchdir,
    libc::SYS_fchmodat,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_fstatfs,
    libc::SYS_mkdirat,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_openat2,
    libc::SYS_statx,
    libc::SYS_unshare,
];

/// Each call that makes the root fails once with each errno, and a signal kills the program before each call.
/// The disk or the whole root must be at the mount point, never a part of the root.
#[test]
fn fault_leaves_the_disk_or_the_whole_root() {
    let Some(system) = System::new() else { return };
    let word = system.word();
    let config = system.sandbox.file("config", b"root.transient = true\n");
    let trace = |decide: &mut dyn FnMut(&tracer::Call) -> Action| {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", r#"kill -STOP $$; exec "$@""#, "sh"])
            .arg(&system.program)
            .args(["--quiet", "--cmdline", &word, "--sysroot"])
            .arg(&system.sysroot)
            .arg("--images")
            .arg(&system.images)
            .arg("--config")
            .arg(&config);
        tracer::run(command, Duration::from_secs(20), &mut |call| decide(call).into())
    };
    let mut calls = Vec::new();
    let (end, stderr) = trace(&mut |call| {
        calls.push((call.number, call.nth));
        Action::Proceed
    });
    assert_eq!(end, End::Exited(0), "{stderr}");
    undo(&system);
    let before = mounts_of(&system);

    let start = calls.iter().position(|(number, _)| *number == libc::SYS_fsopen).unwrap();
    let mut faults = Vec::new();
    for call in &calls[start..] {
        faults.push((*call, Action::Signal(Signal::SIGKILL)));
        if DECISIVE.contains(&call.0) {
            let errnos = [Errno::EPERM, Errno::EINVAL, Errno::ENOMEM, Errno::EIO];
            faults.extend(errnos.map(|errno| (*call, Action::Fail(errno))));
        }
    }
    assert!(faults.len() > 400, "only {} faults", faults.len());
    let mut roots = 0;
    for (fault, action) in faults {
        let (end, stderr) = trace(&mut |call| match (call.number, call.nth) == fault {
            true => action.clone(),
            false => Action::Proceed,
        });
        let context = format!("{fault:?} {action:?}: {end:?} {stderr:?}");
        let mount = mount_at(&system.sysroot).unwrap();
        if mount.fs_type == "tmpfs" {
            assert_ne!(end, End::Exited(0), "{context}");
            assert_eq!(mounts_of(&system), before, "{context}");
        } else {
            roots += 1;
            assert!(matches!(end, End::Exited(0) | End::Killed(Signal::SIGKILL)), "{context}");
            system.assert_is_root();
            let places = ["", "etc", "var", "sysroot"].map(|name| mount_at(&system.in_root(name)));
            assert!(places.iter().all(Option::is_some), "{context}: {places:?}");
            undo(&system);
        }
    }
    assert!(roots > 0, "no fault left a root");
}
