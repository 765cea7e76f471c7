//! The system calls that the helper makes, and the errors of each.

use nix::errno::Errno::{self, *};
use nix::libc;

/// A system call.
pub struct SystemCall {
    pub name: &'static str,
    pub number: i64,
    /// The errnos that a fallback or a retry checks, in sealmount or in a library under sealmount.
    /// Every run includes them.
    pub checked: &'static [Errno],
    /// The other errnos in the manual page of the call.
    pub listed: &'static [Errno],
}

/// The errnos that every run includes for every call.
pub const COMMON: [Errno; 4] = [EINTR, EINVAL, ENOMEM, EPERM];

/// Errnos that kernels have returned from any call.
pub const KNOWN: [Errno; 11] =
    [EAGAIN, ENOSPC, EMFILE, ENFILE, EACCES, EBUSY, ENXIO, ENODEV, ENOSYS, EIO, ELOOP];

impl SystemCall {
    pub fn of(number: i64) -> &'static SystemCall {
        let found = CALLS.iter().chain(OF_ARCHITECTURE).find(|call| call.number == number);
        found.unwrap_or_else(|| panic!("system call {number} is missing in tests/faults/calls.rs"))
    }

    /// Returns whether the call manages memory. If the call fails, an allocation, a stack, or a release
    /// of memory fails.
    pub fn manages_memory(&self) -> bool {
        matches!(
            self.number,
            libc::SYS_brk
                | libc::SYS_mmap
                | libc::SYS_munmap
                | libc::SYS_mprotect
                | libc::SYS_madvise
        )
    }

    /// Returns whether the C library calls abort(3) if the call fails. The C library does so if only a
    /// new thread has no rseq(2), or if futex(2) returns an undocumented errno.
    pub fn may_abort(&self) -> bool {
        matches!(self.number, libc::SYS_rseq | libc::SYS_futex)
    }

    /// Returns whether a mount needs the call. If the call fails with an errno outside of `checked`,
    /// sealmount mounts nothing.
    pub fn is_decisive(&self) -> bool {
        matches!(
            self.number,
            libc::SYS_fcntl
                | libc::SYS_fsconfig
                | libc::SYS_fsmount
                | libc::SYS_fsopen
                | libc::SYS_fspick
                | libc::SYS_memfd_create
                | libc::SYS_mount_setattr
                | libc::SYS_move_mount
                | libc::SYS_open_tree
                | libc::SYS_pwrite64
                | libc::SYS_setns
                | libc::SYS_unshare
        )
    }

    /// Returns whether the third argument is the number of bytes to read or write.
    pub fn has_length(&self) -> bool {
        matches!(
            self.number,
            libc::SYS_read | libc::SYS_write | libc::SYS_pread64 | libc::SYS_pwrite64
        )
    }

    /// Returns whether the call cannot fail, because the call does not return or has no errors.
    pub fn cannot_fail(&self) -> bool {
        matches!(
            self.number,
            libc::SYS_exit
                | libc::SYS_exit_group
                | libc::SYS_getegid
                | libc::SYS_geteuid
                | libc::SYS_getgid
                | libc::SYS_getpid
                | libc::SYS_gettid
                | libc::SYS_getuid
        )
    }

    /// Returns every errno to try, or the errnos of every run.
    pub fn errnos(&self, all: bool) -> Vec<Errno> {
        // brk(2) returns no errno. If brk(2) fails, the break stays in place.
        if self.number == libc::SYS_brk {
            return vec![ENOMEM];
        }
        let mut errnos = [&COMMON, self.checked].concat();
        if all {
            errnos.extend(KNOWN.iter().chain(self.listed));
        }
        errnos.sort_unstable_by_key(|errno| *errno as i32);
        errnos.dedup();
        errnos
    }
}

const fn call(
    name: &'static str,
    number: i64,
    checked: &'static [Errno],
    listed: &'static [Errno],
) -> SystemCall {
    SystemCall { name, number, checked, listed }
}

