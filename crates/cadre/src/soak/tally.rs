//! What was counted. Pure: times and outcomes in, figures out.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

/// How many texts that differ are kept; the first ones tell most.
const SAMPLES: usize = 4;

/// Upper bounds of the classes in which times to the first token are counted: 1 ms, and 5 % more each. Memory
/// stays the same however long a soak runs.
const CLASSES: usize = 300;
const RATIO: f64 = 1.05;

/// How a request ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// With the text that it must have.
    Ok,
    /// With an error.
    Failed { code: String, message: String },
    /// With another text.
    Different { prompt: String, expected: String, text: String },
}

/// Everything counted so far. Times are from the start of the soak.
#[derive(Debug)]
pub(super) struct Tally {
    ok: u64,
    running: u64,
    /// Tokens received.
    pub(super) tokens: u64,
    failures: BTreeMap<String, Failures>,
    different: u64,
    samples: Vec<Sample>,
    /// Longest time between tokens of one stream.
    gap: Longest,
    /// The same since the last progress line.
    recent_gap: Longest,
    /// Longest time in which requests ran and no stream had a token.
    silence: Longest,
    last_sign: Option<Duration>,
    first_token: Vec<u64>,
    first_token_most: Longest,
    longest_request: Duration,
}

/// Failures of one code.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Failures {
    count: u64,
    /// Seconds from the start.
    first_at: f64,
    last_at: f64,
    /// Of the first.
    message: String,
}

/// A text that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Sample {
    at: f64,
    prompt: String,
    expected: String,
    text: String,
}

/// The longest of some times, and when it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Longest {
    ms: f64,
    /// Seconds from the start.
    at: f64,
}

impl Longest {
    fn offer(&mut self, now: Duration, time: Duration) {
        let ms = millis(time);
        if ms > self.ms {
            *self = Self { ms, at: now.as_secs_f64() };
        }
    }
}

/// The state after some time.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Progress {
    pub(super) at: f64,
    pub(super) ok: u64,
    pub(super) failed: u64,
    pub(super) different: u64,
    pub(super) running: u64,
    pub(super) tokens: u64,
    /// Since the last progress.
    pub(super) longest_gap_ms: f64,
}

/// The whole run.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) seconds: f64,
    pub(super) ok: u64,
    pub(super) failed: u64,
    pub(super) different: u64,
    pub(super) tokens: u64,
    /// By gRPC code.
    pub(super) failures: BTreeMap<String, Failures>,
    pub(super) samples: Vec<Sample>,
    pub(super) longest_gap: Longest,
    pub(super) longest_silence: Longest,
    pub(super) ttft_ms: Option<FirstToken>,
    pub(super) longest_request_ms: f64,
}

/// Time to the first token; quantiles to 5 %.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct FirstToken {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) most: f64,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            ok: 0,
            running: 0,
            tokens: 0,
            failures: BTreeMap::new(),
            different: 0,
            samples: Vec::new(),
            gap: Longest::default(),
            recent_gap: Longest::default(),
            silence: Longest::default(),
            last_sign: None,
            first_token: vec![0; CLASSES],
            first_token_most: Longest::default(),
            longest_request: Duration::ZERO,
        }
    }
}

impl Tally {
    /// A request is sent.
    pub(super) fn began(&mut self, now: Duration) {
        // Silence is counted from the first request on.
        self.last_sign.get_or_insert(now);
        self.running += 1;
    }

    /// The first token of a stream came.
    pub(super) fn first_token(&mut self, now: Duration, waited: Duration) {
        self.sign(now);
        self.first_token[class(waited)] += 1;
        self.first_token_most.offer(now, waited);
    }

    /// Another token of a stream came.
    pub(super) fn next_token(&mut self, now: Duration, gap: Duration) {
        self.sign(now);
        self.gap.offer(now, gap);
        self.recent_gap.offer(now, gap);
    }

    /// A request took so long, however it ended.
    pub(super) fn took(&mut self, time: Duration) {
        self.longest_request = self.longest_request.max(time);
    }

    fn sign(&mut self, now: Duration) {
        if let Some(before) = self.last_sign.replace(now) {
            self.silence.offer(now, now.saturating_sub(before));
        }
    }

    /// A request ended.
    pub(super) fn finished(&mut self, now: Duration, outcome: Outcome) {
        self.running = self.running.saturating_sub(1);
        let at = now.as_secs_f64();
        match outcome {
            Outcome::Ok => self.ok += 1,
            Outcome::Failed { code, message } => {
                let failures = self.failures.entry(code).or_insert(Failures {
                    count: 0,
                    first_at: at,
                    last_at: at,
                    message,
                });
                failures.count += 1;
                failures.last_at = at;
            }
            Outcome::Different { prompt, expected, text } => {
                self.different += 1;
                if self.samples.len() < SAMPLES {
                    self.samples.push(Sample { at, prompt, expected, text });
                }
            }
        }
    }

    fn failed(&self) -> u64 {
        self.failures.values().map(|failures| failures.count).sum()
    }

    /// What to say now; begins the next interval.
    pub(super) fn progress(&mut self, now: Duration) -> Progress {
        Progress {
            at: now.as_secs_f64(),
            ok: self.ok,
            failed: self.failed(),
            different: self.different,
            running: self.running,
            tokens: self.tokens,
            longest_gap_ms: std::mem::take(&mut self.recent_gap).ms,
        }
    }

    /// What to say last.
    pub(super) fn summary(&mut self, now: Duration) -> Summary {
        if let Some(before) = self.last_sign
            && self.running > 0
        {
            self.silence.offer(now, now.saturating_sub(before));
        }
        Summary {
            seconds: now.as_secs_f64(),
            ok: self.ok,
            failed: self.failed(),
            different: self.different,
            tokens: self.tokens,
            failures: self.failures.clone(),
            samples: self.samples.clone(),
            longest_gap: self.gap,
            longest_silence: self.silence,
            ttft_ms: self.quantiles(),
            longest_request_ms: millis(self.longest_request),
        }
    }

    fn quantiles(&self) -> Option<FirstToken> {
        let all: u64 = self.first_token.iter().sum();
        let quantile = |part: f64| {
            let rank = (all as f64 * part).ceil() as u64;
            let mut seen = 0;
            let class = self.first_token.iter().position(|count| {
                seen += count;
                seen >= rank
            });
            // No class is longer than what was seen.
            RATIO.powi(class.unwrap_or(0) as i32).min(self.first_token_most.ms)
        };
        (all > 0).then(|| FirstToken {
            p50: quantile(0.5),
            p99: quantile(0.99),
            most: self.first_token_most.ms,
        })
    }
}

fn class(time: Duration) -> usize {
    let class = millis(time).max(1.0).log(RATIO).ceil() as usize;
    class.min(CLASSES - 1)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests;
