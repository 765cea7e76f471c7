//! Tests mount.composefs, called directly and by mount(8).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, mount_bind, unmount};
use test_support::{
    ErofsImage, Sandbox, V1, V2, assert_is_manifest, assert_no_loop_device, large_image, mount_at,
    mount_composefs, mounts, run, sandbox, umount, umount_8,
};

fn basedir() -> String {
    format!("basedir={}", V1.objects().display())
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Runs the helper, which must exit with `status` and a message that contains each of `texts`.
fn fails(arguments: &[&str], status: i32, texts: &[&str]) {
    let output = mount_composefs!(arguments);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {message}");
    assert!(message.starts_with("mount.composefs: "), "{message}");
    for text in texts {
        assert!(message.contains(text), "{text:?} is not in {message:?}");
    }
}

fn succeeds(arguments: &[&str]) -> Output {
    let output = mount_composefs!(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    output
}

#[test]
fn incorrect_call_fails_with_status_1() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    let (image, mnt) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    let basedir = &basedir();
    fails(&[], 1, &["expected an image and a directory, got 0 operands", "--help"]);
    fails(&[image], 1, &["got 1 operand\n"]);
    fails(&["-o", "remount"], 1, &["cannot remount: mount(8) passed no directory"]);
    fails(&[mnt, "-o", "remount"], 1, &["got 1 operand: give any word as the image"]);
    fails(&[image, mnt, mnt, "-o", basedir], 1, &["got 3 operands"]);
    fails(&[image, mnt], 1, &["no object directory given", "hint: add basedir="]);
    fails(&[image, mnt, "-o"], 1, &["-o"]);
    fails(&[image, mnt, "-x", "-o", basedir], 1, &["-x"]);
    fails(&[image, mnt, "-t", "ext4", "-o", basedir], 1, &["ext4"]);
    fails(
        &[image, mnt, "-o", basedir, "-o", "frobnicate"],
        1,
        &["cannot use the option frobnicate: unknown"],
    );
    fails(&[image, mnt, "-o", basedir, "-o", "digest=12"], 1, &["digest="]);
    fails(
        &[image, mnt, "-o", basedir, "-N", "/dev/null"],
        1,
        &["/dev/null", "namespace", "hint: give"],
    );
}

#[test]
fn common_mistake_reports_its_cause() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    let (image, mnt) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    let basedir = &basedir();
    let quoted = &format!("{basedir},upperdir=\"/a,b\"");
    // A misspelt option is reported before the missing option.
    fails(&[image, mnt, "-o", "basdir=/objects"], 1, &["cannot use the option basdir: unknown"]);
    fails(&[image, mnt, "-o", &format!("{basedir},remount")], 1, &[mnt, "not a mount point"]);
    fails(&[image, mnt, "-o", "remount,bind"], 1, &["not a mount point"]);
    fails(&[image, mnt, "-o", quoted], 1, &["the option b\": unknown", "quotes do not"]);
    fails(&["", mnt, "-o", basedir], 1, &["empty operand"]);
    fails(&[image, "", "-o", basedir], 1, &["empty operand"]);
    fails(&[image, mnt, "-o", basedir, "-N", ""], 1, &["empty -N"]);
    // The backslash would escape the comma that joins the two values.
    let escape = &format!("{basedir}\\");
    fails(&[image, mnt, "-o", escape, "-o", "noexec"], 1, &["cannot end in a backslash"]);
    let escaped = &format!("{basedir}\\\\");
    fails(&[image, mnt, "-o", escaped, "-o", "noexec"], 32, &["object directory", "objects\\:"]);
    fails(&["/dev/loop-control", mnt, "-o", basedir], 32, &["character device"]);
    assert!(mount_at(Path::new(mnt)).is_none());
}

#[test]
fn message_reports_control_characters_escaped() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (sandbox.path("a\nb\x1b[31m.cfs"), sandbox.directory("mnt"));
    fs::copy(V1.image(), &image).unwrap();
    let (image, mnt) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    // Files with CR LF line ends yield options that end in a carriage return.
    let missing = format!("basedir={}\r", sandbox.path("missing").display());
    fails(
        &[image, mnt, "-o", &missing],
        32,
        &["missing\\x0d: cannot open the directory: No such file"],
    );
    let message = stderr(&succeeds(&[image, mnt, "-v", "-o", &basedir()]));
    assert!(message.contains("a\\x0ab\\x1b[31m.cfs"), "{message:?}");
    assert!(message.lines().all(|line| line.starts_with("mount.composefs: ")), "{message:?}");
    assert!(message.contains("read-only: there is no upperdir"), "{message}");
    umount(Path::new(mnt));
}

