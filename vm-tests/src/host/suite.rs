//! Selects the scenarios and kernels of a run, and boots the machines that they need.

use super::kernels::{Kernel, Wanted};
use super::lab::Lab;
use super::qemu::{self, Failure, Verdict};
use crate::Error;
use crate::machine::{Machine, Tier};
use crate::scenario::Scenario;
use std::collections::HashMap;
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::{self, JoinHandle};

/// One scenario on one kernel.
#[derive(Clone, Debug)]
pub struct Test {
    /// `KERNEL::SCENARIO`
    pub name: String,
    kernel: Arc<Shared>,
    scenario: &'static Scenario,
}

/// A kernel that the host gets when the first machine needs it. If that fails, all tests of the kernel
/// fail.
#[derive(Debug)]
struct Shared {
    wanted: Wanted,
    got: OnceLock<Result<Kernel, String>>,
}

impl Shared {
    fn get(&self, lab: &Lab) -> Result<&Kernel, String> {
        let get = || {
            let no_kernel =
                |error| format!("cannot get the kernel {}: {error}", self.wanted.name());
            self.wanted.get(lab).map_err(no_kernel)
        };
        self.got.get_or_init(get).as_ref().map_err(String::clone)
    }
}

/// The tests of a run.
#[derive(Debug)]
pub struct Suite {
    pub tests: Vec<Test>,
}

/// The part of the tests that a run covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    All,
    /// The scenarios of [`Tier::Quick`] and [`Tier::Ends`], on the first and the last kernel.
    Quick,
    /// The tests of [`Part::Quick`], the scenarios of [`Tier::Quick`] on every kernel, and all scenarios on the last
    /// kernel and on kernels with large pages.
    Ci,
    /// The tests of [`Part::Ci`] that are not in [`Part::Quick`].
    Rest,
}

impl Part {
    /// Returns the part that SEALMOUNT_TESTS names.
    pub fn from_environment() -> Result<Part, Error> {
        match env::var_os("SEALMOUNT_TESTS") {
            None => Ok(Part::All),
            Some(name) => Part::named(&name.to_string_lossy()),
        }
    }

    fn named(name: &str) -> Result<Part, Error> {
        match name {
            "all" => Ok(Part::All),
            "quick" => Ok(Part::Quick),
            "ci" => Ok(Part::Ci),
            "rest" => Ok(Part::Rest),
            _ => Err(format!("SEALMOUNT_TESTS={name}: must be all, ci, quick or rest").into()),
        }
    }
}

impl Suite {
    pub fn new<'a>(
        kernels: impl IntoIterator<Item = &'a Wanted>,
        scenarios: impl Iterator<Item = &'static Scenario> + Clone,
    ) -> Result<Suite, Error> {
        let mut names = Vec::new();
        let mut tests = Vec::new();
        for wanted in kernels {
            let kernel_name = wanted.name();
            if names.contains(&kernel_name) {
                return Err(format!(
                    "two kernels have the name {kernel_name}, so their tests would have equal names"
                )
                .into());
            }
            let kernel = Arc::new(Shared { wanted: wanted.clone(), got: OnceLock::new() });
            let scenarios = scenarios.clone().filter(|scenario| wanted.boots(scenario.machine));
            tests.extend(scenarios.map(|scenario| Test {
                name: format!("{kernel_name}::{}", scenario.name),
                kernel: kernel.clone(),
                scenario,
            }));
            names.push(kernel_name);
        }
        Ok(Suite { tests })
    }

    /// Keeps the tests of a part.
    pub fn keep(&mut self, part: Part) {
        let kernel = |test: Option<&Test>| test.map(|test| test.kernel.clone());
        let (first, last) = (kernel(self.tests.first()), kernel(self.tests.last()));
        self.tests.retain(|test| {
            let is =
                |end: &Option<_>| end.as_ref().is_some_and(|end| Arc::ptr_eq(end, &test.kernel));
            let tier = test.scenario.machine.tier;
            let is_end = is(&first) || is(&last);
            let is_quick = is_end && tier != Tier::Ci;
            let has_large_pages = matches!(test.kernel.wanted, Wanted::LargePages(_));
            let is_ci = is(&last) || has_large_pages || is_quick || tier == Tier::Quick;
            match part {
                Part::All => true,
                Part::Quick => is_quick,
                Part::Ci => is_ci,
                Part::Rest => is_ci && !is_quick,
            }
        });
    }

    /// Runs the selected tests in new threads. Kernels and machines start in the order of the tests.
    pub fn start(&self, lab: Arc<Lab>, selected: impl Fn(&str) -> bool) -> Session {
        let mut boots: Vec<Boot> = Vec::new();
        for test in self.tests.iter().filter(|test| selected(&test.name)) {
            match boots.iter_mut().find(|boot| boot.suits(test)) {
                Some(boot) => boot.tests.push(test.clone()),
                None => {
                    boots.push(Boot { machine: test.scenario.machine, tests: vec![test.clone()] })
                }
            }
        }
        let boots = Arc::new(Mutex::new(boots.into_iter()));
        let verdicts = Arc::new(Verdicts::default());
        let work = |_| {
            let (boots, lab, verdicts) = (boots.clone(), lab.clone(), verdicts.clone());
            // QEMU dies with the thread that started it, so each thread waits for its own machines.
            thread::spawn(move || {
                while let Some(boot) =
                    { boots.lock().expect("no thread panics while it takes a boot").next() }
                {
                    // The functions of a machine description may panic. Each of its tests still needs a
                    // verdict.
                    if catch_unwind(AssertUnwindSafe(|| boot.run(&lab, &verdicts))).is_err() {
                        boot.fail(
                            &verdicts,
                            "the host side of this machine panicked; see the message above",
                        );
                    }
                }
            })
        };
        let threads = Mutex::new((0..jobs()).map(work).collect());
        Session { lab, verdicts, threads }
    }
}

