//! Lists all scenarios.

use super::{
    basics, boot, cgroup, copies, digest, fallbacks, fault_injection, image_lengths, missing,
    nested, object_checks, objects, parallel, probe, remount, setup_root, source_released,
    stacking, stages, swap, trees, verity,
};
use crate::scenario::Scenario;

/// Returns every scenario that runs on every kernel.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> + Clone {
    [
        basics::SCENARIOS,
        probe::SCENARIOS,
        trees::SCENARIOS,
        image_lengths::SCENARIOS,
        fallbacks::SCENARIOS,
        verity::SCENARIOS,
        fault_injection::SCENARIOS,
        digest::SCENARIOS,
        source_released::SCENARIOS,
        copies::SCENARIOS,
        cgroup::SCENARIOS,
        stacking::SCENARIOS,
        stages::SCENARIOS,
        objects::SCENARIOS,
        nested::SCENARIOS,
        object_checks::SCENARIOS,
        boot::SCENARIOS,
        setup_root::SCENARIOS,
        remount::SCENARIOS,
        parallel::SCENARIOS,
        missing::SCENARIOS,
        swap::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}
