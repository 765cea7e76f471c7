//! Finds the imports between files, from the `mod` and `use` items and the paths in the code.
//!
//! A path counts for the file that defines the item, because the reader follows re-exports. A file that
//! has only `mod` and `pub use` items imports nothing. The reader skips items of `#[cfg(test)]`.

use std::collections::{BTreeMap, BTreeSet};

use super::source::{Kind, Token, code};

/// Path and content of each source file.
pub type Sources = BTreeMap<String, String>;

/// The imported files of each file. Each has the place of its first import, a file and a line.
pub type Imports = BTreeMap<String, BTreeMap<String, String>>;

/// The imports and the problems of the files of a project.
#[derive(Debug, Default)]
pub struct Findings {
    pub imports: Imports,
    /// Files that belong to no crate, missing modules, `#[path]`.
    pub problems: Vec<String>,
}

pub fn read(sources: &Sources) -> Findings {
    let mut findings = Findings::default();
    let mut seen = BTreeSet::new();
    for root in sources.keys().filter(|path| is_root(path)) {
        let mut tree = Tree { sources, modules: Vec::new(), seen: &mut seen, problems: Vec::new() };
        tree.add_file(root, 0, directory(root).to_owned());
        findings.problems.append(&mut tree.problems);
        let modules = tree.modules;
        for module in 0..modules.len() {
            let file = &modules[module].file;
            let imports = findings.imports.entry(file.clone()).or_default();
            for (path, line) in modules[module].imported_paths() {
                if let Some(found) = resolve(&modules, module, path, 0)
                    && modules[found].file != *file
                {
                    let place = || format!("{file}:{line}");
                    imports.entry(modules[found].file.clone()).or_insert_with(place);
                }
            }
        }
    }
    let unreached = sources.keys().filter(|path| !seen.contains(*path));
    findings.problems.extend(unreached.map(|path| format!("{path}: no crate has this file")));
    findings
}

/// Returns whether the file is the first file of a crate, by the rules of cargo.
fn is_root(path: &str) -> bool {
    let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
    let of_directory = directory.rsplit('/').next().unwrap_or_default();
    ["lib.rs", "main.rs", "build.rs"].contains(&name)
        || ["bin", "tests", "benches", "examples", "fuzz_targets"].contains(&of_directory)
}

fn directory(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(directory, _)| directory)
}

/// Returns a circle of files that import each other, with one import per line.
pub fn circle(imports: &Imports) -> Option<String> {
    fn visit<'a>(
        imports: &'a Imports,
        file: &'a str,
        path: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) -> Option<String> {
        if let Some(start) = path.iter().position(|other| *other == file) {
            let line =
                |(from, to): (&&str, &&str)| format!("{} imports {to}\n", imports[*from][*to]);
            let files = &path[start..];
            let next = files[1..].iter().chain([&files[0]]);
            return Some(files.iter().zip(next).map(line).collect());
        }
        if done.contains(file) {
            return None;
        }
        path.push(file);
        let found = imports
            .get(file)
            .and_then(|files| files.keys().find_map(|next| visit(imports, next, path, done)));
        path.pop();
        done.insert(file);
        found
    }
    let mut done = BTreeSet::new();
    imports.keys().find_map(|file| visit(imports, file, &mut Vec::new(), &mut done))
}

/// Returns the imports between neighbours, which are files and folders of one folder. A folder has the
/// imports of its files. A file counts as part of the folder that has its name without `.rs`.
pub fn between_neighbours(imports: &Imports) -> Imports {
    let mut found = Imports::new();
    for (file, imported) in imports {
        for (other, place) in imported {
            let parts: Vec<_> = file.trim_end_matches(".rs").split('/').collect();
            let other_parts: Vec<_> = other.trim_end_matches(".rs").split('/').collect();
            let same = parts.iter().zip(&other_parts).take_while(|(one, two)| one == two).count();
            // The file `a.rs` and the file `a/b.rs` count as one.
            if same < parts.len().min(other_parts.len()) {
                let [from, to] = [parts, other_parts].map(|parts| parts[..=same].join("/"));
                found.entry(from).or_default().entry(to).or_insert_with(|| place.clone());
            }
        }
    }
    found
}

