//! The root file system of a system that boots from a composefs image.
//!
//! The program `sealmount-setup-root` runs in the initramfs, after the disk is mounted and before the system
//! switches to its root. This module is its work, for programs that do it in another way:
//!
//! ```no_run
//! use sealmount::boot::{CommandLine, RootSetup};
//!
//! let command_line = std::fs::read_to_string("/proc/cmdline")?;
//! let setup = RootSetup::new(CommandLine::parse(command_line)?);
//! let root = setup.prepare(&mut |event| println!("{event}"))?;
//! root.attach("/sysroot")?;
//! root.keep_disk()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The disk
//!
//! | path on the disk | content |
//! |---|---|
//! | composefs/objects | the objects of all images |
//! | composefs/images/HEX | an image, named by its digest |
//! | state/deploy/HEX/etc | the changes of /etc: `upper` and `work` |
//! | state/deploy/HEX/var | /var |
//!
//! # The root
//!
//! | path in the root | content |
//! |---|---|
//! | / | the image, read-only or with a layer in a tmpfs |
//! | /etc | the directory of the image, with a layer on the disk, or as [`RootConfig::etc`] says |
//! | /var | a directory of the disk, or as [`RootConfig::var`] says |
//! | /sysroot | the disk, read-only, if the image has this directory |

mod command_line;
mod config;
mod disk;
mod error;
mod place;
mod prepared;
mod setup;
mod tree;
mod words;

pub use command_line::{CommandLine, CommandLineError, CopyChoice, ExpectedImage};
pub use config::{DirectoryMount, RootConfig};
pub use error::{ConfigError, SetupError};
pub use prepared::PreparedRoot;
pub use setup::{RootSetup, SetupEvent};
