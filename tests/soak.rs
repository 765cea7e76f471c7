//! Mounts and unmounts in every mode, some thousand times, and fails if a figure has grown.
//! `cargo test` alone does not run the soak test:
//!
//!     cargo test --test soak -- 20000     (as root)
//!
//! docs/security.md has the figures of such a run.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use std::time::{Duration, Instant};

use sealmount::{Digest, Error, MemoryKind, MountOptions, UpperLayer, Verity};
use test_support::{
    Fixture, Sandbox, V1, V2, assert_is_manifest, assert_is_manifest_mapped, loop_devices,
    mount_composefs, mounts, sandbox, through, umount,
};

/// The number of cycles between two lines of figures.
const PERIOD: usize = 1000;
/// The number of cycles before the first line. In these cycles, caches fill, and the kernel makes its
/// first loop devices.
const WARM_UP: usize = 500;
/// The number of cycles between two comparisons of the whole tree. Each cycle reads two files.
const WHOLE_TREE: usize = 25;

/// A figure that must not grow, for example used memory.
struct Figure {
    name: &'static str,
    /// The permitted growth between the warm-up and the end. The first five figures count the whole
    /// machine, with other programs. A leak of 1 KiB per cycle still exceeds the bound.
    bound: u64,
    read: fn(&Soak) -> u64,
}

const FIGURES: [Figure; 11] = [
    Figure { name: "SUnreclaim KiB", bound: 16 << 10, read: |_| meminfo("SUnreclaim:") },
    Figure { name: "Percpu KiB", bound: 1 << 10, read: |_| meminfo("Percpu:") },
    Figure { name: "Shmem KiB", bound: 4 << 10, read: |_| meminfo("Shmem:") },
    Figure { name: "Unevictable KiB", bound: 4 << 10, read: |_| meminfo("Unevictable:") },
    Figure { name: "loop nodes", bound: 64, read: |_| loop_nodes() },
    Figure { name: "own loop devices", bound: 0, read: Soak::loop_devices },
    Figure { name: "mounts", bound: 0, read: |_| mounts().len() as u64 },
    Figure { name: "files", bound: 0, read: |soak| entries(&soak.sandbox.path("")) },
    Figure { name: "own descriptors", bound: 0, read: |_| entries(Path::new("/proc/self/fd")) },
    Figure { name: "own threads", bound: 0, read: |_| entries(Path::new("/proc/self/task")) },
    Figure { name: "own RSS KiB", bound: 2 << 10, read: |_| own_rss() },
];

/// Returns a field of /proc/meminfo, in KiB.
fn meminfo(field: &str) -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    number_of(&meminfo, field)
}

fn own_rss() -> u64 {
    number_of(&fs::read_to_string("/proc/self/status").unwrap(), "VmRSS:")
}

