use proptest::prelude::*;

use super::*;
use crate::overlay::{OverlayOptions, SelinuxContexts};

fn parse(text: &str) -> Result<MountOptions, OptionsError> {
    MountOptions::parse(text)
}

/// Parses `text` beside a basedir.
fn with_basedir(text: &str) -> MountOptions {
    parse(&format!("basedir=/o,{text}")).unwrap()
}

fn paths(options: &MountOptions) -> Vec<String> {
    options.overlay.objects.iter().map(Location::to_string).collect()
}

const SHA256: &str = "9ddad2ef1b11a869370e222a70507d0c94ab025fdb2f62e8bd15b9345fb5f5c1";

#[test]
fn basedir_list_returns_unescaped_paths() {
    assert_eq!(paths(&parse("basedir=/a").unwrap()), ["/a"]);
    assert_eq!(paths(&parse("basedir=/a:/b:c").unwrap()), ["/a", "/b", "c"]);
    assert_eq!(paths(&parse(r"basedir=/a\:b\,c\\d:/e=f").unwrap()), [r"/a:b,c\d", "/e=f"]);
}

#[test]
fn descriptor_uses_fd_path_and_reports_file_path() {
    let file = Location::from(std::fs::File::open("/dev/null").unwrap());
    assert_eq!(file.to_string(), "/dev/null");
    let text = MountOptions::new(file).to_text().into_string().unwrap();
    assert!(text.starts_with("basedir=/proc/self/fd/"), "{text}");
}

#[test]
fn invalid_option_is_rejected_by_name() {
    let error = |text: &str| parse(&format!("basedir=/o,{text}")).unwrap_err();
    let unknown = |name: &str| OptionsError::Unknown(name.into());
    assert_eq!(error("bsedir=/a"), unknown("bsedir"));
    assert_eq!(error("loop"), unknown("loop"));
    assert_eq!(error("=x"), unknown(""));
    assert_eq!(error("RO"), unknown("RO"));
    assert_eq!(error(" ro"), unknown(" ro"));
    assert_eq!(error("remount"), unknown("remount"));
    for (text, option) in [
        ("basedir", "basedir"),
        ("basedir=", "basedir"),
        ("basedir=/a:", "basedir"),
        ("basedir=/a::/b", "basedir"),
        ("digest", "digest"),
        ("digest=", "digest"),
        ("copy=", "copy"),
        ("verity=", "verity"),
        ("check", "check"),
        ("idmap", "idmap"),
        ("upperdir=", "upperdir"),
        ("context=", "context"),
        ("comment", "comment"),
    ] {
        assert_eq!(error(text), OptionsError::NeedsValue(option), "{text}");
    }
    for (text, option) in [
        ("ro=1", "ro"),
        ("noverity=", "noverity"),
        ("nosuid=yes", "nosuid"),
        ("suid=", "suid"),
        ("nofail=1", "nofail"),
        ("user=me", "user"),
        ("noatime=1", "noatime"),
        ("sync=1", "sync"),
    ] {
        assert_eq!(error(text), OptionsError::TakesNoValue(option), "{text}");
    }
    assert!(matches!(error("verity=yes"), OptionsError::BadValue { option: "verity", .. }));
    assert!(matches!(error("copy=disk"), OptionsError::BadValue { option: "copy", .. }));
    assert!(matches!(error("check=most"), OptionsError::BadValue { option: "check", .. }));
    let sizes = "x|-1|+1|1z|%|1%%|-1%|4294967296%|k|1kk|1 k|20000000000g|16e|0x10|1.5g";
    for size in sizes.split('|') {
        let error = error(&format!("copy,size={size}"));
        assert!(matches!(error, OptionsError::BadValue { option: "size", .. }), "{size}: {error}");
    }
    assert_eq!(error("size=1"), OptionsError::SizeWithoutCopy);
    assert!(matches!(error("digest=abc"), OptionsError::Digest(_)));
    assert_eq!(error("upperdir=/u"), OptionsError::UpperdirWithoutWorkdir);
    assert_eq!(error("workdir=/w"), OptionsError::WorkdirWithoutUpperdir);
    assert_eq!(error("ro\\"), OptionsError::TrailingBackslash);
    assert_eq!(error("x-a\0"), OptionsError::Nul);
    assert_eq!(parse("basdir=/a"), Err(unknown("basdir")));
    assert_eq!(parse("bogus,upperdir=/u"), Err(unknown("bogus")));
    assert_eq!(parse(""), Err(OptionsError::NoObjects));
    assert_eq!(parse("ro"), Err(OptionsError::NoObjects));
}

