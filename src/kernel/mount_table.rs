//! A pure parser of the mount table, [proc_pid_mountinfo(5)].
//!
//! [proc_pid_mountinfo(5)]: https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// The directory of the scratch with the image, in `lowerdir`.
pub(crate) const IMAGE: &str = "image";
/// The directory of the scratch with the whiteouts above the image, in `lowerdir`.
pub(crate) const WHITEOUTS: &str = "whiteouts";

/// An option, with its value if it has one.
pub(crate) type ShownOption = (OsString, Option<OsString>);

/// One line of the table.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MountLine {
    /// `STATX_MNT_ID` of the mount.
    pub id: u64,
    /// The path of the root of the mount, in its file system.
    pub root: PathBuf,
    pub mount_point: PathBuf,
    pub fs_type: OsString,
    /// The attributes of the mount.
    pub attributes: Vec<ShownOption>,
    /// The options of the superblock.
    pub superblock: Vec<ShownOption>,
}

/// Returns the mounts of the table, without damaged lines.
pub(crate) fn mounts(table: &[u8]) -> impl Iterator<Item = MountLine> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line)
}

/// Returns the line of the mount with this ID.
pub(crate) fn find_mount(table: &[u8], id: u64) -> Option<MountLine> {
    mounts(table).find(|line| line.id == id)
}

/// Parses a line: ID, ID of the parent, device, root, mount point, attributes, tags, `-`, type, source,
/// options.
fn parse_line(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let (root, mount_point) = (text(fields.nth(2)?).into(), text(fields.next()?).into());
    let attributes = options(fields.next()?);
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let (fs_type, superblock) = (text(fields.next()?), options(fields.nth(1)?));
    Some(MountLine { id, root, mount_point, fs_type, attributes, superblock })
}

fn text(field: &[u8]) -> OsString {
    OsString::from_vec(unescape(field))
}

fn options(field: &[u8]) -> Vec<ShownOption> {
    let mut options = Vec::new();
    let mut rest = Some(field);
    while let Some(left) = rest {
        let (option, more) = split_option(left);
        rest = more;
        let (name, value) = match option.iter().position(|byte| *byte == b'=') {
            Some(equals) => (&option[..equals], Some(&option[equals + 1..])),
            None => (option, None),
        };
        options.push((text(name), value.map(|value| text(without_quotes(value)))));
    }
    options
}

/// Splits at the first comma. The kernel escapes the commas of values. Only the commas of SELinux contexts
/// are plain, and the kernel writes quotes around such a context.
fn split_option(text: &[u8]) -> (&[u8], Option<&[u8]>) {
    let comma = text.iter().position(|byte| *byte == b',').unwrap_or(text.len());
    let quote = text[..comma].windows(2).position(|two| two == b"=\"").map(|equals| equals + 2);
    let end_of_value = quote
        .and_then(|start| Some(start + text[start..].iter().position(|byte| *byte == b'"')? + 1));
    let end = match end_of_value {
        Some(end) if matches!(text.get(end), None | Some(b',')) => end,
        _ => comma,
    };
    (&text[..end], text.get(end + 1..))
}

fn without_quotes(value: &[u8]) -> &[u8] {
    value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value)
}

/// Decodes the bytes that the kernel writes as a backslash and three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, after @ ..] = rest {
        match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', more @ ..] if *first == b'\\' => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = more;
            }
            _ => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

/// Returns whether the options include an option of this name without a value.
pub(crate) fn has_flag(options: &[ShownOption], name: &str) -> bool {
    options.iter().any(|(shown, value)| shown == name && value.is_none())
}

/// Returns the values of an option that may be shown several times.
pub(crate) fn values<'a>(
    options: &'a [ShownOption],
    name: &'a str,
) -> impl Iterator<Item = &'a OsStr> {
    let named = options.iter().filter(move |(shown, _)| shown == name);
    named.filter_map(|(_, value)| value.as_deref())
}

/// Returns the value of an option that is shown at most once.
pub(crate) fn value<'a>(options: &'a [ShownOption], name: &'a str) -> Option<&'a OsStr> {
    values(options, name).next()
}

/// Returns the object directories of an overlay: its data-only layers or, on a kernel without data-only
/// layers, the layers below the image. Only sealmount has given an image its name in the scratch. The lower
/// layers of other overlays are not object directories.
pub(crate) fn data_layers(superblock: &[ShownOption]) -> Vec<&OsStr> {
    let data: Vec<_> = values(superblock, "datadir+").collect();
    if !data.is_empty() {
        return data;
    }
    let layers = split_layers(value(superblock, "lowerdir").unwrap_or_default().as_bytes());
    let layers: Vec<_> = layers.into_iter().map(OsStr::from_bytes).collect();
    match &layers[..] {
        // A data-only layer follows two colons.
        [_, .., _] if layers.iter().any(|layer| layer.is_empty()) => {
            let data = layers.into_iter().skip_while(|layer| !layer.is_empty());
            data.filter(|layer| !layer.is_empty()).collect()
        }
        // Linux < 6.5: a layer of whiteouts may lie above the image.
        [first, image, objects @ ..] if *first == WHITEOUTS && *image == IMAGE => objects.to_vec(),
        [image, objects @ ..] if *image == IMAGE => objects.to_vec(),
        _ => Vec::new(),
    }
}

