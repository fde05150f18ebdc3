//! Stop strings over a stream of text.
//!
//! The match that *ends* first wins; of several that end at the same place, the one that began
//! first. That is decided by the text alone, so any division of the text into pieces gives the same
//! answer, and a decision never needs text beyond the match. Between calls the longest suffix that
//! could still begin a stop string is held back (shorter than the longest stop string); everything
//! before it is safe and is handed out at once.
//!
//! Special tokens are hidden from the text, and clients stop at their spelling all the same
//! (`<|im_end|>`). A stop string that [spells](StopStrings::spelling) one is looked for in the text with
//! hidden tokens spelled out, every other in the text that the client sees.

use std::ops::Range;

/// Most stop strings of one request. OpenAI's API allows 4.
pub const MAX_STOP_STRINGS: usize = 16;

/// Longest stop string. With [`MAX_STOP_STRINGS`] it bounds a request's matcher to 4 KiB and one
/// token's search to 16 short scans.
pub const MAX_STOP_STRING_BYTES: usize = 256;

/// The matcher of one sequence.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<Stop>,
    include_stop: bool,
    /// Between calls: text that may begin a stop string and is not handed out yet, hidden tokens spelled
    /// out.
    held: String,
    /// The hidden tokens in `held`, in order.
    hidden: Vec<Range<usize>>,
    matched: Option<usize>,
}

#[derive(Clone, Debug)]
struct Stop {
    text: String,
    /// Whether it is looked for with hidden tokens spelled out.
    spells_special: bool,
}

impl StopStrings {
    /// A matcher; with `include_stop` the text of the match is handed out too.
    pub fn new(stops: Vec<String>, include_stop: bool) -> Result<Self, StopStringsError> {
        if stops.len() > MAX_STOP_STRINGS {
            return Err(StopStringsError::TooMany { count: stops.len() });
        }
        for (index, stop) in stops.iter().enumerate() {
            if stop.is_empty() {
                return Err(StopStringsError::Empty { index });
            }
            if stop.len() > MAX_STOP_STRING_BYTES {
                return Err(StopStringsError::TooLong { index, bytes: stop.len() });
            }
        }
        let stops = stops.into_iter().map(|text| Stop { text, spells_special: false }).collect();
        Ok(Self { stops, include_stop, held: String::new(), hidden: Vec::new(), matched: None })
    }