#[test]
fn conflicting_options_use_the_last_value() {
    assert_eq!(paths(&parse("basedir=/a,basedir=/b:/c").unwrap()), ["/b", "/c"]);
    for (text, read_only) in [("", false), ("ro", true), ("ro,rw", false), ("rw,ro", true)] {
        assert_eq!(with_basedir(text).overlay.read_only, read_only, "{text}");
    }
    for (text, atime) in [
        ("noatime,relatime", Atime::Relatime),
        ("noatime,strictatime", Atime::Strictatime),
        ("strictatime,atime", Atime::Strictatime),
        ("noatime,atime", Atime::Relatime),
        ("strictatime,nostrictatime", Atime::Relatime),
        ("noatime,nostrictatime", Atime::Noatime),
    ] {
        assert_eq!(with_basedir(text).overlay.atime, atime, "{text}");
    }
    let upper = with_basedir("upperdir=/u,workdir=/w,upperdir=/v").overlay.upper.unwrap();
    assert_eq!((upper.upperdir, upper.workdir), ("/v".into(), "/w".into()));
}

#[test]
fn check_option_uses_its_last_value() {
    for (text, check) in [
        ("", ObjectCheck::Sample),
        ("check=none", ObjectCheck::Off),
        ("check=content,check=sample", ObjectCheck::Sample),
        ("check=none,check=all", ObjectCheck::All),
        ("check=content", ObjectCheck::Content),
    ] {
        assert_eq!(with_basedir(text).overlay.effective_check(), check, "{text}");
    }
}

#[test]
fn size_with_unit_returns_bytes_or_percent() {
    for (text, size) in [
        ("0", SizeLimit::Bytes(0)),
        ("123", SizeLimit::Bytes(123)),
        ("4k", SizeLimit::Bytes(4096)),
        ("4K", SizeLimit::Bytes(4096)),
        ("3m", SizeLimit::Bytes(3 << 20)),
        ("2G", SizeLimit::Bytes(2 << 30)),
        ("5t", SizeLimit::Bytes(5 << 40)),
        ("7P", SizeLimit::Bytes(7 << 50)),
        ("15e", SizeLimit::Bytes(15 << 60)),
        ("18446744073709551615", SizeLimit::Bytes(u64::MAX)),
        ("0%", SizeLimit::Percent(0)),
        ("100%", SizeLimit::Percent(100)),
        ("4294967295%", SizeLimit::Percent(u32::MAX)),
    ] {
        assert_eq!(with_basedir(&format!("copy,size={text}")).size, Some(size), "{text}");
    }
}

#[test]
fn two_different_digests_are_rejected() {
    let upper = SHA256.to_uppercase();
    with_basedir(&format!("digest={SHA256},digest=sha256:{upper}"));
    let other = "0".repeat(64);
    let text = format!("basedir=/o,digest={SHA256},digest={other}");
    assert_eq!(parse(&text), Err(OptionsError::TwoDigests));
}

#[test]
fn digest_without_final_noverity_uses_verity() {
    for (text, verity) in [
        ("", Verity::Off),
        ("verity", Verity::Require),
        ("tryverity", Verity::Try),
        ("verity,noverity", Verity::Off),
        ("noverity,tryverity", Verity::Try),
        ("digest", Verity::Require),
        ("digest,tryverity", Verity::Require),
        ("tryverity,digest", Verity::Require),
        ("digest,noverity", Verity::Off),
        ("noverity,digest", Verity::Off),
        ("noverity,digest,verity", Verity::Require),
        ("noverity,digest,tryverity", Verity::Require),
        ("verity=require", Verity::Require),
        ("digest,verity=try", Verity::Try),
        ("verity=try,digest", Verity::Try),
        ("digest,tryverity,verity=try", Verity::Try),
        ("digest,verity=try,tryverity", Verity::Require),
        ("digest,verity=off", Verity::Off),
        ("verity=try,noverity", Verity::Off),
    ] {
        let options = with_basedir(&text.replace("digest", &format!("digest={SHA256}")));
        assert_eq!(options.effective_verity(), verity, "{text}");
    }
}

