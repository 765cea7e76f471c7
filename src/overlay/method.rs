//! The methods to give layers to overlayfs.

use std::fmt;

/// A method to give layers to overlayfs. The variants are in order, newest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayerMethod {
    /// Detached mounts by descriptor (Linux 6.15).
    Descriptors,
    /// Paths in a private mount namespace, one string each (Linux 6.7).
    Paths,
    /// Paths in a private mount namespace, in one string with data-only layers (Linux 6.5).
    OneString,
    /// Paths in a private mount namespace, in one string without data-only layers.
    LowerOnly,
}

impl fmt::Display for LayerMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LayerMethod::Descriptors => "overlay layers by descriptor",
            LayerMethod::Paths => "overlay layers by path, in a private mount namespace",
            LayerMethod::OneString => "overlay layers in one string, in a private mount namespace",
            LayerMethod::LowerOnly => {
                "overlay layers in one string without data-only layers, in a private mount namespace"
            }
        })
    }
}
