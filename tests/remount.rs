//! Tests remounts: by the library, by mount(8) with a line of fstab, and by the helper alone.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::mount::mount_bind;
use sealmount::{AttachedMount, ErrorKind, RemountError, RemountOptions};
use test_support::{
    Sandbox, V1, V2, assert_is_manifest, mount_at, mount_composefs, run, sandbox, umount,
};

/// A sandbox with a mount of V1 on `mnt`.
struct Mounted {
    sandbox: Sandbox,
    mnt: PathBuf,
}

impl Mounted {
    /// Mounts with the object directory and these options.
    fn new(options: &str) -> Option<Mounted> {
        let sandbox = sandbox!()?;
        let mounted = Mounted { mnt: sandbox.directory("mnt"), sandbox };
        for directory in ["upper", "work"] {
            mounted.sandbox.directory(directory);
        }
        mounted.mount(options);
        Some(mounted)
    }

    fn with_upper_layer(options: &str) -> Option<Mounted> {
        Mounted::new(&format!("UPPER,{options}"))
    }

    fn mount(&self, options: &str) {
        let output = self.helper(&[], &format!("{},{options}", basedir()));
        assert!(output.status.success(), "{}", stderr(&output));
    }

    /// Runs the helper. `UPPER` stands for the options of the upper layer.
    fn helper(&self, flags: &[&str], options: &str) -> Output {
        let (image, mnt) = (V1.image(), self.mnt.as_path());
        let (upper, work) = (self.sandbox.path("upper"), self.sandbox.path("work"));
        let upper = format!("upperdir={},workdir={}", upper.display(), work.display());
        let options = options.replace("UPPER", &upper);
        let call = [image.to_str().unwrap(), mnt.to_str().unwrap(), "-o", &options];
        mount_composefs!(call.iter().chain(flags))
    }

    /// Remounts by the helper, which must exit with 0. Returns the messages.
    #[track_caller]
    fn remounts(&self, options: &str) -> String {
        let output = self.helper(&["-v"], &format!("remount,{options}"));
        assert!(output.status.success(), "{options}: {}", stderr(&output));
        assert_is_manifest(&self.mnt);
        stderr(&output)
    }

    /// Remounts by the helper, which must exit with 1 and a message with `text`. The mount must not change.
    #[track_caller]
    fn rejects(&self, options: &str, text: &str) {
        self.rejects_with_status(1, options, text);
    }

    #[track_caller]
    fn rejects_with_status(&self, status: i32, options: &str, text: &str) {
        let before = mount_at(&self.mnt);
        let output = self.helper(&[], &format!("remount,{options}"));
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(status), "{options}: {message}");
        assert!(message.starts_with("mount.composefs: ") && message.contains(text), "{message}");
        assert_eq!(mount_at(&self.mnt), before, "{options}");
    }

    /// Returns the flags that the kernel shows for the mount, then the flags of the superblock.
    fn flags(&self) -> String {
        let options = mount_at(&self.mnt).unwrap().options;
        let flags: Vec<_> = options.into_iter().filter(|option| !option.contains('=')).collect();
        flags.join(",")
    }

    /// Writes an fstab with one line, and runs mount(8) with this fstab.
    fn mount_8(&self, line: &str, options: &str) -> Output {
        let line =
            format!("{} {} composefs {line} 0 0\n", V1.image().display(), self.mnt.display());
        let fstab = self.sandbox.path("fstab");
        fs::write(&fstab, line).unwrap();
        let mut mount = Command::new("mount");
        mount.env("LIBMOUNT_FSTAB", &fstab).args(["-o", options]).arg(&self.mnt);
        mount.output().unwrap()
    }

    #[track_caller]
    fn mount_8_remounts(&self, line: &str, options: &str) {
        let output = self.mount_8(line, options);
        assert!(output.status.success(), "{line}, {options}: {}", stderr(&output));
    }

    fn is_writable(&self) -> bool {
        let file = self.mnt.join("new");
        let is_written = fs::write(&file, "").is_ok();
        if is_written {
            fs::remove_file(&file).unwrap();
        }
        is_written
    }
}

