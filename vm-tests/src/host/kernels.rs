//! Gets kernels: fetches a series from Debian, or finds a kernel in a directory.

use super::apt::{Apt, Parts};
use super::lab::Lab;
use super::modules::{LoadOrder, Modules};
use super::say::say;
use crate::machine::Machine;
use crate::{Context, Error};
use std::env;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

/// The kernels of the default run, oldest first. The series are the oldest supported kernel, the first
/// kernel that mounts an image file directly, and the two newest kernels. The versions have a fault: an EROFS
/// from a file counts as a level of stacking. No code depends on these numbers.
const DEFAULT: &[Default] = &[
    Default::Series("6.1"),
    Default::Series("6.12"),
    Default::Version("6.17.13"),
    Default::Version("6.18.5"),
    Default::Series("7.2"),
    Default::Series("7.3"),
];

/// A kernel of [`DEFAULT`].
enum Default {
    Series(&'static str),
    Version(&'static str),
}

const FLAVOUR: &str = "-cloud-amd64";

/// The advice for a version that the mirror does not have.
const REMOVED: &str = "mirrors remove old versions: put another version with the same fault into the list \
    DEFAULT of vm-tests/src/host/kernels.rs, or set SEALMOUNT_VM_SERIES=6.1,6.12,7.2,7.3";

/// The source of a kernel that the host has not fetched yet.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// The newest kernel of Debian that starts with these numbers.
    Series(String),
    /// A version of Debian with a fault that other versions of its series do not have. Only machines with
    /// [`Machine::on_faulty_kernels`] boot this version.
    FaultyVersion(String),
    Directory(PathBuf),
}

impl Wanted {
    /// Returns the kernels that SEALMOUNT_VM_KERNELS or SEALMOUNT_VM_SERIES selects.
    pub fn from_environment() -> Vec<Wanted> {
        if let Some(directories) =
            env::var_os("SEALMOUNT_VM_KERNELS").filter(|value| !value.is_empty())
        {
            return env::split_paths(&directories).map(Wanted::Directory).collect();
        }
        match env::var("SEALMOUNT_VM_SERIES").ok().filter(|value| !value.is_empty()) {
            Some(list) => {
                list.split(',').map(|series| Wanted::Series(series.trim().to_owned())).collect()
            }
            None => Wanted::by_default(),
        }
    }

    /// Returns the kernels of a run without these variables.
    pub(super) fn by_default() -> Vec<Wanted> {
        let wanted = |kernel: &Default| match kernel {
            Default::Series(series) => Wanted::Series((*series).to_owned()),
            Default::Version(version) => Wanted::FaultyVersion((*version).to_owned()),
        };
        DEFAULT.iter().map(wanted).collect()
    }

    /// Returns whether the machine boots this kernel.
    pub fn boots(&self, machine: &Machine) -> bool {
        !matches!(self, Wanted::FaultyVersion(_)) || machine.on_faulty_kernels
    }

    /// Returns the kernel part of the test names. The name is known before the host fetches the kernel.
    pub fn name(&self) -> String {
        match self {
            Wanted::Series(name) | Wanted::FaultyVersion(name) => name.clone(),
            // A directory without a kernel still has tests. They fail and report the reason.
            Wanted::Directory(dir) => match Kernel::in_directory(dir) {
                Ok(kernel) => kernel.release,
                Err(_) => dir.display().to_string(),
            },
        }
    }

    pub fn get(&self, lab: &Lab) -> Result<Kernel, Error> {
        match self {
            Wanted::Series(series) => {
                fetched(lab, series, "set SEALMOUNT_VM_SERIES or SEALMOUNT_VM_KERNELS")
            }
            Wanted::FaultyVersion(version) => fetched(lab, version, REMOVED),
            Wanted::Directory(dir) => Kernel::in_directory(dir),
        }
    }
}

/// A kernel image and its modules.
#[derive(Debug)]
pub struct Kernel {
    /// The release, as `uname -r` prints it.
    pub release: String,
    pub image: PathBuf,
    modules_dir: Option<PathBuf>,
    modules: OnceLock<Modules>,
}

impl Kernel {
    /// Finds the image in the usual places, and the modules of its release.
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
            .ok_or_else(|| format!("{} is not a bzImage of x86 Linux", image.display()))?;

        let modules_dir = ["usr/lib/modules", "lib/modules"]
            .iter()
            .map(|modules| dir.join(modules).join(&release))
            .find(|dir| dir.is_dir());
        Ok(Kernel { release, image, modules_dir, modules: OnceLock::new() })
    }

