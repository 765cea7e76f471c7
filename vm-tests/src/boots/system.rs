//! A real system that examples/boot-debian prepares: kernel, initramfs, and a disk.

use crate::boots::once::Once;
use crate::files::read;
use crate::host::Lab;
use crate::host::kernels::{Series, Wanted};
use crate::programs::command;
use crate::{Context, Error};
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The description of a system.
#[derive(Debug)]
pub struct Description {
    /// The directory of the system below target/boot.
    pub name: &'static str,
    /// The series of Debian's kernels.
    pub kernel: &'static str,
    /// More options of boot-debian.
    pub options: &'static [&'static str],
}

/// A system whose files exist. No test changes these files.
#[derive(Debug)]
pub struct System {
    pub directory: PathBuf,
    /// The release of the kernel.
    pub kernel: String,
    /// The digest of the image.
    pub digest: String,
    /// The digest of the image of the second deployment, or empty text.
    pub second: String,
    /// The first words of the kernel command line.
    pub words: String,
    /// Whether the initramfs has a journal, which reaches the system.
    pub has_journal: bool,
}

/// The systems of a run. The first test that needs a system makes the system.
pub struct Systems {
    pub lab: Lab,
    systems: [Once<System>; ALL.len()],
    /// Two runs of boot-debian would download the same files.
    preparing: Mutex<()>,
}

pub static DRACUT: Description = Description {
    name: "7.3-dracut",
    kernel: "7.3",
    options: &["--initramfs", "dracut", "--second-deployment", "--uki"],
};
pub static INITRAMFS_TOOLS: Description = Description {
    name: "7.3-initramfs-tools",
    kernel: "7.3",
    options: &["--initramfs", "initramfs-tools"],
};
/// With the line of /etc/fstab, systemd-remount-fs remounts the root.
pub static LONG_TERM: Description = Description {
    name: "6.12-dracut",
    kernel: "6.12",
    options: &["--initramfs", "dracut", "--fstab", "LABEL=boot-debian / ext4 ro 0 0"],
};
/// Linux before 6.6 has no verity in overlayfs.
pub static WITHOUT_VERITY: Description =
    Description { name: "6.1-dracut", kernel: "6.1", options: &["--initramfs", "dracut"] };
/// The program of composefs-rs makes the image, the objects and the directories of the deployment.
pub static COMPOSEFS_RS: Description = Description {
    name: "composefs-rs",
    kernel: "7.3",
    options: &["--initramfs", "dracut", "--cfsctl"],
};
static ALL: [&Description; 5] =
    [&DRACUT, &INITRAMFS_TOOLS, &LONG_TERM, &WITHOUT_VERITY, &COMPOSEFS_RS];

impl Systems {
    pub fn new(lab: Lab) -> Systems {
        Systems { lab, systems: ALL.map(|_| Once::default()), preparing: Mutex::new(()) }
    }

    /// Returns a system.
    pub fn get(&self, description: &'static Description) -> Result<&System, Error> {
        let number = ALL.iter().position(|other| other.name == description.name);
        let system = &self.systems[number.expect("the list has every system")];
        system.get(|| {
            self.prepare(description)
                .context(|| format!("cannot prepare the system {}", description.name))
        })
    }

    fn prepare(&self, description: &Description) -> Result<System, Error> {
        let _only_one = self.preparing.lock().expect("no thread panics while it prepares a system");
        Wanted::Series(Series::parse(description.kernel)?).get(&self.lab)?;
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let directory = root.join("target/boot").join(description.name);
        if env::var_os("SEALMOUNT_BOOTS").is_some_and(|value| value == "reuse")
            && directory.join("system").exists()
        {
            return System::read(directory, description);
        }
        let log = self.lab.kept("log").join(format!("boot-debian-{}.log", description.name));
        let file = File::create(&log).context(|| format!("cannot make {}", log.display()))?;
        let status = command("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(root.join("examples/boot-debian"))
            .args(["--prepare", description.name, "--kernel"])
            .arg(self.lab.kept("kernels").join(description.kernel))
            .args(description.options)
            // These variables of the test would change the build of the helper.
            .env_remove("CARGO_MANIFEST_DIR")
            .stdout(file.try_clone()?)
            .stderr(file)
            .status()
            .context(|| "cannot run boot-debian".into())?;
        if !status.success() {
            let log = fs::read_to_string(log)?;
            return Err(format!("boot-debian failed ({status}):\n{log}").into());
        }
        System::read(directory, description)
    }
}

impl System {
    fn read(directory: PathBuf, description: &Description) -> Result<System, Error> {
        let text = read(&directory.join("system").display().to_string())?;
        let value = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            value.map(str::to_owned).ok_or_else(|| format!("no line {name}= in {text:?}"))
        };
        let [kernel, digest, second, words] =
            [value("kernel")?, value("digest")?, value("second")?, value("words")?];
        let has_journal = !description.options.contains(&"initramfs-tools");
        Ok(System { directory, kernel, digest, second, words, has_journal })
    }

    /// Returns the path of a file of the system.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}
