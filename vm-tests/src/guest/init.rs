//! Runs as process 1: prepares the machine, then runs the scenarios that the host requests.

use super::fault_injection::STOP_AND_EXECUTE;
use super::scenarios::scenarios;
use super::{faults, parallel, stages};
use crate::protocol::{CHANNEL, Frame, TOKEN};
use crate::scenario::{Guest, Scenario, command_line};
use crate::{Context, Error, first_stage};
use rustix::fs::MemfdFlags;
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process_group, wait};
use rustix::system::{RebootCommand, reboot};
use rustix::termios::{OptionalActions, tcdrain, tcgetattr, tcsetattr};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// The token of the frame that the process of a scenario passes to process 1. This frame does not need
/// a secret token.
const IN_PROCESS: &str = "scenario";

/// Runs as process 1, or as the process of one scenario.
pub fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match &arguments[1..] {
        [flag, name] if flag == "--scenario" => run_as_scenario(name),
        [flag] if flag == "--user-namespace" => hold_user_namespace(),
        [flag] if flag == parallel::TAKE_LOOP_DEVICES => {
            parallel::take_loop_devices().expect("cannot use loop devices");
        }
        [flag, image, objects] if flag == stages::HOLD_CLONES => {
            stages::hold_clones(Path::new(image), Path::new(objects)).expect("cannot clone mounts");
        }
        [flag, program, arguments @ ..] if flag == STOP_AND_EXECUTE => {
            nix::sys::signal::raise(nix::sys::signal::SIGSTOP).expect("a process can stop itself");
            panic!("{program}: {}", Command::new(program).args(arguments).exec());
        }
        [flag, ..] if flag == faults::SAY_NOTHING => loop {
            std::thread::park();
        },
        _ if std::process::id() == 1 => run_as_init(),
        _ => eprintln!("vm-init: cannot run here: vm-init must be process 1 of a virtual machine"),
    }
}

fn run_as_init() {
    if let Err(error) = serve() {
        eprintln!("vm-init: {error}");
        let unfit = Frame::Unfit { message: error.to_string() };
        if let (Ok(Some(token)), Ok(mut channel)) = (command_line(TOKEN), open_channel()) {
            let _ = channel.write_all(unfit.encode(&token).as_bytes());
            let _ = tcdrain(&channel);
        }
    }
    faults::at_the_end();
    let _ = reboot(RebootCommand::PowerOff);
}

/// Serves requests until the host requests the end.
fn serve() -> Result<(), Error> {
    mount_system_directories()?;
    load_modules()?;
    if let Ok(program) = fs::read_to_string(first_stage::TAKES_OVER) {
        // The program may stay in this root and later execute vm-init again, which must not find the
        // file.
        fs::remove_file(first_stage::TAKES_OVER)?;
        let error = Command::new(program.trim()).exec();
        return Err(format!("cannot execute {}: {error}", program.trim()).into());
    }
    // Scenarios need the kernel messages about mounts. Earlier messages would only delay the boot on
    // the slow serial line.
    fs::write("/proc/sys/kernel/printk", "7")
        .context(|| "cannot set the console's log level".into())?;

    let token =
        command_line(TOKEN)?.ok_or_else(|| format!("the kernel command line has no {TOKEN}"))?;
    let mut channel = open_channel()?;
    let mut requests = BufReader::new(channel.try_clone()?);
    let release = Guest::here().kernel_release();
    channel.write_all(Frame::Ready { release }.encode(&token).as_bytes())?;

    let mut line = Vec::new();
    loop {
        line.clear();
        if requests.read_until(b'\n', &mut line)? == 0 {
            return Err("the host closed the channel".into());
        }
        match Frame::decode(&line, &token) {
            Ok(Frame::Run { scenario }) => {
                let answer = run(&scenario);
                // The host must have the whole log of the scenario before its result.
                let _ = tcdrain(std::io::stderr());
                channel.write_all(answer.encode(&token).as_bytes())?;
            }
            Ok(Frame::Off) => return Ok(()),
            Ok(other) => return Err(format!("the host sent the unexpected frame {other:?}").into()),
            Err(_) => {}
        }
    }
}

fn mount_system_directories() -> Result<(), Error> {
    for (kind, dir) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        // A later root may be read-only and already have these directories and mounts.
        let _ = fs::create_dir(dir);
        match mount(kind, dir, kind, MountFlags::empty(), None) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(format!("cannot mount {kind} on {dir}: {error}").into()),
        }
    }
    Ok(())
}

/// Loads all modules. A failure is only logged, because some modules are alternatives for other CPUs. A
/// scenario fails if it needs a missing module.
fn load_modules() -> Result<(), Error> {
    let Ok(entries) = fs::read_dir(first_stage::MODULES) else {
        return Ok(());
    };
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, Error>>()?;
    paths.sort();
    for path in paths {
        let module = File::open(&path)?;
        match rustix::system::finit_module(&module, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => eprintln!("vm-init: cannot load {}: {error}", path.display()),
        }
    }
    Ok(())
}

/// Opens the channel in raw mode, so that the terminal does not echo requests as answers.
fn open_channel() -> Result<File, Error> {
    let name = command_line(CHANNEL)?
        .ok_or_else(|| format!("the kernel command line has no {CHANNEL}"))?;
    let path = Path::new("/dev").join(name);
    let channel = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .context(|| format!("cannot open {}, the second serial port", path.display()))?;
    let mut settings = tcgetattr(&channel)?;
    settings.make_raw();
    tcsetattr(&channel, OptionalActions::Now, &settings)?;
    Ok(channel)
}

