//! A template's source before the engine sees it: bounded, and rewritten where Jinja says more than the
//! engine parses.
//!
//! The engine parses by recursion and guards only some of it: a chain of a hundred thousand `+` or `elif`
//! is a tree of that depth, and a thread's stack ends before it. Here every expression is counted in
//! tokens, without recursion, before anything is parsed.
//!
//! Rewritten, token by token and on the same line, so that errors still name the line of the file:
//! - `{% generation %}…{% endgeneration %}`, which marks what an assistant said for training and writes
//!   its body, becomes a `with` block (a scope of its own, as in Hugging Face);
//! - `'…' % x` becomes `('…'|percent_format(x))`;
//! - a macro that reads `varargs` gets them as a parameter, and its calls pass them;
//! - every value that gets a name (`set`, `with`, `for`, the parameters of macros, `loop(…)`) goes through
//!   the filter `within_bounds`, so that none can grow without bound (see [`super::bounded`]).

use std::{collections::BTreeSet, ops::Range};

/// Longest source. Published templates have 1 to 20 KB.
pub(super) const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Most tokens of one tag; each may be a level of the syntax tree. The largest published have some 200.
/// [`super::renderer::STACK_BYTES`] is derived from it.
pub(super) const MAX_TAG_TOKENS: usize = 2048;
/// Most `elif` of a template, which nest in the syntax tree.
pub(super) const MAX_ELIFS: usize = 512;

/// A source ready for the engine.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// What the engine is given.
    pub(super) text: String,
    /// What the template uses of the environment, to be looked for in it.
    pub(super) names: Names,
}

/// Names that a template uses, each with the line where it was first seen.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) filters: Vec<(String, usize)>,
    pub(super) tests: Vec<(String, usize)>,
    /// Called as `x.name(…)`.
    pub(super) methods: Vec<(String, usize)>,
    /// Called as `name(…)` and mentioned nowhere else.
    pub(super) functions: Vec<(String, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Name,
    Text,
    Number,
    Operator,
}

#[derive(Clone, Debug)]
struct Token {
    kind: Kind,
    at: Range<usize>,
}

/// One `{{ … }}` or `{% … %}`, its tokens in the list of all.
#[derive(Debug)]
struct Tag {
    is_block: bool,
    tokens: Range<usize>,
    /// The place behind it, and its last characters: `%}`, `-%}`.
    end: usize,
    close: &'static str,
}

/// Checks a source and rewrites it; the error says what is too large or not ended, and where.
pub(super) fn prepare(source: &str) -> Result<Prepared, String> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(format!("{} bytes of source, at most {MAX_SOURCE_BYTES} are accepted", source.len()));
    }
    let scan = Scan::new(source)?;
    let mut edits = Vec::new();
    scan.generation_tags(&mut edits);
    scan.percent_formats(&mut edits);
    scan.varargs(&mut edits);
    scan.bounds(&mut edits);
    Ok(Prepared { text: apply(source, edits), names: scan.names() })
}

/// Text to put in the place of a range, often an empty one.
type Edit = (Range<usize>, Nesting, String);

/// The order of edits at one place: what ends there from the inside out, then what begins from the outside in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Nesting {
    EndInner,
    EndOuter,
    EndValue,
    BeginValue,
    BeginOuter,
    BeginInner,
}

fn apply(source: &str, mut edits: Vec<Edit>) -> String {
    edits.sort_by_key(|(range, nesting, _)| (range.start, *nesting));
    let mut text = String::with_capacity(source.len());
    let mut from = 0;
    for (range, _, new) in edits {
        text.push_str(&source[from..range.start]);
        text.push_str(&new);
        from = range.end;
    }
    text.push_str(&source[from..]);
    text
}

struct Scan<'s> {
    source: &'s str,
    tokens: Vec<Token>,
    tags: Vec<Tag>,
}

