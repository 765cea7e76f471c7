//! Finds and runs the programs that the host needs, and names the packages of missing programs.

use crate::{Context, Error};
use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The needed programs, each with its Debian package. The list does not depend on settings, so no later
/// run can miss a program.
const NEEDED: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-system-aarch64", "qemu-system-arm"),
    ("readelf", "binutils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mkfs.vfat", "dosfstools"),
    ("mcopy", "mtools"),
    ("depmod", "kmod"),
    ("gzip", "gzip"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("setpriv", "util-linux"),
    ("timeout", "coreutils"),
    ("mount", "mount"),
    ("ldd", "libc-bin"),
    ("systemctl", "systemd"),
];
pub const NEEDED_TO_FETCH: &[(&str, &str)] =
    &[("apt-get", "apt"), ("apt-cache", "apt"), ("dpkg-deb", "dpkg")];

/// Fails with the names of the missing programs.
pub fn check() -> Result<(), Error> {
    check_these(NEEDED)
}

pub fn check_these(needed: &[(&str, &str)]) -> Result<(), Error> {
    let missing: Vec<_> = needed.iter().filter(|(program, _)| find(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(program, _)| *program).collect();
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    Err(format!(
        "missing programs: {}. On Debian: vm-tests/install-deps (or apt-get install {})",
        names.join(", "),
        packages.join(" ")
    )
    .into())
}

/// Searches PATH and the directories of system programs, which a PATH often lacks.
fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

/// Returns a command for a program in PATH or in a directory of system programs.
pub fn command(program: &str) -> Command {
    Command::new(find(program).unwrap_or_else(|| program.into()))
}

/// Returns the paths of the shared libraries of a program, and of its loader.
pub fn libraries(program: &Path) -> Result<Vec<PathBuf>, Error> {
    let text = String::from_utf8(output(command("ldd").arg(program))?)?;
    // A line has a name, maybe an arrow and a path, and an address.
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(PathBuf::from).collect())
}

/// Returns the files of programs in the root directory of another system, of their libraries and of their
/// loader. The key is the path in that system. A library is found by its name, wherever it is.
pub fn with_libraries_in(
    root: &Path,
    programs: &[&str],
) -> Result<BTreeMap<PathBuf, PathBuf>, Error> {
    let libraries = files_below(root)?;
    let mut found = BTreeMap::new();
    let mut pending: Vec<_> = programs.iter().map(PathBuf::from).collect();
    while let Some(path) = pending.pop() {
        let file = root.join(path.strip_prefix("/").unwrap_or(&path));
        if found.contains_key(&path) {
            continue;
        }
        let needed = needed_files(&file)?;
        found.insert(path, file);
        for name in needed {
            let is_named = |path: &&PathBuf| path.file_name() == Path::new(&name).file_name();
            let library = libraries.iter().find(is_named);
            let library =
                library.ok_or_else(|| format!("{} has no library {name}", root.display()))?;
            match name.starts_with('/') {
                // The loader, whose path must be the path in the program.
                true => drop(found.insert(name.into(), library.clone())),
                false => pending.push(Path::new("/").join(library.strip_prefix(root)?)),
            }
        }
    }
    Ok(found)
}

/// Returns the files below a directory, without links to directories.
fn files_below(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let (mut files, mut pending) = (Vec::new(), vec![directory.to_owned()]);
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).context(|| directory.display().to_string())? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => pending.push(entry.path()),
                false => files.push(entry.path()),
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Returns the names of the libraries of an ELF file, and the path of its loader.
fn needed_files(file: &Path) -> Result<Vec<String>, Error> {
    let text =
        output(command("readelf").args(["--dynamic", "--program-headers", "--wide"]).arg(file))?;
    Ok(needed_in(&String::from_utf8_lossy(&text)))
}

fn needed_in(text: &str) -> Vec<String> {
    let value = |line: &str| {
        let (label, value) = line.trim().strip_suffix(']')?.rsplit_once(['[', ' '])?;
        let is_needed = label.contains("(NEEDED)") || label.contains("program interpreter");
        is_needed.then(|| value.trim_start_matches('[').to_owned())
    };
    text.lines().filter_map(value).collect()
}

/// Runs a command and returns its standard output. An error contains the standard error output.
pub fn output(command: &mut Command) -> Result<Vec<u8>, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output =
        command.stdin(Stdio::null()).output().context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} failed ({}): {}", output.status, stderr.trim()).into());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_readelf_returns_libraries_and_loader() {
        let text = "      [Requesting program interpreter: /lib/ld-linux-aarch64.so.1]\n \
             0x0000000000000001 (NEEDED)             Shared library: [libmount.so.1]\n \
             0x000000000000000e (SONAME)             Library soname: [libother.so.1]\n \
             0x000000000000001d (RUNPATH)            Library runpath: [/usr/lib/systemd]\n";
        assert_eq!(needed_in(text), ["/lib/ld-linux-aarch64.so.1", "libmount.so.1"]);
    }

    #[test]
    fn missing_library_of_another_root_is_reported() {
        let root = tempfile::tempdir().unwrap();
        let program = find("readelf").unwrap();
        fs::copy(program, root.path().join("program")).unwrap();
        let message = with_libraries_in(root.path(), &["/program"]).unwrap_err().to_string();
        assert!(message.contains(" has no library "), "{message}");
        let libraries = libraries(&root.path().join("program")).unwrap();
        let directory = root.path().join("usr/lib");
        fs::create_dir_all(&directory).unwrap();
        for library in &libraries {
            fs::copy(library, directory.join(library.file_name().unwrap())).unwrap();
        }
        let found = with_libraries_in(root.path(), &["/program"]).unwrap();
        assert_eq!(found[Path::new("/program")], root.path().join("program"));
        for library in libraries {
            let name = library.file_name().unwrap();
            assert!(found.values().any(|path| *path == directory.join(name)), "{library:?}");
        }
    }

    #[test]
    fn missing_programs_report_each_package_once() {
        let error = check_these(&[("sh", "dash"), ("no-such-a", "some"), ("no-such-b", "some")]);
        let message = error.unwrap_err().to_string();
        assert!(message.contains("no-such-a, no-such-b."), "{message}");
        assert!(message.contains("apt-get install some)"), "{message}");
    }
}
