//! Boots a machine, runs scenarios in it, and reports a verdict for each scenario, even if the machine
//! fails.

use super::accelerator::escaped;
use super::initramfs;
use super::kernels::Kernel;
use super::lab::Lab;
use super::monitor::Monitor;
use super::say::say;
use crate::arch::Arch;
use crate::machine::Machine;
use crate::programs::command;
use crate::protocol::{CHANNEL, Frame, NotAFrame, TOKEN};
use crate::scenario::Scenario;
use crate::{Context, Error};
use std::collections::hash_map::RandomState;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher};
use std::io::{BufRead, BufReader, Read, Write};
use std::iter::Peekable;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// The guest enforces the time limit of a scenario. The host waits this much longer before it gives up
/// on the guest.
const GRACE: Duration = Duration::from_secs(10);
/// The limit from the end of the QEMU output to the end of its process.
const END_LIMIT: Duration = Duration::from_secs(20);
/// The limit for the last messages of a kernel over an emulated serial line.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(5);

/// Kernels of all architectures truncate longer command lines.
const COMMAND_LINE_LIMIT: usize = 2047;

/// The reason why a scenario did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub message: String,
    /// The console output. It starts with the scenario if the machine was ready, else with the boot.
    pub log: String,
}

pub type Verdict = Result<(), Failure>;

/// Boots the kernel in the machine and runs the scenarios in their order. Calls `report` once for each
/// scenario, with its number and verdict, as soon as the verdict is known. The last verdict is known
/// when the machine is off.
pub fn run(
    lab: &Lab,
    kernel: &Kernel,
    machine: &Machine,
    scenarios: &[&Scenario],
    mut report: impl FnMut(usize, Verdict),
) {
    let mut left = scenarios.iter().copied().enumerate().peekable();
    if let Err(failure) = run_until_lost(lab, kernel, machine, &mut left, &mut report) {
        left.for_each(|(number, _)| report(number, Err(failure.clone())));
    }
}

/// Runs scenarios until the machine is lost. Then returns the failure of all remaining scenarios.
fn run_until_lost<'a>(
    lab: &Lab,
    kernel: &Kernel,
    machine: &Machine,
    scenarios: &mut Peekable<impl Iterator<Item = (usize, &'a Scenario)>>,
    report: &mut impl FnMut(usize, Verdict),
) -> Result<(), Failure> {
    let mut running = boot(lab, kernel, machine)?;
    let booted = running.started.elapsed();
    while let Some((number, scenario)) = scenarios.next() {
        let (mut verdict, lost) = running.run(scenario);
        if lost {
            report(number, verdict);
            return Err(
                running.failure(format!("not run: the machine was lost in {}", scenario.name))
            );
        }
        if scenarios.peek().is_none() {
            let ran = running.started.elapsed() - booted;
            if let Err(why) = running.switch_off(machine.off_limit) {
                let earlier = verdict.err().map_or("passed".into(), |failure| failure.message);
                verdict = Err(running.failure(format!("{earlier}\nthen: {why}")));
            }
            say(&format!(
                "{} {}: booted in {:.1} s, ran for {:.1} s",
                kernel.release,
                machine.name,
                booted.as_secs_f32(),
                ran.as_secs_f32()
            ));
        }
        report(number, verdict);
    }
    Ok(())
}

/// Starts the machine and waits until it is ready.
///
/// Starts the machine a second time if, before the first frame of vm-init, the machine hangs or a
/// signal ends QEMU. Under load, about one boot in several hundred hangs, and an assertion of QEMU
/// (hw/pci/msix.c) can fail. No code under test has run by then. There is no second start if the kernel
/// panics, QEMU exits or vm-init reports an error.
fn boot(lab: &Lab, kernel: &Kernel, machine: &Machine) -> Result<Running, Failure> {
    let cannot_start = |error| Failure {
        message: format!("cannot start the machine: {error}"),
        log: String::new(),
    };
    let name = format!("{}-{}", kernel.release, machine.name);
    let initramfs = initramfs::build(lab, kernel, machine).map_err(cannot_start)?;
    let mut earlier = String::new();
    loop {
        let mut running =
            Running::start(lab, &name, kernel, machine, &initramfs).map_err(cannot_start)?;
        let (started_again, why) = match running.wait_until_ready(kernel, machine.boot_limit) {
            Ok(()) => return Ok(running),
            Err(Silence::Hung(why)) => (Some("hung"), why),
            Err(Silence::Killed(why)) => (Some("killed"), why),
            Err(Silence::Ended(why)) => (None, why),
        };
        let Some(what) = started_again.filter(|_| earlier.is_empty()) else {
            let message = format!("the machine did not get ready: {why}{earlier}");
            return Err(running.failure(message));
        };
        let kept = lab.kept("log").join(format!("{name}.{what}.console"));
        let _ = fs::rename(&running.console, &kept);
        say(&format!(
            "{name} did not get ready: {why}; starting the machine again. See {}",
            kept.display()
        ));
        earlier = format!(", twice. The first time: {}", kept.display());
    }
}

