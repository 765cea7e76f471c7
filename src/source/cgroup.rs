//! The memory limits of the caller's cgroup and its ancestors: [cgroups(7)].
//!
//! /sys/fs/cgroup may be a forged directory. sealmount therefore finds a mount of the hierarchy in
//! mountinfo. sealmount then checks that the opened directory is the root of that mount. If a limit cannot
//! be read, only the kernel enforces the limit: the kernel kills processes of the cgroup. docs/design.md
//! says why sealmount does not mount the hierarchy itself.
//!
//! [cgroups(7)]: https://man7.org/linux/man-pages/man7/cgroups.7.html

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, openat, openat2, statx};

use crate::kernel::mount_table::{MountLine, has_flag, mounts};
use crate::kernel::procfs::{self, Procfs};

/// A limit of cgroup v1 from this value on means that there is no limit.
const NO_LIMIT_V1: u64 = 1 << 62;

/// A cgroup with a limit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LimitedCgroup {
    /// The path, as /proc/self/cgroup has it.
    pub path: PathBuf,
    /// The limit, in bytes.
    pub limit: u64,
    /// The bytes that are free, or that the kernel can reclaim from the page cache. If the free bytes are
    /// enough, the page cache is left out.
    pub available: u64,
}

/// Returns the cgroup with the least available memory, or `None` if no limit is known. `size` is the number of
/// bytes that are enough.
///
/// Swap is not counted, as in MemAvailable. `memory.high` is not a limit: above `memory.high`, the kernel
/// slows processes down and does not kill them.
pub(crate) fn tightest_cgroup(procfs: Option<&Procfs>, size: u64) -> Option<LimitedCgroup> {
    let memberships = procfs::read_file(procfs, "self/cgroup")?;
    let membership = Membership::parse(&memberships)?;
    // The root of the whole hierarchy has no limit.
    if membership.path == Path::new("/") && procfs::is_in_initial_cgroup_namespace(procfs) {
        return None;
    }
    let mountinfo = procfs::read_file(procfs, "thread-self/mountinfo")?;
    let mount = find_hierarchy(&mountinfo, &membership)?;
    let root = open_root(&mount)?;
    let limited = |path: &Path| {
        let inside = path.strip_prefix(&mount.root).ok()?;
        let (limit, available) = membership.version.room(&root, inside, size)?;
        Some(LimitedCgroup { path: path.to_owned(), limit, available })
    };
    membership.path.ancestors().filter_map(limited).min_by_key(|cgroup| cgroup.available)
}

/// The version of a hierarchy, with the names of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    /// Returns the limit of a cgroup and its available memory. Reads the page cache only if the free bytes
    /// are fewer than `size`. Returns `None` if there is no limit, or it cannot be read.
    fn room(self, root: &OwnedFd, cgroup: &Path, size: u64) -> Option<(u64, u64)> {
        let read = |name| read_in(root, &cgroup.join(name));
        let [limit, usage] = match self {
            Version::V1 => ["memory.limit_in_bytes", "memory.usage_in_bytes"],
            Version::V2 => ["memory.max", "memory.current"],
        };
        let limit = parse_limit(&read(limit)?)?;
        let free = limit.saturating_sub(parse_number(&read(usage)?)?);
        if free >= size {
            return Some((limit, free));
        }
        Some((limit, free.saturating_add(self.parse_page_cache(&read("memory.stat")?))))
    }

    /// Returns the bytes of the page cache that the kernel can reclaim, from memory.stat. Files of a tmpfs, a
    /// memfd or a ramfs are not in these lists.
    fn parse_page_cache(self, stat: &str) -> u64 {
        let fields = match self {
            // The fields without the prefix leave descendants out.
            Version::V1 => ["total_inactive_file", "total_active_file"],
            Version::V2 => ["inactive_file", "active_file"],
        };
        let values = stat.lines().filter_map(|line| {
            let (field, value) = line.split_once(' ')?;
            fields.contains(&field).then(|| parse_number(value)).flatten()
        });
        values.fold(0, u64::saturating_add)
    }
}

