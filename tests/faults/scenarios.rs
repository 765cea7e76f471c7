//! The calls of the helper, and the kernels that the tracer imitates.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::errno::Errno;
use nix::libc;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use sealmount::{Algorithm, Digest};
use test_support::tracer::{Action, Call};
use test_support::{Sandbox, V1, V2, large_image, mount_composefs, sandbox, user_namespace};

/// A call of the helper.
pub struct Scenario {
    pub name: &'static str,
    pub arguments: fn(&Place) -> Vec<String>,
    /// The results of another kernel or file system.
    pub kernel: Option<fn(&Call) -> Action>,
    pub outcome: Expected,
}

impl Scenario {
    /// Returns the action for a call without a fault.
    pub fn answer(&self, call: &Call) -> Action {
        self.kernel.map_or(Action::Proceed, |kernel| kernel(call))
    }
}

/// The outcome of a run without a fault.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// A mount of the tree of the manifest.
    Mount,
    /// A mount of the tree of the manifest, with all owners moved up.
    Idmapped,
    /// A mount of the tree with `verity=require`. The objects have no fs-verity, so only small files
    /// can be read.
    Verity,
    /// A mount of the tree with `verity=require`, from an image with another digest. Only the imitated
    /// kernel measures the expected digest. If sealmount does not measure the image, or the measurement
    /// fails, sealmount must mount nothing.
    Measured,
    /// A mount of the tree, with `verity=require` if the kernel reports support for verity.
    TryVerity,
    /// New flags for a mount that exists before the run.
    Remount,
    /// No mount, with or without a fault.
    Failure,
}

/// The directory and the namespaces of a scenario.
pub struct Place {
    pub sandbox: Sandbox,
    /// The start of the names of the images, which identifies the loop devices of the scenario.
    pub mark: String,
    /// Holds the user namespace of `idmap=`.
    pub namespace: Option<(Child, String)>,
    /// The V1 image in a sealed memfd.
    sealed: File,
}

impl Place {
    pub fn new(scenario: &Scenario) -> Option<Place> {
        let sandbox = sandbox!()?;
        for directory in ["mnt", "upper", "work", "empty"] {
            sandbox.directory(directory);
        }
        let mark = format!("{}-{}", scenario.name.replace([' ', '/'], "-"), std::process::id());
        let namespace = (scenario.outcome == Expected::Idmapped).then(user_namespace);
        let sealed = sealed_memfd(&mark, &fs::read(V1.image()).unwrap());
        Some(Place { sandbox, mark, namespace, sealed })
    }

    pub fn mount_point(&self) -> PathBuf {
        self.sandbox.path("mnt")
    }

    /// Mounts for a remount. The options have a record.
    pub fn mount(&self) {
        let layers = format!("upperdir={},workdir={}", self.path("upper"), self.path("work"));
        let arguments = self.v1_verified(&format!("copy,noexec,{layers}"));
        let output = mount_composefs!(arguments);
        assert!(output.status.success(), "{output:?}");
    }

    fn path(&self, name: &str) -> String {
        self.sandbox.path(name).to_str().unwrap().to_owned()
    }

    /// Returns the operands, with an image of this content, and the options.
    fn call(&self, image: &[u8], options: &str) -> Vec<String> {
        let image = self.sandbox.file(&format!("{}.cfs", self.mark), image);
        let image = image.to_str().unwrap().to_owned();
        vec![image, self.path("mnt"), "-o".into(), options.into()]
    }

    fn v1(&self, options: &str) -> Vec<String> {
        let image = fs::read(V1.image()).unwrap();
        self.call(&image, &format!("basedir={},{options}", V1.objects().display()))
    }

    /// Returns a call with a changed image that has the tree of V1 and another digest.
    fn v1_changed(&self, options: &str) -> Vec<String> {
        let mut image = fs::read(V1.image()).unwrap();
        image[UUID] ^= 1;
        self.call(
            &image,
            &format!("basedir={},digest={}{options}", V1.objects().display(), V1.digest),
        )
    }

    /// Returns a call with `noverity` and the digest.
    fn v1_verified(&self, options: &str) -> Vec<String> {
        self.v1(&format!("noverity,digest={},{options}", V1.digest))
    }

    fn v2_verified(&self, image: &[u8], options: &str) -> Vec<String> {
        let basedir = V2.objects();
        let digest = V2.digest;
        self.call(
            image,
            &format!("basedir={},noverity,digest={digest},{options}", basedir.display()),
        )
    }

