//! The configuration of the root file system: pure, from TOML to types.
//!
//! The format is the format of composefs-setup-root, with the table `tmpfs` added.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use crate::boot::error::ConfigError;
use crate::source::SizeLimit;

/// The configuration of the root file system, as in /usr/lib/composefs/setup-root-conf.toml.
///
/// | key | value | meaning |
/// |---|---|---|
/// | `root.transient` | `true`, `false` | the root directory gets a layer in a tmpfs that receives changes |
/// | `etc.mount`, `var.mount` | [`none`, `bind`, `overlay`, `transient`](DirectoryMount) | the content of /etc or /var |
/// | `etc.transient`, `var.transient` | `true`, `false` | without `mount`: `true` means `mount = "transient"` |
/// | `tmpfs.size` | text | the maximum size of the tmpfs, in the format of its option `size=` |
///
/// ```
/// use sealmount::boot::{DirectoryMount, RootConfig};
///
/// let config = RootConfig::parse("[etc]\nmount = \"transient\"\n")?;
/// assert_eq!(config.etc, DirectoryMount::Transient);
/// assert_eq!(config.var, DirectoryMount::Bind);
/// # Ok::<(), sealmount::boot::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RootConfig {
    /// `root.transient`: changes of the root directory are kept in a tmpfs, until the system stops.
    pub transient: bool,
    /// `etc.mount`: the content of /etc. The default is [`DirectoryMount::Overlay`].
    pub etc: DirectoryMount,
    /// `var.mount`: the content of /var. The default is [`DirectoryMount::Bind`].
    pub var: DirectoryMount,
    /// `tmpfs.size`: the maximum size of the tmpfs. `None` means 50 % of the memory of the machine.
    pub tmpfs_size: Option<SizeLimit>,
}

/// The content of a directory of the root file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirectoryMount {
    /// `none`: the directory of the image.
    None,
    /// `bind`: the directory of the deployment, on the disk.
    Bind,
    /// `overlay`: the directory of the image, with a layer on the disk that receives changes.
    Overlay,
    /// `transient`: the directory of the image, with a layer in a tmpfs that receives changes.
    Transient,
}

impl Default for RootConfig {
    fn default() -> RootConfig {
        RootConfig {
            transient: false,
            etc: DirectoryMount::Overlay,
            var: DirectoryMount::Bind,
            tmpfs_size: None,
        }
    }
}

impl RootConfig {
    /// Parses a configuration file. A key that is not in the file has its default.
    ///
    /// # Errors
    ///
    /// [`ConfigError`]: the text is not TOML, or has a key or a value that is not understood.
    pub fn parse(text: &str) -> Result<RootConfig, ConfigError> {
        let file = File { text };
        let document = DeTable::parse(text).map_err(|error| {
            let line = error.span().map(|span| file.line(&span));
            ConfigError::Syntax { line, message: error.message().to_owned() }
        })?;
        let mut config = RootConfig::default();
        for (name, value) in document.get_ref() {
            let (table, span) = (name.get_ref().as_ref(), value.span());
            let DeValue::Table(keys) = value.get_ref() else {
                return Err(file.bad_value(table, &span, "a table"));
            };
            match table {
                "root" => config.transient = file.root(keys)?,
                "etc" => config.etc = file.directory("etc", keys)?.unwrap_or(config.etc),
                "var" => config.var = file.directory("var", keys)?.unwrap_or(config.var),
                "tmpfs" => config.tmpfs_size = file.tmpfs(keys)?,
                _ => return Err(file.unknown(table, &name.span())),
            }
        }
        Ok(config)
    }

    /// Returns whether a directory of the root is on the disk.
    pub(crate) fn needs_disk(&self) -> bool {
        let is_on_disk = |mount| matches!(mount, DirectoryMount::Bind | DirectoryMount::Overlay);
        is_on_disk(self.etc) || is_on_disk(self.var)
    }

    /// Returns whether the configuration needs a tmpfs.
    pub(crate) fn needs_tmpfs(&self) -> bool {
        let is_transient = |mount| mount == DirectoryMount::Transient;
        self.transient || is_transient(self.etc) || is_transient(self.var)
    }
}

/// The text of the file, for the lines in errors.
struct File<'a> {
    text: &'a str,
}

