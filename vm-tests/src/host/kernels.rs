//! Kernels: fetched from Debian by series, or found in directories.

use super::apt::Apt;
use super::lab::Lab;
use super::modules::{LoadOrder, Modules};
use super::say::say;
use crate::{Context, Error};
use std::env;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

/// Each in its newest version: the oldest supported, the first that mounts an image file directly,
/// and the two newest. Nothing depends on the numbers.
pub const DEFAULT_SERIES: &[&str] = &["6.1", "6.12", "7.2", "7.3"];

const FLAVOUR: &str = "-cloud-amd64";

/// Where to get a kernel, before it is got.
#[derive(Clone, Debug)]
pub enum Wanted {
    Series(String),
    Directory(PathBuf),
}

impl Wanted {
    /// What the environment asks for.
    pub fn from_environment() -> Vec<Wanted> {
        if let Some(directories) =
            env::var_os("SEALMOUNT_VM_KERNELS").filter(|value| !value.is_empty())
        {
            return env::split_paths(&directories).map(Wanted::Directory).collect();
        }
        let series = env::var("SEALMOUNT_VM_SERIES").ok().filter(|value| !value.is_empty());
        let series = series.unwrap_or_else(|| DEFAULT_SERIES.join(","));
        series.split(',').map(|series| Wanted::Series(series.trim().to_owned())).collect()
    }

    /// What its tests are named by: known before anything is fetched.
    pub fn name(&self) -> String {
        match self {
            Wanted::Series(series) => series.clone(),
            // A directory that holds no kernel gets tests too: they fail and say so.
            Wanted::Directory(dir) => match Kernel::in_directory(dir) {
                Ok(kernel) => kernel.release,
                Err(_) => dir.display().to_string(),
            },
        }
    }

    pub fn get(&self, lab: &Lab) -> Result<Kernel, Error> {
        match self {
            Wanted::Series(series) => fetched(lab, series),
            Wanted::Directory(dir) => Kernel::in_directory(dir),
        }
    }
}

/// A kernel image and its modules.
#[derive(Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    pub image: PathBuf,
    modules_dir: Option<PathBuf>,
    modules: OnceLock<Modules>,
}

impl Kernel {
    /// Finds the image where packages and people put it, and the modules of its release.
    pub fn in_directory(dir: &Path) -> Result<Kernel, Error> {
        let mut places = vec![dir.to_owned(), dir.join("boot")];
        for modules in ["usr/lib/modules", "lib/modules"] {
            places.extend(children(&dir.join(modules)));
        }
        let image = places
            .iter()
            .flat_map(|place| children(place))
            .find(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                (name.starts_with("vmlinuz") || name == "bzImage") && path.is_file()
            })
            .ok_or_else(|| format!("no vmlinuz or bzImage in {}", dir.display()))?;

        let mut head = Vec::new();
        let what = || format!("cannot read {}", image.display());
        File::open(&image).context(what)?.take(1 << 16).read_to_end(&mut head).context(what)?;
        let release = release(&head)
            .ok_or_else(|| format!("{} is not a bzImage of Linux for x86", image.display()))?;

