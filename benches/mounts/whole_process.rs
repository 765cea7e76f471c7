//! The time of whole processes: this helper, others, and what a user does without it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::V1;
use crate::images::{Image, MIB, make_cold};
use crate::programs::Program;
use crate::report::{Report, Table};
use crate::timing::{Case, alternate, whole_process};
use crate::{Bench, SIZES, digests, memory};

pub const PLAIN: &str = "plain mount";
pub const PLAIN_DYNAMIC: &str = "plain mount, not static";
pub const PLAIN_COMPOSEFS: &str = "composefs: mount.composefs";
pub const PLAIN_COMPOSEFS_RS: &str = "composefs-rs: mount.composefs";
pub const MEMFD: &str = "copy=memfd,digest=";
pub const MEMFD_DYNAMIC: &str = "copy=memfd,digest=, not static";
pub const RAMFS: &str = "copy=ramfs,digest=";
pub const COLD: &str = "copy=memfd,digest=, not in the page cache";
pub const PIPELINE: &str = "cp to a tmpfs; fsverity digest; mount.composefs";
pub const CAT: &str = "cat to a tmpfs";
pub const DIGEST_ALONE: &str = "the digest alone, all cores";
pub const FSVERITY: &str = "fsverity digest";
pub const ZSTD: &str = "copy=memfd,digest= of image.cfs.zst";
pub const ZSTD_PROGRAM: &str = "zstd -d to a tmpfs";
pub const XZ: &str = "copy=memfd,digest= of image.cfs.xz";
pub const XZ_PROGRAM: &str = "xz -d to a tmpfs";

const ALL: [&str; 16] = [
    PLAIN,
    PLAIN_DYNAMIC,
    PLAIN_COMPOSEFS,
    PLAIN_COMPOSEFS_RS,
    MEMFD,
    MEMFD_DYNAMIC,
    RAMFS,
    COLD,
    PIPELINE,
    CAT,
    DIGEST_ALONE,
    FSVERITY,
    ZSTD,
    ZSTD_PROGRAM,
    XZ,
    XZ_PROGRAM,
];

pub fn group(size: usize) -> String {
    format!("ms, {} MB", size / MIB)
}

/// Measures what belongs together in turns.
pub fn measure(bench: &Bench, image: &Image, report: &mut Report) {
    for cases in [
        plain(bench, image, report),
        copies(bench, image, report),
        vec![cold(bench, image)],
        zstd(bench, image, report),
        xz(bench, image, report),
    ] {
        report.add(&group(image.size), alternate(bench.effort, cases));
    }
}

pub fn tabulate(report: &mut Report) {
    let sizes = SIZES.map(|size| format!("{} MB", size / MIB));
    let header = ["ms"].into_iter().chain(sizes.iter().map(String::as_str));
    let mut table = Table::new("whole-process", header.collect());
    for name in ALL {
        let medians = SIZES.map(|size| report.median(&group(size), name));
        if medians.iter().any(Option::is_some) {
            let cell = |median: Option<f64>| median.map_or("–".into(), |ms| format!("{ms:.1}"));
            table.row([name.to_owned()].into_iter().chain(medians.map(cell)));
        }
    }
    report.table(table);
}

fn plain<'a>(bench: &'a Bench, image: &'a Image, report: &mut Report) -> Vec<Case<'a>> {
    let options = format!("basedir={}", V1.objects().display());
    let programs = &bench.programs;
    [
        (PLAIN, Some(&programs.helper)),
        (PLAIN_DYNAMIC, Some(&programs.dynamic_helper)),
        (PLAIN_COMPOSEFS, programs.composefs.as_ref()),
        (PLAIN_COMPOSEFS_RS, programs.composefs_rs.as_ref()),
    ]
    .into_iter()
    .filter_map(|(name, program)| {
        let Some(program) = program else {
            report.skip(format!("{name}: not here"));
            return None;
        };
        Some(mounting(bench, name, program, options.clone(), &image.path))
    })
    .collect()
}

