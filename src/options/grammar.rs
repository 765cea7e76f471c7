//! The text of `-o`: options separated by commas, each a name or `name=value`.
//!
//! In a value, a backslash makes the next character literal. A comma and a backslash need a backslash before
//! them. In `basedir=`, a colon in a path needs a backslash too.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::digest::Digest;
use crate::location::{Location, proc_fd_path};
use crate::objects::ObjectCheck;
use crate::options::{MountFlags, MountOptions, OptionsError};
use crate::overlay::{Atime, MountAttributes, SuperblockFlags, UpperLayer, Verity};
use crate::source::{MemoryKind, SizeLimit};

/// Options of mount(8), fstab(5) and systemd without an effect on the mount itself. They restrict the users
/// that may mount or the time of the mount, are the default, or request features that the kernel no longer
/// has.
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

/// A flag of a structure.
type Flag<Flags> = fn(&mut Flags) -> &mut bool;

const ATTRIBUTES: &[(&str, &str, Flag<MountAttributes>)] = &[
    ("nosuid", "suid", |attributes| &mut attributes.nosuid),
    ("nodev", "dev", |attributes| &mut attributes.nodev),
    ("noexec", "exec", |attributes| &mut attributes.noexec),
    ("nosymfollow", "symfollow", |attributes| &mut attributes.nosymfollow),
    ("nodiratime", "diratime", |attributes| &mut attributes.nodiratime),
];

/// Options that allow other users than root to mount, and the options that mount(8) implies by them:
/// nosuid and nodev, and whether noexec too.
const USER_MOUNTS: &[(&str, bool)] =
    &[("user", true), ("users", true), ("owner", false), ("group", false)];

const ATIMES: &[(&str, &str, Atime)] = &[
    ("noatime", "atime", Atime::Noatime),
    ("strictatime", "nostrictatime", Atime::Strictatime),
    ("relatime", "norelatime", Atime::Relatime),
];

const SUPERBLOCK_FLAGS: &[(&str, &str, Flag<SuperblockFlags>)] = &[
    ("sync", "async", |flags| &mut flags.sync),
    ("dirsync", "nodirsync", |flags| &mut flags.dirsync),
    ("lazytime", "nolazytime", |flags| &mut flags.lazytime),
    ("mand", "nomand", |flags| &mut flags.mand),
];

/// The options of a text, and the names of unknown options in it: for `-s` of mount(8).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sloppy {
    /// The known options.
    pub options: MountOptions,
    /// The names of the unknown options.
    pub unknown: Vec<OsString>,
}

impl MountOptions {
    /// Parses the text of `-o`.
    ///
    /// A later option replaces an earlier one of its kind, so that the command line can override fstab.
    /// Two different `digest=` are rejected.
    ///
    /// `tryverity` beside `digest=` means `verity`, as in other tools. `verity=try` is explicit: the image
    /// must have the digest, and the objects are verified if the system supports it.
    ///
    /// # Errors
    ///
    /// [`OptionsError`]: an option is unknown, lacks its value or has a wrong one; `basedir=` is missing;
    /// `upperdir=` is given without `workdir=`, or the reverse.
    pub fn parse(text: impl AsRef<OsStr>) -> Result<MountOptions, OptionsError> {
        let (draft, unknown) = Draft::read(text.as_ref())?;
        // If an option is misspelt, it may also count as missing. The unknown option is the better message.
        match unknown.into_iter().next() {
            Some(name) => Err(OptionsError::Unknown(name)),
            None => draft.finish(),
        }
    }

    /// Parses the text of `-o` as [`parse`](Self::parse) does, and tolerates unknown options, for `-s` of
    /// mount(8).
    ///
    /// # Errors
    ///
    /// As [`parse`](Self::parse).
    pub fn parse_sloppy(text: impl AsRef<OsStr>) -> Result<Sloppy, OptionsError> {
        let (draft, unknown) = Draft::read(text.as_ref())?;
        Ok(Sloppy { options: draft.finish()?, unknown })
    }

