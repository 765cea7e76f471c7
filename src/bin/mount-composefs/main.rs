//! Two programs in one file, because an initramfs needs both: mount.composefs, the helper of mount(8), and
//! sealmount-setup-root. The name of the program decides. The library does the work.
#![forbid(unsafe_code)]

mod mount;
mod program;
#[cfg(feature = "boot")]
mod setup_root;

use std::process::ExitCode;

use program::{Failure, Status, print_error};
use rustix::process::{getegid, geteuid, getgid, getuid};

type Run = fn() -> Result<(), Failure>;

fn main() -> ExitCode {
    let (program, run) = program();
    std::panic::set_hook(Box::new(move |panic| {
        let panic = program::one_line(&format_args!("internal bug, please report it: {panic}"));
        print_error(&format!("{program}: {panic}\n"));
        std::process::exit(Status::InternalBug as i32);
    }));
    match reject_privileges_of_file(program).and_then(|()| run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let lines = failure.lines(program);
            print_error(&format!("{}\n", lines.join("\n")));
            #[cfg(feature = "boot")]
            if program == setup_root::NAME {
                setup_root::write_to_kernel_log(&lines);
            }
            ExitCode::from(failure.status as u8)
        }
    }
}

/// Returns the program that the name of the file selects, and its name.
fn program() -> (&'static str, Run) {
    #[cfg(feature = "boot")]
    {
        let path = std::env::args_os().next().map(std::path::PathBuf::from);
        if path.is_some_and(|path| path.ends_with(setup_root::NAME)) {
            return (setup_root::NAME, setup_root::run);
        }
    }
    (mount::NAME, mount::run)
}

/// Returns an error if the caller may have fewer privileges than this process. AT_SECURE alone is not enough:
/// SELinux sets it for root too, if a program enters another domain.
fn reject_privileges_of_file(program: &str) -> Result<(), Failure> {
    let has_privileges_of_its_file = getuid() != geteuid()
        || getgid() != getegid()
        || !getuid().is_root() && sealmount_sys::is_secure_execution();
    match has_privileges_of_its_file {
        false => Ok(()),
        true => Err(Failure::usage(
            format!(
                "{program}: cannot serve this user: installed set-user-ID, set-group-ID or with file \
                 capabilities"
            ),
            "remove the set-ID bits or capabilities: the program trusts every path and option of its \
             caller, so only root may run it",
        )),
    }
}