/// The cgroup of the caller in the hierarchy with the memory controller.
#[derive(Debug, PartialEq, Eq)]
struct Membership<'a> {
    version: Version,
    path: &'a Path,
}

impl<'a> Membership<'a> {
    /// Parses /proc/self/cgroup: lines of `NUMBER:CONTROLLER,…:PATH`. A controller is in one hierarchy only.
    fn parse(text: &'a [u8]) -> Option<Membership<'a>> {
        let all = || text.split(|byte| *byte == b'\n').filter_map(Membership::parse_line);
        let of = |version| all().find(|found| found.version == version);
        let found = of(Version::V1).or_else(|| of(Version::V2))?;
        // The kernel shows `..` for a cgroup above the root of the cgroup namespace.
        let is_inside = |part| matches!(part, Component::RootDir | Component::Normal(_));
        (found.path.is_absolute() && found.path.components().all(is_inside)).then_some(found)
    }

    /// Returns the membership of a line in v2, or in the v1 hierarchy with the memory controller.
    fn parse_line(line: &'a [u8]) -> Option<Membership<'a>> {
        let mut fields = line.splitn(3, |byte| *byte == b':');
        let (number, controllers) = (fields.next()?, fields.next()?);
        let path = Path::new(OsStr::from_bytes(fields.next()?));
        let version = match (number, controllers) {
            (b"0", b"") => Version::V2,
            _ if controllers.split(|b| *b == b',').any(|name| name == b"memory") => Version::V1,
            _ => return None,
        };
        Some(Membership { version, path })
    }
}

/// Finds the mount that shows the most ancestors of the cgroup, in the text of /proc/self/mountinfo.
fn find_hierarchy(mountinfo: &[u8], membership: &Membership) -> Option<MountLine> {
    let is_hierarchy = |mount: &MountLine| match membership.version {
        Version::V1 => mount.fs_type == "cgroup" && has_flag(&mount.superblock, "memory"),
        Version::V2 => mount.fs_type == "cgroup2",
    };
    mounts(mountinfo)
        .filter(|mount| is_hierarchy(mount) && membership.path.starts_with(&mount.root))
        .min_by_key(|mount| mount.root.as_os_str().len())
}

/// Opens the root of a mount. Returns `None` if the mount point leads to another mount.
fn open_root(mount: &MountLine) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, &mount.mount_point, flags, Mode::empty()).ok()?;
    let found = statx(&root, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    let is_known = found.stx_mask & StatxFlags::MNT_ID.bits() != 0;
    (is_known && found.stx_mnt_id == mount.id).then_some(root)
}

/// Reads a file of a cgroup. A removed cgroup has no files. A mount on top of a cgroup is not followed.
fn read_in(root: &OwnedFd, path: &Path) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    let file = openat2(root, path, flags, Mode::empty(), resolve).ok()?;
    std::io::read_to_string(File::from(file)).ok()
}

/// Parses a limit: `max` and very large numbers mean no limit.
fn parse_limit(text: &str) -> Option<u64> {
    parse_number(text).filter(|limit| *limit < NO_LIMIT_V1)
}

