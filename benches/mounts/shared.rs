//! Many mounts of one sealed copy, as containers use them: each with an upper layer and with the mapping
//! of a user namespace. Their time and their memory.

use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Instant;

use rustix::fs::{XattrFlags, setxattr};
use sealmount::{CopyOptions, ErofsMount, MemoryKind, OverlayOptions, UpperLayer};
use test_support::{loop_devices, umount, user_namespace};

use crate::bench::{Bench, Taken};
use crate::images::Image;
use crate::machine::MemInfo;
use crate::memory::{real_image, walk};
use crate::parts;
use crate::programs::Program;
use crate::report::{Report, Table};
use crate::sizes::MIB;
use crate::timing::{Random, Samples, milliseconds};

pub const GROUP: &str = "mounts of one copy";
pub const PLAIN: &str = "ms, a plain mount";
pub const FIRST: &str = "ms, the first mount, with the copy";
pub const FURTHER: &str = "ms, a further mount";
pub const SLOWEST: &str = "ms, the slowest further mount";
pub const MEMORY: &str = "growth of the page cache ÷ image";
pub const LOOP_DEVICES: &str = "loop devices";

pub const SLAB_GROUP: &str = "walked mounts of one copy";
pub const SLAB_FIRST: &str = "MB of slab, the first mount";
pub const SLAB_FURTHER: &str = "MB of slab, a further mount";

const MOUNTS: usize = 50;
const WALKED: usize = 10;
const NAMESPACES: usize = 5;

/// The tree that is walked if there is no real image.
const DIRECTORIES: usize = 200;
const FILES: usize = 200;

/// The processes that hold user namespaces, and the paths of the namespaces.
struct Namespaces(Vec<(Child, String)>);

impl Namespaces {
    fn create() -> Namespaces {
        Namespaces((0..NAMESPACES).map(|_| user_namespace()).collect())
    }

    fn get(&self, number: usize) -> &str {
        &self.0[number % NAMESPACES].1
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for (process, _) in &mut self.0 {
            // The process ends when its standard input is closed.
            drop(process.stdin.take());
            let _ = process.wait();
        }
    }
}

/// A place for a mount, with new directories for its upper layer.
struct Container<'a> {
    options: OverlayOptions,
    user_namespace: &'a str,
    mount_point: PathBuf,
}

impl<'a> Container<'a> {
    fn create(parent: &Path, number: usize, namespaces: &'a Namespaces) -> io::Result<Self> {
        let directory = parent.join(number.to_string());
        let [upper, work, mount_point] = ["upper", "work", "root"].map(|name| directory.join(name));
        for path in [&upper, &work, &mount_point] {
            fs::create_dir_all(path)?;
        }
        let mut options = parts::overlay_options();
        options.upper = Some(UpperLayer::new(upper, work));
        Ok(Container { options, user_namespace: namespaces.get(number), mount_point })
    }

    fn mount(&self, erofs: &ErofsMount) -> Result<(), Box<dyn Error>> {
        let image = erofs.idmapped(self.user_namespace)?;
        self.options.open()?.mount(&image)?.attach(&self.mount_point)?;
        Ok(())
    }
}

/// Creates the containers of a round, runs `work` with them, unmounts them and removes them.
fn with_containers<T>(
    bench: &Bench,
    count: usize,
    namespaces: &Namespaces,
    work: impl FnOnce(&[Container]) -> Result<T, Box<dyn Error>>,
) -> Result<T, Box<dyn Error>> {
    let parent = bench.tmpfs.join("containers");
    let containers = (0..count).map(|number| Container::create(&parent, number, namespaces));
    let containers = containers.collect::<Result<Vec<_>, _>>()?;
    let result = work(&containers)?;
    containers.iter().for_each(|container| umount(&container.mount_point));
    fs::remove_dir_all(parent)?;
    Ok(result)
}

fn open_copied(image: &Path) -> Result<ErofsMount, Box<dyn Error>> {
    let copy = CopyOptions::new(MemoryKind::Memfd);
    Ok(sealmount::Image::open_erofs(image)?.copy(&copy)?.mount()?)
}

