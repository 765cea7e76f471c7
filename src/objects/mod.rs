//! The objects that an image refers to: their list, and the check of every object.

pub(crate) mod check;
mod error;
mod reference;
mod report;
pub(crate) mod store;
pub(crate) mod walk;

pub use error::ObjectsError;
pub use reference::ImageObject;
pub use report::{
    CheckProgress, CheckReport, ObjectCheck, ObjectFailure, ObjectProblem, ObjectProblemKind,
};
pub use walk::Objects;
