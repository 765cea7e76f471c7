//! The text of `-o`: options separated by commas, each a name or `name=value`.
//!
//! In a value a backslash takes the next character as it is. That is needed for a comma, in
//! `basedir=` for a colon, and for the backslash itself.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::{
    Atime, Memory, MountAttributes, MountOptions, OptionsError, SizeLimit, SuperblockFlags,
    UpperLayer, Verity,
};
use crate::digest::Digest;
use crate::location::{Location, proc_fd_path};

/// Options that mount(8), fstab(5) and systemd pass or may pass, with no effect on the mount itself:
/// they say who mounts it and when, or are the default, or ask for what the kernel no longer has.
const WITHOUT_EFFECT: &[&str] = &[
    "defaults",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
    "nouser",
    "nousers",
    "noowner",
    "nogroup",
    "silent",
    "loud",
    "iversion",
    "noiversion",
];

const ATTRIBUTES: &[(&str, &str, MountAttributes)] = &[
    ("nosuid", "suid", MountAttributes::NOSUID),
    ("nodev", "dev", MountAttributes::NODEV),
    ("noexec", "exec", MountAttributes::NOEXEC),
    ("nosymfollow", "symfollow", MountAttributes::NOSYMFOLLOW),
    ("nodiratime", "diratime", MountAttributes::NODIRATIME),
];

/// Options that let others than root mount, and what mount(8) lets them imply.
const USER_MOUNTS: &[(&str, MountAttributes)] = &[
    ("user", USER_ATTRIBUTES),
    ("users", USER_ATTRIBUTES),
    ("owner", OWNER_ATTRIBUTES),
    ("group", OWNER_ATTRIBUTES),
];
const OWNER_ATTRIBUTES: MountAttributes = MountAttributes::NOSUID.union(MountAttributes::NODEV);
const USER_ATTRIBUTES: MountAttributes = OWNER_ATTRIBUTES.union(MountAttributes::NOEXEC);

const ATIMES: &[(&str, &str, Atime)] = &[
    ("noatime", "atime", Atime::Noatime),
    ("strictatime", "nostrictatime", Atime::Strictatime),
    ("relatime", "norelatime", Atime::Relatime),
];

const SUPERBLOCK_FLAGS: &[(&str, &str, SuperblockFlags)] = &[
    ("sync", "async", SuperblockFlags::SYNC),
    ("dirsync", "nodirsync", SuperblockFlags::DIRSYNC),
    ("lazytime", "nolazytime", SuperblockFlags::LAZYTIME),
    ("mand", "nomand", SuperblockFlags::MAND),
];

/// What `-o` text said, with the options that were not understood set aside: mount(8)'s `-s`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sloppy {
    /// The options that were understood.
    pub options: MountOptions,
    /// The names of the others.
    pub unknown: Vec<OsString>,
}

impl MountOptions {
    /// Reads the text of `-o`.
    ///
    /// A later option replaces an earlier one of its kind, so that the command line can change what
    /// fstab says; but two different `digest=` are refused.
    ///
    /// # Errors
    ///
    /// An option that is not known, lacks its value or has one that it does not take; `basedir=`
    /// missing; `upperdir=` without `workdir=` or the reverse.
    pub fn parse(text: impl AsRef<OsStr>) -> Result<MountOptions, OptionsError> {
        let (draft, unknown) = Draft::read(text.as_ref())?;
        // What is misspelt is missing too, and that is not what is to be said of it.
        match unknown.into_iter().next() {
            Some(name) => Err(OptionsError::Unknown(name)),
            None => draft.finish(),
        }
    }

    /// As [`parse`](Self::parse), but sets aside options that are not known, as mount(8)'s `-s` asks
    /// for.
    pub fn parse_sloppy(text: impl AsRef<OsStr>) -> Result<Sloppy, OptionsError> {
        let (draft, unknown) = Draft::read(text.as_ref())?;
        Ok(Sloppy { options: draft.finish()?, unknown })
    }