    /// Returns a call with the V1 image in a sealed memfd.
    fn v1_sealed(&self, options: &str) -> Vec<String> {
        let mut arguments = self.v1_verified(options);
        arguments[0] = format!("/proc/{}/fd/{}", std::process::id(), self.sealed.as_raw_fd());
        arguments
    }

    /// Returns a call with the V2 image, compressed by a program.
    fn compressed(&self, program: &str, options: &str) -> Vec<String> {
        let output = Command::new(program).arg("-c").arg(V2.image()).output().unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
        self.v2_verified(&output.stdout, options)
    }
}

fn sealed_memfd(name: &str, content: &[u8]) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut memfd = File::from(memfd_create(name, flags).unwrap());
    memfd.write_all(content).unwrap();
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK;
    fcntl_add_seals(&memfd, seals).unwrap();
    memfd
}

/// The UUID of EROFS, which does not affect the tree.
const UUID: usize = 1024 + 48;

/// The scenarios of `tests/run ci`. Other scenarios make almost the same calls.
pub const REST: &[&str] = &[
    "zstd, memfd",
    "gzip, memfd",
    "verbose, namespace",
    "xz, ramfs",
    "wrong digest, zstd",
    "wrong digest, ramfs",
    "wrong digest by the kernel, memfd",
    "digest by the kernel, memfd",
    "digest not in statx, memfd",
    "digest by FUSE, memfd",
    "tryverity",
    "check=content",
    "as on 6.6, upper layer",
    "as on 6.12, verity",
];

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "plain",
        arguments: |place| {
            let basedirs = format!("{}:{}", place.path("empty"), V1.objects().display());
            place.call(&fs::read(V1.image()).unwrap(), &format!("basedir={basedirs},nosuid"))
        },
        kernel: None,
        outcome: Expected::Mount,
    },
    Scenario {
        name: "memfd",
        arguments: |place| place.v1_verified("copy"),
        kernel: None,
        outcome: Expected::Mount,
    },
    Scenario {
        name: "memfd in threads",
        arguments: |place| {
            let image = large_image((1 << 20) + 4096);
            let digest = Digest::of_bytes(Algorithm::Sha256, &image);
            let basedir = V1.objects();
            let basedir = basedir.display();
            place.call(&image, &format!("basedir={basedir},copy,noverity,digest={digest}"))
        },
        kernel: None,
        outcome: Expected::Mount,
    },
    Scenario {
        name: "ramfs",
        arguments: |place| place.v1_verified("copy=ramfs"),
        kernel: None,
        outcome: Expected::Mount,
    },
    Scenario {
        name: "sealed memfd as image",
        arguments: |place| place.v1_sealed("copy"),
        kernel: None,
        outcome: Expected::Mount,
    },
    Scenario {
        name: "zstd, memfd",
        arguments: |place| place.compressed("zstd", "copy"),
        kernel: None,
        outcome: Expected::Mount,
    },
    Scenario {
        name: "xz, ramfs",
        arguments: |place| place.compressed("xz", "copy=ramfs"),
        kernel: None,
        outcome: Expected::Mount,
    },
    Scenario {
        name: "gzip, memfd",
        arguments: |place| place.compressed("gzip", "copy"),
        kernel: None,
        outcome: Expected::Mount,
    },
    Scenario {
        name: "upper layer",
        arguments: |place| {
            place.v1(&format!("upperdir={},workdir={}", place.path("upper"), place.path("work")))
        },
        kernel: None,
        outcome: Expected::Mount,
    },
    Scenario {
        name: "remount",
        arguments: |place| {
            let options = "remount,ro,nosuid,noatime,sync";
            place.v1(&format!("{options},upperdir={}", place.path("upper")))
        },
        kernel: None,
        outcome: Expected::Remount,
    },
    Scenario {
        name: "remount with a record",
        arguments: |place| place.v1_verified("remount,copy,nosuid"),
        kernel: None,
        outcome: Expected::Remount,
    },
    Scenario {
        name: "idmap",
        arguments: |place| {
            let (_, namespace) = place.namespace.as_ref().unwrap();
            place.v1(&format!("idmap={namespace}"))
        },
        kernel: None,
        outcome: Expected::Idmapped,
    },
    Scenario {
        name: "verbose, namespace",
        arguments: |place| {
            let more = ["-v".into(), "-N".into(), "/proc/self/ns/mnt".into()];
            [place.v1_verified("copy=ramfs"), more.into()].concat()
        },
        kernel: None,
        outcome: Expected::Mount,
    },
    Scenario {
        name: "wrong digest",
        arguments: |place| place.v1(&format!("copy,noverity,digest={}", "0".repeat(64))),
        kernel: None,
        outcome: Expected::Failure,
    },
    Scenario {
        name: "wrong digest, ramfs",
        arguments: |place| {
            let image = fs::read(V2.image()).unwrap();
            let call = place.v2_verified(&image, "copy=ramfs");
            call.iter().map(|word| word.replace(V2.digest, &"0".repeat(128))).collect()
        },
        kernel: None,
        outcome: Expected::Failure,
    },
    Scenario {
        name: "wrong digest, zstd",
        arguments: |place| {
            let call = place.compressed("zstd", "copy");
            call.iter().map(|word| word.replace(V2.digest, &"0".repeat(128))).collect()
        },
        kernel: None,
        outcome: Expected::Failure,
    },
    Scenario {
        name: "digest by the kernel",
        arguments: |place| place.v1_changed(""),
        kernel: Some(with_verity),
        outcome: Expected::Measured,
    },
    Scenario {
        name: "digest by the kernel, memfd",
        arguments: |place| place.v1_changed(",copy"),
        kernel: Some(with_verity),
        outcome: Expected::Measured,
    },
    Scenario {
        name: "wrong digest by the kernel",
        arguments: |place| place.v1(&format!("digest={}", "0".repeat(64))),
        kernel: Some(with_verity),
        outcome: Expected::Failure,
    },
    Scenario {
        name: "wrong digest by the kernel, memfd",
        arguments: |place| place.v1(&format!("copy,digest={}", "0".repeat(64))),
        kernel: Some(with_verity),
        outcome: Expected::Failure,
    },
    Scenario {
        name: "digest not in statx, memfd",
        arguments: |place| place.v1_changed(",noverity,copy"),
        kernel: Some(without_attribute),
        outcome: Expected::Failure,
    },
    Scenario {
        name: "digest by FUSE",
        arguments: |place| place.v1_changed(",noverity"),
        kernel: Some(with_fuse),
        outcome: Expected::Failure,
    },
    Scenario {
        name: "digest by FUSE, memfd",
        arguments: |place| place.v1_changed(",noverity,copy"),
        kernel: Some(with_fuse),
        outcome: Expected::Failure,
    },
    Scenario {
        name: "check=content",
        arguments: |place| place.v1("check=content"),
        kernel: None,
        outcome: Expected::Mount,
    },
    Scenario {
        name: "check=all, missing objects",
        arguments: |place| {
            let options = format!("basedir={},check=all", place.path("empty"));
            place.call(&fs::read(V1.image()).unwrap(), &options)
        },
        kernel: None,
        outcome: Expected::Failure,
    },
    Scenario {
        name: "tryverity",
        arguments: |place| place.v1("tryverity"),
        kernel: Some(with_verity),
        outcome: Expected::TryVerity,
    },
    Scenario {
        name: "verity, objects lack fs-verity",
        arguments: |place| place.v1("verity"),
        kernel: None,
        outcome: Expected::Failure,
    },
    Scenario {
        name: "without procfs",
        arguments: |place| place.v1_verified("copy"),
        kernel: Some(without_procfs),
        outcome: Expected::Mount,
    },
    Scenario {
        name: "as on 6.12, verity",
        arguments: |place| place.v1("verity"),
        kernel: Some(|call| match as_on_6_12(call) {
            Action::Proceed => with_verity(call),
            action => action,
        }),
        outcome: Expected::Verity,
    },
    Scenario {
        name: "as on 6.6, upper layer",
        arguments: |place| {
            place.v1(&format!("upperdir={},workdir={}", place.path("upper"), place.path("work")))
        },
        kernel: Some(as_on_6_6),
        outcome: Expected::Mount,
    },
    Scenario {
        name: "as on 6.1, V2",
        arguments: |place| place.v2_verified(&fs::read(V2.image()).unwrap(), "copy=ramfs"),
        kernel: Some(as_on_6_1),
        outcome: Expected::Mount,
    },
];

