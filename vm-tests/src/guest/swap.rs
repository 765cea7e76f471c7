//! Checks copies on a machine with swap: the kernel swaps out the pages of a memfd, and keeps the pages
//! of a ramfs.

use super::fixtures::V1;
use super::machines::SOLITARY;
use super::system::{helper, meminfo, no_loop_devices, succeeded};
use crate::files::read;
use crate::machine::Machine;
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sealmount_sys::page_size;
use std::collections::HashSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use test_support::manifest::assert_is_manifest;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "memfd_is_swapped_out_and_ramfs_stays",
    machine: &SWAPPING,
    time_limit: Duration::from_secs(90),
    run: memfd_is_swapped_out_and_ramfs_stays,
}];

/// The machine of this scenario. After cgroup v2 has used the memory controller, cgroup v1 cannot use it.
static SWAPPING: Machine = Machine { name: "swapping", ..SOLITARY };

/// The size of the image, in bytes.
const IMAGE_SIZE: usize = 8 << 20;
const IMAGE_KIB: u64 = (IMAGE_SIZE / 1024) as u64;
/// The size of an EROFS block, in bytes.
const BLOCK: usize = 4096;

/// The mount point of cgroup v2.
const CGROUPS: &str = "/tmp/cgroup";
/// The cgroup that pays for the copies.
const CGROUP: &str = "/tmp/cgroup/copies";

fn memfd_is_swapped_out_and_ramfs_stays(guest: &mut Guest) -> Result<(), Error> {
    fs::create_dir_all(CGROUPS)?;
    mount("cgroup2", CGROUPS, "cgroup2", MountFlags::empty(), None)?;
    fs::write(Path::new(CGROUPS).join("cgroup.subtree_control"), "+memory")?;
    fs::create_dir(CGROUP)?;
    let memfd = Copy::mount("memfd", 1)?;
    let ramfs = Copy::mount("ramfs", 2)?;

    let area = guest.disk("swap")?;
    make_swap_area(&area)?;
    let swap_path = CString::new(area.as_os_str().as_bytes())?;
    sealmount_sys::swap_on(&swap_path).context(|| "cannot enable the swap area".into())?;
    // zswap would keep compressed pages in memory, but the scenario searches the disk for pages.
    let zswap = "/sys/module/zswap/parameters/enabled";
    let had_zswap = fs::read(zswap).ok();
    if had_zswap.is_some() {
        fs::write(zswap, "N").context(|| format!("cannot write {zswap}"))?;
    }
    let pages = IMAGE_SIZE / page_size();
    reclaim(|| Ok(memfd.count_pages(&area)? >= pages / 2))?;
    // Each CPU counts some pages on its own.
    fs::write("/proc/sys/vm/stat_refresh", "1")?;
    let unevictable = meminfo("Unevictable")?;
    if unevictable < IMAGE_KIB {
        return Err(format!("only {unevictable} KiB are never swapped out").into());
    }

    // The swap area contains unencrypted pages, so a search finds them.
    let swapped = [memfd.count_pages(&area)?, ramfs.count_pages(&area)?];
    println!("the swap area has {swapped:?} of {pages} pages of memfd and ramfs");
    if swapped[0] < pages / 2 || swapped[1] != 0 {
        return Err(format!("the swap area has {swapped:?} pages of memfd and ramfs").into());
    }

    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let read_back = vmstat("pswpin")?;
    assert_is_manifest(&memfd.mount_point);
    if fs::read(memfd_device()?)? != large_image(memfd.seed)? {
        return Err("the swapped pages changed".into());
    }
    let read_back = vmstat("pswpin")? - read_back;
    println!("the kernel read {read_back} pages back");
    if read_back < pages as u64 / 2 {
        return Err(format!("the kernel read only {read_back} pages back").into());
    }
    assert_is_manifest(&ramfs.mount_point);

    sealmount_sys::swap_off(&swap_path)?;
    had_zswap.map_or(Ok(()), |enabled| fs::write(zswap, enabled))?;
    for copy in [memfd, ramfs] {
        unmount(&copy.mount_point, UnmountFlags::empty())?;
        fs::remove_dir(&copy.mount_point)?;
    }
    no_loop_devices()?;
    fs::remove_dir(CGROUP)?;
    Ok(unmount(CGROUPS, UnmountFlags::DETACH)?)
}

/// A large image that is mounted from a copy. The image file is removed.
struct Copy {
    mount_point: PathBuf,
    seed: u64,
    /// The marks of the pages that no other image has.
    pages: HashSet<Mark>,
}

