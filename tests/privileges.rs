//! Missing permissions: the message names the missing permission, and the helper exits with the
//! documented status. No mount, loop device or memory is left. A caller without a permission cannot
//! bypass the check.
// test_support::sandboxing supports little-endian architectures only.
#![cfg(target_endian = "little")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{XattrFlags, removexattr, setxattr};
use rustix::io::Errno;
use sealmount::{
    ErrorKind, Event, LayerMethod, MemoryKind, Method, MountOptions, Operation, SourceMethod,
    check_permission,
};

use test_support::sandboxing::{SystemCall, deny, deny_argument, restrict_by_landlock};
use test_support::{
    Sandbox, V1, assert_is_manifest, assert_no_loop_device, mount_and_events, mount_at,
    mount_composefs, mounts, run, sandbox, umount,
};

/// A sandbox with its own image and a mount point.
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

    /// Returns the operands and options of the helper.
    fn arguments(&self, options: &MountOptions) -> [std::ffi::OsString; 4] {
        [self.image.clone().into(), self.mount_point.clone().into(), "-o".into(), options.to_text()]
    }

    fn assert_nothing_is_left(&self, before: &[test_support::Mount]) {
        assert_eq!(mounts(), before);
        assert_no_loop_device(self.image.to_str().unwrap());
    }
}

const MODES: [Option<MemoryKind>; 3] = [None, Some(MemoryKind::Memfd), Some(MemoryKind::Ramfs)];

fn options(copy: Option<MemoryKind>) -> MountOptions {
    let mut options = V1.options();
    options.copy = copy;
    options
}

#[track_caller]
fn assert_denied(output: &Output, status: i32, texts: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{message}");
    for text in texts {
        assert!(message.contains(text), "{text:?} is not in {message:?}");
    }
}

/// Runs the helper through another program, which changes the privileges of the helper.
fn run_through(program: &str, arguments: &[impl AsRef<OsStr>]) -> Output {
    let mut program = program.split(' ');
    Command::new(program.next().unwrap())
        .args(program)
        .arg(env!("CARGO_BIN_EXE_mount-composefs"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn mount_in_user_namespace_reports_cap_sys_admin() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    // The helper runs in the mount namespace of the caller, and in its own mount namespace.
    for namespaces in ["unshare -Ur", "unshare -Urm"] {
        for copy in MODES {
            let output = run_through(namespaces, &place.arguments(&options(copy)));
            assert_denied(
                &output,
                1,
                &["Operation not permitted", "CAP_SYS_ADMIN in the initial user namespace"],
            );
            place.assert_nothing_is_left(&before);
        }
    }
}

#[test]
fn missing_permission_is_reported_before_the_copy() {
    let Some(place) = Place::new() else { return };
    // The machine has too little memory for a copy of the image, and sealmount reports only the first
    // failed check.
    const SIZE: u64 = 1 << 43;
    let mut content = fs::read(V1.image()).unwrap();
    content[1060..1064].copy_from_slice(&((SIZE / 4096) as u32).to_le_bytes());
    fs::write(&place.image, content).unwrap();
    OpenOptions::new().write(true).open(&place.image).unwrap().set_len(SIZE).unwrap();
    let opened = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&opened, &place.image, WatchFlags::OPEN).unwrap();

    for program in ["unshare -Ur", "unshare -Urm", "setpriv --bounding-set=-sys_admin"] {
        for memory in [MemoryKind::Memfd, MemoryKind::Ramfs] {
            for digest in [None, Some(V1.digest())] {
                let mut options = options(Some(memory));
                options.digest = digest;
                let start = Instant::now();
                let output = run_through(program, &place.arguments(&options));
                assert_denied(&output, 1, &["cannot mount EROFS: Operation not permitted"]);
                let message = String::from_utf8(output.stderr).unwrap();
                assert!(message.contains("hint: mounting needs root"), "{message}");
                assert!(!message.contains("proc"), "{message}");
                assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
            }
        }
    }
    // sealmount checks the permission before it opens the image.
    let seen = rustix::io::read(&opened, &mut [0; 1024]);
    assert_eq!(seen, Err(Errno::AGAIN), "sealmount opened the image");
    // With the permission, sealmount opens the image and rejects the copy because of its size.
    let output = run_through("env", &place.arguments(&options(Some(MemoryKind::Memfd))));
    assert_denied(&output, 2, &["the limit for the copy is"]);
    assert!(rustix::io::read(&opened, &mut [0; 1024]).is_ok());
}

#[test]
fn permission_check_reports_denied_mounts() {
    let Some(_place) = Place::new() else { return };
    check_permission().unwrap();
    for errno in [Errno::PERM, Errno::ACCESS] {
        for system_call in [libc::SYS_fsopen, libc::SYS_fsconfig] {
            let denied = thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    deny(&[system_call], errno);
                    check_permission()
                });
                thread.join().unwrap()
            });
            let error = denied.unwrap_err();
            assert_eq!(error.operation(), Operation::CheckPermission);
            assert_eq!(error.raw_os_error(), errno.raw_os_error());
            assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        }
    }
}