#[test]
fn user_options_use_attributes_of_mount_8() {
    for (text, attributes) in [
        ("user", "nosuid,nodev,noexec"),
        ("users", "nosuid,nodev,noexec"),
        ("owner", "nosuid,nodev"),
        ("group", "nosuid,nodev"),
        ("user,exec", "nosuid,nodev"),
        ("exec,user", "nosuid,nodev,noexec"),
        // libmount 2.38 passes this for "user,suid".
        ("rw,nodev,noexec,user,suid", "nodev,noexec"),
        ("nosuid,nodev,noexec,nosymfollow,suid,dev,exec,symfollow", ""),
    ] {
        let found = with_basedir(text).overlay.attributes;
        assert_eq!(found, with_basedir(attributes).overlay.attributes, "{text}");
    }
    let attributes = with_basedir("user").overlay.attributes;
    let expected = MountAttributes { nosuid: true, nodev: true, noexec: true, ..attributes };
    assert_eq!(attributes, expected);
    assert!(!attributes.nosymfollow && !attributes.nodiratime);
}

#[test]
fn fstab_only_options_are_ignored() {
    let text = "defaults,auto,noauto,nofail,_netdev,x-systemd.automount,X-mount.mkdir=0755,\
                comment=a\\,b,silent,loud,nouser,async,,symfollow";
    assert_eq!(with_basedir(text), with_basedir(""));
}

#[test]
fn sloppy_parse_ignores_only_unknown_options() {
    let sloppy = MountOptions::parse_sloppy("basedir=/o,frobnicate=1,ro,quux").unwrap();
    assert_eq!(sloppy.unknown, ["frobnicate", "quux"]);
    assert_eq!(sloppy.options, with_basedir("ro"));
    assert!(MountOptions::parse_sloppy("basedir=/o,ro=1").is_err());
}

fn locations() -> impl Strategy<Value = Location> {
    // Paths are bytes, with the special ones often.
    let byte = prop_oneof![
        3 => 1..=255u8,
        2 => prop::sample::select(br"\,:=/.".to_vec()),
    ];
    prop::collection::vec(byte, 1..12)
        .prop_map(|bytes| Location::Path(OsString::from_vec(bytes).into()))
}

prop_compose! {
    fn option_sets()(
        objects in prop::collection::vec(locations(), 1..4),
        digest in proptest::option::of(prop_oneof![
            any::<[u8; 32]>().prop_map(Digest::Sha256),
            any::<[u8; 64]>().prop_map(Digest::Sha512),
        ]),
        verity in proptest::option::of(prop::sample::select(vec![
            Verity::Require, Verity::Try, Verity::Off,
        ])),
        copy in proptest::option::of((
            prop::sample::select(vec![MemoryKind::Memfd, MemoryKind::Ramfs]),
            proptest::option::of(prop_oneof![
                any::<u64>().prop_map(SizeLimit::Bytes),
                any::<u32>().prop_map(SizeLimit::Percent),
            ]),
        )),
        check in proptest::option::of(prop::sample::select(vec![
            ObjectCheck::Off, ObjectCheck::Sample, ObjectCheck::All, ObjectCheck::Content,
        ])),
        idmap in proptest::option::of(locations()),
        upper in proptest::option::of((locations(), locations())),
        read_only: bool,
        attributes: [bool; 5],
        atime in prop::sample::select(vec![Atime::Relatime, Atime::Noatime, Atime::Strictatime]),
        superblock_flags: [bool; 4],
        selinux_contexts in prop::array::uniform4(proptest::option::of("[^\0]{1,20}")),
    ) -> MountOptions {
        let [nosuid, nodev, noexec, nosymfollow, nodiratime] = attributes;
        let [sync, dirsync, lazytime, mand] = superblock_flags;
        MountOptions {
            digest,
            copy: copy.map(|(memory, _)| memory),
            size: copy.and_then(|(_, size)| size),
            idmap,
            overlay: OverlayOptions {
                objects,
                verity,
                check,
                upper: upper.map(|(upperdir, workdir)| UpperLayer { upperdir, workdir }),
                read_only,
                attributes: MountAttributes { nosuid, nodev, noexec, nosymfollow, nodiratime },
                atime,
                superblock_flags: SuperblockFlags { sync, dirsync, lazytime, mand },
                selinux_contexts: {
                    let [context, fscontext, defcontext, rootcontext] =
                        selinux_contexts.map(|context: Option<String>| context.map(OsString::from));
                    SelinuxContexts { context, fscontext, defcontext, rootcontext }
                },
                source: None,
            },
        }
    }
}

