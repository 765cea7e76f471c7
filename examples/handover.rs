//! Hands a mount and a verified copy of an image over to another process, which runs in another mount
//! namespace. The descriptors travel over a Unix socket (SCM_RIGHTS). The receiver attaches the mount, and
//! makes a second mount from the sealed memory without copying it.
//!
//! ```sh
//! cargo run --release --example handover     # as root
//! ```

use std::error::Error;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use sealmount::{
    CopyOptions, DetachedMount, ErofsMount, Image, MemoryKind, OverlayOptions, Verity,
};

const DIGEST: &str = "9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1";

fn main() -> Result<(), Box<dyn Error>> {
    if !rustix::process::geteuid().is_root() {
        return Err("mounting needs root: run this as root".into());
    }
    match std::env::args_os().nth(1) {
        None => send(),
        // The sender starts this program once more, with the directory of the mount points.
        Some(directory) => receive(Path::new(&directory)),
    }
}

fn send() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let (ours, theirs) = UnixStream::pair()?;
    let mut receiver = Command::new(std::env::current_exe()?)
        .arg(directory.path())
        .stdin(OwnedFd::from(theirs))
        .spawn()?;

    let mut options = CopyOptions::new(MemoryKind::Memfd);
    options.digest = Some(DIGEST.parse()?);
    let source = Image::open(bundled("image.cfs"))?.copy(&options)?;
    let mount = overlay(&source.mount()?)?.into_fd()?;
    send_descriptors(&ours, [mount.as_fd(), source.as_fd()])?;
    // From here on, the descriptors in the socket alone keep the mount and the copy alive.
    drop((mount, source, ours));
    println!("sender: sent a mount and a sealed copy, and closed both");

    let status = receiver.wait()?;
    directory.close()?;
    if status.success() { Ok(()) } else { Err(format!("the receiver failed: {status}").into()) }
}

fn receive(directory: &Path) -> Result<(), Box<dyn Error>> {
    sealmount_sys::unshare_mount_namespace()?;
    sealmount_sys::mount_setattr_private()?;
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let [mount, memfd] = receive_descriptors(&socket)?;
    // The end of the stream: the sender has closed everything.
    socket.read_to_end(&mut Vec::new())?;

    let mount_point = directory.join("mount");
    fs::create_dir(&mount_point)?;
    DetachedMount::from(mount).attach(&mount_point)?;
    show("the mount", &mount_point)?;

    // The receiver need not trust the sender: memory that is not sealed is rejected, and sealed memory is
    // hashed in place.
    let image = Image::open(memfd)?;
    if !image.is_sealed() {
        return Err("the sender can still change the copy".into());
    }
    let source = image.verify(DIGEST.parse()?)?;
    println!(
        "receiver: the copy is sealed and has the digest; copied again: {}",
        source.report().copied
    );
    let mount_point = directory.join("copy");
    fs::create_dir(&mount_point)?;
    overlay(&source.mount()?)?.attach(&mount_point)?;
    show("the sealed copy", &mount_point)
}

/// Mounts the bundled objects on an image.
fn overlay(erofs: &ErofsMount) -> Result<DetachedMount, sealmount::Error> {
    let mut options = OverlayOptions::new(bundled("objects"));
    // The bundled objects have no fs-verity. Leave this line out to reject such objects.
    options.verity = Some(Verity::Try);
    Ok(options.open()?.mount(erofs)?)
}

fn show(name: &str, mount_point: &Path) -> Result<(), Box<dyn Error>> {
    let hello = fs::read_to_string(mount_point.join("hello.txt"))?;
    println!("receiver: hello.txt of {name}: {}", hello.trim_end());
    unmount(mount_point, UnmountFlags::empty())?;
    Ok(fs::remove_dir(mount_point)?)
}

fn bundled(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images/v1").join(name)
}

fn send_descriptors(socket: impl AsFd, descriptors: [BorrowedFd; 2]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    // Descriptors travel only with at least one byte.
    sendmsg(socket, &[IoSlice::new(b"\n")], &mut control, SendFlags::empty())?;
    Ok(())
}

fn receive_descriptors(socket: impl AsFd) -> io::Result<[OwnedFd; 2]> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors: Vec<OwnedFd> = descriptors.flatten().collect();
    descriptors.try_into().map_err(|_| io::Error::other("the sender ended early"))
}