/// Returns whether a call is fsconfig(2) with this command and key.
fn sets(call: &Call, command: u64, key: &str) -> bool {
    call.number == libc::SYS_fsconfig
        && call.arguments[1] == command
        && call.text(2).as_deref() == Some(key)
}

const FSCONFIG_SET_STRING: u64 = 1;
const FSCONFIG_SET_FD: u64 = 5;
pub const FSCONFIG_CMD_CREATE: u64 = 6;

/// `FS_IOC_MEASURE_VERITY`
const MEASURE_VERITY: u64 = 0xc004_6686;

/// Imitates a file system on which all files of the fixture V1 have fs-verity. Directories cannot have
/// fs-verity.
fn with_verity(call: &Call) -> Action {
    let is_directory = || call.file(0).is_none_or(|file| file.is_dir());
    match call.number {
        libc::SYS_ioctl if call.arguments[1] == MEASURE_VERITY && is_directory() => {
            Action::Fail(Errno::ENODATA)
        }
        // struct fsverity_digest holds the algorithm, the size, and the digest of the image. For an
        // object, any digest is good enough.
        libc::SYS_ioctl if call.arguments[1] == MEASURE_VERITY => {
            let Digest::Sha256(digest) = V1.digest() else { unreachable!() };
            Action::Answer(2, [&[1, 0, 32, 0][..], &digest].concat())
        }
        // The objects have no fs-verity, so overlayfs would not open a file with an object. The tracer lets
        // the helper open a file that the image holds instead.
        libc::SYS_openat2 if call.file(0) == Some("/".into()) => match call.number_at(2) {
            Some(flags) if flags & libc::O_PATH as u64 == 0 => {
                Action::Rewrite(1, b"hello.txt\0".to_vec())
            }
            _ => Action::Proceed,
        },
        // An empty mask requests only the attributes, so struct statx holds only STATX_ATTR_VERITY.
        libc::SYS_statx if call.arguments[3] == 0 => {
            let mut statx = vec![0; 256];
            statx[8..16].copy_from_slice(&(libc::STATX_ATTR_VERITY as u64).to_le_bytes());
            Action::Answer(4, statx)
        }
        _ => Action::Proceed,
    }
}

