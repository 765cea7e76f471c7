//! Checks that the tests and the scenarios that the documents name exist.

use std::fs;
use std::path::{Path, PathBuf};

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Returns the texts between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Returns the names of the scenarios of the virtual machine tests. Unlike the name of a
/// machine or a disk, the name of a scenario has an underscore.
fn scenarios() -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path("vm-tests/src/guest")).unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let source = fs::read_to_string(file).unwrap();
        for start in ["name: \"", "scenario(\""] {
            let found = source.split(start).skip(1).filter_map(|rest| rest.split('"').next());
            names.extend(found.filter(|name| name.contains('_')).map(str::to_owned));
        }
    }
    names
}

#[test]
fn security_md_uses_only_existing_test_names() {
    let scenarios = scenarios();
    let security = read("docs/security.md");
    let named = quoted(&security).filter_map(|name| name.split_once("::"));
    let mut count = 0;
    for (file, test) in named.filter(|(file, _)| !file.contains("FILE") && *file != "vm") {
        // A suite is a file or a directory with a main.rs.
        let suite = match file.contains('/') {
            true => format!("{file}.rs"),
            false if path(&format!("tests/{file}.rs")).exists() => format!("tests/{file}.rs"),
            false => format!("tests/{file}/main.rs"),
        };
        assert!(read(&suite).contains(&format!("fn {test}(")), "{suite} has no test {test}");
        count += 1;
    }
    let named = quoted(&security).filter_map(|name| name.strip_prefix("vm::"));
    for scenario in named.filter(|name| *name != "SCENARIO") {
        assert!(scenarios.iter().any(|name| name == scenario), "there is no scenario {scenario}");
        count += 1;
    }
    assert!(count > 40, "security.md names only {count} tests");
}

/// Only the tables whose last column has one of these titles name scenarios.
const TITLES: [&str; 2] = ["proved by", "scenario"];

#[test]
fn kernel_features_md_uses_only_existing_scenarios() {
    let scenarios = scenarios();
    let exists = |wanted: &str| match wanted.strip_suffix('*') {
        Some(start) => !start.is_empty() && scenarios.iter().any(|name| name.starts_with(start)),
        None => scenarios.iter().any(|name| name == wanted),
    };
    let document = read("docs/kernel-features.md");
    let (mut titles, mut count) = (0, 0);
    let mut missing = Vec::new();
    let mut names_scenarios = false;
    let mut was_row = false;
    for line in document.lines() {
        let row = line.trim().strip_prefix('|').and_then(|row| row.strip_suffix('|'));
        let is_first_row = row.is_some() && !was_row;
        was_row = row.is_some();
        let Some(cell) = row.and_then(|row| row.rsplit('|').next()) else { continue };
        if is_first_row {
            names_scenarios = TITLES.contains(&cell.trim());
            titles += usize::from(names_scenarios);
        } else if names_scenarios {
            let names: Vec<_> = quoted(cell).collect();
            count += names.len();
            missing.extend(names.into_iter().filter(|name| !exists(name)));
        }
    }
    assert!(missing.is_empty(), "scenarios that do not exist: {missing:?}");
    assert_eq!(titles, TITLES.len(), "kernel-features.md has other tables");
    assert!(count > 40, "kernel-features.md names only {count} scenarios");
}
