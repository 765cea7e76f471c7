//! The memory that a mounted copy uses.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use test_support::{V1, run};

use crate::bench::Bench;
use crate::images::Image;
use crate::machine::MemInfo;
use crate::report::{Report, Table};
use crate::sizes::MIB;
use crate::timing::Samples;

/// The variable that gives the path of a real image to walk, maybe compressed with zstd.
const IMAGE: &str = "SEALMOUNT_BENCH_IMAGE";

/// In the group of [`of_image`].
pub const RAMFS_WALKED: &str = "ramfs, walked";
pub const MEMFD_WALKED: &str = "memfd, walked";

const KINDS: [&str; 3] = ["plain", "memfd", "ramfs"];
const TIMES: [&str; 2] = ["mounted", "walked"];
const COLUMNS: [&str; 5] = ["Shmem", "Unevictable", "Buffers", "all page cache", "Slab"];
const PAGE_CACHE: usize = 3;

/// The group of the page cache that an image uses, as a part of its size.
pub const OF_IMAGE: &str = "memory, of the image";

/// Returns the growth in MB of each column: files of tmpfs and memfds; memory that is never swapped out
/// (ramfs); the page cache of block devices (loop); all page cache, which includes the first three;
/// dentries and inodes.
fn since(before: &MemInfo, now: &MemInfo) -> [f64; COLUMNS.len()] {
    let grown = |name| (now.get(name) as f64 - before.get(name) as f64) / MIB as f64;
    COLUMNS.map(|name| match name {
        "all page cache" => grown("Cached") + grown("Buffers"),
        name => grown(name),
    })
}

pub fn measure(bench: &Bench, report: &mut Report) -> Result<(), Box<dyn Error>> {
    println!("memory…");
    let image = match real_image(bench)? {
        Some(image) => image,
        None => {
            report.skip(format!("memory of a real image: {IMAGE} is not set"));
            Image::create(bench, 40 * MIB)?.path
        }
    };
    let size = fs::metadata(&image)?.len() as f64 / MIB as f64;
    let options = format!("basedir={}", V1.objects().display());
    // The figures of the columns, mounted and walked, of each kind.
    let mut grown =
        KINDS.map(|_| TIMES.map(|_| COLUMNS.map(|column| Samples::new(column, vec![]))));
    let mut entries = 0;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    fs::read(&image)?;
    bench.effort.rounds(|counts| {
        for (kind, grown) in KINDS.iter().zip(&mut grown) {
            let options = match *kind {
                "plain" => options.clone(),
                kind => format!("copy={kind},{options}"),
            };
            bench.with_memory(&[], || {
                let before = MemInfo::read_all();
                bench.mount(&bench.programs.helper, &options, &image);
                for (when, grown) in TIMES.iter().zip(grown) {
                    if *when == "walked" {
                        entries = walk(&bench.mnt);
                    }
                    let now = since(&before, &MemInfo::read_all());
                    if counts {
                        grown.iter_mut().zip(now).for_each(|(all, new)| all.values.push(new));
                    }
                }
                bench.unmount();
            });
        }
    });

    let title = format!("MB, image of {size:.1}");
    let header = [title.as_str()].into_iter().chain(COLUMNS).chain(["÷ image"]);
    let mut table = Table::new("memory", header.collect());
    for (number, when) in TIMES.iter().enumerate() {
        for (kind, grown_by_kind) in KINDS.iter().zip(&grown) {
            let columns = &grown_by_kind[number];
            // The image is in the page cache already when it is mounted from its file.
            let directories = &grown[0][number][PAGE_CACHE].values;
            let of_image = columns[PAGE_CACHE].values.iter().zip(directories);
            let of_image = of_image.map(|(all, directories)| (all - directories) / size).collect();
            let of_image = Samples::new(&format!("{kind}, {when}"), of_image);

            let label = match *when {
                "walked" => format!("{kind}, {entries} entries walked"),
                _ => format!("{kind}, mounted"),
            };
            let cells = columns.iter().map(|column| format!("{:.1}", column.median()));
            let last = format!("{:.2}", of_image.median());
            table.row([label].into_iter().chain(cells).chain([last]));
            report.add(&format!("MB, {kind}, {when}"), columns.to_vec());
            report.add(OF_IMAGE, vec![of_image]);
        }
    }
    report.table(table);
    Ok(())
}

/// Returns the path of the real image, decompressed, or `None` if the variable does not name an image.
pub fn real_image(bench: &Bench) -> std::io::Result<Option<PathBuf>> {
    let Some(path) = std::env::var_os(IMAGE).map(PathBuf::from) else { return Ok(None) };
    let image = bench.sandbox.path("real.cfs");
    if image.exists() {
        return Ok(Some(image));
    }
    match path.extension().is_some_and(|extension| extension == "zst") {
        true => drop(run("zstd", ["-dqo".as_ref(), image.as_os_str(), path.as_os_str()])),
        false => drop(fs::copy(path, &image)?),
    }
    Ok(Some(image))
}

/// Walks a tree as `find -ls` does: all directories, attributes and symbolic links. Returns the number
/// of entries.
pub fn walk(directory: &Path) -> usize {
    let mut entries = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let kind = fs::symlink_metadata(&path).unwrap().file_type();
        entries += 1;
        if kind.is_symlink() {
            fs::read_link(&path).unwrap();
        } else if kind.is_dir() {
            entries += walk(&path);
        }
    }
    entries
}
