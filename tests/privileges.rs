//! Without a permission: the message says which one is missing, the exit status is the documented one,
//! and nothing is left. And what a caller without permission cannot do.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

use rustix::fs::{XattrFlags, removexattr, setxattr};
use rustix::io::Errno;
use sealmount::{Error, Memory, MountOptions, Operation, Rung, Step};

use test_support::sandboxing::{SystemCall, refuse, refuse_argument, restrict_by_landlock};
use test_support::{
    Sandbox, V1, assert_is_manifest, assert_no_loop_device, mount_at, mount_composefs, mounts, run,
    sandbox, umount,
};

/// A sandbox with an image of its own and a mount point.
struct Place {
    sandbox: Sandbox,
    image: PathBuf,
    mount_point: PathBuf,
}

impl Place {
    fn new() -> Option<Place> {
        let sandbox = sandbox!()?;
        let image = sandbox.path("image.cfs");
        fs::copy(V1.image(), &image).unwrap();
        let mount_point = sandbox.directory("mnt");
        Some(Place { sandbox, image, mount_point })
    }

    /// The operands and options of the helper.
    fn arguments(&self, options: &MountOptions) -> [std::ffi::OsString; 4] {
        [self.image.clone().into(), self.mount_point.clone().into(), "-o".into(), options.to_text()]
    }

    fn assert_nothing_is_left(&self, before: &[test_support::Mount]) {
        assert_eq!(mounts(), before);
        assert_no_loop_device(self.image.to_str().unwrap());
    }
}

const MODES: [Option<Memory>; 3] = [None, Some(Memory::Memfd), Some(Memory::Ramfs)];

fn options(copy: Option<Memory>) -> MountOptions {
    let mut options = V1.options();
    options.copy = copy;
    options
}

#[track_caller]
fn assert_refused(output: &Output, status: i32, texts: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{message}");
    for text in texts {
        assert!(message.contains(text), "{text:?} is not in {message:?}");
    }
}

/// Runs the helper behind another program, which changes its privileges.
fn behind(program: &str, arguments: &[impl AsRef<OsStr>]) -> Output {
    let mut program = program.split(' ');
    Command::new(program.next().unwrap())
        .args(program)
        .arg(env!("CARGO_BIN_EXE_mount-composefs"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn root_of_a_user_namespace_is_told_what_is_missing() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    // With the mount namespace that it was in, and with one of its own.
    for namespaces in ["unshare -Ur", "unshare -Urm"] {
        for copy in MODES {
            let output = behind(namespaces, &place.arguments(&options(copy)));
            assert_refused(
                &output,
                1,
                &["Operation not permitted", "CAP_SYS_ADMIN in the initial user namespace"],
            );
            place.assert_nothing_is_left(&before);
        }
    }
}

#[test]
fn cap_sys_admin_is_what_it_takes_and_all_it_takes() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    for copy in MODES {
        let arguments = place.arguments(&options(copy));
        let output = behind("setpriv --bounding-set=-sys_admin", &arguments);
        assert_refused(&output, 1, &["Operation not permitted", "CAP_SYS_ADMIN"]);
        place.assert_nothing_is_left(&before);

        let output = behind("setpriv --bounding-set=-all,+sys_admin", &arguments);
        assert!(output.status.success(), "{output:?}");
        assert_is_manifest(&place.mount_point);
        umount(&place.mount_point);
    }
}

#[test]
fn another_namespace_takes_two_capabilities() {
    let Some(place) = Place::new() else { return };
    let mut arguments = place.arguments(&options(None)).to_vec();
    arguments.extend(["-N", "/proc/self/ns/mnt"].map(Into::into));
    for capability in ["sys_admin", "sys_chroot"] {
        let output = behind(&format!("setpriv --bounding-set=-{capability}"), &arguments);
        assert_refused(&output, 1, &["namespace", "CAP_SYS_ADMIN and CAP_SYS_CHROOT"]);
    }
    let output = behind("setpriv --bounding-set=-all,+sys_admin,+sys_chroot", &arguments);
    assert!(output.status.success(), "{output:?}");
    umount(&place.mount_point);
}

#[test]
fn the_user_namespace_of_anothers_process_takes_a_capability() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    let mut process = Command::new("setpriv")
        .args(NOBODY)
        .args(["sh", "-c", "echo; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    process.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let mut options = options(None);
    options.idmap = Some(format!("/proc/{}/ns/user", process.id()).into());
    let arguments = place.arguments(&options);
    let output = behind("setpriv --bounding-set=-all,+sys_admin", &arguments);
    assert_refused(&output, 32, &["cannot open the user namespace", "CAP_SYS_PTRACE"]);
    // It is the initial one.
    let output = behind("setpriv --bounding-set=-all,+sys_admin,+sys_ptrace", &arguments);
    assert_refused(&output, 1, &["cannot idmap the mount", "another user namespace"]);
    place.assert_nothing_is_left(&before);
    drop(process.stdin.take());
    process.wait().unwrap();
}

#[test]
fn no_new_privs_changes_nothing() {
    let Some(place) = Place::new() else { return };
    for copy in MODES {
        let output = behind("setpriv --no-new-privs", &place.arguments(&options(copy)));
        assert!(output.status.success(), "{output:?}");
        assert_is_manifest(&place.mount_point);
        umount(&place.mount_point);
    }
}

/// Runs the helper from a thread whose permissions were restricted.
fn restricted(restrict: impl FnOnce() + Send, arguments: &[std::ffi::OsString]) -> Output {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            restrict();
            mount_composefs!(arguments)
        });
        thread.join().unwrap()
    })
}