    /// Returns a text that [`parse`](Self::parse) reads as these options.
    ///
    /// A descriptor becomes its path below /proc/self/fd, which is valid while the descriptor is open.
    pub fn to_text(&self) -> OsString {
        let mut text = Text::default();
        text.value("basedir", &self.overlay.objects.iter().map(location_bytes).collect::<Vec<_>>());
        if let Some(digest) = self.digest {
            text.value("digest", &[digest.to_string().into_bytes()]);
        }
        match self.overlay.verity {
            Some(Verity::Require) => text.flag("verity"),
            Some(Verity::Try) => text.value("verity", &[b"try".to_vec()]),
            Some(Verity::Off) => text.flag("noverity"),
            None => {}
        }
        if let Some(check) = self.overlay.check {
            text.value("check", &[check.name().into()]);
        }
        match self.copy {
            Some(MemoryKind::Memfd) => text.value("copy", &[b"memfd".to_vec()]),
            Some(MemoryKind::Ramfs) => text.value("copy", &[b"ramfs".to_vec()]),
            None => {}
        }
        if let Some(size) = self.size {
            text.value("size", &[size.to_string().into()]);
        }
        if let Some(idmap) = &self.idmap {
            text.value("idmap", &[location_bytes(idmap)]);
        }
        if let Some(upper) = &self.overlay.upper {
            text.value("upperdir", &[location_bytes(&upper.upperdir)]);
            text.value("workdir", &[location_bytes(&upper.workdir)]);
        }
        if self.overlay.read_only {
            text.flag("ro");
        }
        let mut overlay = self.overlay.clone();
        for (name, _, attribute) in ATTRIBUTES {
            if *attribute(&mut overlay.attributes) {
                text.flag(name);
            }
        }
        for (name, _, atime) in ATIMES {
            if self.overlay.atime == *atime && *atime != Atime::default() {
                text.flag(name);
            }
        }
        for (name, _, flag) in SUPERBLOCK_FLAGS {
            if *flag(&mut overlay.superblock_flags) {
                text.flag(name);
            }
        }
        for (name, context) in self.overlay.selinux_contexts.iter() {
            text.value(name, &[context.as_bytes().to_vec()]);
        }
        OsString::from_vec(text.bytes)
    }
}

/// The options of a remount: new flags of the mount, and options that the mount must already have.
///
/// A remount replaces the flags, as
/// [mount(2)](https://man7.org/linux/man-pages/man2/mount.2.html) does. A flag that the text does not name is
/// cleared, because mount(8) passes the option `suid` by leaving out `nosuid`. There are three
/// exceptions:
///
/// - Without an option for access times, these flags stay the same.
/// - `dirsync` stays the same, because the kernel cannot change `dirsync`.
/// - Without an upper layer, the mount stays read-only.
///
/// All other options describe the mount. [`AttachedMount::compare`](crate::AttachedMount::compare) rejects
/// an option that the mount does not have. `tryverity` and `check=` are accepted for each mount. A remount
/// checks no objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemountOptions {
    pub(crate) flags: MountFlags,
    /// `false`: the flags for access times stay the same.
    pub(crate) names_atime: bool,
    /// `false`: `dirsync` stays the same.
    pub(crate) names_dirsync: bool,
    /// The named options for image, copy and overlay, except the upper layer.
    pub(crate) expected: MountOptions,
    pub(crate) upperdir: Option<PathBuf>,
    pub(crate) workdir: Option<PathBuf>,
    /// Options that are unknown here, which mount(8) may have read from the mount table.
    pub(crate) others: Vec<(OsString, Option<OsString>)>,
}

impl RemountOptions {
    /// Returns whether the text of `-o` requests a remount.
    ///
    /// # Errors
    ///
    /// [`OptionsError`]: a backslash at the end, a NUL byte, or a value of `remount`.
    pub fn is_requested(text: impl AsRef<OsStr>) -> Result<bool, OptionsError> {
        let text = text.as_ref().as_bytes();
        let mut remounts = tokens(text)?.into_iter().filter(|token| token.is(REMOUNT)).peekable();
        let is_requested = remounts.peek().is_some();
        remounts.try_for_each(|token| token.flag(REMOUNT))?;
        Ok(is_requested)
    }

    /// Returns the check of `check=`, if the text names a check. A remount checks no objects.
    pub fn check(&self) -> Option<ObjectCheck> {
        self.expected.overlay.check
    }

    /// Parses the text of `-o`, in which `remount` may be left out.
    ///
    /// # Errors
    ///
    /// [`OptionsError`]: an option has no value or a wrong value. An unknown option is not an error, because
    /// the mount may have the option.
    pub fn parse(text: impl AsRef<OsStr>) -> Result<RemountOptions, OptionsError> {
        let mut options = RemountOptions::default();
        let mut draft = Draft::default();
        for token in tokens(text.as_ref().as_bytes())? {
            if token.is(REMOUNT) {
                token.flag(REMOUNT)?;
            } else if !draft.apply(&token)? {
                let value = token.value.map(|value| OsString::from_vec(unescape(value)));
                options.others.push((OsString::from_vec(token.name.to_owned()), value));
            }
            let is_either = |(set, clear): (&str, &str)| token.is(set) || token.is(clear);
            let atimes = ATIMES.iter().map(|(set, clear, _)| (*set, *clear));
            options.names_atime |= atimes.chain([("nodiratime", "diratime")]).any(is_either);
            options.names_dirsync |= is_either(("dirsync", "nodirsync"));
        }
        let path = |location| match location {
            Some(Location::Path(path)) => Some(path),
            _ => None,
        };
        (options.upperdir, options.workdir) = (path(draft.upperdir), path(draft.workdir));
        options.expected = draft.options;
        if draft.tryverity && options.expected.digest.is_some() {
            options.expected.overlay.verity = Some(Verity::Require);
        }
        options.flags = MountFlags::of(&options.expected);
        Ok(options)
    }
}

