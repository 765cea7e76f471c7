//! With real fs-verity: a system call that fails never ends in a mount that enforces less.
//! tests/faults.rs has the other faults, and the other outcomes.

use super::fixtures::{self, HELPER, V1};
use super::init::STOP_AND_EXECUTE;
use super::manifest::assert_is_manifest;
use super::mounted::{TREE, Traces};
use super::tracer::{self, Action, Decision, End};
use super::visible::mount_at;
use super::{Guest, basics::STANDARD, probe, verity::can_verify};
use crate::Error;
use crate::scenario::Scenario;
use nix::errno::Errno;
use nix::libc;
use rustix::mount::{UnmountFlags, unmount};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "faults_digest_by_kernel",
        machine: &STANDARD,
        time_limit: TIME_LIMIT,
        run: |guest| each_call_fails(guest, "by_kernel", ""),
    },
    Scenario {
        name: "faults_digest_by_copy",
        machine: &STANDARD,
        time_limit: TIME_LIMIT,
        run: |guest| each_call_fails(guest, "by_copy", ",copy"),
    },
];

/// Hundreds of mounts.
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// What verity, the digest, the seals and the mount depend on.
const DECISIVE: [i64; 9] = [
    libc::SYS_fcntl,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_ioctl,
    libc::SYS_memfd_create,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_pwrite64,
];

/// What a kernel or a file system answers that cannot, and one that must not.
const ERRNOS: [Errno; 3] = [Errno::EINVAL, Errno::EOPNOTSUPP, Errno::EPERM];

fn each_call_fails(guest: &mut Guest, name: &str, options: &str) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    if !can_verify(&V1, &disk)? {
        return Ok(());
    }
    let place = disk.join(name);
    V1.copy_with_verity(&disk, &place)?;
    let image = V1.image_in(&place);
    if !options.contains("copy") {
        fixtures::enable_verity(&image, V1.digest()?.algorithm())?;
    }
    let basedir = V1.objects_in(&place);
    let options = format!("basedir={},digest={}{options}", basedir.display(), V1.digest);
    fs::create_dir_all(TREE)?;
    let run = |decide: &mut dyn FnMut(&tracer::Call) -> Decision| {
        let mut command = Command::new("/proc/self/exe");
        command.arg(STOP_AND_EXECUTE).args([HELPER.as_ref(), image.as_path(), TREE.as_ref()]);
        command.args(["-o", &options]);
        tracer::run(command, Duration::from_secs(60), decide)
    };

    let mut calls = Vec::new();
    let (end, text) = run(&mut |call| {
        if DECISIVE.contains(&call.number) {
            calls.push((call.number, call.nth));
        }
        Action::Proceed.into()
    });
    // overlayfs has verity=require.
    let can = probe::overlayfs()?.verity;
    assert_eq!(end == End::Exited(0), can, "{end:?} {text}");
    if can {
        assert_is_manifest(Path::new(TREE));
        unmount(TREE, UnmountFlags::empty())?;
    }

    let (mut mounted, mut refused) = (0, 0);
    for (number, nth) in calls {
        for errno in ERRNOS {
            let before = Traces::now()?;
            let (end, text) = run(&mut |call| match (call.number, call.nth) == (number, nth) {
                true => Decision { action: Action::Fail(errno), is_last: true },
                false => Action::Proceed.into(),
            });
            let what = format!("system call {number} #{nth}, {errno}: {end:?} {text}");
            match end {
                End::Exited(0) => {
                    assert!(can, "{what}");
                    let mount = mount_at(Path::new(TREE)).unwrap_or_else(|| panic!("{what}"));
                    let is_enforced = mount.options.iter().any(|shown| shown == "verity=require");
                    assert!(is_enforced, "{what} {mount:?}");
                    fs::read(Path::new(TREE).join("data/70000"))?;
                    unmount(TREE, UnmountFlags::empty())?;
                    mounted += 1;
                }
                End::Exited(1 | 2 | 32) => {
                    assert!(text.starts_with("mount.composefs: "), "{what}");
                    refused += 1;
                }
                _ => panic!("{what}"),
            }
            before.assert_same_now()?;
        }
    }
    println!("{mounted} mounted, with verity=require; {refused} refused");
    assert!(refused > 0 && (mounted > 0) == can);
    Ok(())
}