fn find(name: &str) -> Option<&'static Scenario> {
    scenarios().chain(faults::FAULTS).find(|scenario| scenario.name == name)
}

/// Runs a scenario in a new process and returns its result.
fn run(name: &str) -> Frame {
    eprintln!("vm-init: scenario {name}");
    let started = Instant::now();
    match run_to_its_end(name) {
        Ok(frame) => {
            eprintln!("vm-init: scenario {name} took {:.1} s", started.elapsed().as_secs_f32());
            frame
        }
        Err(error) => Frame::Failed { scenario: name.into(), message: error.to_string() },
    }
}

fn run_to_its_end(name: &str) -> Result<Frame, Error> {
    let scenario = find(name).ok_or("vm-init has no scenario of this name")?;
    // A memfd needs no reader, unlike a pipe. A process that inherits a memfd cannot delay the end.
    let mut result = File::from(rustix::fs::memfd_create("result", MemfdFlags::CLOEXEC)?);
    let child = Command::new("/proc/self/exe")
        .args(["--scenario", name])
        .stdin(result.try_clone()?)
        .process_group(0)
        .spawn()
        .context(|| "cannot start the scenario's process".into())?;
    let pid = Pid::from_child(&child);
    let status = wait_for(pid, scenario.time_limit);
    // The scenario may have left processes running. The kill fails if no process is left, which is
    // fine.
    let _ = kill_process_group(pid, Signal::KILL);
    let Some(status) = status? else {
        return Err(format!(
            "the scenario exceeded its time limit of {:?} and was killed",
            scenario.time_limit
        )
        .into());
    };

    let mut text = Vec::new();
    result.rewind()?;
    result.read_to_end(&mut text)?;
    match Frame::decode(text.trim_ascii_start(), IN_PROCESS) {
        Ok(frame @ (Frame::Passed { .. } | Frame::Failed { .. })) => Ok(frame),
        _ => {
            let status = ExitStatus::from_raw(status.as_raw());
            Err(format!("the process of the scenario ended without a result ({status})").into())
        }
    }
}

/// Waits for a process. Meanwhile reaps all other processes, as process 1 must. Returns `None` if the
/// process exceeded the time limit.
fn wait_for(pid: Pid, time_limit: Duration) -> Result<Option<WaitStatus>, Error> {
    let deadline = Instant::now() + time_limit;
    let mut killed = false;
    loop {
        match wait(WaitOptions::NOHANG)
            .context(|| "cannot wait for the scenario's process".into())?
        {
            Some((ended, status)) if ended == pid => return Ok((!killed).then_some(status)),
            Some(_) => {}
            None => std::thread::sleep(Duration::from_millis(5)),
        }
        if !killed && Instant::now() > deadline {
            kill_process_group(pid, Signal::KILL)
                .context(|| "cannot kill the scenario's process".into())?;
            killed = true;
        }
    }
}

/// Runs as the process of a scenario. Writes the result to the memfd on standard input.
fn run_as_scenario(name: &str) {
    let result = std::io::stdin().as_fd().try_clone_to_owned().map(File::from);
    let mut result = result.expect("standard input is open");
    // Programs that a scenario starts must not inherit the memfd as standard input.
    let null = File::open("/dev/null").expect("/dev/null is in devtmpfs");
    rustix::stdio::dup2_stdin(&null).expect("standard input can be replaced");

    let panicked = std::sync::Arc::new(std::sync::Mutex::new(
        result.try_clone().expect("a file can be cloned"),
    ));
    let (name_of_panicked, shown) = (name.to_owned(), std::panic::take_hook());
    let main_thread = std::thread::current().id();
    std::panic::set_hook(Box::new(move |info| {
        shown(info);
        // A scenario may expect a panic in another thread, but not in its main thread.
        if std::thread::current().id() == main_thread {
            let frame =
                Frame::Failed { scenario: name_of_panicked.clone(), message: info.to_string() };
            let mut file = panicked.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let _ = file.write_all(frame.encode(IN_PROCESS).as_bytes());
        }
    }));

    let outcome =
        find(name).ok_or("vm-init has no scenario of this name".into()).and_then(|scenario| {
            own_mount_namespace()?;
            (scenario.run)(&mut Guest::here())
        });
    let frame = match outcome {
        Ok(()) => Frame::Passed { scenario: name.into() },
        Err(error) => Frame::Failed { scenario: name.into(), message: error.to_string() },
    };
    result.write_all(frame.encode(IN_PROCESS).as_bytes()).expect("the memfd has space");
}

/// Enters a new mount namespace, so that mounts of a scenario end with its process.
fn own_mount_namespace() -> Result<(), Error> {
    sealmount_sys::unshare_mount_namespace().context(|| "cannot make a mount namespace".into())?;
    sealmount_sys::mount_setattr_private().context(|| "cannot make / private".into())?;
    Ok(())
}

/// Holds a user namespace until standard input is closed.
fn hold_user_namespace() {
    sealmount_sys::unshare_user_namespace().expect("root can create a user namespace");
    println!();
    let _ = std::io::stdin().read_line(&mut String::new());
}
