//! The code that several test suites and the benchmarks share. The modules make sandboxes, read the
//! bundled images and the mount table, deny permissions, and trace programs.
#![forbid(unsafe_code)]

#[cfg(feature = "composefs")]
pub mod composefs;
pub mod erofs;
pub mod every_block;
#[cfg(feature = "sandbox")]
pub mod fixtures;
pub mod manifest;
pub mod mountinfo;
#[cfg(feature = "sandbox")]
pub mod outcome;
pub mod programs;
#[cfg(feature = "tracer")]
mod registers;
#[cfg(feature = "sandbox")]
pub mod sandbox;
// seccompiler supports little-endian architectures only.
#[cfg(all(feature = "sandboxing", target_endian = "little"))]
pub mod sandboxing;
#[cfg(feature = "tracer")]
pub mod tracer;

pub use erofs::ErofsImage;
pub use every_block::EveryBlock;
#[cfg(feature = "sandbox")]
pub use fixtures::{Fixture, V1, V2, large_image};
pub use manifest::{assert_has_hard_link, assert_is_manifest, assert_is_manifest_mapped};
pub use mountinfo::{Mount, assert_no_loop_device, loop_devices, mount_at, mounts};
#[cfg(feature = "sandbox")]
pub use outcome::{image_problem, mount_and_events};
pub use programs::{run, through, umount, umount_8, user_namespace};
#[cfg(feature = "sandbox")]
pub use sandbox::Sandbox;

/// Makes a [`Sandbox`] in the directory for temporary files that cargo gives to the calling test or
/// benchmark. Returns `None` if the caller must skip the test.
#[cfg(feature = "sandbox")]
#[macro_export]
macro_rules! sandbox {
    () => {
        $crate::Sandbox::new(env!("CARGO_TARGET_TMPDIR").as_ref())
    };
}

/// Runs the mount helper of the calling package with these arguments. Returns its output.
#[macro_export]
macro_rules! mount_composefs {
    ($arguments:expr) => {
        std::process::Command::new(env!("CARGO_BIN_EXE_mount-composefs"))
            .args($arguments)
            .output()
            .unwrap()
    };
}