    /// Tells the spellings of the special tokens ([`crate::Tokenizer::special_texts`]): a stop string that
    /// holds one of them can match tokens that [`Self::push_hidden`] brings.
    #[must_use]
    pub fn spelling<'a>(mut self, special: impl Iterator<Item = &'a str> + Clone) -> Self {
        for stop in &mut self.stops {
            stop.spells_special = special.clone().any(|text| stop.text.contains(text));
        }
        self
    }

    /// Takes the next piece and appends to `out` what is certain to come before any stop string.
    /// Returns the index of the stop string that ended the text; from then on pieces are dropped.
    pub fn push(&mut self, piece: &str, out: &mut String) -> Option<usize> {
        if self.matched.is_some() {
            return self.matched;
        }
        if self.stops.is_empty() {
            out.push_str(piece);
            return None;
        }
        self.held.push_str(piece);
        self.settle(out)
    }

    /// As [`Self::push`] of a special token that is not part of the text: only its spelling counts.
    pub fn push_hidden(&mut self, spelling: &str, out: &mut String) -> Option<usize> {
        // Nothing of it would ever be handed out.
        if self.matched.is_some() || !self.stops.iter().any(|stop| stop.spells_special) {
            return self.matched;
        }
        let start = self.held.len();
        self.held.push_str(spelling);
        self.hidden.push(start..self.held.len());
        self.settle(out)
    }

    fn settle(&mut self, out: &mut String) -> Option<usize> {
        if let Some((start, end, index)) = self.find() {
            self.hand_out(if self.include_stop { end } else { start }, out);
            self.held.clear();
            self.hidden.clear();
            self.matched = Some(index);
        } else {
            let safe = self.held.len() - self.undecided();
            self.hand_out(safe, out);
            self.held.drain(..safe);
            self.hidden.retain(|range| range.end > safe);
            for range in &mut self.hidden {
                *range = range.start.saturating_sub(safe)..range.end - safe;
            }
        }
        self.matched
    }

    /// Ends the text: what was held back is no stop string and is handed out.
    pub fn finish(&mut self, out: &mut String) {
        self.hand_out(self.held.len(), out);
        self.held.clear();
        self.hidden.clear();
    }

    /// The stop string that ended the text, if one did.
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|index| self.stops[index].text.as_str())
    }

    /// Appends the visible part of the first `end` held bytes.
    fn hand_out(&self, end: usize, out: &mut String) {
        let mut from = 0;
        for range in &self.hidden {
            out.push_str(&self.held[from.min(end)..range.start.min(end)]);
            from = range.end;
        }
        out.push_str(&self.held[from.min(end)..end]);
    }

    /// `(start, end, index)` of the match that ends first, then begins first, then was given first.
    /// The first occurrence of each string is also its first to end, so one search each is enough.
    fn find(&self) -> Option<(usize, usize, usize)> {
        let shown = self.shown();
        let place = |stop: &Stop| match stop.spells_special {
            true => self.held.find(&stop.text).map(|start| (start, start + stop.text.len())),
            false => shown
                .find(&stop.text)
                .map(|start| (self.held_start(start), self.held_end(start + stop.text.len()))),
        };
        let found = |(index, stop)| place(stop).map(|(start, end)| (start, end, index));
        self.stops.iter().enumerate().filter_map(found).min_by_key(|&(start, end, index)| (end, start, index))
    }

    /// Length of the longest suffix that is a proper prefix of a stop string. A stop string begins
    /// with a character, so the suffix does too.
    fn undecided(&self) -> usize {
        let shown = self.shown();
        let prefix_at_end = |stop: &Stop| {
            let text = if stop.spells_special { self.held.as_bytes() } else { shown.as_bytes() };
            let longest = (stop.text.len() - 1).min(text.len());
            let begins = |&length: &usize| text.ends_with(&stop.text.as_bytes()[..length]);
            let length = (1..=longest).rev().find(begins)?;
            Some(match stop.spells_special {
                true => length,
                false => self.held.len() - self.held_start(shown.len() - length),
            })
        };
        self.stops.iter().filter_map(prefix_at_end).max().unwrap_or(0)
    }

    /// What the client sees of the held text.
    fn shown(&self) -> std::borrow::Cow<'_, str> {
        if self.hidden.is_empty() {
            return self.held.as_str().into();
        }
        let mut shown = String::with_capacity(self.held.len());
        self.hand_out(self.held.len(), &mut shown);
        shown.into()
    }

    /// Where in the held text the `at`-th shown byte lies.
    fn held_start(&self, at: usize) -> usize {
        self.hidden.iter().fold(at, |at, range| if range.start <= at { at + range.len() } else { at })
    }

    /// Where in the held text the first `at` shown bytes end.
    fn held_end(&self, at: usize) -> usize {
        self.hidden.iter().fold(at, |at, range| if range.start < at { at + range.len() } else { at })
    }
}

/// Why stop strings are refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopStringsError {
    /// Too many of them.
    #[error("stop: {count} strings, at most {MAX_STOP_STRINGS} are allowed")]
    TooMany {
        /// How many were given.
        count: usize,
    },
    /// An empty one would end every text at once.
    #[error("stop[{index}] is empty")]
    Empty {
        /// Which one.
        index: usize,
    },
    /// One is too long.
    #[error("stop[{index}] has {bytes} bytes, at most {MAX_STOP_STRING_BYTES} are allowed")]
    TooLong {
        /// Which one.
        index: usize,
        /// Its length.
        bytes: usize,
    },
}

#[cfg(test)]
mod tests;
