//! The programs that are measured. A program that is not installed is left out.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program and its first arguments. A program that is not installed may need a loader in front.
#[derive(Clone)]
pub struct Program(Vec<OsString>);

impl Program {
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.0[0]);
        command.args(&self.0[1..]);
        command
    }

    /// Returns the program that a variable names, with words separated by spaces. The program must exist.
    fn from_environment(variable: &str) -> Option<Program> {
        let words = std::env::var(variable).ok()?;
        let words: Vec<_> = words.split_whitespace().map(OsString::from).collect();
        let program = (!words.is_empty()).then_some(Program(words))?;
        assert!(program.answer("--help").is_some(), "{variable} names {:?}: no program", program.0);
        Some(program)
    }

    /// Returns the size of the program's file, in bytes.
    pub fn size(&self) -> std::io::Result<u64> {
        Ok(std::fs::metadata(&self.0[0])?.len())
    }

    /// Returns the output of the program with this argument.
    fn answer(&self, argument: &str) -> Option<String> {
        let output = self.command().arg(argument).output().ok()?;
        Some(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    }
}

pub struct Programs {
    /// The helper as README.md installs it.
    pub helper: Program,
    /// The helper of `cargo build`, which is not static.
    pub dynamic_helper: Program,
    /// `SEALMOUNT_BENCH_MUSL`: the static helper with musl.
    pub musl_helper: Option<Program>,
    /// `SEALMOUNT_BENCH_MOUNT_COMPOSEFS`, or in `PATH`: mount.composefs of composefs.
    pub composefs: Option<Program>,
    /// `SEALMOUNT_BENCH_COMPOSEFS_RS`, or in `PATH`: mount.composefs of composefs-rs.
    pub composefs_rs: Option<Program>,
    pub fsverity: Option<Program>,
    pub openssl: Option<Program>,
    pub zstd: Option<Program>,
    pub xz: Option<Program>,
    pub gzip: Option<Program>,
    pub taskset: Option<Program>,
    pub mkfs_erofs: Option<Program>,
    /// The versions that the programs print.
    pub versions: Vec<String>,
}

impl Programs {
    pub fn find() -> Programs {
        let mut versions = Vec::new();
        let mut find = |name: &str, version: &str| {
            let program = Program(vec![name.into()]);
            let answer = program.answer(version)?;
            let version = answer.split([',', '\n']).next()?.split(" (Library").next()?;
            versions.push(version.trim_start_matches(['*', ' ']).to_owned());
            Some(program)
        };
        let (fsverity, openssl) = (find("fsverity", "--version"), find("openssl", "version"));
        let (zstd, xz) = (find("zstd", "--version"), find("xz", "--version"));

        // Three programs have this name. Their help tells them apart.
        let in_path = |name: &str, of: &str| {
            let program = Program(vec![name.into()]);
            program.answer("--help")?.contains(of).then_some(program)
        };
        Programs {
            helper: Program(vec![static_helper().into()]),
            dynamic_helper: Program(vec![env!("CARGO_BIN_EXE_mount-composefs").into()]),
            musl_helper: Program::from_environment("SEALMOUNT_BENCH_MUSL"),
            composefs: Program::from_environment("SEALMOUNT_BENCH_MOUNT_COMPOSEFS")
                .or_else(|| in_path("mount.composefs", "[-t type] [-o opt")),
            composefs_rs: Program::from_environment("SEALMOUNT_BENCH_COMPOSEFS_RS")
                .or_else(|| in_path("mount.composefs", "Mount helper for composefs images")),
            fsverity,
            openssl,
            zstd,
            xz,
            gzip: in_path("gzip", "--fast"),
            taskset: in_path("taskset", "--cpu-list"),
            mkfs_erofs: in_path("mkfs.erofs", "FILE DIRECTORY")
                .or_else(|| in_path("mkfs.erofs", "FILE SOURCE")),
            versions,
        }
    }
}

/// Builds the static helper with all formats, as README.md does, and returns its path.
fn static_helper() -> PathBuf {
    println!("the static helper…");
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("static");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo
        .args(["build", "--quiet", "--release", "--locked", "--features", "helper"])
        .args(["--bin", "mount-composefs"])
        .args(["--target", &target, "--target-dir"])
        .arg(&directory)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    assert!(cargo.status().is_ok_and(|status| status.success()), "{cargo:?}");
    directory.join(target).join("release/mount-composefs")
}