#[test]
fn only_cap_sys_admin_is_needed_to_mount() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    for copy in MODES {
        let arguments = place.arguments(&options(copy));
        let output = run_through("setpriv --bounding-set=-sys_admin", &arguments);
        assert_denied(&output, 1, &["Operation not permitted", "CAP_SYS_ADMIN"]);
        place.assert_nothing_is_left(&before);

        let output = run_through("setpriv --bounding-set=-all,+sys_admin", &arguments);
        assert!(output.status.success(), "{output:?}");
        assert_is_manifest(&place.mount_point);
        umount(&place.mount_point);
    }
}

#[test]
fn namespace_option_needs_two_capabilities() {
    let Some(place) = Place::new() else { return };
    let mut arguments = place.arguments(&options(None)).to_vec();
    arguments.extend(["-N", "/proc/self/ns/mnt"].map(Into::into));
    for capability in ["sys_admin", "sys_chroot"] {
        let output = run_through(&format!("setpriv --bounding-set=-{capability}"), &arguments);
        assert_denied(&output, 1, &["namespace", "CAP_SYS_ADMIN and CAP_SYS_CHROOT"]);
    }
    let output = run_through("setpriv --bounding-set=-all,+sys_admin,+sys_chroot", &arguments);
    assert!(output.status.success(), "{output:?}");
    umount(&place.mount_point);
}

#[test]
fn idmap_of_other_user_needs_cap_sys_ptrace() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    let mut process = Command::new("setpriv")
        .args(UNPRIVILEGED)
        .args(["sh", "-c", "echo; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    process.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let mut options = options(None);
    options.idmap = Some(format!("/proc/{}/ns/user", process.id()).into());
    let arguments = place.arguments(&options);
    let output = run_through("setpriv --bounding-set=-all,+sys_admin", &arguments);
    assert_denied(&output, 1, &["cannot open the user namespace", "CAP_SYS_PTRACE"]);
    // The process is in the initial user namespace.
    let output = run_through("setpriv --bounding-set=-all,+sys_admin,+sys_ptrace", &arguments);
    assert_denied(&output, 1, &["cannot idmap the mount", "give another user namespace"]);
    place.assert_nothing_is_left(&before);
    drop(process.stdin.take());
    process.wait().unwrap();
}

#[test]
fn helper_with_no_new_privs_mounts() {
    let Some(place) = Place::new() else { return };
    for copy in MODES {
        let output = run_through("setpriv --no-new-privs", &place.arguments(&options(copy)));
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
fn seccomp_denial_reports_call_and_hint() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    let (process, namespace) = test_support::user_namespace();
    let mut idmapped = options(None);
    idmapped.idmap = Some(namespace.as_str().into());
    let (plain, memfd, ramfs) =
        (options(None), options(Some(MemoryKind::Memfd)), options(Some(MemoryKind::Ramfs)));
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
    for (system_call, options, expected) in cases {
        // Old container profiles, new container profiles and security modules return these errnos.
        for (errno, status, hint) in [
            (Errno::PERM, 1, "mounting needs root"),
            (Errno::NOSYS, 32, "seccomp filter"),
            (Errno::ACCESS, 1, "mounting needs root"),
        ] {
            // The check of the permission makes these calls first.
            let is_checked = [libc::SYS_fsopen, libc::SYS_fsconfig].contains(&system_call);
            let expected = match errno {
                Errno::PERM | Errno::ACCESS if is_checked => "cannot mount EROFS",
                Errno::NOSYS if system_call == libc::SYS_fsconfig => "cannot mount EROFS",
                _ => expected,
            };
            let hint = match errno {
                Errno::PERM | Errno::ACCESS if system_call == libc::SYS_mount_setattr => {
                    "run as root (CAP_SYS_ADMIN in the initial user namespace)"
                }
                _ => hint,
            };
            let arguments = place.arguments(options);
            let output = restricted(|| deny(&[system_call], errno), &arguments);
            assert_denied(&output, status, &[expected, "  hint: ", hint]);
            place.assert_nothing_is_left(&before);
        }
    }
    drop(process);
}

/// See linux/loop.h.
const LOOP_CTL_GET_FREE: u32 = 0x4c82;
const LOOP_CONFIGURE: u32 = 0x4c0a;

#[test]
fn denied_loop_device_reports_container_hint() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    for (request, expected) in [
        (LOOP_CTL_GET_FREE, "cannot find a free loop device"),
        (LOOP_CONFIGURE, "cannot attach the image to the loop device"),
    ] {
        for errno in [Errno::PERM, Errno::ACCESS] {
            let deny = || deny_argument(libc::SYS_ioctl, 1, request, errno);
            let output = restricted(deny, &place.arguments(&options(Some(MemoryKind::Memfd))));
            assert_denied(&output, 1, &["/dev/loop", expected, "a container needs both given"]);
            place.assert_nothing_is_left(&before);
        }
    }
}

/// Makes every option with a descriptor fail with this errno.
fn deny_descriptors(errno: Errno) {
    const FSCONFIG_SET_FD: u32 = 5;
    deny_argument(libc::SYS_fsconfig, 1, FSCONFIG_SET_FD, errno);
}

/// Container profiles deny calls with EPERM without CAP_SYS_ADMIN. For sealmount, EPERM never means
/// that the kernel does not support a method.
#[test]
fn denied_call_never_uses_a_fallback() {
    let Some(place) = Place::new() else { return };
    let methods_with = |errno| {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                deny_descriptors(errno);
                let options = options(Some(MemoryKind::Memfd));
                let (result, events) = mount_and_events(&options, &place.image);
                let methods = events.into_iter().filter_map(|event| match event {
                    Event::MethodUsed { method, .. } => Some(method),
                    _ => None,
                });
                (result.map(drop), methods.collect::<Vec<_>>())
            });
            thread.join().unwrap()
        })
    };
    // Linux < 6.13
    let (result, methods) = methods_with(Errno::BADF);
    result.unwrap();
    assert_eq!(
        methods,
        [Method::Source(SourceMethod::LoopDevice), Method::Layers(LayerMethod::Paths)]
    );
    for errno in [Errno::PERM, Errno::ACCESS] {
        let (result, methods) = methods_with(errno);
        let error = result.unwrap_err();
        let Some(kernel) = error.kernel() else { panic!("{error}") };
        assert_eq!(kernel.operation(), Operation::SetOption);
        assert_eq!(kernel.raw_os_error(), errno.raw_os_error());
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert_eq!(methods, [Method::Source(SourceMethod::LoopDevice)]);
    }
    assert_no_loop_device(place.image.to_str().unwrap());
}