/// The reason why a machine sends no frame. QEMU has ended by then.
enum Silence {
    Hung(String),
    /// A signal ended QEMU, and the kernel did not panic.
    Killed(String),
    Ended(String),
}

/// A started machine. Dropping the value ends QEMU.
struct Running {
    qemu: Child,
    started: Instant,
    token: String,
    requests: UnixStream,
    monitor: Monitor,
    /// The lines from the guest, until QEMU ends.
    answers: Receiver<Result<Frame, NotAFrame>>,
    damaged: usize,
    console: PathBuf,
    /// The offset in the console at which the log of the running scenario starts.
    log_start: usize,
    stderr: PathBuf,
}

impl Running {
    fn start(
        lab: &Lab,
        name: &str,
        kernel: &Kernel,
        machine: &Machine,
        initramfs: &Path,
    ) -> Result<Running, Error> {
        let console = lab.kept("log").join(format!("{name}.console"));
        let stderr = lab.temporary(&format!("{name}.stderr"));
        // QEMU opens the file late. The log of an earlier boot must not pass for the log of this boot.
        File::create(&console).context(|| format!("cannot make {}", console.display()))?;

        let token = format!("{:016x}", RandomState::new().build_hasher().finish());
        let arch = kernel.arch;
        let Arch { console: console_port, channel: channel_port, debug_words, .. } = arch;
        let words = (machine.command_line)(lab.binaries(arch))?;
        let words = format!(
            // An oops is a failure of the kernel, and the machine is unusable afterwards. nokaslr keeps
            // the addresses of the symbols.
            "console={console_port} quiet panic=-1 oops=panic nokaslr {debug_words} \
             {CHANNEL}={channel_port} {TOKEN}={token} {words}"
        );
        if words.len() > COMMAND_LINE_LIMIT {
            return Err(format!(
                "the kernel command line exceeds {COMMAND_LINE_LIMIT} bytes: {words}"
            )
            .into());
        }

        // setpriv ends QEMU when the tests end, even if they are killed.
        let mut qemu = command("setpriv");
        qemu.args(["--pdeathsig", "KILL", "--"])
            .args(&lab.wrapper)
            .arg(arch.qemu)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-machine", arch.machine, "-smp", "2"])
            .args(["-m", &format!("{}M", machine.memory_mib)])
            .args(lab.accelerator(arch))
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &words])
            .arg("-serial")
            .arg(format!("file:{}", escaped(&console)))
            // An inherited connection needs no path. A path could exceed the length limit of a socket
            // address.
            .args(["-chardev", "socket,id=channel,fd=0"])
            .args(arch.channel_device)
            .args(["-chardev", "socket,id=monitor,fd=1", "-mon", "chardev=monitor,mode=control"]);
        for (number, disk) in machine.disks.iter().enumerate() {
            let image = lab.disk(arch, disk)?;
            let (id, serial) = (format!("disk{number}"), disk.name);
            qemu.arg("-drive")
                // Boots share the image. snapshot=on writes the changes of a boot to an unnamed
                // temporary file.
                .arg(format!(
                    "if=none,id={id},format=raw,snapshot=on,cache=unsafe,file={}",
                    escaped(&image)
                ))
                .args(["-device", &format!("virtio-blk-pci,drive={id},serial={serial}")]);
        }
        let (requests, requested) = UnixStream::pair()?;
        let (monitor, monitored) = UnixStream::pair()?;
        let qemu = qemu
            .env("TMPDIR", lab.temporary(""))
            .stdin(OwnedFd::from(requested))
            .stdout(OwnedFd::from(monitored))
            .stderr(File::create(&stderr)?)
            .spawn()
            .context(|| "cannot start QEMU".into())?;

        let mut lines = BufReader::new(requests.try_clone()?);
        let (sender, answers) = channel();
        let own_token = token.clone();
        thread::spawn(move || {
            let mut line = Vec::new();
            while matches!(lines.read_until(b'\n', &mut line), Ok(1..)) {
                if sender.send(Frame::decode(&line, &own_token)).is_err() {
                    return;
                }
                line.clear();
            }
        });
        Ok(Running {
            qemu,
            started: Instant::now(),
            token,
            requests,
            monitor: Monitor::new(arch, monitor),
            answers,
            damaged: 0,
            console,
            log_start: 0,
            stderr,
        })
    }

    fn wait_until_ready(&mut self, kernel: &Kernel, limit: Duration) -> Result<(), Silence> {
        let why = match self.answer(limit)? {
            Frame::Ready { release } if release == kernel.release => return Ok(()),
            Frame::Ready { release } => {
                format!(
                    "the machine runs the kernel {release}, but the image is of {}",
                    kernel.release
                )
            }
            Frame::Unfit { message } => message,
            other => format!("unexpected frame {other:?}"),
        };
        self.kill();
        Err(Silence::Ended(why))
    }

    /// Returns the verdict, and whether the machine is lost.
    fn run(&mut self, scenario: &Scenario) -> (Verdict, bool) {
        self.log_start = self.log().len();
        let request = Frame::Run { scenario: scenario.name.into() };
        // If QEMU has ended, the wait for the answer reports that.
        let _ = self.requests.write_all(request.encode(&self.token).as_bytes());
        match self.answer(scenario.time_limit + GRACE) {
            Ok(Frame::Passed { scenario: name }) if name == scenario.name => (Ok(()), false),
            Ok(Frame::Failed { scenario: name, message }) if name == scenario.name => {
                (Err(self.failure(message)), false)
            }
            Ok(other) => {
                (Err(self.failure(format!("no result: unexpected frame {other:?}"))), true)
            }
            Err(Silence::Hung(why) | Silence::Killed(why) | Silence::Ended(why)) => {
                (Err(self.failure(format!("no result: {why}"))), true)
            }
        }
    }

    /// Returns the next frame, or the reason why no frame arrives. In that case the machine is off.
    fn answer(&mut self, limit: Duration) -> Result<Frame, Silence> {
        let deadline = Instant::now() + limit;
        loop {
            match self.answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Ok(frame)) => return Ok(frame),
                Ok(Err(NotAFrame::Noise)) => {}
                Ok(Err(NotAFrame::Damaged)) => self.damaged += 1,
                Err(why) => {
                    let damaged = match self.damaged {
                        0 => String::new(),
                        lines => format!(" ({lines} damaged lines received)"),
                    };
                    if why == RecvTimeoutError::Disconnected {
                        let (why, is_killed) = self.end_reason();
                        self.kill();
                        return Err(match is_killed {
                            true => Silence::Killed(why + &damaged),
                            false => Silence::Ended(why + &damaged),
                        });
                    }
                    self.log_cpu_state();
                    return Err(Silence::Hung(format!(
                        "the machine hung: no frame for {limit:?}{damaged}"
                    )));
                }
            }
        }
    }

    /// Ends a machine that hangs, and appends the state of its CPUs to the console.
    fn log_cpu_state(&mut self) {
        let registers = self.monitor.interrupt().unwrap_or_else(|error| error);
        self.wait(LAST_WORDS_LIMIT);
        self.kill();
        if let Ok(mut console) = File::options().append(true).open(&self.console) {
            let _ = write!(console, "\n--- CPU state when the machine hung\n{registers}");
        }
    }

    /// Returns why QEMU ended, and whether a signal ended QEMU.
    fn end_reason(&mut self) -> (String, bool) {
        let status = self.wait(END_LIMIT);
        match (self.kernel_panic(), status) {
            (Some(panic), _) => (panic, false),
            (None, Some(status)) if status.success() => {
                ("the machine switched itself off or reset".into(), false)
            }
            (None, status) => {
                let is_killed = status.is_some_and(|status| status.signal().is_some());
                (self.end_of_qemu(status), is_killed)
            }
        }
    }

    fn end_of_qemu(&self, status: Option<ExitStatus>) -> String {
        let stderr = fs::read_to_string(&self.stderr).unwrap_or_default();
        let status = status.map_or("no exit status".into(), |status| status.to_string());
        format!("QEMU ended ({status}): {}", stderr.trim())
    }

    /// Searches the whole console, because a kernel can panic between two scenarios.
    fn kernel_panic(&self) -> Option<String> {
        let log = self.log();
        log.lines().find_map(|line| Some(line[line.find("Kernel panic")?..].to_owned()))
    }

    /// Requests that the guest switch the machine off. Returns the reason if the machine does not end
    /// normally.
    fn switch_off(&mut self, limit: Duration) -> Result<(), String> {
        let _ = self.requests.write_all(Frame::Off.encode(&self.token).as_bytes());
        let Some(status) = self.wait(limit) else {
            self.log_cpu_state();
            return Err(format!("the machine was not off after {limit:?}"));
        };
        match self.kernel_panic() {
            Some(panic) => Err(panic),
            None if status.success() => Ok(()),
            None => Err(self.end_of_qemu(Some(status))),
        }
    }

    fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.qemu.try_wait() {
                return Some(status);
            }
            thread::sleep(Duration::from_millis(10));
        }
        None
    }

    fn kill(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }

    fn failure(&self, message: String) -> Failure {
        let log = self.log();
        Failure { message, log: log.get(self.log_start..).unwrap_or(&log).to_owned() }
    }

    fn log(&self) -> String {
        let mut log = Vec::new();
        if let Ok(mut file) = File::open(&self.console) {
            let _ = file.read_to_end(&mut log);
        }
        String::from_utf8_lossy(&log).replace('\r', "")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}
