//! Determines the outcome of a run, whether the outcome is permitted, and whether the run left
//! anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use test_support::tracer::End;
use test_support::{
    Mount, assert_is_manifest, assert_is_manifest_mapped, loop_devices, mount_at, mounts, umount,
};

use super::fault::{FOR_EVER, Fault, Recorded};
use super::scenarios::{Expected, Place, Scenario};

/// The outcomes of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// The helper mounted the whole tree with all options.
    Mounted,
    /// The helper mounted without verity: the option is `tryverity`, and the kernel reported no
    /// support.
    MountedWithoutVerity,
    /// The helper mounted nothing, and exited with this status and a message that names the failure.
    Failed(i32),
    /// The helper mounted nothing: the loader failed, an allocation failed, or the C library called
    /// abort(3).
    Died,
    /// The signal of the fault killed the helper after a correct mount.
    KilledMounted,
    /// The signal of the fault killed the helper before a mount.
    KilledUnmounted,
    /// The helper retried a call that failed with EINTR every time. SIGTERM ended the run.
    Retried,
}

/// Judges the runs of a scenario.
pub struct Witness<'a> {
    scenario: &'a Scenario,
    place: &'a Place,
    /// The mounts before the first run.
    mounts: Vec<Mount>,
    files: BTreeSet<String>,
    /// The mount before each run, for a remount.
    before: Option<Mount>,
    /// The mount of a run without a fault.
    whole: Option<Mount>,
}