#[test]
fn a_seccomp_filter_that_refuses_a_system_call_is_named() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    let (process, namespace) = test_support::user_namespace();
    let mut idmapped = options(None);
    idmapped.idmap = Some(namespace.as_str().into());
    let (plain, memfd, ramfs) =
        (options(None), options(Some(Memory::Memfd)), options(Some(Memory::Ramfs)));
    let cases: [(SystemCall, &MountOptions, &str); 10] = [
        (libc::SYS_fsopen, &plain, "cannot open the file system type"),
        (libc::SYS_fsopen, &ramfs, "cannot open the file system type"),
        (libc::SYS_fsconfig, &plain, "cannot set the option"),
        (libc::SYS_fsconfig, &memfd, "cannot set the option"),
        (libc::SYS_fsmount, &plain, "cannot make the mount"),
        (libc::SYS_fspick, &ramfs, "cannot open the file system type"),
        (libc::SYS_memfd_create, &memfd, "cannot make a memory file for the copy"),
        (libc::SYS_mount_setattr, &idmapped, "cannot idmap the mount"),
        (libc::SYS_move_mount, &plain, "cannot attach the mount"),
        (libc::SYS_move_mount, &memfd, "cannot attach the mount"),
    ];
    for (system_call, options, said) in cases {
        // As old profiles of containers answer, as new ones do, and as security modules do.
        for (errno, status, hint) in [
            (Errno::PERM, 1, "takes root"),
            (Errno::NOSYS, 32, "or a seccomp filter denies it"),
            (Errno::ACCESS, 32, "takes root"),
        ] {
            let arguments = place.arguments(options);
            let output = restricted(|| refuse(&[system_call], errno), &arguments);
            assert_refused(&output, status, &[said, "  hint: ", hint]);
            place.assert_nothing_is_left(&before);
        }
    }
    drop(process);
}

/// Of linux/loop.h.
const LOOP_CTL_GET_FREE: u32 = 0x4c82;
const LOOP_CONFIGURE: u32 = 0x4c0a;

#[test]
fn a_container_without_loop_devices_is_told_so() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    for (request, said) in [
        (LOOP_CTL_GET_FREE, "cannot ask for a free loop device"),
        (LOOP_CONFIGURE, "cannot attach the image to the loop device"),
    ] {
        for errno in [Errno::PERM, Errno::ACCESS] {
            let refuse = || refuse_argument(libc::SYS_ioctl, 1, request, errno);
            let output = restricted(refuse, &place.arguments(&options(Some(Memory::Memfd))));
            assert_refused(&output, 1, &["/dev/loop", said, "containers have neither"]);
            place.assert_nothing_is_left(&before);
        }
    }
}

/// Every option that is a descriptor gets this answer.
fn refuse_descriptors(errno: Errno) {
    const FSCONFIG_SET_FD: u32 = 5;
    refuse_argument(libc::SYS_fsconfig, 1, FSCONFIG_SET_FD, errno);
}

/// What the profiles of containers refuse without CAP_SYS_ADMIN, with EPERM also where the kernel has
/// it: that is never taken for a kernel that has it not.
#[test]
fn a_refusal_is_never_a_reason_for_another_way() {
    let Some(place) = Place::new() else { return };
    let rungs_with = |errno| {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                refuse_descriptors(errno);
                let mut rungs = Vec::new();
                let options = options(Some(Memory::Memfd));
                let result = options.mount_with(&place.image, &mut |step| {
                    if let Step::Taken { rung } = step {
                        rungs.push(rung);
                    }
                });
                (result.map(drop), rungs)
            });
            thread.join().unwrap()
        })
    };
    // What a kernel before 6.13 answers.
    let (result, rungs) = rungs_with(Errno::BADF);
    result.unwrap();
    assert_eq!(rungs, [Rung::SourceByLoopDevice, Rung::LayersByPath]);
    for errno in [Errno::PERM, Errno::ACCESS] {
        let (result, rungs) = rungs_with(errno);
        let Err(Error::Kernel(error)) = result else { panic!("{result:?}") };
        assert_eq!((error.operation, error.errno), (Operation::SetOption, errno));
        assert_eq!(rungs, [Rung::SourceByLoopDevice]);
    }
    assert_no_loop_device(place.image.to_str().unwrap());
}

