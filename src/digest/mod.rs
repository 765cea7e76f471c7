//! fs-verity digests: text, Merkle tree, the kernel's measurement, and computation on all CPUs.

pub(crate) mod batch;
pub(crate) mod measure;
pub(crate) mod parallel;
mod text;
pub(crate) mod tree;

pub use measure::{VerityStatus, VerityUnavailable};
pub use text::{Algorithm, Digest, ParseDigestError};
