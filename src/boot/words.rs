//! The words of the kernel command line, by the rules of the kernel (`next_arg` of lib/cmdline.c).

/// A word: a name, and the value behind the first `=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word<'a> {
    pub name: &'a [u8],
    pub value: Option<&'a [u8]>,
}

/// Returns the words that are for the kernel and the initramfs. The words behind `--` are for process 1.
///
/// White space separates words. In double quotes, white space is part of the word. Quotes cannot be escaped.
/// Quotes around a word or around a value do not belong to it.
pub(crate) fn words(text: &[u8]) -> impl Iterator<Item = Word<'_>> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let start = rest.iter().position(|byte| !is_space(*byte))?;
        let (word, after) = next_word(&rest[start..]);
        rest = after;
        (word != Word { name: b"--", value: None }).then_some(word)
    })
    .fuse()
}

/// Returns the first word, and the text behind it. `text` starts with a byte that is not white space.
fn next_word(text: &[u8]) -> (Word<'_>, &[u8]) {
    let is_quoted = text.starts_with(b"\"");
    let text = if is_quoted { &text[1..] } else { text };
    let mut in_quotes = is_quoted;
    let end = text.iter().position(|byte| {
        in_quotes ^= *byte == b'"';
        is_space(*byte) && !in_quotes
    });
    let (word, after) = text.split_at(end.unwrap_or(text.len()));
    // A word that starts with `=` has no name before this sign.
    let equals = word.iter().skip(1).position(|byte| *byte == b'=').map(|index| index + 1);
    let Some(equals) = equals else {
        let name = if is_quoted { without_last_quote(word) } else { word };
        return (Word { name, value: None }, after);
    };
    let (name, mut value) = (&word[..equals], &word[equals + 1..]);
    let value_is_quoted = value.starts_with(b"\"");
    if value_is_quoted {
        value = without_last_quote(&value[1..]);
    } else if is_quoted {
        value = without_last_quote(value);
    }
    (Word { name, value: Some(value) }, after)
}

fn without_last_quote(text: &[u8]) -> &[u8] {
    text.strip_suffix(b"\"").unwrap_or(text)
}

/// Returns whether the kernel separates words at this byte. The kernel also separates words at the byte 0xa0,
/// which is a part of some characters in UTF-8. systemd does not, and this function follows systemd.
fn is_space(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs(text: &str) -> Vec<(String, Option<String>)> {
        let text_of = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        words(text.as_bytes()).map(|word| (text_of(word.name), word.value.map(text_of))).collect()
    }

    fn pair(name: &str, value: Option<&str>) -> (String, Option<String>) {
        (name.into(), value.map(Into::into))
    }

    #[test]
    fn words_are_split_as_by_the_kernel() {
        type Pair<'a> = (&'a str, Option<&'a str>);
        let cases: &[(&str, &[Pair])] = &[
            ("", &[]),
            (" \t\n", &[]),
            ("quiet", &[("quiet", None)]),
            ("a=b  c", &[("a", Some("b")), ("c", None)]),
            ("a=\"b c\" d", &[("a", Some("b c")), ("d", None)]),
            ("\"a=b c\" d", &[("a", Some("b c")), ("d", None)]),
            ("a=b\" \"c", &[("a", Some("b\" \"c"))]),
            ("a=\"b", &[("a", Some("b"))]),
            ("a=", &[("a", Some(""))]),
            ("=a", &[("=a", None)]),
            ("a=b=c", &[("a", Some("b=c"))]),
            ("a -- composefs=b", &[("a", None)]),
            ("a --b", &[("a", None), ("--b", None)]),
        ];
        for (text, expected) in cases {
            let expected: Vec<_> =
                expected.iter().map(|(name, value)| pair(name, *value)).collect();
            assert_eq!(pairs(text), expected, "{text:?}");
        }
    }

    /// Splits a command line as `next_arg` and `parse_args` do, with their variables.
    fn kernel_words(text: &[u8]) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        let is_space = |byte: u8| [b' ', b'\t', b'\n', 0x0b, 0x0c, b'\r'].contains(&byte);
        // The kernel works on a string that ends with NUL.
        let mut args = text.to_vec();
        args.push(0);
        let mut at = 0;
        let mut found = Vec::new();
        let c_string = |args: &[u8], start: usize| -> Vec<u8> {
            args[start..].iter().copied().take_while(|byte| *byte != 0).collect()
        };
        while is_space(args[at]) {
            at += 1;
        }
        while args[at] != 0 {
            let (mut equals, mut in_quote, mut quoted) = (0, false, false);
            if args[at] == b'"' {
                at += 1;
                (in_quote, quoted) = (true, true);
            }
            let mut i = 0;
            while args[at + i] != 0 {
                if is_space(args[at + i]) && !in_quote {
                    break;
                }
                if equals == 0 && args[at + i] == b'=' {
                    equals = i;
                }
                if args[at + i] == b'"' {
                    in_quote = !in_quote;
                }
                i += 1;
            }
            let more = args[at + i] != 0;
            let mut value = None;
            if equals != 0 {
                args[at + equals] = 0;
                let mut start = at + equals + 1;
                if args[start] == b'"' {
                    start += 1;
                    if args[at + i - 1] == b'"' {
                        args[at + i - 1] = 0;
                    }
                }
                value = Some(start);
            }
            if quoted && i > 0 && args[at + i - 1] == b'"' {
                args[at + i - 1] = 0;
            }
            let mut next = at + i;
            if more {
                args[next] = 0;
                next += 1;
            }
            let name = c_string(&args, at);
            let value = value.map(|start| c_string(&args, start));
            at = next;
            while is_space(args[at]) {
                at += 1;
            }
            if name == b"--" && value.is_none() {
                break;
            }
            found.push((name, value));
        }
        found
    }

    proptest! {
        #[test]
        fn any_text_is_split_as_by_the_kernel(
            text in proptest::collection::vec(
                proptest::sample::select(&b"ab=\"- \t\n"[..]), 0..40,
            ),
        ) {
            let found: Vec<_> = words(&text)
                .map(|word| (word.name.to_vec(), word.value.map(<[u8]>::to_vec)))
                .collect();
            prop_assert_eq!(found, kernel_words(&text));
        }

        #[test]
        fn any_bytes_are_split(text: Vec<u8>) {
            let count = words(&text).count();
            prop_assert!(count <= text.len());
        }
    }
}
