//! mount.composefs, the mount helper: arguments, messages and exit status of mount(8)'s protocol.
//! The library does the work.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::{Arg, Parser};
use rustix::process::{getegid, geteuid, getgid, getuid};
use sealmount::{
    Errno, Error, MountOptions, Operation, Sloppy, Step, enter_mount_namespace, open_mount_point,
};

const USAGE: &str = "\
Usage: mount.composefs [-sfnv] [-N NAMESPACE] -o basedir=PATH[,OPTION...] IMAGE DIRECTORY

Mounts a composefs image, as the helper of mount(8) or called directly.

  -o OPTION[,OPTION...]  may be given several times; see below
  -s                     tolerate options that are not known
  -f                     fake: check everything, attach nothing
  -n                     accepted: there is no mtab to write
  -v                     say on stderr what is done, a line a step
  -N NAMESPACE           mount in this mount namespace, a PID or a path; all paths are of it
  -t TYPE                accepted: composefs or composefs.SUBTYPE
  -h, --help             print this
  -V, --version          print the version

Options:
  basedir=PATH[:PATH...] object directories; a backslash escapes : and , and itself
  digest=DIGEST          the image must have this fs-verity digest; implies verity
  verity                 the objects must have fs-verity, and are checked against the image
  tryverity, noverity    the same where it can be had; never
  copy[=memfd]           mount a copy of the image in sealed memory; the image may be
                         compressed with zstd, xz or gzip
  copy=ramfs             the same in memory that is never swapped out
  size=LIMIT             the most memory the copy may take: bytes, k, m, g, or %
  upperdir=PATH,workdir=PATH
                         a layer that takes changes
  idmap=PATH             a user namespace whose mapping the files of the image get
  ro, rw, nosuid, nodev, noexec, nosymfollow, noatime, sync, context=, ...
                         as for mount(8)

The manual page mount.composefs(8) has them all.";

/// Exit statuses of mount(8).
#[derive(Clone, Copy)]
#[repr(u8)]
enum Status {
    Usage = 1,
    System = 2,
    InternalBug = 4,
    MountFailure = 32,
}

/// What goes to the person who called, and the exit status.
struct Failure {
    status: Status,
    message: String,
    hint: Option<&'static str>,
}

impl Failure {
    fn usage(message: impl Into<String>) -> Failure {
        let hint = Some("mount.composefs --help says how it is called");
        Failure { status: Status::Usage, message: message.into(), hint }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let status = match (&error, error.errno()) {
            (Error::Options(_), _) => Status::Usage,
            (_, Some(Errno::PERM)) => Status::Usage,
            (Error::Kernel(error), Some(Errno::ACCESS)) if is_loop_device(error.operation) => {
                Status::Usage
            }
            (
                Error::NoLoopDevice { .. }
                | Error::NotLoopDevice { .. }
                | Error::NotEnoughMemory { .. }
                | Error::CompressedTooLarge { .. },
                _,
            ) => Status::System,
            (Error::Kernel(error), _) if is_loop_device(error.operation) => Status::System,
            (
                _,
                Some(
                    Errno::NOMEM
                    | Errno::NOSPC
                    | Errno::FBIG
                    | Errno::MFILE
                    | Errno::NFILE
                    | Errno::AGAIN,
                ),
            ) => Status::System,
            _ => Status::MountFailure,
        };
        Failure { status, message: error.to_string(), hint: error.hint() }
    }
}

/// Whether the caller may have less privileges than this process. AT_SECURE alone says too much: SELinux
/// sets it for root too, where a program enters another domain.
fn has_privileges_of_its_file() -> bool {
    getuid() != geteuid()
        || getgid() != getegid()
        || !getuid().is_root() && sealmount_sys::is_secure_execution()
}

fn is_loop_device(operation: Operation) -> bool {
    matches!(
        operation,
        Operation::FindLoopDevice | Operation::OpenLoopDevice | Operation::ConfigureLoopDevice
    )
}

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        say(&format_args!("internal bug, please report it: {panic}"));
        std::process::exit(Status::InternalBug as i32);
    }));
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&failure.message);
            if let Some(hint) = failure.hint {
                print_error(&format!("  hint: {hint}\n"));
            }
            ExitCode::from(failure.status as u8)
        }
    }
}

