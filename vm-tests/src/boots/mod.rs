//! Boots of a real Debian, with its own systemd and initramfs, from an image that sealmount-setup-root mounts.
//!
//! examples/boot-debian makes each system: root directory, image, initramfs and disk. The tests boot copies of
//! these files in QEMU, and check the report of the system, the console and the disk.
//!
//! Each line imports only lines above it:
//!
//! ```text
//! once, report         a result that tests share; the report of a system
//! system, disk         the files of a system; copies and changes of its disk
//! machine, initramfs   one boot in QEMU; more files in an initramfs
//! state                the boots that tests share
//! checks               a system that runs
//! running, failing, configured   the tests
//! ```

mod checks;
mod configured;
mod disk;
mod failing;
mod initramfs;
mod machine;
mod once;
mod report;
mod running;
mod state;
mod system;

use crate::Error;
use crate::host::suite::Part;

pub use state::State;
pub use system::Systems;

/// A test of one or more boots.
pub struct Test {
    pub name: &'static str,
    /// Whether the test is in the CI tier.
    is_ci: bool,
    pub run: fn(&State) -> Result<(), Error>,
}

const fn ci(name: &'static str, run: fn(&State) -> Result<(), Error>) -> Test {
    Test { name, is_ci: true, run }
}

const fn release(name: &'static str, run: fn(&State) -> Result<(), Error>) -> Test {
    Test { name, is_ci: false, run }
}

/// All tests. The names of tests that boot the same system have the same start. A test that needs the boots of
/// another test is not next to it, because two tests run at the same time.
const TESTS: &[Test] = &[
    ci("dracut::first_boot_leaves_clean_disk", |state| running::first_boot(state, &state.dracut)),
    ci("initramfs_tools::first_boot_leaves_clean_disk", |state| {
        running::first_boot(state, &state.initramfs_tools)
    }),
    ci("dracut::wrong_digest_is_reported", failing::wrong_digest),
    release("dracut::soft_reboot_mounts_second_deployment", running::soft_reboot),
    release("dracut::missing_image_is_reported", failing::missing_image),
    release("dracut::missing_disk_is_reported", failing::missing_disk),
    release("dracut::second_boot_keeps_state", |state| running::second_boot(state, &state.dracut)),
    release("dracut::missing_object_is_reported", failing::missing_object),
    release("dracut::decayed_object_is_reported", failing::decayed_object),
    release("dracut::reboot_mounts_second_image_from_disk", running::reboot),
    release("dracut::small_limit_of_copy_is_reported", failing::small_limit),
    release("dracut::full_tmpfs_keeps_system_running", failing::full_tmpfs),
    release("dracut::rollback_keeps_first_state", running::rollback),
    release("initramfs_tools::second_boot_keeps_state", |state| {
        running::second_boot(state, &state.initramfs_tools)
    }),
    release("dracut::uki_leaves_clean_disk", running::uki),
    release(
        "initramfs_tools::wrong_digest_is_reported",
        failing::wrong_digest_with_initramfs_tools,
    ),
    release("linux_6_12::first_boot_leaves_clean_disk", |state| {
        running::first_boot(state, &state.long_term)
    }),
    release("dracut::set_up_time_is_limited", running::set_up_time),
    release("linux_6_12::second_boot_keeps_state", |state| {
        running::second_boot(state, &state.long_term)
    }),
    release("linux_6_1::missing_verity_is_reported", failing::no_verity),
    release("linux_6_1::optional_verity_leaves_clean_disk", failing::optional_verity),
    release("composefs_rs::default_configuration_keeps_changes", |state| {
        configured::boot(state, &configured::DEFAULT)
    }),
    release("composefs_rs::etc_bind_var_overlay_keep_changes", |state| {
        configured::boot(state, &configured::BIND)
    }),
    release("composefs_rs::etc_none_var_none_keep_image", |state| {
        configured::boot(state, &configured::NONE)
    }),
    release("composefs_rs::etc_var_transient_leave_disk", |state| {
        configured::boot(state, &configured::TRANSIENT)
    }),
    release("composefs_rs::root_transient_leaves_disk", |state| {
        configured::boot(state, &configured::TRANSIENT_ROOT)
    }),
];

/// Returns the tests of a part.
pub fn tests(part: Part) -> impl Iterator<Item = &'static Test> {
    TESTS.iter().filter(move |test| match part {
        Part::All => true,
        Part::Quick => false,
        Part::Ci | Part::Rest => test.is_ci,
    })
}
