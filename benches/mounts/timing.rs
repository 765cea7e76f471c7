//! Figures that can be compared: taken in turns, again and again.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often something is measured.
#[derive(Clone, Copy)]
pub struct Effort {
    rounds_min: usize,
    rounds_max: usize,
    /// No further round begins after that.
    time: Duration,
}

impl Effort {
    pub const FULL: Effort =
        Effort { rounds_min: 3, rounds_max: 61, time: Duration::from_secs(12) };
    pub const QUICK: Effort = Effort { rounds_min: 2, rounds_max: 5, time: Duration::from_secs(1) };

    /// Calls `round` so often, and once before that does not count: caches fill.
    pub fn rounds(&self, mut round: impl FnMut(bool)) {
        round(false);
        let start = Instant::now();
        for done in 0..self.rounds_max {
            if done >= self.rounds_min && start.elapsed() > self.time {
                break;
            }
            round(true);
        }
    }
}

/// Something to measure: gives one figure.
pub struct Case<'a> {
    pub name: String,
    pub run: Box<dyn FnMut() -> f64 + 'a>,
}

impl<'a> Case<'a> {
    pub fn new(name: &str, run: impl FnMut() -> f64 + 'a) -> Case<'a> {
        Case { name: name.to_owned(), run: Box::new(run) }
    }
}

/// The figures of one thing, in the order in which they were taken.
#[derive(Clone)]
pub struct Samples {
    pub name: String,
    pub values: Vec<f64>,
}

impl Samples {
    pub fn median(&self) -> f64 {
        median(self.values.clone())
    }

    /// The median of the ratios of each round: what slows a machine down for a while slows both
    /// sides of a ratio.
    pub fn ratio_to(&self, other: &Samples) -> f64 {
        median(self.values.iter().zip(&other.values).map(|(one, other)| one / other).collect())
    }
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

/// Measures all cases in turns: A, B, A, B, …
pub fn alternate(effort: Effort, mut cases: Vec<Case>) -> Vec<Samples> {
    let mut samples: Vec<_> =
        cases.iter().map(|case| Samples { name: case.name.clone(), values: Vec::new() }).collect();
    effort.rounds(|counts| {
        for (case, samples) in cases.iter_mut().zip(&mut samples) {
            let value = (case.run)();
            if counts {
                samples.values.push(value);
            }
        }
    });
    samples
}

/// The time of a program from its start to its end, in milliseconds. It must succeed.
pub fn whole_process(command: &mut Command) -> f64 {
    command.stdin(Stdio::null());
    let start = Instant::now();
    let status = command.status();
    let time = milliseconds(start.elapsed());
    assert!(status.as_ref().is_ok_and(|status| status.success()), "{command:?}: {status:?}");
    time
}

pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