#[test]
fn a_security_module_that_refuses_is_named() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    for copy in MODES {
        let output = restricted(restrict_by_landlock, &place.arguments(&options(copy)));
        assert_refused(&output, 1, &["Operation not permitted", "a security module refuses it"]);
        place.assert_nothing_is_left(&before);
    }
}

#[test]
fn the_environment_changes_nothing() {
    let Some(place) = Place::new() else { return };
    let hostile: BTreeMap<&str, &str> = [
        ("PATH", "/nowhere"),
        ("HOME", "/nowhere"),
        ("TMPDIR", "/nowhere"),
        ("PWD", "/nowhere"),
        ("LANG", "tlh_KX.UTF-16"),
        ("LC_ALL", "../../../../etc"),
        ("LANGUAGE", "de"),
        ("TERM", "%s%s%s%n"),
        ("COLUMNS", "0"),
        ("NO_COLOR", "1"),
        ("RUST_BACKTRACE", "full"),
        ("RUST_LIB_BACKTRACE", "1"),
        ("RUST_LOG", "trace"),
        ("RUST_MIN_STACK", "9223372036854775807"),
        ("LIBMOUNT_DEBUG", "all"),
        ("LIBMOUNT_FSTAB", "/nowhere"),
        ("LIBMOUNT_FORCE_MOUNT2", "always"),
        ("LOOPDEV_DEBUG", "all"),
        ("ZSTD_CLEVEL", "99"),
        ("ZSTD_NBTHREADS", "9999"),
        ("XZ_OPT", "--memlimit=1"),
        ("XZ_DEFAULTS", "--memlimit=1"),
        ("GZIP", "-9"),
        ("SEALMOUNT_SKIP_ROOT_TESTS", "1"),
    ]
    .into();
    let helper = |environment: &BTreeMap<&str, &str>, arguments: &[&OsStr]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mount-composefs"));
        let output = command.env_clear().envs(environment).args(arguments).output().unwrap();
        let is_mounted = mount_at(&place.mount_point).is_some();
        if is_mounted {
            assert_is_manifest(&place.mount_point);
            umount(&place.mount_point);
        }
        assert_no_loop_device(place.image.to_str().unwrap());
        // Which loop device is free depends on the others.
        let text = String::from_utf8(output.stderr).unwrap();
        let digits: &[_] = &['0', '1', '2', '3', '4', '5', '6', '7', '8', '9'];
        let text = text.split("/dev/loop").map(|part| part.trim_start_matches(digits).to_owned());
        (output.status, output.stdout, text.collect::<Vec<_>>(), is_mounted)
    };
    let zstd = place.sandbox.path("image.cfs.zst");
    run("zstd", ["-q".as_ref(), place.image.as_os_str(), "-o".as_ref(), zstd.as_os_str()]);
    let wrong = format!("digest={},noverity", "0".repeat(64));
    let right = format!("digest={},noverity", V1.digest);
    let basedir = format!("basedir={}", V1.objects().display());
    let mut mounted = 0;
    // Also in the private namespace of older kernels, which takes a thread.
    for is_older_kernel in [false, true] {
        for image in [&place.image, &zstd] {
            for more in
                ["ro", "copy", "copy=ramfs", &format!("copy,{right}"), &format!("copy,{wrong}")]
            {
                let options = format!("{basedir},{more}");
                let arguments: Vec<&OsStr> = [
                    "-v".as_ref(),
                    image.as_os_str(),
                    place.mount_point.as_os_str(),
                    "-o".as_ref(),
                    options.as_ref(),
                ]
                .into();
                let outcomes = thread::scope(|scope| {
                    let thread = scope.spawn(|| {
                        if is_older_kernel {
                            refuse_descriptors(Errno::BADF);
                        }
                        [BTreeMap::new(), hostile.clone()]
                            .map(|environment| helper(&environment, &arguments))
                    });
                    thread.join().unwrap()
                });
                assert_eq!(outcomes[0], outcomes[1], "{options}");
                mounted += usize::from(outcomes[0].3);
            }
        }
    }
    assert!(mounted >= 10, "{mounted}");
    for arguments in [vec!["--help"], vec!["-V"], vec!["-x"], vec![]] {
        let arguments: Vec<_> = arguments.iter().map(OsStr::new).collect();
        assert_eq!(helper(&BTreeMap::new(), &arguments), helper(&hostile, &arguments));
    }
}

