//! mount.composefs, the mount helper: arguments and messages of mount(8)'s protocol.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lexopt::{Arg, Parser};
use sealmount::{
    AttachedMount, Error, Event, MountOptions, ObjectCheck, RemountOptions, enter_mount_namespace,
    open_mount_point,
};

use crate::program::{Failure, one_line, print, print_error};

pub const NAME: &str = "mount.composefs";

const USAGE: &str = "\
Usage: mount.composefs [-sfnv] [-N NAMESPACE] -o basedir=PATH[,OPTION...] IMAGE DIRECTORY

Mounts a composefs image, as the helper of mount(8) or called directly.

  -o OPTION[,OPTION...]  may be given several times; see below
  -s                     tolerate unknown options
  -f                     fake: check everything, attach nothing
  -n                     write no record of the options to /run/sealmount
  -v                     report each step on stderr, one line each
  -N NAMESPACE           mount in this mount namespace, a PID or a path; all paths belong to it
  -t TYPE                accepted: composefs or composefs.SUBTYPE
  -h, --help             print this text
  -V, --version          print the version

Options:
  basedir=PATH[:PATH...] object directories; write a backslash before : and , and itself
  digest=DIGEST          the image must have this fs-verity digest; implies verity
  verity[=require]       check each object against the image; reject objects without fs-verity
  verity=try             check objects if kernel and objects allow it
  verity=off, noverity   do not check objects
  tryverity              as verity=try; with digest=, as verity
  check=sample           with verity, sample objects for fs-verity and read a few files (default)
  check=all              check type and size of every object; with verity, also its fs-verity digest
  check=content          the same; also read every object and compute its digest
  check=none             do not check objects before the mount
  copy[=memfd]           mount a copy of the image in sealed memory; the image may be
                         compressed with zstd, xz or gzip
  copy=ramfs             the same, in memory that is never swapped out
  size=LIMIT             maximum size of the copy: bytes (suffix k, m, g), or a percentage
  upperdir=PATH,workdir=PATH
                         a layer that receives changes
  idmap=PATH             a user namespace, whose mapping the files of the image get
  ro, rw, nosuid, nodev, noexec, nosymfollow, noatime, sync, context=, ...
                         as for mount(8)
  remount                change these flags of the mount on DIRECTORY; every other option
                         must be an option of the mount

The manual page mount.composefs(8) describes them all.";

pub fn run() -> Result<(), Failure> {
    let arguments = match Command::parse(Parser::from_env()) {
        Ok(Command::Mount(arguments)) => arguments,
        Ok(Command::Print(text)) => return print(text),
        Err(error) => return Err(Failure::usage(error.to_string(), "see mount.composefs --help")),
    };
    match RemountOptions::is_requested(&arguments.options)? {
        true => remount(&arguments),
        false => mount(&arguments),
    }
}

fn mount(arguments: &Arguments) -> Result<(), Failure> {
    let say = |text: &dyn Display| arguments.say(text);
    let mut bar = Bar::new(arguments.verbose && io::stderr().is_terminal());

    let options = if arguments.sloppy {
        let parsed = MountOptions::parse_sloppy(&arguments.options)?;
        arguments.say_unknown(parsed.unknown);
        parsed.options
    } else {
        MountOptions::parse(&arguments.options)?
    };
    arguments.enter_namespace()?;

    // A missing directory is reported before an image is copied.
    let mount_point = open_mount_point(arguments.mount_point.as_os_str())?;
    let mut report = |event: Event| {
        match event {
            Event::Copying(progress) => bar.draw("copying", progress.done, progress.total),
            // Without contents, files are the work.
            Event::Checking(progress) if progress.total_bytes == 0 => {
                bar.draw("checking", progress.done, progress.total);
            }
            Event::Checking(progress) => {
                bar.draw("checking", progress.bytes, progress.total_bytes);
            }
            event => {
                bar.clear();
                say(&event);
            }
        }
        ControlFlow::Continue(())
    };
    let image = arguments.image.as_os_str();
    // Some events need work of their own.
    let mount = match arguments.verbose {
        true => options.mount_with_events(image, &mut report),
        false => options.mount(image),
    };
    bar.clear();
    let mount = mount?;
    let directory = arguments.mount_point.display();
    if arguments.fake {
        say(&format_args!("not attached to {directory}: -f"));
        return Ok(());
    }
    let record = if arguments.no_record { Ok(None) } else { options.record(&mount) };
    mount.attach(mount_point)?;
    let read_only = match (options.overlay.read_only, options.overlay.is_read_only()) {
        (false, true) => ", read-only: there is no upperdir",
        _ => "",
    };
    say(&format_args!("attached to {directory}{read_only}"));
    // A mount without a record is complete. Only a remount needs the record.
    match record.and_then(|record| record.map(|record| record.write()).transpose()) {
        Ok(Some(())) => say(&"options recorded for a remount"),
        Ok(None) => {}
        Err(error) => say(&format_args!("options not recorded: {error}")),
    }
    Ok(())
}

fn remount(arguments: &Arguments) -> Result<(), Failure> {
    let options = RemountOptions::parse(&arguments.options)?;
    arguments.enter_namespace()?;
    let mount = AttachedMount::open(arguments.mount_point.as_os_str()).map_err(Error::from)?;
    let flags = if arguments.sloppy {
        let (flags, unknown) = mount.compare_sloppy(&options)?;
        arguments.say_unknown(unknown);
        flags
    } else {
        mount.compare(&options)?
    };
    let directory = arguments.mount_point.display();
    arguments.say(&format_args!("{directory}: the mount has all options that cannot change"));
    if let Some(check) = options.check().filter(|check| *check != ObjectCheck::Off) {
        arguments.say(&format_args!("{check}: not done, because a remount does not check objects"));
    }
    let read_only = match flags.read_only || mount.has_upper_layer() {
        true => "",
        false => ", read-only: there is no upperdir",
    };
    if arguments.fake {
        let mut after = flags;
        after.read_only |= !mount.has_upper_layer();
        arguments.say(&format_args!("{directory}: not remounted with {after}{read_only}: -f"));
        return Ok(());
    }
    let report = mount.remount(&flags)?;
    let (before, after) = (report.before, report.after);
    arguments.say(&format_args!("{directory}: remounted from {before} to {after}{read_only}"));
    Ok(())
}