/// Returns the imports of later stages by earlier stages in `directory`, and the stages that `order`
/// does not name. A stage is a folder, or a file without its `.rs`.
pub fn out_of_order(imports: &Imports, directory: &str, order: &[&str]) -> Vec<String> {
    let stage = |file: &str| -> Option<String> {
        let below = file.strip_prefix(directory)?;
        let first = below.split('/').next()?;
        Some(first.strip_suffix(".rs").unwrap_or(first).to_owned())
    };
    let place = |stage: &str| order.iter().position(|other| *other == stage);
    let mut problems = Vec::new();
    for (file, imported) in imports {
        let Some(stage_of_file) = stage(file) else { continue };
        let Some(place_of_file) = place(&stage_of_file) else {
            problems.push(format!("{file}: the order does not name {stage_of_file}"));
            continue;
        };
        for (other, place_of_import) in imported {
            let later = stage(other).filter(|stage| place(stage) > Some(place_of_file));
            problems
                .extend(later.map(|_| format!("{place_of_import} imports {other}, a later stage")));
        }
    }
    problems
}

#[derive(Debug)]
struct Module {
    file: String,
    parent: Option<usize>,
    children: BTreeMap<String, usize>,
    /// The imported names of `use` items, each with the path of the item.
    aliases: BTreeMap<String, Vec<String>>,
    /// The paths of glob imports.
    globs: Vec<Vec<String>>,
    /// The names of the items that the module defines.
    items: BTreeSet<String>,
    uses: Vec<Use>,
    /// Paths in the code.
    paths: Vec<(Vec<String>, usize)>,
    /// Names in the code that no path or method call has before them.
    names: BTreeSet<String>,
}

#[derive(Debug)]
struct Use {
    path: Vec<String>,
    /// `None` for a glob.
    name: Option<String>,
    is_public: bool,
    line: usize,
}

impl Module {
    /// Returns the imported paths, each with its line. A re-export counts only if the code of the
    /// module uses the name too.
    fn imported_paths(&self) -> impl Iterator<Item = (&[String], usize)> {
        let uses = self.uses.iter().filter(|item| {
            !item.is_public || item.name.as_ref().is_some_and(|name| self.names.contains(name))
        });
        let uses = uses.map(|item| (item.path.as_slice(), item.line));
        uses.chain(self.paths.iter().map(|(path, line)| (path.as_slice(), *line)))
    }
}

/// Returns the module that defines the item of a path, or `None` if another crate defines the item.
fn resolve(modules: &[Module], start: usize, path: &[String], depth: usize) -> Option<usize> {
    // Two `use` items can define each other.
    if depth > 20 {
        return None;
    }
    let (first, mut rest) = path.split_first()?;
    let mut module = match first.as_str() {
        "crate" => root(modules, start),
        "self" => start,
        "super" => modules[start].parent?,
        name => return named(modules, start, name, rest, depth),
    };
    while let Some((name, after)) = rest.split_first() {
        rest = after;
        match name.as_str() {
            "super" => module = modules[module].parent?,
            "self" => {}
            name => return named(modules, module, name, rest, depth).or(Some(module)),
        }
    }
    Some(module)
}

/// Returns the module that defines the item `name`, or `rest` below `name`, as seen from a module.
fn named(
    modules: &[Module],
    module: usize,
    name: &str,
    rest: &[String],
    depth: usize,
) -> Option<usize> {
    let Module { children, aliases, globs, items, .. } = &modules[module];
    if let Some(child) = children.get(name) {
        let Some((next, rest)) = rest.split_first() else { return Some(*child) };
        return named(modules, *child, next, rest, depth + 1).or(Some(*child));
    }
    if items.contains(name) {
        return Some(module);
    }
    if let Some(path) = aliases.get(name) {
        // A `use` item like `use name::name` refers to the crate `name`, not to its own path.
        if path[0] == name {
            return None;
        }
        let path: Vec<_> = path.iter().chain(rest).cloned().collect();
        return resolve(modules, module, &path, depth + 1);
    }
    globs.iter().filter(|path| path[0] != name).find_map(|path| {
        let target = resolve(modules, module, path, depth + 1)?;
        (target != module).then(|| named(modules, target, name, rest, depth + 1))?
    })
}

