//! That what goes wrong in a machine is reported as what it is. Boots one kernel, several times.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use vm_tests::guest::FAULTS;
use vm_tests::host::Lab;
use vm_tests::host::kernels::{Kernel, Wanted};
use vm_tests::host::qemu::{self, Failure, Verdict};
use vm_tests::machine::Machine;
use vm_tests::scenario::Scenario;

fn lab() -> Lab {
    Lab::new(Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()).unwrap()
}

/// Runs all scenarios of a machine.
fn verdicts(lab: &Lab, machine: &str) -> HashMap<&'static str, Verdict> {
    let kernel = Wanted::from_environment()[0].get(lab).unwrap();
    let scenarios: Vec<&Scenario> =
        FAULTS.iter().filter(|fault| fault.machine.name == machine).collect();
    let mut verdicts = HashMap::new();
    qemu::run(lab, &kernel, scenarios[0].machine, &scenarios, |number, verdict| {
        let name = scenarios[number].name;
        assert!(verdicts.insert(name, verdict).is_none(), "{name} has two verdicts");
    });
    assert_eq!(verdicts.len(), scenarios.len());
    verdicts
}

#[track_caller]
fn assert_says(verdicts: &HashMap<&str, Verdict>, scenario: &str, expected: &str) {
    let failure = verdicts[scenario].clone().unwrap_err();
    assert!(failure.message.contains(expected), "{scenario}: {failure:?}");
}

#[test]
fn what_a_machine_survives_is_the_scenarios_own() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-survives");
    assert_says(&verdicts, "fails", "a message\nof two lines, with \u{201c}quotes\u{201d}");
    assert_says(&verdicts, "panics", "a panic of the scenario");
    assert!(verdicts["panics"].clone().unwrap_err().log.contains("vm-init: scenario panics"));
    assert_says(&verdicts, "exits", "ended without a result (exit status: 0)");
    assert_says(&verdicts, "is_killed", "ended without a result (signal: 6");
    assert_says(&verdicts, "sleeps", "still running after its time limit of 3s");
    assert_says(&verdicts, "writes_on_the_channel", "the forged result did not count");
    assert_eq!(verdicts["leaves_a_mount"], Ok(()));
    assert_eq!(verdicts["still_works"], Ok(()));
}

#[test]
fn a_kernel_panic() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-panics");
    assert_says(&verdicts, "panics_the_kernel", "Kernel panic");
    assert_says(&verdicts, "after_the_panic", "not run: the machine was lost in panics_the_kernel");
}

#[test]
fn a_hang() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-halts");
    assert_says(&verdicts, "halts", "the machine hung, nothing came for 13s");
    assert_shows_processors(&verdicts["halts"].clone().unwrap_err().log);
}

#[track_caller]
fn assert_shows_processors(log: &str) {
    for words in ["--- processors when it hung", "CPU#0", "CPU#1", "RIP="] {
        assert!(log.contains(words), "{words} is not in {log}");
    }
}

/// As long as the processors are not halted for good, the kernel itself tells of them.
#[track_caller]
fn assert_shows_what_kernel_does(log: &str) {
    assert_shows_processors(log);
    for words in ["Kernel panic - not syncing: NMI", "Call Trace"] {
        assert!(log.contains(words), "{words} is not in {log}");
    }
}

#[test]
fn a_hang_while_booting() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-says-nothing");
    let words =
        "did not get ready: the machine hung, nothing came for 10s, twice. The first time: ";
    assert_says(&verdicts, "says_nothing", words);
    let Failure { message, log } = verdicts["says_nothing"].clone().unwrap_err();
    assert_shows_what_kernel_does(&log);
    let (_, first) = message.split_once("The first time: ").unwrap();
    assert_shows_what_kernel_does(&fs::read_to_string(first).unwrap());
}

#[test]
fn a_kernel_panic_after_the_last_result() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-panics-at-the-end");
    assert_says(&verdicts, "panics_at_the_end", "passed\nand then: Kernel panic");
}

