//! Fetches Debian packages with a private apt configuration. The apt sources of the host supply the
//! mirror and the keys. The apt state of the host stays unchanged.

use super::say::say;
use crate::arch::Arch;
use crate::programs::{self, command, output};
use crate::{Context, Error};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// The releases that have the kernels of the default run, among others.
const SUITES: &[&str] = &["bookworm", "bookworm-backports", "trixie", "trixie-backports", "forky"];

/// The suites on the mirror of security updates, if the host has that mirror. Backports have no
/// security suite.
const SECURITY_SUITES: &[&str] = &["bookworm-security", "trixie-security", "forky-security"];

const CANNOT_FETCH: &str = "SEALMOUNT_VM_KERNELS is not set, and Debian's kernels cannot be \
    fetched";

/// Suite names in apt sources that mean Debian itself, not its security archive or another vendor's
/// packages.
const RELEASES: &[&str] = &[
    "bookworm",
    "trixie",
    "forky",
    "sid",
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
];

/// The directory of fetched packages, below the directory of the configuration.
const ARCHIVES: &str = "cache/archives";

/// Keyrings of all Debian releases, for hosts whose sources do not have `Signed-By`.
const KEYRINGS: &[&str] = &[
    "/usr/share/keyrings/debian-archive-keyring.pgp",
    "/usr/share/keyrings/debian-archive-keyring.gpg",
];

/// Calls a function with the package lists of an architecture. The first call fetches the lists into the
/// directory of the run. The lock allows one fetch at a time.
pub fn with_lists<T>(
    arch: &'static Arch,
    run: &Path,
    work: impl FnOnce(&Apt) -> Result<T, Error>,
) -> Result<T, Error> {
    static FETCHED: Mutex<BTreeMap<&str, Apt>> = Mutex::new(BTreeMap::new());

    let mut fetched = FETCHED.lock().expect("no thread panics while it uses apt");
    let apt = match fetched.entry(arch.debian) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => {
            let dir = run.join(format!("apt-{}", arch.debian));
            entry.insert(Apt::update(arch, &dir)?)
        }
    };
    work(apt)
}

/// A package and its parts.
#[derive(Debug)]
pub struct Parts {
    pub packages: Vec<String>,
    /// The parts that the mirror does not have.
    pub missing: Vec<String>,
}

/// A private apt configuration with fresh package lists.
#[derive(Debug)]
pub struct Apt {
    configuration: PathBuf,
    /// The error of apt if apt could not fetch all package lists.
    update_error: Option<String>,
}

impl Apt {
    /// Creates the configuration in `dir` and fetches the package lists.
    fn update(arch: &Arch, dir: &Path) -> Result<Apt, Error> {
        programs::check_these(programs::NEEDED_TO_FETCH).context(|| CANNOT_FETCH.into())?;
        let sources = machine_sources();
        let mirror = debian_mirror(&sources).context(|| CANNOT_FETCH.into())?;
        let security = security_mirror(&sources);
        let mut text = mirror.with_suites(SUITES);
        if let Some(security) = security {
            text += &format!("\n{}", security.with_suites(SECURITY_SUITES));
        }
        for part in ["state/lists/partial", &format!("{ARCHIVES}/partial")] {
            fs::create_dir_all(dir.join(part))
                .context(|| format!("cannot make {part} in {}", dir.display()))?;
        }
        let write = |name: &str, content: &str| {
            let path = dir.join(name);
            fs::write(&path, content).context(|| format!("cannot write {}", path.display()))?;
            Ok::<_, Error>(path)
        };
        write("status", "")?;
        write("debian.sources", &text)?;
        let configuration = write("apt.conf", &configuration(arch, dir))?;
        let mut apt = Apt { configuration, update_error: None };
        // A mirror may lack a suite that this run does not need.
        if let Err(error) = output(apt.command("apt-get").arg("update")) {
            say(&format!("apt could not fetch all package lists: {error}"));
            apt.update_error = Some(error.to_string());
        }
        Ok(apt)
    }

    /// Returns a reason why an expected package may be missing, for an error message.
    pub fn update_error(&self) -> String {
        let error = self.update_error.as_ref();
        error.map_or(String::new(), |error| format!(" (apt could not fetch all lists: {error})"))
    }

    /// Returns the names of all packages that start with `prefix`.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>, Error> {
        let names = output(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(String::from_utf8_lossy(&names).lines().map(str::to_owned).collect())
    }