/// That something cannot be said, because nobody reads it or the disk below it is full, is no reason to
/// fail, let alone to panic as eprintln! does.
fn print_error(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// On one line, and with nothing that a terminal would act on: paths and options can hold anything.
fn say(text: &dyn Display) {
    let mut line = String::from("mount.composefs: ");
    for character in text.to_string().chars() {
        match character.is_control() {
            true => line.push_str(&format!("\\x{:02x}", u32::from(character))),
            false => line.push(character),
        }
    }
    line.push('\n');
    print_error(&line);
}

fn run() -> Result<(), Failure> {
    if has_privileges_of_its_file() {
        return Err(Failure {
            status: Status::Usage,
            message: "installed set-user-ID, set-group-ID or with file capabilities: refused"
                .into(),
            hint: Some("it trusts its caller with every path and option, so only root may be one"),
        });
    }
    let arguments = match Command::parse(Parser::from_env()) {
        Ok(Command::Mount(arguments)) => arguments,
        Ok(Command::Print(text)) => {
            return match writeln!(io::stdout(), "{text}") {
                // Who has read enough is no failure.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure {
                    status: Status::System,
                    message: format!("cannot write to standard output: {error}"),
                    hint: None,
                }),
                _ => Ok(()),
            };
        }
        Err(error) => return Err(Failure::usage(error.to_string())),
    };
    let say = |text: &dyn Display| {
        if arguments.verbose {
            say(text);
        }
    };
    let mut bar = Bar { wanted: arguments.verbose && io::stderr().is_terminal(), drawn: false };

    let options = if arguments.sloppy {
        let Sloppy { options, unknown } =
            MountOptions::parse_sloppy(&arguments.options).map_err(Error::from)?;
        for name in unknown {
            say(&format_args!("option {} is not known: passed over", name.display()));
        }
        options
    } else {
        MountOptions::parse(&arguments.options).map_err(Error::from)?
    };
    if let Some(namespace) = &arguments.namespace {
        let namespace = namespace_path(namespace);
        enter_mount_namespace(&namespace)?;
        say(&format_args!("entered the mount namespace {}", namespace.display()));
    }

    // Before the work is done, and the same directory after it.
    let mount_point = open_mount_point(arguments.mount_point.as_os_str())?;
    let mut step = |step: Step| match step {
        Step::Copying { done, total } => bar.draw(done, total),
        step => {
            bar.clear();
            say(&step);
        }
    };
    let mount = options.mount_with(arguments.image.as_os_str(), &mut step);
    bar.clear();
    let mount = mount?;
    let directory = arguments.mount_point.display();
    if arguments.fake {
        say(&format_args!("not attached to {directory}: -f"));
        return Ok(());
    }
    mount.attach(mount_point)?;
    let read_only = match (options.read_only, options.is_read_only()) {
        (false, true) => ", read-only: there is no upperdir",
        _ => "",
    };
    say(&format_args!("attached to {directory}{read_only}"));
    Ok(())
}

/// A progress bar, in the last line of a terminal.
struct Bar {
    wanted: bool,
    drawn: bool,
}

impl Bar {
    const WIDTH: u64 = 40;

    fn draw(&mut self, done: u64, total: u64) {
        if self.wanted {
            let filled = (done * Bar::WIDTH / total.max(1)) as usize;
            let (bar, percent) = ("#".repeat(filled), done * 100 / total.max(1));
            let width = Bar::WIDTH as usize;
            print_error(&format!("\rcopying [{bar:<width$}] {percent:3}%"));
            self.drawn = true;
        }
    }

    fn clear(&mut self) {
        if self.drawn {
            // To the start of the line, and erase what is there.
            print_error("\r\x1b[K");
            self.drawn = false;
        }
    }
}

/// What the command line asks for.
enum Command {
    Mount(Arguments),
    Print(&'static str),
}

struct Arguments {
    image: OsString,
    mount_point: OsString,
    options: OsString,
    sloppy: bool,
    fake: bool,
    verbose: bool,
    namespace: Option<OsString>,
}

impl Command {
    fn parse(mut parser: Parser) -> Result<Command, lexopt::Error> {
        let mut operands = Vec::new();
        let mut options = Vec::new();
        let (mut sloppy, mut fake, mut verbose, mut namespace) = (false, false, false, None);
        while let Some(argument) = parser.next()? {
            match argument {
                Arg::Short('o') => options.push(option_text(parser.value()?)?),
                Arg::Short('s') => sloppy = true,
                Arg::Short('f') => fake = true,
                Arg::Short('n') => {}
                Arg::Short('v') => verbose = true,
                Arg::Short('N') => namespace = Some(not_empty("-N", parser.value()?)?),
                Arg::Short('t') => require_composefs(&parser.value()?)?,
                Arg::Short('h') | Arg::Long("help") => return Ok(Command::Print(USAGE)),
                Arg::Short('V') | Arg::Long("version") => {
                    let version =
                        concat!("mount.composefs from sealmount ", env!("CARGO_PKG_VERSION"));
                    return Ok(Command::Print(version));
                }
                Arg::Value(operand) => operands.push(not_empty("operand", operand)?),
                _ => return Err(argument.unexpected()),
            }
        }
        let [image, mount_point] = <[OsString; 2]>::try_from(operands).map_err(|operands| {
            format!("two operands wanted, the image and the directory; {} given", operands.len())
        })?;
        let options = options.join(OsStr::new(","));
        Ok(Command::Mount(Arguments {
            image,
            mount_point,
            options,
            sloppy,
            fake,
            verbose,
            namespace,
        }))
    }
}

fn not_empty(what: &str, value: OsString) -> Result<OsString, lexopt::Error> {
    if value.is_empty() { Err(format!("an empty {what}").into()) } else { Ok(value) }
}

/// The value of one `-o`. A backslash at its end would escape the comma that joins it with the next.
fn option_text(text: OsString) -> Result<OsString, lexopt::Error> {
    let backslashes = text.as_encoded_bytes().iter().rev().take_while(|byte| **byte == b'\\');
    match backslashes.count() % 2 {
        0 => Ok(text),
        _ => {
            Err(format!("-o {}: ends in a backslash, which escapes nothing", text.display()).into())
        }
    }
}

fn require_composefs(fs_type: &OsStr) -> Result<(), lexopt::Error> {
    let fs_type = fs_type.as_encoded_bytes();
    if fs_type == b"composefs" || fs_type.starts_with(b"composefs.") {
        return Ok(());
    }
    let fs_type = String::from_utf8_lossy(fs_type);
    Err(format!("-t {fs_type}: only composefs can be mounted").into())
}

/// `namespace` is the PID of a process in the namespace, or a path such as /proc/PID/ns/mnt.
fn namespace_path(namespace: &OsStr) -> PathBuf {
    match namespace.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
        true => PathBuf::from("/proc").join(namespace).join("ns/mnt"),
        false => PathBuf::from(namespace),
    }
}
