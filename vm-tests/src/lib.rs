//! Runs scenarios on other kernels than the running one, in virtual machines.
//!
//! A *scenario* is a function that runs inside a machine, as root, in a process and a mount
//! namespace of its own; see [`guest`] for the list and for what a scenario is given. A *machine*
//! says what it runs in: modules, files, disks, kernel command line. Scenarios of one machine share
//! its boot. [`scenario`] and [`machine`] describe both, for host and guest alike.
//!
//! The *host* side ([`host`]) fetches kernels, packs an initramfs around the static `vm-init`, boots
//! it with QEMU and tells it, scenario by scenario, what to run; `protocol` is the language the two
//! speak, over a serial port of its own so that kernel messages cannot mix with it.
//!
//! Each line imports only lines above it:
//!
//! ```text
//! error, files             errors in words; reading and copying files
//! protocol, first_stage    what host and guest agree on
//! programs, binaries       the programs that the host runs, and those that it builds
//! machine                  a kind of virtual machine: plain data
//! scenario                 a test, and what it is given
//! host/                    fetches kernels, boots machines, collects verdicts
//! guest/                   the scenarios, and process 1
//! ```
//!
//! ```text
//! cargo test -p vm-tests                       # every scenario on every kernel
//! cargo test -p vm-tests --test vm -- 6.12::boots
//! ```
//!
//! | environment variable | what it does |
//! |---|---|
//! | `SEALMOUNT_VM_KERNELS=DIR[:DIR…]` | these kernels only, nothing is fetched; each directory holds a `vmlinuz*` or `bzImage` (also in `boot/`, as in an unpacked package) and, if it has modules, `lib/modules/RELEASE` |
//! | `SEALMOUNT_VM_SERIES=6.1,7.3` | which series of Debian's kernels to fetch and run |
//! | `SEALMOUNT_VM_JOBS=N` | machines to run at a time |
//! | `SEALMOUNT_TESTS=quick` | on the oldest and the newest kernel, the scenarios of [`Tier::Quick`](scenario::Tier::Quick) |
//! | `SEALMOUNT_TESTS=rest` | all tests that `quick` leaves out |
//! | `SEALMOUNT_TESTS=all` | all tests, the default |
//!
//! How long all of it took is said at the end. All scenarios on all four kernels, emulated, are to
//! take no more than 10 minutes on two processors that have nothing else to do. Measured: 374 s, when
//! there were 160 tests; 778 s with 184 tests, beside compilers and other machines (a load of 10).
//!
//! Kernels are fetched once, to `target/vm/kernels/SERIES`; delete that to get newer ones.
//! `target/vm/log` keeps the console of the last boot of each machine and, as `*.hung.console` or
//! `*.killed.console`, of the last one that hung, or whose QEMU died by a signal, before it was ready
//! and was started again. `install-deps` installs the programs that the host side calls.
#![forbid(unsafe_code)]

mod binaries;
mod error;
mod files;
mod first_stage;
pub mod guest;
pub mod host;
pub mod machine;
mod programs;
mod protocol;
pub mod scenario;

pub use error::{Context, Error};