impl<'s> Scan<'s> {
    fn new(source: &'s str) -> Result<Self, String> {
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
        format!("{what} (in {}:{})", super::DEFAULT, self.line(at))
    }

    fn line(&self, at: usize) -> usize {
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
    fn word(&self, token: usize) -> &'s str {
        self.tokens.get(token).map_or("", |token| &self.source[token.at.clone()])
    }

    fn is(&self, token: usize, kind: Kind) -> bool {
        self.tokens.get(token).is_some_and(|token| token.kind == kind)
    }

    fn start(&self, token: usize) -> usize {
        self.tokens[token].at.start
    }

    fn end(&self, token: usize) -> usize {
        self.tokens[token].at.end
    }

    /// The token that closes the bracket at `open`, within the tag.
    fn closing(&self, open: usize, tag: &Tag) -> Option<usize> {
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

    // --- rewriting -------------------------------------------------------------------------------

    fn generation_tags(&self, edits: &mut Vec<Edit>) {
        for tag in self.tags.iter().filter(|tag| tag.is_block && tag.tokens.len() == 1) {
            let token = tag.tokens.start;
            let new = match self.word(token) {
                "generation" => "with",
                "endgeneration" => "endwith",
                _ => continue,
            };
            edits.push((self.tokens[token].at.clone(), Nesting::BeginOuter, new.to_owned()));
        }
    }

    fn percent_formats(&self, edits: &mut Vec<Edit>) {
        for tag in &self.tags {
            for percent in tag.tokens.clone().filter(|&token| self.word(token) == "%") {
                let first = (tag.tokens.start..percent).rev().take_while(|&t| self.is(t, Kind::Text)).last();
                let Some((first, end)) = first.zip(self.operand_end(percent + 1, tag)) else { continue };
                let (from, to) = (self.start(first), self.end(end));
                edits.push((from..from, Nesting::BeginInner, "(".to_owned()));
                let operator = self.tokens[percent].at.clone();
                edits.push((operator, Nesting::BeginOuter, "|percent_format(".to_owned()));
                edits.push((to..to, Nesting::EndInner, "))".to_owned()));
            }
        }
    }

    /// The last token of the operand that begins at `first`: what binds tighter than `%`.
    fn operand_end(&self, first: usize, tag: &Tag) -> Option<usize> {
        let mut last = first;
        while matches!(self.word(last), "-" | "+") {
            last += 1;
        }
        last = match self.word(last) {
            "(" | "[" | "{" => self.closing(last, tag)?,
            _ if last < tag.tokens.end && !self.is(last, Kind::Operator) => last,
            _ => return None,
        };
        loop {
            let next = last + 1;
            last = match self.word(next) {
                _ if next >= tag.tokens.end => return Some(last),
                "." | "|" if self.is(next + 1, Kind::Name) => next + 1,
                "(" | "[" => self.closing(next, tag)?,
                _ => return Some(last),
            };
        }
    }

    /// The macros that read `varargs`: name and number of parameters.
    fn varargs(&self, edits: &mut Vec<Edit>) {
        let mut macros: Vec<(&str, usize)> = Vec::new();
        for (number, tag) in self.tags.iter().enumerate() {
            let first = tag.tokens.start;
            if !tag.is_block || self.word(first) != "macro" || self.word(first + 2) != "(" {
                continue;
            }
            let Some(close) = self.closing(first + 2, tag) else { continue };
            let ends = |tag: &&Tag| !tag.is_block || self.word(tag.tokens.start) != "endmacro";
            let body = self.tags[number + 1..].iter().take_while(ends);
            let reads = body.flat_map(|tag| tag.tokens.clone()).any(|token| self.word(token) == "varargs");
            if reads {
                let parameters = self.arguments(first + 2, close).len();
                let comma = if parameters == 0 { "" } else { ", " };
                let at = self.start(close);
                edits.push((at..at, Nesting::EndOuter, format!("{comma}varargs=()")));
                macros.push((self.word(first + 1), parameters));
            }
        }
        for tag in &self.tags {
            for open in tag.tokens.clone().skip(1).filter(|&token| self.word(token) == "(") {
                let called = self.word(open - 1);
                let before = if open >= tag.tokens.start + 2 { self.word(open - 2) } else { "" };
                let found = macros.iter().find(|(name, _)| *name == called);
                if let Some(&(_, parameters)) = found.filter(|_| !matches!(before, "." | "|" | "macro")) {
                    self.pass_varargs(open, tag, parameters, edits);
                }
            }
        }
    }

    fn pass_varargs(&self, open: usize, tag: &Tag, parameters: usize, edits: &mut Vec<Edit>) {
        let Some(close) = self.closing(open, tag) else { return };
        let named = |arg: &Range<usize>| self.is(arg.start, Kind::Name) && self.word(arg.start + 1) == "=";
        let positional: Vec<Range<usize>> =
            self.arguments(open, close).into_iter().take_while(|arg| !named(arg)).collect();
        if let [first, .., last] | [first @ last] = &positional[parameters.min(positional.len())..] {
            let (from, to) = (self.start(first.start), self.end(last.end - 1));
            edits.push((from..from, Nesting::BeginOuter, "varargs=(".to_owned()));
            edits.push((to..to, Nesting::EndOuter, ",)".to_owned()));
        }
    }

    fn bounds(&self, edits: &mut Vec<Edit>) {
        for tag in &self.tags {
            let Range { start, end } = tag.tokens.clone();
            if tag.is_block {
                match self.word(start) {
                    "set" => {
                        // Without one it is a block, whose text the fuel bounds.
                        if let Some(equals) = self.find_outside(start, end, &["="]) {
                            self.bound(equals + 1..end, edits);
                        }
                    }
                    "for" => {
                        let among = self.find_outside(start, end, &["in"]).unwrap_or(end);
                        let last = self.find_outside(among, end, &["if", "recursive"]).unwrap_or(end);
                        self.bound(among + 1..last, edits);
                    }
                    "with" => {
                        for assignment in self.arguments(start, end) {
                            if self.word(assignment.start + 1) == "=" {
                                self.bound(assignment.start + 2..assignment.end, edits);
                            }
                        }
                    }
                    "macro" => self.bound_parameters(tag, edits),
                    _ => {}
                }
            }
            for open in tag.tokens.clone().skip(1).filter(|&token| self.word(token) == "(") {
                if self.word(open - 1) == "loop"
                    && let Some(close) = self.closing(open, tag)
                {
                    self.bound(open + 1..close, edits);
                }
            }
        }
    }

    fn bound(&self, value: Range<usize>, edits: &mut Vec<Edit>) {
        if value.is_empty() {
            return;
        }
        let (from, to) = (self.start(value.start), self.end(value.end - 1));
        edits.push((from..from, Nesting::BeginValue, "(".to_owned()));
        edits.push((to..to, Nesting::EndValue, ")|within_bounds".to_owned()));
    }

    /// A macro that calls itself passes values on from call to call.
    fn bound_parameters(&self, tag: &Tag, edits: &mut Vec<Edit>) {
        let open = tag.tokens.start + 2;
        let Some(close) = self.closing(open, tag).filter(|_| self.word(open) == "(") else { return };
        for parameter in self.arguments(open, close) {
            let name = self.word(parameter.start);
            let set = format!("{{% set {name} = {name}|within_bounds {}", tag.close);
            edits.push((tag.end..tag.end, Nesting::EndInner, set));
        }
    }

    /// The first of some words within a tag and outside its brackets, behind `from`.
    fn find_outside(&self, from: usize, end: usize, words: &[&str]) -> Option<usize> {
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
    fn arguments(&self, open: usize, close: usize) -> Vec<Range<usize>> {
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

    // --- what is used ----------------------------------------------------------------------------

    fn names(&self) -> Names {
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