#[test]
fn security_module_denial_reports_hint() {
    let Some(place) = Place::new() else { return };
    let before = mounts();
    for copy in MODES {
        let output = restricted(restrict_by_landlock, &place.arguments(&options(copy)));
        assert_denied(
            &output,
            1,
            &["Operation not permitted", "a security module denied the call"],
        );
        place.assert_nothing_is_left(&before);
    }
}

#[test]
fn hostile_environment_leaves_result_unchanged() {
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
        // The number of the free loop device depends on other processes.
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
    // The private namespace of older kernels needs a thread, so the test covers both.
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
                            deny_descriptors(Errno::BADF);
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

/// Returns every file of a directory with its content, without the unit tests.
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
fn source_code_uses_no_environment_or_programs() {
    let sources = [sources("src"), sources("sys/src")].concat();
    assert!(sources.len() > 20);
    for (path, code) in sources {
        for text in ["env::var", "temp_dir", "home_dir", "getenv", "process::Command", "execve"] {
            assert!(!code.contains(text), "{}: {text}", path.display());
        }
    }
}

/// `cap_sys_admin+ep` in the format of capabilities(7): VFS_CAP_REVISION_2 and the effective bit, then
/// the lower halves of the permitted and inheritable sets, and the upper halves.
const CAP_SYS_ADMIN_EP: [u8; 20] = {
    let mut bytes = [0; 20];
    (bytes[0], bytes[3]) = (1, 2);
    // Bit 21.
    bytes[6] = 1 << 5;
    bytes
};

/// Puts the helper, an image and a mount point into /tmp, where every user can reach them. Other users
/// may not be able to reach the source tree, or the tree may be below /tmp.
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

/// Runs the helper in /tmp as another user.
fn call_as(user: &[&str], [helper, image, mount_point]: [&Path; 3]) -> Output {
    Command::new("setpriv")
        .args(user)
        .args([helper, image, mount_point])
        // A ramfs needs no loop device, whose node has permissions of its own.
        .args(["-o", "basedir=/tmp,copy=ramfs"])
        .output()
        .unwrap()
}

const UNPRIVILEGED: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];

#[test]
fn setuid_or_setcap_helper_rejects_non_root() {
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
        let output = call_as(&UNPRIVILEGED, paths);
        assert_denied(&output, 1, &["cannot serve this user", "set-user-ID", "only root"]);
        assert!(mount_at(mount_point).is_none());
        // Root has the privileges without these bits too.
        let output = call_as(&["--clear-groups"], paths);
        assert!(output.status.success(), "{mode:o}: {output:?}");
        umount(mount_point);
    }
    // Without these bits, the helper passes the check and fails later, so the bits caused the
    // rejection.
    install(0o755, None);
    assert_denied(&call_as(&UNPRIVILEGED, paths), 1, &["mounting needs root"]);
}

#[test]
fn non_root_caller_with_capability_mounts() {
    let Some((_sandbox, paths)) = public() else { return };
    // A service manager gives a capability to a service in the same way.
    let ambient = ["--inh-caps=+sys_admin", "--ambient-caps=+sys_admin"];
    let output = call_as(&[UNPRIVILEGED.as_slice(), &ambient].concat(), paths);
    assert!(output.status.success(), "{output:?}");
    umount(paths[2]);
}