/// A progress bar in the last line of a terminal, for work that lasts longer than half a second.
struct Bar {
    wanted: bool,
    drawn: bool,
    next: Instant,
    /// The largest drawn share, in thousandths. The bar does not go back if the estimate of a total rises.
    thousandths: u64,
}

impl Bar {
    const WIDTH: u64 = 40;

    fn new(wanted: bool) -> Bar {
        Bar {
            wanted,
            drawn: false,
            next: Instant::now() + Duration::from_millis(500),
            thousandths: 0,
        }
    }

    fn draw(&mut self, work: &str, done: u64, total: u64) {
        let now = Instant::now();
        if !self.wanted || now < self.next {
            return;
        }
        self.next = now + Duration::from_millis(100);
        // A total may be an estimate.
        let thousandths = (done as u128 * 1000 / total.max(1) as u128).min(1000) as u64;
        self.thousandths = self.thousandths.max(thousandths);
        let share = |width: u64| self.thousandths * width / 1000;
        let (bar, percent) = ("#".repeat(share(Bar::WIDTH) as usize), share(100));
        let width = Bar::WIDTH as usize;
        print_error(&format!("\r{work} [{bar:<width$}] {percent:3}%"));
        self.drawn = true;
    }

    fn clear(&mut self) {
        if self.drawn {
            // Moves to the start of the line and erases it.
            print_error("\r\x1b[K");
            self.drawn = false;
        }
        self.thousandths = 0;
    }
}

/// The command line.
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
    no_record: bool,
    namespace: Option<OsString>,
}

impl Arguments {
    /// Prints one line, with `-v` only.
    fn say(&self, text: &dyn Display) {
        if self.verbose {
            print_error(&format!("{NAME}: {}\n", one_line(text)));
        }
    }

    fn say_unknown(&self, names: Vec<OsString>) {
        for name in names {
            self.say(&format_args!("option {} is unknown: ignored", name.display()));
        }
    }

    fn enter_namespace(&self) -> Result<(), Error> {
        let Some(namespace) = &self.namespace else { return Ok(()) };
        let namespace = namespace_path(namespace);
        enter_mount_namespace(&namespace)?;
        self.say(&format_args!("entered the mount namespace {}", namespace.display()));
        Ok(())
    }
}

impl Command {
    fn parse(mut parser: Parser) -> Result<Command, lexopt::Error> {
        let mut operands = Vec::new();
        let mut options = Vec::new();
        let (mut sloppy, mut fake, mut verbose, mut namespace) = (false, false, false, None);
        let mut no_record = false;
        while let Some(argument) = parser.next()? {
            match argument {
                Arg::Short('o') => options.push(option_text(parser.value()?)?),
                Arg::Short('s') => sloppy = true,
                Arg::Short('f') => fake = true,
                Arg::Short('n') => no_record = true,
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
        let options = options.join(OsStr::new(","));
        let is_remount = RemountOptions::is_requested(&options) == Ok(true);
        let [image, mount_point] = <[OsString; 2]>::try_from(operands)
            .map_err(|operands| wrong_operands(operands.len(), is_remount))?;
        Ok(Command::Mount(Arguments {
            image,
            mount_point,
            options,
            sloppy,
            fake,
            verbose,
            no_record,
            namespace,
        }))
    }
}

fn wrong_operands(count: usize, is_remount: bool) -> String {
    let expected = "arguments: expected an image and a directory, got";
    match (count, is_remount) {
        (0, true) => {
            "arguments: cannot remount: mount(8) passed no directory, because the directory is \
                      not a mount point and has no line in fstab"
                .into()
        }
        (1, true) => format!("{expected} 1 operand: give any word as the image, such as none"),
        (1, false) => format!("{expected} 1 operand"),
        _ => format!("{expected} {count} operands"),
    }
}

fn not_empty(what: &str, value: OsString) -> Result<OsString, lexopt::Error> {
    if value.is_empty() { Err(format!("arguments: empty {what}").into()) } else { Ok(value) }
}

/// Returns the value of one `-o`. A backslash at its end would escape the comma before the next value.
fn option_text(text: OsString) -> Result<OsString, lexopt::Error> {
    let backslashes = text.as_encoded_bytes().iter().rev().take_while(|byte| **byte == b'\\');
    match backslashes.count() % 2 {
        0 => Ok(text),
        _ => {
            Err(format!("-o {}: cannot end in a backslash: it escapes nothing", text.display())
                .into())
        }
    }
}

fn require_composefs(fs_type: &OsStr) -> Result<(), lexopt::Error> {
    let fs_type = fs_type.as_encoded_bytes();
    if fs_type == b"composefs" || fs_type.starts_with(b"composefs.") {
        return Ok(());
    }
    let fs_type = String::from_utf8_lossy(fs_type);
    Err(format!("-t {fs_type}: cannot mount this type, only composefs").into())
}

/// Returns the path of a namespace, which is given as the PID of a process in it or as a path.
fn namespace_path(namespace: &OsStr) -> PathBuf {
    match namespace.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
        true => PathBuf::from("/proc").join(namespace).join("ns/mnt"),
        false => PathBuf::from(namespace),
    }
}