impl<'a> Witness<'a> {
    /// Makes a witness, before the first run.
    pub fn new(scenario: &'a Scenario, place: &'a Place) -> Witness<'a> {
        let mounts = mounts();
        Witness { scenario, place, mounts, files: files(place), before: None, whole: None }
    }

    /// Makes the mount that the run changes.
    pub fn prepare(&mut self) {
        if self.scenario.outcome == Expected::Remount {
            self.place.mount();
            self.before = mount_at(&self.place.mount_point());
        }
    }

    /// Returns the mount that the run made, or that has the flags of the run. Unmounts a mount that the run
    /// left as it was.
    fn result(&self, end: End) -> Result<Option<Mount>, String> {
        let mount = mount_at(&self.place.mount_point());
        if self.scenario.outcome != Expected::Remount {
            return Ok(mount);
        }
        if mount.is_none() {
            return Err("the mount is gone".into());
        }
        if mount == self.whole {
            return Ok(mount);
        }
        umount(&self.place.mount_point());
        // A signal may come between the two steps of a remount.
        match mount == self.before || matches!(end, End::Killed(_)) {
            true => Ok(None),
            false => Err(format!("half remounted: {mount:?}")),
        }
    }

    /// Stores the mount of the run without a fault, for the comparison with all other runs.
    pub fn store_reference(&mut self) {
        self.whole = mount_at(&self.place.mount_point());
    }

    /// Returns the outcome of a run, or the reason why the outcome is not permitted. Unmounts the
    /// mount.
    pub fn judge(
        &self,
        fault: Fault,
        recorded: &Recorded,
        end: End,
        stderr: &str,
    ) -> Result<Outcome, String> {
        let mount = self.result(end)?;
        let is_mounted = mount.is_some();
        let checked = mount.map(|mount| self.check_mount(&mount, fault, recorded));
        if is_mounted {
            umount(&self.place.mount_point());
        }
        self.check_nothing_left()?;
        let verity = checked.transpose()?;
        let message = || check_message(fault, stderr);
        match (end, fault) {
            (End::Exited(0), _) => match verity {
                _ if self.scenario.outcome == Expected::Failure => Err("success".into()),
                None => Err("the helper succeeded without a mount".into()),
                Some(_) if fault.must_prevent_mount(recorded) => {
                    Err("the helper ignored a failure".into())
                }
                Some(true) => Ok(Outcome::Mounted),
                Some(false) => Ok(Outcome::MountedWithoutVerity),
            },
            (End::Killed(got), Fault::Signal { signal, .. }) if got == signal => {
                match (is_mounted, self.scenario.outcome) {
                    (true, Expected::Failure) => Err("mounted".into()),
                    (true, _) => Ok(Outcome::KilledMounted),
                    (false, _) => Ok(Outcome::KilledUnmounted),
                }
            }
            (End::Killed(Signal::SIGTERM), Fault::ForEver { errno: Errno::EINTR, .. })
                if !is_mounted || self.scenario.outcome != Expected::Failure =>
            {
                Ok(Outcome::Retried)
            }
            _ if is_mounted => Err("the helper failed and left a mount".into()),
            _ if self.scenario.outcome != Expected::Failure
                && fault.is_harmless()
                && !recorded.is_start =>
            {
                Err("the helper failed without a cause".into())
            }
            (End::Exited(status @ (1 | 2 | 32)), _) => message().map(|()| Outcome::Failed(status)),
            // The loader exits with 127, or gets a signal if an allocation fails.
            (End::Exited(127) | End::Killed(Signal::SIGSEGV), _) if recorded.is_start => {
                Ok(Outcome::Died)
            }
            (End::Killed(Signal::SIGABRT), _) if recorded.may_die() => Ok(Outcome::Died),
            // Rust's runtime panics if Rust cannot finish the start of a thread, or wait for the
            // thread.
            (End::Exited(4), _)
                if recorded.may_die() && stderr.contains("library/std/src/sys/") =>
            {
                Ok(Outcome::Died)
            }
            (End::Killed(Signal::SIGTERM), Fault::ForEver { .. }) => {
                Err(format!("{FOR_EVER} attempts"))
            }
            _ => Err("the end of the process is not permitted".into()),
        }
    }

    /// Checks that a mount has the tree and the options of the scenario. Returns whether the mount has
    /// verity. With `tryverity`, a mount without verity is correct if the kernel reported no support.
    fn check_mount(
        &self,
        mount: &Mount,
        fault: Fault,
        recorded: &Recorded,
    ) -> Result<bool, String> {
        let Some(whole) = &self.whole else { return Err(format!("mounted: {mount:?}")) };
        // The paths of the layers may differ.
        let options = |mount: &Mount| -> BTreeSet<String> {
            let is_layer = |option: &&String| {
                let key = option.split('=').next().unwrap_or_default();
                ["lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir"].contains(&key)
            };
            mount.options.iter().filter(|option| !is_layer(option)).cloned().collect()
        };
        let (found, mut expected) = (options(mount), options(whole));
        let verity = "verity=require";
        let mut has_verity = true;
        if self.scenario.outcome == Expected::TryVerity
            && !found.contains(verity)
            && fault.means_no_verity(recorded)
        {
            expected.remove(verity);
            has_verity = false;
        }
        // The magic link of a memfd is resolved or not.
        let is_source = mount.source == whole.source || mount.source.starts_with("/memfd:");
        if mount.fs_type != whole.fs_type || !is_source || found != expected {
            return Err(format!("mounted {mount:?}, expected {whole:?}"));
        }
        let root = &mount.mount_point;
        let compared = catch_unwind(AssertUnwindSafe(|| match self.scenario.outcome {
            Expected::Mount | Expected::Remount => assert_is_manifest(root),
            Expected::Idmapped => assert_is_manifest_mapped(root, 100_000),
            _ if !has_verity => assert_is_manifest(root),
            // The objects have no fs-verity, so only files within the image can be read.
            _ => {
                let hello = fs::read_to_string(root.join("hello.txt")).unwrap();
                assert_eq!(hello, "hello from a composefs image\n");
                let object = fs::read(root.join("data/70000")).unwrap_err();
                assert_eq!(object.raw_os_error(), Some(libc::EIO));
            }
        }));
        compared.map_err(|_| "the helper mounted another tree".to_owned())?;
        Ok(has_verity)
    }

    /// Checks that no mount, loop device or file is left. The tracer waits for threads and children.
    fn check_nothing_left(&self) -> Result<(), String> {
        let mounts = mounts();
        let left: Vec<_> = mounts.iter().filter(|mount| !self.mounts.contains(mount)).collect();
        if !left.is_empty() {
            return Err(format!("mounts are left: {left:?}"));
        }
        // If another program removes a mount point, the kernel unmounts the copy in this namespace too.
        let directories = [self.place.sandbox.path(""), "/run".into()];
        let lost = self.mounts.iter().filter(|mount| !mounts.contains(mount));
        let is_own =
            |mount: &Mount| directories.iter().any(|path| mount.mount_point.starts_with(path));
        if let Some(mount) = lost.into_iter().find(|mount| is_own(mount)) {
            return Err(format!("a mount is gone: {mount:?}"));
        }
        let files = files(self.place);
        if files != self.files {
            return Err(format!("files are left: {files:?}, not {:?}", self.files));
        }
        // The kernel releases a loop device a moment after its last use.
        for _ in 0..500 {
            if loop_devices(&self.place.mark).is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Err(format!("loop devices are left: {:?}", loop_devices(&self.place.mark)))
    }
}

/// Returns the files in the directories that the helper knows. overlayfs leaves files in workdir.
fn files(place: &Place) -> BTreeSet<String> {
    ["", "mnt", "upper", "empty"]
        .iter()
        .flat_map(|directory| fs::read_dir(place.sandbox.path(directory)).unwrap())
        .map(|entry| entry.unwrap().path().to_str().unwrap().to_owned())
        .collect()
}

impl Fault {
    /// Returns whether the errno means that the kernel, a file system or an object has no fs-verity.
    fn means_no_verity(self, recorded: &Recorded) -> bool {
        let (Fault::Errno { errno, .. } | Fault::ForEver { errno, .. }) = self else {
            return false;
        };
        match recorded.call.number {
            // ENODATA: the object itself has no fs-verity.
            libc::SYS_ioctl => {
                matches!(errno, Errno::ENODATA | Errno::ENOTTY | Errno::EOPNOTSUPP)
            }
            libc::SYS_fsconfig => {
                let is_for_verity = recorded.is_create || recorded.key.as_deref() == Some("verity");
                errno == Errno::EINVAL && is_for_verity
            }
            _ => false,
        }
    }

