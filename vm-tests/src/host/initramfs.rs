//! Builds the initramfs of a machine: vm-init, the modules, and the files of its description.

use super::cpio::Archive;
use super::kernels::Kernel;
use super::lab::Lab;
use super::modules;
use super::say::say;
use crate::first_stage;
use crate::machine::Machine;
use crate::{Context, Error};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::PathBuf;

/// Writes the initramfs uncompressed, because an emulated CPU would decompress it slowly.
pub fn build(lab: &Lab, kernel: &Kernel, machine: &Machine) -> Result<PathBuf, Error> {
    let name = format!("{}-{}", kernel.release, machine.name);
    let path = lab.temporary(&format!("{name}.initramfs"));
    let file = File::create(&path).context(|| format!("cannot make {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));

    for dir in ["dev", "proc", "sys", "tmp", "mnt"] {
        archive.directory(dir, 0o755)?;
    }
    let init = lab.binaries(kernel.arch).get("vm-tests", "vm-init")?;
    archive.file("init", 0o755, &fs::read(init)?)?;

    archive.directory("vm-tests", 0o755)?;
    let order = kernel.load_order(machine.modules)?;
    if !order.missing.is_empty() {
        say(&format!("{name}: the kernel does not have the module {}", order.missing.join(", ")));
    }
    if !order.paths.is_empty() {
        archive.directory(&first_stage::MODULES[1..], 0o755)?;
    }
    for (number, module) in order.paths.iter().enumerate() {
        let name = module.file_stem().unwrap_or_default().to_string_lossy();
        let content = modules::read(module)?;
        archive.file(
            &format!("{}/{number:03}-{name}", &first_stage::MODULES[1..]),
            0o644,
            &content,
        )?;
    }
    if let Some(program) = machine.takes_over {
        archive.file(&first_stage::TAKES_OVER[1..], 0o644, program.as_bytes())?;
    }

    let files = lab.filled(kernel.arch, &format!("{name}.files"), machine.files)?;
    archive.tree(&files)?;
    let file =
        archive.finish()?.into_inner().context(|| format!("cannot write {}", path.display()))?;
    drop(file);
    Ok(path)
}