#[test]
fn copy_above_file_size_limit_reports_ulimit() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    for copy in ["memfd", "ramfs"] {
        let output = Command::new("prlimit")
            .args(["--fsize=8192", env!("CARGO_BIN_EXE_mount-composefs")])
            .args([&image, &mnt])
            .args(["-o", &format!("{},copy={copy}", basedir())])
            .output()
            .unwrap();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("File too large") && message.contains("ulimit -f"), "{message}");
        assert!(mount_at(&mnt).is_none());
    }
}

#[test]
fn exit_status_follows_error_kind() {
    let Some(sandbox) = sandbox!() else { return };
    let mnt = sandbox.directory("mnt");
    let (mnt, basedir) = (mnt.to_str().unwrap(), &basedir());
    let image = V1.image();
    let image = image.to_str().unwrap();
    let copy = &format!("{basedir},copy");
    let text = sandbox.file("text", b"hello\n".repeat(1000).as_slice());

    // InvalidOptions
    fails(&[image, mnt, "-o", basedir, "-o", "size=1m"], 1, &["no copy requested"]);
    // LimitExceeded: the image has 24576 bytes.
    let limited = &format!("{copy},size=20480");
    fails(&[image, mnt, "-o", limited], 2, &["has 24576 bytes", "limit for the copy is 20480"]);
    // NotAnImage
    fails(&[text.to_str().unwrap(), mnt, "-o", copy], 32, &["not a composefs image"]);
    // DigestMismatch
    let wrong = &format!("{copy},noverity,digest={}", "0".repeat(64));
    fails(&[image, mnt, "-o", wrong], 32, &["its fs-verity digest is"]);
    // PermissionDenied
    let output = Command::new("setpriv")
        .args(["--bounding-set=-sys_admin", env!("CARGO_BIN_EXE_mount-composefs")])
        .args([image, mnt, "-o", copy])
        .output()
        .unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("Operation not permitted"), "{message}");
    // Busy: /dev has no node for any loop device, so all attempts fail.
    let dev = sandbox.directory("dev");
    let control = sandbox.file("dev/loop-control", b"");
    mount_bind("/dev/loop-control", &control).unwrap();
    // Rust opens /dev/null for the standard input of a child.
    mount_bind("/dev/null", sandbox.file("dev/null", b"")).unwrap();
    rustix::mount::mount_bind_recursive(&dev, "/dev").unwrap();
    fails(&[image, mnt, "-o", copy], 2, &["no free loop device after 1000 attempts", "hint: "]);
    unmount("/dev", UnmountFlags::DETACH).unwrap();
    assert!(mount_at(Path::new(mnt)).is_none());
}

#[test]
fn tryverity_with_digest_requires_verity() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    let (image, mnt) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    let options = |verity| format!("{},copy,digest={},{verity}", basedir(), V1.digest);
    for verity in ["tryverity", "verity", "verity=require"] {
        fails(&[image, mnt, "-o", &options(verity)], 32, &["cannot enforce verity", "noverity"]);
    }
    // A digest alone requires verity too.
    let alone = format!("{},copy,digest={}", basedir(), V1.digest);
    fails(&[image, mnt, "-o", &alone], 32, &["cannot enforce verity", "noverity"]);
    assert!(mount_at(Path::new(mnt)).is_none());
}

#[test]
fn verity_try_with_digest_mounts_without_fs_verity() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    let (image, mnt_text) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    let options = format!("{},copy,digest={},verity=try", basedir(), V1.digest);
    let message = stderr(&succeeds(&["-v", image, mnt_text, "-o", &options]));
    assert!(
        message.contains("objects are not verified when they are read: in an object directory, "),
        "{message}"
    );
    assert!(message.contains(V1.digest), "{message}");
    assert_is_manifest(&mnt);
    umount(&mnt);
    // The image itself must have the digest.
    let wrong = options.replace(V1.digest, &"1".repeat(64));
    fails(&[image, mnt_text, "-o", &wrong], 32, &["its fs-verity digest is", V1.digest]);
}

