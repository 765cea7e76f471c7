//! Copies, checks and changes the disk of a system, without a mount.

use crate::programs::{command, output};
use crate::{Context, Error};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// The size of a block of the file system. boot-debian sets this size.
const BLOCK_SIZE: u64 = 4096;

/// Copies a disk, and leaves out its holes.
pub fn copy(from: &Path, to: &Path) -> Result<PathBuf, Error> {
    output(command("cp").arg("--sparse=always").args([from, to]))?;
    Ok(to.to_owned())
}

/// Checks that the file system was unmounted, and has no errors.
pub fn expect_clean(disk: &Path) -> Result<(), Error> {
    let header = output(command("dumpe2fs").arg("-h").arg(disk))?;
    let header = String::from_utf8_lossy(&header);
    let is_clean = |line: &str| line.starts_with("Filesystem state:") && line.ends_with(" clean");
    if header.contains("needs_recovery") || !header.lines().any(is_clean) {
        return Err(format!("the disk is not clean:\n{header}").into());
    }
    output(command("e2fsck").arg("-fn").arg(disk)).context(|| "the disk has errors".into())?;
    Ok(())
}

/// Returns the path of an object on the disk.
pub fn any_object(disk: &Path) -> Result<String, Error> {
    let objects = "/composefs/objects";
    let directory = first_of(disk, objects)?;
    let file = first_of(disk, &format!("{objects}/{directory}"))?;
    Ok(format!("{objects}/{directory}/{file}"))
}

/// Returns the first name in a directory of the disk.
fn first_of(disk: &Path, directory: &str) -> Result<String, Error> {
    // A line is /INODE/MODE/USER/GROUP/NAME/SIZE/.
    let list = debugfs(disk, &format!("ls -p {directory}"), false)?;
    let names = list.lines().filter_map(|line| line.split('/').nth(5));
    let name = names.filter(|name| !name.starts_with('.') && !name.is_empty()).min();
    name.map(str::to_owned).ok_or_else(|| format!("{directory} is empty: {list}").into())
}

pub fn remove(disk: &Path, file: &str) -> Result<(), Error> {
    debugfs(disk, &format!("rm {file}"), true).map(drop)
}

/// Flips the bits of the first byte of a file, as a decayed disk does. The file system does not change.
pub fn decay(disk: &Path, file: &str) -> Result<(), Error> {
    let block: u64 = debugfs(disk, &format!("bmap {file} 0"), false)?.trim().parse()?;
    let device = File::options().read(true).write(true).open(disk)?;
    let mut byte = [0];
    device.read_exact_at(&mut byte, block * BLOCK_SIZE)?;
    Ok(device.write_all_at(&[!byte[0]], block * BLOCK_SIZE)?)
}

/// The files below a directory, with their content.
pub type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// Reads a directory of the disk. `scratch` is a new directory.
pub fn tree(disk: &Path, directory: &str, scratch: &Path) -> Result<Tree, Error> {
    fs::create_dir(scratch)?;
    debugfs(disk, &format!("rdump {directory} {}", scratch.display()), false)?;
    let mut tree = Tree::new();
    let mut pending = vec![scratch.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let (path, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
            if kind.is_dir() {
                pending.push(path);
            } else if kind.is_file() {
                let content = fs::read(&path)?;
                tree.insert(path.strip_prefix(scratch)?.to_owned(), content);
            }
        }
    }
    fs::remove_dir_all(scratch)?;
    match tree.is_empty() {
        true => Err(format!("{directory} has no files").into()),
        false => Ok(tree),
    }
}

/// Returns whether the disk has a file.
pub fn exists(disk: &Path, file: &str) -> Result<bool, Error> {
    // The output of stat starts with the number of the inode. For a missing file, stat prints only an error.
    Ok(run_debugfs(disk, &format!("stat {file}"), false)?.0.starts_with("Inode: "))
}

/// Runs a command of debugfs, and returns its output. debugfs reports errors only on the standard error output.
fn debugfs(disk: &Path, request: &str, writes: bool) -> Result<String, Error> {
    let (stdout, stderr) = run_debugfs(disk, request, writes)?;
    // The first line is the version.
    match stderr.lines().find(|line| !line.starts_with("debugfs ")) {
        None => Ok(stdout),
        Some(line) => Err(format!("debugfs: {request}: {line}").into()),
    }
}

/// Runs a command of debugfs, and returns both outputs.
fn run_debugfs(disk: &Path, request: &str, writes: bool) -> Result<(String, String), Error> {
    let output = command("debugfs")
        .args(writes.then_some("-w"))
        .args(["-R", request])
        .arg(disk)
        .stdin(Stdio::null())
        .output()
        .context(|| "cannot run debugfs".into())?;
    let text = |bytes| String::from_utf8(bytes).context(|| format!("debugfs: {request}"));
    Ok((text(output.stdout)?, text(output.stderr)?))
}
