//! Lets system calls fail during mounts with real fs-verity. No failure may lead to a mount that
//! enforces less. tests/faults covers other faults and outcomes.

use super::fixtures::{self, Fixture, HELPER, V1, V2};
use super::machines::STANDARD;
use super::mounted::{TREE, Traces};
use super::probe;
use super::verity::{NOT_SAMPLED, assert_only_harmed, can_verify, contents};
use crate::Error;
use crate::machine::{Machine, Tier};
use crate::scenario::{Guest, Scenario};
use nix::errno::Errno;
use nix::libc;
use rustix::mount::{UnmountFlags, unmount};
use sealmount::LayerMethod;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use test_support::manifest::{ROOT, assert_is_manifest, assert_root_is};
use test_support::mountinfo::mount_at;
use test_support::tracer::{self, Action, Call, Decision, End};

/// The argument with which vm-init stops itself and then executes the program in the next argument.
/// This way a tracer sees that program from its start.
pub const STOP_AND_EXECUTE: &str = "--stop-and-execute";

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "faults_with_kernel_digest_keep_verity",
        machine: &INJECTED,
        time_limit: TIME_LIMIT,
        run: |guest| each_call_fails(guest, "by_kernel", true, ""),
    },
    Scenario {
        name: "faults_with_kernel_digest_and_copy_keep_verity",
        machine: &INJECTED,
        time_limit: TIME_LIMIT,
        run: |guest| each_call_fails(guest, "by_kernel_copy", true, ",copy"),
    },
    Scenario {
        name: "faults_with_computed_digest_keep_verity",
        machine: &INJECTED,
        time_limit: TIME_LIMIT,
        run: |guest| each_call_fails(guest, "by_copy", false, ",copy"),
    },
    Scenario {
        name: "fallbacks_mount_layers_in_one_string",
        machine: &STANDARD,
        time_limit: Scenario::TIME_LIMIT,
        run: fallbacks_mount_layers_in_one_string,
    },
];

static INJECTED: Machine = Machine {
    name: "injected",
    tier: Tier::Ci,
    on_faulty_kernels: false,
    on_large_pages: false,
    ..STANDARD
};

/// Each of these scenarios makes hundreds of mounts.
const TIME_LIMIT: Duration = Duration::from_secs(900);

/// The system calls that verity, the digest, the seals and the mount depend on.
const DECISIVE: [libc::c_long; 11] = [
    libc::SYS_fcntl,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fstatfs,
    libc::SYS_ioctl,
    libc::SYS_memfd_create,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_pwrite64,
    libc::SYS_statx,
];

/// The errnos for an unsupported call, and the errno for a denied call.
const ERRNOS: [Errno; 3] = [Errno::EINVAL, Errno::EOPNOTSUPP, Errno::EPERM];

fn run_helper(
    image: &Path,
    arguments: &[&str],
    decide: &mut dyn FnMut(&Call) -> Decision,
) -> (End, String) {
    let mut command = Command::new("/proc/self/exe");
    command.arg(STOP_AND_EXECUTE).args([HELPER.as_ref(), image, TREE.as_ref()]);
    command.args(arguments);
    tracer::run(command, Duration::from_secs(60), decide)
}

fn each_call_fails(
    guest: &mut Guest,
    name: &str,
    has_verity: bool,
    options: &str,
) -> Result<(), Error> {
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    if !can_verify(&V1, &disk)? {
        return Ok(());
    }
    let place = disk.join(name);
    V1.copy_with_verity(&disk, &place)?;
    let image = V1.image_in(&place);
    if has_verity {
        fixtures::enable_verity(&image, V1.digest()?.algorithm())?;
    }
    let basedir = V1.objects_in(&place);
    let options = format!("basedir={},digest={}{options}", basedir.display(), V1.digest);
    fs::create_dir_all(TREE)?;
    let run =
        |decide: &mut dyn FnMut(&Call) -> Decision| run_helper(&image, &["-o", &options], decide);
    // Check that the expected side computed the digest.
    let (_, text) = run_helper(&image, &["-v", "-o", &options], &mut |_| Action::Proceed.into());
    let by =
        if has_verity { "measured by the kernel's fs-verity" } else { "computed by sealmount" };
    assert!(text.contains(by), "the output lacks {by:?}: {text}");
    if mount_at(Path::new(TREE)).is_some() {
        unmount(TREE, UnmountFlags::empty())?;
    }

    let mut calls = Vec::new();
    let (end, text) = run(&mut |call| {
        if DECISIVE.contains(&call.number) {
            calls.push((call.number, call.nth));
        }
        Action::Proceed.into()
    });
    // Only an overlayfs that supports verity=require mounts an image with a digest.
    let can = probe::overlayfs()?.verity;
    assert_eq!(end == End::Exited(0), can, "{end:?} {text}");
    if can {
        assert_is_manifest(Path::new(TREE));
        unmount(TREE, UnmountFlags::empty())?;
    }

    let (mut mounted, mut rejected) = (0, 0);
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
                    rejected += 1;
                }
                _ => panic!("{what}"),
            }
            before.assert_same_now()?;
        }
    }
    println!("{mounted} mounts with verity=require, {rejected} errors");
    assert!(rejected > 0 && (mounted > 0) == can);
    Ok(())
}