#[test]
fn failed_mount_reports_cause_and_status_32() {
    let Some(sandbox) = sandbox!() else { return };
    let mnt = sandbox.directory("mnt");
    let (mnt, basedir) = (mnt.to_str().unwrap(), &basedir());
    let image = V1.image();
    let image = image.to_str().unwrap();
    let no_image = sandbox.file("text", b"hello\n".repeat(1000).as_slice());
    let missing = sandbox.path("missing");
    let (no_image, missing) = (no_image.to_str().unwrap(), missing.to_str().unwrap());
    let wrong = format!("{basedir},copy,noverity,digest={}", "0".repeat(64));
    let unverified = format!("{basedir},noverity,digest={}", V1.digest);

    fails(&[no_image, mnt, "-o", basedir], 32, &[no_image, "not a composefs image"]);
    fails(&[missing, mnt, "-o", basedir], 32, &[missing, "No such file or directory"]);
    fails(&[image, missing, "-o", basedir], 32, &["mount point", missing, "hint: "]);
    fails(&[image, mnt, "-o", &format!("basedir={missing}")], 32, &["object directory", missing]);
    fails(&[image, mnt, "-o", &wrong], 32, &[image, V1.digest, &"0".repeat(64), "hint: "]);
    fails(&[image, mnt, "-o", &unverified], 32, &[image, "hint: add the option copy"]);
    fails(&[image, mnt, "-o", basedir, "-o", "verity"], 32, &["fs-verity", "hint: "]);
    assert!(mount_at(Path::new(mnt)).is_none());
}

#[test]
fn unprivileged_mount_reports_need_for_root() {
    let Some(_sandbox) = sandbox!() else { return };
    // An ordinary user can reach files in /tmp. The source tree may be below /tmp too, so the test
    // reads the files before a tmpfs hides the tree.
    let directory = Path::new("/tmp");
    let (helper, image) = (directory.join("mount.composefs"), directory.join("image.cfs"));
    let contents = [env!("CARGO_BIN_EXE_mount-composefs").into(), V1.image()].map(fs::read);
    run("mount", ["-t", "tmpfs", "tmpfs", "/tmp"]);
    for (path, content) in [&helper, &image].into_iter().zip(contents) {
        fs::write(path, content.unwrap()).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let call_without_privileges = |options: &str| {
        Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .args([helper.as_path(), &image, directory])
            .args(["-o", &format!("basedir=/tmp,{options}")])
            .output()
            .unwrap()
    };
    for options in ["ro", "copy"] {
        let output = call_without_privileges(options);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{options}: {message}");
        assert!(message.contains("mounting needs root"), "{options}: {message}");
    }
}

#[test]
fn unwritable_stderr_keeps_mount_and_status() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    let helper = |arguments: &[&str]| {
        let mut helper = Command::new(env!("CARGO_BIN_EXE_mount-composefs"));
        helper.args(arguments).stdout(full()).stderr(full()).status().unwrap().code()
    };
    let (image, mount_point) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    assert_eq!(helper(&[image, mount_point, "-v", "-o", &basedir()]), Some(0));
    assert_is_manifest(&mnt);
    umount(&mnt);
    assert_eq!(helper(&["/missing", mount_point, "-o", &basedir()]), Some(32));
    assert_eq!(helper(&["--help"]), Some(2));
}

#[test]
fn operands_and_options_in_any_order_mount() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    let (i, d) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    let b = &basedir();
    let joined = &format!("-o{b}");
    for arguments in [
        vec!["-o", b, i, d],
        vec![i, "-o", b, d],
        vec![i, d, "-n", "-t", "composefs.sub", "-o", "rw,nosuid", "-o", b],
        vec!["-snv", joined, "--", i, d],
    ] {
        succeeds(&arguments);
        assert_is_manifest(&mnt);
        umount(&mnt);
    }
}

#[test]
fn fake_mount_verifies_and_leaves_no_mount() {
    let Some(sandbox) = sandbox!() else { return };
    let image = sandbox.path("fake.cfs");
    fs::copy(V1.image(), &image).unwrap();
    let mnt = sandbox.directory("mnt");
    let before = format!("{:?}", mounts());
    let (image, mnt) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    let options = format!("{},copy,noverity,digest={}", basedir(), V1.digest);
    let message = stderr(&succeeds(&["-fv", image, mnt, "-o", &options]));
    assert!(message.contains(V1.digest) && message.contains("loop device"), "{message}");
    assert_eq!(format!("{:?}", mounts()), before);
    assert_no_loop_device(image);

    let wrong = options.replace(V1.digest, &"1".repeat(64));
    fails(&["-f", image, mnt, "-o", &wrong], 32, &["digest"]);
    fails(&["-f", image, "/nowhere", "-o", &options], 32, &["/nowhere"]);
    fails(&["-f", image, mnt, "-o", &format!("{options},bogus")], 1, &["bogus"]);
}

