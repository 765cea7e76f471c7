//! Figures that can be compared: measured in turns, in many rounds.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often something is measured.
#[derive(Clone, Copy)]
pub struct Effort {
    /// Whether a first round, which fills caches, does not count.
    warms_up: bool,
    rounds_min: usize,
    rounds_max: usize,
    /// No further round begins after this time.
    time: Duration,
}

impl Effort {
    pub const FULL: Effort =
        Effort { warms_up: true, rounds_min: 5, rounds_max: 61, time: Duration::from_secs(10) };
    pub const QUICK: Effort =
        Effort { rounds_min: 2, rounds_max: 5, time: Duration::from_secs(1), ..Effort::FULL };

    /// For figures that hardly differ.
    pub const FEW: Effort =
        Effort { warms_up: false, rounds_min: 1, rounds_max: 5, time: Duration::from_secs(1) };

    /// For cases that need seconds each, so that caches do not count.
    pub fn for_slow(self) -> Effort {
        Effort { warms_up: false, rounds_min: self.rounds_min.min(3), ..self }
    }

    /// For a figure that needs this many rounds at any cost.
    pub fn at_least(self, rounds: usize) -> Effort {
        Effort { rounds_min: rounds.min(self.rounds_max), ..self }
    }

    /// Calls `round` for each round, with whether the round counts.
    pub fn rounds(&self, mut round: impl FnMut(bool)) {
        if self.warms_up {
            round(false);
        }
        let start = Instant::now();
        for done in 0..self.rounds_max {
            if done >= self.rounds_min && start.elapsed() > self.time {
                break;
            }
            round(true);
        }
    }
}

/// A case to measure. `run` returns one figure.
pub struct Case<'a> {
    pub name: String,
    pub run: Box<dyn FnMut() -> f64 + 'a>,
}

impl<'a> Case<'a> {
    pub fn new(name: &str, run: impl FnMut() -> f64 + 'a) -> Case<'a> {
        Case { name: name.to_owned(), run: Box::new(run) }
    }
}

/// The figures of one case, in the order of the rounds.
#[derive(Clone)]
pub struct Samples {
    pub name: String,
    pub values: Vec<f64>,
}

impl Samples {
    pub fn new(name: &str, values: Vec<f64>) -> Samples {
        Samples { name: name.to_owned(), values }
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Returns the value below which this part of all values lies: 0 is the lowest, 1 the highest. Between
    /// two values, interpolates.
    pub fn quantile(&self, part: f64) -> f64 {
        let mut values = self.values.clone();
        values.sort_by(f64::total_cmp);
        let Some(last) = values.len().checked_sub(1) else { return f64::NAN };
        let position = last as f64 * part;
        let (below, above) = (values[position.floor() as usize], values[position.ceil() as usize]);
        below + (above - below) * position.fract()
    }

    /// Returns the ratio of each round. A disturbance of the machine slows both sides of a round.
    pub fn ratios_to(&self, other: &Samples) -> Samples {
        let ratios = self.values.iter().zip(&other.values).map(|(one, other)| one / other);
        Samples::new(&self.name, ratios.collect())
    }

    pub fn scaled(mut self, factor: f64) -> Samples {
        self.values.iter_mut().for_each(|value| *value *= factor);
        self
    }
}

/// Measures all cases in turns, each once in a round. The order differs from round to round, so that no
/// case always follows the same other case.
pub fn alternate(effort: Effort, mut cases: Vec<Case>) -> Vec<Samples> {
    let mut samples: Vec<_> =
        cases.iter().map(|case| Samples::new(&case.name, Vec::new())).collect();
    let mut order: Vec<_> = (0..cases.len()).collect();
    let mut random = Random::default();
    effort.rounds(|counts| {
        random.shuffle(&mut order);
        for &number in &order {
            let value = (cases[number].run)();
            if counts {
                samples[number].values.push(value);
            }
        }
    });
    samples
}

/// Numbers without a pattern, the same in each run: xorshift64.
pub struct Random(u64);

impl Default for Random {
    fn default() -> Random {
        Random(0x9e37_79b9_7f4a_7c15)
    }
}

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn shuffle<T>(&mut self, all: &mut [T]) {
        for end in (1..all.len()).rev() {
            all.swap(end, self.next() as usize % (end + 1));
        }
    }
}

/// Returns the time of a program from its start to its end, in milliseconds. The program must succeed.
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