/// The fsconfig(2) commands that set layers.
const SET_STRING: u64 = 1;
const SET_FD: u64 = 5;

/// Lets the newer layer options fail with the errnos of Linux 6.5. There overlayfs accepts data-only
/// layers only in one string, which later kernels still accept.
fn as_linux_6_5(call: &Call) -> Decision {
    let option = || call.text(2).unwrap_or_default();
    let is_layer =
        |option: &str| ["lowerdir+", "datadir+", "upperdir", "workdir"].contains(&option);
    let answer = match (call.number, call.arguments[1]) {
        (libc::SYS_fsconfig, SET_FD) if is_layer(&option()) => Action::Fail(Errno::EBADF),
        (libc::SYS_fsconfig, SET_STRING) if option().ends_with("dir+") => {
            Action::Fail(Errno::EINVAL)
        }
        _ => Action::Proceed,
    };
    answer.into()
}

fn fallbacks_mount_layers_in_one_string(guest: &mut Guest) -> Result<(), Error> {
    let overlayfs = probe::overlayfs()?;
    if overlayfs.layers == LayerMethod::LowerOnly {
        println!("this kernel does not support data-only layers");
        return Ok(());
    }
    let disk = fixtures::mount_objects(guest, "ext4-verity")?;
    for fixture in [&V1, &V2] {
        one_string_shows(fixture, &disk, "noverity")?;
        let whole = contents()?;
        unmount(TREE, UnmountFlags::empty())?;
        if !overlayfs.verity || !can_verify(fixture, &disk)? {
            continue;
        }
        let place = disk.join("one-string");
        fixture.copy_with_verity(&disk, &place)?;
        one_string_shows(fixture, &place, "verity")?;
        let content = fs::read(Path::new(TREE).join(NOT_SAMPLED))?;
        unmount(TREE, UnmountFlags::empty())?;

        // The content of another object, with fs-verity, shows only when the object is read.
        let objects = fixtures::objects(&fixture.objects_in(&place))?;
        let has_content = |object: &&PathBuf| fs::read(object).is_ok_and(|found| found == content);
        let object = objects.iter().find(has_content).ok_or("no object has the content")?;
        let other =
            objects.iter().find(|other| *other != object).ok_or("the image has only one object")?;
        fs::remove_file(object)?;
        fs::copy(other, object)?;
        fixtures::enable_verity(object, fixture.digest()?.algorithm())?;
        mount_in_one_string(fixture, &place, "verity")?;
        assert_only_harmed(&contents()?, whole, &content, rustix::io::Errno::IO);
        unmount(TREE, UnmountFlags::empty())?;
    }
    Ok(())
}

fn one_string_shows(fixture: &Fixture, place: &Path, verity: &str) -> Result<(), Error> {
    mount_in_one_string(fixture, place, verity)?;
    assert_is_manifest(Path::new(TREE));
    assert_root_is(Path::new(TREE), ROOT);
    Ok(())
}

fn mount_in_one_string(fixture: &Fixture, place: &Path, verity: &str) -> Result<(), Error> {
    fs::create_dir_all(TREE)?;
    let objects = fixture.objects_in(place);
    let options = format!("basedir={},{verity}", objects.display());
    let (end, text) =
        run_helper(&fixture.image_in(place), &["-v", "-o", &options], &mut as_linux_6_5);
    println!("{options}: {end:?}\n{text}");
    assert_eq!(end, End::Exited(0));
    let used = format!("{}: used", LayerMethod::OneString);
    assert!(text.contains(&used), "the output lacks {used:?}");
    let mount = mount_at(Path::new(TREE)).ok_or("mountinfo does not have the mount")?;
    let data_only = format!("::{}", objects.display());
    assert!(
        mount
            .options
            .iter()
            .any(|option| option.starts_with("lowerdir=") && option.ends_with(&data_only)),
        "{mount:?}"
    );
    let is_enforced = mount.options.iter().any(|option| option == "verity=require");
    assert_eq!(is_enforced, verity == "verity");
    Ok(())
}
