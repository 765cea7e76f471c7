//! Measures the checks of objects, against programs that read the same files.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sealmount::{Algorithm, Digest, Image};
use test_support::{ErofsImage, run};

use crate::bench::Bench;
use crate::machine;
use crate::memory::real_image;
use crate::programs::Program;
use crate::report::Report;
use crate::sizes::MIB;
use crate::timing::{Case, Random, alternate, whole_process};

/// The objects of an image, and their mean size in bytes.
const OBJECTS: usize = 20_000;
const MEAN_SIZE: usize = 50_000;

/// The files of a directory of the image.
const FILES_OF_DIRECTORY: usize = 100;

pub const GROUP_ALL: &str = "ms, check=all";
pub const CHECK: &str = "sealmount";
pub const OTHER: &str = "other program";
/// The first find(1) after a mount, for which the kernel still reads the image.
pub const FIRST: &str = "first find";

pub fn group(algorithm: Algorithm) -> String {
    format!("ms, check=content, {algorithm}")
}

pub fn measure(bench: &Bench, report: &mut Report) -> std::io::Result<()> {
    if ((OBJECTS * MEAN_SIZE * 2) as u64) > machine::available() {
        report.skip("checks of objects: too little memory".into());
        return Ok(());
    }
    println!("checks of objects…");
    match real_image(bench)? {
        Some(image) => measure_all(bench, &image, report)?,
        None => report.skip("check=all: no real image".into()),
    }
    let objects = bench.sandbox.directory("objects");
    let digests = make_objects(&objects)?;
    let images = [Algorithm::Sha256, Algorithm::Sha512].map(|algorithm| {
        let image = make_image(&digests, algorithm);
        bench.sandbox.file(&format!("{algorithm}.cfs"), &image)
    });
    match &bench.programs.fsverity {
        Some(fsverity) => {
            for (image, algorithm) in images.iter().zip([Algorithm::Sha256, Algorithm::Sha512]) {
                measure_content(bench, fsverity, (image, &objects), algorithm, report);
            }
        }
        None => report.skip("check=content: no fsverity to compare with".into()),
    }
    fs::remove_dir_all(objects)
}

/// The size and the two digests of an object.
type Object = (u64, Digest, Digest);

/// Makes objects `ab/NUMBER` with random content, of many sizes.
fn make_objects(directory: &Path) -> std::io::Result<Vec<Object>> {
    let mut random = Random::default();
    for prefix in 0..=255 {
        fs::create_dir(directory.join(format!("{prefix:02x}")))?;
    }
    (0..OBJECTS)
        .map(|number| {
            // With the sum of two numbers, few objects are very small or twice as large as the mean.
            let size = (random.next() as usize % MEAN_SIZE) + (random.next() as usize % MEAN_SIZE);
            let content: Vec<_> =
                (0..size / 8 + 9).flat_map(|_| random.next().to_le_bytes()).collect();
            File::create(directory.join(object(number)))?.write_all(&content)?;
            let [sha256, sha512] = [Algorithm::Sha256, Algorithm::Sha512]
                .map(|algorithm| Digest::of_bytes(algorithm, &content));
            Ok((content.len() as u64, sha256, sha512))
        })
        .collect()
}

fn object(number: usize) -> String {
    format!("{:02x}/{number}", number % 256)
}

fn make_image(objects: &[Object], algorithm: Algorithm) -> Vec<u8> {
    let mut image = ErofsImage::new();
    let mut directory = 0;
    for (number, (size, sha256, sha512)) in objects.iter().enumerate() {
        if number % FILES_OF_DIRECTORY == 0 {
            directory = image.directory();
            image.link(0, format!("{number}"), directory);
        }
        let metacopy = match if algorithm == Algorithm::Sha256 { sha256 } else { sha512 } {
            Digest::Sha256(digest) => [&[0, 36, 0, 1][..], digest].concat(),
            Digest::Sha512(digest) => [&[0, 68, 0, 2][..], digest].concat(),
            _ => unreachable!("composefs has two algorithms"),
        };
        let redirect = format!("/{}", object(number));
        let file = image.file(*size, Some(&metacopy), Some(redirect.as_bytes()));
        image.link(directory, format!("{number}"), file);
    }
    image.finish()
}

fn check_content(bench: &Bench, image: &Path, objects: &Path) -> f64 {
    let options = format!("basedir={},check=content", objects.display());
    let mut command = bench.programs.helper.command();
    whole_process(command.arg("-f").args(["-o", &options]).arg(image).arg(&bench.mnt))
}

/// Makes a sparse file of the right size for each object of an image.
fn make_sparse_objects(image: &Path, directory: &Path) -> std::io::Result<()> {
    let mount = || Ok::<_, sealmount::Error>(Image::open(image)?.trust()?.mount()?);
    let erofs = mount().map_err(std::io::Error::other)?;
    for object in erofs.objects() {
        let object = object.map_err(std::io::Error::other)?;
        let path = directory.join(object.object.strip_prefix("/").unwrap_or(&object.object));
        fs::create_dir_all(path.parent().expect("a path in the directory"))?;
        File::create(path)?.set_len(object.size)?;
    }
    Ok(())
}

/// Compares a mount with find(1), which reads the size of each file of a mount. The first find(1) after a
/// mount reads the image, as the check does. The second reads the caches of the kernel.
fn measure_all(bench: &Bench, image: &Path, report: &mut Report) -> std::io::Result<()> {
    let objects = bench.sandbox.directory("real-objects");
    make_sparse_objects(image, &objects)?;
    let helper = &bench.programs.helper;
    let basedir = format!("basedir={}", objects.display());
    let find = || {
        let mut find = Command::new("find");
        find.arg(&bench.mnt).args(["-printf", "%s\\n"]).stdout(Stdio::null());
        whole_process(&mut find)
    };
    let check_all = || {
        let time = bench.mount(helper, &format!("{basedir},check=all"), image);
        bench.unmount();
        time
    };
    let first_find = || {
        bench.mount(helper, &basedir, image);
        let time = find();
        bench.unmount();
        time
    };
    let second_find = || {
        bench.mount(helper, &basedir, image);
        find();
        let time = find();
        bench.unmount();
        time
    };
    let cases = vec![
        Case::new(CHECK, check_all),
        Case::new(FIRST, first_find),
        Case::new(OTHER, second_find),
    ];
    report.add(GROUP_ALL, alternate(bench.effort, cases));
    fs::remove_dir_all(objects)
}

/// Compares with two processes of fsverity(1) at a time, which compute the same digests.
fn measure_content(
    bench: &Bench,
    fsverity: &Program,
    (image, objects): (&PathBuf, &Path),
    algorithm: Algorithm,
    report: &mut Report,
) {
    let list = run("find", [objects.to_str().unwrap(), "-type", "f"]);
    let list = bench.sandbox.file("list", list.as_bytes());
    let program = fsverity.command().get_program().to_owned();
    let digest = || {
        let mut xargs = Command::new("xargs");
        xargs.arg("-a").arg(&list).args(["-P2", "-n", "1000"]).arg(&program);
        xargs.args(["digest", &format!("--hash-alg={algorithm}")]).stdout(Stdio::null());
        whole_process(&mut xargs)
    };
    let cases =
        vec![Case::new(CHECK, || check_content(bench, image, objects)), Case::new(OTHER, digest)];
    println!("    {} MB in {OBJECTS} objects, {algorithm}", OBJECTS * MEAN_SIZE / MIB);
    report.add(&group(algorithm), alternate(bench.effort.for_slow(), cases));
}
