//! Splits Rust source text into tokens. Comments and strings are tokens too, because the rules about
//! English apply to both.

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Name,
    /// One character, or `::`.
    Sign,
    Comment,
    Text,
    /// A number, a character or a lifetime.
    Other,
}

#[derive(Clone, Debug)]
pub struct Token {
    pub kind: Kind,
    /// A comment without its slashes, a string without its quotes.
    pub text: String,
    pub line: usize,
}

impl Token {
    pub fn is_name(&self, name: &str) -> bool {
        self.kind == Kind::Name && self.text == name
    }

    pub fn is_sign(&self, sign: &str) -> bool {
        self.kind == Kind::Sign && self.text == sign
    }
}

pub fn tokens(source: &str) -> Vec<Token> {
    let mut lexer = Lexer { rest: source, line: 1, tokens: Vec::new() };
    while lexer.step() {}
    lexer.tokens
}

/// Returns the tokens that the compiler sees.
pub fn code(source: &str) -> Vec<Token> {
    tokens(source).into_iter().filter(|token| token.kind != Kind::Comment).collect()
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    tokens: Vec<Token>,
}

impl Lexer<'_> {
    /// Adds a token of the first `length` bytes. The range `inner` is the text of the token.
    fn push(&mut self, kind: Kind, length: usize, inner: std::ops::Range<usize>) {
        let text = self.rest[inner].to_owned();
        self.tokens.push(Token { kind, text, line: self.line });
        self.skip(length);
    }

    fn skip(&mut self, length: usize) {
        self.line += self.rest[..length].matches('\n').count();
        self.rest = &self.rest[length..];
    }

    /// Reads the next token or white space. Returns whether any text was left.
    fn step(&mut self) -> bool {
        let rest = self.rest;
        let Some(first) = rest.chars().next() else { return false };
        if first.is_whitespace() {
            self.skip(first.len_utf8());
        } else if rest.starts_with("//") {
            let length = rest.find('\n').unwrap_or(rest.len());
            let start = length - rest[..length].trim_start_matches(['/', '!']).len();
            self.push(Kind::Comment, length, start..length);
        } else if rest.starts_with("/*") {
            let length = block_comment(rest);
            self.push(Kind::Comment, length, 2..length.saturating_sub(2).max(2));
        } else if let Some((length, inner)) = string(rest) {
            self.push(Kind::Text, length, inner);
        } else if first == '\'' {
            let length = character_or_lifetime(rest);
            self.push(Kind::Other, length, 0..length);
        } else if first.is_alphabetic() || first == '_' {
            // The raw name `r#type` means the name `type`.
            let start = rest.len() - rest.strip_prefix("r#").unwrap_or(rest).len();
            let length = start + word(&rest[start..]);
            self.push(Kind::Name, length, start..length);
        } else if first.is_ascii_digit() {
            let length = word(rest);
            self.push(Kind::Other, length, 0..length);
        } else {
            let length = if rest.starts_with("::") { 2 } else { first.len_utf8() };
            self.push(Kind::Sign, length, 0..length);
        }
        true
    }
}

fn word(text: &str) -> usize {
    text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())
}

fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let rest = &text[at..];
        if rest.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    at
}

/// Returns the length of a string literal, and the range between the quotes.
fn string(text: &str) -> Option<(usize, std::ops::Range<usize>)> {
    let prefix = ["br", "cr", "r", "b", "c"]
        .into_iter()
        .find(|prefix| text.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(['"', '#'])));
    let prefix = prefix.unwrap_or_default();
    let rest = &text[prefix.len()..];
    if prefix.ends_with('r') {
        let hashes = rest.len() - rest.trim_start_matches('#').len();
        let start = prefix.len() + hashes + 1;
        let inner = rest[hashes..].strip_prefix('"')?;
        let end = inner.find(&format!("\"{}", &rest[..hashes])).unwrap_or(inner.len());
        return Some(((start + end + 1 + hashes).min(text.len()), start..start + end));
    }
    let inner = rest.strip_prefix('"')?;
    let start = prefix.len() + 1;
    let mut escaped = false;
    for (at, character) in inner.char_indices() {
        match character {
            '"' if !escaped => return Some((start + at + 1, start..start + at)),
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    Some((text.len(), start..text.len()))
}

fn character_or_lifetime(text: &str) -> usize {
    let mut characters = text.char_indices().skip(1);
    match (characters.next(), characters.next()) {
        (Some((_, '\\')), Some((at, escaped))) => {
            let after = at + escaped.len_utf8();
            text[after..].find('\'').map_or(text.len(), |end| after + end + 1)
        }
        (Some(_), Some((at, '\''))) => at + 1,
        _ => 1 + word(&text[1..]),
    }
}

mod tests {
    use super::*;

    #[test]
    fn tokens_keep_their_kind_text_and_line() {
        let source = "let a = b'x'; // one\nr#\"two \"quoted\"\"#;\n/* 3\n/* 4 */ */ 'a \"\\\"5\"";
        let found: Vec<_> =
            tokens(source).into_iter().map(|token| (token.kind, token.text, token.line)).collect();
        let expected = [
            (Kind::Name, "let", 1),
            (Kind::Name, "a", 1),
            (Kind::Sign, "=", 1),
            (Kind::Name, "b", 1),
            (Kind::Other, "'x'", 1),
            (Kind::Sign, ";", 1),
            (Kind::Comment, " one", 1),
            (Kind::Text, "two \"quoted\"", 2),
            (Kind::Sign, ";", 2),
            (Kind::Comment, " 3\n/* 4 */ ", 3),
            (Kind::Other, "'a", 4),
            (Kind::Text, "\\\"5", 4),
        ];
        assert_eq!(found, expected.map(|(kind, text, line)| (kind, text.to_owned(), line)));
    }

    #[test]
    fn raw_names_paths_and_escaped_quotes_are_read() {
        let texts: Vec<_> = code(r"r#fn::b '\'' '\u{27}' 0x41u8").into_iter().collect();
        let texts: Vec<_> = texts.iter().map(|token| token.text.as_str()).collect();
        assert_eq!(texts, ["fn", "::", "b", r"'\''", r"'\u{27}'", "0x41u8"]);
    }
}
