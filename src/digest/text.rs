//! The text of an fs-verity digest.

use std::fmt;
use std::str::FromStr;

use sealmount_sys::fsverity;

/// The hash algorithm of an fs-verity digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Algorithm {
    /// SHA-256: digests of 32 bytes.
    Sha256,
    /// SHA-512: digests of 64 bytes.
    Sha512,
}

impl Algorithm {
    /// Returns the size of a digest, in bytes.
    pub const fn digest_size(self) -> usize {
        match self {
            Algorithm::Sha256 => 32,
            Algorithm::Sha512 => 64,
        }
    }

    /// Returns `FS_VERITY_HASH_ALG_*`.
    pub(crate) const fn id(self) -> u16 {
        match self {
            Algorithm::Sha256 => fsverity::HASH_ALG_SHA256,
            Algorithm::Sha512 => fsverity::HASH_ALG_SHA512,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        })
    }
}

/// The fs-verity digest of a file.
///
/// The text of a digest has 64 (SHA-256) or 128 (SHA-512) hexadecimal digits, as printed by `fsverity digest
/// --compact`. A prefix `sha256:` or `sha512:` is optional.
///
/// ```
/// use sealmount::Digest;
///
/// let digest: Digest =
///     "sha256:3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95".parse()?;
/// assert_eq!(digest, Digest::of_bytes(digest.algorithm(), b""));
/// # Ok::<(), sealmount::ParseDigestError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Digest {
    /// A SHA-256 digest.
    Sha256([u8; 32]),
    /// A SHA-512 digest.
    Sha512([u8; 64]),
}

impl Digest {
    /// Returns the hash algorithm.
    pub const fn algorithm(&self) -> Algorithm {
        match self {
            Digest::Sha256(_) => Algorithm::Sha256,
            Digest::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// Returns the bytes of the digest.
    pub const fn as_bytes(&self) -> &[u8] {
        match self {
            Digest::Sha256(bytes) => bytes,
            Digest::Sha512(bytes) => bytes,
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{self}", self.algorithm())
    }
}

/// The reason why a text is not an fs-verity digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseDigestError {
    /// The text has neither 64 nor 128 digits.
    #[error(
        "the digest has {0} characters, expected 64 (SHA-256) or 128 (SHA-512) hexadecimal digits"
    )]
    Length(usize),
    /// A character is not a hexadecimal digit.
    #[error("the digest contains {0:?}, which is not a hexadecimal digit")]
    Character(char),
    /// The prefix `sha256:` stands before a SHA-512 digest, or the reverse.
    #[error("the prefix {prefix}: does not match a digest of {digits} hexadecimal digits")]
    Prefix {
        /// The algorithm of the prefix.
        prefix: Algorithm,
        /// The number of digits behind the prefix.
        digits: usize,
    },
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Digest, ParseDigestError> {
        let (prefix, hex) = if let Some(hex) = text.strip_prefix("sha256:") {
            (Some(Algorithm::Sha256), hex)
        } else if let Some(hex) = text.strip_prefix("sha512:") {
            (Some(Algorithm::Sha512), hex)
        } else {
            (None, text)
        };
        if let Some(wrong) = hex.chars().find(|character| !character.is_ascii_hexdigit()) {
            return Err(ParseDigestError::Character(wrong));
        }
        let digest = match hex.len() {
            64 => Digest::Sha256(decode(hex)),
            128 => Digest::Sha512(decode(hex)),
            digits => return Err(ParseDigestError::Length(digits)),
        };
        match prefix {
            Some(prefix) if prefix != digest.algorithm() => {
                Err(ParseDigestError::Prefix { prefix, digits: hex.len() })
            }
            _ => Ok(digest),
        }
    }
}

/// Decodes 2 × N hexadecimal digits. The caller has checked the digits.
fn decode<const N: usize>(hex: &str) -> [u8; N] {
    let value = |digit: u8| char::from(digit).to_digit(16).unwrap_or(0) as u8;
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = value(pair[0]) << 4 | value(pair[1]);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn malformed_digest_is_rejected_with_reason() {
        let digits = "0".repeat(64);
        let parse = |text: &str| text.parse::<Digest>();
        assert_eq!(parse(""), Err(ParseDigestError::Length(0)));
        assert_eq!(parse(&digits[1..]), Err(ParseDigestError::Length(63)));
        assert_eq!(parse(&format!("{}g", &digits[1..])), Err(ParseDigestError::Character('g')));
        assert_eq!(parse(&format!("{}é", &digits[2..])), Err(ParseDigestError::Character('é')));
        assert_eq!(parse(&format!("md5:{digits}")), Err(ParseDigestError::Character('m')));
        assert_eq!(
            parse(&format!("sha512:{digits}")),
            Err(ParseDigestError::Prefix { prefix: Algorithm::Sha512, digits: 64 }),
        );
        assert!(parse(&format!("sha256:{digits}")).is_ok());
    }

    fn digests() -> impl Strategy<Value = Digest> {
        prop_oneof![
            any::<[u8; 32]>().prop_map(Digest::Sha256),
            any::<[u8; 64]>().prop_map(Digest::Sha512),
        ]
    }

    proptest! {
        #[test]
        fn digest_printed_and_parsed_stays_equal(digest in digests(), upper: bool, prefix: bool) {
            let mut text = digest.to_string();
            if upper {
                text.make_ascii_uppercase();
            }
            if prefix {
                text = format!("{}:{text}", digest.algorithm());
            }
            prop_assert_eq!(text.parse(), Ok(digest));
        }

        #[test]
        fn arbitrary_text_is_rejected_or_keeps_its_hex(text in ".*") {
            if let Ok(digest) = text.parse::<Digest>() {
                let hex = text.rsplit(':').next().map(str::to_ascii_lowercase);
                prop_assert_eq!(Some(digest.to_string()), hex);
            }
        }
    }
}
