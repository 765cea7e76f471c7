//! The system calls that the helper makes, and how each can fail.

use nix::errno::Errno::{self, *};
use nix::libc;

/// A system call.
pub struct SystemCall {
    pub name: &'static str,
    pub number: i64,
    /// What a ladder or a retry of sealmount, or of what it uses, looks for. Part of every run.
    pub looked_for: &'static [Errno],
    /// What else its manual page lists.
    pub listed: &'static [Errno],
}

/// Part of every run, for every call.
pub const TELLING: [Errno; 4] = [EINTR, EINVAL, ENOMEM, EPERM];

/// What kernels have been seen to answer, whatever the call.
pub const SEEN: [Errno; 11] =
    [EAGAIN, ENOSPC, EMFILE, ENFILE, EACCES, EBUSY, ENXIO, ENODEV, ENOSYS, EIO, ELOOP];

impl SystemCall {
    pub fn of(number: i64) -> &'static SystemCall {
        let found = CALLS.iter().find(|call| call.number == number);
        found.unwrap_or_else(|| panic!("system call {number} is missing in tests/faults/calls.rs"))
    }

    /// Memory management: what fails here is an allocation, a stack, or giving memory back.
    pub fn is_of_memory(&self) -> bool {
        matches!(
            self.number,
            libc::SYS_brk
                | libc::SYS_mmap
                | libc::SYS_munmap
                | libc::SYS_mprotect
                | libc::SYS_madvise
        )
    }

    /// What the C library gives up on by abort(3): a new thread cannot be known to rseq(2) although
    /// the first one is, or a futex(2) gives an answer that it does not have.
    pub fn is_of_threads(&self) -> bool {
        matches!(self.number, libc::SYS_rseq | libc::SYS_futex)
    }

    /// Makes the mount what it is: where one of these fails, and not with an errno that is looked for,
    /// nothing is mounted.
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

    /// Reads or writes as many bytes as its third argument says.
    pub fn has_length(&self) -> bool {
        matches!(
            self.number,
            libc::SYS_read | libc::SYS_write | libc::SYS_pread64 | libc::SYS_pwrite64
        )
    }

    /// Cannot fail: it does not return, or has no errors.
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

    /// Every errno to try, or those of every run.
    pub fn errnos(&self, all: bool) -> Vec<Errno> {
        // It has none: it fails by leaving things as they are.
        if self.number == libc::SYS_brk {
            return vec![ENOMEM];
        }
        let mut errnos = [&TELLING, self.looked_for].concat();
        if all {
            errnos.extend(SEEN.iter().chain(self.listed));
        }
        errnos.sort_unstable_by_key(|errno| *errno as i32);
        errnos.dedup();
        errnos
    }
}

const fn call(
    name: &'static str,
    number: i64,
    looked_for: &'static [Errno],
    listed: &'static [Errno],
) -> SystemCall {
    SystemCall { name, number, looked_for, listed }
}

/// The errnos that have to do with paths.
const PATH: &[Errno] = &[EFAULT, ENAMETOOLONG, ENOENT, ENOTDIR, EBADF, EOVERFLOW];

/// Those of mmap(2) and munmap(2), which share a page.
const MAP: &[Errno] = &[EBADF, EEXIST, ENOEXEC, EOVERFLOW, ETXTBSY];

/// By the manual pages of man-pages 6.03, where several calls share one by all of it; of fsconfig(2) and
/// its kind, which have none there, and of ioctls by the kernel's sources (Linux 6.18).
const CALLS: &[SystemCall] = &[
    call(
        "access",
        libc::SYS_access,
        &[],
        &[EFAULT, ENAMETOOLONG, ENOENT, ENOTDIR, EBADF, EROFS, ETXTBSY],
    ),
    call("arch_prctl", libc::SYS_arch_prctl, &[], &[EFAULT]),
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
    call("fgetxattr", libc::SYS_fgetxattr, &[], &[ENODATA, EOPNOTSUPP, ERANGE, E2BIG, EBADF]),
    call("flistxattr", libc::SYS_flistxattr, &[], &[EOPNOTSUPP, ERANGE, E2BIG, EBADF]),
    call(
        "fsconfig",
        libc::SYS_fsconfig,
        // EBUSY: a ramfs becomes read-only when the last copy of its writer is closed.
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
    // EINVAL: the root is no mount, but a directory.
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
        // ENOTDIR, ELOOP: what is looked at is not an object directory, or not an object.
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
    call("poll", libc::SYS_poll, &[], &[EFAULT]),
    call("pread64", libc::SYS_pread64, &[EIO], &[EBADF, EFAULT, EISDIR, EOVERFLOW, ESPIPE]),
    call("prlimit64", libc::SYS_prlimit64, &[], &[EFAULT, ESRCH]),
    call(
        "pwrite64",
        libc::SYS_pwrite64,
        &[EINTR, ENOSPC],
        &[EBADF, EDESTADDRREQ, EDQUOT, EFAULT, EFBIG, EOVERFLOW, EPIPE, ESPIPE],
    ),
    call("read", libc::SYS_read, &[EIO, ENODATA], &[EBADF, EFAULT, EISDIR]),
    call("readlink", libc::SYS_readlink, &[ENOENT], PATH),
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
    call("statx", libc::SYS_statx, &[ENOSYS], PATH),
    call("sysinfo", libc::SYS_sysinfo, &[], &[EFAULT]),
    call("unshare", libc::SYS_unshare, &[], &[EUSERS]),
    call(
        "utimensat",
        libc::SYS_utimensat,
        &[],
        &[EBADF, EFAULT, ENAMETOOLONG, ENOENT, ENOTDIR, EROFS, ESRCH],
    ),
    call("write", libc::SYS_write, &[ENOSPC, EPIPE], &[EBADF, EDESTADDRREQ, EDQUOT, EFAULT, EFBIG]),
];
