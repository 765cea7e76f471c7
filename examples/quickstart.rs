//! Mounts the bundled image as a system does at boot: the image is copied into sealed memory and compared
//! with its digest. The mount is in a mount namespace that ends with this program.
//!
//! ```sh
//! cargo run --release --example quickstart     # as root
//! ```

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sealmount::{
    DetachedMount, Error, ErrorKind, Event, MemoryKind, MountOptions, ObjectVerity, Verity,
};

const DIGEST: &str = "9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if !rustix::process::geteuid().is_root() {
        return Err("mounting needs root: run this as root".into());
    }
    sealmount_sys::unshare_mount_namespace()?;
    sealmount_sys::mount_setattr_private()?;

    // The files lie beside the program: its disk may have fs-verity, and a tmpfs cannot have it.
    let program = std::env::current_exe()?;
    let directory = tempfile::tempdir_in(program.parent().unwrap_or(Path::new(".")))?;
    let (image, objects, mount_point) = (
        directory.path().join("image.cfs"),
        directory.path().join("objects"),
        directory.path().join("mnt"),
    );
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images/v1");
    fs::copy(bundled.join("image.cfs"), &image)?;
    copy_objects(&bundled.join("objects"), &objects)?;
    fs::create_dir(&mount_point)?;

    let mut options = MountOptions::new(&objects);
    options.digest = Some(DIGEST.parse()?);
    options.copy = Some(MemoryKind::Memfd);
    println!("mount -o {}", options.to_text().display());
    let (mount, took) = match mount(&options, &image) {
        Err(error) if error.kind() == ErrorKind::VerityUnavailable => {
            println!("  rejected: {error}");
            println!("\nThis system cannot verify the objects. Once more, with noverity:\n");
            options.overlay.verity = Some(Verity::Off);
            mount(&options, &image)?
        }
        result => result?,
    };
    let enforced = mount.verity() == Some(ObjectVerity::Enforced);
    mount.attach(&mount_point)?;
    println!("  mounted in {:.2} ms", took.as_secs_f64() * 1000.0);

    fs::remove_file(&image)?;
    println!("\nThe image's file is deleted. The tree is still there:\n");
    print_tree(&mount_point, 1)?;
    print!("\nhello.txt: {}", fs::read_to_string(mount_point.join("hello.txt"))?);
    println!("\nThe mount, as the kernel shows it:");
    for line in fs::read_to_string("/proc/thread-self/mountinfo")?.lines() {
        if line.contains(&*mount_point.to_string_lossy()) {
            println!("  {line}");
        }
    }
    println!(
        "\nThe image was verified before it was mounted. Its objects {}.",
        if enforced { "are verified when they are read" } else { "are not verified here" },
    );

    rustix::mount::unmount(&mount_point, rustix::mount::UnmountFlags::empty())?;
    directory.close()?;
    println!("Unmounted; nothing is left.");
    Ok(())
}

/// Makes a detached mount and prints the events.
fn mount(options: &MountOptions, image: &Path) -> Result<(DetachedMount, Duration), Error> {
    let mut events = Vec::new();
    let start = Instant::now();
    let mount = options.mount_with_events(image, &mut |event| {
        if !matches!(event, Event::Copying(_)) {
            events.push(event.to_string());
        }
        ControlFlow::Continue(())
    });
    let took = start.elapsed();
    events.iter().for_each(|event| println!("  {event}"));
    Ok((mount?, took))
}

/// Copies the objects, and enables fs-verity if the file system supports it.
fn copy_objects(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let copy = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_objects(&entry.path(), &copy)?;
        } else {
            fs::copy(entry.path(), &copy)?;
            // If the file system does not support fs-verity, the mount with verity reports it.
            let sha256 = sealmount_sys::fsverity::HASH_ALG_SHA256;
            let _ = sealmount_sys::fsverity::enable(File::open(&copy)?, sha256);
        }
    }
    Ok(())
}

/// Prints at most four entries of a directory, and the entries below them.
fn print_tree(directory: &Path, depth: usize) -> std::io::Result<()> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
    paths.sort();
    let indent = "  ".repeat(depth);
    for path in paths.iter().take(4) {
        let metadata = fs::symlink_metadata(path)?;
        let name = path.file_name().unwrap_or_default().display();
        if metadata.is_dir() {
            println!("{indent}{name}/");
            print_tree(path, depth + 1)?;
        } else {
            println!("{indent}{name}  {} bytes", metadata.len());
        }
    }
    if paths.len() > 4 {
        println!("{indent}… {} more", paths.len() - 4);
    }
    Ok(())
}