fn copies<'a>(bench: &'a Bench, image: &'a Image, report: &mut Report) -> Vec<Case<'a>> {
    let programs = &bench.programs;
    let (memfd, ramfs) = (copy_options(image, "memfd"), copy_options(image, "ramfs"));
    let mut cases = vec![
        mounting(bench, MEMFD, &programs.helper, memfd.clone(), &image.path),
        mounting(bench, MEMFD_DYNAMIC, &programs.dynamic_helper, memfd, &image.path),
        mounting(bench, RAMFS, &programs.helper, ramfs, &image.path),
        Case::new(CAT, || {
            let mut command = Command::new("cat");
            into_tmpfs(bench, command.arg(&image.path))
        }),
        Case::new(DIGEST_ALONE, || {
            let mut this = Command::new(std::env::current_exe().unwrap());
            this.arg(digests::COMMAND).arg(&image.path).arg(image.digest.to_string());
            whole_process(&mut this)
        }),
    ];
    match &programs.fsverity {
        None => report.skip(format!("{FSVERITY}: not here")),
        Some(fsverity) => {
            cases.push(Case::new(FSVERITY, || fsverity_digest(fsverity, &image.path)));
            if let Some(composefs) = &programs.composefs {
                cases.push(Case::new(PIPELINE, || pipeline(bench, fsverity, composefs, image)));
            }
        }
    }
    cases
}

/// Apart from the others, which find the image in the page cache.
fn cold<'a>(bench: &'a Bench, image: &'a Image) -> Case<'a> {
    let options = copy_options(image, "memfd");
    Case::new(COLD, move || {
        make_cold(&image.path);
        let time = bench.mount(&bench.programs.helper, &options, &image.path);
        bench.unmount();
        time
    })
}

fn zstd<'a>(bench: &'a Bench, image: &'a Image, report: &mut Report) -> Vec<Case<'a>> {
    let (program, file) = (&bench.programs.zstd, &image.zstd);
    compressed(bench, image, [ZSTD, ZSTD_PROGRAM], program.as_ref().zip(file.as_ref()), report)
}

fn xz<'a>(bench: &'a Bench, image: &'a Image, report: &mut Report) -> Vec<Case<'a>> {
    let (program, file) = (&bench.programs.xz, &image.xz);
    compressed(bench, image, [XZ, XZ_PROGRAM], program.as_ref().zip(file.as_ref()), report)
}

fn compressed<'a>(
    bench: &'a Bench,
    image: &'a Image,
    [name, program_name]: [&str; 2],
    program: Option<(&'a Program, &'a PathBuf)>,
    report: &mut Report,
) -> Vec<Case<'a>> {
    let Some((program, file)) = program else {
        report.skip(format!("{name}: the program that makes one is not here"));
        return Vec::new();
    };
    let options = copy_options(image, "memfd");
    if let Err(reason) = takes(bench, &options, file) {
        report.skip(format!("{name}: {reason}"));
        return Vec::new();
    }
    vec![
        mounting(bench, name, &bench.programs.helper, options, file),
        Case::new(program_name, move || into_tmpfs(bench, program.command().arg("-dc").arg(file))),
    ]
}

/// Whether the helper mounts this; what it says if not.
fn takes(bench: &Bench, options: &str, image: &Path) -> Result<(), String> {
    let mut helper = bench.programs.helper.command();
    let output = helper.args(["-f", "-o", options]).arg(image).arg(&bench.mnt).output().unwrap();
    memory::settle();
    let text = String::from_utf8_lossy(&output.stderr);
    let image = format!("{}", image.display());
    let reason = || text.lines().next().unwrap_or_default().replace(&image, "image");
    output.status.success().then_some(()).ok_or_else(reason)
}

/// The objects' fs-verity is not what is measured.
pub fn copy_options(image: &Image, kind: &str) -> String {
    format!("copy={kind},digest={},noverity,basedir={}", image.digest, V1.objects().display())
}

fn mounting<'a>(
    bench: &'a Bench,
    name: &str,
    program: &'a Program,
    options: String,
    image: &'a Path,
) -> Case<'a> {
    Case::new(name, move || {
        let time = bench.mount(program, &options, image);
        bench.unmount();
        time
    })
}

/// What the program prints, written to a new file in a tmpfs.
fn into_tmpfs(bench: &Bench, command: &mut Command) -> f64 {
    let file = bench.tmpfs.join("image.cfs");
    let time = whole_process(command.stdout(File::create(&file).unwrap()));
    fs::remove_file(file).unwrap();
    memory::settle();
    time
}

fn fsverity_digest(fsverity: &Program, image: &Path) -> f64 {
    whole_process(fsverity.command().arg("digest").arg(image).stdout(Stdio::null()))
}

/// What a user does today to mount from memory what was verified: three programs, without the time
/// that a shell takes.
fn pipeline(bench: &Bench, fsverity: &Program, composefs: &Program, image: &Image) -> f64 {
    let copy = bench.tmpfs.join("image.cfs");
    let options = format!("basedir={}", V1.objects().display());
    let time = whole_process(Command::new("cp").arg(&image.path).arg(&copy))
        + fsverity_digest(fsverity, &copy)
        + bench.mount(composefs, &options, &copy);
    fs::remove_file(&copy).unwrap();
    bench.unmount();
    time
}