    /// The text that [`parse`](Self::parse) reads as these options, if they are such as can be mounted
    /// with.
    ///
    /// A descriptor becomes its path below /proc/self/fd, of meaning as long as it stays open.
    pub fn to_text(&self) -> OsString {
        let mut text = Text::default();
        text.value("basedir", &self.basedirs.iter().map(location_bytes).collect::<Vec<_>>());
        if let Some(digest) = self.digest {
            text.value("digest", &[digest.to_string().into_bytes()]);
        }
        if let Some(verity) = self.verity {
            text.flag(match verity {
                Verity::Require => "verity",
                Verity::Try => "tryverity",
                Verity::Off => "noverity",
            });
        }
        match self.copy {
            Some(Memory::Memfd) => text.value("copy", &[b"memfd".to_vec()]),
            Some(Memory::Ramfs) => text.value("copy", &[b"ramfs".to_vec()]),
            None => {}
        }
        match self.size {
            Some(SizeLimit::Bytes(bytes)) => text.value("size", &[bytes.to_string().into()]),
            Some(SizeLimit::Percent(percent)) => {
                text.value("size", &[format!("{percent}%").into()])
            }
            None => {}
        }
        if let Some(idmap) = &self.idmap {
            text.value("idmap", &[location_bytes(idmap)]);
        }
        if let Some(upper) = &self.upper {
            text.value("upperdir", &[location_bytes(&upper.upperdir)]);
            text.value("workdir", &[location_bytes(&upper.workdir)]);
        }
        if self.read_only {
            text.flag("ro");
        }
        for (name, _, attribute) in ATTRIBUTES {
            if self.attributes.contains(*attribute) {
                text.flag(name);
            }
        }
        for (name, _, atime) in ATIMES {
            if self.atime == *atime && *atime != Atime::default() {
                text.flag(name);
            }
        }
        for (name, _, flag) in SUPERBLOCK_FLAGS {
            if self.superblock_flags.contains(*flag) {
                text.flag(name);
            }
        }
        for (name, context) in self.selinux_contexts.iter() {
            text.value(name, &[context.as_bytes().to_vec()]);
        }
        OsString::from_vec(text.bytes)
    }
}

/// One option. The value is still escaped.
struct Token<'a> {
    name: &'a [u8],
    value: Option<&'a [u8]>,
}

/// The options of a text in order; empty ones (`a,,b`) are passed over, as mount(8) does.
fn tokens(text: &[u8]) -> Result<Vec<Token<'_>>, OptionsError> {
    if text.contains(&0) {
        return Err(OptionsError::Nul);
    }
    let tokens = split_unescaped(text, b',')?;
    Ok(tokens.into_iter().filter(|token| !token.is_empty()).map(Token::new).collect())
}