/// Makes text that looks like options.
fn texts() -> impl Strategy<Value = OsString> {
    let piece = prop_oneof![
        4 => prop::sample::select(vec![
            "basedir=/o", "ro", "rw", "copy", "copy=memfd", "copy=ramfs", "size=1m", "size=5%", "verity", "noverity", "tryverity", "verity=try", "check=all", "check=none", "nosuid", "suid",
            "noatime", "x-y=z", "sync", "upperdir=/u", "workdir=/w", "comment=c", "idmap=/i", "user",
        ]).prop_map(|text| text.as_bytes().to_vec()),
        4 => prop::sample::select(br"\\\,,,::=".chunks(1).map(<[u8]>::to_vec).collect::<Vec<_>>()),
        1 => prop::collection::vec(any::<u8>(), 0..6),
    ];
    prop::collection::vec(piece, 0..20)
        .prop_map(|pieces| OsString::from_vec(pieces.into_iter().flatten().collect()))
}

/// A name, and a value if there is one.
type NaiveToken = (Vec<u16>, Option<Vec<u16>>);

/// Parses the text a second time, naively: replaces escaped characters by code points of their own (the byte
/// plus 256), and then splits the text.
fn naive_tokens(text: &[u8]) -> Option<Vec<NaiveToken>> {
    let mut characters = Vec::new();
    let mut escaped = false;
    for byte in text {
        match (escaped, byte) {
            (_, 0) => return None,
            (false, b'\\') => escaped = true,
            (false, byte) => characters.push(u16::from(*byte)),
            (true, byte) => {
                characters.push(u16::from(*byte) + 256);
                escaped = false;
            }
        }
    }
    if escaped {
        return None;
    }
    let split = |character: u16| {
        characters.split(move |other| *other == character).filter(|token| !token.is_empty())
    };
    Some(
        split(u16::from(b','))
            // An escaped "=" in a name is not a separator for us: names hold no backslash.
            .map(|token| {
                let equals = |c: &u16| *c % 256 == u16::from(b'=');
                match token.iter().position(equals) {
                    Some(at) => (token[..at].to_vec(), Some(token[at + 1..].to_vec())),
                    None => (token.to_vec(), None),
                }
            })
            .collect(),
    )
}

proptest! {
    #[test]
    fn options_printed_and_parsed_stay_equal(options in option_sets()) {
        prop_assert_eq!(MountOptions::parse(options.to_text()), Ok(options));
    }

    #[test]
    fn arbitrary_option_text_never_panics(bytes: Vec<u8>) {
        let _ = MountOptions::parse_sloppy(OsStr::from_bytes(&bytes));
    }

    #[test]
    fn parsed_text_printed_and_parsed_stays_equal(text in texts()) {
        if let Ok(options) = MountOptions::parse(&text) {
            prop_assert_eq!(MountOptions::parse(options.to_text()), Ok(options));
        }
    }

    #[test]
    fn tokenizer_returns_tokens_of_naive_parser(text in texts()) {
        let naive = naive_tokens(text.as_bytes());
        match tokens(text.as_bytes()) {
            Err(_) => prop_assert_eq!(naive, None),
            Ok(tokens) => {
                let plain = |bytes: Vec<u16>| bytes.iter().map(|c| *c as u8).collect::<Vec<u8>>();
                let naive: Vec<_> = naive.unwrap().into_iter()
                    .map(|(name, value)| (plain(name), value.map(plain)))
                    .collect();
                let tokens: Vec<_> = tokens.iter()
                    .map(|token| (unescape(token.name), token.value.map(unescape)))
                    .collect();
                prop_assert_eq!(tokens, naive);
            }
        }
    }
}

