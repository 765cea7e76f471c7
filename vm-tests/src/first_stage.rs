//! Where the host puts what vm-init needs in the initramfs. A later root does not have it.

/// The modules, named so that their order is the order to load them in.
pub const MODULES: &str = "/vm-tests/modules";
/// A text file: the path of the program that takes over as process 1.
pub const TAKES_OVER: &str = "/vm-tests/takes-over";
