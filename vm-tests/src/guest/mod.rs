//! The guest side: the scenarios, and what they are given.
//!
//! A scenario is a function and an entry in a list of its module, which scenarios.rs names:
//!
//! ```ignore
//! pub const SCENARIOS: &[Scenario] = &[Scenario {
//!     name: "digest_wrong",
//!     machine: &STANDARD, // or one of its own: Machine { name: "…", ..STANDARD }
//!     time_limit: Scenario::TIME_LIMIT,
//!     run: digest_wrong,
//! }];
//! ```
//!
//! Its standard output and standard error are the console, which is shown when it fails.

mod basics;
mod boot;
mod boot_init;
mod copies;
mod digest;
mod faults;
mod fixtures;
mod init;
mod injected;
mod machines;
mod missing;
mod mounted;
mod objects;
mod parallel;
mod pinned;
mod probe;
mod rungs;
mod scenarios;
mod swap;
mod system;
mod trees;
mod verity;

pub use boot_init::main as boot_init;
pub use faults::FAULTS;
pub use init::main;
pub use scenarios::scenarios;