const REMOUNT: &str = "remount";

impl MountFlags {
    /// Returns the flags of a new mount.
    pub(crate) fn of(options: &MountOptions) -> MountFlags {
        let overlay = &options.overlay;
        MountFlags {
            read_only: overlay.read_only,
            attributes: overlay.attributes,
            atime: overlay.atime,
            superblock_flags: overlay.superblock_flags,
        }
    }

    /// Returns the flags that the kernel shows with these words.
    pub(crate) fn shown_as<'a>(words: impl Iterator<Item = &'a OsStr> + Clone) -> MountFlags {
        let mut draft = Draft::default();
        for word in words.clone() {
            // The word is a flag or another option. A flag without a value cannot fail.
            let _ = draft.apply_from_tables(&Token { name: word.as_bytes(), value: None });
        }
        let mut flags = MountFlags::of(&draft.options);
        flags.read_only = words.clone().any(|word| word == "ro");
        // The kernel shows no word for strictatime.
        if !words.clone().any(|word| word == "relatime" || word == "noatime") {
            flags.atime = Atime::Strictatime;
        }
        flags
    }

    /// Returns the words of the flags that are set.
    fn words(mut self) -> Vec<&'static str> {
        let mut words = Vec::new();
        for (name, _, attribute) in ATTRIBUTES {
            if *attribute(&mut self.attributes) {
                words.push(*name);
            }
        }
        words.extend(ATIMES.iter().filter(|(_, _, atime)| *atime == self.atime).map(|row| row.0));
        for (name, _, flag) in SUPERBLOCK_FLAGS {
            if *flag(&mut self.superblock_flags) {
                words.push(*name);
            }
        }
        words
    }
}

impl fmt::Display for MountFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.read_only { "ro" } else { "rw" })?;
        self.words().iter().try_for_each(|word| write!(f, ",{word}"))
    }
}

/// One option. The value is still escaped.
struct Token<'a> {
    name: &'a [u8],
    value: Option<&'a [u8]>,
}

/// Returns the options of a text, in order. Empty options (`a,,b`) are ignored, as by mount(8).
fn tokens(text: &[u8]) -> Result<Vec<Token<'_>>, OptionsError> {
    if text.contains(&0) {
        return Err(OptionsError::Nul);
    }
    let tokens = split_unescaped(text, b',')?;
    Ok(tokens.into_iter().filter(|token| !token.is_empty()).map(Token::new).collect())
}

/// Splits at each `separator` without a backslash before it.
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

    /// Checks that the option has no value.
    fn flag(&self, option: &'static str) -> Result<(), OptionsError> {
        match self.value {
            None => Ok(()),
            Some(_) => Err(OptionsError::TakesNoValue(option)),
        }
    }

    /// Returns the value, which the option must have.
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

/// Options that are not complete yet.
#[derive(Default)]
struct Draft {
    options: MountOptions,
    upperdir: Option<Location>,
    workdir: Option<Location>,
    /// `tryverity`: means `verity` if there is a digest.
    tryverity: bool,
}

impl Draft {
    /// Reads a text. Also returns the names of unknown options.
    fn read(text: &OsStr) -> Result<(Draft, Vec<OsString>), OptionsError> {
        let mut draft = Draft::default();
        let mut unknown = Vec::new();
        for token in tokens(text.as_bytes())? {
            if !draft.apply(&token)? {
                unknown.push(OsStr::from_bytes(token.name).to_owned());
            }
        }
        Ok((draft, unknown))
    }

    /// Applies one option. Returns whether the option is known.
    fn apply(&mut self, token: &Token) -> Result<bool, OptionsError> {
        let options = &mut self.options;
        match token.name {
            b"basedir" => options.overlay.objects = basedirs(token)?,
            b"digest" => {
                let digest = digest(token)?;
                if let Some(earlier) = options.digest
                    && earlier != digest
                {
                    return Err(OptionsError::TwoDigests);
                }
                options.digest = Some(digest);
            }
            b"verity" => (options.overlay.verity, self.tryverity) = (Some(verity(token)?), false),
            b"tryverity" => {
                token.flag("tryverity")?;
                (options.overlay.verity, self.tryverity) = (Some(Verity::Try), true);
            }
            b"noverity" => {
                token.flag("noverity")?;
                (options.overlay.verity, self.tryverity) = (Some(Verity::Off), false);
            }
            b"check" => options.overlay.check = Some(check(token)?),
            b"copy" => options.copy = Some(memory(token)?),
            b"size" => options.size = Some(size_limit(token)?),
            b"idmap" => options.idmap = Some(token.location("idmap")?),
            b"upperdir" => self.upperdir = Some(token.location("upperdir")?),
            b"workdir" => self.workdir = Some(token.location("workdir")?),
            b"ro" => {
                token.flag("ro")?;
                options.overlay.read_only = true;
            }
            b"rw" => {
                token.flag("rw")?;
                options.overlay.read_only = false;
            }
            b"comment" => drop(token.value("comment")?),
            name if name.starts_with(b"x-") || name.starts_with(b"X-") => {}
            _ => return self.apply_from_tables(token),
        }
        Ok(true)
    }

