//! A machine of QEMU that boots a real system until the system switches itself off.

use crate::arch::X86_64;
use crate::boots::report::Report;
use crate::boots::system::System;
use crate::host::Lab;
use crate::host::accelerator::escaped;
use crate::programs::command;
use crate::{Context, Error};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// The limit of one boot, in seconds. An idle machine without KVM needs less than a minute.
const LIMIT: &str = "600";
/// The firmware of package ovmf, and its variables.
const FIRMWARE: [&str; 2] = ["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"];

/// The text of the kernel when it starts process 1.
const PROCESS_1: &str = " as init process";

/// One boot of a system.
pub struct Boot<'a> {
    /// The name of the console in target/vm/log.
    pub name: &'a str,
    pub system: &'a System,
    pub disk: Disk<'a>,
    pub start: Start<'a>,
    pub memory_mib: u32,
}

/// The disk of a boot.
#[derive(Clone, Copy)]
pub enum Disk<'a> {
    /// The disk keeps the changes of the boot.
    Kept(&'a Path),
    /// The disk stays as it is.
    Unchanged(&'a Path),
}

/// The program that QEMU starts.
pub enum Start<'a> {
    /// The kernel of the system, with more words on the command line.
    Kernel { initramfs: &'a Path, words: &'a str },
    /// The firmware, which starts the UKI of the system.
    Firmware,
}

/// The output of a boot.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The file with the console.
    path: PathBuf,
    pub console: String,
    pub reports: Vec<Report>,
}

impl Boot<'_> {
    /// Boots the system, and waits until QEMU ends.
    ///
    /// Starts the machine a second time if QEMU fails before the kernel starts process 1. Under load, an assertion
    /// of QEMU can fail, and a boot can hang. No code under test has run by then.
    pub fn run(&self, lab: &Lab) -> Result<Outcome, Error> {
        let (outcome, failure) = self.run_once(lab)?;
        let failure = match failure {
            None => return Ok(outcome),
            Some(failure) => failure,
        };
        if outcome.console.contains(PROCESS_1) || outcome.console.contains("Kernel panic") {
            return Err(outcome.failure(&failure));
        }
        eprintln!("boots: {}: {failure}; starting the machine again", self.name);
        let (outcome, failure) = self.run_once(lab)?;
        match failure {
            None => Ok(outcome),
            Some(failure) => Err(outcome.failure(&failure)),
        }
    }

    /// Boots the system. Returns its output, and the failure of QEMU.
    fn run_once(&self, lab: &Lab) -> Result<(Outcome, Option<String>), Error> {
        let console = lab.kept("log").join(format!("boots-{}.console", self.name));
        let report = lab.temporary(&format!("{}.report", self.name));
        let stderr = lab.temporary(&format!("{}.stderr", self.name));
        // The output of an earlier boot must not pass for the output of this boot.
        for file in [&console, &report] {
            File::create(file).context(|| format!("cannot make {}", file.display()))?;
        }
        let serial = |file: &Path| ["-serial".into(), format!("file:{}", escaped(file))];
        let mut qemu = command("setpriv");
        // timeout ends QEMU, but stays alive if the tests are killed: setpriv ends each of them.
        qemu.args(["--pdeathsig", "KILL", "timeout", "--foreground", LIMIT])
            .args(["setpriv", "--pdeathsig", "KILL", X86_64.qemu])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-machine", X86_64.machine, "-smp", "2"])
            .args(["-m", &format!("{}M", self.memory_mib)])
            .args(lab.accelerator(&X86_64))
            .args(serial(&console))
            .args(serial(&report));
        match &self.start {
            Start::Kernel { initramfs, words } => {
                qemu.arg("-kernel").arg(self.system.file("vmlinuz"));
                qemu.arg("-initrd").arg(initramfs);
                qemu.args(["-append", &format!("{} {words}", self.system.words)]);
            }
            Start::Firmware => {
                let variables = lab.temporary(&format!("{}.variables", self.name));
                fs::copy(FIRMWARE[1], &variables).context(|| "cannot copy the variables".into())?;
                let [code, variables] =
                    [(FIRMWARE[0].as_ref(), "on"), (variables.as_path(), "off")]
                        .map(|(file, read_only)| flash(file, read_only));
                let esp = self.system.file("esp.img");
                qemu.args(["-drive", &code, "-drive", &variables]).args(drive("esp", &esp, true));
            }
        }
        let disk = match self.disk {
            Disk::Kept(file) => drive("disk", file, false),
            Disk::Unchanged(file) => drive("disk", file, true),
        };
        let status = qemu
            .args(disk)
            .env("TMPDIR", lab.temporary(""))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr)?)
            .status()
            .context(|| "cannot start QEMU".into())?;
        let read = |file: &Path| -> Result<String, Error> {
            // A terminal ends lines with CR and LF.
            Ok(String::from_utf8_lossy(&fs::read(file)?).replace('\r', ""))
        };
        let outcome = Outcome {
            console: without_escapes(&read(&console)?),
            reports: Report::parse_all(&read(&report)?),
            path: console,
        };
        let failure = match status.code() {
            Some(0) => None,
            // The status of timeout.
            Some(124) => Some(format!("the machine was not off after {LIMIT} s")),
            _ => Some(format!("QEMU ended ({status}): {}", read(&stderr)?)),
        };
        Ok((outcome, failure))
    }
}