#[test]
fn a_hang_after_the_last_result() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-halts-at-the-end");
    assert_says(
        &verdicts,
        "halts_at_the_end",
        "passed\nand then: the machine was not off after 3s",
    );
    assert_shows_processors(&verdicts["halts_at_the_end"].clone().unwrap_err().log);
}

#[test]
fn a_machine_that_switches_itself_off() {
    let lab = lab();
    assert_says(
        &verdicts(&lab, "fault-switches-off"),
        "switches_off",
        "no result: the machine switched itself off",
    );
}

#[test]
fn a_machine_that_does_not_get_ready() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-has-no-init");
    assert_says(&verdicts, "has_no_init", "did not get ready: cannot execute /no/such/program");
}

#[test]
fn a_kernel_that_qemu_refuses() {
    let lab = lab();
    let dir = lab.temporary("not-a-kernel");
    fs::create_dir(&dir).unwrap();
    // Enough of a header for us, and not for QEMU.
    let mut image = vec![0; 0x400];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x20e..0x210].copy_from_slice(&0x80u16.to_le_bytes());
    image[0x280..0x284].copy_from_slice(b"0.0 ");
    fs::write(dir.join("bzImage"), image).unwrap();

    let kernel = Kernel::in_directory(&dir).unwrap();
    let mut verdict = None;
    let fault = &FAULTS[0];
    qemu::run(&lab, &kernel, fault.machine, &[fault], |_, given| verdict = Some(given));
    let message = verdict.unwrap().unwrap_err().message;
    assert!(message.contains("QEMU ended (exit status: 1)"), "{message}");
    assert!(!message.contains("twice"), "{message}");
}

/// Runs a scenario in a machine whose QEMU aborts at its first starts: `early`, before vm-init is
/// ready, or `late`, while the scenario runs. Returns the verdict and the number of aborts to come.
fn verdict_where_qemu_aborts(
    machine: &'static str,
    moments: &[&str],
    scenario: &str,
) -> (Verdict, usize) {
    let mut lab = lab();
    lab.qemu = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/aborting-qemu");
    let file = |(number, moment)| lab.temporary(&format!("abort-{number}-{moment}"));
    let files: Vec<_> = moments.iter().enumerate().map(file).collect();
    files.iter().for_each(|file| fs::write(file, "").unwrap());

    let kernel = Wanted::from_environment()[0].get(&lab).unwrap();
    let machine = Machine { name: machine, ..Machine::BARE };
    let scenario = FAULTS.iter().find(|fault| fault.name == scenario).unwrap();
    let mut verdict = None;
    qemu::run(&lab, &kernel, &machine, &[scenario], |_, given| verdict = Some(given));
    (verdict.unwrap(), files.iter().filter(|file| file.exists()).count())
}

#[test]
fn qemu_that_aborts_once_is_started_again() {
    let outcome = verdict_where_qemu_aborts("fault-aborts-once", &["early"], "still_works");
    assert_eq!(outcome, (Ok(()), 0));
}

#[test]
fn qemu_that_aborts_twice_fails() {
    let moments = ["early"; 3];
    let (verdict, left) = verdict_where_qemu_aborts("fault-aborts-twice", &moments, "still_works");
    let message = verdict.unwrap_err().message;
    let words = "did not get ready: QEMU ended (signal: 6 (SIGABRT)): an assertion of aborting-qemu, \
                 twice. The first time: ";
    assert!(message.contains(words), "{message}");
    assert_eq!(left, 1);
}

#[test]
fn qemu_that_aborts_in_a_scenario_fails() {
    let moments = ["late", "early"];
    let (verdict, left) = verdict_where_qemu_aborts("fault-aborts-late", &moments, "sleeps");
    let message = verdict.unwrap_err().message;
    assert!(message.contains("no result: QEMU ended (signal: 6 (SIGABRT))"), "{message}");
    assert_eq!(left, 1);
}
