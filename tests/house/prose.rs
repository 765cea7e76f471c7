//! Finds phrases without an actor or without a noun, and test names that are too long.

use super::source::{Kind, code, tokens};

/// The banned phrases. Replace a phrase with the actor, the noun, or a plain negation.
pub const PHRASES: [&str; 17] = [
    "all that",
    "are none",
    "are told",
    "is asked for",
    "is none",
    "is told",
    "ladder",
    "ladders",
    "nobody",
    "rung",
    "rungs",
    "somebody",
    "such a one",
    "that of",
    "those of",
    "what is done",
    "whoever",
];

/// The maximum length of a test name, in bytes.
const TEST_NAME_MAX: usize = 50;

/// The parts of a file that are English.
#[derive(Clone, Copy, Debug)]
pub enum Language {
    /// The comments and the strings.
    Rust,
    /// Everything.
    Markdown,
    /// Everything except the escapes.
    Manual,
}

impl Language {
    pub fn of(path: &str) -> Option<Language> {
        match path.rsplit_once('.')?.1 {
            "rs" => Some(Language::Rust),
            "md" => Some(Language::Markdown),
            "8" => Some(Language::Manual),
            _ => None,
        }
    }
}

/// A phrase in a text, and its line.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    pub phrase: &'static str,
    pub line: usize,
}

pub fn phrases(text: &str, language: Language) -> Vec<Found> {
    match language {
        Language::Markdown => in_words(&words(text, 1)),
        Language::Manual => in_words(&words(&without_escapes(text), 1)),
        Language::Rust => in_rust(text),
    }
}

fn in_rust(source: &str) -> Vec<Found> {
    let tokens = tokens(source);
    let mut found = Vec::new();
    // A phrase can span the lines of a comment.
    let is_comment = |kind: &Kind| *kind == Kind::Comment;
    for group in tokens.chunk_by(|one, next| is_comment(&one.kind) && is_comment(&next.kind)) {
        let mut all = Vec::new();
        for token in group {
            match token.kind {
                Kind::Comment => all.extend(words(&token.text, token.line)),
                Kind::Text => all.extend(words(&without_string_escapes(&token.text), token.line)),
                _ => {}
            }
        }
        found.extend(in_words(&all));
    }
    found
}

/// A word in lower case.
#[derive(Debug)]
struct Word {
    text: String,
    line: usize,
    /// Whether only white space lies between the previous word and the word.
    follows: bool,
}

fn words(text: &str, first_line: usize) -> Vec<Word> {
    let mut words = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let mut follows = true;
        for part in line.split_inclusive(|c: char| !is_of_word(c)) {
            let word = part.trim_end_matches(|c| !is_of_word(c));
            if !word.is_empty() {
                let text = word.to_lowercase().replace('’', "'");
                let text = text.trim_matches('\'');
                let text = text.strip_suffix("'s").unwrap_or(text).to_owned();
                words.push(Word { text, line: first_line + number, follows });
                follows = true;
            }
            follows &= part[word.len()..].chars().all(char::is_whitespace);
        }
        // A new line counts as white space, except after a sign.
        if !follows {
            words.push(Word { text: String::new(), line: first_line + number, follows });
        }
    }
    words
}

fn is_of_word(character: char) -> bool {
    character.is_alphanumeric() || "_'’-".contains(character)
}

fn in_words(words: &[Word]) -> Vec<Found> {
    let mut found = Vec::new();
    for start in 0..words.len() {
        found.extend(PHRASES.into_iter().filter_map(|phrase| {
            let wanted: Vec<_> = phrase.split(' ').collect();
            let there = words[start..].get(..wanted.len())?;
            let is_same = there.iter().zip(&wanted).all(|(word, wanted)| word.text == *wanted);
            let is_whole = there.iter().skip(1).all(|word| word.follows);
            (is_same && is_whole).then_some(Found { phrase, line: words[start].line })
        }));
    }
    found
}