/// Linux 6.8. The crate libc lacks the number.
const STATMOUNT: i64 = 457;

/// The crate libc lacks the number on aarch64.
#[cfg(target_arch = "aarch64")]
const RENAMEAT: i64 = 38;
#[cfg(target_arch = "x86_64")]
const RENAMEAT: i64 = libc::SYS_renameat;

/// The errnos of a path lookup.
const PATH: &[Errno] = &[EFAULT, ENAMETOOLONG, ENOENT, ENOTDIR, EBADF, EOVERFLOW];

/// The errnos of access(2) and faccessat(2).
const ACCESS: &[Errno] = &[EFAULT, ENAMETOOLONG, ENOENT, ENOTDIR, EBADF, EROFS, ETXTBSY];

/// The errnos of mmap(2) and munmap(2), which share a manual page.
const MAP: &[Errno] = &[EBADF, EEXIST, ENOEXEC, EOVERFLOW, ETXTBSY];

/// The calls that only x86_64 has.
#[cfg(target_arch = "x86_64")]
const OF_ARCHITECTURE: &[SystemCall] = &[
    call("access", libc::SYS_access, &[], ACCESS),
    call("arch_prctl", libc::SYS_arch_prctl, &[], &[EFAULT]),
    call("poll", libc::SYS_poll, &[], &[EFAULT]),
    call("readlink", libc::SYS_readlink, &[ENOENT], PATH),
];

/// The calls by which the C library replaces calls that aarch64 lacks.
#[cfg(target_arch = "aarch64")]
const OF_ARCHITECTURE: &[SystemCall] = &[
    call("faccessat", libc::SYS_faccessat, &[], ACCESS),
    call("ppoll", libc::SYS_ppoll, &[], &[EFAULT]),
    call("readlinkat", libc::SYS_readlinkat, &[ENOENT], PATH),
];

