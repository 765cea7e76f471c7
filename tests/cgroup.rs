//! Copies in a cgroup with a limit: a copy that the cgroup cannot hold is an error, not a signal.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use test_support::{Sandbox, V1, assert_is_manifest, large_image, run, sandbox, through, umount};

const MIB: usize = 1 << 20;
const IMAGE: usize = 70 * MIB;

/// A new cgroup below the cgroup of this process, in the hierarchy with the memory controller.
struct Cgroup {
    /// The path, as /proc/self/cgroup has it.
    path: PathBuf,
    directory: PathBuf,
    limit_file: &'static str,
}

impl Cgroup {
    fn new(sandbox: &Sandbox, name: &str) -> Cgroup {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let v1 = own.lines().find_map(|line| line.split_once(":memory:"));
        let root = sandbox.directory(&format!("root of {name}"));
        let (parent, limit_file) = match v1 {
            Some((_, path)) => {
                mount("cgroup", &root, "cgroup", MountFlags::empty(), Some(c"memory")).unwrap();
                (PathBuf::from(path), "memory.limit_in_bytes")
            }
            // In v2, only the root can have processes and children with a controller. A mount of cgroup2
            // would change the options of the hierarchy.
            None => {
                mount_bind("/sys/fs/cgroup", &root).unwrap();
                fs::write(root.join("cgroup.subtree_control"), "+memory").unwrap();
                (PathBuf::from("/"), "memory.max")
            }
        };
        let path = parent.join(format!("sealmount-{name}-{}", std::process::id()));
        let directory = root.join(path.strip_prefix("/").unwrap());
        fs::create_dir(&directory).unwrap();
        Cgroup { path, directory, limit_file }
    }

    /// Makes a cgroup below this one.
    fn child(&self) -> Cgroup {
        if self.limit_file == "memory.max" {
            fs::write(self.directory.join("cgroup.subtree_control"), "+memory").unwrap();
        }
        let (path, directory) = (self.path.join("child"), self.directory.join("child"));
        fs::create_dir(&directory).unwrap();
        Cgroup { path, directory, limit_file: self.limit_file }
    }

    fn set_limit(&self, bytes: usize) {
        fs::write(self.directory.join(self.limit_file), bytes.to_string()).unwrap();
    }

    /// Runs a shell script in the cgroup, with arguments.
    fn run(&self, script: &str, arguments: &[&Path]) -> Output {
        let procs = self.directory.join("cgroup.procs");
        let script = format!("echo $$ >\"$0\" && {script}");
        Command::new("sh").args(["-c", &script]).arg(procs).args(arguments).output().unwrap()
    }

    /// Runs the helper in the cgroup.
    fn mount(&self, image: &Path, mount_point: &Path, options: &str) -> Output {
        let helper = Path::new(env!("CARGO_BIN_EXE_mount-composefs"));
        let options = format!("{options},basedir={}", V1.objects().display());
        let script = "exec \"$@\"";
        self.run(script, &[helper, image, mount_point, "-o".as_ref(), options.as_ref()])
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.directory);
    }
}

fn assert_rejected(output: &Output, cgroup: &Cgroup, limit: usize) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    for text in [
        format!("cannot copy the image: the image has {IMAGE} bytes, and the cgroup"),
        format!("the cgroup {} has ", cgroup.path.display()),
        format!(" bytes of memory available, with a limit of {limit} bytes\n"),
        "MemoryMax=".to_owned(),
    ] {
        assert!(message.contains(&text), "{text}: {message}");
    }
}

fn assert_mounts(output: &Output, mount_point: &Path) {
    assert!(output.status.success(), "{output:?}");
    assert_is_manifest(mount_point);
    umount(mount_point);
}

#[test]
fn copy_above_cgroup_limit_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let image = sandbox.file("image", &large_image(IMAGE));
    let outer = Cgroup::new(&sandbox, "limit");
    let inner = outer.child();
    for copy in ["copy", "copy=ramfs"] {
        inner.set_limit(25 * MIB);
        outer.set_limit(200 * MIB);
        assert_rejected(&inner.mount(&image, &mount_point, copy), &inner, 25 * MIB);
        // The limit of an ancestor counts too.
        outer.set_limit(24 * MIB);
        inner.set_limit(200 * MIB);
        assert_rejected(&inner.mount(&image, &mount_point, copy), &outer, 24 * MIB);
        outer.set_limit(200 * MIB);
        assert_mounts(&inner.mount(&image, &mount_point, copy), &mount_point);
    }
    // Without a copy, the limit has no effect.
    inner.set_limit(25 * MIB);
    assert_mounts(&inner.mount(&image, &mount_point, "ro"), &mount_point);
}

/// Mounts a compressed image in cgroups with these limits, in MiB. Each mount must work or be rejected. Returns
/// the exit statuses.
fn statuses_with_limits(sandbox: &Sandbox, compressed: &[u8], limits: &[usize]) -> Vec<i32> {
    let mount_point = sandbox.directory("mnt");
    let image = sandbox.file("image", compressed);
    let cgroup = Cgroup::new(sandbox, "decoder");
    let status = |limit: &usize| {
        cgroup.set_limit(limit * MIB);
        let output = cgroup.mount(&image, &mount_point, "copy");
        let message = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => umount(&mount_point),
            Some(2) => {
                assert!(message.contains(" bytes, its decoder needs "), "{limit}: {message}")
            }
            _ => panic!("{limit} MiB: {output:?}"),
        }
        output.status.code().unwrap()
    };
    limits.iter().map(status).collect()
}

