//! The frames that host and guest exchange over the second serial port, one on each line.
//!
//! On a healthy machine, the port carries only frames. The receiver still accepts only lines with the
//! token of the boot and a correct checksum. So a fragment, an echo or stray output cannot pass for a
//! result.

use std::fmt::Write as _;

/// The word of the kernel command line that gives the boot's token.
pub const TOKEN: &str = "vm-tests.token";

/// The word of the kernel command line that gives the serial port of the guest for frames, a name in
/// `/dev`. The console uses another serial port.
pub const CHANNEL: &str = "vm-tests.channel";

/// A message from the host to the guest or from the guest to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The guest loaded the modules and can run scenarios.
    Ready {
        release: String,
    },
    /// The host requests a scenario. The guest answers with `Passed` or `Failed` for this scenario.
    Run {
        scenario: String,
    },
    Passed {
        scenario: String,
    },
    Failed {
        scenario: String,
        message: String,
    },
    /// The guest cannot run scenarios.
    Unfit {
        message: String,
    },
    /// The host requests that the guest switch the machine off.
    Off,
}

/// The reason why a line is not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotAFrame {
    /// The line does not start with the mark of a frame.
    Noise,
    /// The line starts with the mark, but is truncated, garbled or from another boot.
    Damaged,
}

/// The start of every frame.
const MARK: &str = "@vm-tests ";

impl Frame {
    /// Returns the frame as a line. The leading newline separates the frame from an unfinished line.
    pub fn encode(&self, token: &str) -> String {
        let (kind, fields): (&str, Vec<&str>) = match self {
            Frame::Ready { release } => ("ready", vec![release]),
            Frame::Run { scenario } => ("run", vec![scenario]),
            Frame::Passed { scenario } => ("passed", vec![scenario]),
            Frame::Failed { scenario, message } => ("failed", vec![scenario, message]),
            Frame::Unfit { message } => ("unfit", vec![message]),
            Frame::Off => ("off", vec![]),
        };
        let mut line = format!("{MARK}{token} {kind}");
        for field in fields {
            line.push(' ');
            escape(field, &mut line);
        }
        format!("\n{line} {:016x}\n", checksum(line.as_bytes()))
    }

    /// Decodes a line, with or without its line end.
    pub fn decode(line: &[u8], token: &str) -> Result<Frame, NotAFrame> {
        let line = line.trim_ascii_end();
        if !line.starts_with(MARK.as_bytes()) {
            return Err(NotAFrame::Noise);
        }
        Self::decode_marked(line, token).ok_or(NotAFrame::Damaged)
    }

    fn decode_marked(line: &[u8], token: &str) -> Option<Frame> {
        let (summed, sum) = std::str::from_utf8(line).ok()?.rsplit_once(' ')?;
        if sum != format!("{:016x}", checksum(summed.as_bytes())) {
            return None;
        }
        let mut fields = summed.strip_prefix(MARK)?.split(' ');
        if fields.next()? != token {
            return None;
        }
        let kind = fields.next()?;
        let mut next = || fields.next().and_then(unescape);
        let frame = match kind {
            "ready" => Frame::Ready { release: next()? },
            "run" => Frame::Run { scenario: next()? },
            "passed" => Frame::Passed { scenario: next()? },
            "failed" => Frame::Failed { scenario: next()?, message: next()? },
            "unfit" => Frame::Unfit { message: next()? },
            "off" => Frame::Off,
            _ => return None,
        };
        fields.next().is_none().then_some(frame)
    }
}

/// Writes only bytes that terminal settings do not change and that cannot be field separators.
fn escape(text: &str, into: &mut String) {
    for byte in text.bytes() {
        match byte {
            b'%' | b'@' => write!(into, "%{byte:02x}").expect("a String accepts all writes"),
            byte if byte.is_ascii_graphic() => into.push(byte.into()),
            byte => write!(into, "%{byte:02x}").expect("a String accepts all writes"),
        }
    }
}

fn unescape(field: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first == b'%' {
            let (digits, after) = after.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = after;
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}

/// Computes FNV-1a, which detects accidental changes but not forgery.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        prop_oneof![
            any::<String>().prop_map(|release| Frame::Ready { release }),
            any::<String>().prop_map(|scenario| Frame::Run { scenario }),
            any::<String>().prop_map(|scenario| Frame::Passed { scenario }),
            any::<(String, String)>()
                .prop_map(|(scenario, message)| Frame::Failed { scenario, message }),
            any::<String>().prop_map(|message| Frame::Unfit { message }),
            Just(Frame::Off),
        ]
    }

    proptest! {
        #[test]
        fn frame_encoded_and_decoded_stays_equal(frame in any_frame(), token in "[0-9a-f]{1,32}") {
            let text = frame.encode(&token);
            let line = text.trim_matches('\n');
            prop_assert!(line.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()));
            prop_assert_eq!(Frame::decode(line.as_bytes(), &token), Ok(frame.clone()));
            // A terminal in its usual mode sends the line with a carriage return.
            prop_assert_eq!(Frame::decode(format!("{line}\r\n").as_bytes(), &token), Ok(frame));
        }

        #[test]
        fn truncated_line_is_rejected(frame in any_frame(), cut in any::<prop::sample::Index>()) {
            let text = frame.encode("token");
            let line = text.trim_matches('\n').as_bytes();
            prop_assert!(Frame::decode(&line[..cut.index(line.len())], "token").is_err());
        }

        #[test]
        fn line_with_changed_bit_is_rejected(frame in any_frame(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let text = frame.encode("token");
            let mut line = text.trim_matches('\n').as_bytes().to_vec();
            let at = at.index(line.len());
            line[at] ^= 1 << bit;
            prop_assert!(Frame::decode(&line, "token").is_err());
        }

        #[test]
        fn arbitrary_line_never_panics(garbage in any::<Vec<u8>>(), text in any::<String>()) {
            let _ = Frame::decode(&garbage, "token");
            let _ = Frame::decode(format!("{MARK}{text}").as_bytes(), "token");
            let summed = format!("{MARK}token failed {text}");
            let _ = Frame::decode(format!("{summed} {:016x}", checksum(summed.as_bytes())).as_bytes(), "token");
        }
    }

    #[test]
    fn frame_of_another_boot_is_rejected() {
        let text = Frame::Off.encode("one");
        assert_eq!(Frame::decode(text.trim().as_bytes(), "two"), Err(NotAFrame::Damaged));
        assert_eq!(
            Frame::decode(b"[    0.5] random: crng init done", "two"),
            Err(NotAFrame::Noise)
        );
    }
}