impl File<'_> {
    fn root(&self, keys: &DeTable<'_>) -> Result<bool, ConfigError> {
        let mut transient = false;
        for (key, value) in keys {
            match key.get_ref().as_ref() {
                "transient" => transient = self.boolean("root.transient", value)?,
                name => return Err(self.unknown(&format!("root.{name}"), &key.span())),
            }
        }
        Ok(transient)
    }

    fn directory(
        &self,
        table: &str,
        keys: &DeTable<'_>,
    ) -> Result<Option<DirectoryMount>, ConfigError> {
        let (mut mount, mut transient) = (None, false);
        for (key, value) in keys {
            let name = format!("{table}.{}", key.get_ref());
            match key.get_ref().as_ref() {
                "transient" => transient = self.boolean(&name, value)?,
                "mount" => {
                    mount = Some(match value.get_ref().as_str() {
                        Some("none") => DirectoryMount::None,
                        Some("bind") => DirectoryMount::Bind,
                        Some("overlay") => DirectoryMount::Overlay,
                        Some("transient") => DirectoryMount::Transient,
                        _ => {
                            let expected = "\"none\", \"bind\", \"overlay\" or \"transient\"";
                            return Err(self.bad_value(&name, &value.span(), expected));
                        }
                    });
                }
                _ => return Err(self.unknown(&name, &key.span())),
            }
        }
        Ok(mount.or(transient.then_some(DirectoryMount::Transient)))
    }

    fn tmpfs(&self, keys: &DeTable<'_>) -> Result<Option<SizeLimit>, ConfigError> {
        let mut size = None;
        for (key, value) in keys {
            match key.get_ref().as_ref() {
                "size" => {
                    let text = value.get_ref().as_str().unwrap_or_default();
                    size = SizeLimit::from_text(text.as_bytes());
                    if size.is_none() {
                        let expected = "a text such as \"64m\" or \"25%\"";
                        return Err(self.bad_value("tmpfs.size", &value.span(), expected));
                    }
                }
                name => return Err(self.unknown(&format!("tmpfs.{name}"), &key.span())),
            }
        }
        Ok(size)
    }

    fn boolean(&self, key: &str, value: &toml::Spanned<DeValue<'_>>) -> Result<bool, ConfigError> {
        let found = value.get_ref().as_bool();
        found.ok_or_else(|| self.bad_value(key, &value.span(), "true or false"))
    }

    fn unknown(&self, key: &str, span: &Range<usize>) -> ConfigError {
        ConfigError::UnknownKey { line: self.line(span), key: key.to_owned() }
    }

    fn bad_value(&self, key: &str, span: &Range<usize>, expected: &'static str) -> ConfigError {
        ConfigError::BadValue { line: self.line(span), key: key.to_owned(), expected }
    }

    /// Returns the number of the line in which a part of the text starts.
    fn line(&self, span: &Range<usize>) -> usize {
        let before = self.text.as_bytes().iter().take(span.start);
        1 + before.filter(|byte| **byte == b'\n').count()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn configuration_sets_each_directory() {
        let text = "# a comment\n[root]\ntransient = true\n[etc]\nmount = \"bind\"\ntransient = true\n\
                    [var]\ntransient = true\n[tmpfs]\nsize = \"25%\"\n";
        let expected = RootConfig {
            transient: true,
            etc: DirectoryMount::Bind,
            var: DirectoryMount::Transient,
            tmpfs_size: Some(SizeLimit::Percent(25)),
        };
        assert_eq!(RootConfig::parse(text), Ok(expected));
    }

    #[test]
    fn empty_configuration_has_the_defaults() {
        for text in ["", "[etc]\n[var]\n[root]\n", "etc = {}\nvar.transient = false\n"] {
            assert_eq!(RootConfig::parse(text), Ok(RootConfig::default()), "{text}");
        }
    }

    #[test]
    fn wrong_configuration_is_rejected_with_its_line() {
        let cases = [
            ("[root\n", "line 1: cannot read TOML"),
            ("\n[etc]\nmount = \"tmpfs\"\n", "line 3: cannot use etc.mount: expected \"none\""),
            ("[etc]\nmount = 1\n", "line 2: cannot use etc.mount"),
            ("[var]\ntransient = \"yes\"\n", "line 2: cannot use var.transient: expected true or"),
            ("[root]\ntransint = true\n", "line 2: cannot use the key root.transint: unknown"),
            ("[tmpfs]\nsize = \"much\"\n", "line 2: cannot use tmpfs.size"),
            ("[usr]\n", "line 1: cannot use the key usr: unknown"),
            ("etc = 1\n", "line 1: cannot use etc: expected a table"),
        ];
        for (text, expected) in cases {
            let error = RootConfig::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    fn mounts() -> impl Strategy<Value = DirectoryMount> {
        proptest::sample::select(
            &[
                DirectoryMount::None,
                DirectoryMount::Bind,
                DirectoryMount::Overlay,
                DirectoryMount::Transient,
            ][..],
        )
    }

    proptest! {
        #[test]
        fn any_configuration_is_read_as_written(
            transient: bool, etc in mounts(), var in mounts(), percent: u32,
        ) {
            let name = |mount: DirectoryMount| format!("{mount:?}").to_lowercase();
            let text = format!(
                "etc.mount = '{}'\n[root]\ntransient = {transient}\n[var]\nmount = \"{}\"\n\
                 [tmpfs]\nsize = '{percent}%'",
                name(etc), name(var),
            );
            let tmpfs_size = Some(SizeLimit::Percent(percent));
            prop_assert_eq!(
                RootConfig::parse(&text),
                Ok(RootConfig { transient, etc, var, tmpfs_size })
            );
        }

        #[test]
        fn any_text_gives_a_result(text: String) {
            let _ = RootConfig::parse(&text);
        }
    }
}
