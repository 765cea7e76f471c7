//! Runs scenarios in virtual machines, on kernels other than the running one.
//!
//! A *scenario* is a function that runs inside a machine, as root, in its own process and mount
//! namespace. [`guest`] lists the scenarios. A *machine* describes the environment of scenarios:
//! modules, files, disks and kernel command line. All scenarios of one machine share one boot.
//! [`scenario`] and [`machine`] define both for host and guest.
//!
//! The *host* side ([`host`]) fetches kernels and packs an initramfs with the static `vm-init`. Then
//! the host boots the initramfs in QEMU and requests one scenario after another. Host and guest
//! exchange the frames of `protocol` over a separate serial port, so kernel messages cannot mix with
//! frames.
//!
//! Each line imports only lines above it:
//!
//! ```text
//! error, files             the error type; reading and copying files
//! arch                     everything that depends on the architecture of a machine
//! protocol, first_stage    the frames and paths that host and guest share
//! programs, binaries       the programs that the host runs, and the programs of machines
//! machine                  a kind of virtual machine: plain data
//! scenario                 a test, and its view of the machine
//! host/                    fetches kernels, boots machines, collects verdicts
//! guest/                   the scenarios, and process 1
//! boots/                   boots of a real Debian
//! ```
//!
//! ```text
//! cargo test -p vm-tests                       # every test
//! cargo test -p vm-tests --test vm -- 6.12::boots
//! cargo test -p vm-tests --test boots          # a real Debian, in target/boot
//! SEALMOUNT_VM_SERIES=7.3-arm64 cargo test -p vm-tests --test vm
//! ```
//!
//! | environment variable | effect |
//! |---|---|
//! | `SEALMOUNT_VM_KERNELS=DIR[:DIR…]` | runs the kernels in these directories and fetches no kernel. Each directory holds a `vmlinuz*`, `bzImage`, `Image` or `Image.gz`, also in `boot/`, and modules, if any, in `lib/modules/RELEASE`. The image selects the architecture: x86-64 or arm64 |
//! | `SEALMOUNT_VM_SERIES=6.1,7.3-arm64` | the series of Debian's kernels to fetch and run |
//! | `SEALMOUNT_VM_JOBS=N` | number of machines to run at the same time |
//! | `SEALMOUNT_TESTS=quick` | runs all scenarios except [`Tier::Ci`](machine::Tier::Ci) on the first and the last kernel |
//! | `SEALMOUNT_TESTS=ci` | also runs all scenarios on the last kernel and on kernels with large pages, and the scenarios of [`Tier::Quick`](machine::Tier::Quick) on the other kernels |
//! | `SEALMOUNT_TESTS=rest` | runs the tests of `ci` that are not in `quick` |
//! | `SEALMOUNT_TESTS=all` | runs all tests (default) |
//! | `SEALMOUNT_BOOTS=reuse` | `--test boots` boots the systems in target/boot that an earlier run made |
//!
//! | series | kernel of Debian | architecture |
//! |---|---|---|
//! | `7.3` | `cloud-amd64` | x86-64 |
//! | `7.3-arm64` | `cloud-arm64` | arm64, pages of 4 KiB |
//! | `7.3-arm64-16k` | `arm64-16k` | arm64, pages of 16 KiB |
//!
//! The default run has every scenario on the newest kernels of 6.1, 6.12, 7.2 and 7.3. On two versions with a
//! fault, 6.17.13 and 6.18.5, the run has the scenarios of the machines with
//! [`on_faulty_kernels`](machine::Machine::on_faulty_kernels). On `7.3-arm64-16k`, the run has the scenarios of
//! the machines with [`on_large_pages`](machine::Machine::on_large_pages). The last line of the output reports
//! the duration. Under emulation, on two idle CPUs, the tests of `SEALMOUNT_TESTS=ci` must finish within 15
//! minutes.
//!
//! The host fetches each kernel once, to `target/vm/kernels/SERIES`. Delete that directory to fetch
//! newer kernels. Any version on the mirror can be named: `SEALMOUNT_VM_SERIES=6.19.6`. `install-deps`
//! installs the programs that the host needs. `tests/cross` builds the programs of arm64 machines. Debian has no
//! kernel with pages of 64 KiB, so such a kernel needs `SEALMOUNT_VM_KERNELS`.
//!
//! `target/vm/log` keeps the consoles:
//!
//! - `*.console`: the last boot of each machine.
//! - `*.hung.console`: the last machine that hung before vm-init was ready.
//! - `*.killed.console`: the last machine whose QEMU died of a signal before vm-init was ready.
#![forbid(unsafe_code)]

pub mod arch;
mod binaries;
pub mod boots;
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