    /// Returns whether the failure must prevent the mount.
    fn must_prevent_mount(self, recorded: &Recorded) -> bool {
        let Fault::Errno { errno, .. } = self else { return false };
        // The check of the permission has no source, so most errnos mean that the permission exists.
        // The mount repeats the call.
        if recorded.is_permission_check {
            return matches!(errno, Errno::EPERM | Errno::EACCES);
        }
        // A trial does not make a good mount fail.
        if recorded.is_trial {
            return false;
        }
        // If the query fails, sealmount treats the image as a file that can change.
        if recorded.is_seal_query {
            return false;
        }
        recorded.call.is_decisive() && !recorded.call.checked.contains(&errno)
    }

    fn is_of(self, expected: i64) -> bool {
        match self {
            Fault::Errno { number, .. }
            | Fault::ForEver { number, .. }
            | Fault::Short { number, .. }
            | Fault::ShortForEver { number, .. } => number == expected,
            _ => false,
        }
    }
}

/// Checks that the last message has the form `object: cannot VERB: cause`. Hints may follow the
/// message.
fn check_message(fault: Fault, stderr: &str) -> Result<(), String> {
    // The helper could not write the message.
    if fault.is_of(libc::SYS_write) {
        return Ok(());
    }
    let lines = || stderr.lines().filter_map(|line| line.strip_prefix("mount.composefs: "));
    let last = lines().next_back().unwrap_or_default();
    // A message without an object starts with the operation.
    let (operation, cause) = match last.split_once("cannot ") {
        Some((_, rest)) => rest.split_once(": ").unwrap_or_default(),
        None => ("", ""),
    };
    match operation.is_empty() || cause.is_empty() {
        true => Err("the message does not name the failure".into()),
        false => Ok(()),
    }
}

/// A row of the table.
#[derive(Default)]
pub struct Row {
    pub scenario: &'static str,
    /// The number of system calls of a run without a fault.
    pub calls: usize,
    /// The number of runs with a fault.
    pub injections: usize,
    /// The number of runs whose threads made fewer calls of that number than the recorded run.
    pub not_reached: usize,
    pub outcomes: BTreeMap<Outcome, usize>,
}

/// The shared memory of the whole system, in KiB.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// The memory of memfds and of tmpfs.
    shared: u64,
    /// The memory of ramfs and of locked memfds.
    unevictable: u64,
}

impl Memory {
    pub fn now() -> Memory {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
        let field = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        Memory { shared: field("Shmem:"), unevictable: field("Unevictable:") }
    }

    /// Returns the memory after the kernel, and other programs, have released their memory.
    pub fn settled(before: Memory) -> Memory {
        for _ in 0..1200 {
            let now = Memory::now();
            if !now.is_more_than(before) {
                return now;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Memory::now()
    }

    /// Returns whether the growth exceeds the use of other programs. The scenarios make thousands of
    /// copies.
    pub fn is_more_than(self, before: Memory) -> bool {
        const TOLERANCE: u64 = 4 << 10;
        self.shared > before.shared + TOLERANCE || self.unevictable > before.unevictable + TOLERANCE
    }
}

/// Prints the table of all scenarios.
pub fn print(rows: impl Iterator<Item = Row>) {
    const COLUMNS: [(&str, Outcome); 9] = [
        ("mounted", Outcome::Mounted),
        ("without verity", Outcome::MountedWithoutVerity),
        ("status 1", Outcome::Failed(1)),
        ("status 2", Outcome::Failed(2)),
        ("status 32", Outcome::Failed(32)),
        ("died", Outcome::Died),
        ("retried", Outcome::Retried),
        ("killed", Outcome::KilledUnmounted),
        ("killed, mounted", Outcome::KilledMounted),
    ];
    print!("| scenario | calls | injections |");
    COLUMNS.iter().for_each(|(title, _)| print!(" {title} |"));
    println!("\n|---|---|---|{}", "---|".repeat(COLUMNS.len()));
    let mut total = Row { scenario: "all", ..Row::default() };
    let line = |row: &Row| {
        print!("| {} | {} | {} |", row.scenario, row.calls, row.injections);
        for (_, outcome) in &COLUMNS {
            print!(" {} |", row.outcomes.get(outcome).unwrap_or(&0));
        }
        println!();
    };
    for row in rows {
        line(&row);
        total.calls += row.calls;
        total.injections += row.injections;
        total.not_reached += row.not_reached;
        for (outcome, count) in row.outcomes {
            *total.outcomes.entry(outcome).or_default() += count;
        }
    }
    line(&total);
    println!("{} runs did not reach the call", total.not_reached);
}