/// Measures the time of each mount, and the memory of all mounts after their trees are walked.
pub fn measure(bench: &Bench, image: &Image, report: &mut Report) -> Result<(), Box<dyn Error>> {
    println!("{MOUNTS} mounts of one copy…");
    let namespaces = Namespaces::create();
    let mut samples = [PLAIN, FIRST, FURTHER, SLOWEST, MEMORY, LOOP_DEVICES]
        .map(|name| Samples::new(name, Vec::new()));
    let mut result = Ok(());
    bench.effort.rounds(|counts| {
        let round = bench.with_memory(&[Taken::PageCache(image.size)], || {
            with_containers(bench, MOUNTS, &namespaces, |containers| {
                let plain = parts::mount_plain(&image.path, &bench.mnt);
                bench.unmount();
                let before = page_cache();
                let start = Instant::now();
                let erofs = open_copied(&image.path)?;
                containers[0].mount(&erofs)?;
                let first = milliseconds(start.elapsed());
                let mut further = Samples::new(FURTHER, Vec::new());
                for container in &containers[1..] {
                    let start = Instant::now();
                    container.mount(&erofs)?;
                    further.values.push(milliseconds(start.elapsed()));
                }
                for container in containers {
                    walk(&container.mount_point);
                }
                let memory = (page_cache() - before) / image.size as f64;
                let devices = loop_devices(&image.path.to_string_lossy()).len() as f64;
                let (median, slowest) = (further.median(), further.quantile(1.0));
                Ok([plain, first, median, slowest, memory, devices])
            })
        });
        match round {
            Ok(values) if counts => {
                samples.iter_mut().zip(values).for_each(|(all, value)| all.values.push(value));
            }
            Ok(_) => {}
            Err(error) => result = Err(error),
        }
    });
    let mut table = Table::new("shared", vec!["figure", "found", "quartiles"]);
    for all in &samples {
        let [lower, upper] = [0.25, 0.75].map(|part| all.quantile(part));
        let cells = [format!("{:.3}", all.median()), format!("{lower:.3}–{upper:.3}")];
        table.row([all.name.clone()].into_iter().chain(cells));
    }
    report.table(table);
    report.add(GROUP, samples.into());
    result
}

/// Returns all memory of the page cache, tmpfs files and memfds included, in bytes.
fn page_cache() -> f64 {
    let info = MemInfo::read_all();
    (info.get("Cached") + info.get("Buffers")) as f64
}

/// Measures the slab of each mount after its tree is walked: dentries and inodes.
pub fn measure_slab(bench: &Bench, report: &mut Report) -> Result<(), Box<dyn Error>> {
    println!("{WALKED} mounts of one copy, walked…");
    let image = match real_image(bench)? {
        Some(image) => image,
        None => match &bench.programs.mkfs_erofs {
            Some(mkfs_erofs) => generate(bench, mkfs_erofs)?,
            None => {
                let reason = "no real image, and no mkfs.erofs to make an image of 40,000 entries";
                report.skip(format!("slab of {WALKED} walked mounts: {reason}"));
                return Ok(());
            }
        },
    };
    let namespaces = Namespaces::create();
    let mut samples = [SLAB_FIRST, SLAB_FURTHER].map(|name| Samples::new(name, Vec::new()));
    let mut entries = 0;
    let mut result = Ok(());
    bench.effort.rounds(|counts| {
        let round = bench.with_memory(&[], || {
            with_containers(bench, WALKED, &namespaces, |containers| {
                // Slab that is free already would hide the growth.
                fs::write("/proc/sys/vm/drop_caches", "2")?;
                let before = slab();
                let erofs = open_copied(&image)?;
                containers[0].mount(&erofs)?;
                entries = walk(&containers[0].mount_point);
                let first = slab();
                for container in &containers[1..] {
                    container.mount(&erofs)?;
                    walk(&container.mount_point);
                }
                Ok([first - before, (slab() - first) / (WALKED - 1) as f64])
            })
        });
        match round {
            Ok(values) if counts => {
                samples.iter_mut().zip(values).for_each(|(all, value)| all.values.push(value));
            }
            Ok(_) => {}
            Err(error) => result = Err(error),
        }
    });
    println!("    {entries} entries");
    if entries < 40_000 {
        report
            .skip(format!("slab of {WALKED} walked mounts: the image has {entries} entries only"));
        return result;
    }
    report.add(SLAB_GROUP, samples.into());
    result
}

fn slab() -> f64 {
    MemInfo::read_all().get("Slab") as f64 / MIB as f64
}

/// Makes an EROFS image of 40,000 files with the xattrs of a composefs image.
fn generate(bench: &Bench, mkfs_erofs: &Program) -> Result<PathBuf, Box<dyn Error>> {
    println!("    an image of {} files…", DIRECTORIES * FILES);
    let tree = bench.tmpfs.join("tree");
    let mut random = Random::default();
    for directory in 0..DIRECTORIES {
        let directory = tree.join(format!("directory-{directory}"));
        fs::create_dir_all(&directory)?;
        for file in 0..FILES {
            let path = directory.join(format!("file-{file}.conf"));
            fs::File::create(&path)?;
            let digest = [(); 4].map(|()| format!("{:016x}", random.next())).concat();
            let redirect = format!("/{}/{}", &digest[..2], &digest[2..]);
            for (name, value) in [("metacopy", ""), ("redirect", &redirect)] {
                let name = format!("trusted.overlay.{name}");
                setxattr(&path, name, value.as_bytes(), XattrFlags::empty())?;
            }
        }
    }
    let image = bench.sandbox.path("generated.erofs");
    let mut command = mkfs_erofs.command();
    let output = command.arg("--quiet").args([&image, &tree]).output()?;
    assert!(output.status.success(), "{command:?}: {output:?}");
    fs::remove_dir_all(tree)?;
    Ok(image)
}
