//! Checks that the harness reports each kind of failure in a machine. Boots one kernel several times.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use vm_tests::arch::Arch;
use vm_tests::guest::FAULTS;
use vm_tests::host::Lab;
use vm_tests::host::kernels::{Kernel, Wanted};
use vm_tests::host::qemu::{self, Failure, Verdict};
use vm_tests::machine::Machine;
use vm_tests::scenario::Scenario;

fn lab() -> Lab {
    Lab::new(Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()).unwrap()
}

/// Returns the first kernel of a run.
fn kernel(lab: &Lab) -> Kernel {
    Wanted::from_environment().unwrap()[0].get(lab).unwrap()
}

/// Runs all scenarios of a machine and returns their verdicts.
fn verdicts(lab: &Lab, machine: &str) -> HashMap<&'static str, Verdict> {
    let kernel = kernel(lab);
    let scenarios: Vec<&Scenario> =
        FAULTS.iter().filter(|fault| fault.machine.name == machine).collect();
    let mut verdicts = HashMap::new();
    qemu::run(lab, &kernel, scenarios[0].machine, &scenarios, |number, verdict| {
        let name = scenarios[number].name;
        assert!(verdicts.insert(name, verdict).is_none(), "the scenario {name} has two verdicts");
    });
    assert_eq!(verdicts.len(), scenarios.len());
    verdicts
}

#[track_caller]
fn assert_reports(verdicts: &HashMap<&str, Verdict>, scenario: &str, expected: &str) {
    let failure = verdicts[scenario].clone().unwrap_err();
    assert!(failure.message.contains(expected), "{scenario}: {failure:?}");
}

#[test]
fn failed_scenario_leaves_machine_running() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-survives");
    assert_reports(&verdicts, "fails", "a message\nof two lines, with \u{201c}quotes\u{201d}");
    assert_reports(&verdicts, "panics", "a panic of the scenario");
    assert!(verdicts["panics"].clone().unwrap_err().log.contains("vm-init: scenario panics"));
    assert_reports(&verdicts, "exits", "ended without a result (exit status: 0)");
    assert_reports(&verdicts, "is_killed", "ended without a result (signal: 6");
    assert_reports(&verdicts, "sleeps", "exceeded its time limit of 3s");
    assert_reports(&verdicts, "writes_on_the_channel", "the host ignored the forged result");
    assert_eq!(verdicts["leaves_a_mount"], Ok(()));
    assert_eq!(verdicts["still_works"], Ok(()));
}

#[test]
fn kernel_panic_is_reported() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-panics");
    assert_reports(&verdicts, "panics_the_kernel", "Kernel panic");
    assert_reports(
        &verdicts,
        "after_the_panic",
        "not run: the machine was lost in panics_the_kernel",
    );
}

#[test]
fn hung_machine_is_reported_with_cpu_state() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-halts");
    assert_reports(&verdicts, "halts", "the machine hung: no frame for 13s");
    assert_shows_cpus(kernel(&lab).arch, &verdicts["halts"].clone().unwrap_err().log);
}

#[track_caller]
fn assert_shows_cpus(arch: &Arch, log: &str) {
    let header = "--- CPU state when the machine hung";
    for words in [header, "CPU#0", "CPU#1", arch.program_counter] {
        assert!(log.contains(words), "the log lacks {words:?}: {log}");
    }
    let is_vector = |line: &&str| arch.vector_registers.iter().any(|name| line.starts_with(name));
    let state = log.split_once(header).map_or("", |(_, state)| state);
    assert_eq!(state.lines().find(is_vector), None, "{log}");
}

/// Checks for the call trace, which the kernel prints at an NMI while its CPUs are not halted for good.
#[track_caller]
fn assert_shows_kernel_trace(arch: &Arch, log: &str) {
    assert_shows_cpus(arch, log);
    let trace = ["Kernel panic - not syncing: NMI", "Call Trace"];
    for words in trace.iter().filter(|_| arch.has_nmi) {
        assert!(log.contains(words), "the log lacks {words:?}: {log}");
    }
}

#[test]
fn hang_during_boot_reports_kernel_trace() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-says-nothing");
    let words = "did not get ready: the machine hung: no frame for 10s, twice. The first time: ";
    assert_reports(&verdicts, "says_nothing", words);
    let Failure { message, log } = verdicts["says_nothing"].clone().unwrap_err();
    let arch = kernel(&lab).arch;
    assert_shows_kernel_trace(arch, &log);
    let (_, first) = message.split_once("The first time: ").unwrap();
    assert_shows_kernel_trace(arch, &fs::read_to_string(first).unwrap());
}

#[test]
fn kernel_panic_after_last_result_is_reported() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-panics-at-the-end");
    assert_reports(&verdicts, "panics_at_the_end", "passed\nthen: Kernel panic");
}

#[test]
fn hang_after_last_result_is_reported() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-halts-at-the-end");
    assert_reports(&verdicts, "halts_at_the_end", "passed\nthen: the machine was not off after 3s");
    let failure = verdicts["halts_at_the_end"].clone().unwrap_err();
    assert_shows_cpus(kernel(&lab).arch, &failure.log);
}

#[test]
fn machine_switching_itself_off_is_reported() {
    let lab = lab();
    assert_reports(
        &verdicts(&lab, "fault-switches-off"),
        "switches_off",
        "no result: the machine switched itself off",
    );
}

#[test]
fn machine_without_init_is_reported() {
    let lab = lab();
    let verdicts = verdicts(&lab, "fault-has-no-init");
    assert_reports(&verdicts, "has_no_init", "did not get ready: cannot execute /no/such/program");
}

#[test]
fn kernel_rejected_by_qemu_is_reported() {
    let lab = lab();
    let dir = lab.temporary("not-a-kernel");
    fs::create_dir(&dir).unwrap();
    // kernels.rs accepts this header, and QEMU rejects it.
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
/// ready, or `late`, while the scenario runs. Returns the verdict and the number of remaining aborts.
fn verdict_where_qemu_aborts(
    machine: &'static str,
    moments: &[&str],
    scenario: &str,
) -> (Verdict, usize) {
    let mut lab = lab();
    lab.wrapper = Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/aborting-qemu"));
    let file = |(number, moment)| lab.temporary(&format!("abort-{number}-{moment}"));
    let files: Vec<_> = moments.iter().enumerate().map(file).collect();
    files.iter().for_each(|file| fs::write(file, "").unwrap());

    let kernel = kernel(&lab);
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