    /// Returns the modules to load for `names`, in order. Modules that the kernel lacks are in
    /// `missing`.
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
        let mut order = self.modules.get().expect("the value was set above").load_order(names);
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

/// Returns the release from the head of a bzImage. The number at 0x20e is the offset of the text, minus
/// 0x200.
fn release(head: &[u8]) -> Option<String> {
    if head.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let offset = u16::from_le_bytes(head.get(0x20e..0x210)?.try_into().ok()?);
    let text = head.get(usize::from(offset) + 0x200..)?;
    let text = &text[..text.iter().position(|byte| matches!(byte, 0 | b' '))?];
    Some(std::str::from_utf8(text).ok()?.to_owned()).filter(|text| !text.is_empty())
}

/// Returns a kernel of Debian, from an earlier run or from the mirror. If the mirror does not have the
/// kernel, the message ends with `advice`.
fn fetched(lab: &Lab, series: &str, advice: &str) -> Result<Kernel, Error> {
    /// The lock allows one fetch at a time. Later fetches use the package lists of the first fetch.
    static APT: Mutex<Option<Apt>> = Mutex::new(None);

    let dir = lab.kept("kernels").join(series);
    if dir.is_dir() {
        return Kernel::in_directory(&dir);
    }
    let mut apt = APT.lock().expect("no thread panics while it uses apt");
    if apt.is_none() {
        *apt = Some(Apt::update(&lab.temporary("apt"))?);
    }
    let apt = apt.as_ref().expect("the value was set above");
    let names = apt.names("linux-image-")?;
    let newest = newest(&names, series).ok_or_else(|| {
        let update_error = apt.update_error();
        format!(
            "no linux-image-{series}…{FLAVOUR} in the package lists of the mirror{update_error}; {advice}"
        )
    })?;
    let Parts { packages, missing } = apt.with_parts(newest)?;
    say(&format!("fetching {}", packages.join(", ")));

    // The rename publishes a complete kernel, so other runs never see an incomplete one.
    let temporary = lab.temporary(&format!("kernel-{series}"));
    fs::create_dir_all(&temporary).context(|| format!("cannot make {}", temporary.display()))?;
    apt.unpack(&packages, &temporary).context(|| format!("cannot fetch {newest}"))?;
    check(&temporary).map_err(|error| match missing.as_slice() {
        [] => format!("cannot use the unpacked {newest}: {error}"),
        missing => format!(
            "the mirror has {newest} but not {}, parts of that package ({error}); {advice}",
            missing.join(", ")
        ),
    })?;
    let parent = dir.parent().expect("the directory has a parent");
    fs::create_dir_all(parent).context(|| format!("cannot make {}", parent.display()))?;
    if let Err(error) = fs::rename(&temporary, &dir) {
        // Another run may have published this kernel first. Then both kernels are equivalent.
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

/// Checks that a fetched kernel has an image and modules. A package may lack parts that no test needs: the
/// mirror lacks linux-base of 6.18.5, which has no files of the kernel.
fn check(dir: &Path) -> Result<(), Error> {
    match Kernel::in_directory(dir)?.modules_dir {
        Some(_) => Ok(()),
        None => Err("the kernel has no modules".into()),
    }
}

/// Returns the package of the newest kernel of a series.
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

/// Returns the numbers of a version for comparison: `7.2.12+deb14` is newer than `7.2.9+deb14` and
/// `7.2.12+deb13`.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_returns_its_newest_kernel() {
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
    fn faulty_version_boots_only_marked_machines() {
        let faulty = Wanted::FaultyVersion("6.18.5".into());
        let marked = Machine { on_faulty_kernels: true, ..Machine::BARE };
        assert!(faulty.boots(&marked) && !faulty.boots(&Machine::BARE));
        assert!(Wanted::Series("6.18.5".into()).boots(&Machine::BARE));
        // The first and the last kernel are in the quick tier.
        let default = Wanted::by_default();
        assert!(
            default[0].boots(&Machine::BARE) && default[default.len() - 1].boots(&Machine::BARE)
        );
    }

    #[test]
    fn kernel_without_modules_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let message = check(dir.path()).unwrap_err().to_string();
        assert!(message.starts_with("no vmlinuz or bzImage in "), "{message}");
        let mut image = vec![0; 0x300];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x80u16.to_le_bytes());
        image[0x280..0x288].copy_from_slice(b"6.1.0-x ");
        fs::write(dir.path().join("vmlinuz"), image).unwrap();
        assert_eq!(check(dir.path()).unwrap_err().to_string(), "the kernel has no modules");
        fs::create_dir_all(dir.path().join("lib/modules/6.1.0-x")).unwrap();
        check(dir.path()).unwrap();
    }

    #[test]
    fn kernel_image_returns_its_release() {
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
