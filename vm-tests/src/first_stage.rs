//! The paths in the initramfs that host and vm-init agree on. A later root does not have these files.

/// The directory of the modules. The order of the file names is the load order.
pub const MODULES: &str = "/vm-tests/modules";
/// A text file with the path of the program that replaces vm-init as process 1.
pub const TAKES_OVER: &str = "/vm-tests/takes-over";