/// Returns the number of machines to run at the same time. One machine per CPU is enough: a machine has
/// two CPUs, but rarely uses both.
pub fn jobs() -> usize {
    let configured = env::var("SEALMOUNT_VM_JOBS").ok().and_then(|jobs| jobs.parse().ok());
    let cpus = || thread::available_parallelism().map_or(1, |cpus| cpus.get());
    configured.unwrap_or_else(cpus).max(1)
}

/// Tests that share one boot of one kernel.
#[derive(Debug)]
struct Boot {
    machine: &'static Machine,
    /// The tests of this boot. The list is never empty.
    tests: Vec<Test>,
}

impl Boot {
    fn suits(&self, test: &Test) -> bool {
        Arc::ptr_eq(&self.tests[0].kernel, &test.kernel)
            && self.machine.name == test.scenario.machine.name
    }

    fn run(&self, lab: &Lab, verdicts: &Verdicts) {
        match self.tests[0].kernel.get(lab) {
            Ok(kernel) => {
                let scenarios: Vec<_> = self.tests.iter().map(|test| test.scenario).collect();
                qemu::run(lab, kernel, self.machine, &scenarios, |number, verdict| {
                    verdicts.put(&self.tests[number].name, verdict);
                });
            }
            Err(message) => self.fail(verdicts, &message),
        }
    }

    /// Fails all tests without a verdict.
    fn fail(&self, verdicts: &Verdicts, message: &str) {
        for test in &self.tests {
            verdicts
                .put(&test.name, Err(Failure { message: message.to_owned(), log: String::new() }));
        }
    }
}

/// The verdicts that are known so far, by test name.
#[derive(Debug, Default)]
struct Verdicts {
    known: Mutex<HashMap<String, Verdict>>,
    more: Condvar,
}

impl Verdicts {
    /// Stores a verdict, unless the test already has one.
    fn put(&self, name: &str, verdict: Verdict) {
        let mut known = self.known.lock().expect("no thread panics while it stores a verdict");
        known.entry(name.to_owned()).or_insert(verdict);
        self.more.notify_all();
    }
}

/// A run of tests.
#[derive(Debug)]
pub struct Session {
    pub lab: Arc<Lab>,
    verdicts: Arc<Verdicts>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Session {
    /// Waits for the verdict of a test, which must be one of the selected tests.
    pub fn verdict(&self, name: &str) -> Verdict {
        let known = self.verdicts.known.lock().expect("no thread panics while it stores a verdict");
        let known = self.verdicts.more.wait_while(known, |known| !known.contains_key(name));
        known.expect("no thread panics while it stores a verdict")[name].clone()
    }

    /// Waits until the last machine is off.
    pub fn finish(&self) {
        let threads =
            std::mem::take(&mut *self.threads.lock().expect("no thread panics while it waits"));
        for thread in threads {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest;
    use crate::host::kernels::Series;

    #[test]
    fn quick_and_rest_are_ci_without_overlap() {
        let series = |name| Wanted::Series(Series::parse(name).unwrap());
        let kernels = ["6.1", "6.12", "7.3"].map(series);
        let names = |part| {
            let mut suite = Suite::new(&kernels, guest::scenarios()).unwrap();
            suite.keep(part);
            suite.tests.into_iter().map(|test| test.name).collect::<Vec<_>>()
        };
        let has = |part, name| names(part).iter().any(|other| other == name);
        for (name, parts) in [
            ("6.1::tree_without_copy_mounts_as_manifest", [true, true, true]),
            ("7.3::tree_without_copy_mounts_as_manifest", [true, true, true]),
            ("6.12::tree_without_copy_mounts_as_manifest", [false, true, true]),
            ("7.3::parallel_mounts_all_get_loop_devices", [false, true, true]),
            ("6.12::parallel_mounts_all_get_loop_devices", [false, false, true]),
            ("6.1::check_all_reports_bad_objects", [true, true, true]),
            ("6.12::check_all_reports_bad_objects", [false, false, true]),
        ] {
            let found = [Part::Quick, Part::Ci, Part::All].map(|part| has(part, name));
            assert_eq!(found, parts, "{name}");
        }
        let mut parts = [names(Part::Quick), names(Part::Rest)].concat();
        let mut ci = names(Part::Ci);
        parts.sort();
        ci.sort();
        assert_eq!(parts, ci);
    }

    #[test]
    fn unknown_part_is_rejected() {
        assert_eq!(Part::named("rest").unwrap(), Part::Rest);
        let message = Part::named("fast").unwrap_err().to_string();
        assert_eq!(message, "SEALMOUNT_TESTS=fast: must be all, ci, quick or rest");
    }
}
