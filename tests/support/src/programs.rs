//! Runs programs: umount(8), unshare(1), and any other that must succeed.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

/// Runs a program that must succeed. Returns its output.
pub fn run<S: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = S>,
) -> String {
    let mut command = Command::new(program);
    let output = command.args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Unmounts a mount that no process uses. A process that another test starts at this moment holds a
/// copy of every descriptor until the process executes its program.
pub fn umount(mount_point: &Path) {
    for _ in 0..500 {
        match unmount(mount_point, UnmountFlags::empty()) {
            Err(Errno::BUSY) => std::thread::sleep(Duration::from_millis(20)),
            result => return result.unwrap(),
        }
    }
    panic!("{} is in use", mount_point.display());
}

/// Unmounts with umount(8), which also accepts the source of a mount.
pub fn umount_8(target: &Path) {
    for _ in 0..500 {
        let output = Command::new("umount").arg(target).env("LC_ALL", "C").output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        if !message.contains("target is busy") {
            assert!(output.status.success(), "umount {}: {output:?}", target.display());
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{} is in use", target.display());
}

/// Returns the output of a program for this input.
pub fn through(program: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program[0])
        .args(&program[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program[0]));
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success());
    output.stdout
}

/// Makes a user namespace that maps 0 to 100000 and so on. Returns the process that holds the namespace
/// until its standard input is closed, and the path of the namespace.
pub fn user_namespace() -> (Child, String) {
    let mut process = Command::new("unshare")
        .args(["--user", "sh", "-c", "echo; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    process.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{map}", process.id()), "0 100000 65536").unwrap();
    }
    let namespace = format!("/proc/{}/ns/user", process.id());
    (process, namespace)
}