/// Splits `lowerdir` at each colon without a backslash in front of it.
fn split_layers(lowerdir: &[u8]) -> Vec<&[u8]> {
    let mut is_escaped = false;
    let is_end = |byte: &u8| {
        let is_end = *byte == b':' && !is_escaped;
        is_escaped = *byte == b'\\' && !is_escaped;
        is_end
    };
    lowerdir.split(is_end).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    const TABLE: &[u8] = b"70 63 0:44 / /mnt/a ro,relatime shared:1 - overlay /image.cfs \
        ro,lowerdir+=/,datadir+=/a\\054b,datadir+=/c,redirect_dir=on\n\
        71 63 0:45 / /mnt/b\\040c rw,nosuid - ext4 /dev/sda rw,context=\"a:s0:c1,c2\",discard\n";

    fn option(name: &str, value: Option<&str>) -> ShownOption {
        (name.into(), value.map(OsString::from))
    }

    #[test]
    fn line_of_mount_is_found_and_decoded() {
        let line = find_mount(TABLE, 70).unwrap();
        assert_eq!(line.fs_type, "overlay");
        assert_eq!(line.attributes, [option("ro", None), option("relatime", None)]);
        assert_eq!(data_layers(&line.superblock), ["/a,b", "/c"]);
        assert_eq!(value(&line.superblock, "redirect_dir"), Some("on".as_ref()));
        assert!(has_flag(&line.superblock, "ro") && !has_flag(&line.superblock, "redirect_dir"));
        let line = find_mount(TABLE, 71).unwrap();
        assert_eq!(line.mount_point, Path::new("/mnt/b c"));
        let context = option("context", Some("a:s0:c1,c2"));
        assert_eq!(line.superblock, [option("rw", None), context, option("discard", None)]);
        assert_eq!(find_mount(TABLE, 7), None);
    }

    #[test]
    fn only_whole_octal_escapes_are_decoded() {
        for plain in ["\\", "\\04", "\\048", "\\+40", "\\ 40", "\\400", "\\x40"] {
            assert_eq!(unescape(plain.as_bytes()), plain.as_bytes());
        }
        assert_eq!(unescape(b"\\\\040\\0401\\377"), b"\\ \x201\xff");
    }

    #[test]
    fn data_layers_of_each_kernel_are_found() {
        for (lowerdir, expected) in [
            ("image::/a::/b", vec!["/a", "/b"]),
            ("image:/a:/b", vec!["/a", "/b"]),
            ("whiteouts:image:/a", vec!["/a"]),
            ("/top:/image::/a", vec!["/a"]),
            (r"image::/a\:b::/c", vec![r"/a\:b", "/c"]),
            ("/one", vec![]),
            // Overlays that are not composefs.
            ("/one:/two", vec![]),
            (r"/one\::/two", vec![]),
            ("/image:/two", vec![]),
            ("images:/two", vec![]),
            ("whiteouts:/two:/three", vec![]),
            ("image", vec![]),
            ("", vec![]),
        ] {
            assert_eq!(data_layers(&[option("lowerdir", Some(lowerdir))]), expected, "{lowerdir}");
        }
    }

    proptest! {
        #[test]
        fn any_table_parses_without_panic(table: Vec<u8>, id in 0..3_u64) {
            find_mount(&table, id);
        }

        #[test]
        fn escaped_bytes_are_decoded(bytes: Vec<(u8, bool)>) {
            let mut path = Vec::new();
            let mut escaped = b"1 2 0:1 / ".to_vec();
            for (byte, is_plain) in bytes {
                path.push(byte);
                match is_plain && !b" \n\\".contains(&byte) {
                    true => escaped.push(byte),
                    false => escaped.extend(format!("\\{byte:03o}").into_bytes()),
                }
            }
            escaped.extend(b" rw - tmpfs x rw");
            let line = find_mount(&escaped, 1).unwrap();
            prop_assert_eq!(line.mount_point.as_os_str().as_bytes(), &path);
        }

        #[test]
        fn any_options_parse_without_panic(field in "[a-c=,\"\\\\0-8]{0,40}") {
            let line = format!("1 2 0:1 / / {field} - overlay x {field}");
            let line = find_mount(line.as_bytes(), 1).unwrap();
            prop_assert_eq!(line.attributes, line.superblock);
        }
    }
}
