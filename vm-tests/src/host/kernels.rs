//! Gets kernels: fetches a series from Debian, or finds a kernel in a directory.

use super::apt::{self, Apt, Parts};
use super::lab::Lab;
use super::modules::{LoadOrder, Modules};
use super::say::say;
use crate::arch::{AARCH64, Arch, X86_64};
use crate::files::publish;
use crate::machine::Machine;
use crate::programs::{command, output};
use crate::{Context, Error};
use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The kernels of the default run. The first and the last kernel are also in the quick run. The series are the
/// oldest supported kernel, the first kernel that mounts an image file directly, the two newest kernels, and
/// the newest kernel with pages of 16 KiB. The versions have a fault: an EROFS from a file counts as a level of
/// stacking. No code depends on these numbers.
const DEFAULT: &[Default] = &[
    Default::Series("6.1"),
    Default::Series("6.12"),
    Default::FaultyVersion("6.17.13"),
    Default::FaultyVersion("6.18.5"),
    Default::Series("7.2"),
    Default::LargePages("7.3-arm64-16k"),
    Default::Series("7.3"),
];

/// A kernel of [`DEFAULT`].
enum Default {
    Series(&'static str),
    FaultyVersion(&'static str),
    LargePages(&'static str),
}

/// A kind of Debian's kernels.
#[derive(Debug)]
struct Flavour {
    /// The end of the name of a series.
    name: &'static str,
    /// The end of the name of a package.
    package: &'static str,
    arch: &'static Arch,
}

/// All flavours that a series can name. The first flavour has no name.
static FLAVOURS: [Flavour; 3] = [
    Flavour { name: "", package: "-cloud-amd64", arch: &X86_64 },
    Flavour { name: "-arm64", package: "-cloud-arm64", arch: &AARCH64 },
    Flavour { name: "-arm64-16k", package: "-arm64-16k", arch: &AARCH64 },
];

/// A series of Debian's kernels: the first numbers of a version, and a flavour. `7.3` is on x86-64,
/// `7.3-arm64` on arm64, and `7.3-arm64-16k` on arm64 with pages of 16 KiB.
#[derive(Clone, Debug)]
pub struct Series {
    numbers: String,
    flavour: &'static Flavour,
}

impl Series {
    pub fn parse(name: &str) -> Result<Series, Error> {
        let (numbers, flavour) = name.split_at(name.find('-').unwrap_or(name.len()));
        let is_number = |number: &str| number.parse::<u32>().is_ok();
        let known = FLAVOURS.iter().find(|known| known.name == flavour);
        match known.filter(|_| numbers.split('.').all(is_number)) {
            Some(flavour) => Ok(Series { numbers: numbers.into(), flavour }),
            None => {
                let names = FLAVOURS.iter().map(|known| format!("7.3{}", known.name));
                let names = names.collect::<Vec<_>>().join(", ");
                Err(format!("{name:?} is not a series of kernels; examples: {names}").into())
            }
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.numbers, self.flavour.name)
    }
}

/// The advice for a version that the mirror does not have.
const REMOVED: &str = "mirrors remove old versions: put another version with the same fault into the list \
    DEFAULT of vm-tests/src/host/kernels.rs, or set SEALMOUNT_VM_SERIES=6.1,6.12,7.2,7.3";

/// The source of a kernel that the host has not fetched yet.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// The newest kernel of Debian of a series.
    Series(Series),
    /// A version of Debian with a fault that other versions of its series do not have. Only machines with
    /// [`Machine::on_faulty_kernels`] boot this version.
    FaultyVersion(Series),
    /// The newest kernel of a series with large pages. Only machines with [`Machine::on_large_pages`] boot this
    /// kernel.
    LargePages(Series),
    Directory(PathBuf),
}

impl Wanted {
    /// Returns the kernels that SEALMOUNT_VM_KERNELS or SEALMOUNT_VM_SERIES selects.
    pub fn from_environment() -> Result<Vec<Wanted>, Error> {
        if let Some(directories) =
            env::var_os("SEALMOUNT_VM_KERNELS").filter(|value| !value.is_empty())
        {
            return Ok(env::split_paths(&directories).map(Wanted::Directory).collect());
        }
        match env::var("SEALMOUNT_VM_SERIES").ok().filter(|value| !value.is_empty()) {
            Some(list) => {
                let parse = |name: &str| Ok(Wanted::Series(Series::parse(name.trim())?));
                let wanted: Result<_, Error> = list.split(',').map(parse).collect();
                wanted.context(|| "SEALMOUNT_VM_SERIES".into())
            }
            None => Ok(Wanted::by_default()),
        }
    }

    /// Returns the kernels of a run without these variables.
    pub(super) fn by_default() -> Vec<Wanted> {
        let series = |name| Series::parse(name).expect("a test parses all names");
        let wanted = |kernel: &Default| match kernel {
            Default::Series(name) => Wanted::Series(series(name)),
            Default::FaultyVersion(name) => Wanted::FaultyVersion(series(name)),
            Default::LargePages(name) => Wanted::LargePages(series(name)),
        };
        DEFAULT.iter().map(wanted).collect()
    }

    /// Returns whether the machine boots this kernel.
    pub fn boots(&self, machine: &Machine) -> bool {
        match self {
            Wanted::Series(_) | Wanted::Directory(_) => true,
            Wanted::FaultyVersion(_) => machine.on_faulty_kernels,
            Wanted::LargePages(_) => machine.on_large_pages,
        }
    }

    /// Returns the kernel part of the test names. The name is known before the host fetches the kernel.
    pub fn name(&self) -> String {
        match self {
            Wanted::Series(series) | Wanted::FaultyVersion(series) | Wanted::LargePages(series) => {
                series.to_string()
            }
            // A directory without a kernel still has tests. They fail and report the reason.
            Wanted::Directory(dir) => match Kernel::in_directory(dir) {
                Ok(kernel) => kernel.release,
                Err(_) => dir.display().to_string(),
            },
        }
    }

    pub fn get(&self, lab: &Lab) -> Result<Kernel, Error> {
        match self {
            Wanted::Series(series) | Wanted::LargePages(series) => {
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
    pub arch: &'static Arch,
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
                let is_image = name.starts_with("vmlinuz") || IMAGE_NAMES.contains(&&*name);
                is_image && path.is_file()
            })
            .ok_or_else(|| {
                format!("no vmlinuz, {} in {}", IMAGE_NAMES.join(", "), dir.display())
            })?;

        let mut content =
            fs::read(&image).context(|| format!("cannot read {}", image.display()))?;
        if content.starts_with(&[0x1f, 0x8b]) {
            content = output(command("gzip").args(["--decompress", "--stdout"]).arg(&image))?;
        }
        let (arch, release) = identify(&content).ok_or_else(|| {
            format!("{} is not a bzImage of x86 Linux or an Image of arm64 Linux", image.display())
        })?;

        let modules_dir = ["usr/lib/modules", "lib/modules"]
            .iter()
            .map(|modules| dir.join(modules).join(&release))
            .find(|dir| dir.is_dir());
        Ok(Kernel { release, arch, image, modules_dir, modules: OnceLock::new() })
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

/// The names of kernel images, besides names that start with `vmlinuz`.
const IMAGE_NAMES: [&str; 3] = ["bzImage", "Image", "Image.gz"];

fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// Returns the architecture and the release of a decompressed kernel image.
fn identify(image: &[u8]) -> Option<(&'static Arch, String)> {
    let (arch, text) = if image.get(0x202..0x206) == Some(b"HdrS") {
        // The number at 0x20e is the offset of the text, minus 0x200.
        let offset = u16::from_le_bytes(image.get(0x20e..0x210)?.try_into().ok()?);
        (&X86_64, image.get(usize::from(offset) + 0x200..)?)
    } else if image.get(0x38..0x3c) == Some(b"ARM\x64") {
        (&AARCH64, banner(image)?)
    } else {
        return None;
    };
    let text = &text[..text.iter().position(|byte| matches!(byte, 0 | b' '))?];
    let release = std::str::from_utf8(text).ok()?.to_owned();
    (!release.is_empty()).then_some((arch, release))
}

/// Returns the content of an image from the release in its banner. The header of an arm64 image does not have
/// the release.
fn banner(image: &[u8]) -> Option<&[u8]> {
    const START: &[u8] = b"Linux version ";
    let mut rest = image;
    loop {
        rest = &rest[rest.iter().position(|byte| *byte == START[0])?..];
        match rest.strip_prefix(START) {
            Some(release @ [b'0'..=b'9', ..]) => return Some(release),
            _ => rest = &rest[1..],
        }
    }
}

/// Returns a kernel of Debian, from an earlier run or from the mirror. If the mirror does not have the
/// kernel, the message ends with `advice`.
fn fetched(lab: &Lab, series: &Series, advice: &str) -> Result<Kernel, Error> {
    let dir = lab.kept("kernels").join(series.to_string());
    if !dir.is_dir() {
        apt::with_lists(series.flavour.arch, &lab.temporary(""), |apt| {
            fetch(lab, apt, series, &dir, advice)
        })?;
    }
    Kernel::in_directory(&dir)
}

fn fetch(lab: &Lab, apt: &Apt, series: &Series, dir: &Path, advice: &str) -> Result<(), Error> {
    let names = apt.names("linux-image-")?;
    let newest = newest(&names, series).ok_or_else(|| {
        let update_error = apt.update_error();
        format!(
            "no linux-image-{}…{} in the package lists of the mirror{update_error}; {advice}",
            series.numbers, series.flavour.package
        )
    })?;
    let Parts { packages, missing } = apt.with_parts(newest)?;
    say(&format!("fetching {}", packages.join(", ")));

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
    publish(&temporary, dir)
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
fn newest<'a>(names: &'a [String], series: &Series) -> Option<&'a str> {
    let version = |name: &'a str| {
        let version = name.strip_prefix("linux-image-")?.strip_suffix(series.flavour.package)?;
        let rest = version.strip_prefix(&series.numbers)?;
        let of_series = rest.starts_with(|c: char| !c.is_ascii_digit());
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
            "linux-image-6.12.90+deb13-cloud-arm64",
            "linux-image-6.12.92+deb13-arm64",
            "linux-image-6.12.91+deb13-arm64-16k",
        ]
        .map(str::to_owned)
        .to_vec();
        let newest = |series| newest(&names, &Series::parse(series).unwrap());
        assert_eq!(newest("6.1"), Some("linux-image-6.1.0-50-cloud-amd64"));
        assert_eq!(newest("6.12"), Some("linux-image-6.12.107+deb13-cloud-amd64"));
        assert_eq!(newest("6.12.94"), Some("linux-image-6.12.94+deb13-cloud-amd64"));
        assert_eq!(newest("6"), Some("linux-image-6.12.107+deb13-cloud-amd64"));
        assert_eq!(newest("5.10"), None);
        assert_eq!(newest("6.12-arm64"), Some("linux-image-6.12.90+deb13-cloud-arm64"));
        assert_eq!(newest("6.12-arm64-16k"), Some("linux-image-6.12.91+deb13-arm64-16k"));
    }

    #[test]
    fn series_keeps_its_name_and_architecture() {
        for (name, arch) in
            [("7.3", &X86_64), ("6.12-arm64", &AARCH64), ("7.3.4-arm64-16k", &AARCH64)]
        {
            let series = Series::parse(name).unwrap();
            assert_eq!((series.to_string().as_str(), series.flavour.arch), (name, arch));
        }
        for name in ["", "7.3-riscv64", "7.3-arm64-64k", "7.3-", "-arm64", "7..3", "v7.3"] {
            let message = Series::parse(name).unwrap_err().to_string();
            let end = "is not a series of kernels; examples: 7.3, 7.3-arm64, 7.3-arm64-16k";
            assert_eq!(message, format!("{name:?} {end}"));
        }
    }

    #[test]
    fn marked_kernels_boot_only_marked_machines() {
        let series = || Series::parse("6.18.5").unwrap();
        let on_faulty = Machine { on_faulty_kernels: true, ..Machine::BARE };
        let on_large = Machine { on_large_pages: true, ..Machine::BARE };
        let boots = |kernel: Wanted| [&on_faulty, &on_large].map(|machine| kernel.boots(machine));
        assert_eq!(boots(Wanted::FaultyVersion(series())), [true, false]);
        assert_eq!(boots(Wanted::LargePages(series())), [false, true]);
        assert_eq!(boots(Wanted::Series(series())), [true, true]);
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
        assert!(message.starts_with("no vmlinuz, bzImage, Image, Image.gz in "), "{message}");
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
    fn x86_image_returns_its_release() {
        let mut head = vec![0; 0x300];
        head[0x202..0x206].copy_from_slice(b"HdrS");
        head[0x20e..0x210].copy_from_slice(&0x80u16.to_le_bytes());
        head[0x280..0x28e].copy_from_slice(b"6.1.0-x (me) 1");
        assert_eq!(identify(&head), Some((&X86_64, "6.1.0-x".into())));
        head[0x20e..0x210].copy_from_slice(&u16::MAX.to_le_bytes());
        assert_eq!(identify(&head), None);
        assert_eq!(identify(b"ELF"), None);
    }

    #[test]
    fn arm64_image_of_any_compression_returns_release() {
        let dir = tempfile::tempdir().unwrap();
        let mut image = vec![0; 0x40];
        image[0x38..0x3c].copy_from_slice(b"ARM\x64");
        assert_eq!(identify(&image), None);
        image.extend(b"LLinux version %s\0Linux version 7.3.4-x (me)");
        assert_eq!(identify(&image), Some((&AARCH64, "7.3.4-x".into())));

        let plain = dir.path().join("Image");
        fs::write(&plain, image).unwrap();
        assert_eq!(Kernel::in_directory(dir.path()).unwrap().image, plain);
        output(command("gzip").arg(&plain)).unwrap();
        let kernel = Kernel::in_directory(dir.path()).unwrap();
        assert_eq!((kernel.arch, kernel.release.as_str()), (&AARCH64, "7.3.4-x"));
        assert_eq!(kernel.image, dir.path().join("Image.gz"));
    }
}
