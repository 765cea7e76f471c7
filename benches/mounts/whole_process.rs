//! The time of whole processes: this helper, other helpers, and the steps of a user without them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use test_support::V1;

use crate::bench::{Bench, Taken};
use crate::digests;
use crate::images::{Image, make_cold};
use crate::programs::Program;
use crate::report::{Report, Table};
use crate::sizes::{MIB, SIZES};
use crate::timing::{Case, alternate, whole_process};

pub const PLAIN: &str = "plain mount";
pub const PLAIN_DYNAMIC: &str = "plain mount, not static";
pub const PLAIN_MUSL: &str = "plain mount, static with musl";
pub const PLAIN_COLD: &str = "plain mount, not in the page cache";
pub const PLAIN_COMPOSEFS: &str = "composefs: mount.composefs";
pub const PLAIN_COMPOSEFS_RS: &str = "composefs-rs: mount.composefs";
pub const MEMFD: &str = "copy=memfd,digest=";
pub const MEMFD_ONE_CORE: &str = "copy=memfd,digest=, one core";
pub const MEMFD_COLD: &str = "copy=memfd,digest=, not in the page cache";
pub const RAMFS: &str = "copy=ramfs,digest=";
pub const RAMFS_COLD: &str = "copy=ramfs,digest=, not in the page cache";
pub const PIPELINE: &str = "cp to a tmpfs; fsverity digest; mount.composefs";
pub const CAT: &str = "cat to a tmpfs";
pub const DIGEST_ALONE: &str = "the digest alone, all cores";
pub const FSVERITY: &str = "fsverity digest";
pub const MEMFD_ZSTD: &str = "copy=memfd,digest= of image.cfs.zst";
pub const RAMFS_ZSTD: &str = "copy=ramfs,digest= of image.cfs.zst";
pub const ZSTD_PROGRAM: &str = "zstd -d to a tmpfs";
pub const MEMFD_XZ: &str = "copy=memfd,digest= of image.cfs.xz";
pub const RAMFS_XZ: &str = "copy=ramfs,digest= of image.cfs.xz";
pub const XZ_PROGRAM: &str = "xz -d to a tmpfs";

const ALL: [&str; 21] = [
    PLAIN,
    PLAIN_DYNAMIC,
    PLAIN_MUSL,
    PLAIN_COLD,
    PLAIN_COMPOSEFS,
    PLAIN_COMPOSEFS_RS,
    MEMFD,
    MEMFD_ONE_CORE,
    MEMFD_COLD,
    RAMFS,
    RAMFS_COLD,
    PIPELINE,
    CAT,
    DIGEST_ALONE,
    FSVERITY,
    MEMFD_ZSTD,
    RAMFS_ZSTD,
    ZSTD_PROGRAM,
    MEMFD_XZ,
    RAMFS_XZ,
    XZ_PROGRAM,
];

/// The two sizes that are measured in the same rounds, to see whether a byte of the larger takes longer.
pub const GROWTH: [usize; 2] = [100 * MIB, 1024 * MIB];
pub const GROWTH_GROUP: &str = "ms, both sizes in the same rounds";
const GROWTH_ROUNDS: usize = 11;

pub fn group(size: usize) -> String {
    format!("ms, {} MB", size / MIB)
}

/// Measures the cases of each comparison in turns.
pub fn measure(bench: &Bench, image: &Image, report: &mut Report) {
    for (name, effort, cases) in [
        ("plain", bench.effort, plain(bench, image, report)),
        ("copies", bench.effort, copies(bench, image, report)),
        ("not in the page cache", bench.effort, cold(bench, image)),
        ("zstd", bench.effort, zstd(bench, image, report)),
        ("xz", bench.effort.for_slow(), xz(bench, image, report)),
    ] {
        println!("    {name}…");
        report.add(&group(image.size), alternate(effort, cases));
    }
}

