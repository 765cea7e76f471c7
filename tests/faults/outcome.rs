//! What came of a run, whether it may, and what it left.

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

/// What may come of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Mounted, whole, as asked for.
    Mounted,
    /// `tryverity`, and the kernel said that it cannot: mounted without.
    MountedWithoutVerity,
    /// Nothing mounted, this exit status, and a message that says what failed.
    Refused(i32),
    /// Nothing mounted: the program could not be loaded, got no memory, or was given up by the C
    /// library.
    Died,
    /// Killed by the signal that was sent, and mounted as asked for.
    KilledMounted,
    /// Killed by the signal that was sent, and nothing mounted.
    KilledUnmounted,
    /// EINTR without end is retried without end; SIGTERM ended it.
    Retried,
}

/// What each message of the helper has one of: what was being done, or what is wrong with what.
const OPERATIONS: [&str; 17] = [
    ": cannot ",
    "object directory /",
    "mount point /",
    "upperdir /",
    "workdir /",
    "changed its size while it was read",
    "not a composefs image",
    "cut short",
    "too long",
    "a composefs header, and no EROFS superblock behind it",
    "no loop device to be had",
    "cannot be decompressed",
    "not a user namespace",
    "its fs-verity digest is",
    "cannot be checked against digest=",
    "verity cannot be enforced",
    "the kernel's overlayfs cannot enforce fs-verity",
];

/// Judges the runs of a scenario.
pub struct Witness<'a> {
    scenario: &'a Scenario,
    place: &'a Place,
    /// What was mounted before.
    mounts: Vec<Mount>,
    files: BTreeSet<String>,
    /// The mount as it is where nothing fails.
    whole: Option<Mount>,
}

impl<'a> Witness<'a> {
    /// To be called before anything runs.
    pub fn new(scenario: &'a Scenario, place: &'a Place) -> Witness<'a> {
        let mounts = mounts();
        Witness { scenario, place, mounts, files: files(place), whole: None }
    }

    /// To be called after the run without a fault, which is what the others are compared with.
    pub fn see_whole(&mut self) {
        self.whole = mount_at(&self.place.mount_point());
    }

    /// What came of a run; or why it may not. Unmounts what is mounted.
    pub fn judge(
        &self,
        fault: Fault,
        recorded: &Recorded,
        end: End,
        stderr: &str,
    ) -> Result<Outcome, String> {
        let mount = mount_at(&self.place.mount_point());
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
                _ if self.scenario.outcome == Expected::Refusal => Err("success".into()),
                None => Err("success, and no mount".into()),
                Some(_) if fault.is_passed_over(recorded) => Err("a failure passed over".into()),
                Some(true) => Ok(Outcome::Mounted),
                Some(false) => Ok(Outcome::MountedWithoutVerity),
            },
            (End::Killed(got), Fault::Signal { signal, .. }) if got == signal => {
                match (is_mounted, self.scenario.outcome) {
                    (true, Expected::Refusal) => Err("mounted".into()),
                    (true, _) => Ok(Outcome::KilledMounted),
                    (false, _) => Ok(Outcome::KilledUnmounted),
                }
            }
            (End::Killed(Signal::SIGTERM), Fault::ForEver { errno: Errno::EINTR, .. })
                if !is_mounted || self.scenario.outcome != Expected::Refusal =>
            {
                Ok(Outcome::Retried)
            }
            _ if is_mounted => Err("failure, and a mount".into()),
            _ if self.scenario.outcome != Expected::Refusal
                && fault.is_harmless()
                && !recorded.is_start =>
            {
                Err("failure, although nothing is wrong".into())
            }
            (End::Exited(status @ (1 | 2 | 32)), _) => message().map(|()| Outcome::Refused(status)),
            // The loader's status, and its end where it got no memory.
            (End::Exited(127) | End::Killed(Signal::SIGSEGV), _) if recorded.is_start => {
                Ok(Outcome::Died)
            }
            (End::Killed(Signal::SIGABRT), _) if recorded.may_die() => Ok(Outcome::Died),
            // Rust's runtime panics where it cannot start a thread half-way, or wait for it.
            (End::Exited(4), _)
                if recorded.may_die() && stderr.contains("library/std/src/sys/") =>
            {
                Ok(Outcome::Died)
            }
            (End::Killed(Signal::SIGTERM), Fault::ForEver { .. }) => {
                Err(format!("{FOR_EVER} attempts"))
            }
            _ => Err("not an end it may have".into()),
        }
    }

    /// Whether a mount is what was asked for; `false`: it is, without verity, which `tryverity` is
    /// where the kernel said that it cannot.
    fn check_mount(
        &self,
        mount: &Mount,
        fault: Fault,
        recorded: &Recorded,
    ) -> Result<bool, String> {
        let Some(whole) = &self.whole else { return Err(format!("mounted: {mount:?}")) };
        // The layers may have been given by other names.
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
            && fault.says_no_verity(recorded)
        {
            expected.remove(verity);
            has_verity = false;
        }
        if (&mount.fs_type, &mount.source, &found) != (&whole.fs_type, &whole.source, &expected) {
            return Err(format!("mounted is {mount:?}, not {whole:?}"));
        }
        let root = &mount.mount_point;
        let compared = catch_unwind(AssertUnwindSafe(|| match self.scenario.outcome {
            Expected::Mount => assert_is_manifest(root),
            Expected::Idmapped => assert_is_manifest_mapped(root, 100_000),
            _ if !has_verity => assert_is_manifest(root),
            // The objects do not have fs-verity, so what is not in the image cannot be read.
            _ => {
                let hello = fs::read_to_string(root.join("hello.txt")).unwrap();
                assert_eq!(hello, "hello from a composefs image\n");
                let object = fs::read(root.join("data/70000")).unwrap_err();
                assert_eq!(object.raw_os_error(), Some(libc::EIO));
            }
        }));
        compared.map_err(|_| "mounted is another tree".to_owned())?;
        Ok(has_verity)
    }

    /// No mount, no loop device, no file. Threads and children are gone: the tracer waits for them.
    fn check_nothing_left(&self) -> Result<(), String> {
        let mounts = mounts();
        if mounts != self.mounts {
            return Err(format!("mounts are left: {mounts:?}"));
        }
        let files = files(self.place);
        if files != self.files {
            return Err(format!("files are left: {files:?}, not {:?}", self.files));
        }
        // The kernel lets go of one a moment after its last use.
        for _ in 0..500 {
            if loop_devices(&self.place.mark).is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Err(format!("loop devices are left: {:?}", loop_devices(&self.place.mark)))
    }
}