fn number_of(text: &str, field: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn loop_nodes() -> u64 {
    let devices = fs::read_dir("/sys/block").unwrap().flatten();
    devices.filter(|device| device.file_name().as_encoded_bytes().starts_with(b"loop")).count()
        as u64
}

fn entries(directory: &Path) -> u64 {
    fs::read_dir(directory).unwrap().count() as u64
}

/// The work of a cycle: a mount with these options, and the expected result.
struct Mode {
    name: &'static str,
    image: PathBuf,
    options: MountOptions,
    outcome: Outcome,
}

enum Outcome {
    /// A mount of the tree of the manifest, with all owners moved up by this number.
    Tree(u32),
    /// An error that contains this text.
    Rejected(&'static str),
}

struct Soak {
    sandbox: Sandbox,
    modes: Vec<Mode>,
    _user_namespace: Child,
}

impl Soak {
    fn new(sandbox: Sandbox) -> Soak {
        let (user_namespace, idmap) = test_support::user_namespace();
        let objects = sandbox.tmpfs("objects on tmpfs");
        let from = format!("{}/.", V1.objects().display());
        test_support::run("cp", ["-r", &from, objects.to_str().unwrap()]);
        let image = |name: &str, content: &[u8]| sandbox.file(&format!("soak {name}"), content);
        let content = fs::read(V1.image()).unwrap();
        let v1 = image("v1", &content);
        let v2 = image("v2", &fs::read(V2.image()).unwrap());
        let truncated = image("truncated", &content[..20480]);
        let compressed = [["zstd", "-c"], ["xz", "-c"], ["gzip", "-c"]]
            .map(|program| image(program[0], &through(&program, &content)));

        let mut modes = Vec::new();
        let mut add = |name, image: &Path, options: MountOptions, outcome| {
            modes.push(Mode { name, image: image.to_owned(), options, outcome });
        };
        let copy = |fixture: &Fixture, memory| {
            let mut options = fixture.copy_options();
            options.copy = Some(memory);
            options
        };
        let tree = || Outcome::Tree(0);
        add("plain V1", &v1, V1.options(), tree());
        add("plain V2", &v2, V2.options(), tree());
        add("memfd V1", &v1, copy(&V1, MemoryKind::Memfd), tree());
        add("memfd V2", &v2, copy(&V2, MemoryKind::Memfd), tree());
        add("ramfs V1", &v1, copy(&V1, MemoryKind::Ramfs), tree());
        add("ramfs V2", &v2, copy(&V2, MemoryKind::Ramfs), tree());
        for (image, name) in compressed.iter().zip(["zstd", "xz", "gzip"]) {
            add(name, image, copy(&V1, MemoryKind::Memfd), tree());
        }
        let mut options = V1.options();
        options.overlay.objects = vec![objects.clone().into()];
        options.overlay.verity = Some(Verity::Try);
        add("tryverity", &v1, options.clone(), tree());
        options.overlay.verity = Some(Verity::Require);
        add("verity rejected", &v1, options, Outcome::Rejected("fs-verity"));
        let mut options = copy(&V1, MemoryKind::Memfd);
        options.idmap = Some(idmap.as_str().into());
        add("idmap", &v1, options, Outcome::Tree(100_000));
        let mut options = copy(&V1, MemoryKind::Ramfs);
        options.overlay.upper =
            Some(UpperLayer::new(sandbox.directory("upper"), sandbox.directory("work")));
        add("upper", &v1, options, tree());
        for memory in [MemoryKind::Memfd, MemoryKind::Ramfs] {
            let mut options = copy(&V1, memory);
            options.digest = Some("0".repeat(64).parse::<Digest>().unwrap());
            add("wrong digest", &v1, options, Outcome::Rejected(V1.digest));
        }
        let text = "the file is truncated: it has 20480 bytes";
        add("truncated", &truncated, V1.options(), Outcome::Rejected(text));

        sandbox.directory("mnt");
        Soak { sandbox, modes, _user_namespace: user_namespace }
    }

    /// Runs one mode after another, with the library and with the helper in turn.
    fn cycle(&self, number: usize) {
        let mode = &self.modes[number % self.modes.len()];
        let is_helper = number / self.modes.len() % 2 == 1;
        let mount_point = self.sandbox.path("mnt");
        let result = match is_helper {
            false => mode
                .options
                .mount(&mode.image)
                .and_then(|mount| mount.attach(&mount_point).map_err(Error::from))
                .map_err(|error| error.to_string()),
            true => by_helper(mode, &mount_point),
        };
        match (&mode.outcome, result) {
            (Outcome::Tree(first_id), Ok(())) => {
                if number.is_multiple_of(WHOLE_TREE) {
                    match first_id {
                        0 => assert_is_manifest(&mount_point),
                        id => assert_is_manifest_mapped(&mount_point, *id),
                    }
                }
                // The first file lies in the image, the second in the objects.
                assert!(!fs::read(mount_point.join("hello.txt")).unwrap().is_empty());
                assert_eq!(fs::read(mount_point.join("data/70000")).unwrap().len(), 70_000);
                umount(&mount_point);
            }
            (Outcome::Rejected(text), Err(error)) => assert!(error.contains(text), "{error}"),
            (_, result) => panic!("cycle {number}, {}: {result:?}", mode.name),
        }
    }

    fn figures(&self) -> [u64; FIGURES.len()] {
        FIGURES.map(|figure| (figure.read)(self))
    }

    fn loop_devices(&self) -> u64 {
        loop_devices(self.sandbox.path("soak").to_str().unwrap()).len() as u64
    }
}

fn by_helper(mode: &Mode, mount_point: &Path) -> Result<(), String> {
    let text = mode.options.to_text();
    let output =
        mount_composefs!([mode.image.as_os_str(), mount_point.as_os_str(), "-o".as_ref(), &text]);
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

fn report(cycle: usize, figures: [u64; FIGURES.len()]) {
    let figures = figures.map(|figure| figure.to_string());
    println!("{cycle}\t{}", figures.join("\t"));
    std::io::stdout().flush().unwrap();
}

fn main() -> ExitCode {
    let cycles = std::env::args().nth(1).map_or(1000, |cycles| cycles.parse().unwrap());
    let Some(sandbox) = sandbox!() else { return ExitCode::SUCCESS };
    let soak = Soak::new(sandbox);
    println!("cycle\t{}", FIGURES.map(|figure| figure.name).join("\t"));
    (0..WARM_UP).for_each(|number| soak.cycle(number));
    let start = Instant::now();
    let before = soak.figures();
    report(0, before);
    for number in 0..cycles {
        soak.cycle(number);
        if (number + 1).is_multiple_of(PERIOD) {
            report(number + 1, soak.figures());
        }
    }
    let took = start.elapsed();

    // The kernel frees memory in the background, and other programs use memory.
    let has_grown = |after: &[u64]| {
        let grown = FIGURES.iter().zip(before).zip(after);
        grown
            .filter(|((figure, before), after)| **after > before + figure.bound)
            .map(|((figure, before), after)| format!("{}: {before}, then {after}", figure.name))
            .collect::<Vec<_>>()
    };
    let mut after = soak.figures();
    for _ in 0..60 {
        if has_grown(&after).is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_secs(1));
        after = soak.figures();
    }
    report(cycles, after);
    println!("{cycles} cycles in {} s, in {} modes", took.as_secs(), soak.modes.len());
    match has_grown(&after).as_slice() {
        [] => ExitCode::SUCCESS,
        grown => {
            println!("grown: {grown:?}");
            ExitCode::FAILURE
        }
    }
}
