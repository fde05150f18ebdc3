//! Stop strings over a stream of text.
//!
//! The match that *ends* first wins; of several that end at the same place, the one that began
//! first. That is decided by the text alone, so any division of the text into pieces gives the same
//! answer, and a decision never needs text beyond the match. Between calls the longest suffix that
//! could still begin a stop string is held back (shorter than the longest stop string); everything
//! before it is safe and is handed out at once.

/// Most stop strings of one request. OpenAI's API allows 4.
pub const MAX_STOP_STRINGS: usize = 16;

/// Longest stop string. With [`MAX_STOP_STRINGS`] it bounds a request's matcher to 4 KiB and one
/// token's search to 16 short scans.
pub const MAX_STOP_STRING_BYTES: usize = 256;

/// The matcher of one sequence.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    include_stop: bool,
    /// Between calls: a proper prefix of some stop string, not handed out yet.
    held: String,
    matched: Option<usize>,
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
        Ok(Self { stops, include_stop, held: String::new(), matched: None })
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
        if let Some((start, end, index)) = self.find() {
            out.push_str(&self.held[..if self.include_stop { end } else { start }]);
            self.held.clear();
            self.matched = Some(index);
        } else {
            let safe = self.held.len() - self.undecided();
            out.push_str(&self.held[..safe]);
            self.held.drain(..safe);
        }
        self.matched
    }

    /// Ends the text: what was held back is no stop string and is handed out.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// The stop string that ended the text, if one did.
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|index| self.stops[index].as_str())
    }

    /// `(start, end, index)` of the match that ends first, then begins first, then was given first.
    /// The first occurrence of each string is also its first to end, so one search each is enough.
    fn find(&self) -> Option<(usize, usize, usize)> {
        self.stops
            .iter()
            .enumerate()
            .filter_map(|(index, stop)| {
                self.held.find(stop.as_str()).map(|start| (start, start + stop.len(), index))
            })
            .min_by_key(|&(start, end, index)| (end, start, index))
    }

    /// Length of the longest suffix that is a proper prefix of a stop string. A stop string begins
    /// with a character, so the suffix does too.
    fn undecided(&self) -> usize {
        let text = self.held.as_bytes();
        let prefix_at_end = |stop: &String| {
            let longest = (stop.len() - 1).min(text.len());
            (1..=longest).rev().find(|&length| text.ends_with(&stop.as_bytes()[..length]))
        };
        self.stops.iter().filter_map(prefix_at_end).max().unwrap_or(0)
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
