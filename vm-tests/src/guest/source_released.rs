//! Checks mounts whose image file is overwritten, removed or erased.

use super::fixtures::{self, V1};
use super::machines::ERASED;
use super::mounted::{self, MEMORIES, Mounted, Traces, with_copy};
use crate::machine::Format;
use crate::scenario::{Guest, Scenario};
use crate::{Context, Error};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, unmount};
use sealmount::MountOptions;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "source_released_after_copy",
    machine: &ERASED,
    time_limit: Scenario::TIME_LIMIT,
    run: source_released_after_copy,
}];

fn source_released_after_copy(guest: &mut Guest) -> Result<(), Error> {
    let objects = V1.objects_in(&fixtures::mount_objects(guest, "ext4")?);
    let fat = guest.mount_disk("fat", Format::Fat, MountFlags::empty())?;
    let image = V1.image_in(&fat);

    // Check that a busy disk would be detected: without a copy, the disk is in use.
    let options = MountOptions::new(objects);
    let before = Traces::now()?;
    let mounted = mounted::mount(&options, &image)??;
    assert_eq!(unmount(&fat, UnmountFlags::empty()), Err(Errno::BUSY));
    mounted.unmount()?;
    before.assert_same_now()?;

    let [memfd, ramfs] = MEMORIES.map(|memory| {
        let root = Path::new("/copies").join(format!("{memory:?}"));
        mounted::mount_on(&with_copy(&options, memory), &image, &root)
    });
    let copies = [memfd??, ramfs??];
    let assert_whole = || {
        rustix::fs::sync();
        // The kernel must read files from the copies, not from its caches.
        fs::write("/proc/sys/vm/drop_caches", "3").context(|| "cannot drop caches".into())?;
        copies.iter().for_each(|copy| copy.assert_shows(&V1));
        Ok::<(), Error>(())
    };
    let mut file = File::options().write(true).open(&image)?;
    file.write_all(&[0xff; 8192])?;
    file.sync_all()?;
    assert_whole()?;
    file.set_len(100)?;
    drop(file);
    assert_whole()?;
    fs::remove_file(&image)?;
    unmount(&fat, UnmountFlags::empty()).context(|| "the disk is still in use".into())?;
    erase(&guest.disk("fat")?)?;
    let mounted = guest.mount_disk("fat", Format::Fat, MountFlags::empty());
    assert!(mounted.is_err(), "the erased disk still mounts: {mounted:?}");
    assert_whole()?;
    copies.into_iter().try_for_each(Mounted::unmount)
}

/// Overwrites a disk with zeros and checks the result.
fn erase(device: &Path) -> Result<(), Error> {
    let (zeros, mut read) = (vec![0; 1 << 20], Vec::new());
    let mut disk = File::options().write(true).open(device)?;
    loop {
        match disk.write(&zeros) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOSPC) => break,
            Err(error) => return Err(error.into()),
        }
    }
    disk.sync_all()?;
    File::open(device)?.take(8 << 20).read_to_end(&mut read)?;
    assert_eq!((read.len(), read.iter().any(|byte| *byte != 0)), (8 << 20, false));
    Ok(())
}
