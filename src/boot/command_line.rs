//! The words of the kernel command line that describe the root file system: pure, from text to types.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::boot::words::{Word, words};
use crate::digest::{Digest, ParseDigestError};
use crate::kernel::{ErrorKind, Hint};
use crate::objects::ObjectCheck;
use crate::overlay::Verity;
use crate::source::{MemoryKind, SizeLimit};
use crate::util::text::shown;

/// The words of the kernel command line that describe the root file system.
///
/// | word | meaning |
/// |---|---|
/// | `composefs=HEX` | a digest that the image may have |
/// | `composefs.digest=vN-HASH-12:HEX` | the same, with the format of the image and the algorithm |
/// | `?` before the value | the objects are verified only if the system supports it |
/// | `sealmount.image=PATH` | the image, in the initramfs |
/// | `sealmount.objects=PATH` | the object directory, on the disk |
/// | `sealmount.copy=memfd`, `ramfs`, `off` | the copy of the image |
/// | `sealmount.size=LIMIT` | the maximum size of the copy, as the mount option `size=` |
/// | `sealmount.check=sample`, `all`, `content`, `none` | the check of the objects |
///
/// Other tools write the words that start with `composefs`. The first image that is found decides, in the
/// order of the words.
///
/// ```
/// use sealmount::boot::CommandLine;
///
/// let text = "quiet composefs=?3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95";
/// let command_line = CommandLine::parse(text)?;
/// assert_eq!(command_line.images.len(), 1);
/// # Ok::<(), sealmount::boot::CommandLineError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommandLine {
    /// `composefs=` and `composefs.digest=`: the images, in the order of the words. At least one.
    pub images: Vec<ExpectedImage>,
    /// `sealmount.image=`: the path of the image.
    pub image: Option<PathBuf>,
    /// `sealmount.objects=`: the path of the object directory on the disk.
    pub objects: Option<PathBuf>,
    /// `sealmount.copy=`: the copy of the image. `None` means that the place of the image decides.
    pub copy: Option<CopyChoice>,
    /// `sealmount.size=`: the maximum size of the copy.
    pub size: Option<SizeLimit>,
    /// `sealmount.check=`: the check of the objects.
    pub check: Option<ObjectCheck>,
}

/// An image that the kernel command line accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExpectedImage {
    /// The fs-verity digest of the image.
    pub digest: Digest,
    /// The verification of the objects: [`Verity::Require`], or [`Verity::Try`] with `?` before the value.
    pub verity: Verity,
}

/// The value of `sealmount.copy=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CopyChoice {
    /// No copy: the kernel's fs-verity verifies the file of the image.
    Off,
    /// A copy in this kind of memory.
    Memory(MemoryKind),
}

impl CommandLine {
    /// Parses a kernel command line, as in /proc/cmdline
    /// ([proc_cmdline(5)](https://man7.org/linux/man-pages/man5/proc_cmdline.5.html)). Words of other programs
    /// are ignored.
    ///
    /// # Errors
    ///
    /// [`CommandLineError`]: no word names an image; a word has a value that is not understood, or is given
    /// twice with different values; a word that starts with `sealmount.` is unknown.
    pub fn parse(text: impl AsRef<OsStr>) -> Result<CommandLine, CommandLineError> {
        let mut found = CommandLine::default();
        for Word { name, value } in words(text.as_ref().as_bytes()) {
            let value = || value.filter(|value| !value.is_empty());
            match name {
                b"composefs" => {
                    let value = value().ok_or(CommandLineError::NeedsValue("composefs"))?;
                    found.images.push(image(value, Ok)?);
                }
                b"composefs.digest" => {
                    let value = value().ok_or(CommandLineError::NeedsValue("composefs.digest"))?;
                    found.images.push(image(value, without_format)?);
                }
                _ => {
                    if let Some(name) = name.strip_prefix(b"sealmount.") {
                        found.set(name, value())?;
                    }
                }
            }
        }
        if found.images.is_empty() {
            return Err(CommandLineError::NoImage);
        }
        Ok(found)
    }

