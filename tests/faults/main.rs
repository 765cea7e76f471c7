//! Makes every system call of the helper fail, with every errno, and kills the helper before each.
//! docs/faults.md lists the faults and the permitted outcomes.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod calls;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod fault;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod outcome;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod scenarios;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod suite;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn main() -> std::process::ExitCode {
    suite::main()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn main() -> std::process::ExitCode {
    let architecture = std::env::consts::ARCH;
    eprintln!("faults: cannot run on {architecture}: only x86_64 and aarch64 are supported");
    std::process::ExitCode::FAILURE
}