/// Every file of a directory with what is in it, without the tests.
fn sources(directory: &str) -> Vec<(PathBuf, String)> {
    let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(directory)];
    let mut sources = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.file_name().unwrap() != "tests.rs" {
                let text = fs::read_to_string(&path).unwrap();
                let (code, _) = text.split_once("#[cfg(test)]").unwrap_or((&text, ""));
                sources.push((path, code.to_owned()));
            }
        }
    }
    sources
}

#[test]
fn no_source_reads_the_environment_or_starts_a_program() {
    let sources = [sources("src"), sources("sys/src")].concat();
    assert!(sources.len() > 20);
    for (path, code) in sources {
        for text in ["env::var", "temp_dir", "home_dir", "getenv", "process::Command", "execve"] {
            assert!(!code.contains(text), "{}: {text}", path.display());
        }
    }
}

/// `cap_sys_admin+ep` as capabilities(7) has it: VFS_CAP_REVISION_2 and the bit that makes the
/// permitted ones effective, then the lower halves of permitted and inheritable, and the upper ones.
const CAP_SYS_ADMIN_EP: [u8; 20] = {
    let mut bytes = [0; 20];
    (bytes[0], bytes[3]) = (1, 2);
    // Bit 21.
    bytes[6] = 1 << 5;
    bytes
};

/// The helper, an image and a mount point in /tmp, where everybody gets at them: the project may be
/// checked out where that is not so, or below /tmp.
fn public() -> Option<(Sandbox, [&'static Path; 3])> {
    let sandbox = sandbox!()?;
    let contents = [env!("CARGO_BIN_EXE_mount-composefs").into(), V1.image()].map(fs::read);
    let paths = ["/tmp/mount.composefs", "/tmp/image.cfs", "/tmp/mnt"].map(Path::new);
    run("mount", ["-t", "tmpfs", "tmpfs", "/tmp"]);
    for (path, content) in paths.iter().zip(contents) {
        fs::write(path, content.unwrap()).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::create_dir(paths[2]).unwrap();
    Some((sandbox, paths))
}

/// Calls the helper in /tmp as another user.
fn call_as(user: &[&str], [helper, image, mount_point]: [&Path; 3]) -> Output {
    Command::new("setpriv")
        .args(user)
        .args([helper, image, mount_point])
        // Takes no loop device, whose nodes have permissions of their own.
        .args(["-o", "basedir=/tmp,copy=ramfs"])
        .output()
        .unwrap()
}

const NOBODY: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];

#[test]
fn installed_with_privileges_of_its_own_it_serves_only_root() {
    let Some((_sandbox, paths)) = public() else { return };
    let [helper, _, mount_point] = paths;
    let install = |mode, capabilities: Option<&[u8]>| {
        match capabilities {
            Some(capabilities) => {
                setxattr(helper, "security.capability", capabilities, XattrFlags::empty()).unwrap();
            }
            None => drop(removexattr(helper, "security.capability")),
        }
        fs::set_permissions(helper, fs::Permissions::from_mode(mode)).unwrap();
    };
    for (mode, capabilities) in
        [(0o4755, None), (0o2755, None), (0o755, Some(&CAP_SYS_ADMIN_EP[..]))]
    {
        install(mode, capabilities);
        let output = call_as(&NOBODY, paths);
        assert_refused(&output, 1, &["refused", "set-user-ID", "only root"]);
        assert!(mount_at(mount_point).is_none());
        // Root has the privileges anyway.
        let output = call_as(&["--clear-groups"], paths);
        assert!(output.status.success(), "{mode:o}: {output:?}");
        umount(mount_point);
    }
    // So that the test can tell: without, it gets further.
    install(0o755, None);
    assert_refused(&call_as(&NOBODY, paths), 1, &["takes root"]);
}

#[test]
fn a_capability_that_the_caller_has_is_as_good_as_root() {
    let Some((_sandbox, paths)) = public() else { return };
    // As a service manager gives it to a service.
    let ambient = ["--inh-caps=+sys_admin", "--ambient-caps=+sys_admin"];
    let output = call_as(&[NOBODY.as_slice(), &ambient].concat(), paths);
    assert!(output.status.success(), "{output:?}");
    umount(paths[2]);
}