/// Replaces each escape with a sign, and removes the backslash at the end of a line.
fn without_string_escapes(text: &str) -> String {
    let mut plain = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => match characters.next() {
                Some('\n') => plain.push('\n'),
                _ => plain.push('|'),
            },
            character => plain.push(character),
        }
    }
    plain
}

/// Removes fonts, and replaces the macro at the start of a line with a sign.
fn without_escapes(manual: &str) -> String {
    let plain = ["\\fB", "\\fI", "\\fR", "\\fP"]
        .iter()
        .fold(manual.replace("\\-", "-"), |text, font| text.replace(font, ""));
    let without_macro = |line: &str| match line.strip_prefix('.') {
        // The macro sets the font of the whole line.
        Some(rest) if rest.starts_with("B ") || rest.starts_with("I ") => rest[2..].to_owned(),
        Some(rest) => match rest.split_once(' ') {
            Some((_, rest)) => format!(". {rest} ."),
            None => ".".to_owned(),
        },
        None => line.to_owned(),
    };
    plain.lines().map(without_macro).collect::<Vec<_>>().join("\n")
}

/// Returns the names that are too long, with their lines.
pub fn long_test_names(source: &str) -> Vec<(String, usize)> {
    let tokens = code(source);
    let mut found = Vec::new();
    let mut is_test = false;
    for (number, token) in tokens.iter().enumerate() {
        let is_attribute = || {
            number >= 2
                && tokens[number - 2].is_sign("#")
                && tokens[number - 1].is_sign("[")
                && tokens.get(number + 1).is_some_and(|next| next.is_sign("]"))
        };
        is_test |= token.is_name("test") && is_attribute();
        if is_test && token.is_name("fn") {
            is_test = false;
            let name = tokens.get(number + 1).filter(|name| name.text.len() > TEST_NAME_MAX);
            found.extend(name.map(|name| (name.text.clone(), name.line)));
        }
    }
    found
}

mod tests {
    use super::*;

    fn found(text: &str, language: Language) -> Vec<(&'static str, usize)> {
        phrases(text, language).into_iter().map(|found| (found.phrase, found.line)).collect()
    }

    #[test]
    fn phrases_in_comments_and_strings_are_found() {
        let source = "/// Returns what is\n/// done, whoever asks.\nfn that_of() {}\n\
                      // All that is nobody's.\n\nconst A: &str = \"\\nthose \\\n    of; is_none\";\n";
        let expected =
            [("what is done", 1), ("whoever", 2), ("all that", 4), ("nobody", 4), ("those of", 6)];
        assert_eq!(found(source, Language::Rust), expected);
    }

    #[test]
    fn clean_text_passes() {
        let source = "/// All of that, of those. Is, none; that `of`. A nobody-like user.\n\
                      fn f(is: u8, none: u8) { nobody(all, that); x.is_none() }\n\
                      // It is\nfn none() {}\nconst A: &str = \"is\"; const B: &str = \"none\";";
        assert_eq!(found(source, Language::Rust), []);
        assert_eq!(found("# That\n\nof the image\n", Language::Markdown), [("that of", 1)]);
        assert_eq!(found("| that | of |\n\n- all,\n  that\n", Language::Markdown), []);
    }

    #[test]
    fn phrases_in_documents_are_found() {
        let text = "Text\nwith THAT\nOF an image, and\nsomebody.\n";
        assert_eq!(found(text, Language::Markdown), [("that of", 2), ("somebody", 4)]);
        let manual = ".SH NAME\nthis is \\fBnone\\fR\n.B whoever\n.TP that\nof\n";
        assert_eq!(found(manual, Language::Manual), [("is none", 2), ("whoever", 3)]);
    }

    #[test]
    fn long_names_of_tests_are_found() {
        let long = "a".repeat(TEST_NAME_MAX + 1);
        let source = format!(
            "#[test]\nfn short() {{}}\nfn {long}() {{}}\n#[test]\n#[ignore = \"why\"]\n\
             fn {long}() {{}}"
        );
        assert_eq!(long_test_names(&source), [(long, 6)]);
        assert_eq!(long_test_names(&format!("#[test]\nfn {}() {{}}", "a".repeat(50))), []);
    }
}