    /// Applies an option from the tables.
    fn apply_from_tables(&mut self, token: &Token) -> Result<bool, OptionsError> {
        let options = &mut self.options.overlay;
        for (set, clear, attribute) in ATTRIBUTES {
            if let Some(on) = switch(token, set, clear)? {
                *attribute(&mut options.attributes) = on;
                return Ok(true);
            }
        }
        for (name, noexec) in USER_MOUNTS {
            if token.is(name) {
                token.flag(name)?;
                (options.attributes.nosuid, options.attributes.nodev) = (true, true);
                options.attributes.noexec |= noexec;
                return Ok(true);
            }
        }
        for (set, clear, atime) in ATIMES {
            match switch(token, set, clear)? {
                Some(true) => options.atime = *atime,
                // The opposite of an option that is not set has no effect.
                Some(false) if options.atime == *atime => options.atime = Atime::default(),
                Some(false) => {}
                None => continue,
            }
            return Ok(true);
        }
        for (set, clear, flag) in SUPERBLOCK_FLAGS {
            if let Some(on) = switch(token, set, clear)? {
                *flag(&mut options.superblock_flags) = on;
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
        if self.tryverity && options.digest.is_some() {
            options.overlay.verity = Some(Verity::Require);
        }
        options.overlay.upper = match (self.upperdir, self.workdir) {
            (Some(upperdir), Some(workdir)) => Some(UpperLayer::new(upperdir, workdir)),
            (Some(_), None) => return Err(OptionsError::UpperdirWithoutWorkdir),
            (None, Some(_)) => return Err(OptionsError::WorkdirWithoutUpperdir),
            (None, None) => None,
        };
        Ok(options)
    }
}

/// Returns `Some(true)` for the option `set`, and `Some(false)` for its opposite `clear`.
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
    // Text that is not UTF-8 is not a digest either. The replacement character shows the place.
    Ok(token.value("digest")?.to_string_lossy().parse()?)
}

fn memory(token: &Token) -> Result<MemoryKind, OptionsError> {
    if token.value.is_none() {
        return Ok(MemoryKind::Memfd);
    }
    let value = token.value("copy")?;
    match value.as_bytes() {
        b"memfd" => Ok(MemoryKind::Memfd),
        b"ramfs" => Ok(MemoryKind::Ramfs),
        _ => Err(OptionsError::BadValue { option: "copy", value, expected: "memfd or ramfs" }),
    }
}

fn check(token: &Token) -> Result<ObjectCheck, OptionsError> {
    let value = token.value("check")?;
    let checks = [ObjectCheck::Off, ObjectCheck::Sample, ObjectCheck::All, ObjectCheck::Content];
    let found = checks.into_iter().find(|check| check.name().as_bytes() == value.as_bytes());
    let expected = "none, sample, all or content";
    found.ok_or(OptionsError::BadValue { option: "check", value, expected })
}

/// Parses the value of `verity`, which may be left out.
fn verity(token: &Token) -> Result<Verity, OptionsError> {
    if token.value.is_none() {
        return Ok(Verity::Require);
    }
    let value = token.value("verity")?;
    match value.as_bytes() {
        b"require" => Ok(Verity::Require),
        b"try" => Ok(Verity::Try),
        b"off" => Ok(Verity::Off),
        _ => {
            let expected = "require, try or off";
            Err(OptionsError::BadValue { option: "verity", value, expected })
        }
    }
}

/// Parses a number of bytes, with k, m, g, t, p or e for powers of 1024, or a percentage, as tmpfs does.
fn size_limit(token: &Token) -> Result<SizeLimit, OptionsError> {
    let value = token.value("size")?;
    let expected = SizeLimit::EXPECTED;
    SizeLimit::from_text(value.as_bytes()).ok_or(OptionsError::BadValue {
        option: "size",
        value,
        expected,
    })
}

fn location_bytes(location: &Location) -> Vec<u8> {
    let path = match location {
        Location::Path(path) => path.clone(),
        Location::Fd(fd) => proc_fd_path(fd),
    };
    path.into_os_string().into_vec()
}

/// A text of options that is being written.
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

    /// Writes one value, or several separated by colons.
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