        let modules_dir = ["usr/lib/modules", "lib/modules"]
            .iter()
            .map(|modules| dir.join(modules).join(&release))
            .find(|dir| dir.is_dir());
        Ok(Kernel { release, image, modules_dir, modules: OnceLock::new() })
    }

    /// Paths of the modules to load to have those named; what is missing is missing.
    pub fn load_order(&self, names: &[&str]) -> Result<LoadOrder, Error> {
        if names.is_empty() {
            return Ok(LoadOrder::default());
        }
        let Some(dir) = &self.modules_dir else {
            let missing = names.iter().map(|name| (*name).to_owned()).collect();
            return Ok(LoadOrder { paths: Vec::new(), missing });
        };
        if self.modules.get().is_none() {
            let _ = self.modules.set(Modules::of_directory(dir, &self.release)?);
        }
        let mut order = self.modules.get().expect("it was set").load_order(names);
        order.paths.iter_mut().for_each(|path| *path = dir.join(&*path));
        Ok(order)
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// The release in the head of a bzImage: at 0x20e there is where it starts, less 0x200.
fn release(head: &[u8]) -> Option<String> {
    if head.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let offset = u16::from_le_bytes(head.get(0x20e..0x210)?.try_into().ok()?);
    let text = head.get(usize::from(offset) + 0x200..)?;
    let text = &text[..text.iter().position(|byte| matches!(byte, 0 | b' '))?];
    Some(std::str::from_utf8(text).ok()?.to_owned()).filter(|text| !text.is_empty())
}

/// A kernel of Debian's, from earlier runs or from its mirror.
fn fetched(lab: &Lab, series: &str) -> Result<Kernel, Error> {
    /// One at a time, and with the lists of the first.
    static APT: Mutex<Option<Apt>> = Mutex::new(None);

    let dir = lab.kept("kernels").join(series);
    if dir.is_dir() {
        return Kernel::in_directory(&dir);
    }
    let mut apt = APT.lock().expect("no use of apt panics");
    if apt.is_none() {
        *apt = Some(Apt::update(&lab.temporary("apt"))?);
    }
    let apt = apt.as_ref().expect("it was set");
    let names = apt.names("linux-image-")?;
    let newest = newest(&names, series).ok_or_else(|| {
        let lists = apt.complaint();
        format!(
            "there is no linux-image-{series}…{FLAVOUR} in the mirror's package lists{lists}; \
             see SEALMOUNT_VM_SERIES and SEALMOUNT_VM_KERNELS"
        )
    })?;
    let packages = apt.with_parts(newest)?;
    say(&format!("fetching {}", packages.join(", ")));

    // Under its name there is never half a kernel.
    let temporary = lab.temporary(&format!("kernel-{series}"));
    fs::create_dir_all(&temporary).context(|| format!("cannot make {}", temporary.display()))?;
    apt.unpack(&packages, &temporary).context(|| format!("cannot fetch {newest}"))?;
    Kernel::in_directory(&temporary).context(|| format!("in what {newest} unpacked to"))?;
    let parent = dir.parent().expect("it was joined to one");
    fs::create_dir_all(parent).context(|| format!("cannot make {}", parent.display()))?;
    if let Err(error) = fs::rename(&temporary, &dir) {
        // Another run may have been faster; then its is as good.
        if !dir.is_dir() {
            return Err(format!(
                "cannot rename {} to {}: {error}",
                temporary.display(),
                dir.display()
            )
            .into());
        }
    }
    Kernel::in_directory(&dir)
}

/// Of the packages' names, that of the newest kernel of a series.
fn newest<'a>(names: &'a [String], series: &str) -> Option<&'a str> {
    let version = |name: &'a str| {
        let version = name.strip_prefix("linux-image-")?.strip_suffix(FLAVOUR)?;
        let of_series = version.strip_prefix(series)?.starts_with(|c: char| !c.is_ascii_digit());
        of_series.then(|| numbers(version))
    };
    names
        .iter()
        .filter_map(|name| Some((version(name)?, name.as_str())))
        .max()
        .map(|(_, name)| name)
}

/// `7.2.12+deb14` is newer than `7.2.9+deb14`, and than `7.2.12+deb13`.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_series() {
        let names: Vec<String> = [
            "linux-image-6.1.0-50-cloud-amd64",
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-51-cloud-amd64-unsigned",
            "linux-image-6.1.0-52-amd64",
            "linux-image-6.12.94+deb13-cloud-amd64",
            "linux-image-6.12.107+deb13-cloud-amd64",
            "linux-image-cloud-amd64",
        ]
        .map(str::to_owned)
        .to_vec();
        assert_eq!(newest(&names, "6.1"), Some("linux-image-6.1.0-50-cloud-amd64"));
        assert_eq!(newest(&names, "6.12"), Some("linux-image-6.12.107+deb13-cloud-amd64"));
        assert_eq!(newest(&names, "6.12.94"), Some("linux-image-6.12.94+deb13-cloud-amd64"));
        assert_eq!(newest(&names, "6"), Some("linux-image-6.12.107+deb13-cloud-amd64"));
        assert_eq!(newest(&names, "5.10"), None);
    }

    #[test]
    fn the_release_is_read_from_the_image() {
        let mut head = vec![0; 0x300];
        head[0x202..0x206].copy_from_slice(b"HdrS");
        head[0x20e..0x210].copy_from_slice(&0x80u16.to_le_bytes());
        head[0x280..0x28e].copy_from_slice(b"6.1.0-x (me) 1");
        assert_eq!(release(&head).as_deref(), Some("6.1.0-x"));
        head[0x20e..0x210].copy_from_slice(&u16::MAX.to_le_bytes());
        assert_eq!(release(&head), None);
        assert_eq!(release(b"ELF"), None);
    }
}
