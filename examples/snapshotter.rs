//! Mounts 50 containers on one sealed copy of the bundled image, as a snapshotter does. Each container has an
//! upper layer and an idmap of its own. The image is copied and verified once.
//!
//! ```sh
//! cargo run --release --example snapshotter     # as root
//! ```

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use sealmount::{
    CopyOptions, DetachedMount, ErofsMount, Image, Location, MemoryKind, OverlayOptions, Source,
    UpperLayer, Verity,
};

const DIGEST: &str = "9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1";

const CONTAINERS: u32 = 50;

/// The number of user and group IDs of a container.
const IDS: u32 = 65536;

fn main() -> Result<(), Box<dyn Error>> {
    if !rustix::process::geteuid().is_root() {
        return Err("mounting needs root: run this as root".into());
    }
    // Only for this example: the mounts end with this process, even if it fails.
    sealmount_sys::unshare_mount_namespace()?;
    sealmount_sys::mount_setattr_private()?;
    // The layers lie beside the program: the directory for temporary files may be an overlay, which cannot
    // hold upper layers.
    let program = std::env::current_exe()?;
    let directory = tempfile::tempdir_in(program.parent().unwrap_or(Path::new(".")))?;
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images/v1");
    let (image, objects) = (bundled.join("image.cfs"), bundled.join("objects"));

    let containers: Vec<Container> = (1..=CONTAINERS)
        .map(|number| Container::create(directory.path(), number))
        .collect::<io::Result<_>>()?;

    let start = Instant::now();
    let source = copy(&image)?;
    let erofs = source.mount()?;
    let copied = start.elapsed();
    for container in &containers {
        let mount = container.mount(&erofs, &objects)?;
        mount.attach(container.root())?;
    }
    let mounted = start.elapsed() - copied;
    println!("1 copy: {}, {} bytes", source.report().format, source.report().size);
    println!("{CONTAINERS} containers mounted");
    println!("time: {} for the copy, {} for each container", ms(copied), ms(mounted / CONTAINERS));
    println!("memory: {} KiB for the copy", memory(&source)? / 1024);
    println!("loop devices: {}", loop_devices(&image)?);

    // The mounts keep the copy alive. A snapshotter that mounts more containers keeps `erofs` instead.
    drop((erofs, source));
    for container in &containers {
        container.change()?;
    }
    println!("each container owns its files, and writes to its own layer");

    let start = Instant::now();
    for container in containers {
        container.remove()?;
    }
    println!("{CONTAINERS} containers removed");
    println!("time: {} for each container", ms(start.elapsed() / CONTAINERS));
    // The kernel releases the device a moment after the last unmount.
    while loop_devices(&image)? > 0 && start.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("loop devices: {}", loop_devices(&image)?);
    directory.close()?;
    Ok(())
}

/// Copies the image into sealed memory and verifies the copy.
fn copy(image: &Path) -> Result<Source, Box<dyn Error>> {
    let mut options = CopyOptions::new(MemoryKind::Memfd);
    options.digest = Some(DIGEST.parse()?);
    Ok(Image::open(image)?.copy(&options)?)
}

/// The directories of a container and the user namespace that its processes run in.
struct Container {
    directory: PathBuf,
    user_namespace: Location,
    /// The ID on the host of the root user of the container.
    first_id: u32,
}

impl Container {
    fn create(parent: &Path, number: u32) -> io::Result<Container> {
        let directory = parent.join(format!("container{number}"));
        for name in ["upper", "work", "root"] {
            fs::create_dir_all(directory.join(name))?;
        }
        let first_id = number * IDS;
        // The root directory of an overlay has the owner of the upper layer.
        chown(directory.join("upper"), Some(first_id), Some(first_id))?;
        let user_namespace = user_namespace(first_id)?.into();
        Ok(Container { directory, user_namespace, first_id })
    }

    fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// Mounts the image with the upper layer and the idmap of this container.
    fn mount(&self, erofs: &ErofsMount, objects: &Path) -> Result<DetachedMount, Box<dyn Error>> {
        let mut options = OverlayOptions::new(objects);
        options.upper =
            Some(UpperLayer::new(self.directory.join("upper"), self.directory.join("work")));
        options.attributes.nodev = true;
        // The bundled objects have no fs-verity. A real snapshotter leaves this line out, so that objects
        // without fs-verity are rejected.
        options.verity = Some(Verity::Try);
        let image = erofs.idmapped(&self.user_namespace)?;
        Ok(options.open()?.mount(&image)?)
    }

    /// Changes the tree, as a process in the container does.
    fn change(&self) -> io::Result<()> {
        let hello = self.root().join("hello.txt");
        let owner = fs::metadata(&hello)?.uid();
        if owner != self.first_id {
            return Err(io::Error::other(format!("{}: owner {owner}", hello.display())));
        }
        fs::write(self.root().join("written"), self.first_id.to_string())?;
        let written = fs::read_to_string(self.directory.join("upper/written"))?;
        if written != self.first_id.to_string() {
            return Err(io::Error::other("the upper layer belongs to another container"));
        }
        Ok(())
    }

    fn remove(self) -> io::Result<()> {
        unmount(self.root(), UnmountFlags::empty())?;
        fs::remove_dir_all(&self.directory)
    }
}

/// Makes a user namespace that maps its IDs to `first_id` and the following IDs. The descriptor, and later
/// the mount, keep the namespace alive.
fn user_namespace(first_id: u32) -> io::Result<File> {
    let mut process = Command::new("unshare")
        .args(["--user", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let (Some(mut stdin), Some(mut stdout)) = (process.stdin.take(), process.stdout.take()) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    // cat writes the line back when it runs in the new namespace.
    stdin.write_all(b"\n")?;
    stdout.read_exact(&mut [0])?;
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{map}", process.id()), format!("0 {first_id} {IDS}"))?;
    }
    let namespace = File::open(format!("/proc/{}/ns/user", process.id()))?;
    drop(stdin);
    process.wait()?;
    Ok(namespace)
}

/// Returns the memory of the copy, in bytes, as the kernel counts it.
fn memory(source: &Source) -> io::Result<u64> {
    let file = File::from(source.as_fd().try_clone_to_owned()?);
    // stat(2) counts in units of 512 bytes.
    Ok(file.metadata()?.blocks() * 512)
}

/// Counts the loop devices of copies of the image.
fn loop_devices(image: &Path) -> io::Result<usize> {
    let name = format!("sealmount:{}", image.display());
    let mut count = 0;
    for device in fs::read_dir("/sys/block")? {
        let backing_file = device?.path().join("loop/backing_file");
        // Other devices, and loop devices without a file, do not have this attribute.
        count += usize::from(fs::read_to_string(backing_file).is_ok_and(|f| f.contains(&name)));
    }
    Ok(count)
}

fn ms(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1000.0)
}