    /// Returns a package and its parts: all packages that it depends on in exactly its own version.
    /// Since Linux 6.19, Debian splits a kernel into several parts.
    pub fn with_parts(&self, name: &str) -> Result<Parts, Error> {
        let mut found = Parts { packages: vec![name.to_owned()], missing: Vec::new() };
        let mut next = 0;
        while let Some(name) = found.packages.get(next) {
            let shown =
                output(self.command("apt-cache").args(["show", "--no-all-versions", name]))?;
            match stanzas(&String::from_utf8_lossy(&shown)).into_iter().next() {
                Some(package) => {
                    let of_package = parts(&package).into_iter();
                    let new = of_package.filter(|part| !found.packages.contains(part));
                    let new: Vec<_> = new.filter(|part| !found.missing.contains(part)).collect();
                    found.packages.extend(new);
                    next += 1;
                }
                None => found.missing.push(found.packages.remove(next)),
            }
        }
        Ok(found)
    }

    /// Fetches packages and unpacks them into a directory. apt checks the packages against the signed
    /// package lists.
    pub fn unpack(&self, packages: &[String], dir: &Path) -> Result<(), Error> {
        let archives = dir.join("archives");
        fs::create_dir(&archives).context(|| format!("cannot make {}", archives.display()))?;
        output(self.command("apt-get").arg("download").args(packages).current_dir(&archives))?;
        extract(&archives, dir)?;
        fs::remove_dir_all(&archives)?;
        Ok(())
    }

    /// Fetches packages of a suite with all packages that they depend on, and unpacks them into a directory.
    pub fn unpack_with_dependencies(
        &self,
        suite: &str,
        packages: &[&str],
        dir: &Path,
    ) -> Result<(), Error> {
        let mut apt = self.command("apt-get");
        apt.args(["--yes", "--no-install-recommends", "--download-only"]);
        output(apt.args(["--target-release", suite, "install"]).args(packages))?;
        let archives = self.configuration.with_file_name(ARCHIVES);
        extract(&archives, dir)?;
        output(self.command("apt-get").arg("clean"))?;
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = command(program);
        // apt reads this file after the configuration of the host. So the proxies of the host apply,
        // and the settings in this file take precedence.
        command.arg("--config-file").arg(&self.configuration).args(["--quiet", "--quiet"]);
        command
    }
}

/// Extracts all packages in a directory.
fn extract(archives: &Path, to: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(archives)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            output(command("dpkg-deb").arg("--extract").arg(path).arg(to))?;
        }
    }
    Ok(())
}

fn configuration(arch: &Arch, dir: &Path) -> String {
    let path = |name: &str| dir.join(name).display().to_string();
    format!(
        r#"Dir::State "{state}";
Dir::State::status "{status}";
Dir::Cache "{cache}";
Dir::Etc::sourcelist "{sources}";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "{architecture}";
#clear APT::Architectures;
#clear APT::Default-Release;
// The hooks of the host would act on the state of the host.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
// As root, apt drops to a user that cannot write here.
APT::Sandbox::User "root";
"#,
        state = path("state"),
        status = path("status"),
        cache = path("cache"),
        sources = path("debian.sources"),
        architecture = arch.debian,
    )
}

/// A stanza of a control file, a package list or a deb822 source: fields and values. A value keeps its
/// continuation lines unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stanza(Vec<(String, String)>);

impl Stanza {
    pub fn get(&self, field: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(field))
            .map(|(_, value)| value.as_str())
    }

    fn words(&self, field: &str) -> Vec<String> {
        self.get(field).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
    }
}

pub fn stanzas(text: &str) -> Vec<Stanza> {
    let mut stanzas = vec![Stanza::default()];
    for line in text.lines() {
        let fields = &mut stanzas.last_mut().expect("the list is never empty").0;
        if line.trim().is_empty() {
            stanzas.push(Stanza::default());
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':').filter(|_| !line.starts_with('#'))
        {
            fields.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
    stanzas.retain(|stanza| !stanza.0.is_empty());
    stanzas
}

/// Returns the packages that a package depends on in exactly its own version.
fn parts(package: &Stanza) -> Vec<String> {
    let Some(version) = package.get("Version") else {
        return Vec::new();
    };
    let exactly = format!("(= {version})");
    let depends = package.get("Depends").unwrap_or_default();
    depends
        .split(',')
        .filter_map(|dependency| Some(dependency.trim().strip_suffix(&exactly)?.trim().to_owned()))
        .filter(|name| !name.contains('|'))
        .collect()
}

/// A source of packages, in either syntax.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    /// A keyring, a fingerprint or a whole key. apt accepts all three.
    signed_by: Option<String>,
}

impl Source {
    /// Returns a deb822 source of the same mirror with other suites.
    fn with_suites(&self, suites: &[&str]) -> String {
        let uri = self.uris.first().map_or("", String::as_str);
        let mut text = format!(
            "Types: deb\nURIs: {uri}\nSuites: {}\nComponents: main\nTargets: Packages\n",
            suites.join(" ")
        );
        let keyring =
            || KEYRINGS.iter().find(|path| Path::new(path).exists()).map(|path| (*path).to_owned());
        if let Some(signed_by) = self.signed_by.clone().or_else(keyring) {
            text += &format!("Signed-By: {signed_by}\n");
        }
        text
    }
}

/// Returns the first source that is Debian itself.
fn debian_mirror(sources: &[Source]) -> Result<&Source, Error> {
    mirror(sources, "").ok_or("the apt sources of this host have no Debian mirror".into())
}

/// Returns the first source that is Debian's security archive.
fn security_mirror(sources: &[Source]) -> Option<&Source> {
    mirror(sources, "-security")
}

fn mirror<'a>(sources: &'a [Source], suffix: &str) -> Option<&'a Source> {
    let is_of_release =
        |suite: &String| suite.strip_suffix(suffix).is_some_and(|name| RELEASES.contains(&name));
    sources.iter().find(|source| {
        !source.uris.is_empty()
            && source.components.iter().any(|component| component == "main")
            && source.suites.iter().any(is_of_release)
    })
}

