//! Debian packages, through a private apt configuration: the machine's own says which mirror to use
//! and whom to trust, and its state is left alone.

use super::say::say;
use crate::programs::{self, command, output};
use crate::{Context, Error};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The releases that have the kernels of [`super::kernels::DEFAULT_SERIES`], and more.
const SUITES: &[&str] = &["bookworm", "trixie", "trixie-backports", "forky"];

/// From the mirror of security updates, if the machine has one: backports have none of their own.
const SECURITY_SUITES: &[&str] = &["bookworm-security", "trixie-security", "forky-security"];

const NOT_TO_FETCH: &str = "SEALMOUNT_VM_KERNELS names no directories with kernels, and Debian's \
    cannot be fetched";

/// Names by which a machine's sources mean Debian itself, as opposed to its security archive or
/// someone else's packages.
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

/// With Debian's own keys of all releases, where the machine's sources do not say whom to trust.
const KEYRINGS: &[&str] = &[
    "/usr/share/keyrings/debian-archive-keyring.pgp",
    "/usr/share/keyrings/debian-archive-keyring.gpg",
];

/// A private configuration with fresh package lists.
#[derive(Debug)]
pub struct Apt {
    configuration: PathBuf,
    /// What it said of package lists that it could not fetch.
    complaint: Option<String>,
}

impl Apt {
    /// Makes the configuration in `dir` and fetches the package lists.
    pub fn update(dir: &Path) -> Result<Apt, Error> {
        programs::check_these(programs::NEEDED_TO_FETCH).context(|| NOT_TO_FETCH.into())?;
        let sources = machine_sources();
        let mirror = debian_mirror(&sources).context(|| NOT_TO_FETCH.into())?;
        let security = security_mirror(&sources);
        let mut text = mirror.with_suites(SUITES);
        if let Some(security) = security {
            text += &format!("\n{}", security.with_suites(SECURITY_SUITES));
        }
        for part in ["state/lists/partial", "cache/archives/partial"] {
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
        let configuration = write("apt.conf", &configuration(dir))?;
        let mut apt = Apt { configuration, complaint: None };
        // A mirror need not have every suite, and what it has may be enough.
        if let Err(error) = output(apt.command("apt-get").arg("update")) {
            say(&format!("not all package lists could be fetched: {error}"));
            apt.complaint = Some(error.to_string());
        }
        Ok(apt)
    }

    /// Why a package may not be there that ought to be.
    pub fn complaint(&self) -> String {
        let complaint = self.complaint.as_ref();
        complaint.map_or(String::new(), |why| format!(", of which not all could be read: {why}"))
    }

    /// The names of all packages that start with `prefix`.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>, Error> {
        let names = output(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(String::from_utf8_lossy(&names).lines().map(str::to_owned).collect())
    }

    /// The newest version of a package, and all that it depends on in exactly its own version: the
    /// parts of what was one package before, as kernels were before Debian's 6.19.
    pub fn with_parts(&self, name: &str) -> Result<Vec<String>, Error> {
        let mut found = vec![name.to_owned()];
        let mut next = 0;
        while let Some(name) = found.get(next) {
            let shown =
                output(self.command("apt-cache").args(["show", "--no-all-versions", name]))?;
            let package = stanzas(&String::from_utf8_lossy(&shown)).into_iter().next();
            let package = package
                .ok_or_else(|| format!("the mirror has {} but not its part {name}", found[0]))?;
            for part in parts(&package) {
                if !found.contains(&part) {
                    found.push(part);
                }
            }
            next += 1;
        }
        Ok(found)
    }

    /// Fetches packages into a directory, checked against the signed package lists, and unpacks them
    /// there.
    pub fn unpack(&self, packages: &[String], dir: &Path) -> Result<(), Error> {
        let archives = dir.join("archives");
        fs::create_dir(&archives).context(|| format!("cannot make {}", archives.display()))?;
        output(self.command("apt-get").arg("download").args(packages).current_dir(&archives))?;
        for entry in fs::read_dir(&archives)? {
            output(command("dpkg-deb").arg("--extract").arg(entry?.path()).arg(dir))?;
        }
        fs::remove_dir_all(&archives)?;
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = command(program);
        // Read after the machine's configuration, which has its proxies, so that ours has the last word.
        command.arg("--config-file").arg(&self.configuration).args(["--quiet", "--quiet"]);
        command
    }
}

fn configuration(dir: &Path) -> String {
    let path = |name: &str| dir.join(name).display().to_string();
    format!(
        r#"Dir::State "{state}";
Dir::State::status "{status}";
Dir::Cache "{cache}";
Dir::Etc::sourcelist "{sources}";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "amd64";
#clear APT::Architectures;
#clear APT::Default-Release;
// The machine's hooks would act on the machine's state.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
// The user that apt drops to when run as root cannot write here.
APT::Sandbox::User "root";
"#,
        state = path("state"),
        status = path("status"),
        cache = path("cache"),
        sources = path("debian.sources"),
    )
}

/// A stanza of a control file, a package list or a deb822 source: fields and values. Lines that
/// continue a value are kept as they are.
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
        let fields = &mut stanzas.last_mut().expect("there is always one").0;
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

/// The packages that a package depends on in exactly its own version.
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

/// Where packages come from, however it was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    /// A keyring, a fingerprint or a whole key: whatever it is, apt understands it.
    signed_by: Option<String>,
}

impl Source {
    /// The same mirror with other suites.
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

/// The first source that is Debian itself.
fn debian_mirror(sources: &[Source]) -> Result<&Source, Error> {
    mirror(sources, "").ok_or("apt's sources name no Debian mirror".into())
}

/// The first source that is Debian's security archive.
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
    fn deb822_sources() {
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
    fn one_line_sources() {
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
    fn parts_are_those_of_the_same_version() {
        let text = "Package: linux-image-7.2\nVersion: 7.2.1-1\n\
             Depends: dracut | initramfs-tools (>= 0.120), linux-binary-7.2 (= 7.2.1-1), \
             linux-modules-7.2 (= 7.2.1-1), other (= 7.2.1)\n\nPackage: next\n";
        assert_eq!(parts(&stanzas(text)[0]), ["linux-binary-7.2", "linux-modules-7.2"]);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(text: String) {
            for stanza in stanzas(&text) {
                parts(&stanza);
                deb822_source(&stanza);
            }
            one_line_source(&text);
            one_line_source(&format!("deb [{text}"));
        }
    }
}
