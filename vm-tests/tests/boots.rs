//! Boots a real Debian from an image, several times. Each test needs one or more boots.

use libtest_mimic::{Arguments, Trial};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use vm_tests::Error;
use vm_tests::boots::{self, State, Systems};
use vm_tests::host::Lab;
use vm_tests::host::suite::{self, Part};

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("boots: {error}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode, Error> {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert_with(suite::jobs);
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the directory is in the target directory of cargo");
    let state = match arguments.list {
        true => None,
        false => Some(Arc::new(State::new(Systems::new(Lab::new(target)?)))),
    };
    let trials = boots::tests(Part::from_environment()?).map(|test| {
        let state = state.clone();
        Trial::test(test.name, move || {
            let state = state.expect("a list runs no test");
            let started = Instant::now();
            let result = (test.run)(&state).map_err(|error| error.to_string().into());
            eprintln!("boots: {}: {} s", test.name, started.elapsed().as_secs());
            result
        })
    });
    let started = Instant::now();
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    eprintln!("boots: the run took {} s", started.elapsed().as_secs());
    Ok(conclusion.exit_code())
}