fn root(modules: &[Module], mut module: usize) -> usize {
    while let Some(parent) = modules[module].parent {
        module = parent;
    }
    module
}

struct Tree<'a> {
    sources: &'a Sources,
    modules: Vec<Module>,
    seen: &'a mut BTreeSet<String>,
    problems: Vec<String>,
}

impl Tree<'_> {
    /// Adds the module of a file. The files of its children are in `below`. Returns the number of the
    /// module.
    fn add_file(&mut self, file: &str, parent: usize, below: String) -> usize {
        self.seen.insert(file.to_owned());
        let tokens = code(&self.sources[file]);
        let is_first = self.modules.is_empty();
        let module = self.add(file, (!is_first).then_some(parent));
        self.read_module(&tokens, module, &below);
        module
    }

    fn add(&mut self, file: &str, parent: Option<usize>) -> usize {
        self.modules.push(Module {
            file: file.to_owned(),
            parent,
            children: BTreeMap::new(),
            aliases: BTreeMap::new(),
            globs: Vec::new(),
            items: BTreeSet::new(),
            uses: Vec::new(),
            paths: Vec::new(),
            names: BTreeSet::new(),
        });
        self.modules.len() - 1
    }

    fn read_module(&mut self, tokens: &[Token], module: usize, below: &str) {
        let mut at = 0;
        let mut is_public = false;
        let mut is_for_tests = false;
        while at < tokens.len() {
            let token = &tokens[at];
            if token.is_sign("#") {
                let end = attribute_end(tokens, at);
                let names: Vec<_> = tokens[at..end].iter().map(|token| &token.text[..]).collect();
                if names.starts_with(&["#", "[", "path", "="]) {
                    let file = &self.modules[module].file;
                    self.problems.push(format!("{file}:{}: #[path]", token.line));
                }
                is_for_tests |= names.starts_with(&["#", "[", "cfg", "(", "test", ")"])
                    || names.starts_with(&["#", "[", "cfg", "(", "all", "(", "test", ","]);
                at = end;
                continue;
            }
            if is_for_tests {
                is_for_tests = false;
                let end = item_end(tokens, at);
                self.skip_tests(&tokens[at..end], below);
                at = end;
                continue;
            }
            if token.is_name("pub") {
                is_public = true;
                at += 1;
                if tokens.get(at).is_some_and(|next| next.is_sign("(")) {
                    at = group_end(tokens, at);
                }
                continue;
            }
            let name = tokens.get(at + 1).filter(|next| next.kind == Kind::Name);
            match (token.kind.clone(), token.text.as_str(), name) {
                (Kind::Name, "mod", Some(name)) => {
                    at = self.read_mod(tokens, at, &name.text, module, below);
                }
                (Kind::Name, "use", _) if is_item_start(tokens, at) => {
                    let end = at + tokens[at..].iter().position(|t| t.is_sign(";")).unwrap_or(1);
                    self.read_use(&tokens[at + 1..end], module, is_public, token.line);
                    at = end;
                }
                (
                    Kind::Name,
                    "fn" | "struct" | "enum" | "trait" | "type" | "const" | "static" | "union",
                    Some(name),
                ) => {
                    self.modules[module].items.insert(name.text.clone());
                    at += 1;
                }
                (Kind::Name, ..) => at = self.read_path(tokens, at, module),
                _ => at += 1,
            }
            is_public = false;
        }
        // Only after the last item, the reader knows all names that a path can begin with.
        let Module { children, aliases, paths, .. } = &mut self.modules[module];
        paths.retain(|(path, _)| {
            ["crate", "self", "super"].contains(&path[0].as_str())
                || children.contains_key(&path[0])
                || aliases.contains_key(&path[0])
        });
    }

    /// Reads `mod name;` or `mod name { … }`. Returns the position after the item.
    fn read_mod(
        &mut self,
        tokens: &[Token],
        at: usize,
        name: &str,
        module: usize,
        below: &str,
    ) -> usize {
        let below = if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
        let file = self.modules[module].file.clone();
        let child = match tokens.get(at + 2) {
            Some(next) if next.is_sign("{") => {
                let end = group_end(tokens, at + 2);
                let child = self.add(&file, Some(module));
                self.read_module(&tokens[at + 3..end - 1], child, &below);
                self.modules[module].children.insert(name.to_owned(), child);
                return end;
            }
            _ => self.file_of(&below),
        };
        match child {
            Some(path) => {
                let child = self.add_file(&path, module, below);
                self.modules[module].children.insert(name.to_owned(), child);
            }
            None => {
                self.problems.push(format!("{file}:{}: no file of {name}", tokens[at].line));
            }
        }
        at + 2
    }

    fn file_of(&self, below: &str) -> Option<String> {
        let paths = [format!("{below}.rs"), format!("{below}/mod.rs")];
        paths.into_iter().find(|path| self.sources.contains_key(path))
    }

    /// Marks a file that has only tests as part of the crate, without reading the imports of the file.
    fn skip_tests(&mut self, tokens: &[Token], below: &str) {
        if let [first, name, end] = tokens
            && first.is_name("mod")
            && end.is_sign(";")
            && let Some(path) = self.file_of(&format!("{below}/{}", name.text))
        {
            self.seen.insert(path);
        }
    }

    fn read_use(&mut self, tokens: &[Token], module: usize, is_public: bool, line: usize) {
        // `use ::name::…` imports from another crate.
        if tokens.first().is_some_and(|first| first.is_sign("::")) {
            return;
        }
        let mut found = Vec::new();
        flatten(tokens, &[], &mut found);
        for (path, name) in found {
            let module = &mut self.modules[module];
            match &name {
                Some(name) => drop(module.aliases.insert(name.clone(), path.clone())),
                None => module.globs.push(path.clone()),
            }
            module.uses.push(Use { path, name, is_public, line });
        }
    }

    /// Reads a name, or several names joined by `::`. Returns the position after the last name.
    fn read_path(&mut self, tokens: &[Token], at: usize, module: usize) -> usize {
        let mut path = vec![tokens[at].text.clone()];
        let mut end = at + 1;
        while let [separator, name, ..] = &tokens[end..]
            && separator.is_sign("::")
            && name.kind == Kind::Name
        {
            path.push(name.text.clone());
            end += 2;
        }
        let is_continued = at > 0 && (tokens[at - 1].is_sign(".") || tokens[at - 1].is_sign("::"));
        if !is_continued {
            self.modules[module].names.insert(path[0].clone());
            if path.len() > 1 {
                self.modules[module].paths.push((path, tokens[at].line));
            }
        }
        end
    }
}