    /// Sets the option of a word `sealmount.NAME`.
    fn set(&mut self, name: &[u8], value: Option<&[u8]>) -> Result<(), CommandLineError> {
        let path = |value: &[u8]| Some(PathBuf::from(OsStr::from_bytes(value)));
        match name {
            b"image" => set_once("sealmount.image", &mut self.image, value, "a path", path),
            b"objects" => set_once("sealmount.objects", &mut self.objects, value, "a path", path),
            b"copy" => {
                let expected = "memfd, ramfs or off";
                set_once("sealmount.copy", &mut self.copy, value, expected, |value| match value {
                    b"memfd" => Some(CopyChoice::Memory(MemoryKind::Memfd)),
                    b"ramfs" => Some(CopyChoice::Memory(MemoryKind::Ramfs)),
                    b"off" => Some(CopyChoice::Off),
                    _ => None,
                })
            }
            b"size" => set_once(
                "sealmount.size",
                &mut self.size,
                value,
                SizeLimit::EXPECTED,
                SizeLimit::from_text,
            ),
            b"check" => {
                let checks =
                    [ObjectCheck::Sample, ObjectCheck::All, ObjectCheck::Content, ObjectCheck::Off];
                let expected = "sample, all, content or none";
                set_once("sealmount.check", &mut self.check, value, expected, |value| {
                    checks.into_iter().find(|check| check.name().as_bytes() == value)
                })
            }
            _ => {
                let word = [b"sealmount.", name].concat();
                Err(CommandLineError::Unknown(OsString::from_vec(word)))
            }
        }
    }
}

/// Sets an option that may be given twice only with the same value.
fn set_once<T: PartialEq>(
    word: &'static str,
    option: &mut Option<T>,
    value: Option<&[u8]>,
    expected: &'static str,
    parse: impl FnOnce(&[u8]) -> Option<T>,
) -> Result<(), CommandLineError> {
    let value = value.ok_or(CommandLineError::NeedsValue(word))?;
    let parsed = parse(value).ok_or_else(|| CommandLineError::BadValue {
        word,
        value: OsStr::from_bytes(value).to_owned(),
        expected,
    })?;
    match option {
        Some(other) if *other != parsed => Err(CommandLineError::Twice(word)),
        _ => {
            *option = Some(parsed);
            Ok(())
        }
    }
}

/// Parses the value of a word that names an image: an optional `?`, and text with a digest.
fn image<'a>(
    value: &'a [u8],
    digest_in: impl FnOnce(&'a [u8]) -> Result<&'a [u8], CommandLineError>,
) -> Result<ExpectedImage, CommandLineError> {
    let (text, verity) = match value.strip_prefix(b"?") {
        Some(text) => (text, Verity::Try),
        None => (value, Verity::Require),
    };
    let digest = String::from_utf8_lossy(digest_in(text)?).parse()?;
    Ok(ExpectedImage { digest, verity })
}

/// Returns the digest of `vN-HASH-12:HEX`. The block size of fs-verity must be 4096 bytes.
fn without_format(value: &[u8]) -> Result<&[u8], CommandLineError> {
    let bad_value = || CommandLineError::BadValue {
        word: "composefs.digest",
        value: OsStr::from_bytes(value).to_owned(),
        expected: "v1 or v2, -sha256-12: or -sha512-12:, and the digest",
    };
    let colon = value.iter().position(|byte| *byte == b':').ok_or_else(bad_value)?;
    let (format, digest) = (&value[..colon], &value[colon + 1..]);
    let digits = match format {
        b"v1-sha256-12" | b"v2-sha256-12" => 64,
        b"v1-sha512-12" | b"v2-sha512-12" => 128,
        _ => return Err(bad_value()),
    };
    if digest.len() == digits { Ok(digest) } else { Err(bad_value()) }
}