/// Imitates a file system that returns the digest, but not the attribute.
fn without_attribute(call: &Call) -> Action {
    match call.number {
        libc::SYS_statx if call.arguments[3] == 0 => Action::Answer(4, vec![0; 256]),
        _ => with_verity(call),
    }
}

/// Imitates FUSE with a server that returns the digest, and a kernel whose FUSE returns the attribute.
fn with_fuse(call: &Call) -> Action {
    match call.number {
        libc::SYS_fstatfs => {
            // struct statfs starts with the type of the file system.
            let mut statfs = vec![0; 120];
            statfs[..8].copy_from_slice(&libc::FUSE_SUPER_MAGIC.to_le_bytes());
            Action::Answer(1, statfs)
        }
        _ => with_verity(call),
    }
}

/// Returns whether a call is part of a measurement of this file.
pub fn is_measurement(call: &Call, file: &str) -> bool {
    let is_part = match call.number {
        libc::SYS_ioctl => call.arguments[1] == MEASURE_VERITY,
        libc::SYS_statx => call.arguments[3] == 0,
        libc::SYS_fstatfs => true,
        _ => false,
    };
    is_part && call.file(0).is_some_and(|measured| measured == Path::new(file))
}

/// Imitates a kernel without procfs.
fn without_procfs(call: &Call) -> Action {
    if call.number == libc::SYS_fsopen && call.text(0).as_deref() == Some("proc") {
        return Action::Fail(Errno::ENODEV);
    }
    let path = match call.number {
        libc::SYS_openat | libc::SYS_statx | libc::SYS_readlinkat => call.text(1),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_readlink => call.text(0),
        _ => None,
    };
    match path.is_some_and(|path| path.starts_with("/proc")) {
        true => Action::Fail(Errno::ENOENT),
        false => Action::Proceed,
    }
}

/// Imitates a kernel that does not support layers by descriptor.
fn as_on_6_12(call: &Call) -> Action {
    let keys = ["lowerdir+", "datadir+", "upperdir", "workdir"];
    match keys.iter().any(|key| sets(call, FSCONFIG_SET_FD, key)) {
        true => Action::Fail(Errno::EBADF),
        false => Action::Proceed,
    }
}

/// Imitates a kernel that also lacks `lowerdir+` and EROFS from a file.
fn as_on_6_6(call: &Call) -> Action {
    // The path of a descriptor lies in a private procfs or at /proc.
    let is_file = |call: &Call| {
        let of_descriptor = ["thread-self/fd/", "/proc/self/fd/"];
        call.text(3).is_some_and(|source| of_descriptor.iter().any(|path| source.starts_with(path)))
    };
    if sets(call, FSCONFIG_SET_STRING, "lowerdir+") {
        return Action::Fail(Errno::EINVAL);
    }
    if sets(call, FSCONFIG_SET_STRING, "source") && is_file(call) {
        return Action::Fail(Errno::ENOTBLK);
    }
    as_on_6_12(call)
}

/// Imitates a kernel that also lacks data-only layers, because overlayfs does not parse its options
/// itself.
fn as_on_6_1(call: &Call) -> Action {
    match as_on_6_6(call) {
        Action::Fail(Errno::EBADF) => Action::Fail(Errno::EOPNOTSUPP),
        action => action,
    }
}
