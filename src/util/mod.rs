//! Helpers that do not depend on images or mounts.

pub(crate) mod io;
pub(crate) mod memory;
pub(crate) mod pages;
pub(crate) mod text;
pub(crate) mod threads;