#[test]
fn failed_check_reports_objects_and_status_32() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt, empty) = (V1.image(), sandbox.directory("mnt"), sandbox.directory("empty"));
    let (image, mnt) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    for flags in [&["-f"][..], &["-fv"], &[]] {
        for check in ["all", "content"] {
            let options = format!("basedir={},check={check}", empty.display());
            let arguments = [flags, &[image, mnt, "-o", &options]].concat();
            let output = mount_composefs!(&arguments);
            assert_eq!(output.status.code(), Some(32));
            let message = stderr(&output);
            let start = message.find("cannot use the objects").unwrap();
            let lines: Vec<_> = message[start..].lines().collect();
            assert_eq!(lines.len(), 15, "{message}");
            assert_eq!(lines[0], "cannot use the objects: 18 of 18 objects failed the check");
            assert!(lines[1].starts_with("  /data/4096 needs "), "{message}");
            assert!(lines[10].ends_with(": missing"), "{message}");
            assert_eq!(lines[11], "  … and 8 more objects: the list is not complete");
            assert_eq!(lines[12], "  failed: 18 missing");
            let totals = "0 of 18 objects passed (all objects: 91658 bytes, for 19 files)";
            assert_eq!(lines[13], format!("  check={check}: {totals}"));
            let hint = "  hint: all objects are missing: check the object directories (basedir=)";
            assert_eq!(lines[14], hint);
        }
    }
    assert!(mount_at(Path::new(mnt)).is_none());
    let options = format!("{},check=content", basedir());
    let totals = "check=content: 18 of 18 objects passed";
    assert!(stderr(&succeeds(&["-fv", image, mnt, "-o", &options])).contains(totals));
    assert_eq!(stderr(&succeeds(&["-f", image, mnt, "-o", &options])), "");
}

#[test]
fn sloppy_mount_ignores_only_unknown_options() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    let (i, d) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    let message = stderr(&succeeds(&["-sv", i, d, "-o", &format!("{},bogus=1", basedir())]));
    assert!(message.contains("bogus"), "{message}");
    fails(
        &["-s", i, d, "-o", &format!("{},ro=1", basedir())],
        1,
        &["cannot use ro: the option takes no value"],
    );
}

#[test]
fn help_and_version_report_to_stdout() {
    for (argument, text) in
        [("-h", "basedir="), ("--help", "Usage"), ("-V", env!("CARGO_PKG_VERSION"))]
    {
        let output = succeeds(&[argument]);
        assert!(String::from_utf8(output.stdout).unwrap().contains(text), "{argument}");
        assert!(output.stderr.is_empty());
    }
    // --help must list every option of the table in README.md, except the options that mount(8)
    // documents.
    let help = String::from_utf8(succeeds(&["--help"]).stdout).unwrap();
    let table = include_str!("../README.md").split("## Options").nth(1).unwrap();
    let table = table.split("## ").next().unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| `") && !line.contains("mount(8)"));
    let names = rows.flat_map(|row| row.split('`').skip(1).step_by(2).take(1));
    let mut count = 0;
    for name in names.flat_map(|options| options.split([',', '[', '='])) {
        let is_option = name.starts_with(|c: char| c.is_ascii_lowercase());
        assert!(!is_option || help.contains(name), "{name} is not in --help");
        count += usize::from(is_option);
    }
    assert!(count > 10, "the test found only {count} options");
    // A reader that closes the pipe has read enough, so the helper succeeds.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut helper = Command::new(env!("CARGO_BIN_EXE_mount-composefs"));
    assert!(helper.arg("--help").stdout(writer).status().unwrap().success());
}

#[test]
fn mount_without_verbose_reports_nothing() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    let output = succeeds(&[image.to_str().unwrap(), mnt.to_str().unwrap(), "-o", &basedir()]);
    assert!(output.stdout.is_empty() && output.stderr.is_empty());
}

#[test]
fn verbose_with_closed_pipe_still_mounts() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut helper = Command::new(env!("CARGO_BIN_EXE_mount-composefs"));
    helper.arg("-v").args([&image, &mnt]).args(["-o", &basedir()]).stderr(writer);
    assert!(helper.status().unwrap().success());
    assert_is_manifest(&mnt);
    umount(&mnt);
}