/// The reason why a kernel command line is rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandLineError {
    /// No word names an image.
    #[error("kernel command line: cannot find the image: no word composefs= or composefs.digest=")]
    NoImage,
    /// A word without its value.
    #[error("kernel command line: cannot use {0}: the value is missing ({0}=…)")]
    NeedsValue(&'static str),
    /// A value that the word does not accept.
    #[error("kernel command line: cannot use {word}={}: expected {expected}", shown(value))]
    #[non_exhaustive]
    BadValue {
        /// The word.
        word: &'static str,
        /// The value.
        value: OsString,
        /// The values that the word accepts.
        expected: &'static str,
    },
    /// The value is not a digest.
    #[error("kernel command line: cannot use the digest of the image: {0}")]
    Digest(#[from] ParseDigestError),
    /// The word is given twice, with different values.
    #[error("kernel command line: cannot use {0}: given twice, with different values")]
    Twice(&'static str),
    /// A word that starts with `sealmount.` and that sealmount does not know.
    #[error("kernel command line: cannot use the word {}: unknown", shown(_0))]
    Unknown(OsString),
}

impl CommandLineError {
    /// Returns the category of the error: always [`ErrorKind::InvalidOptions`].
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidOptions
    }

    /// Returns an instruction for a person, if one is known.
    pub fn hint(&self) -> Option<Hint> {
        match self {
            CommandLineError::NoImage => Some(Hint::new(
                "add composefs= and the digest of the image: `fsverity digest --compact IMAGE` prints the \
                 digest",
            )),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHA256: &str = "8b7df143d91c716ecfa5fc1730022f6b421b05cedee8fd52b1fc65a96030ad52";

    fn sha512() -> String {
        SHA256.repeat(2)
    }

    fn images(text: &str) -> Vec<(String, Verity)> {
        let command_line = CommandLine::parse(text).unwrap();
        let image = |image: &ExpectedImage| (image.digest.to_string(), image.verity);
        command_line.images.iter().map(image).collect()
    }

    #[test]
    fn images_keep_the_order_of_their_words() {
        let sha512 = sha512();
        let text = format!(
            "root=UUID=1 composefs.digest=v2-sha512-12:{sha512} composefs=?{SHA256} \
             composefs.digest=?v1-sha256-12:{SHA256} rw -- composefs=no"
        );
        let expected = [
            (sha512, Verity::Require),
            (SHA256.to_owned(), Verity::Try),
            (SHA256.to_owned(), Verity::Try),
        ];
        assert_eq!(images(&text), expected);
    }

    #[test]
    fn own_words_are_read() {
        let text = format!(
            "composefs={SHA256} \"sealmount.image=/a b\" sealmount.objects=objects sealmount.copy=memfd \
             sealmount.size=25% sealmount.check=all sealmount.check=all"
        );
        let found = CommandLine::parse(&text).unwrap();
        assert_eq!(found.image, Some("/a b".into()));
        assert_eq!(found.objects, Some("objects".into()));
        assert_eq!(found.copy, Some(CopyChoice::Memory(MemoryKind::Memfd)));
        assert_eq!(found.size, Some(SizeLimit::Percent(25)));
        assert_eq!(found.check, Some(ObjectCheck::All));
    }

    #[test]
    fn wrong_words_are_rejected() {
        let cases = [
            ("", "no word composefs= or composefs.digest="),
            ("composefs", "composefs: the value is missing"),
            ("composefs=", "composefs: the value is missing"),
            ("composefs=12", "the digest has 2 characters"),
            ("composefs.digest=12", "composefs.digest=12: expected v1 or v2"),
            ("composefs.digest=v3-sha256-12:HEX", "expected v1 or v2"),
            ("composefs.digest=v1-sha256-16:HEX", "expected v1 or v2"),
            ("composefs.digest=v1-sha512-12:HEX", "expected v1 or v2"),
            ("composefs=HEX sealmount.copy=yes", "copy=yes: expected memfd, ramfs or off"),
            ("composefs=HEX sealmount.check=", "sealmount.check: the value is missing"),
            ("composefs=HEX sealmount.check=x", "expected sample, all, content or none"),
            ("composefs=HEX sealmount.size=many", "sealmount.size=many: expected"),
            ("composefs=HEX sealmount.chekc=all", "the word sealmount.chekc: unknown"),
            ("composefs=HEX sealmount.copy=off sealmount.copy=memfd", "given twice"),
        ];
        for (text, expected) in cases {
            let error = CommandLine::parse(text.replace("HEX", SHA256)).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_result(text: Vec<u8>) {
            let _ = CommandLine::parse(OsStr::from_bytes(&text));
        }

        #[test]
        fn any_digest_is_found_between_other_words(
            digest in "[0-9a-f]{64}|[0-9a-f]{128}",
            before in "([a-z]+(=[a-z0-9\"]*)? ){0,4}",
            optional: bool,
            self_describing: bool,
        ) {
            // An open quote joins the words behind it.
            prop_assume!(before.matches('"').count() % 2 == 0);
            let mark = if optional { "?" } else { "" };
            let hash = if digest.len() == 64 { "sha256" } else { "sha512" };
            let word = match self_describing {
                true => format!("composefs.digest={mark}v1-{hash}-12:{digest}"),
                false => format!("composefs={mark}{digest}"),
            };
            prop_assume!(!before.contains("composefs"));
            let verity = if optional { Verity::Try } else { Verity::Require };
            prop_assert_eq!(images(&format!("{before}{word} quiet")), [(digest, verity)]);
        }
    }
}
