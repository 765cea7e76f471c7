//! Runs a machine: boots it, has it run scenarios, and says of each how it ended, whatever happens to
//! the machine.

use super::kernels::Kernel;
use super::programs::command;
use super::{Lab, initramfs, say};
use crate::guest::TOKEN;
use crate::protocol::{Frame, NotAFrame};
use crate::scenario::{Machine, Scenario};
use crate::{Context, Error};
use std::collections::hash_map::RandomState;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// From starting QEMU to the first word of vm-init. Emulated on an idle machine: a few seconds.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How much later than the guest, which enforces a scenario's limit, the host gives up on the guest.
const GRACE: Duration = Duration::from_secs(10);
const OFF_LIMIT: Duration = Duration::from_secs(20);

/// x86 kernels cut off what is longer.
const COMMAND_LINE_LIMIT: usize = 2047;

/// Why a scenario did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub message: String,
    /// The console: from the start of the scenario if its machine was ready, else all of it.
    pub log: String,
}

pub type Verdict = Result<(), Failure>;

/// Boots the kernel in the machine, runs the scenarios in their order and hands on each one's verdict,
/// with its place in the list, as soon as it is known. Every scenario gets exactly one.
pub fn run(
    lab: &Lab,
    kernel: &Kernel,
    machine: &Machine,
    scenarios: &[&Scenario],
    mut report: impl FnMut(usize, Verdict),
) {
    let mut left = scenarios.iter().copied().enumerate();
    if let Err(failure) = run_until_lost(lab, kernel, machine, &mut left, &mut report) {
        left.for_each(|(number, _)| report(number, Err(failure.clone())));
    }
}

/// Fails with what is to be said of the scenarios that are left.
fn run_until_lost<'a>(
    lab: &Lab,
    kernel: &Kernel,
    machine: &Machine,
    scenarios: &mut impl Iterator<Item = (usize, &'a Scenario)>,
    report: &mut impl FnMut(usize, Verdict),
) -> Result<(), Failure> {
    let mut running = Running::start(lab, kernel, machine).map_err(|error| Failure {
        message: format!("cannot start the machine: {error}"),
        log: String::new(),
    })?;
    running.wait_until_ready(kernel).map_err(|message| running.failure(message))?;
    let booted = running.started.elapsed();
    for (number, scenario) in scenarios {
        let (verdict, lost) = running.run(scenario);
        report(number, verdict);
        if lost {
            return Err(
                running.failure(format!("not run: the machine was lost in {}", scenario.name))
            );
        }
    }
    say(&format!(
        "{} {}: booted in {:.1} s, ran for {:.1} s",
        kernel.release,
        machine.name,
        booted.as_secs_f32(),
        (running.started.elapsed() - booted).as_secs_f32()
    ));
    running.switch_off();
    Ok(())
}

/// A machine that was started; dropping it ends it.
struct Running {
    qemu: Child,
    started: Instant,
    token: String,
    requests: ChildStdin,
    /// What the guest says, until QEMU ends.
    answers: Receiver<Result<Frame, NotAFrame>>,
    damaged: usize,
    console: PathBuf,
    /// Where in the console the running scenario's log starts.
    log_start: usize,
    complaints: PathBuf,
}

