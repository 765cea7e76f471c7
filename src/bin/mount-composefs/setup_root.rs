//! sealmount-setup-root: sets up the root of a system that boots from a composefs image.

use std::ffi::OsString;
use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::{ErrorKind as IoErrorKind, IsTerminal, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use lexopt::{Arg, Parser};
use sealmount::ErrorKind;
use sealmount::boot::{CommandLine, RootConfig, RootSetup, SetupError};

use crate::program::{Failure, Status, one_line, print};

pub const NAME: &str = "sealmount-setup-root";

const USAGE: &str = "\
Usage: sealmount-setup-root [OPTION...]

Mounts the composefs image that the kernel command line names, with its /etc, /var and /sysroot, on top of
the disk that is mounted on /sysroot. Runs in an initramfs, before the switch to the new root.

  --sysroot DIRECTORY  the disk is mounted here (default: /sysroot)
  --target DIRECTORY   attach the root here, and leave the disk where it is:
                       /run/nextroot for systemctl soft-reboot
  --images DIRECTORY   images in the initramfs (default: /usr/lib/sealmount/images)
  --config FILE        the configuration (default: /usr/lib/composefs/setup-root-conf.toml)
  --cmdline TEXT       use this text instead of /proc/cmdline
  -q, --quiet          do not report each step on stdout
  -h, --help           print this text
  -V, --version        print the version

The manual page sealmount-setup-root(8) describes the kernel command line, the configuration and the exit
status.";

const CONFIG: &str = "/usr/lib/composefs/setup-root-conf.toml";
const COMMAND_LINE: &str = "/proc/cmdline";

struct Arguments {
    sysroot: Option<PathBuf>,
    target: Option<PathBuf>,
    images: Option<PathBuf>,
    config: Option<PathBuf>,
    command_line: Option<OsString>,
    quiet: bool,
}

enum Command {
    SetUp(Box<Arguments>),
    Print(&'static str),
}

pub fn run() -> Result<(), Failure> {
    let arguments = match parse(Parser::from_env()) {
        Ok(Command::SetUp(arguments)) => arguments,
        Ok(Command::Print(text)) => return print(text),
        Err(error) => {
            return Err(Failure::usage(error.to_string(), "see sealmount-setup-root --help"));
        }
    };
    let text = match &arguments.command_line {
        Some(text) => text.clone(),
        None => OsString::from_vec(
            std::fs::read(COMMAND_LINE).map_err(|error| unreadable(COMMAND_LINE, &error))?,
        ),
    };
    let mut setup =
        RootSetup::new(CommandLine::parse(text).map_err(SetupError::from).map_err(failure)?);
    setup.config = config(arguments.config.clone())?;
    if let Some(sysroot) = &arguments.sysroot {
        setup.sysroot = sysroot.clone();
    }
    if let Some(images) = &arguments.images {
        setup.images = images.clone();
    }
    let root = setup.prepare(&mut |event| arguments.say(&event)).map_err(failure)?;
    let place = arguments.target.as_ref().unwrap_or(&setup.sysroot);
    root.attach(place).map_err(failure)?;
    arguments.say(&format_args!("root attached to {}", place.display()));
    // The root works without this mount.
    if arguments.target.is_none()
        && let Err(error) = root.keep_disk()
    {
        arguments.say(&format_args!("the disk will need a recovery at the next boot: {error}"));
    }
    Ok(())
}

impl Arguments {
    /// Prints one line, without `--quiet`. A failure is ignored: the root matters more than its report.
    fn say(&self, text: &dyn Display) {
        if !self.quiet {
            let _ = writeln!(std::io::stdout(), "{NAME}: {}", one_line(text));
        }
    }
}

fn parse(mut parser: Parser) -> Result<Command, lexopt::Error> {
    let mut arguments = Arguments {
        sysroot: None,
        target: None,
        images: None,
        config: None,
        command_line: None,
        quiet: false,
    };
    while let Some(argument) = parser.next()? {
        match argument {
            Arg::Long("sysroot") => arguments.sysroot = Some(path("--sysroot", &mut parser)?),
            Arg::Long("target") => arguments.target = Some(path("--target", &mut parser)?),
            Arg::Long("images") => arguments.images = Some(path("--images", &mut parser)?),
            Arg::Long("config") => arguments.config = Some(path("--config", &mut parser)?),
            Arg::Long("cmdline") => arguments.command_line = Some(parser.value()?),
            Arg::Short('q') | Arg::Long("quiet") => arguments.quiet = true,
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Print(USAGE)),
            Arg::Short('V') | Arg::Long("version") => {
                let version =
                    concat!("sealmount-setup-root from sealmount ", env!("CARGO_PKG_VERSION"));
                return Ok(Command::Print(version));
            }
            _ => return Err(argument.unexpected()),
        }
    }
    Ok(Command::SetUp(Box::new(arguments)))
}

fn path(option: &str, parser: &mut Parser) -> Result<PathBuf, lexopt::Error> {
    let value = parser.value()?;
    match value.is_empty() {
        true => Err(format!("arguments: empty {option}").into()),
        false => Ok(value.into()),
    }
}

/// Reads the configuration. The default file may be missing.
fn config(path: Option<PathBuf>) -> Result<RootConfig, Failure> {
    let is_default = path.is_none();
    let path = path.unwrap_or_else(|| CONFIG.into());
    let text = match std::fs::read_to_string(&path) {
        Err(error) if is_default && error.kind() == IoErrorKind::NotFound => {
            return Ok(RootConfig::default());
        }
        result => result.map_err(|error| unreadable(&path.display().to_string(), &error))?,
    };
    RootConfig::parse(&text).map_err(|error| {
        let message = format!("{}: {error}", path.display());
        Failure::usage(message, "correct the file: sealmount-setup-root(8) describes it")
    })
}

fn unreadable(path: &str, error: &std::io::Error) -> Failure {
    Failure {
        status: Status::System,
        message: format!("{path}: cannot read the file: {error}"),
        details: Vec::new(),
        hint: None,
    }
}

/// Returns the message and the exit status of an error.
fn failure(error: SetupError) -> Failure {
    let status = match &error {
        SetupError::DiskMissing { .. } => Some(Status::DiskMissing),
        SetupError::ImageMissing { .. } => Some(Status::ImageMissing),
        SetupError::ObjectsMissing { .. } => Some(Status::Objects),
        SetupError::StateMissing { .. } | SetupError::DirectoryMissing { .. } => {
            Some(Status::State)
        }
        SetupError::CommandLine(_) => Some(Status::Usage),
        _ => match error.kind() {
            ErrorKind::DigestMismatch => Some(Status::WrongDigest),
            ErrorKind::ObjectsDamaged | ErrorKind::VerityUnavailable => Some(Status::Objects),
            _ => None,
        },
    };
    let hint = error.hint().map(|hint| hint.for_options());
    let message = error.to_string();
    let mut failure = match error {
        SetupError::Mount(error) => Failure::from(error),
        SetupError::Kernel(error) => Failure::from(sealmount::Error::from(*error)),
        _ => Failure {
            status: Status::MountFailure,
            message: String::new(),
            details: Vec::new(),
            hint: None,
        },
    };
    failure.status = status.unwrap_or(failure.status);
    (failure.message, failure.hint) = (message, hint);
    failure
}

/// Writes a failure to the log of the kernel, which survives a crash and reaches the console. The log may be out
/// of reach.
pub fn write_to_kernel_log(lines: &[String]) {
    // KERN_ERR and KERN_DEBUG: a terminal has the lines already, and the console does not repeat debug messages.
    let priority = if std::io::stderr().is_terminal() { "<7>" } else { "<3>" };
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        for line in lines {
            // One write is one record.
            let _ = log.write_all(format!("{priority}{line}\n").as_bytes());
        }
    }
}