/// Returns the output of the helper on a terminal that script(1) makes.
fn on_a_terminal(flag: &str, image: &Path, mnt: &Path) -> String {
    let helper = env!("CARGO_BIN_EXE_mount-composefs");
    let call =
        format!("{helper} {flag} -o copy,{} {} {}", basedir(), image.display(), mnt.display());
    let mut script = Command::new("script");
    let output = script.args(["-qec", &call, "/dev/null"]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Calls `mount` with images that need more and more time to decompress, until a mount needs 1.5
/// seconds.
fn until_it_takes_long(sandbox: &Sandbox, mut mount: impl FnMut(&Path)) {
    const STREAM: usize = 16 * 1024 * 1024;
    // The streams are noise with four bits per byte, which xz decompresses slowly.
    let mut state = 1_u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 28) as u8
    };
    let content: Vec<u8> = (0..STREAM).map(|_| noise()).collect();
    let stream = test_support::through(&["xz", "-0"], &content);
    for streams in [4, 8, 16, 32, 64] {
        let mut head = large_image(STREAM);
        head[1060..1064].copy_from_slice(&((streams * STREAM / 4096) as u32).to_le_bytes());
        let head = test_support::through(&["xz", "-0"], &head);
        let image = sandbox.file("image.xz", &[head, stream.repeat(streams - 1)].concat());
        let start = Instant::now();
        mount(&image);
        if start.elapsed() > Duration::from_millis(1500) {
            return;
        }
    }
    panic!("a copy of 1 GiB needs less than 1.5 seconds");
}

#[test]
fn long_copy_on_terminal_reports_progress() {
    let Some(sandbox) = sandbox!() else { return };
    let mnt = sandbox.directory("mnt");
    let short = on_a_terminal("-v", &V1.image(), &mnt);
    assert!(short.contains("copied into") && !short.contains("copying ["), "{short}");
    umount(&mnt);

    let (mut message, mut long) = (String::new(), PathBuf::new());
    until_it_takes_long(&sandbox, |image| {
        message = on_a_terminal("-v", image, &mnt);
        long = image.to_owned();
        umount(&mnt);
    });
    assert!(message.contains("\rcopying [") && message.contains("%"), "{message}");
    assert!(message.contains("\r\x1b[Kmount.composefs: image "), "{message}");

    // Without -v the helper prints nothing. Without a terminal the helper draws no bar.
    assert_eq!(on_a_terminal("", &long, &mnt), "");
    umount(&mnt);
    let options = format!("copy,{}", basedir());
    let (long, mnt_text) = (long.to_str().unwrap(), mnt.to_str().unwrap());
    let message = stderr(&succeeds(&["-v", "-o", &options, long, mnt_text]));
    assert!(message.contains("copied into"), "{message}");
    assert!(!message.contains("copying") && !message.contains(['\r', '\x1b']), "{message}");
    umount(&mnt);
}

#[test]
fn long_check_on_terminal_reports_progress() {
    let Some(sandbox) = sandbox!() else { return };
    let (mnt, objects) = (sandbox.directory("mnt"), sandbox.directory("objects"));
    fs::create_dir(objects.join("ab")).unwrap();
    let object = fs::File::create(objects.join("ab/cd")).unwrap();
    let options = format!("basedir={},check=content", objects.display());
    // The object has no data on the disk.
    for gibibytes in [1, 4, 16, 64, 256] {
        let mut image = ErofsImage::new();
        let metacopy = [&[0, 36, 0, 1][..], &[0; 32]].concat();
        let file = image.file(gibibytes << 30, Some(&metacopy), Some(b"/ab/cd"));
        image.link(0, "file", file);
        object.set_len(gibibytes << 30).unwrap();
        let image = sandbox.file("image.cfs", &image.finish());
        let helper = env!("CARGO_BIN_EXE_mount-composefs");
        let call = format!("{helper} -fv -o {options} {} {}", image.display(), mnt.display());
        let start = Instant::now();
        let mut script = Command::new("script");
        script.args(["-qec", &call, "/dev/null"]).stdin(Stdio::null());
        let output = script.output().unwrap();
        assert_eq!(output.status.code(), Some(32));
        let message = String::from_utf8(output.stdout).unwrap();
        assert!(message.contains("  failed: 1 wrong content"), "{message}");
        if start.elapsed() > Duration::from_millis(1500) {
            assert!(message.contains("\rchecking [") && message.contains("%"), "{message}");
            return;
        }
    }
    panic!("a check of 256 GiB needs less than 1.5 seconds");
}