pub fn of_size(name: &str, size: usize) -> String {
    format!("{name}, {} MB", size / MIB)
}

pub fn measure_growth(bench: &Bench, images: &[Image], report: &mut Report) {
    if !GROWTH.iter().all(|size| images.iter().any(|image| image.size == *size)) {
        return;
    }
    println!("time by size…");
    let images = images.iter().filter(|image| GROWTH.contains(&image.size));
    let cases = images.flat_map(|image| {
        let name = |name| of_size(name, image.size);
        [
            copying(bench, &name(MEMFD), "memfd", image, &image.path),
            copying(bench, &name(RAMFS), "ramfs", image, &image.path),
            cat(bench, &name(CAT), image),
        ]
    });
    let effort = bench.effort.at_least(GROWTH_ROUNDS);
    report.add(GROWTH_GROUP, alternate(effort, cases.collect()));
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
    let programs = &bench.programs;
    [
        (PLAIN, Some(&programs.helper)),
        (PLAIN_DYNAMIC, Some(&programs.dynamic_helper)),
        (PLAIN_MUSL, programs.musl_helper.as_ref()),
        (PLAIN_COMPOSEFS, programs.composefs.as_ref()),
        (PLAIN_COMPOSEFS_RS, programs.composefs_rs.as_ref()),
    ]
    .into_iter()
    .filter_map(|(name, program)| {
        let Some(program) = program else {
            report.skip(format!("{name}: not here"));
            return None;
        };
        Some(mounting(bench, name, program, plain_options(), &image.path, None))
    })
    .collect()
}

fn copies<'a>(bench: &'a Bench, image: &'a Image, report: &mut Report) -> Vec<Case<'a>> {
    let programs = &bench.programs;
    let mut cases = vec![
        copying(bench, MEMFD, "memfd", image, &image.path),
        copying(bench, RAMFS, "ramfs", image, &image.path),
        cat(bench, CAT, image),
        Case::new(DIGEST_ALONE, || {
            let mut this = Command::new(std::env::current_exe().unwrap());
            this.arg(digests::COMMAND).arg(&image.path).arg(image.digest.to_string());
            whole_process(&mut this)
        }),
    ];
    match &programs.taskset {
        None => report.skip(format!("{MEMFD_ONE_CORE}: no taskset")),
        Some(taskset) => {
            let mut case = copying(bench, MEMFD_ONE_CORE, "memfd", image, &image.path);
            cases.push(Case::new(MEMFD_ONE_CORE, move || on_one_core(taskset, &mut case.run)));
        }
    }
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

/// The cases that read the image from the disk.
fn cold<'a>(bench: &'a Bench, image: &'a Image) -> Vec<Case<'a>> {
    let kinds = [(PLAIN_COLD, None), (MEMFD_COLD, Some("memfd")), (RAMFS_COLD, Some("ramfs"))];
    let case = |(name, kind): (&str, Option<&'static str>)| {
        let options = kind.map_or_else(plain_options, |kind| copy_options(image, kind));
        Case::new(name, move || {
            let copy = kind.map(|kind| Taken::by_copy(kind, image.size));
            let memory = Some(Taken::PageCache(image.size)).into_iter().chain(copy);
            bench.with_memory(&memory.collect::<Vec<_>>(), || {
                make_cold(&image.path);
                let time = bench.mount(&bench.programs.helper, &options, &image.path);
                bench.unmount();
                time
            })
        })
    };
    kinds.map(case).into()
}

fn zstd<'a>(bench: &'a Bench, image: &'a Image, report: &mut Report) -> Vec<Case<'a>> {
    let names = [MEMFD_ZSTD, RAMFS_ZSTD, ZSTD_PROGRAM];
    compressed(bench, image, names, &bench.programs.zstd, &image.zstd, report)
}

fn xz<'a>(bench: &'a Bench, image: &'a Image, report: &mut Report) -> Vec<Case<'a>> {
    let names = [MEMFD_XZ, RAMFS_XZ, XZ_PROGRAM];
    compressed(bench, image, names, &bench.programs.xz, &image.xz, report)
}

fn compressed<'a>(
    bench: &'a Bench,
    image: &'a Image,
    [memfd, ramfs, program_name]: [&str; 3],
    program: &'a Option<Program>,
    file: &'a Option<PathBuf>,
    report: &mut Report,
) -> Vec<Case<'a>> {
    let (Some(program), Some(file)) = (program, file) else {
        report.skip(format!("{memfd}: the program that makes one is not here"));
        return Vec::new();
    };
    vec![
        copying(bench, memfd, "memfd", image, file),
        copying(bench, ramfs, "ramfs", image, file),
        Case::new(program_name, move || {
            into_tmpfs(bench, program.command().arg("-dc").arg(file), image.size)
        }),
    ]
}