fn remount(text: &str) -> RemountOptions {
    RemountOptions::parse(text).unwrap()
}

#[test]
fn remount_text_is_recognized() {
    let is_requested = |text| RemountOptions::is_requested(text);
    assert_eq!(is_requested("ro,remount,basedir=/a"), Ok(true));
    assert_eq!(is_requested(r"ro,basedir=/a\,remount,x-remount"), Ok(false));
    assert_eq!(is_requested("remount=1"), Err(OptionsError::TakesNoValue("remount")));
    assert_eq!(RemountOptions::parse("remount=1"), Err(OptionsError::TakesNoValue("remount")));
}

#[test]
fn remount_text_returns_flags_and_other_options() {
    let options = remount("rw,remount,nosuid,noatime,sync,lowerdir+=/,index=off,volatile");
    assert_eq!(RemountOptions::parse("digest="), Err(OptionsError::NeedsValue("digest")));
    assert_eq!(options.flags.to_string(), "rw,nosuid,noatime,sync");
    assert!(options.names_atime && !options.names_dirsync);
    assert_eq!(
        options.others,
        [
            ("lowerdir+".into(), Some("/".into())),
            ("index".into(), Some("off".into())),
            ("volatile".into(), None),
        ],
    );
}

#[test]
fn remount_text_names_atime_and_dirsync() {
    for (text, atime, dirsync) in [
        ("ro,nosuid", false, false),
        ("relatime", true, false),
        ("atime", true, false),
        ("diratime", true, false),
        ("nodirsync", false, true),
    ] {
        let options = remount(text);
        assert_eq!((options.names_atime, options.names_dirsync), (atime, dirsync), "{text}");
    }
}

#[test]
fn remount_text_keeps_upperdir_without_workdir() {
    let options = remount("upperdir=/u");
    assert_eq!((options.upperdir, options.workdir), (Some("/u".into()), None));
}

#[test]
fn flags_are_read_from_words_of_the_kernel() {
    for (words, expected) in [
        ("ro,relatime,rw,lowerdir+", "ro,relatime"),
        ("rw,nosuid,nodev,rw", "rw,nosuid,nodev,strictatime"),
        (
            "rw,noexec,noatime,nodiratime,rw,sync,lazytime",
            "rw,noexec,nodiratime,noatime,sync,lazytime",
        ),
    ] {
        let flags = MountFlags::shown_as(words.split(',').map(OsStr::new));
        assert_eq!(flags.to_string(), expected);
    }
}

proptest! {
    #[test]
    fn any_remount_text_parses_without_panic(text in "[a-z=,\\\\:+./]{0,60}") {
        let _ = (RemountOptions::is_requested(&text), RemountOptions::parse(&text));
    }

    #[test]
    fn flags_of_remount_text_round_trip(bits in 0..2048_u32, atime in 0..3_usize) {
        let on = |bit: u32| bits & (1 << bit) != 0;
        let flags = MountFlags {
            read_only: on(0),
            attributes: MountAttributes {
                nosuid: on(1), nodev: on(2), noexec: on(3), nosymfollow: on(4), nodiratime: on(5),
            },
            atime: ATIMES[atime].2,
            superblock_flags: SuperblockFlags { sync: on(6), dirsync: on(7), lazytime: on(8), mand: on(9) },
        };
        prop_assert_eq!(remount(&flags.to_string()).flags, flags);
    }
}
