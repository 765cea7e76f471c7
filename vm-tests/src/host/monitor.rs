//! Asks the QEMU monitor (QMP) for the CPU state of a machine that hangs.

use crate::arch::Arch;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The limit of one answer. A working QEMU answers at once.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct Monitor {
    arch: &'static Arch,
    connection: BufReader<UnixStream>,
}

impl Monitor {
    pub fn new(arch: &'static Arch, connection: UnixStream) -> Monitor {
        Monitor { arch, connection: BufReader::new(connection) }
    }

    /// Returns the registers of every CPU and sends a non-maskable interrupt (NMI), if the machine has
    /// NMIs. With `unknown_nmi_panic`, the kernel then prints its call trace on the console.
    pub fn interrupt(&mut self) -> Result<String, String> {
        self.connection.get_ref().set_read_timeout(Some(LIMIT)).map_err(|e| e.to_string())?;
        self.ask(&json!({ "execute": "qmp_capabilities" }))?;
        let registers = self.ask(&json!({
            "execute": "human-monitor-command",
            "arguments": { "command-line": "info registers -a" },
        }))?;
        if self.arch.has_nmi {
            self.ask(&json!({ "execute": "inject-nmi" }))?;
        }
        Ok(without_vectors(self.arch, registers.as_str().unwrap_or_default()))
    }

    fn ask(&mut self, command: &Value) -> Result<Value, String> {
        let failed = |error: &dyn std::fmt::Display| format!("no answer to {command}: {error}");
        let connection = self.connection.get_mut();
        connection.write_all(format!("{command}\n").as_bytes()).map_err(|error| failed(&error))?;
        loop {
            let mut line = String::new();
            match self.connection.read_line(&mut line) {
                Ok(0) => return Err(failed(&"the connection is closed")),
                Ok(_) => {}
                Err(error) => return Err(failed(&error)),
            }
            let answer: Value = serde_json::from_str(&line).map_err(|error| failed(&error))?;
            // Other lines are the greeting or events.
            match (answer.get("return"), answer.get("error")) {
                (Some(result), _) => return Ok(result.clone()),
                (_, Some(error)) => return Err(failed(error)),
                _ => {}
            }
        }
    }
}

/// Removes the vector and floating-point registers. They do not show where the kernel hangs.
fn without_vectors(arch: &Arch, registers: &str) -> String {
    let is_vector = |line: &&str| arch.vector_registers.iter().any(|name| line.starts_with(name));
    let lines = registers.lines().map(str::trim_end).filter(|line| !line.is_empty());
    lines.filter(|line| !is_vector(line)).map(|line| format!("{line}\n")).collect()
}
