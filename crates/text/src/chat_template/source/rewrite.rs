//! What is rewritten in a source (the header of [`super`] says why), as edits of its text.

use std::{collections::BTreeSet, ops::Range};

use super::scan::{Kind, Scan, Tag};

/// Text to put in the place of a range, often an empty one.
pub(super) type Edit = (Range<usize>, Nesting, String);

/// The order of edits at one place: what ends there from the inside out, then what begins from the outside in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Nesting {
    EndInner,
    EndOperand(usize),
    EndOuter,
    EndValue,
    BeginValue,
    BeginOuter,
    BeginOperand(usize),
    BeginInner,
}

/// Operators that have operands to be bounded, from the loosest on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Binds {
    Comparison,
    Concatenation,
    Product,
}

pub(super) fn apply(source: &str, mut edits: Vec<Edit>) -> String {
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

impl Scan<'_> {
    pub(super) fn generation_tags(&self, edits: &mut Vec<Edit>) {
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

    pub(super) fn percent_formats(&self, edits: &mut Vec<Edit>) {
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
    pub(super) fn varargs(&self, edits: &mut Vec<Edit>) {
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

    pub(super) fn bounds(&self, edits: &mut Vec<Edit>) {
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

    /// What has no name is bounded where it is written out or multiplied, as if it had one: operands of `~`, what stands
    /// before `in` (a needle in a text becomes text), and what stands before `*`, so that no product is a constant, which
    /// the engine would compute while it compiles, unpaid.
    pub(super) fn unnamed(&self, edits: &mut Vec<Edit>) {
        let mut operands = BTreeSet::new();
        for tag in &self.tags {
            for token in tag.tokens.clone() {
                match self.word(token) {
                    "~" => {
                        operands.insert(self.operand_before(token, tag, Binds::Concatenation));
                        operands.insert(self.operand_after(token, tag, Binds::Concatenation));
                    }
                    "*" => drop(operands.insert(self.operand_before(token, tag, Binds::Product))),
                    "in" if self.compares(token, tag) => {
                        let is_negated = self.word(token - 1) == "not";
                        let operator = token - usize::from(is_negated);
                        operands.insert(self.operand_before(operator, tag, Binds::Comparison));
                    }
                    _ => {}
                }
            }
        }
        for (start, end) in operands.into_iter().filter(|(start, end)| start < end) {
            let (from, to) = (self.start(start), self.end(end - 1));
            // Of operands that begin at one place the longer one is outside, and of those that end at one as well.
            edits.push((from..from, Nesting::BeginOperand(usize::MAX - end), "((".to_owned()));
            edits.push((to..to, Nesting::EndOperand(usize::MAX - start), ")|within_bounds)".to_owned()));
        }
    }

    /// Whether an `in` is the operator, and neither a test nor the `in` of a loop.
    fn compares(&self, token: usize, tag: &Tag) -> bool {
        let first = tag.tokens.start;
        let before = if token > first { self.word(token - 1) } else { "" };
        let is_test =
            before == "is" || (before == "not" && token > first + 1 && self.word(token - 2) == "is");
        let of_loop = tag.is_block
            && self.word(first) == "for"
            && self.find_outside(first, tag.tokens.end, &["in"]) == Some(token);
        token > first && !is_test && !of_loop
    }

    /// Tokens of the operand that ends at `operator`: first, and behind the last.
    fn operand_before(&self, operator: usize, tag: &Tag, binds: Binds) -> (usize, usize) {
        // The word of a statement is no operand.
        let least = tag.tokens.start + usize::from(tag.is_block);
        let (mut depth, mut first) = (0_usize, operator);
        while first > least {
            match self.word(first - 1) {
                ")" | "]" | "}" => depth += 1,
                "(" | "[" | "{" if depth == 0 => break,
                "(" | "[" | "{" => depth -= 1,
                _ if depth == 0 && self.binds_looser(first - 1, least, binds) => break,
                _ => {}
            }
            first -= 1;
        }
        (first, operator)
    }

    /// The same of the operand that begins behind `operator`.
    fn operand_after(&self, operator: usize, tag: &Tag, binds: Binds) -> (usize, usize) {
        let (mut depth, mut end) = (0_usize, operator + 1);
        while end < tag.tokens.end {
            match self.word(end) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" if depth == 0 => break,
                ")" | "]" | "}" => depth -= 1,
                _ if depth == 0 && self.binds_looser(end, operator + 1, binds) => break,
                _ => {}
            }
            end += 1;
        }
        (operator + 1, end)
    }

    /// Whether a token ends an operand that may begin at `least`: an operator that binds as the operand's or looser, or
    /// what stands between expressions. A sign binds tighter, and so do tests (`is not none`).
    fn binds_looser(&self, token: usize, least: usize, binds: Binds) -> bool {
        let before = if token > least { self.word(token - 1) } else { "" };
        match self.word(token) {
            "+" | "-" => {
                let is_sign = matches!(before, "" | "~" | "+" | "-" | "*" | "/" | "//" | "%" | "**");
                binds >= Binds::Concatenation && !is_sign
            }
            "~" => binds >= Binds::Concatenation,
            "*" | "/" | "//" | "%" => binds >= Binds::Product,
            "not" | "in" => {
                before != "is" && !(before == "not" && token > least + 1 && self.word(token - 2) == "is")
            }
            "," | ":" | "=" | "==" | "!=" | "<" | ">" | "<=" | ">=" | "and" | "or" | "if" | "else"
            | "recursive" => true,
            _ => false,
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
}
