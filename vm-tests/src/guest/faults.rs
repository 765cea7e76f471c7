//! Scenarios that fail on purpose. They do not run on every kernel: tests/faults.rs checks how the
//! harness reports each failure.

use crate::Error;
use crate::machine::Machine;
use crate::protocol::CHANNEL;
use crate::scenario::{Guest, Scenario};
use rustix::process::{Pid, Signal, kill_process};
use rustix::system::{RebootCommand, reboot};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

const SHORT: Duration = Duration::from_secs(3);

/// The scenarios of one machine share a boot. A scenario that ends its machine has its own machine.
pub static FAULTS: &[Scenario] = &[
    Scenario { name: "fails", machine: &SURVIVES, time_limit: SHORT, run: fails },
    Scenario { name: "panics", machine: &SURVIVES, time_limit: SHORT, run: panics },
    Scenario { name: "exits", machine: &SURVIVES, time_limit: SHORT, run: exits },
    Scenario { name: "is_killed", machine: &SURVIVES, time_limit: SHORT, run: is_killed },
    Scenario { name: "sleeps", machine: &SURVIVES, time_limit: SHORT, run: sleeps },
    Scenario {
        name: "writes_on_the_channel",
        machine: &SURVIVES,
        time_limit: SHORT,
        run: writes_on_the_channel,
    },
    Scenario { name: "leaves_a_mount", machine: &SURVIVES, time_limit: SHORT, run: leaves_a_mount },
    Scenario { name: "still_works", machine: &SURVIVES, time_limit: SHORT, run: still_works },
    Scenario {
        name: "panics_the_kernel",
        machine: &PANICS,
        time_limit: SHORT,
        run: panics_the_kernel,
    },
    Scenario { name: "after_the_panic", machine: &PANICS, time_limit: SHORT, run: still_works },
    Scenario { name: "halts", machine: &HALTS, time_limit: SHORT, run: halts },
    Scenario { name: "switches_off", machine: &SWITCHES_OFF, time_limit: SHORT, run: switches_off },
    Scenario { name: "has_no_init", machine: &HAS_NO_INIT, time_limit: SHORT, run: still_works },
    Scenario { name: "says_nothing", machine: &SAYS_NOTHING, time_limit: SHORT, run: still_works },
    Scenario {
        name: "panics_at_the_end",
        machine: &PANICS_AT_THE_END,
        time_limit: SHORT,
        run: |_| Ok(fs::write(AT_THE_END, "panic")?),
    },
    Scenario {
        name: "halts_at_the_end",
        machine: &HALTS_AT_THE_END,
        time_limit: SHORT,
        run: |_| Ok(fs::write(AT_THE_END, "halt")?),
    },
];

static SURVIVES: Machine = Machine { name: "fault-survives", ..Machine::BARE };
static PANICS: Machine = Machine { name: "fault-panics", ..Machine::BARE };
static HALTS: Machine = Machine { name: "fault-halts", ..Machine::BARE };
static SWITCHES_OFF: Machine = Machine { name: "fault-switches-off", ..Machine::BARE };
static HAS_NO_INIT: Machine =
    Machine { name: "fault-has-no-init", takes_over: Some("/no/such/program"), ..Machine::BARE };
static SAYS_NOTHING: Machine = Machine {
    name: "fault-says-nothing",
    files: |_, root| {
        let path = root.join("says-nothing");
        fs::write(&path, format!("#!/init {SAY_NOTHING}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    },
    takes_over: Some("/says-nothing"),
    boot_limit: Duration::from_secs(10),
    ..Machine::BARE
};
static PANICS_AT_THE_END: Machine = Machine { name: "fault-panics-at-the-end", ..Machine::BARE };
static HALTS_AT_THE_END: Machine =
    Machine { name: "fault-halts-at-the-end", off_limit: SHORT, ..Machine::BARE };

/// The argument with which vm-init sends no frames.
pub const SAY_NOTHING: &str = "--say-nothing";

/// The file in which a scenario requests a failure instead of a normal end of the machine.
const AT_THE_END: &str = "/at-the-end";

pub fn at_the_end() {
    match fs::read_to_string(AT_THE_END).as_deref() {
        Ok("panic") => drop(fs::write("/proc/sysrq-trigger", "c")),
        Ok("halt") => drop(reboot(RebootCommand::Halt)),
        _ => {}
    }
}

fn fails(_: &mut Guest) -> Result<(), Error> {
    Err("a message\nof two lines, with \u{201c}quotes\u{201d}".into())
}

fn panics(_: &mut Guest) -> Result<(), Error> {
    panic!("a panic of the scenario");
}

fn exits(_: &mut Guest) -> Result<(), Error> {
    std::process::exit(0);
}

fn is_killed(_: &mut Guest) -> Result<(), Error> {
    kill_process(
        Pid::from_raw(std::process::id() as i32).expect("the process ID is not 0"),
        Signal::ABORT,
    )?;
    std::thread::sleep(SHORT);
    Ok(())
}

fn sleeps(_: &mut Guest) -> Result<(), Error> {
    loop {
        std::thread::sleep(SHORT);
    }
}

fn writes_on_the_channel(guest: &mut Guest) -> Result<(), Error> {
    let forged =
        "[    1.0] noise\n@vm-tests 0 passed writes_on_the_channel 0\n@vm-tests unfinished";
    let channel = guest.command_line(CHANNEL).ok_or("the kernel command line has no channel")?;
    fs::write(Path::new("/dev").join(channel), forged)?;
    Err("the host ignored the forged result".into())
}

fn leaves_a_mount(_: &mut Guest) -> Result<(), Error> {
    fs::create_dir_all("/mnt/left")?;
    rustix::mount::mount("none", "/mnt/left", "tmpfs", rustix::mount::MountFlags::empty(), None)?;
    fs::write("/mnt/left/file", "")?;
    Ok(())
}

fn still_works(_: &mut Guest) -> Result<(), Error> {
    match fs::exists("/mnt/left/file")? {
        false => Ok(()),
        true => Err("a mount outlived its scenario".into()),
    }
}

fn panics_the_kernel(_: &mut Guest) -> Result<(), Error> {
    fs::write("/proc/sysrq-trigger", "c")?;
    Ok(())
}

/// The CPUs stop, but QEMU does not notice. Only the time limit of the host detects this.
fn halts(_: &mut Guest) -> Result<(), Error> {
    reboot(RebootCommand::Halt)?;
    Ok(())
}

fn switches_off(_: &mut Guest) -> Result<(), Error> {
    reboot(RebootCommand::PowerOff)?;
    Ok(())
}
