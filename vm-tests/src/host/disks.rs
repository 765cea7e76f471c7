//! Builds disk images with a file system, without mounting them.

use crate::Error;
use crate::machine::{Disk, Format};
use crate::programs::{command, output};
use std::fs::{self, File};
use std::path::Path;

/// Builds a sparse image, which uses only the disk space of its content.
pub fn build(disk: &Disk, content: &Path, image: &Path) -> Result<(), Error> {
    File::create_new(image)?.set_len(disk.size_mib << 20)?;
    match disk.format {
        Format::Blank => {}
        Format::Ext4 => ext4(&["-O", "^verity"], content, image)?,
        Format::Ext4Verity => ext4(&["-O", "verity"], content, image)?,
        Format::Btrfs => {
            output(command("mkfs.btrfs").args(["--quiet", "--rootdir"]).arg(content).arg(image))?;
        }
        Format::Fat => {
            output(command("mkfs.vfat").args(["-F", "32"]).arg(image))?;
            let entries = fs::read_dir(content)?
                .map(|entry| Ok(entry?.path()))
                .collect::<Result<Vec<_>, Error>>()?;
            if !entries.is_empty() {
                // -s copies recursively. The target is the root directory of the image.
                output(
                    command("mcopy")
                        .arg("-i")
                        .arg(image)
                        .args(["-s", "-Q"])
                        .args(entries)
                        .arg("::/"),
                )?;
            }
        }
    }
    Ok(())
}

/// Builds an ext4 image with a block size equal to the page size: fs-verity needs that on Linux < 6.3.
fn ext4(features: &[&str], content: &Path, image: &Path) -> Result<(), Error> {
    output(
        command("mkfs.ext4")
            .args(["-q", "-b", "4096"])
            .args(features)
            .arg("-d")
            .arg(content)
            .arg(image),
    )?;
    Ok(())
}
