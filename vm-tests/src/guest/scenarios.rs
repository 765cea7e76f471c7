//! The list of all scenarios.

use super::{
    basics, boot, copies, digest, injected, missing, objects, parallel, pinned, probe, rungs, swap,
    trees, verity,
};
use crate::scenario::Scenario;

/// Every scenario that runs on every kernel.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> + Clone {
    [
        basics::SCENARIOS,
        probe::SCENARIOS,
        trees::SCENARIOS,
        rungs::SCENARIOS,
        verity::SCENARIOS,
        injected::SCENARIOS,
        digest::SCENARIOS,
        pinned::SCENARIOS,
        copies::SCENARIOS,
        objects::SCENARIOS,
        boot::SCENARIOS,
        parallel::SCENARIOS,
        missing::SCENARIOS,
        swap::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}
