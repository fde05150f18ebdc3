//! The tokens of a template's tags, read without recursion.

use std::ops::Range;

use super::{MAX_ELIFS, MAX_TAG_TOKENS};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Name,
    Text,
    Number,
    Operator,
}

#[derive(Clone, Debug)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) at: Range<usize>,
}

/// One `{{ … }}` or `{% … %}`, its tokens in the list of all.
#[derive(Debug)]
pub(super) struct Tag {
    pub(super) is_block: bool,
    pub(super) tokens: Range<usize>,
    /// The place behind it, and its last characters: `%}`, `-%}`.
    pub(super) end: usize,
    pub(super) close: &'static str,
}

pub(super) struct Scan<'s> {
    pub(super) source: &'s str,
    pub(super) tokens: Vec<Token>,
    pub(super) tags: Vec<Tag>,
}

impl<'s> Scan<'s> {
    pub(super) fn new(source: &'s str) -> Result<Self, String> {
        let mut scan = Self { source, tokens: Vec::new(), tags: Vec::new() };
        let mut at = 0;
        let mut elifs = 0;
        while let Some(found) = source[at..].find('{') {
            let start = at + found;
            let inside = start + 2;
            match source.as_bytes().get(start + 1) {
                Some(b'#') => at = scan.end_of("#}", inside, "comment")?,
                Some(b'{') => at = scan.tag(false, inside)?,
                Some(b'%') => {
                    at = scan.tag(true, inside)?;
                    match scan.tags.last().map(|tag| scan.word(tag.tokens.start)) {
                        Some("raw") => at = scan.end_of_raw(at)?,
                        Some("elif") => elifs += 1,
                        _ => {}
                    }
                    if elifs > MAX_ELIFS {
                        return Err(scan.problem(start, format!("more than {MAX_ELIFS} elif")));
                    }
                }
                _ => at = start + 1,
            }
        }
        Ok(scan)
    }

    fn problem(&self, at: usize, what: String) -> String {
        format!("{what} (in {}:{})", super::super::DEFAULT, self.line(at))
    }

    pub(super) fn line(&self, at: usize) -> usize {
        1 + self.source.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count()
    }

    fn end_of(&self, mark: &str, from: usize, what: &str) -> Result<usize, String> {
        let end = self.source[from..].find(mark).map(|found| from + found + mark.len());
        end.ok_or_else(|| self.problem(from, format!("syntax error: unexpected end of {what}")))
    }

    /// Behind the `{% endraw %}`, whose spelling the engine checks.
    fn end_of_raw(&self, from: usize) -> Result<usize, String> {
        let mut at = from;
        loop {
            at = self.end_of("{%", at, "raw block")?;
            let rest = self.source[at..].trim_start_matches(['-', '+']).trim_start();
            if rest.starts_with("endraw") {
                return self.end_of("%}", at, "raw block");
            }
        }
    }

    /// Reads the tokens of a tag; returns the place behind it.
    fn tag(&mut self, is_block: bool, inside: usize) -> Result<usize, String> {
        let bytes = self.source.as_bytes();
        let end: &[u8] = if is_block { b"%}" } else { b"}}" };
        let first = self.tokens.len();
        let mut at = inside;
        let mut open = 0_usize;
        while at < bytes.len() {
            let byte = bytes[at];
            if byte.is_ascii_whitespace() || (at == inside && matches!(byte, b'-' | b'+')) {
                at += 1;
                continue;
            }
            let trimming = usize::from(matches!(byte, b'-' | b'+'));
            if open == 0 && bytes[at + trimming..].starts_with(end) {
                let behind = at + trimming + end.len();
                let close = match byte {
                    b'-' => "-%}",
                    b'+' => "+%}",
                    _ => "%}",
                };
                self.tags.push(Tag { is_block, tokens: first..self.tokens.len(), end: behind, close });
                return Ok(behind);
            }
            if self.tokens.len() - first == MAX_TAG_TOKENS {
                let what = format!("an expression of more than {MAX_TAG_TOKENS} tokens");
                return Err(self.problem(inside, what));
            }
            let (kind, len) = self.token(at)?;
            match byte {
                b'(' | b'[' | b'{' => open += 1,
                b')' | b']' | b'}' => open = open.saturating_sub(1),
                _ => {}
            }
            self.tokens.push(Token { kind, at: at..at + len });
            at += len;
        }
        Err(self.problem(inside, "syntax error: unexpected end of input in a tag".to_owned()))
    }

    fn token(&self, at: usize) -> Result<(Kind, usize), String> {
        let rest = &self.source[at..];
        let first = rest.chars().next().unwrap_or(' ');
        let run = |of: fn(char) -> bool| rest.find(|c| !of(c)).unwrap_or(rest.len());
        if first == '"' || first == '\'' {
            let mut escaped = false;
            for (offset, character) in rest.char_indices().skip(1) {
                match character {
                    _ if escaped => escaped = false,
                    '\\' => escaped = true,
                    _ if character == first => return Ok((Kind::Text, offset + 1)),
                    _ => {}
                }
            }
            return Err(self.problem(at, "syntax error: unexpected end of string".to_owned()));
        }
        if first == '_' || first.is_alphabetic() {
            return Ok((Kind::Name, run(|c| c == '_' || c.is_alphanumeric())));
        }
        if first.is_ascii_digit() {
            return Ok((Kind::Number, run(|c| c == '_' || c == '.' || c.is_ascii_alphanumeric())));
        }
        let two = ["//", "**", "==", "!=", ">=", "<="].iter().any(|operator| rest.starts_with(operator));
        Ok((Kind::Operator, if two { 2 } else { first.len_utf8() }))
    }

    /// A token's text; nothing beyond the last.
    pub(super) fn word(&self, token: usize) -> &'s str {
        self.tokens.get(token).map_or("", |token| &self.source[token.at.clone()])
    }

    pub(super) fn is(&self, token: usize, kind: Kind) -> bool {
        self.tokens.get(token).is_some_and(|token| token.kind == kind)
    }

    pub(super) fn start(&self, token: usize) -> usize {
        self.tokens[token].at.start
    }

    pub(super) fn end(&self, token: usize) -> usize {
        self.tokens[token].at.end
    }

    /// The token that closes the bracket at `open`, within the tag.
    pub(super) fn closing(&self, open: usize, tag: &Tag) -> Option<usize> {
        let mut depth = 0_usize;
        (open..tag.tokens.end).find(|&token| {
            match self.word(token) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth = depth.saturating_sub(1),
                _ => {}
            }
            depth == 0
        })
    }

    /// The first of some words within a tag and outside its brackets, behind `from`.
    pub(super) fn find_outside(&self, from: usize, end: usize, words: &[&str]) -> Option<usize> {
        let mut depth = 0_usize;
        (from + 1..end).find(|&token| {
            match self.word(token) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth = depth.saturating_sub(1),
                _ => {}
            }
            depth == 0 && words.contains(&self.word(token))
        })
    }

    /// The arguments between two brackets, as ranges of tokens.
    pub(super) fn arguments(&self, open: usize, close: usize) -> Vec<Range<usize>> {
        let mut arguments = Vec::new();
        let (mut depth, mut from) = (0_usize, open + 1);
        for token in open + 1..=close {
            match self.word(token) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" if token < close => depth = depth.saturating_sub(1),
                _ => {}
            }
            if token == close || (depth == 0 && self.word(token) == ",") {
                if from < token {
                    arguments.push(from..token);
                }
                from = token + 1;
            }
        }
        arguments
    }
}