#[test]
fn namespace_option_mounts_in_other_namespace() {
    let Some(sandbox) = sandbox!() else { return };
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    let (i, d) = (image.to_str().unwrap(), mnt.to_str().unwrap());
    let mut other = Command::new("unshare")
        .args(["--mount", "sh", "-c", "echo; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    let pid = other.id().to_string();
    let other_mounts = || fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap().contains(d);

    succeeds(&[i, d, "-o", &basedir(), "-N", &pid]);
    assert!(other_mounts() && mount_at(&mnt).is_none());
    run("nsenter", ["--target", &pid, "--mount", "umount", d]);
    assert!(!other_mounts());
    succeeds(&[i, d, "-o", &basedir(), "-N", &format!("/proc/{pid}/ns/mnt")]);
    assert!(other_mounts() && mount_at(&mnt).is_none());
    drop(other.stdin.take());
    other.wait().unwrap();
}

fn install(sandbox: &Sandbox) {
    sandbox.install_helper(env!("CARGO_BIN_EXE_mount-composefs").as_ref());
}

fn findmnt(mount_point: &Path, column: &str) -> String {
    let printed = run("findmnt", ["-n", "-o", column, mount_point.to_str().unwrap()]);
    printed.trim().to_owned()
}

#[test]
fn mount_8_mounts_and_umount_8_leaves_no_mount() {
    let Some(sandbox) = sandbox!() else { return };
    install(&sandbox);
    let (image, mnt) = (V1.image(), sandbox.directory("mnt"));
    let options = format!("{},nosuid,nodev,noatime,x-test=1", basedir());
    let mount = |options: &str, more: &[&str]| {
        let call =
            ["-t", "composefs", "-o", options, image.to_str().unwrap(), mnt.to_str().unwrap()];
        run("mount", call.iter().chain(more))
    };
    mount(&options, &[]);
    assert_is_manifest(&mnt);
    assert_eq!(findmnt(&mnt, "SOURCE"), image.to_str().unwrap());
    assert_eq!(findmnt(&mnt, "FSTYPE"), "overlay");
    let shown = findmnt(&mnt, "OPTIONS");
    for option in ["ro", "nosuid", "nodev", "noatime"] {
        assert!(shown.split(',').any(|shown| shown == option), "{option}: {shown}");
    }
    assert!(shown.contains(V1.objects().to_str().unwrap()), "{shown}");
    umount_8(&mnt);

    mount(&format!("{options},copy,noverity,digest={}", V1.digest), &["-v"]);
    assert_is_manifest(&mnt);
    umount_8(&mnt);
    mount(&options, &["-f"]);
    assert!(mount_at(&mnt).is_none());
    mount(&options, &["-s", "-n"]);
    // umount(8) also accepts the source.
    umount_8(&image);
    assert!(mount_at(&mnt).is_none());
}

#[test]
fn mount_a_mounts_each_fstab_entry_once() {
    let Some(sandbox) = sandbox!() else { return };
    install(&sandbox);
    let (one, other) = (sandbox.directory("one"), sandbox.directory("with space"));
    let line = |image: PathBuf, directory: &Path, options: &str| {
        let directory = directory.to_str().unwrap().replace(' ', "\\040");
        format!("{} {directory} composefs {options} 0 0\n", image.display())
    };
    let v2 = format!(
        "copy,noverity,digest={},basedir={},user,exec,_netdev,x-systemd.device-timeout=1",
        V2.digest,
        V2.objects().display(),
    );
    let fstab = [
        line(V1.image(), &one, &format!("defaults,nofail,{},noatime", basedir())),
        line(V2.image(), &other, &v2),
        line(V2.image(), &sandbox.directory("not"), "noauto,basedir=/nowhere"),
    ];
    let fstab = sandbox.file("fstab", fstab.concat().as_bytes());
    let mount_a = || run("mount", ["-a".as_ref(), "-T".as_ref(), fstab.as_os_str()]);
    mount_a();
    assert_is_manifest(&one);
    assert_is_manifest(&other);
    let options = mount_at(&other).unwrap().options;
    assert!(options.contains(&"nosuid".into()) && !options.contains(&"noexec".into()));
    let mounted = mounts().len();
    mount_a();
    assert_eq!(mounts().len(), mounted, "the helper mounted an image twice");
    umount_8(&one);
    umount_8(&other);
}
