//! The outcome of a mount in one call: the events, and the errors of the stages.

use std::ops::ControlFlow;

use sealmount::{DetachedMount, Error, Event, ImageError, ImageProblem, Location};
use sealmount::{MountOptions, SourceError};

/// Mounts an image. Returns the result, and the events without the reports of progress.
pub fn mount_and_events(
    options: &MountOptions,
    image: impl Into<Location>,
) -> (Result<DetachedMount, Error>, Vec<Event>) {
    let mut events = Vec::new();
    let result = options.mount_with_events(image, &mut |event| {
        if !matches!(event, Event::Copying(_) | Event::Checking(_)) {
            events.push(event);
        }
        ControlFlow::Continue(())
    });
    (result, events)
}

/// Returns the reason why the file is not an image. `Image::open` finds the reason in a plain file, and
/// a copy finds the reason in a compressed file.
pub fn image_problem(error: &Error) -> Option<&ImageProblem> {
    match error {
        Error::Image(ImageError::Invalid { problem, .. })
        | Error::Source(SourceError::Image(ImageError::Invalid { problem, .. })) => Some(problem),
        _ => None,
    }
}
