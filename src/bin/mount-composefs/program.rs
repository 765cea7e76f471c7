//! The output and the exit status of both programs.

use std::fmt::Display;
use std::io::{self, Write};

use sealmount::{CheckReport, Error, ErrorKind};

/// Exit statuses. Up to 32, they have the meaning that mount(8) gives them. The others are statuses of
/// sealmount-setup-root. systemd gives no name of its own to them.
#[derive(Clone, Copy)]
#[repr(u8)]
pub enum Status {
    Usage = 1,
    System = 2,
    InternalBug = 4,
    MountFailure = 32,
    #[cfg(feature = "boot")]
    WrongDigest = 80,
    #[cfg(feature = "boot")]
    ImageMissing = 81,
    #[cfg(feature = "boot")]
    DiskMissing = 82,
    #[cfg(feature = "boot")]
    Objects = 83,
    #[cfg(feature = "boot")]
    State = 84,
}

/// A message for the caller, and the exit status.
pub struct Failure {
    pub status: Status,
    pub message: String,
    /// More lines below the message.
    pub details: Vec<String>,
    pub hint: Option<&'static str>,
}

impl Failure {
    pub fn usage(message: impl Into<String>, hint: &'static str) -> Failure {
        let hint = Some(hint);
        Failure { status: Status::Usage, message: message.into(), details: Vec::new(), hint }
    }

    /// Returns the lines of the failure: the message of `program`, details and the hint.
    pub fn lines(&self, program: &str) -> Vec<String> {
        let mut lines = vec![format!("{program}: {}", one_line(&self.message))];
        lines.extend(self.details.iter().map(|line| format!("  {line}")));
        lines.extend(self.hint.map(|hint| format!("  hint: {hint}")));
        lines
    }
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        let error = error.into();
        let status = match error.kind() {
            ErrorKind::InvalidOptions | ErrorKind::PermissionDenied => Status::Usage,
            ErrorKind::OutOfMemory | ErrorKind::LimitExceeded | ErrorKind::Busy => Status::System,
            _ => Status::MountFailure,
        };
        let hint = error.hint().map(|hint| hint.for_options());
        let details = error.check_report().map_or_else(Vec::new, failed_objects);
        Failure { status, message: error.to_string(), details, hint }
    }
}

/// Returns lines about the objects that fail a check, about each kind of problem, and the totals.
fn failed_objects(report: &CheckReport) -> Vec<String> {
    let mut lines: Vec<String> = report.failures.iter().map(ToString::to_string).collect();
    let more = report.failed - report.failures.len() as u64;
    if more > 0 {
        lines.push(format!("… and {more} more objects: the list is not complete"));
    }
    let by_kind = report.failed_by_kind.iter().map(|(kind, count)| format!("{count} {kind}"));
    lines.push(format!("failed: {}", by_kind.collect::<Vec<_>>().join(", ")));
    lines.push(report.to_string());
    lines
}

/// Prints to stderr, and ignores a failure: eprintln! would panic if the reader is gone or the disk full.
pub fn print_error(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Prints a text to stdout.
pub fn print(text: &str) -> Result<(), Failure> {
    match writeln!(io::stdout(), "{text}") {
        // A reader that closes the pipe has read enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure {
            status: Status::System,
            message: format!("standard output: cannot write: {error}"),
            details: Vec::new(),
            hint: None,
        }),
        _ => Ok(()),
    }
}

/// Returns text without control characters: arguments may hold any.
pub fn one_line(text: &dyn Display) -> String {
    let mut line = String::new();
    for character in text.to_string().chars() {
        match character {
            control if control.is_control() => {
                line.push_str(&format!("\\x{:02x}", u32::from(control)));
            }
            // Line separators, and characters that reverse the direction of text.
            '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                line.push_str(&format!("\\u{{{:x}}}", u32::from(character)));
            }
            plain => line.push(plain),
        }
    }
    line
}