/// Splits at each `separator` that no backslash stands before.
fn split_unescaped(text: &[u8], separator: u8) -> Result<Vec<&[u8]>, OptionsError> {
    let mut parts = Vec::new();
    let mut start = 0;
    let mut bytes = text.iter().enumerate();
    while let Some((position, byte)) = bytes.next() {
        if *byte == b'\\' {
            bytes.next().ok_or(OptionsError::TrailingBackslash)?;
        } else if *byte == separator {
            parts.push(&text[start..position]);
            start = position + 1;
        }
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn unescape(escaped: &[u8]) -> Vec<u8> {
    let mut bytes = escaped.iter();
    let mut plain = Vec::with_capacity(escaped.len());
    while let Some(byte) = bytes.next() {
        plain.extend(if *byte == b'\\' { bytes.next() } else { Some(byte) });
    }
    plain
}

impl<'a> Token<'a> {
    fn new(token: &'a [u8]) -> Token<'a> {
        match token.iter().position(|byte| *byte == b'=') {
            Some(equals) => Token { name: &token[..equals], value: Some(&token[equals + 1..]) },
            None => Token { name: token, value: None },
        }
    }

    fn is(&self, name: &str) -> bool {
        self.name == name.as_bytes()
    }

    /// For an option that takes no value.
    fn flag(&self, option: &'static str) -> Result<(), OptionsError> {
        match self.value {
            None => Ok(()),
            Some(_) => Err(OptionsError::TakesNoValue(option)),
        }
    }

    /// For an option that takes one.
    fn value(&self, option: &'static str) -> Result<OsString, OptionsError> {
        match self.value {
            None | Some(b"") => Err(OptionsError::NeedsValue(option)),
            Some(value) => Ok(OsString::from_vec(unescape(value))),
        }
    }

    fn location(&self, option: &'static str) -> Result<Location, OptionsError> {
        Ok(Location::Path(PathBuf::from(self.value(option)?)))
    }
}

/// Options while they are read: what belongs together may not be there yet.
struct Draft {
    options: MountOptions,
    upperdir: Option<Location>,
    workdir: Option<Location>,
}

impl Draft {
    fn new() -> Draft {
        Draft { options: MountOptions::without_basedir(), upperdir: None, workdir: None }
    }

    /// Reads text; gives the names of options that are not known besides.
    fn read(text: &OsStr) -> Result<(Draft, Vec<OsString>), OptionsError> {
        let mut draft = Draft::new();
        let mut unknown = Vec::new();
        for token in tokens(text.as_bytes())? {
            if !draft.apply(&token)? {
                unknown.push(OsStr::from_bytes(token.name).to_owned());
            }
        }
        Ok((draft, unknown))
    }

    /// Takes one option in; says whether it is known.
    fn apply(&mut self, token: &Token) -> Result<bool, OptionsError> {
        let options = &mut self.options;
        match token.name {
            b"basedir" => options.basedirs = basedirs(token)?,
            b"digest" => {
                let digest = digest(token)?;
                if let Some(earlier) = options.digest
                    && earlier != digest
                {
                    return Err(OptionsError::TwoDigests);
                }
                options.digest = Some(digest);
            }
            b"verity" => {
                token.flag("verity")?;
                options.verity = Some(Verity::Require);
            }
            b"tryverity" => {
                token.flag("tryverity")?;
                options.verity = Some(Verity::Try);
            }
            b"noverity" => {
                token.flag("noverity")?;
                options.verity = Some(Verity::Off);
            }
            b"copy" => options.copy = Some(memory(token)?),
            b"size" => options.size = Some(size_limit(token)?),
            b"idmap" => options.idmap = Some(token.location("idmap")?),
            b"upperdir" => self.upperdir = Some(token.location("upperdir")?),
            b"workdir" => self.workdir = Some(token.location("workdir")?),
            b"ro" => {
                token.flag("ro")?;
                options.read_only = true;
            }
            b"rw" => {
                token.flag("rw")?;
                options.read_only = false;
            }
            b"comment" => drop(token.value("comment")?),
            name if name.starts_with(b"x-") || name.starts_with(b"X-") => {}
            _ => return self.apply_from_tables(token),
        }
        Ok(true)
    }

    /// The options of which there are many of a kind.
    fn apply_from_tables(&mut self, token: &Token) -> Result<bool, OptionsError> {
        let options = &mut self.options;
        for (set, clear, attribute) in ATTRIBUTES {
            if let Some(on) = switch(token, set, clear)? {
                options.attributes.set(*attribute, on);
                return Ok(true);
            }
        }
        for (name, attributes) in USER_MOUNTS {
            if token.is(name) {
                token.flag(name)?;
                options.attributes.insert(*attributes);
                return Ok(true);
            }
        }
        for (set, clear, atime) in ATIMES {
            match switch(token, set, clear)? {
                Some(true) => options.atime = *atime,
                // Taking back what is not in force changes nothing.
                Some(false) if options.atime == *atime => options.atime = Atime::default(),
                Some(false) => {}
                None => continue,
            }
            return Ok(true);
        }
        for (set, clear, flag) in SUPERBLOCK_FLAGS {
            if let Some(on) = switch(token, set, clear)? {
                options.superblock_flags.set(*flag, on);
                return Ok(true);
            }
        }
        if let Some((name, context)) = options.selinux_contexts.get_mut(token.name) {
            *context = Some(token.value(name)?);
            return Ok(true);
        }
        for name in WITHOUT_EFFECT {
            if token.is(name) {
                token.flag(name)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn finish(self) -> Result<MountOptions, OptionsError> {
        let mut options = self.options;
        options.check()?;
        options.upper = match (self.upperdir, self.workdir) {
            (Some(upperdir), Some(workdir)) => Some(UpperLayer { upperdir, workdir }),
            (Some(_), None) => return Err(OptionsError::UpperWithoutWork),
            (None, Some(_)) => return Err(OptionsError::WorkWithoutUpper),
            (None, None) => None,
        };
        Ok(options)
    }
}

/// `Some(true)` for the option `set`, `Some(false)` for its opposite `clear`.
fn switch(
    token: &Token,
    set: &'static str,
    clear: &'static str,
) -> Result<Option<bool>, OptionsError> {
    for (name, on) in [(set, true), (clear, false)] {
        if token.is(name) {
            token.flag(name)?;
            return Ok(Some(on));
        }
    }
    Ok(None)
}

fn basedirs(token: &Token) -> Result<Vec<Location>, OptionsError> {
    let paths = split_unescaped(token.value.unwrap_or_default(), b':')?;
    if paths.iter().any(|path| path.is_empty()) {
        return Err(OptionsError::NeedsValue("basedir"));
    }
    let location = |path: &&[u8]| Location::Path(OsString::from_vec(unescape(path)).into());
    Ok(paths.iter().map(location).collect())
}

fn digest(token: &Token) -> Result<Digest, OptionsError> {
    // What is not UTF-8 is no digest either; the replacement character tells where.
    Ok(token.value("digest")?.to_string_lossy().parse()?)
}

fn memory(token: &Token) -> Result<Memory, OptionsError> {
    if token.value.is_none() {
        return Ok(Memory::Memfd);
    }
    let value = token.value("copy")?;
    match value.as_bytes() {
        b"memfd" => Ok(Memory::Memfd),
        b"ramfs" => Ok(Memory::Ramfs),
        _ => Err(OptionsError::BadValue { option: "copy", value, expected: "memfd or ramfs" }),
    }
}

/// A number of bytes, with k, m, g, t, p or e for powers of 1024, or of percent: as tmpfs has it.
fn size_limit(token: &Token) -> Result<SizeLimit, OptionsError> {
    let value = token.value("size")?;
    let limit = value.to_str().and_then(|text| {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit {
            "%" => return number.parse().ok().map(SizeLimit::Percent),
            "" => 0,
            "k" | "K" => 10,
            "m" | "M" => 20,
            "g" | "G" => 30,
            "t" | "T" => 40,
            "p" | "P" => 50,
            "e" | "E" => 60,
            _ => return None,
        };
        number.parse::<u64>().ok()?.checked_mul(1 << shift).map(SizeLimit::Bytes)
    });
    let expected = "bytes, a number with k, m, g, t, p or e, or percent";
    limit.ok_or(OptionsError::BadValue { option: "size", value, expected })
}

fn location_bytes(location: &Location) -> Vec<u8> {
    let path = match location {
        Location::Path(path) => path.clone(),
        Location::Fd(fd) => proc_fd_path(fd),
    };
    path.into_os_string().into_vec()
}

/// Options as text, while it is written.
#[derive(Default)]
struct Text {
    bytes: Vec<u8>,
}

impl Text {
    fn flag(&mut self, name: &str) {
        if !self.bytes.is_empty() {
            self.bytes.push(b',');
        }
        self.bytes.extend(name.as_bytes());
    }

    /// One value, or several separated by colons.
    fn value(&mut self, name: &str, values: &[Vec<u8>]) {
        self.flag(name);
        for (index, value) in values.iter().enumerate() {
            self.bytes.push(if index == 0 { b'=' } else { b':' });
            for byte in value {
                if matches!(byte, b'\\' | b',' | b':') {
                    self.bytes.push(b'\\');
                }
                self.bytes.push(*byte);
            }
        }
    }
}

#[cfg(test)]
mod tests;
