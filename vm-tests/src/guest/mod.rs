//! The guest side: the scenarios and process 1.
//!
//! A scenario is a function and an entry in the list of its module. scenarios.rs joins these lists:
//!
//! ```ignore
//! pub const SCENARIOS: &[Scenario] = &[Scenario {
//!     name: "wrong_digest_is_rejected",
//!     machine: &STANDARD, // or a machine of its own: Machine { name: "…", ..STANDARD }
//!     time_limit: Scenario::TIME_LIMIT,
//!     run: wrong_digest_is_rejected,
//! }];
//! ```
//!
//! Standard output and standard error of a scenario go to the console, which the host prints if the
//! scenario fails.

mod basics;
mod boot;
mod boot_init;
mod cgroup;
mod copies;
mod digest;
mod fallbacks;
mod fault_injection;
mod faults;
mod fixtures;
mod image_lengths;
mod init;
mod machines;
mod missing;
mod mounted;
mod nested;
mod object_checks;
mod objects;
mod parallel;
mod probe;
mod remount;
mod scenarios;
mod setup_root;
mod source_released;
mod stacking;
mod stages;
mod swap;
mod system;
mod trees;
mod verity;

pub use boot_init::main as boot_init;
pub use faults::FAULTS;
pub use init::main;
pub use scenarios::scenarios;
