//! Runs the scenarios: each one without a fault, then with each fault.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use test_support::tracer::{self, Action, Call, Decision, End};
use test_support::{mount_at, umount};

use super::fault::{Fault, Piece, Recorded};
use super::outcome::{self, Memory, Outcome, Row, Witness};
use super::scenarios::{Expected, Place, REST, SCENARIOS, Scenario, is_measurement};

/// A run without a fault needs some milliseconds. A run that tries a thousand loop devices needs
/// seconds. On an emulated CPU, 5000 retries of a call need more than a minute.
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// With threads, not every run makes the same calls as the recorded run. At most this percentage of the
/// runs may miss the call that should fail.
const NOT_REACHED_MAX: usize = 3;

/// Runs the suite with the arguments and environment variables of the process.
pub fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // The runs wait for the kernel about half of the time.
    arguments.test_threads.get_or_insert(4);
    let all = match std::env::var("SEALMOUNT_FAULTS") {
        Err(_) => false,
        Ok(value) if value == "all" => true,
        Ok(value) => panic!("SEALMOUNT_FAULTS={value}: the only valid value is \"all\""),
    };
    for name in REST {
        assert!(SCENARIOS.iter().any(|scenario| scenario.name == *name), "no scenario {name}");
    }
    let part = std::env::var("SEALMOUNT_TESTS").unwrap_or("all".into());
    let is_selected = |number: &usize| {
        let is_rest = REST.contains(&SCENARIOS[*number].name);
        match part.as_str() {
            "all" | "ci" => true,
            "quick" => !is_rest,
            "rest" => is_rest,
            part => panic!("SEALMOUNT_TESTS={part}: must be all, ci, quick or rest"),
        }
    };
    let rows = Arc::new(Mutex::new(Vec::new()));
    let trial = |number: usize| {
        let rows = rows.clone();
        let name = SCENARIOS[number].name.replace([',', ' '], "_").replace("__", "_");
        Trial::test(name, move || {
            // A new thread has its own mount namespace, and waits only for its own children.
            let run = move || run(&SCENARIOS[number], all);
            let Some((row, problems)) = std::thread::spawn(run).join().unwrap() else {
                return Ok(());
            };
            rows.lock().unwrap().push((number, row));
            match problems.is_empty() {
                true => Ok(()),
                false => Err(Failed::from(problems.join("\n"))),
            }
        })
    };
    let memory = Memory::now();
    let trials = (0..SCENARIOS.len()).filter(is_selected).map(trial).collect();
    let started = Instant::now();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let mut rows = std::mem::take(&mut *rows.lock().unwrap());
    rows.sort_unstable_by_key(|(number, _)| *number);
    outcome::print(rows.into_iter().map(|(_, row)| row));
    println!("{} s", started.elapsed().as_secs());
    let after = Memory::settled(memory);
    println!("memory of the system: {memory:?} before, {after:?} after");
    if after.is_more_than(memory) {
        println!("FAILED: memory is left");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// Runs a scenario with every fault. Returns `None` if [`test_support::Sandbox`] decides to skip the
/// test.
fn run(scenario: &Scenario, all: bool) -> Option<(Row, Vec<String>)> {
    let place = Place::new(scenario)?;
    let arguments = (scenario.arguments)(&place);
    let mut witness = Witness::new(scenario, &place);
    // The first mount of a new upper layer shows other options, so the recorded run is the second.
    witness.prepare();
    trace(&place, &arguments, &mut |call| scenario.answer(call).into());
    if mount_at(&place.mount_point()).is_some() {
        umount(&place.mount_point());
    }
    let mut record: Vec<Recorded> = Vec::new();
    witness.prepare();
    let (end, stderr) = trace(&place, &arguments, &mut |call| {
        record.push(Recorded::new(call, &arguments, record.last()));
        scenario.answer(call).into()
    });
    witness.store_reference();
    let mut row = Row { scenario: scenario.name, calls: record.len(), ..Row::default() };
    let last = record.last().expect("a program makes system calls");
    if let Err(problem) = witness.judge(Fault::None, last, end, &stderr) {
        return Some((row, vec![format!("without a fault: {problem}: {end:?} {stderr:?}")]));
    }
    // The number of yields of a waiting thread differs from run to run.
    record.retain(|recorded| recorded.call.number != libc::SYS_sched_yield || recorded.nth == 0);
    mark_many(&mut record, scenario.name.starts_with("check="));
    let mut problems = Vec::new();
    for (recorded, fault) in faults(&record, scenario, &arguments[0], all) {
        let mut injected = 0;
        let mut is_measured = true;
        witness.prepare();
        let (end, stderr) = trace(&place, &arguments, &mut |call| {
            if let Some(problem) = absolute_file(call) {
                problems.push(format!("{}: {fault:?}: {problem}", scenario.name));
            }
            match fault.action(call, &mut injected) {
                Action::Proceed => scenario.answer(call).into(),
                action => {
                    let is_failure = matches!(action, Action::Fail(_));
                    is_measured &= !(is_failure && is_measurement(call, &arguments[0]));
                    // Tracing the calls after the fault would double the time of the run.
                    let is_last = !all && scenario.kernel.is_none() && fault.is_single();
                    Decision { action, is_last }
                }
            }
        });
        row.injections += injected.min(1);
        match witness.judge(fault, recorded, end, &stderr) {
            Ok(Outcome::Mounted) if scenario.outcome == Expected::Measured && !is_measured => {
                problems.push(format!(
                    "{}: {fault:?}: mounted without a verified digest",
                    scenario.name
                ));
            }
            Ok(_) if injected == 0 => row.not_reached += 1,
            Ok(outcome) => *row.outcomes.entry(outcome).or_default() += 1,
            Err(problem) => problems.push(format!(
                "{}: {} #{}, {fault:?}: {problem}: {end:?} {stderr:?}",
                scenario.name, recorded.call.name, recorded.nth
            )),
        }
    }
    if row.not_reached * 100 > row.injections * NOT_REACHED_MAX {
        problems.push(format!(
            "{}: {} runs did not reach the call that should fail, {} runs did",
            scenario.name, row.not_reached, row.injections
        ));
    }
    Some((row, problems))
}

fn trace(
    place: &Place,
    arguments: &[String],
    decide: &mut dyn FnMut(&Call) -> Decision,
) -> (End, String) {
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", r#"kill -STOP $$; exec "$@""#, "sh", env!("CARGO_BIN_EXE_mount-composefs")])
        .args(arguments)
        .current_dir(place.sandbox.path(""));
    tracer::run(command, TIME_LIMIT, decide)
}

/// The calls of a check for each file and each object.
const OF_EACH_OBJECT: [i64; 9] = [
    libc::SYS_close,
    libc::SYS_fchdir,
    libc::SYS_fstat,
    libc::SYS_getdents64,
    libc::SYS_lgetxattr,
    libc::SYS_newfstatat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_statx,
];

/// The calls whose number depends on the threads that share the work of a check.
const OF_THREADS: [i64; 5] =
    [libc::SYS_brk, libc::SYS_futex, libc::SYS_madvise, libc::SYS_mprotect, libc::SYS_munmap];

/// Marks calls in a row of similar calls, except the first two and the last. Such rows are whiteouts
/// for 256 names, and reads of a file of /proc in pieces. Also marks the calls of a check for most files of
/// an image, and most calls for its threads.
fn mark_many(record: &mut [Recorded], checks_objects: bool) {
    for row in record.chunk_by_mut(|one, other| one.call.number == other.call.number) {
        if matches!(row[0].call.number, libc::SYS_mknodat | libc::SYS_read) {
            let last = row.len() - 1;
            row.iter_mut().take(last).skip(2).for_each(|recorded| recorded.is_one_of_many = true);
        }
    }
    for recorded in record.iter_mut().filter(|_| checks_objects) {
        let number = recorded.call.number;
        recorded.is_one_of_many |= OF_EACH_OBJECT.contains(&number) && recorded.nth >= 8
            || OF_THREADS.contains(&number) && recorded.nth >= 2;
    }
}

/// Returns the faults to try, each with its call. A short run leaves out faults that differ little:
///
/// - The start of the helper and its queries of the machine are the same in every scenario, so one
///   scenario has them.
/// - Some calls represent a row of similar calls.
/// - No process handles SIGTERM, so SIGKILL represents SIGTERM.
fn faults<'a>(
    record: &'a [Recorded],
    scenario: &Scenario,
    image: &str,
    all: bool,
) -> Vec<(&'a Recorded, Fault)> {
    let is_first = scenario.name == "plain";
    let is_first_copy = scenario.name == "memfd";
    // Failing the call for each byte of a megabyte would need minutes.
    let is_small = fs::metadata(image).unwrap().len() < 1 << 20;
    let mut faults = Vec::new();
    let mut seen = HashSet::new();
    for recorded in record {
        let is_done_elsewhere = recorded.is_start && !is_first
            || recorded.is_machine_query && !is_first_copy
            || recorded.is_one_of_many
            || recorded.is_debug_check;
        if is_done_elsewhere && !all {
            continue;
        }
        let (call, nth) = (recorded.call, recorded.nth);
        let number = call.number;
        faults.push((recorded, Fault::Signal { number, nth, signal: Signal::SIGKILL }));
        if all || is_first {
            faults.push((recorded, Fault::Signal { number, nth, signal: Signal::SIGTERM }));
        }
        if recorded.is_debug_check || recorded.call.cannot_fail() {
            continue;
        }
        for errno in call.errnos(all) {
            faults.push((recorded, Fault::Errno { number, nth, errno }));
        }
        if call.has_length() {
            for length in BTreeSet::from([0, 1, recorded.length / 2]) {
                faults.push((recorded, Fault::Short { number, nth, length }));
            }
        }
        let is_first_of_kind = !recorded.may_die() && seen.insert(number);
        if call.has_length() && !recorded.is_start && (all || is_first_of_kind) {
            let mut pieces = vec![Piece::Half];
            if recorded.length > 1000 {
                pieces.push(Piece::Bytes(1000));
            }
            if (all || is_first_copy) && is_first_of_kind && is_small && recorded.length > 1 {
                pieces.push(Piece::Bytes(1));
            }
            let short = |piece| (recorded, Fault::ShortForEver { number, nth, piece });
            faults.extend(pieces.into_iter().map(short));
        }
        if !recorded.may_die() && (all || is_first_of_kind) {
            let busy = call.checked.contains(&Errno::EBUSY).then_some(Errno::EBUSY);
            for errno in [Errno::EINTR, Errno::EAGAIN].into_iter().chain(busy) {
                faults.push((recorded, Fault::ForEver { number, nth, errno }));
            }
        }
    }
    faults
}

/// Returns a problem if a call makes a file by an absolute path, because the file could remain there.
/// Each run checks only the directories that the helper knows.
fn absolute_file(call: &Call) -> Option<String> {
    let makes_name = match call.number {
        libc::SYS_openat => call.arguments[2] & libc::O_CREAT as u64 != 0,
        libc::SYS_mkdirat | libc::SYS_mknodat => {
            // The directory of the records, in the /run of the sandbox.
            call.text(1).is_none_or(|path| path != "/run/sealmount")
        }
        _ => false,
    };
    let path = makes_name.then(|| call.text(1)).flatten().filter(|path| path.starts_with('/'))?;
    Some(format!("the helper makes a file by an absolute path: {path}"))
}
