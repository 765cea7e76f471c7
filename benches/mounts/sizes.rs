//! The sizes of the images that are measured, in bytes.

pub const MIB: usize = 1024 * 1024;

pub const SIZES: [usize; 5] = [MIB, 10 * MIB, 40 * MIB, 100 * MIB, 1024 * MIB];

/// The size of the image in the measures.
pub const MEASURED_SIZE: usize = 40 * MIB;