/// Returns the options of a copy. Objects are not verified.
pub fn copy_options(image: &Image, kind: &str) -> String {
    format!("copy={kind},digest={},noverity,basedir={}", image.digest, V1.objects().display())
}

fn plain_options() -> String {
    format!("basedir={}", V1.objects().display())
}

/// Copies an image from `file`, which may be compressed.
fn copying<'a>(
    bench: &'a Bench,
    name: &str,
    kind: &str,
    image: &Image,
    file: &'a Path,
) -> Case<'a> {
    let memory = Taken::by_copy(kind, image.size);
    let options = copy_options(image, kind);
    mounting(bench, name, &bench.programs.helper, options, file, Some(memory))
}

fn mounting<'a>(
    bench: &'a Bench,
    name: &str,
    program: &'a Program,
    options: String,
    file: &'a Path,
    memory: Option<Taken>,
) -> Case<'a> {
    Case::new(name, move || {
        bench.with_memory(memory.as_slice(), || {
            let time = bench.mount(program, &options, file);
            bench.unmount();
            time
        })
    })
}

fn cat<'a>(bench: &'a Bench, name: &str, image: &'a Image) -> Case<'a> {
    Case::new(name, || into_tmpfs(bench, Command::new("cat").arg(&image.path), image.size))
}

/// Writes the output of a program to a new file in a tmpfs.
fn into_tmpfs(bench: &Bench, command: &mut Command, size: usize) -> f64 {
    bench.with_memory(&[Taken::PageCache(size)], || {
        let file = bench.tmpfs.join("image.cfs");
        let time = whole_process(command.stdout(File::create(&file).unwrap()));
        fs::remove_file(file).unwrap();
        time
    })
}

/// Gives one core to the processes that `run` starts.
fn on_one_core(taskset: &Program, run: &mut dyn FnMut() -> f64) -> f64 {
    // This is the main thread.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let all = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    let one = all.trim().split([',', '-']).next().unwrap();
    let allow = |cores: &str| {
        let mut command = taskset.command();
        command.args(["--cpu-list", "--pid", cores.trim(), &std::process::id().to_string()]);
        whole_process(command.stdout(Stdio::null()));
    };
    allow(one);
    let time = run();
    allow(all);
    time
}

fn fsverity_digest(fsverity: &Program, image: &Path) -> f64 {
    whole_process(fsverity.command().arg("digest").arg(image).stdout(Stdio::null()))
}

/// The steps of a user today to mount a verified copy: three programs, without the time of a shell.
fn pipeline(bench: &Bench, fsverity: &Program, composefs: &Program, image: &Image) -> f64 {
    let copy = bench.tmpfs.join("image.cfs");
    bench.with_memory(&[Taken::PageCache(image.size)], || {
        let time = whole_process(Command::new("cp").arg(&image.path).arg(&copy))
            + fsverity_digest(fsverity, &copy)
            + bench.mount(composefs, &plain_options(), &copy);
        fs::remove_file(&copy).unwrap();
        bench.unmount();
        time
    })
}