fn basedir() -> String {
    format!("basedir={}", V1.objects().display())
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn records() -> Vec<PathBuf> {
    let Ok(directory) = fs::read_dir("/run/sealmount") else { return Vec::new() };
    directory.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn fstab_line_replaces_flags() {
    let Some(mounted) = Mounted::with_upper_layer("nosuid,noexec,lazytime,noatime") else { return };
    mounted.sandbox.install_helper(env!("CARGO_BIN_EXE_mount-composefs").as_ref());
    let line = format!("nodev,{},x-test=1,nofail,_netdev", basedir());
    // mount(8) passes the options of the line and of the command line, but not the flags of the mount.
    mounted.mount_8_remounts(&line, "remount");
    assert_eq!(mounted.flags(), "rw,nodev,noatime,rw");
    assert!(mounted.is_writable());
    mounted.mount_8_remounts(&line, "remount,ro,relatime");
    assert_eq!(mounted.flags(), "ro,nodev,relatime,ro");
    assert!(!mounted.is_writable());
    mounted.mount_8_remounts(&line, "remount,rw,sync,nosymfollow");
    assert_eq!(mounted.flags(), "rw,nodev,relatime,nosymfollow,rw,sync");
    // mount(8) passes `dev` by leaving out `nodev`.
    mounted.mount_8_remounts(&line, "remount,dev");
    assert_eq!(mounted.flags(), "rw,relatime,rw");
    assert_is_manifest(&mounted.mnt);
}

#[test]
fn options_of_mount_table_are_accepted() {
    let Some(mounted) = Mounted::with_upper_layer("nosuid") else { return };
    mounted.sandbox.install_helper(env!("CARGO_BIN_EXE_mount-composefs").as_ref());
    let mnt = mounted.mnt.to_str().unwrap();
    let fstab = mounted.sandbox.file("fstab", b"");
    let fstab = fstab.to_str().unwrap();
    // Without a line in fstab, mount(8) passes the options of the mount table, such as redirect_dir=on.
    run("mount", ["-T", fstab, "-t", "composefs", "-o", "remount,ro,noexec", mnt]);
    assert_eq!(mounted.flags(), "ro,nosuid,noexec,relatime,ro");
    // Without a line and a type, mount(8) does not call the helper.
    run("mount", ["-T", fstab, "-o", "remount,rw", mnt]);
    assert_eq!(mounted.flags(), "rw,nosuid,noexec,relatime,rw");
    mounted.remounts("metacopy=on,redirect_dir=on");
    mounted.rejects("metacopy=off", "the mount has metacopy=on, not metacopy=off");
    mounted.rejects("upperdir=/tmp", "/upper, not upperdir=/tmp");
    mounted.rejects("index=on", "cannot use the option index: unknown");
    mounted.rejects("bind", "cannot use the option bind: unknown");
    let output = mounted.helper(&["-s", "-v"], "remount,index=on");
    assert!(output.status.success() && stderr(&output).contains("index is unknown: ignored"));
}

#[test]
fn mount_without_upper_layer_stays_read_only() {
    let Some(mounted) = Mounted::new("nosuid") else { return };
    mounted.sandbox.install_helper(env!("CARGO_BIN_EXE_mount-composefs").as_ref());
    // systemd-remount-fs calls mount(8) in this way. mount(8) then passes rw.
    mounted.mount_8_remounts("defaults", "remount");
    assert_eq!(mounted.flags(), "ro,relatime,ro");
    let message = mounted.remounts("rw,nodev");
    assert!(message.contains("read-only: there is no upperdir"), "{message}");
    assert_eq!(mounted.flags(), "ro,nodev,relatime,ro");
}

#[test]
fn other_object_directories_are_rejected() {
    let Some(mounted) = Mounted::new("") else { return };
    let objects = V1.objects();
    mounted.remounts(&basedir());
    let link = mounted.sandbox.path("link");
    std::os::unix::fs::symlink(&objects, &link).unwrap();
    mounted.remounts(&format!("basedir={}", link.display()));
    for basedir in [
        V2.objects().display().to_string(),
        format!("{}:{}", objects.display(), V2.objects().display()),
        "/missing".into(),
    ] {
        let message = format!("has basedir={}, not basedir={basedir}\n", objects.display());
        mounted.rejects(&format!("basedir={basedir}"), &message);
    }
    for (option, text) in
        [("verity", "mount has no verity\n"), ("upperdir=/u", "mount has no upperdir\n")]
    {
        mounted.rejects(option, text);
    }
    for option in ["noverity", "tryverity", "verity=try"] {
        mounted.remounts(option);
    }
}

#[test]
fn hidden_options_are_compared_with_record() {
    let digest = format!("digest={}", V1.digest);
    let Some(mounted) = Mounted::new(&format!("copy,noverity,size=50%,{digest}")) else { return };
    mounted.remounts(&format!("copy,noverity,{digest},size=50%"));
    mounted.remounts(&format!("noverity,digest=sha256:{}", V1.digest));
    let zeros = format!("digest={}", "0".repeat(64));
    for (options, text) in [
        (format!("noverity,{zeros}"), format!("has digest={}, not {zeros}", V1.digest)),
        ("copy=ramfs".into(), "has copy=memfd, not copy=ramfs".into()),
        ("size=51%".into(), "has size=50%, not size=51%".into()),
        ("idmap=/proc/1/ns/user".into(), "has no idmap".into()),
        // The digest implies verity, which the mount does not have.
        (digest, "has no verity".into()),
    ] {
        mounted.rejects(&options, &format!("the mount {text}\n"));
    }
}

#[test]
fn digest_without_record_is_rejected() {
    let options = format!("copy,noverity,digest={}", V1.digest);
    let Some(mounted) = Mounted::new(&options) else { return };
    let [record] = &records()[..] else { panic!("{:?}", records()) };
    let reject = |text: &str| mounted.rejects(&options, text);
    mounted.remounts(&options);

    let text = fs::read(record).unwrap();
    fs::write(record, "digest=12").unwrap();
    reject("the content is damaged");
    fs::write(record, &text).unwrap();
    for path in [record.as_path(), Path::new("/run/sealmount")] {
        let mode = fs::metadata(path).unwrap().permissions();
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
        reject("users other than root can change it");
        fs::set_permissions(path, mode).unwrap();
        std::os::unix::fs::chown(path, Some(1), None).unwrap();
        reject("users other than root can change it");
        std::os::unix::fs::chown(path, Some(0), None).unwrap();
    }
    mounted.remounts(&options);
    let copy = mounted.sandbox.file("record", &text);
    fs::remove_file(record).unwrap();
    std::os::unix::fs::symlink(copy, record).unwrap();
    mounted.rejects_with_status(1, &options, "cannot read the recorded options");
    fs::remove_file(record).unwrap();
    reject("option digest with the mount: the mount has no record");
    mounted.remounts("noverity");
}

#[test]
fn record_does_not_describe_later_mount() {
    let options = format!("copy,noverity,digest={}", V1.digest);
    let Some(mounted) = Mounted::new(&options) else { return };
    umount(&mounted.mnt);
    let stale = records();
    assert_eq!(stale.len(), 1);
    // The new mount may have the ID and the device of the old mount.
    mounted.mount("noverity");
    mounted.rejects(&options, "has no record");
    umount(&mounted.mnt);
    // A new record removes the stale record.
    mounted.mount("copy");
    let new = records();
    assert!(new.len() == 1 && new != stale, "{stale:?} {new:?}");
    umount(&mounted.mnt);
    let output = mounted.helper(&["-n"], &format!("{},copy", basedir()));
    assert!(output.status.success());
    assert_eq!(records(), new);
    mounted.rejects("copy", "has no record");
}

#[test]
fn records_of_ended_namespaces_are_bounded() {
    let Some(mounted) = Mounted::new("copy") else { return };
    umount(&mounted.mnt);
    // The mount IDs of other namespaces, the oldest in the middle of the directory.
    let record = |mount: u64| PathBuf::from(format!("/run/sealmount/1-{mount}"));
    for mount in (2..=128).chain([1]).chain(129..=256) {
        fs::write(record(mount), "copy").unwrap();
    }
    mounted.mount("copy");
    assert_eq!(records().len(), 256);
    assert!(!record(1).exists() && record(2).exists());
    mounted.remounts("copy");
    umount(&mounted.mnt);
    mounted.mount("copy");
    assert_eq!(records().len(), 256);
}

#[test]
fn namespace_of_a_user_has_no_records() {
    let Some(mounted) = Mounted::new("") else { return };
    umount(&mounted.mnt);
    let mut user = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c"])
        // A directory that root alone can change, in place of the directory of the records.
        .arg("mkdir /run/chosen /run/sealmount && mount --bind /run/chosen /run/sealmount; echo; read line")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    user.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let namespace = user.id().to_string();
    let options = format!("{},copy", basedir());
    let output = mounted.helper(&["-v", "-N", &namespace], &options);
    let text = "the mount namespace belongs to another user namespace";
    assert!(output.status.success() && stderr(&output).contains(text), "{}", stderr(&output));
    assert!(fs::read_dir("/run/chosen").unwrap().next().is_none());
    let output = mounted.helper(&["-N", &namespace], "remount,copy");
    assert!(!output.status.success() && stderr(&output).contains(text), "{}", stderr(&output));
    drop(user.stdin.take());
    user.wait().unwrap();
}

#[test]
fn record_on_a_disk_is_neither_written_nor_read() {
    let options = format!("copy,noverity,digest={}", V1.digest);
    let Some(mounted) = Mounted::new(&options) else { return };
    let [record] = &records()[..] else { panic!("{:?}", records()) };
    // As after a reboot with /run on a disk: the mount has the ID of an earlier mount.
    let disk = mounted.sandbox.directory("disk");
    let copy = disk.join(record.file_name().unwrap());
    fs::copy(record, copy).unwrap();
    mount_bind(&disk, "/run/sealmount").unwrap();
    mounted.rejects(&options, "the file system is not a tmpfs or ramfs");
    umount("/run/sealmount".as_ref());
    mounted.remounts(&options);

    umount(&mounted.mnt);
    mount_bind(&disk, "/run").unwrap();
    let options = format!("{},{options}", basedir());
    let message = stderr(&mounted.helper(&["-v"], &options));
    umount("/run".as_ref());
    assert!(message.contains("options not recorded: /run: cannot"), "{message}");
    assert!(!disk.join("sealmount").exists());
}

#[test]
fn mount_without_writable_run_reports_missing_record() {
    let Some(sandbox) = sandbox!() else { return };
    let mnt = sandbox.directory("mnt");
    run("mount", ["-o", "remount,ro", "/run"]);
    let (image, options) = (V1.image(), format!("copy,{}", basedir()));
    let output =
        mount_composefs!([image.as_path(), &mnt, "-v".as_ref(), "-o".as_ref(), options.as_ref()]);
    let message = stderr(&output);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("options not recorded: /run/sealmount: cannot record"), "{message}");
    assert_is_manifest(&mnt);
}

#[test]
fn fake_remount_leaves_flags() {
    let Some(mounted) = Mounted::with_upper_layer("") else { return };
    let output = mounted.helper(&["-f", "-v"], "remount,ro,nosuid");
    assert!(output.status.success() && stderr(&output).contains("not remounted with ro,nosuid"));
    assert_eq!(mounted.flags(), "rw,relatime,rw");
    let output = mounted.helper(&["-f"], "remount,copy");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn fake_remount_reports_flags_without_upper_layer() {
    let Some(mounted) = Mounted::new("") else { return };
    let output = mounted.helper(&["-f", "-v"], "remount,nosuid,check=all");
    let message = stderr(&output);
    for text in [
        "check=all: not done, because a remount does not check objects",
        "not remounted with ro,nosuid,relatime, read-only: there is no upperdir: -f",
    ] {
        assert!(message.contains(text), "{text}: {message}");
    }
}

#[test]
fn failed_remount_leaves_flags() {
    let Some(mounted) = Mounted::with_upper_layer("nodev") else { return };
    // The mount itself becomes read-only, and the superblock cannot.
    let other = mounted.sandbox.directory("other");
    mount_bind(&mounted.mnt, &other).unwrap();
    let file = fs::File::create(other.join("open")).unwrap();
    mounted.rejects_with_status(2, "ro,nosuid,noatime", "change the superblock of overlay");
    assert_eq!(mounted.flags(), "rw,nodev,relatime,rw");
    drop(file);
    let file = fs::File::create(mounted.mnt.join("open")).unwrap();
    mounted.rejects_with_status(2, "ro,nosuid", "cannot change the attributes of the mount");
    drop(file);
    fs::remove_file(other.join("open")).unwrap();
    // A process that another test starts at this moment holds a copy of the descriptor until the process
    // executes its program.
    for _ in 0..500 {
        match mounted.helper(&[], "remount,ro,nosuid").status.code() {
            Some(2) => std::thread::sleep(Duration::from_millis(20)),
            _ => break,
        }
    }
    mounted.remounts("ro,nosuid");
    assert_eq!(mounted.flags(), "ro,nosuid,relatime,ro");
    umount(&other);
}

#[test]
fn dirsync_is_rejected_by_name() {
    let Some(mounted) = Mounted::with_upper_layer("dirsync,mand") else { return };
    assert_eq!(mounted.flags(), "rw,relatime,rw,dirsync,mand");
    mounted.remounts("nosuid,sync,lazytime");
    assert_eq!(mounted.flags(), "rw,nosuid,relatime,rw,sync,dirsync,lazytime");
    mounted.remounts("dirsync");
    mounted.rejects("nodirsync", "the mount has dirsync, not nodirsync");
    umount(&mounted.mnt);
    mounted.mount("UPPER");
    mounted.rejects("dirsync", "the mount has no dirsync");
    mounted.remounts("nodirsync");
}

#[test]
fn remount_of_other_mount_is_rejected() {
    let Some(mounted) = Mounted::new("") else { return };
    umount(&mounted.mnt);
    mounted.rejects("ro", "the directory is not a mount point");
    let mnt = mounted.mnt.to_str().unwrap();
    run("mount", ["-t", "tmpfs", "tmpfs", mnt]);
    mounted.rejects("ro", "the file system is tmpfs, not composefs");
    umount(&mounted.mnt);
    let (upper, work) = (mounted.sandbox.path("upper"), mounted.sandbox.path("work"));
    let (objects, upper, work) = (V1.objects(), upper.display(), work.display());
    let objects = objects.display();
    for lowerdir in [format!("{objects}"), format!("{objects}:{}", V2.objects().display())] {
        let options = format!("lowerdir={lowerdir},upperdir={upper},workdir={work},nosuid");
        run("mount", ["-t", "overlay", "-o", &options, "overlay", mnt]);
        mounted.rejects("ro", "an overlay without object directories, not composefs");
        umount(&mounted.mnt);
    }
    let output = mount_composefs!(["image", "/missing", "-o", "remount,ro"]);
    assert_eq!(output.status.code(), Some(32), "{}", stderr(&output));
    assert!(stderr(&output).contains("hint: give the directory of a mount"), "{}", stderr(&output));
}

#[test]
fn library_changes_one_flag() {
    let Some(mounted) = Mounted::with_upper_layer("nodev,noatime") else { return };
    let mount = AttachedMount::open(&mounted.mnt).unwrap();
    let mut flags = mount.flags();
    flags.attributes.nosuid = true;
    let report = mount.remount(&flags).unwrap();
    assert_eq!(report.after, flags);
    assert_eq!(report.before.to_string(), "rw,nodev,noatime");
    assert_eq!(mounted.flags(), "rw,nosuid,nodev,noatime,rw");

    let mount = AttachedMount::open(&mounted.mnt).unwrap();
    assert!(mount.has_upper_layer());
    let options = RemountOptions::parse("ro,copy").unwrap();
    let error = mount.compare(&options).unwrap_err();
    assert!(matches!(error, RemountError::NotRecorded { option: "copy", .. }), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::InvalidOptions);
    let flags = mount.compare(&RemountOptions::parse("ro").unwrap()).unwrap();
    // The mount is pinned: a mount on top of it stays the same.
    run("mount", ["-t", "tmpfs", "tmpfs", mounted.mnt.to_str().unwrap()]);
    mount.remount(&flags).unwrap();
    assert!(mounted.is_writable());
    umount(&mounted.mnt);
    // The text does not name nodev.
    assert_eq!(mounted.flags(), "ro,noatime,ro");
}

#[test]
fn flags_that_changed_after_open_are_set_again() {
    let Some(mounted) = Mounted::with_upper_layer("nosuid,nodev,sync") else { return };
    let mount = AttachedMount::open(&mounted.mnt).unwrap();
    let flags = mount.flags();
    mounted.remounts("lazytime");
    assert_eq!(mounted.flags(), "rw,relatime,rw,lazytime");
    let report = mount.remount(&flags).unwrap();
    assert_eq!(mounted.flags(), "rw,nosuid,nodev,relatime,rw,sync");
    assert_eq!(report.before.to_string(), "rw,relatime,lazytime");
    assert_eq!(report.after, flags);
}

#[test]
fn forged_proc_is_not_used_for_remount() {
    let Some(mounted) = Mounted::new("") else { return };
    let before = mounted.flags();
    run("mount", ["-t", "tmpfs", "tmpfs", "/proc"]);
    for directory in ["/proc/self", "/proc/thread-self"] {
        fs::create_dir(directory).unwrap();
        fs::write(Path::new(directory).join("mountinfo"), "").unwrap();
    }
    let output = mounted.helper(&[], "remount,nosuid");
    run("umount", ["-n", "-i", "/proc"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(
        (before.as_str(), mounted.flags().as_str()),
        ("ro,relatime,ro", "ro,nosuid,relatime,ro")
    );
}