/// The errnos are from the manual pages of man-pages 6.03. If several calls share a page, each call has
/// all errnos of the page. fsconfig(2), its relatives and ioctls have no page there, so their errnos
/// are from the sources of Linux 6.18.
const CALLS: &[SystemCall] = &[
    call("brk", libc::SYS_brk, &[], &[]),
    call("clock_nanosleep", libc::SYS_clock_nanosleep, &[], &[EFAULT, EOPNOTSUPP]),
    call("clone3", libc::SYS_clone3, &[EAGAIN, ENOSYS], &[EEXIST, EUSERS, EOPNOTSUPP, ENOSPC]),
    call("clone", libc::SYS_clone, &[EAGAIN], &[EEXIST, EUSERS, EOPNOTSUPP, ENOSPC]),
    call("close", libc::SYS_close, &[], &[EBADF, EDQUOT]),
    call("exit", libc::SYS_exit, &[], &[]),
    call("exit_group", libc::SYS_exit_group, &[], &[]),
    call("fchdir", libc::SYS_fchdir, &[], PATH),
    call(
        "fchmod",
        libc::SYS_fchmod,
        &[],
        &[EBADF, EFAULT, ENAMETOOLONG, ENOENT, ENOTDIR, EOPNOTSUPP, EROFS],
    ),
    call("fchown", libc::SYS_fchown, &[], &[EBADF, EFAULT, ENAMETOOLONG, ENOENT, ENOTDIR, EROFS]),
    call("fcntl", libc::SYS_fcntl, &[EBUSY], &[EBADF, EDEADLK, EFAULT, ENOLCK, ENOTDIR]),
    call("fgetxattr", libc::SYS_fgetxattr, &[ENODATA, ERANGE], &[EOPNOTSUPP, E2BIG, EBADF]),
    call("flistxattr", libc::SYS_flistxattr, &[], &[EOPNOTSUPP, ERANGE, E2BIG, EBADF]),
    call(
        "fsconfig",
        libc::SYS_fsconfig,
        // EBUSY: a ramfs can become read-only when the last copy of its writer is closed.
        &[EBADF, EBUSY, EINVAL, ENOENT, ENOTBLK, EOPNOTSUPP],
        &[EFAULT, ENAMETOOLONG, ENOTDIR, E2BIG, EROFS, ESTALE, EUCLEAN],
    ),
    call(
        "fsetxattr",
        libc::SYS_fsetxattr,
        &[],
        &[EDQUOT, EEXIST, ENODATA, EOPNOTSUPP, ERANGE, EBADF],
    ),
    call("fsmount", libc::SYS_fsmount, &[], &[EBADF, EFAULT]),
    call("fsopen", libc::SYS_fsopen, &[ENOENT, ENOTBLK, ENODEV], &[EFAULT]),
    call("fspick", libc::SYS_fspick, &[], PATH),
    call("fstat", libc::SYS_fstat, &[], PATH),
    call("fstatfs", libc::SYS_fstatfs, &[], PATH),
    call("futex", libc::SYS_futex, &[ETIMEDOUT], &[EDEADLK, EFAULT, ESRCH]),
    call("getcwd", libc::SYS_getcwd, &[ERANGE], &[EFAULT, ENAMETOOLONG, ENOENT]),
    call("getdents64", libc::SYS_getdents64, &[], &[EBADF, EFAULT, ENOENT, ENOTDIR]),
    call("getegid", libc::SYS_getegid, &[], &[]),
    call("geteuid", libc::SYS_geteuid, &[], &[]),
    call("getgid", libc::SYS_getgid, &[], &[]),
    call("getuid", libc::SYS_getuid, &[], &[]),
    call("getpid", libc::SYS_getpid, &[], &[]),
    call("getrandom", libc::SYS_getrandom, &[ENOSYS], &[EFAULT]),
    call("gettid", libc::SYS_gettid, &[], &[]),
    call(
        "ioctl",
        libc::SYS_ioctl,
        &[EAGAIN, EBUSY, ENODATA, ENOTTY, ENXIO, EOPNOTSUPP],
        &[EBADF, EFAULT, EOVERFLOW, EFBIG, ENOENT],
    ),
    // ENODATA means that a file has no object, so no run can detect a forged ENODATA.
    call("lgetxattr", libc::SYS_lgetxattr, &[], &[E2BIG, EFAULT, ENOENT, ENOTDIR]),
    call("lseek", libc::SYS_lseek, &[], &[EBADF, EOVERFLOW, ESPIPE]),
    call("madvise", libc::SYS_madvise, &[], &[EBADF, EFAULT, EHWPOISON]),
    call("memfd_create", libc::SYS_memfd_create, &[EINVAL], &[EFAULT]),
    call(
        "mkdirat",
        libc::SYS_mkdirat,
        &[],
        &[EBADF, EDQUOT, EEXIST, EFAULT, EMLINK, ENAMETOOLONG, ENOENT, ENOTDIR, EROFS],
    ),
    call(
        "mknodat",
        libc::SYS_mknodat,
        &[],
        &[EBADF, EDQUOT, EEXIST, EFAULT, ENAMETOOLONG, ENOENT, ENOTDIR, EROFS],
    ),
    call("mmap", libc::SYS_mmap, &[], MAP),
    // EINVAL: the root is a directory without a mount.
    call(
        "mount_setattr",
        libc::SYS_mount_setattr,
        &[EINVAL, ENOSYS],
        &[EBADF, EFAULT, ENOENT, E2BIG],
    ),
    call("move_mount", libc::SYS_move_mount, &[], PATH),
    call("mprotect", libc::SYS_mprotect, &[], &[EFAULT]),
    call("munmap", libc::SYS_munmap, &[], MAP),
    call("newfstatat", libc::SYS_newfstatat, &[], PATH),
    call("open_tree", libc::SYS_open_tree, &[EINVAL], PATH),
    call(
        "openat",
        libc::SYS_openat,
        // ENOTDIR, ELOOP: a sampled entry is not an object directory, or not an object.
        &[EACCES, ELOOP, EMFILE, ENODEV, ENOENT, ENOTDIR, ENXIO],
        &[
            EBADF,
            EDQUOT,
            EEXIST,
            EFAULT,
            EFBIG,
            EISDIR,
            ENAMETOOLONG,
            EOPNOTSUPP,
            EOVERFLOW,
            EROFS,
            ETXTBSY,
        ],
    ),
    call(
        "openat2",
        libc::SYS_openat2,
        // A cgroup that cannot be opened has no known limit.
        // EPERM also means that O_NOATIME is not permitted.
        &[EACCES, EIO, ELOOP, ENOENT, ENOTDIR, EPERM, EXDEV],
        &[E2BIG, EBADF, EFAULT, EISDIR, ENAMETOOLONG, EOPNOTSUPP, EOVERFLOW, ENXIO],
    ),
    call("pread64", libc::SYS_pread64, &[EIO], &[EBADF, EFAULT, EISDIR, EOVERFLOW, ESPIPE]),
    call("prlimit64", libc::SYS_prlimit64, &[], &[EFAULT, ESRCH]),
    call(
        "pwrite64",
        libc::SYS_pwrite64,
        &[EINTR, ENOSPC],
        &[EBADF, EDESTADDRREQ, EDQUOT, EFAULT, EFBIG, EOVERFLOW, EPIPE, ESPIPE],
    ),
    call("read", libc::SYS_read, &[EIO, ENODATA], &[EBADF, EFAULT, EISDIR]),
    call(
        "renameat",
        RENAMEAT,
        &[],
        &[
            EDQUOT,
            EEXIST,
            EFAULT,
            EISDIR,
            EMLINK,
            ENAMETOOLONG,
            ENOENT,
            ENOTDIR,
            ENOTEMPTY,
            EROFS,
            EXDEV,
            EBADF,
        ],
    ),
    call("rseq", libc::SYS_rseq, &[], &[EFAULT]),
    call("rt_sigaction", libc::SYS_rt_sigaction, &[], &[EFAULT]),
    call("rt_sigprocmask", libc::SYS_rt_sigprocmask, &[], &[EFAULT]),
    call("sched_getaffinity", libc::SYS_sched_getaffinity, &[], &[EFAULT, ESRCH]),
    call("sched_setaffinity", libc::SYS_sched_setaffinity, &[], &[EFAULT, ESRCH]),
    call("sched_yield", libc::SYS_sched_yield, &[], &[]),
    call("set_robust_list", libc::SYS_set_robust_list, &[], &[EFAULT, ESRCH]),
    call("set_tid_address", libc::SYS_set_tid_address, &[], &[]),
    call("setns", libc::SYS_setns, &[], &[EBADF, ESRCH, EUSERS]),
    call("sigaltstack", libc::SYS_sigaltstack, &[], &[EFAULT]),
    call("statfs", libc::SYS_statfs, &[], PATH),
    // ENOENT: the mount of a record is gone.
    call("statmount", STATMOUNT, &[ENOENT], &[EFAULT, EOVERFLOW]),
    call("statx", libc::SYS_statx, &[ENOSYS], PATH),
    call("sysinfo", libc::SYS_sysinfo, &[], &[EFAULT]),
    call(
        "unlinkat",
        libc::SYS_unlinkat,
        &[],
        &[EFAULT, EISDIR, ENAMETOOLONG, ENOENT, ENOTDIR, EROFS, EBADF],
    ),
    call("unshare", libc::SYS_unshare, &[], &[EUSERS]),
    call(
        "utimensat",
        libc::SYS_utimensat,
        &[],
        &[EBADF, EFAULT, ENAMETOOLONG, ENOENT, ENOTDIR, EROFS, ESRCH],
    ),
    call("write", libc::SYS_write, &[ENOSPC, EPIPE], &[EBADF, EDESTADDRREQ, EDQUOT, EFAULT, EFBIG]),
];