/// What lies in the directories that the helper knows. What overlayfs makes in workdir stays there.
fn files(place: &Place) -> BTreeSet<String> {
    ["", "mnt", "upper", "empty"]
        .iter()
        .flat_map(|directory| fs::read_dir(place.sandbox.path(directory)).unwrap())
        .map(|entry| entry.unwrap().path().to_str().unwrap().to_owned())
        .collect()
}

impl Fault {
    /// An answer by which a kernel or a file system says that it has no fs-verity.
    fn says_no_verity(self, recorded: &Recorded) -> bool {
        let (Fault::Errno { errno, .. } | Fault::ForEver { errno, .. }) = self else {
            return false;
        };
        match recorded.call.number {
            libc::SYS_ioctl => matches!(errno, Errno::ENOTTY | Errno::EOPNOTSUPP),
            libc::SYS_fsconfig => {
                let is_for_verity = recorded.is_create || recorded.key.as_deref() == Some("verity");
                errno == Errno::EINVAL && is_for_verity
            }
            _ => false,
        }
    }

    /// Nothing may be mounted where this call failed.
    fn is_passed_over(self, recorded: &Recorded) -> bool {
        let Fault::Errno { errno, .. } = self else { return false };
        recorded.call.is_decisive() && !recorded.call.looked_for.contains(&errno)
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

/// Whether a message says what failed: a line of ours, and hints behind it.
fn check_message(fault: Fault, stderr: &str) -> Result<(), String> {
    // The message itself could not be written.
    if fault.is_of(libc::SYS_write) {
        return Ok(());
    }
    let lines = || stderr.lines().filter_map(|line| line.strip_prefix("mount.composefs: "));
    let last = lines().next_back().unwrap_or_default();
    match OPERATIONS.iter().any(|operation| format!(": {last}").contains(operation)) {
        true => Ok(()),
        false => Err("a message that does not say what failed".into()),
    }
}

/// A row of the table.
#[derive(Default)]
pub struct Row {
    pub scenario: &'static str,
    /// System calls of a run without a fault.
    pub calls: usize,
    /// Runs with a fault.
    pub injections: usize,
    /// Runs whose threads made fewer calls of that kind than the one recorded.
    pub not_reached: usize,
    pub outcomes: BTreeMap<Outcome, usize>,
}

/// What memory of the whole system no process has to itself, in KiB.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// What memfds take, and tmpfs.
    shared: u64,
    /// What a ramfs takes, and a locked memfd.
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

    /// Once the kernel has taken back what was given up, and other programs what they took meanwhile.
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

    /// By more than other programs come and go with. Thousands of copies were made.
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
        ("status 1", Outcome::Refused(1)),
        ("status 2", Outcome::Refused(2)),
        ("status 32", Outcome::Refused(32)),
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
    println!("{} runs did not come to the call", total.not_reached);
}