fn parse_number(text: &str) -> Option<u64> {
    text.trim_end().parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Option<(Version, &str)> {
        let found = Membership::parse(text.as_bytes())?;
        Some((found.version, found.path.to_str()?))
    }

    #[test]
    fn cgroup_lines_return_the_memory_hierarchy() {
        let v2 = "0::/system.slice/a:b.service\n";
        assert_eq!(parse(v2), Some((Version::V2, "/system.slice/a:b.service")));
        let hybrid = "9:name=systemd:/x\n4:memory:/docker/1\n1:cpu,cpuacct:/\n0::/\n";
        assert_eq!(parse(hybrid), Some((Version::V1, "/docker/1")));
        let joined = "0::/y\n2:cpu,memory,name=both:/x";
        assert_eq!(parse(joined), Some((Version::V1, "/x")));
        assert_eq!(parse("1:name=memory:/x\n0::/y"), Some((Version::V2, "/y")));
        for without in ["", "\n", "0::", "0::relative", "0::/..", "0::/../x", "1:cpu:/x", "0:/x"] {
            assert_eq!(parse(without), None, "{without:?}");
        }
    }

    #[test]
    fn mountinfo_returns_mount_with_most_ancestors() {
        let mountinfo = b"21 1 0:5 / /dev rw - devtmpfs cgroup2 rw\n\
            31 1 0:20 /a/b /own rw - cgroup2 cgroup2 rw\n\
            32 1 0:20 /a /a\\040\\134x rw shared:1 master:2 - cgroup2 - rw,nsdelegate\n\
            33 1 0:20 /other /other rw - cgroup2 cgroup2 rw\n\
            34 1 0:21 / /v1 rw - cgroup cgroup rw,cpu,memory\n\
            35 1 0:22 / /cpu rw - cgroup memory rw,cpu\n";
        let find = |membership: &str, mountinfo: &[u8]| {
            find_hierarchy(mountinfo, &Membership::parse(membership.as_bytes()).unwrap())
                .map(|mount| (mount.id, mount.root, mount.mount_point))
        };
        let mount = |id, root: &str, mount_point: &str| {
            Some((id, PathBuf::from(root), PathBuf::from(mount_point)))
        };
        assert_eq!(find("0::/a/b/c", mountinfo), mount(32, "/a", "/a \\x"));
        assert_eq!(find("0::/ab", mountinfo), None);
        assert_eq!(find("2:memory,cpu:/x", mountinfo), mount(34, "/", "/v1"));
        for damaged in
            [&b""[..], b"1", b"x 1 0:20 / /a rw - cgroup2 c rw", b"1 1 0:20 / /a rw cgroup2 c rw"]
        {
            assert_eq!(find("0::/", damaged), None);
        }
    }

    #[test]
    fn numbers_have_their_limits() {
        assert_eq!(parse_limit("26214400\n"), Some(26_214_400));
        for none in ["max\n", "", "-1\n", "9223372036854771712\n", "18446744073709551615", "1 2"] {
            assert_eq!(parse_limit(none), None, "{none:?}");
        }
        let stat = "anon 1\nfile 9\ninactive_file 20\nactive_file 300\nactive_file_x 7\n\
             total_inactive_file 4000\ntotal_active_file 50000\n";
        assert_eq!(Version::V2.parse_page_cache(stat), 320);
        assert_eq!(Version::V1.parse_page_cache(stat), 54_000);
        assert_eq!(
            Version::V2.parse_page_cache("inactive_file 18446744073709551615\nactive_file 1"),
            u64::MAX
        );
    }

    proptest! {
        #[test]
        fn parsed_path_stays_below_the_root(text: Vec<u8>, path in "(/|\\.|a|:|,){0,12}") {
            let line = [b"0::".as_slice(), path.as_bytes()].concat();
            for text in [text.as_slice(), line.as_slice()] {
                if let Some(found) = Membership::parse(text) {
                    prop_assert!(found.path.is_absolute());
                    for ancestor in found.path.ancestors() {
                        let inside = ancestor.strip_prefix("/").unwrap();
                        let is_normal = |part| matches!(part, Component::Normal(_));
                        prop_assert!(inside.components().all(is_normal));
                    }
                }
                let membership = Membership { version: Version::V2, path: Path::new("/") };
                let _ = find_hierarchy(text, &membership);
                let text = String::from_utf8_lossy(text);
                let _ = (parse_limit(&text), Version::V1.parse_page_cache(&text));
            }
        }
    }
}
