//! Every system call of the helper made to fail, in every way; and the helper killed before each.
//! docs/faults.md says what is injected, and what may come of it.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("tests/faults knows the registers of x86_64 alone: leave it out with --lib --bins");

mod calls;
mod fault;
mod outcome;
mod scenarios;

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

use fault::{Fault, Piece, Recorded};
use outcome::{Memory, Outcome, Row, Witness};
use scenarios::{Expected, Place, SCENARIOS, Scenario, is_measurement};

/// A run without a fault takes some milliseconds; one that tries a thousand loop devices, seconds.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// Where there are threads, not every run makes the calls of the one that was recorded. In so many of a
/// hundred.
const NOT_REACHED_MAX: usize = 3;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They wait for the kernel about half of the time.
    arguments.test_threads.get_or_insert(4);
    let all = match std::env::var("SEALMOUNT_FAULTS") {
        Err(_) => false,
        Ok(value) if value == "all" => true,
        Ok(value) => panic!("SEALMOUNT_FAULTS={value}: only \"all\" has a meaning"),
    };
    let rows = Arc::new(Mutex::new(Vec::new()));
    let trial = |number: usize| {
        let rows = rows.clone();
        let name = SCENARIOS[number].name.replace([',', ' '], "_").replace("__", "_");
        Trial::test(name, move || {
            // A thread, and its mount namespace, of its own; its children are what it waits for.
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
    let trials = (0..SCENARIOS.len()).map(trial).collect();
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

/// Runs a scenario with every fault. `None`: skipped, which [`test_support::Sandbox`] decides.
fn run(scenario: &Scenario, all: bool) -> Option<(Row, Vec<String>)> {
    let place = Place::new(scenario)?;
    let arguments = (scenario.arguments)(&place);
    let mut witness = Witness::new(scenario, &place);
    // What overlayfs does to an upper layer that is new shows in the options.
    trace(&place, &arguments, &mut |call| scenario.answer(call).into());
    if mount_at(&place.mount_point()).is_some() {
        umount(&place.mount_point());
    }
    let mut record: Vec<Recorded> = Vec::new();
    let (end, stderr) = trace(&place, &arguments, &mut |call| {
        record.push(Recorded::new(call, &arguments, record.last()));
        scenario.answer(call).into()
    });
    witness.see_whole();
    let mut row = Row { scenario: scenario.name, calls: record.len(), ..Row::default() };
    let last = record.last().expect("a program makes system calls");
    if let Err(problem) = witness.judge(Fault::None, last, end, &stderr) {
        return Some((row, vec![format!("without a fault: {problem}: {end:?} {stderr:?}")]));
    }
    // How often a thread yields while it waits for another differs from run to run.
    record.retain(|recorded| recorded.call.number != libc::SYS_sched_yield || recorded.nth == 0);
    mark_many(&mut record);
    let mut problems = Vec::new();
    for (recorded, fault) in faults(&record, scenario, &arguments[0], all) {
        let mut injected = 0;
        let mut is_measured = true;
        let (end, stderr) = trace(&place, &arguments, &mut |call| {
            if let Some(problem) = names_a_file(call) {
                problems.push(format!("{}: {fault:?}: {problem}", scenario.name));
            }
            match fault.action(call, &mut injected) {
                Action::Proceed => scenario.answer(call).into(),
                action => {
                    let is_failure = matches!(action, Action::Fail(_));
                    is_measured &= !(is_failure && is_measurement(call, &arguments[0]));
                    // Half of the time goes into looking at what follows.
                    let is_last = !all && scenario.kernel.is_none() && fault.is_single();
                    Decision { action, is_last }
                }
            }
        });
        row.injections += injected.min(1);
        match witness.judge(fault, recorded, end, &stderr) {
            Ok(Outcome::Mounted) if scenario.outcome == Expected::Vouched && !is_measured => {
                problems.push(format!("{}: {fault:?}: nobody vouched for it", scenario.name));
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
            "{}: {} runs did not come to the call that was to fail, {} did",
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

/// A whiteout for each of 256 names, and a file of /proc in pieces: of such a row of calls, all but the
/// first two and the last are one of many.
fn mark_many(record: &mut [Recorded]) {
    for row in record.chunk_by_mut(|one, other| one.call.number == other.call.number) {
        if matches!(row[0].call.number, libc::SYS_mknodat | libc::SYS_read) {
            let last = row.len() - 1;
            row.iter_mut().take(last).skip(2).for_each(|recorded| recorded.is_one_of_many = true);
        }
    }
}

/// The faults to try, each with the call that it is for. A run that is not to take long does without
/// what differs little: how the helper starts, and how it looks at the machine, is the same in every
/// scenario, so one is enough; of a row of calls of one kind some are; SIGTERM, which nothing handles,
/// is as good as SIGKILL.
fn faults<'a>(
    record: &'a [Recorded],
    scenario: &Scenario,
    image: &str,
    all: bool,
) -> Vec<(&'a Recorded, Fault)> {
    let is_first = scenario.name == "plain";
    let is_first_copy = scenario.name == "memfd";
    // A call for each byte of a megabyte would take minutes.
    let is_small = fs::metadata(image).unwrap().len() < 1 << 20;
    let mut faults = Vec::new();
    let mut seen = HashSet::new();
    for recorded in record {
        let is_done_elsewhere = recorded.is_start && !is_first
            || recorded.is_about_machine && !is_first_copy
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
            let busy = call.looked_for.contains(&Errno::EBUSY).then_some(Errno::EBUSY);
            for errno in [Errno::EINTR, Errno::EAGAIN].into_iter().chain(busy) {
                faults.push((recorded, Fault::ForEver { number, nth, errno }));
            }
        }
    }
    faults
}

/// Whether a call makes a name where it could be left behind: by an absolute path. Of the others, the
/// directories that the helper knows are looked at after each run.
fn names_a_file(call: &Call) -> Option<String> {
    let makes_name = match call.number {
        libc::SYS_openat => call.arguments[2] & libc::O_CREAT as u64 != 0,
        libc::SYS_mkdirat | libc::SYS_mknodat => true,
        _ => false,
    };
    let path = makes_name.then(|| call.text(1)).flatten().filter(|path| path.starts_with('/'))?;
    Some(format!("a name is made by an absolute path: {path}"))
}
