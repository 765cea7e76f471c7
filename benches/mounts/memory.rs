//! What a mounted copy takes of memory.

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Bench;
use crate::common::{V1, run};
use crate::images::{Image, MIB};
use crate::report::{Report, Table};
use crate::timing::median;

/// `SEALMOUNT_BENCH_IMAGE` names a real image to walk, maybe compressed with zstd.
const IMAGE: &str = "SEALMOUNT_BENCH_IMAGE";

/// /proc/meminfo, in bytes.
pub struct MemInfo(HashMap<String, u64>);

impl MemInfo {
    pub fn read() -> MemInfo {
        let text = fs::read_to_string("/proc/meminfo").unwrap();
        let parse = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_owned(), value.split_whitespace().next()?.parse::<u64>().ok()? * 1024))
        };
        MemInfo(text.lines().filter_map(parse).collect())
    }

    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// What has been added of memory in tmpfs files and memfds, of such as is never swapped out
    /// (ramfs), of the page cache of block devices (loop), and of all page cache, these included.
    fn since(&self, before: &MemInfo) -> [f64; 4] {
        let grown = |name| self.get(name) as f64 - before.get(name) as f64;
        let (shmem, unevictable, buffers) =
            (grown("Shmem"), grown("Unevictable"), grown("Buffers"));
        [shmem, unevictable, buffers, grown("Cached") + buffers]
    }
}

pub fn available() -> u64 {
    MemInfo::read().get("MemAvailable")
}

/// Memory that is freed only when what holds it is unmounted or removed, in bytes.
pub fn held() -> u64 {
    let info = MemInfo::read();
    info.get("Shmem") + info.get("Unevictable")
}

/// Waits until no more is held than was before: the kernel frees what was unmounted a moment later.
/// Others may have taken some meanwhile, so no longer than a gigabyte takes.
pub fn wait_until_freed(before: u64) {
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(10));
        if held() < before + MIB as u64 {
            return;
        }
    }
}

pub fn measure(bench: &Bench, report: &mut Report) -> Result<(), Box<dyn Error>> {
    println!("memory…");
    let image = match std::env::var_os(IMAGE).map(PathBuf::from) {
        Some(path) => uncompressed(bench, &path)?,
        None => {
            report.skip(format!("memory of a real image: {IMAGE} names none"));
            Image::create(bench, 40 * MIB)?.path
        }
    };
    let size = fs::metadata(&image)?.len();
    let columns = ["Shmem", "Unevictable", "Buffers", "all page cache"];
    let options = format!("basedir={}", V1.objects().display());
    let kinds = ["plain", "memfd", "ramfs"].map(|kind| match kind {
        "plain" => (kind, options.clone()),
        _ => (kind, format!("copy={kind},{options}")),
    });
    // The figures of the columns, mounted and walked, of each kind.
    let mut grown = [(); 3].map(|()| [(); 2].map(|()| columns.map(|_| Vec::new())));
    let mut entries = 0;
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    fs::read(&image).unwrap();
    bench.effort.rounds(|counts| {
        for ((_, options), grown) in kinds.iter().zip(&mut grown) {
            bench.with_memory(0, || {
                let before = MemInfo::read();
                bench.mount(&bench.programs.helper, options, &image);
                for (walked, grown) in grown.iter_mut().enumerate() {
                    if walked == 1 {
                        entries = walk(&bench.mnt);
                    }
                    let now = MemInfo::read().since(&before);
                    if counts {
                        grown.iter_mut().zip(now).for_each(|(values, value)| values.push(value));
                    }
                }
                bench.unmount();
            });
        }
    });

    let title = format!("MB, image of {:.1}", size as f64 / 1e6);
    let header = [title.as_str()].into_iter().chain(columns).chain(["÷ image"]);
    let mut table = Table::new("memory", header.collect());
    let grown = grown.map(|grown| grown.map(|columns| columns.map(median)));
    for (number, when) in ["mounted", "walked"].iter().enumerate() {
        // The image is in the page cache already when it is mounted from its file.
        let directories = grown[0][number][3];
        for ((kind, _), grown) in kinds.iter().zip(&grown) {
            let all = grown[number][3];
            let of_image = (all - directories) / size as f64;
            let label = match *when {
                "walked" => format!("{kind}, {entries} entries walked"),
                _ => format!("{kind}, mounted"),
            };
            let cells = grown[number].iter().map(|bytes| format!("{:.1}", bytes / 1e6));
            table.row([label].into_iter().chain(cells).chain([format!("{of_image:.2}")]));
            report.figure("memory, of the image", &format!("{kind}, {when}"), of_image);
        }
    }
    report.table(table);
    Ok(())
}

fn uncompressed(bench: &Bench, path: &Path) -> std::io::Result<PathBuf> {
    let image = bench.sandbox.path("real.cfs");
    match path.extension().is_some_and(|extension| extension == "zst") {
        true => drop(run("zstd", ["-dqo".as_ref(), image.as_os_str(), path.as_os_str()])),
        false => drop(fs::copy(path, &image)?),
    }
    Ok(image)
}

/// As find(1) with -ls: all directories, attributes and symbolic links.
fn walk(directory: &Path) -> usize {
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
