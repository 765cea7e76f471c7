//! The kinds of errors.

/// The category of an error, for the decision of a program.
///
/// The mount helper derives its exit status from the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The options are misspelt, or contradict each other. The caller must change them.
    InvalidOptions,
    /// The file is not an image, or is a damaged image.
    NotAnImage,
    /// The image, or an object, has another fs-verity digest than the expected one.
    DigestMismatch,
    /// Objects of the image are missing, or have another size or content than the image needs.
    ObjectsDamaged,
    /// The kernel or the file system cannot verify the image or the objects, as the options require.
    VerityUnavailable,
    /// A file or directory does not exist.
    NotFound,
    /// The process lacks a permission.
    PermissionDenied,
    /// This kernel, or this build of sealmount, lacks a feature.
    Unsupported,
    /// Memory is short at this moment. A later attempt may succeed.
    OutOfMemory,
    /// A limit that an operator has set is exceeded: `size=`, or a resource limit of the process.
    LimitExceeded,
    /// A resource is in use at this moment. A later attempt may succeed.
    Busy,
    /// The caller's callback ended the mount.
    Cancelled,
    /// The kernel failed for another reason, such as a device that cannot be read.
    Io,
}