/// The window of the first frame is in the header of the file. The window of a later frame is known only when
/// the decoder arrives there.
#[test]
fn decoder_above_cgroup_limit_is_rejected() {
    const LIMITS: [usize; 8] = [5, 11, 12, 14, 16, 18, 30, 60];
    let image = large_image(10 * MIB);
    let zstd = |window: &'static str, part: &[u8]| through(&["zstd", "-q", window, "-c"], part);
    let (start, rest) = image.split_at(MIB);
    let zstd_8_mib = zstd("--zstd=wlog=23", &image);
    let larger_later = [zstd("--zstd=wlog=17", start), zstd("--zstd=wlog=24", rest)].concat();
    for compressed in [zstd_8_mib, larger_later] {
        let Some(sandbox) = sandbox!() else { return };
        let statuses = statuses_with_limits(&sandbox, &compressed, &LIMITS);
        assert_eq!(statuses, [2, 2, 2, 2, 2, 2, 0, 0]);
    }
    let Some(sandbox) = sandbox!() else { return };
    let gzip = through(&["gzip", "-c"], &image);
    assert_eq!(statuses_with_limits(&sandbox, &gzip, &LIMITS), [2, 2, 2, 2, 0, 0, 0, 0]);
}

#[test]
fn xz_dictionary_above_cgroup_limit_is_rejected() {
    let Some(sandbox) = sandbox!() else { return };
    // The dictionary of 64 MiB is filled only as far as the image is large.
    let compressed = through(&["xz", "-9", "-T1", "-c"], &large_image(15 * MIB));
    let statuses = statuses_with_limits(&sandbox, &compressed, &[5, 16, 18, 24, 30, 60]);
    assert_eq!(statuses, [2, 2, 2, 2, 2, 0]);
}

/// The kernel reclaims the page cache, so the page cache counts as available. Files in memory do not count.
#[test]
fn page_cache_of_cgroup_counts_as_available() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let image = sandbox.file("image", &large_image(IMAGE));
    // A file of this file system is in the page cache after a read, and can be dropped.
    let cached = sandbox.file("cached", &vec![1; 90 * MIB]);
    File::open(&cached).unwrap().sync_all().unwrap();
    rustix::fs::fadvise(File::open(&cached).unwrap(), 0, None, rustix::fs::Advice::DontNeed)
        .unwrap();
    let cgroup = Cgroup::new(&sandbox, "cache");
    cgroup.set_limit(150 * MIB);
    let read = cgroup.run("exec cat \"$1\" >/dev/null", &[&cached]);
    assert!(read.status.success(), "{read:?}");
    assert_mounts(&cgroup.mount(&image, &mount_point, "copy"), &mount_point);

    let memory = sandbox.tmpfs("memory").join("file");
    let write = cgroup.run("head -c 100M /dev/zero >\"$1\"", &[&memory]);
    assert!(write.status.success(), "{write:?}");
    assert_rejected(&cgroup.mount(&image, &mount_point, "copy"), &cgroup, 150 * MIB);
}

/// A mount on /sys/fs/cgroup, or on a cgroup, may hide a limit. The numbers of the mount are never used.
#[test]
fn forged_cgroup_files_are_not_used() {
    let Some(sandbox) = sandbox!() else { return };
    let mount_point = sandbox.directory("mnt");
    let image = sandbox.file("image", &large_image(IMAGE));
    let cgroup = Cgroup::new(&sandbox, "forged");
    let forged = sandbox.tmpfs("forged");
    let inside = forged.join(cgroup.path.strip_prefix("/").unwrap());
    fs::create_dir_all(&inside).unwrap();
    for name in ["memory.max", "memory.limit_in_bytes"] {
        fs::write(inside.join(name), "4096\n").unwrap();
    }
    for name in ["memory.current", "memory.usage_in_bytes", "memory.stat"] {
        fs::write(inside.join(name), "0\n").unwrap();
    }
    // The numbers on top of the cgroup and of the mount would reject the copy.
    for (from, on) in [(&inside, &cgroup.directory), (&forged, &PathBuf::from("/sys/fs/cgroup"))] {
        let procs =
            File::options().write(true).open(cgroup.directory.join("cgroup.procs")).unwrap();
        mount_bind(from, on).unwrap();
        let helper = env!("CARGO_BIN_EXE_mount-composefs");
        let options = format!("copy,basedir={}", V1.objects().display());
        let output = Command::new("sh")
            .args(["-c", "echo $$ && exec \"$@\"", "sh", helper])
            .args([image.as_os_str(), mount_point.as_os_str(), "-o".as_ref(), options.as_ref()])
            .stdout(procs)
            .output()
            .unwrap();
        unmount(on, UnmountFlags::DETACH).unwrap();
        assert_mounts(&output, &mount_point);
    }

    // A /proc/self/cgroup that is a FIFO, or on another file system than procfs, is not used.
    cgroup.set_limit(200 * MIB);
    let proc = sandbox.directory("proc");
    fs::create_dir(proc.join("self")).unwrap();
    run("mkfifo", [proc.join("self/cgroup")]);
    let script = "mount --bind \"$1\" /proc && shift && exec \"$@\"";
    let options = format!("copy,basedir={}", V1.objects().display());
    let arguments = [
        proc.as_path(),
        env!("CARGO_BIN_EXE_mount-composefs").as_ref(),
        &image,
        &mount_point,
        "-o".as_ref(),
        options.as_ref(),
    ];
    let output = cgroup.run(script, &arguments);
    unmount("/proc", UnmountFlags::DETACH).unwrap();
    assert_mounts(&output, &mount_point);
}