impl Running {
    fn start(lab: &Lab, kernel: &Kernel, machine: &Machine) -> Result<Running, Error> {
        let initramfs = initramfs::build(lab, kernel, machine)?;
        let name = format!("{}-{}", kernel.release, machine.name);
        let console = lab.kept("log").join(format!("{name}.console"));
        let complaints = lab.temporary(&format!("{name}.stderr"));
        // QEMU opens it only after a while, and an earlier boot's log must not pass for this one's.
        File::create(&console).context(|| format!("cannot make {}", console.display()))?;

        let token = format!("{:016x}", RandomState::new().build_hasher().finish());
        let words = (machine.command_line)(lab)?;
        let words = format!(
            // An oops is a failure of the kernel, and a machine after one is good for nothing.
            "console=ttyS0 quiet panic=-1 oops=panic {TOKEN}={token} {words}"
        );
        if words.len() > COMMAND_LINE_LIMIT {
            return Err(format!(
                "the kernel command line is longer than {COMMAND_LINE_LIMIT} bytes: {words}"
            )
            .into());
        }

        // setpriv: a QEMU that nobody waits for must not stay, however the tests ended.
        let mut qemu = command("setpriv");
        qemu.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-machine", "q35", "-smp", "2"])
            .args(["-m", &format!("{}M", machine.memory_mib)])
            .args(if lab.has_kvm { KVM } else { EMULATION })
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(&initramfs)
            .args(["-append", &words])
            .arg("-serial")
            .arg(format!("file:{}", escaped(&console)))
            .args(["-chardev", "stdio,id=channel,signal=off", "-serial", "chardev:channel"]);
        for (number, disk) in machine.disks.iter().enumerate() {
            let image = lab.disk(disk)?;
            let (id, serial) = (format!("disk{number}"), disk.name);
            qemu.arg("-drive")
                // Boots share the image: each one's changes go to a temporary file that has no name.
                .arg(format!(
                    "if=none,id={id},format=raw,snapshot=on,cache=unsafe,file={}",
                    escaped(&image)
                ))
                .args(["-device", &format!("virtio-blk-pci,drive={id},serial={serial}")]);
        }
        let mut qemu = qemu
            .env("TMPDIR", lab.temporary(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&complaints)?)
            .spawn()
            .context(|| "cannot start QEMU".into())?;

        let requests = qemu.stdin.take().expect("it is piped");
        let mut lines = BufReader::new(qemu.stdout.take().expect("it is piped"));
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
            answers,
            damaged: 0,
            console,
            log_start: 0,
            complaints,
        })
    }

    fn wait_until_ready(&mut self, kernel: &Kernel) -> Result<(), String> {
        match self.answer(BOOT_LIMIT) {
            Ok(Frame::Ready { release }) if release == kernel.release => Ok(()),
            Ok(Frame::Ready { release }) => Err(format!(
                "the machine runs {release}, its kernel's image says {}",
                kernel.release
            )),
            Ok(Frame::Unfit { message }) => {
                Err(format!("the machine did not get ready: {message}"))
            }
            Ok(other) => Err(format!("the machine did not get ready, it said {other:?}")),
            Err(why) => Err(format!("the machine did not get ready: {why}")),
        }
    }

    /// The verdict, and whether the machine is lost.
    fn run(&mut self, scenario: &Scenario) -> (Verdict, bool) {
        self.log_start = self.log().len();
        let request = Frame::Run { scenario: scenario.name.into() };
        // If QEMU is gone, the missing answer says so.
        let _ = self.requests.write_all(request.encode(&self.token).as_bytes());
        match self.answer(scenario.time_limit + GRACE) {
            Ok(Frame::Passed { scenario: name }) if name == scenario.name => (Ok(()), false),
            Ok(Frame::Failed { scenario: name, message }) if name == scenario.name => {
                (Err(self.failure(message)), false)
            }
            Ok(other) => {
                (Err(self.failure(format!("no result; the machine said {other:?}"))), true)
            }
            Err(why) => (Err(self.failure(format!("no result: {why}"))), true),
        }
    }

    /// The next frame; or why there is none, and then the machine is off.
    fn answer(&mut self, limit: Duration) -> Result<Frame, String> {
        let deadline = Instant::now() + limit;
        loop {
            match self.answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Ok(frame)) => return Ok(frame),
                Ok(Err(NotAFrame::Noise)) => {}
                Ok(Err(NotAFrame::Damaged)) => self.damaged += 1,
                Err(why) => {
                    let why = match why {
                        RecvTimeoutError::Timeout => {
                            format!("the machine hung, nothing came for {limit:?}")
                        }
                        RecvTimeoutError::Disconnected => self.why_it_ended(),
                    };
                    self.kill();
                    let damaged = match self.damaged {
                        0 => String::new(),
                        lines => format!(" ({lines} damaged lines were received)"),
                    };
                    return Err(why + &damaged);
                }
            }
        }
    }

    fn why_it_ended(&mut self) -> String {
        let status = self.wait(OFF_LIMIT);
        let log = self.log();
        let panic = log.lines().find_map(|line| Some(&line[line.find("Kernel panic")?..]));
        match (panic, status) {
            (Some(panic), _) => panic.to_owned(),
            (None, Some(status)) if status.success() => {
                "the machine switched itself off or reset".into()
            }
            (None, status) => {
                let complaints = fs::read_to_string(&self.complaints).unwrap_or_default();
                let status = status.map_or("no exit status".into(), |status| status.to_string());
                format!("QEMU ended ({status}): {}", complaints.trim())
            }
        }
    }

    fn switch_off(&mut self) {
        let _ = self.requests.write_all(Frame::Off.encode(&self.token).as_bytes());
        self.wait(OFF_LIMIT);
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

/// One thread for each processor, and a processor that has what kernels and checksums make use of.
/// Neither other machine types, nor smaller processors, nor leaving out mitigations or calibrations
/// made a measurable difference to the time a boot takes.
const EMULATION: [&str; 4] = ["-accel", "tcg,thread=multi", "-cpu", "max"];
const KVM: [&str; 4] = ["-accel", "kvm", "-cpu", "host"];

/// In QEMU's options a comma is doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Whether QEMU can use KVM here. That the device can be opened is no promise, and that QEMU starts is
/// none either: in some virtual machines the guest then never gets anywhere. So a program is run, the
/// smallest there is.
pub fn kvm_works(lab_dir: &Path) -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| {
        File::options().read(true).write(true).open("/dev/kvm").is_ok()
            && runs_boot_sector(lab_dir).unwrap_or(false)
    })
}

fn runs_boot_sector(dir: &Path) -> Result<bool, Error> {
    // mov al, 1; out 0xf4, al; hlt. QEMU's exit status is then 1 << 1 | 1.
    let mut sector = vec![0; 512];
    sector[..5].copy_from_slice(&[0xb0, 0x01, 0xe6, 0xf4, 0xf4]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let image = dir.join("kvm-probe");
    fs::write(&image, sector)?;
    let mut qemu = command("timeout")
        .args(["--signal", "KILL", "5", "qemu-system-x86_64", "-nodefaults", "-no-user-config"])
        .args(["-machine", "q35", "-display", "none", "-device", "isa-debug-exit"])
        .args(KVM)
        .args(["-device", "ide-hd,drive=probe", "-drive"])
        .arg(format!("if=none,id=probe,format=raw,file={}", escaped(&image)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok(qemu.wait()?.code() == Some(3))
}
