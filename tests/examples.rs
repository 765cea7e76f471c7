//! Runs the examples, as root, in a mount namespace of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use test_support::{assert_no_loop_device, mounts, run, sandbox};

/// Serializes the tests. The examples use one image, so a remaining loop device does not show which
/// example left the device.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Returns the directory of the examples. Cargo builds them beside the tests.
fn directory() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    program.parent().unwrap().parent().unwrap().join("examples")
}

/// Runs an example, and checks that the example leaves nothing. Returns the output, or `None` if the
/// caller must skip the test.
fn output_of(example: &str) -> Option<String> {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let _sandbox = sandbox!()?;
    let program = directory().join(example);
    let advice = "run `cargo build --examples` first: cargo builds them only with all tests";
    assert!(program.exists(), "{} is missing: {advice}", program.display());

    let before = mounts();
    let output = run(&program, [""; 0]);
    assert_eq!(mounts(), before);
    for directory in [&*directory(), Path::new(env!("CARGO_MANIFEST_DIR"))] {
        assert_no_loop_device(directory.to_str().unwrap());
    }
    let is_temporary = |name: &str| name.starts_with(".tmp");
    for entry in fs::read_dir(directory()).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(!is_temporary(&name.to_string_lossy()), "{name:?} is left");
    }
    Some(output)
}

/// Checks that the output has lines that contain these texts, in this order.
#[track_caller]
fn assert_prints(output: &str, expected: &[&str]) {
    let mut lines = output.lines();
    for text in expected {
        assert!(lines.any(|line| line.contains(text)), "no {text:?} in:\n{output}");
    }
}

#[test]
fn quickstart_mounts_and_leaves_nothing() {
    let Some(output) = output_of("quickstart") else { return };
    assert_prints(&output, &["mounted in", "hello.txt: ", "Unmounted; nothing is left."]);
}

#[test]
fn snapshotter_mounts_fifty_containers_on_one_copy() {
    let Some(output) = output_of("snapshotter") else { return };
    let expected = [
        "1 copy: composefs V1, 24576 bytes",
        "50 containers mounted",
        "memory: 24 KiB for the copy",
        "loop devices: 1",
        "each container owns its files",
        "50 containers removed",
        "loop devices: 0",
    ];
    assert_prints(&output, &expected);
}

#[test]
fn updater_sorts_errors_by_reaction() {
    let Some(output) = output_of("updater") else { return };
    let expected = [
        "-- The bundled image",
        "  composefs V1, 24576 bytes, blocks of 4096 bytes",
        "  24576 of 24576 bytes",
        "objects: check=content: 18 of 18 objects passed (",
        "verified, computed by sealmount: 24576 bytes",
        "-- Another digest",
        "Broken: ",
        "-- A file that is not an image",
        "Broken: ",
        "-- A missing object directory",
        "Operator: ",
        "-- Objects of another image",
        "Broken: ",
        ": missing",
        "-- Stopped by the user",
        "TryAgain: ",
    ];
    assert_prints(&output, &expected);
}

#[test]
fn handover_mounts_in_the_receiving_process() {
    let Some(output) = output_of("handover") else { return };
    // Two processes write to one pipe, so the order of their lines may differ.
    for text in [
        "sender: sent a mount and a sealed copy, and closed both",
        "receiver: hello.txt of the mount: ",
        "receiver: the copy is sealed and has the digest; copied again: false",
        "receiver: hello.txt of the sealed copy: ",
    ] {
        assert_prints(&output, &[text]);
    }
}
