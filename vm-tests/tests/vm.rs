//! Runs every scenario on every kernel, each as its own test.

use libtest_mimic::{Arguments, Failed, Trial};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use vm_tests::host::Lab;
use vm_tests::host::kernels::Wanted;
use vm_tests::host::suite::{Part, Session, Suite};
use vm_tests::{Error, guest};

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("vm-tests: {error}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode, Error> {
    let arguments = Arguments::from_args();
    let mut suite = Suite::new(&Wanted::from_environment()?, guest::scenarios())?;
    let (part, all) = (Part::from_environment()?, suite.tests.len());
    suite.keep(part);
    if part != Part::All {
        eprintln!("vm-tests: SEALMOUNT_TESTS selects {} of {all} tests", suite.tests.len());
    }
    let session = if suite.tests.iter().any(|test| is_selected(&arguments, &test.name)) {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .parent()
            .expect("the directory is in the target directory of cargo");
        let lab = Arc::new(Lab::new(target)?);
        Some(Arc::new(suite.start(lab, |name| is_selected(&arguments, name))))
    } else {
        None
    };

    let trial = |name: &String| {
        let (name, session) = (name.clone(), session.clone());
        Trial::test(name.clone(), move || {
            verdict(&session.expect("only selected tests run"), &name)
        })
    };
    let trials = suite.tests.iter().map(|test| trial(&test.name)).collect();
    let started = Instant::now();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // All verdicts are known, but the last machine may still be running, and its files may still exist.
    if let Some(session) = session {
        session.finish();
        eprintln!("vm-tests: the run took {} s", started.elapsed().as_secs());
    }
    Ok(conclusion.exit_code())
}

fn verdict(session: &Session, name: &str) -> Result<(), Failed> {
    session.verdict(name).map_err(|failure| {
        let log = session.lab.kept("log");
        let console = match failure.log.trim() {
            "" => String::new(),
            log => format!("\n--- console\n{log}\n---"),
        };
        Failed::from(format!(
            "{}{console}\n(complete consoles: {})",
            failure.message,
            log.display()
        ))
    })
}

/// Returns whether libtest-mimic will run a test. Its selection has no interface, and a machine must
/// run only the selected tests.
fn is_selected(arguments: &Arguments, name: &str) -> bool {
    let matches = |pattern: &String| match arguments.exact {
        true => name == pattern,
        false => name.contains(pattern.as_str()),
    };
    let listed_only = arguments.list || arguments.ignored;
    !listed_only
        && arguments.filter.as_ref().is_none_or(matches)
        && !arguments.skip.iter().any(matches)
}
