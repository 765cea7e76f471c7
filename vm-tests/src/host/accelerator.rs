//! Selects how QEMU runs the CPUs of a machine: with KVM, or emulated.

use crate::Error;
use crate::arch::{Arch, X86_64};
use crate::programs::command;
use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::sync::OnceLock;

/// Returns the arguments that emulate each CPU in its own thread. Other machine types, smaller CPUs and
/// boots without mitigations or calibrations were not measurably faster on x86-64.
pub fn emulation(arch: &Arch) -> [&'static str; 4] {
    ["-accel", "tcg,thread=multi", "-cpu", arch.emulated_cpu]
}

/// The arguments that run the CPUs of the host.
pub const KVM: [&str; 4] = ["-accel", "kvm", "-cpu", "host"];

/// Returns a path in the syntax of QEMU options, which need a doubled comma.
pub fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Returns whether QEMU can use KVM here. In some virtual machines /dev/kvm opens and QEMU starts, but
/// the guest makes no progress. So QEMU runs a boot sector of three instructions.
pub fn kvm_works(lab_dir: &Path) -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| {
        File::options().read(true).write(true).open("/dev/kvm").is_ok()
            && runs_boot_sector(lab_dir).unwrap_or(false)
    })
}

fn runs_boot_sector(dir: &Path) -> Result<bool, Error> {
    // mov al, 1; out 0xf4, al; hlt. Then QEMU exits with the status 1 << 1 | 1.
    let mut sector = vec![0; 512];
    sector[..5].copy_from_slice(&[0xb0, 0x01, 0xe6, 0xf4, 0xf4]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let image = dir.join("kvm-probe");
    fs::write(&image, sector)?;
    let mut qemu = command("timeout")
        .args(["--signal", "KILL", "5", X86_64.qemu, "-nodefaults", "-no-user-config"])
        .args(["-machine", X86_64.machine, "-display", "none", "-device", "isa-debug-exit"])
        .args(KVM)
        .args(["-device", "ide-hd,drive=probe", "-drive"])
        .arg(format!("if=none,id=probe,format=raw,file={}", escaped(&image)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok(qemu.wait()?.code() == Some(3))
}
