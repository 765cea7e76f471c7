//! What the helper is asked for, and on what kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::errno::Errno;
use nix::libc;
use sealmount::{Algorithm, compute_digest};
use test_support::tracer::{Action, Call};
use test_support::{Sandbox, V1, V2, large_image, sandbox, user_namespace};

/// A way to call the helper.
pub struct Scenario {
    pub name: &'static str,
    pub arguments: fn(&Place) -> Vec<String>,
    /// What another kernel, or file system, would answer.
    pub kernel: Option<fn(&Call) -> Action>,
    pub outcome: Expected,
}

impl Scenario {
    /// What becomes of a call that is not made to fail.
    pub fn answer(&self, call: &Call) -> Action {
        self.kernel.map_or(Action::Proceed, |kernel| kernel(call))
    }
}

/// What comes of it where nothing fails.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// The tree of the manifest.
    Mount,
    /// The same with all owners moved up.
    Idmapped,
    /// With `verity=require`. The objects do not really have fs-verity: only small files can be read.
    Verity,
    /// The same, of an image whose digest is another than the one that was asked for: it is the
    /// kernel alone that vouches for it, so where it is not asked, or does not answer, nothing is
    /// mounted.
    Vouched,
    /// With as much of it as the kernel says to have.
    TryVerity,
    /// Refused, whatever else fails.
    Refusal,
}

/// Where a scenario lies.
pub struct Place {
    pub sandbox: Sandbox,
    /// What the names of its images begin with: tells its loop devices from those of others.
    pub mark: String,
    /// Holds the user namespace of `idmap=`.
    pub namespace: Option<(Child, String)>,
}

impl Place {
    pub fn new(scenario: &Scenario) -> Option<Place> {
        let sandbox = sandbox!()?;
        for directory in ["mnt", "upper", "work", "empty"] {
            sandbox.directory(directory);
        }
        let mark = format!("{}-{}", scenario.name.replace([' ', '/'], "-"), std::process::id());
        let namespace = (scenario.outcome == Expected::Idmapped).then(user_namespace);
        Some(Place { sandbox, mark, namespace })
    }

    pub fn mount_point(&self) -> PathBuf {
        self.sandbox.path("mnt")
    }

    fn path(&self, name: &str) -> String {
        self.sandbox.path(name).to_str().unwrap().to_owned()
    }

    /// The operands, with an image of this content, and the options.
    fn call(&self, image: &[u8], options: &str) -> Vec<String> {
        let image = self.sandbox.file(&format!("{}.cfs", self.mark), image);
        let image = image.to_str().unwrap().to_owned();
        vec![image, self.path("mnt"), "-o".into(), options.into()]
    }

    fn v1(&self, options: &str) -> Vec<String> {
        let image = fs::read(V1.image()).unwrap();
        self.call(&image, &format!("basedir={},{options}", V1.objects().display()))
    }

    /// Of another image, with the same tree: what it does not have is the digest of V1.
    fn harmed(&self, options: &str) -> Vec<String> {
        let mut image = fs::read(V1.image()).unwrap();
        image[UUID] ^= 1;
        self.call(
            &image,
            &format!("basedir={},digest={}{options}", V1.objects().display(), V1.digest),
        )
    }

    /// With `noverity` and the digest.
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

    /// The V2 image through a program.
    fn compressed(&self, program: &str, options: &str) -> Vec<String> {
        let output = Command::new(program).arg("-c").arg(V2.image()).output().unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
        self.v2_verified(&output.stdout, options)
    }
}

