//! Checks the project's own rules: imports form no circle, `unsafe` stays in its crates, the English is
//! plain, and no file names a directory of a developer's machine.

mod imports;
mod prose;
mod source;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use imports::Sources;
use prose::Language;

/// The stages of src/. Each stage imports only earlier stages. A stage is a folder or a file.
const STAGES: [&str; 20] = [
    "util", "kernel", "location", "digest", "image", "source", "erofs", "objects", "overlay",
    "attach", "options", "record", "remount", "error", "event", "mount", "boot", "fuzzing", "lib",
    "bin",
];

/// The directories whose code may be `unsafe`.
const UNSAFE: [&str; 2] = ["sys/", "capi/"];

/// Files that may keep a phrase of [`prose::PHRASES`]: file, phrase, reason.
const EXCEPTIONS: [(&str, &str, &str); 3] = [
    ("CHANGELOG.md", "rung", "the table of renamed types"),
    ("CONTRIBUTING.md", "ladder", "the table of words to avoid"),
    ("CONTRIBUTING.md", "rung", "the table of words to avoid"),
];

/// The files that list phrases.
const PHRASES_AS_DATA: [&str; 2] = ["tests/house/main.rs", "tests/house/prose.rs"];

/// Directories of a developer's machine, written in parts so that this file passes the test.
const MACHINE_PATHS: [&str; 2] = [concat!("/wo", "rk/"), concat!("/ro", "ot/")];

/// Directories that git ignores, and inputs of the fuzzers and the tests.
const SKIPPED: [&str; 8] = [
    ".git",
    "target",
    "fuzz/artifacts",
    "fuzz/corpus",
    "fuzz/coverage",
    "fuzz/target",
    "fuzz/work",
    "tests/images",
];

/// Reads each text file of the project.
fn files() -> Sources {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Sources::new();
    let mut directories = vec![String::new()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(root.join(&directory)).unwrap() {
            let entry = entry.unwrap();
            let path = format!("{directory}{}", entry.file_name().to_str().unwrap());
            if SKIPPED.contains(&path.as_str()) {
                continue;
            }
            if entry.file_type().unwrap().is_dir() {
                directories.push(format!("{path}/"));
            } else if let Ok(text) = fs::read_to_string(entry.path()) {
                files.insert(path, text);
            }
        }
    }
    files
}

fn rust_files() -> Sources {
    let mut files = files();
    files.retain(|path, _| path.ends_with(".rs"));
    assert!(files.contains_key("src/lib.rs") && files.contains_key("tests/house/main.rs"));
    files
}

/// Fails and prints the findings unless the list is empty.
#[track_caller]
fn assert_none(findings: impl IntoIterator<Item = String>) {
    let findings: Vec<_> = findings.into_iter().collect();
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

#[track_caller]
fn assert_no_circle(sources: &Sources) {
    let findings = imports::read(sources);
    assert_none(findings.problems);
    assert_none(imports::circle(&findings.imports));
    assert_none(imports::circle(&imports::between_neighbours(&findings.imports)));
}

fn is_in_src(path: &str) -> bool {
    path.starts_with("src/")
}

#[test]
fn imports_form_no_circle() {
    let mut sources = rust_files();
    sources.retain(|path, _| !is_in_src(path));
    assert_no_circle(&sources);
}

#[test]
fn imports_in_src_form_no_circle() {
    let mut sources = rust_files();
    sources.retain(|path, _| is_in_src(path));
    assert_no_circle(&sources);
}

#[test]
fn stages_import_only_earlier_stages() {
    let mut sources = rust_files();
    sources.retain(|path, _| is_in_src(path));
    assert_none(imports::out_of_order(&imports::read(&sources).imports, "src/", &STAGES));
}

#[test]
fn unsafe_is_in_its_crates_alone() {
    let is_allowed = |path: &str| UNSAFE.iter().any(|allowed| path.starts_with(allowed));
    for (path, text) in rust_files().iter().filter(|(path, _)| !is_allowed(path)) {
        assert_none(unsafe_lines(text).map(|line| format!("{path}:{line}: unsafe")));
    }
}

fn unsafe_lines(text: &str) -> impl Iterator<Item = usize> {
    source::code(text).into_iter().filter(|token| token.is_name("unsafe")).map(|token| token.line)
}

#[test]
fn unsafe_is_found_in_code_alone() {
    let text = "// unsafe\n#![forbid(unsafe_code)]\nfn f() { let a = \"unsafe\";\nunsafe { g() } }";
    assert_eq!(unsafe_lines(text).collect::<Vec<_>>(), [4]);
}

#[test]
fn english_is_plain() {
    let mut used = BTreeSet::new();
    let mut problems = Vec::new();
    for (path, text) in files().iter().filter(|(path, _)| !PHRASES_AS_DATA.contains(&path.as_str()))
    {
        let Some(language) = Language::of(path) else { continue };
        for found in prose::phrases(text, language) {
            let is_this = |(file, phrase, _): &(&str, &str, &str)| {
                (*file, *phrase) == (path.as_str(), found.phrase)
            };
            match EXCEPTIONS.iter().position(is_this) {
                Some(number) => drop(used.insert(number)),
                None => problems.push(format!("{path}:{}: {:?}", found.line, found.phrase)),
            }
        }
    }
    let unused = (0..EXCEPTIONS.len()).filter(|number| !used.contains(number));
    problems.extend(unused.map(|number| format!("not needed: {:?}", EXCEPTIONS[number])));
    assert_none(problems);
}

#[test]
fn names_of_tests_are_short() {
    assert_none(rust_files().iter().flat_map(|(path, text)| {
        let found = prose::long_test_names(text).into_iter();
        found.map(move |(name, line)| format!("{path}:{line}: {name}: {} bytes", name.len()))
    }));
}

#[test]
fn paths_of_a_machine_are_not_in_files() {
    assert_none(files().iter().flat_map(|(path, text)| {
        machine_paths(text).map(move |line| format!("{path}:{line}: a path of a machine"))
    }));
}

fn machine_paths(text: &str) -> impl Iterator<Item = usize> {
    let has_path = |line: &str| {
        MACHINE_PATHS.iter().any(|path| {
            // The path is not part of a longer path.
            let is_absolute = |at: usize| {
                !line[..at].ends_with(|c: char| c.is_alphanumeric() || "}).-_~*".contains(c))
            };
            line.match_indices(path).any(|(at, _)| is_absolute(at))
        })
    };
    text.lines().enumerate().filter(move |(_, line)| has_path(line)).map(|(number, _)| number + 1)
}

#[test]
fn paths_of_a_machine_are_found() {
    let [one, other] = MACHINE_PATHS;
    let text = format!("first\ncd {one}x\na{one}, {{a}}{other}, sys{other}\n\"{other}.cargo\"\n");
    assert_eq!(machine_paths(&text).collect::<Vec<_>>(), [2, 4]);
}