/// Returns whether `use` starts an item. `use<…>` captures lifetimes.
fn is_item_start(tokens: &[Token], at: usize) -> bool {
    !tokens.get(at + 1).is_some_and(|next| next.is_sign("<"))
}

fn attribute_end(tokens: &[Token], at: usize) -> usize {
    let start = at + 1 + usize::from(tokens.get(at + 1).is_some_and(|next| next.is_sign("!")));
    match tokens.get(start) {
        Some(next) if next.is_sign("[") => group_end(tokens, start),
        _ => at + 1,
    }
}

/// Returns the position after the bracket that closes the bracket at `at`.
fn group_end(tokens: &[Token], at: usize) -> usize {
    let mut depth = 0;
    for (number, token) in tokens.iter().enumerate().skip(at).filter(|(_, t)| t.kind == Kind::Sign)
    {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return number + 1;
        }
    }
    tokens.len()
}

/// Returns the position after the semicolon or the body of an item.
fn item_end(tokens: &[Token], mut at: usize) -> usize {
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            ";" if tokens[at].kind == Kind::Sign => return at + 1,
            "{" if tokens[at].kind == Kind::Sign => return group_end(tokens, at),
            "(" | "[" if tokens[at].kind == Kind::Sign => at = group_end(tokens, at),
            _ => at += 1,
        }
    }
    at
}