fn flash(file: &Path, read_only: &str) -> String {
    format!("if=pflash,format=raw,readonly={read_only},file={}", escaped(file))
}

/// With `unchanged`, QEMU writes the changes of the boot to an unnamed temporary file.
fn drive(id: &str, file: &Path, unchanged: bool) -> [String; 4] {
    let snapshot = if unchanged { "snapshot=on," } else { "" };
    [
        "-drive".into(),
        format!("if=none,id={id},format=raw,{snapshot}cache=unsafe,file={}", escaped(file)),
        "-device".into(),
        format!("virtio-blk-pci,drive={id}"),
    ]
}

impl Outcome {
    /// Returns the only report of a system that started.
    pub fn report(&self) -> Result<&Report, Error> {
        match self.reports.as_slice() {
            [report] => Ok(report),
            other => Err(self.failure(&format!("expected one report, found {}", other.len()))),
        }
    }

    /// Checks that the system did not start, and that the console has a line with each text.
    pub fn expect_failure(&self, texts: &[&str]) -> Result<(), Error> {
        if !self.reports.is_empty() {
            return Err(self.failure("the system started"));
        }
        self.expect_console(texts)
    }

    /// Checks that the console has a line with each text.
    pub fn expect_console(&self, texts: &[&str]) -> Result<(), Error> {
        match texts.iter().find(|text| !self.console.contains(**text)) {
            None => Ok(()),
            Some(text) => Err(self.failure(&format!("the console lacks {text:?}"))),
        }
    }

    /// Checks that the console, from the text `start` on, has none of the texts.
    pub fn expect_absent_after(&self, start: &str, texts: &[&str]) -> Result<(), Error> {
        let Some(at) = self.console.find(start) else {
            return Err(self.failure(&format!("the console lacks {start:?}")));
        };
        let line = |line: &&str| texts.iter().any(|text| line.contains(text));
        match self.console[at..].lines().find(line) {
            None => Ok(()),
            Some(line) => Err(self.failure(&format!("the console has {line:?}"))),
        }
    }

    /// Returns an error with the last lines of the console.
    pub fn failure(&self, message: &str) -> Error {
        let lines: Vec<_> = self.console.lines().collect();
        let last = lines[lines.len().saturating_sub(40)..].join("\n");
        let path = self.path.display();
        format!("{message}\n--- end of the console\n{last}\n--- ({path})").into()
    }
}

/// Removes the sequences that move the cursor and set colours.
fn without_escapes(text: &str) -> String {
    let mut parts = text.split("\x1b[");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(|c: char| c.is_ascii_alphabetic()).map_or(0, |end| end + 1);
        plain.push_str(&part[end..]);
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_without_escapes_keeps_text() {
        let text = "\x1b[2J[\x1b[0;1;31mFAILED\x1b[0m] a\n";
        assert_eq!(without_escapes(text), "[FAILED] a\n");
    }
}