/// Where EROFS has what nothing depends on.
const UUID: usize = 1024 + 48;

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
            let digest = compute_digest(Algorithm::Sha256, &image);
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
        outcome: Expected::Refusal,
    },
    Scenario {
        name: "wrong digest, ramfs",
        arguments: |place| {
            let image = fs::read(V2.image()).unwrap();
            let call = place.v2_verified(&image, "copy=ramfs");
            call.iter().map(|word| word.replace(V2.digest, &"0".repeat(128))).collect()
        },
        kernel: None,
        outcome: Expected::Refusal,
    },
    Scenario {
        name: "wrong digest, zstd",
        arguments: |place| {
            let call = place.compressed("zstd", "copy");
            call.iter().map(|word| word.replace(V2.digest, &"0".repeat(128))).collect()
        },
        kernel: None,
        outcome: Expected::Refusal,
    },
    Scenario {
        name: "digest by the kernel",
        arguments: |place| place.harmed(""),
        kernel: Some(with_verity),
        outcome: Expected::Vouched,
    },
    Scenario {
        name: "digest by the kernel, memfd",
        arguments: |place| place.harmed(",copy"),
        kernel: Some(with_verity),
        outcome: Expected::Vouched,
    },
    Scenario {
        name: "wrong digest by the kernel",
        arguments: |place| place.v1(&format!("digest={}", "0".repeat(64))),
        kernel: Some(with_verity),
        outcome: Expected::Refusal,
    },
    Scenario {
        name: "wrong digest by the kernel, memfd",
        arguments: |place| place.v1(&format!("copy,digest={}", "0".repeat(64))),
        kernel: Some(with_verity),
        outcome: Expected::Refusal,
    },
    Scenario {
        name: "digest by somebody, memfd",
        arguments: |place| place.harmed(",noverity,copy"),
        kernel: Some(without_attribute),
        outcome: Expected::Refusal,
    },
    Scenario {
        name: "digest by FUSE",
        arguments: |place| place.harmed(",noverity"),
        kernel: Some(with_fuse),
        outcome: Expected::Refusal,
    },
    Scenario {
        name: "digest by FUSE, memfd",
        arguments: |place| place.harmed(",noverity,copy"),
        kernel: Some(with_fuse),
        outcome: Expected::Refusal,
    },
    Scenario {
        name: "tryverity",
        arguments: |place| place.v1("tryverity"),
        kernel: Some(with_verity),
        outcome: Expected::TryVerity,
    },
    Scenario {
        name: "verity, objects without",
        arguments: |place| place.v1("verity"),
        kernel: None,
        outcome: Expected::Refusal,
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

/// fsconfig(2) with this command and key.
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

/// The file system has fs-verity, and all files of the fixture V1 have it; directories cannot.
fn with_verity(call: &Call) -> Action {
    let is_directory = || call.file(0).is_none_or(|file| file.is_dir());
    match call.number {
        libc::SYS_ioctl if call.arguments[1] == MEASURE_VERITY && is_directory() => {
            Action::Fail(Errno::ENODATA)
        }
        // struct fsverity_digest: algorithm, size, digest. That of the image; of an object it does not
        // matter which one it is.
        libc::SYS_ioctl if call.arguments[1] == MEASURE_VERITY => {
            let sealmount::Digest::Sha256(digest) = V1.digest() else { unreachable!() };
            Action::Answer(2, [&[1, 0, 32, 0][..], &digest].concat())
        }
        // struct statx, for who asks for nothing but the attributes: STATX_ATTR_VERITY.
        libc::SYS_statx if call.arguments[3] == 0 => {
            let mut statx = vec![0; 256];
            statx[8..16].copy_from_slice(&(libc::STATX_ATTR_VERITY as u64).to_le_bytes());
            Action::Answer(4, statx)
        }
        _ => Action::Proceed,
    }
}

/// Somebody answers with the digest who does not tell the attribute.
fn without_attribute(call: &Call) -> Action {
    match call.number {
        libc::SYS_statx if call.arguments[3] == 0 => Action::Answer(4, vec![0; 256]),
        _ => with_verity(call),
    }
}

/// A server of FUSE answers with the digest, and FUSE has learned to tell the attribute.
fn with_fuse(call: &Call) -> Action {
    match call.number {
        libc::SYS_fstatfs => {
            // struct statfs: the type of the file system first.
            let mut statfs = vec![0; 120];
            statfs[..8].copy_from_slice(&libc::FUSE_SUPER_MAGIC.to_le_bytes());
            Action::Answer(1, statfs)
        }
        _ => with_verity(call),
    }
}

/// Part of the question whether the kernel vouches for this file.
pub fn is_measurement(call: &Call, file: &str) -> bool {
    let is_part = match call.number {
        libc::SYS_ioctl => call.arguments[1] == MEASURE_VERITY,
        libc::SYS_statx => call.arguments[3] == 0,
        libc::SYS_fstatfs => true,
        _ => false,
    };
    is_part && call.file(0).is_some_and(|measured| measured == Path::new(file))
}

/// The kernel has no procfs.
fn without_procfs(call: &Call) -> Action {
    if call.number == libc::SYS_fsopen && call.text(0).as_deref() == Some("proc") {
        return Action::Fail(Errno::ENODEV);
    }
    let path = match call.number {
        libc::SYS_openat | libc::SYS_statx => call.text(1),
        libc::SYS_readlink => call.text(0),
        _ => None,
    };
    match path.is_some_and(|path| path.starts_with("/proc")) {
        true => Action::Fail(Errno::ENOENT),
        false => Action::Proceed,
    }
}

/// No layers by descriptor.
fn as_on_6_12(call: &Call) -> Action {
    let keys = ["lowerdir+", "datadir+", "upperdir", "workdir"];
    match keys.iter().any(|key| sets(call, FSCONFIG_SET_FD, key)) {
        true => Action::Fail(Errno::EBADF),
        false => Action::Proceed,
    }
}

/// Nor `lowerdir+`, nor EROFS from a file.
fn as_on_6_6(call: &Call) -> Action {
    let is_file =
        |call: &Call| call.text(3).is_some_and(|source| source.starts_with("thread-self/"));
    if sets(call, FSCONFIG_SET_STRING, "lowerdir+") {
        return Action::Fail(Errno::EINVAL);
    }
    if sets(call, FSCONFIG_SET_STRING, "source") && is_file(call) {
        return Action::Fail(Errno::ENOTBLK);
    }
    as_on_6_12(call)
}

/// Nor data-only layers: overlayfs does not parse its options itself.
fn as_on_6_1(call: &Call) -> Action {
    match as_on_6_6(call) {
        Action::Fail(Errno::EBADF) => Action::Fail(Errno::EOPNOTSUPP),
        action => action,
    }
}
