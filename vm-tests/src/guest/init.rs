//! Process 1: makes the machine ready, then runs what the host asks for.

use super::injected::STOP_AND_EXECUTE;
use super::scenarios::scenarios;
use super::{faults, parallel};
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
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// The token of the frame that a scenario's process hands to process 1: it need not be told apart.
const IN_PROCESS: &str = "scenario";

/// Runs as process 1, or as the process of one scenario.
pub fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match &arguments[1..] {
        [flag, name] if flag == "--scenario" => be_scenario(name),
        [flag] if flag == "--user-namespace" => be_user_namespace(),
        [flag] if flag == parallel::TAKE_LOOP_DEVICES => {
            parallel::take_loop_devices().expect("loop devices can be taken");
        }
        [flag, program, arguments @ ..] if flag == STOP_AND_EXECUTE => {
            nix::sys::signal::raise(nix::sys::signal::SIGSTOP).expect("a process may stop itself");
            panic!("{program}: {}", Command::new(program).args(arguments).exec());
        }
        [flag, ..] if flag == faults::SAY_NOTHING => loop {
            std::thread::park();
        },
        _ if std::process::id() == 1 => be_init(),
        _ => eprintln!(
            "vm-init is the first process of a virtual machine; it does nothing elsewhere."
        ),
    }
}

fn be_init() {
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

/// Until the host says that it is enough.
fn serve() -> Result<(), Error> {
    mount_system_directories()?;
    load_modules()?;
    if let Ok(program) = fs::read_to_string(first_stage::TAKES_OVER) {
        // It may stay in this root and be, or become, vm-init itself.
        fs::remove_file(first_stage::TAKES_OVER)?;
        let error = Command::new(program.trim()).exec();
        return Err(format!("cannot execute {}: {error}", program.trim()).into());
    }
    // From here on the kernel's own words about mounts are worth their time on a slow serial line.
    fs::write("/proc/sys/kernel/printk", "7")
        .context(|| "cannot set the console's log level".into())?;

    let token =
        command_line(TOKEN)?.ok_or_else(|| format!("no {TOKEN} on the kernel command line"))?;
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
                // The log of the scenario has to be with the host before its result.
                let _ = tcdrain(std::io::stderr());
                channel.write_all(answer.encode(&token).as_bytes())?;
            }
            Ok(Frame::Off) => return Ok(()),
            Ok(other) => return Err(format!("the host said {other:?}").into()),
            Err(_) => {}
        }
    }
}

fn mount_system_directories() -> Result<(), Error> {
    for (kind, dir) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        // A later root may be read-only and have it, and may have been given these mounts too.
        let _ = fs::create_dir(dir);
        match mount(kind, dir, kind, MountFlags::empty(), None) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(format!("cannot mount {kind} on {dir}: {error}").into()),
        }
    }
    Ok(())
}

/// A module that cannot be loaded is left to the scenarios to miss: some are alternatives that fit
/// other processors.
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

/// Raw, so that requests are not echoed back as if they were answers.
fn open_channel() -> Result<File, Error> {
    let channel = File::options()
        .read(true)
        .write(true)
        .open(CHANNEL)
        .context(|| format!("cannot open {CHANNEL}, the second serial port"))?;
    let mut settings = tcgetattr(&channel)?;
    settings.make_raw();
    tcsetattr(&channel, OptionalActions::Now, &settings)?;
    Ok(channel)
}

fn find(name: &str) -> Option<&'static Scenario> {
    scenarios().chain(faults::FAULTS).find(|scenario| scenario.name == name)
}

/// Runs a scenario in a process of its own and says how it ended.
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
    let scenario = find(name).ok_or("this vm-init has no such scenario")?;
    // A memory file rather than a pipe: it needs no reader, and nobody who inherits it keeps us waiting.
    let mut result = File::from(rustix::fs::memfd_create("result", MemfdFlags::CLOEXEC)?);
    let child = Command::new("/proc/self/exe")
        .args(["--scenario", name])
        .stdin(result.try_clone()?)
        .process_group(0)
        .spawn()
        .context(|| "cannot start the scenario's process".into())?;
    let pid = Pid::from_child(&child);
    let status = wait_for(pid, scenario.time_limit);
    // Whatever it started and left running. If the last of them is gone already, so much the better.
    let _ = kill_process_group(pid, Signal::KILL);
    let Some(status) = status? else {
        return Err(format!(
            "still running after its time limit of {:?}; killed",
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
            Err(format!("its process ended without a result ({status})").into())
        }
    }
}

/// Waits for a process, and meanwhile does what process 1 is for: reaps all others. None: too late.
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

/// The scenario's own process. Its result goes to the memory file that is its standard input.
fn be_scenario(name: &str) {
    let result = std::io::stdin().as_fd().try_clone_to_owned().map(File::from);
    let mut result = result.expect("standard input is open");
    // Scenarios start programs of their own, whose standard input is nothing of ours.
    let null = File::open("/dev/null").expect("/dev/null is in devtmpfs");
    rustix::stdio::dup2_stdin(&null).expect("standard input can be replaced");

    let panicked = std::sync::Arc::new(std::sync::Mutex::new(
        result.try_clone().expect("a file can be cloned"),
    ));
    let (name_of_panicked, shown) = (name.to_owned(), std::panic::take_hook());
    let main_thread = std::thread::current().id();
    std::panic::set_hook(Box::new(move |info| {
        shown(info);
        // A scenario may expect a thread of its own to panic; its main thread, never.
        if std::thread::current().id() == main_thread {
            let frame =
                Frame::Failed { scenario: name_of_panicked.clone(), message: info.to_string() };
            let mut file = panicked.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let _ = file.write_all(frame.encode(IN_PROCESS).as_bytes());
        }
    }));

    let outcome = find(name).ok_or("no such scenario".into()).and_then(|scenario| {
        own_mount_namespace()?;
        (scenario.run)(&mut Guest::here())
    });
    let frame = match outcome {
        Ok(()) => Frame::Passed { scenario: name.into() },
        Err(error) => Frame::Failed { scenario: name.into(), message: error.to_string() },
    };
    result.write_all(frame.encode(IN_PROCESS).as_bytes()).expect("memory is not full");
}

/// So that the mounts a scenario leaves behind are gone when the next one starts.
fn own_mount_namespace() -> Result<(), Error> {
    sealmount_sys::unshare_mount_namespace().context(|| "cannot make a mount namespace".into())?;
    sealmount_sys::mount_setattr_private().context(|| "cannot make / private".into())?;
    Ok(())
}

/// Holds a user namespace until standard input is closed.
fn be_user_namespace() {
    sealmount_sys::unshare_user_namespace().expect("root may make a user namespace");
    println!();
    let _ = std::io::stdin().read_line(&mut String::new());
}