impl Copy {
    fn mount(memory: &str, seed: u64) -> Result<Copy, Error> {
        let path = Path::new("/tmp/image.cfs");
        let image = large_image(seed)?;
        fs::write(path, &image)?;
        let original_size = fs::metadata(V1.image_in(Path::new("/")))?.len() as usize;
        let start = original_size.next_multiple_of(page_size());
        let pages = image[start..].chunks(page_size()).map(mark).collect();
        let mount_point = PathBuf::from(format!("/mnt/{memory}"));
        fs::create_dir(&mount_point)?;
        // A process that ends makes the copy. The pages of a running process could be swapped out too,
        // and be found.
        let options = format!("basedir={},copy={memory}", V1.objects_in(Path::new("/")).display());
        let move_to = |cgroup: &str| fs::write(Path::new(cgroup).join("cgroup.procs"), "0");
        move_to(CGROUP)?;
        let output = helper(path, &mount_point, &options);
        move_to(CGROUPS)?;
        succeeded(&output?)?;
        fs::remove_file(path)?;
        Ok(Copy { mount_point, seed, pages })
    }

    /// Returns how many pages of the image are on a disk.
    fn count_pages(&self, disk: &Path) -> Result<usize, Error> {
        let mut disk = File::open(disk)?;
        let mut buffer = vec![0; page_size() * 64];
        let mut found = HashSet::new();
        // The size of a disk is a multiple of the page size, and so is the length of each read.
        while let length @ 1.. = disk.read(&mut buffer)? {
            let pages = buffer[..length].chunks(page_size()).map(mark);
            found.extend(pages.filter(|page| self.pages.contains(page)));
        }
        Ok(found.len())
    }
}

/// Returns the loop device of the only memfd. The scenario reads the whole copy through this device.
fn memfd_device() -> Result<PathBuf, Error> {
    let has_memfd = |entry: &fs::DirEntry| {
        fs::read_to_string(entry.path().join("loop/backing_file"))
            .is_ok_and(|name| name.contains("memfd:sealmount:"))
    };
    let device = fs::read_dir("/sys/block")?.flatten().find(has_memfd);
    let device = device.ok_or("no loop device has a memfd")?;
    Ok(Path::new("/dev").join(device.file_name()))
}

/// Identifies a page that fills up a large image.
type Mark = u128;

/// Returns the mark of a page: its inverted first bytes. A set of marks is swapped out too, and must
/// not look like pages of the image.
fn mark(page: &[u8]) -> Mark {
    !u128::from_le_bytes(*page.first_chunk().expect("a page is longer than a mark"))
}

/// Returns an image whose superblock claims a larger size. No two of its pages are equal, because
/// kernels can swap equal or empty pages without writing them.
pub fn large_image(seed: u64) -> Result<Vec<u8>, Error> {
    let mut image = fs::read(V1.image_in(Path::new("/")))?;
    image[1024 + 36..][..4].copy_from_slice(&((IMAGE_SIZE / BLOCK) as u32).to_le_bytes());
    let mut state = seed;
    while image.len() < IMAGE_SIZE {
        // These are the constants of Knuth's MMIX generator.
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        image.extend(state.to_le_bytes());
    }
    Ok(image)
}

/// Writes a swap header, as mkswap(8) does: one page, with the number of the last page.
fn make_swap_area(device: &Path) -> Result<(), Error> {
    let sectors = Path::new("/sys/class/block").join(device.file_name().ok_or("no device")?);
    let sectors: usize = fs::read_to_string(sectors.join("size"))?.trim().parse()?;
    let page = page_size();
    let mut header = vec![0; page];
    let version = 1u32;
    let last_page = (sectors * 512 / page - 1) as u32;
    header[1024..1028].copy_from_slice(&version.to_le_bytes());
    header[1028..1032].copy_from_slice(&last_page.to_le_bytes());
    header[page - 10..].copy_from_slice(b"SWAPSPACE2");
    let device = File::options().write(true).open(device)?;
    device.write_all_at(&header, 0)?;
    device.sync_all()?;
    Ok(())
}

/// Reclaims the memory of the cgroup until the kernel has swapped out most of the memfd (memory.reclaim, Linux
/// 5.19). Memory of other processes stays as it is.
fn reclaim(is_swapped_out: impl Fn() -> Result<bool, Error>) -> Result<(), Error> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let reclaimed = fs::write(Path::new(CGROUP).join("memory.reclaim"), "16M");
        // EAGAIN: the cgroup has less memory that can be reclaimed.
        if let Err(error) = reclaimed
            && error.raw_os_error() != Some(Errno::AGAIN.raw_os_error())
        {
            return Err(format!("cannot reclaim memory: {error}").into());
        }
        wait_for_writeback()?;
        // The page cache of the swap area does not show what the kernel wrote since the last search.
        fs::write("/proc/sys/vm/drop_caches", "1")?;
        if is_swapped_out()? {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err("the memfd is still in memory although its cgroup was reclaimed".into());
        }
    }
}

fn wait_for_writeback() -> Result<(), Error> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while meminfo("Writeback")? > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn vmstat(name: &str) -> Result<u64, Error> {
    let text = read("/proc/vmstat")?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.ok_or_else(|| format!("/proc/vmstat has no {name}"))?.parse().context(|| name.into())
}