/// Lists the paths of a `use` item, each with the imported name, or `None` for a glob.
fn flatten(tokens: &[Token], before: &[String], found: &mut Vec<(Vec<String>, Option<String>)>) {
    let mut path = before.to_vec();
    let mut at = 0;
    while at < tokens.len() {
        let token = &tokens[at];
        if token.is_sign("{") {
            let end = group_end(tokens, at) - 1;
            let mut start = at + 1;
            let mut depth = 0;
            for number in at + 1..=end {
                match tokens[number].text.as_str() {
                    "{" => depth += 1,
                    "}" if number < end => depth -= 1,
                    _ => {}
                }
                if number == end || depth == 0 && tokens[number].is_sign(",") {
                    flatten(&tokens[start..number], &path, found);
                    start = number + 1;
                }
            }
            return;
        } else if token.is_sign("*") {
            return found.push((path, None));
        } else if token.is_name("as") {
            let name = tokens.get(at + 1).map(|name| name.text.clone()).unwrap_or_default();
            return found.push((path, Some(name)));
        } else if token.kind == Kind::Name && (path.is_empty() || token.text != "self") {
            path.push(token.text.clone());
        }
        at += 1;
    }
    if let Some(name) = path.last().cloned().filter(|_| !tokens.is_empty()) {
        found.push((path, Some(name)));
    }
}

mod tests {
    use super::*;

    fn imports(files: &[(&str, &str)]) -> Imports {
        let sources = files.iter().map(|(path, text)| (path.to_string(), text.to_string()));
        let findings = read(&sources.collect());
        assert_eq!(findings.problems, [""; 0]);
        findings.imports
    }

    #[track_caller]
    fn assert_circle(files: &[(&str, &str)], expected: &str) {
        assert_eq!(circle(&imports(files)).as_deref(), Some(expected));
    }

    #[track_caller]
    fn assert_no_circle(files: &[(&str, &str)]) {
        assert_eq!(circle(&imports(files)), None);
    }

    #[test]
    fn use_items_that_form_a_circle_are_reported() {
        let files = [
            ("src/lib.rs", "mod a;\nmod b;\nmod c;"),
            ("src/a.rs", "\nuse crate::b::{self, Thing as Other};"),
            ("src/b.rs", "use std::fs;\nuse super::{c::Last, fs as _};"),
            ("src/c.rs", "fn f() {\n    crate::a::f();\n}"),
        ];
        let expected = "src/a.rs:2 imports src/b.rs\nsrc/b.rs:2 imports src/c.rs\n\
                        src/c.rs:2 imports src/a.rs\n";
        assert_circle(&files, expected);
    }

    #[test]
    fn parent_that_calls_its_child_forms_a_circle() {
        let files = [
            ("src/lib.rs", "mod a;"),
            ("src/a/mod.rs", "mod b;\npub struct A;\nfn f() { b::g() }"),
            ("src/a/b.rs", "use super::A;"),
        ];
        assert_circle(
            &files,
            "src/a/b.rs:1 imports src/a/mod.rs\nsrc/a/mod.rs:3 imports src/a/b.rs\n",
        );
    }

    #[test]
    fn re_export_counts_if_its_module_uses_it() {
        let child = ("src/b.rs", "pub struct B;\nuse crate::A;");
        let facade = "mod b;\npub use b::B;\npub struct A";
        assert_no_circle(&[("src/lib.rs", &format!("{facade};")), child]);
        assert_circle(
            &[("src/lib.rs", &format!("{facade} {{ b: B }}")), child],
            "src/b.rs:2 imports src/lib.rs\nsrc/lib.rs:2 imports src/b.rs\n",
        );
    }

    #[test]
    fn re_exports_are_followed_to_the_file_that_defines() {
        let lib = ("src/lib.rs", "mod a;\nmod b;\npub use a::*;\npub use b::B;");
        assert_no_circle(&[
            lib,
            ("src/a.rs", "pub struct A;"),
            ("src/b.rs", "use crate::A;\npub struct B;"),
        ]);
        assert_circle(
            &[
                lib,
                ("src/a.rs", "use crate::B;\npub struct A;"),
                ("src/b.rs", "use crate::A;\npub struct B;"),
            ],
            "src/a.rs:1 imports src/b.rs\nsrc/b.rs:1 imports src/a.rs\n",
        );
    }