fn machine_sources() -> Vec<Source> {
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = parts.map(|entry| entry.path()).collect();
    paths.sort();
    paths.insert(0, "/etc/apt/sources.list".into());
    let mut sources = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).unwrap_or_default();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(text.lines().filter_map(one_line_source)),
            Some("sources") => sources.extend(stanzas(&text).iter().filter_map(deb822_source)),
            _ => {}
        }
    }
    sources
}

fn deb822_source(stanza: &Stanza) -> Option<Source> {
    let enabled = stanza.get("Enabled").is_none_or(|value| !matches!(value, "no" | "false" | "0"));
    let binary = stanza.words("Types").iter().any(|kind| kind == "deb");
    (enabled && binary).then(|| Source {
        uris: stanza.words("URIs"),
        suites: stanza.words("Suites"),
        components: stanza.words("Components"),
        signed_by: stanza.get("Signed-By").map(str::to_owned),
    })
}

/// `deb [signed-by=… arch=…] URI SUITE COMPONENT…`
fn one_line_source(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim().strip_prefix("deb")?;
    if !line.starts_with([' ', '\t', '[']) {
        return None;
    }
    let (options, rest) = match line.trim_start().strip_prefix('[') {
        Some(bracketed) => bracketed.split_once(']')?,
        None => ("", line),
    };
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by: signed_by.map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn deb822_text_returns_enabled_sources() {
        let text = "\
# a comment
Types: deb deb-src
URIs: https://security.example/debian-security
Suites: trixie-security
Components: main

Types: deb
URIs: https://mirror.example/debian
Suites: trixie trixie-updates
Components: main non-free
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 key

Types: deb
Enabled: no
URIs: https://disabled.example/debian
Suites: sid
Components: main
";
        let sources: Vec<_> = stanzas(text).iter().filter_map(deb822_source).collect();
        assert_eq!(sources.len(), 2);
        let written = debian_mirror(&sources).unwrap().with_suites(&["a", "b"]);
        let again = deb822_source(&stanzas(&written)[0]).unwrap();
        assert_eq!(again.uris, ["https://mirror.example/debian"]);
        assert_eq!(again.suites, ["a", "b"]);
        let security = security_mirror(&sources).unwrap();
        assert_eq!(security.uris, ["https://security.example/debian-security"]);
        assert_eq!(again.signed_by.unwrap(), "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n key");
    }

    #[test]
    fn one_line_text_returns_enabled_sources() {
        let lines = "deb-src http://a.example/debian sid main\n\
             #deb http://b.example/debian sid main\n\
             deb http://c.example/other stable-other main\n\
             deb [ arch=amd64 signed-by=/keys/d.gpg ] http://d.example/debian bookworm main contrib # why";
        let sources: Vec<_> = lines.lines().filter_map(one_line_source).collect();
        assert_eq!(sources.len(), 2);
        let mirror = debian_mirror(&sources).unwrap();
        assert_eq!(mirror.uris, ["http://d.example/debian"]);
        assert_eq!(security_mirror(&sources), None);
        assert_eq!(mirror.signed_by.as_deref(), Some("/keys/d.gpg"));
    }

    #[test]
    fn parts_returns_packages_of_same_version() {
        let text = "Package: linux-image-7.2\nVersion: 7.2.1-1\n\
             Depends: dracut | initramfs-tools (>= 0.120), linux-binary-7.2 (= 7.2.1-1), \
             linux-modules-7.2 (= 7.2.1-1), other (= 7.2.1)\n\nPackage: next\n";
        assert_eq!(parts(&stanzas(text)[0]), ["linux-binary-7.2", "linux-modules-7.2"]);
    }

    proptest! {
        #[test]
        fn arbitrary_apt_text_never_panics(text: String) {
            for stanza in stanzas(&text) {
                parts(&stanza);
                deb822_source(&stanza);
            }
            one_line_source(&text);
            one_line_source(&format!("deb [{text}"));
        }
    }
}
