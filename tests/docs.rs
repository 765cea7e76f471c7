//! That what the documents name is there.

use std::fs;
use std::path::Path;

#[test]
fn every_test_named_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(root.join(path));
    let scenarios: String = fs::read_dir(root.join("vm-tests/src/guest"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let security = read("docs/security.md").unwrap();
    // Every other part is between backquotes.
    let named = security.split('`').skip(1).step_by(2).filter_map(|name| name.split_once("::"));
    let mut count = 0;
    for (file, test) in named.filter(|(file, _)| !file.contains("FILE") && *file != "vm") {
        // A suite is a file, or a directory with a main.rs.
        let path = match file.contains('/') {
            true => format!("{file}.rs"),
            false if root.join(format!("tests/{file}.rs")).exists() => format!("tests/{file}.rs"),
            false => format!("tests/{file}/main.rs"),
        };
        let source = read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(source.contains(&format!("fn {test}(")), "{path} has no {test}");
        count += 1;
    }
    let named = security.split('`').filter_map(|name| name.strip_prefix("vm::"));
    for scenario in named.filter(|name| *name != "SCENARIO") {
        assert!(scenarios.contains(&format!("\"{scenario}\"")), "there is no scenario {scenario}");
        count += 1;
    }
    assert!(count > 40, "{count} names were found");
}