    #[test]
    fn paths_through_an_imported_module_count() {
        let files = [
            ("src/lib.rs", "mod a;\nmod b;"),
            ("src/a/mod.rs", "pub mod c;"),
            ("src/a/c.rs", "fn f() { super::super::b::g(); }"),
            ("src/b.rs", "use crate::a;\nfn g() -> a::c::C { todo!() }"),
        ];
        assert_circle(&files, "src/a/c.rs:1 imports src/b.rs\nsrc/b.rs:2 imports src/a/c.rs\n");
    }

    #[test]
    fn tests_comments_and_strings_import_nothing() {
        assert_no_circle(&[
            ("src/lib.rs", "mod a;\nmod b;"),
            ("src/a.rs", "use crate::b::B; // crate::b::c()"),
            (
                "src/b.rs",
                "/// [`crate::a::A`]\nconst B: &str = \"use crate::a;\";\n\
                 #[cfg(test)]\nmod tests { use crate::a::A; }\n\
                 #[cfg(test)]\nfn for_tests() { crate::a::f() }",
            ),
        ]);
    }

    #[test]
    fn inline_modules_belong_to_their_file() {
        let files = [
            ("src/lib.rs", "mod a;\nmod b;"),
            ("src/a.rs", "mod inner {\n    use super::super::b::B;\n}"),
            ("src/b.rs", "use crate::a::inner::I;"),
        ];
        assert_circle(&files, "src/a.rs:2 imports src/b.rs\nsrc/b.rs:1 imports src/a.rs\n");
    }

    #[test]
    fn other_crates_of_the_same_name_are_not_imported() {
        assert_no_circle(&[
            ("src/lib.rs", "mod digest;\nmod tree;"),
            ("src/digest.rs", "use sha2::digest::Output;\nuse crate::tree::T;"),
            (
                "src/tree.rs",
                "use sha2::Digest as _;\nuse ::digest::Update;\nuse std::fs;\nfs::f();",
            ),
        ]);
    }

    #[test]
    fn lost_files_and_path_attributes_are_reported() {
        let sources: Sources = [
            ("tests/a.rs", "#[path = \"b/c.rs\"]\nmod c;"),
            ("tests/b/c.rs", ""),
            ("tests/d/main.rs", "mod e;\n#[cfg(test)]\nmod f;"),
            ("tests/d/e.rs", ""),
            ("tests/d/f.rs", ""),
        ]
        .map(|(path, text)| (path.to_owned(), text.to_owned()))
        .into();
        let expected = [
            "tests/a.rs:1: #[path]",
            "tests/a.rs:2: no file of c",
            "tests/b/c.rs: no crate has this file",
        ];
        assert_eq!(read(&sources).problems, expected);
    }

    #[test]
    fn folders_that_form_a_circle_are_reported() {
        let imports = imports(&[
            ("src/lib.rs", "mod a;\nmod b;"),
            ("src/a/mod.rs", "mod c;\nmod d;"),
            ("src/a/c.rs", "use super::d::D;\nuse crate::b::B;"),
            ("src/a/d.rs", ""),
            ("src/b.rs", "use crate::a::d::D;"),
        ]);
        assert_eq!(circle(&imports), None);
        let expected = "src/a/c.rs:2 imports src/b\nsrc/b.rs:1 imports src/a\n";
        assert_eq!(circle(&between_neighbours(&imports)).as_deref(), Some(expected));
    }

    #[test]
    fn stages_import_only_earlier_stages() {
        let imports = imports(&[
            ("src/lib.rs", "mod first;\nmod second;\nmod third;"),
            ("src/first/mod.rs", "use crate::second::S;"),
            ("src/second.rs", "use crate::third::T;"),
            ("src/third.rs", "use crate::first::F;"),
        ]);
        let expected = [
            "src/first/mod.rs:1 imports src/second.rs, a later stage",
            "src/third.rs: the order does not name third",
        ];
        assert_eq!(out_of_order(&imports, "src/", &["first", "second", "lib"]), expected);
    }
}
