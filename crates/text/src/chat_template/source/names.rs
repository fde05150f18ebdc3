//! What a template uses of the environment.

use std::collections::BTreeSet;

use super::scan::{Kind, Scan};

/// Names that a template uses, each with the line where it was first seen.
#[derive(Debug, Default)]
pub(in crate::chat_template) struct Names {
    pub(in crate::chat_template) filters: Vec<(String, usize)>,
    pub(in crate::chat_template) tests: Vec<(String, usize)>,
    /// Called as `x.name(…)`.
    pub(in crate::chat_template) methods: Vec<(String, usize)>,
    /// Called as `name(…)` and mentioned nowhere else.
    pub(in crate::chat_template) functions: Vec<(String, usize)>,
}

impl Scan<'_> {
    pub(super) fn names(&self) -> Names {
        let mut names = Names::default();
        let mut seen = BTreeSet::new();
        let mut mentioned = BTreeSet::new();
        let mut called = Vec::new();
        for tag in &self.tags {
            for token in tag.tokens.clone().filter(|&token| self.is(token, Kind::Name)) {
                let word = self.word(token);
                let before = if token > tag.tokens.start { self.word(token - 1) } else { "" };
                let earlier = if token > tag.tokens.start + 1 { self.word(token - 2) } else { "" };
                let calls = self.word(token + 1) == "(" && token + 1 < tag.tokens.end;
                let statement = tag.is_block && token == tag.tokens.start;
                let list = match (before, earlier) {
                    _ if statement || KEYWORDS.contains(&word) => continue,
                    ("|", _) => Some(&mut names.filters),
                    ("is", _) | ("not", "is") => Some(&mut names.tests),
                    (".", _) if calls => Some(&mut names.methods),
                    (".", _) => continue,
                    _ if calls && before != "macro" => {
                        called.push((word, token));
                        continue;
                    }
                    _ => None,
                };
                match list {
                    None => drop(mentioned.insert(word)),
                    Some(list) => {
                        if seen.insert((before == ".", before == "|", word)) {
                            list.push((word.to_owned(), self.line(self.start(token))));
                        }
                    }
                }
            }
            if tag.is_block && self.word(tag.tokens.start) == "filter" {
                let name = tag.tokens.start + 1;
                names.filters.push((self.word(name).to_owned(), self.line(self.start(tag.tokens.start))));
            }
        }
        for (word, token) in called {
            if !mentioned.contains(word) && seen.insert((true, true, word)) {
                names.functions.push((word.to_owned(), self.line(self.start(token))));
            }
        }
        names
    }
}

const KEYWORDS: [&str; 18] = [
    "and",
    "or",
    "not",
    "in",
    "is",
    "if",
    "else",
    "elif",
    "for",
    "set",
    "recursive",
    "true",
    "false",
    "none",
    "True",
    "False",
    "None",
    "call",
];
