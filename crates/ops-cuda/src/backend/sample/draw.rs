//! Draws whose heavy part is the device's: bans and penalties, largest logit, weights, most preferred candidates. The
//! short half, from there to a token, is the sampler's own ([`draw_from`]), so the token is the sampler's bit for bit.

use cadre_ops::{OpsError, SampleRow};
use cadre_sampler::{
    Candidate, Found, History, LogSoftmax, Sample, SampleError, Sampler, TokenLogprob, draw_from,
    first_candidates, needs_total, penalty_changes,
};
use cadre_types::{Position, SamplingParams, TokenId};

use super::{NONE, Plane, Staging};
use crate::{
    backend::{
        CudaBackend,
        queue::{CudaQueue, QueueEvent, Scratch},
    },
    kernels::Kernel,
    launch::{Arg, Grid},
};

/// Most candidates that are listed. A top-k beyond it, which nobody wants, is the host's work.
const MOST_CANDIDATES: usize = 1024;
/// Threads of a row.
const THREADS: u32 = 1024;
/// Words of a request (`Ask` of candidates.cu).
const ASK_WORDS: usize = 11;
/// Bytes that the device says of one (`Said` of candidates.cu).
const SAID_BYTES: usize = 48;
/// Bytes of a candidate.
const CANDIDATE_BYTES: usize = 8;
/// Words of arguments of one launch: a quarter of a queue's ring, so that going round waits for little.
const LAUNCH_WORDS: usize = 1 << 18;
/// `Ask.flags`.
const WANTS_TOTAL: u32 = 1;
const WANTS_RAW_TOTAL: u32 = 2;

/// A draw that was asked for.
#[derive(Debug)]
pub(super) struct Draw {
    row: usize,
    params: SamplingParams,
    position: Position,
    candidates: usize,
    total: bool,
    banned: Vec<TokenId>,
    /// Tokens and counts; or why the history is refused, once the row itself is known to be sane.
    changes: Result<Vec<(TokenId, u32)>, SampleError>,
}

impl Draw {
    /// `None` for what the device cannot do: a vocabulary or parameters that are refused, logprobs of a row that is
    /// changed before it is drawn from, more candidates than are listed.
    pub(super) fn new(row: &SampleRow<'_>, vocabulary: usize) -> Option<Self> {
        let SampleRow { row, params, history, position } = *row;
        if vocabulary > super::MOST || params.validate().is_err() {
            return None;
        }
        let changes = penalty_changes(params, history, vocabulary);
        let changes = changes
            .map(|changes| changes.iter().map(|change| (change.token, change.count)).collect::<Vec<_>>());
        let in_vocabulary = |token: &TokenId| (*token as usize) < vocabulary;
        let banned: Vec<TokenId> = history.banned.iter().copied().filter(in_vocabulary).collect();
        let unchanged = banned.is_empty() && changes.as_ref().is_ok_and(Vec::is_empty);
        let top = match params.logprobs {
            Some(_) if !unchanged => return None,
            Some(count) => count as usize,
            None => 0,
        };
        let candidates = first_candidates(params, vocabulary).max(top.min(vocabulary));
        (candidates <= MOST_CANDIDATES).then(|| Self {
            row,
            params: params.clone(),
            position,
            candidates,
            total: needs_total(params, vocabulary),
            banned,
            changes,
        })
    }

    pub(super) fn row(&self) -> usize {
        self.row
    }

    fn changes(&self) -> &[(TokenId, u32)] {
        self.changes.as_deref().unwrap_or_default()
    }

    /// Words behind the request.
    fn list_words(&self) -> usize {
        self.banned.len() + 2 * self.changes().len()
    }

    /// The sample; `None` if more candidates are needed than were listed.
    pub(super) fn finish(&self, said: &Said, vocabulary: usize) -> Option<Result<Sample, SampleError>> {
        if let Err(error) = self.check(said, vocabulary) {
            return Some(Err(error));
        }
        let found = Found {
            vocabulary,
            largest: said.largest,
            total: said.total,
            candidates: &said.candidates,
            complete: said.complete,
        };
        let token = draw_from(&found, &self.params, self.position)?;
        let logit = said.candidates.iter().find(|candidate| candidate.token == token)?.logit;
        Some(Ok(self.sample(said, token, logit)))
    }

    /// The same from the whole row, which holds what bans and penalties made of it.
    pub(super) fn finish_from_row(&self, said: &Said, row: &mut [f32]) -> Result<Sample, SampleError> {
        let params = SamplingParams {
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logprobs: None,
            ..self.params.clone()
        };
        let token = Sampler::new().sample(row, &params, History::default(), self.position)?.token;
        let logit = row.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        Ok(self.sample(said, token, logit))
    }

    /// What is wrong with the row, in the sampler's order.
    fn check(&self, said: &Said, vocabulary: usize) -> Result<(), SampleError> {
        let position = self.position;
        let sane = |largest: f32, (bad, value): (u32, f32)| match (bad, largest) {
            (NONE, f32::NEG_INFINITY) => Err(SampleError::NoCandidate { position, vocabulary }),
            (NONE, _) => Ok(()),
            (token, _) => Err(SampleError::NotFinite { position, token, value }),
        };
        sane(said.raw_largest, said.raw_bad)?;
        // Of a history that is refused nothing was applied: what was found is the row after bans.
        sane(said.largest, said.bad)?;
        self.changes.as_ref().map(|_| ()).map_err(Clone::clone)
    }

    fn sample(&self, said: &Said, token: TokenId, logit: f32) -> Sample {
        let Some(count) = self.params.logprobs else {
            return Sample { token, logprob: None, top: Vec::new() };
        };
        let log = LogSoftmax::from_parts(said.raw_largest, said.raw_total);
        let of = |candidate: &Candidate| -> TokenLogprob { log.of(candidate.token, candidate.logit) };
        let top = said.candidates.iter().take(count as usize).map(of).collect();
        Sample { token, logprob: Some(log.of(token, logit)), top }
    }
}

/// What the device found for draws, and when it is there.
#[derive(Debug)]
pub(super) struct Draws {
    host: Staging,
    count: usize,
    /// Candidates that a row has room for.
    most: usize,
    event: QueueEvent,
}

/// What the device says of a row.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Said {
    raw_largest: f32,
    raw_bad: (u32, f32),
    largest: f32,
    bad: (u32, f32),
    total: u64,
    raw_total: u64,
    /// In order of preference.
    candidates: Vec<Candidate>,
    complete: bool,
}

impl Said {
    fn read(said: &[u8; SAID_BYTES], list: &[[u8; CANDIDATE_BYTES]]) -> Self {
        let words = said.as_chunks::<4>().0;
        let word = |at: usize| u32::from_le_bytes(words[at]);
        let float = |at: usize| f32::from_bits(word(at));
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 1)) << 32;
        let (listed, possible) = (word(6) as usize, word(7) as usize);
        let candidate = |bytes: &[u8; CANDIDATE_BYTES]| {
            let [a, b, c, d, e, f, g, h] = *bytes;
            Candidate {
                token: u32::from_le_bytes([a, b, c, d]),
                logit: f32::from_bits(u32::from_le_bytes([e, f, g, h])),
            }
        };
        let mut candidates: Vec<Candidate> = list.iter().take(listed).map(candidate).collect();
        // Logit descending, id ascending; no NaN is listed, and the two zeros are equal.
        candidates.sort_unstable_by(|a, b| {
            let by_logit = b.logit.partial_cmp(&a.logit).unwrap_or(std::cmp::Ordering::Equal);
            by_logit.then(a.token.cmp(&b.token))
        });
        Self {
            raw_largest: float(0),
            raw_bad: (word(1), float(2)),
            largest: float(3),
            bad: (word(4), float(5)),
            total: long(8),
            raw_total: long(10),
            candidates,
            complete: listed == possible,
        }
    }
}

impl Draws {
    pub(super) fn wait(&self, op: &'static str) -> Result<(), OpsError> {
        self.event.wait(op)
    }

    /// What is said of the `nth` draw.
    pub(super) fn said(&self, nth: usize) -> Option<Said> {
        let (said, lists) = self.host.as_ref().split_at_checked(self.count * SAID_BYTES)?;
        let said = said.as_chunks::<SAID_BYTES>().0.get(nth)?;
        let lists = lists.as_chunks::<CANDIDATE_BYTES>().0;
        Some(Said::read(said, lists.get(nth * self.most..(nth + 1) * self.most)?))
    }
}

impl CudaBackend {
    /// Starts looking at the rows of draws.
    pub(super) fn look(
        &self,
        queue: &mut CudaQueue,
        logits: &Plane,
        draws: &[&Draw],
    ) -> Result<Option<Draws>, OpsError> {
        let op = "sample";
        let (count, most) = (draws.len(), draws.iter().map(|draw| draw.candidates).max().unwrap_or(0));
        if count == 0 {
            return Ok(None);
        }
        let (said_bytes, list_bytes) = (count * SAID_BYTES, count * most * CANDIDATE_BYTES);
        let said = queue.scratch(op, Scratch::Codes, said_bytes)?;
        let lists = queue.scratch(op, Scratch::Inner, list_bytes)?;
        let mut first = 0;
        while first < count {
            let mut words = 0;
            let fits = |draw: &&&Draw| {
                words += ASK_WORDS + draw.list_words();
                words <= LAUNCH_WORDS
            };
            // One at least, however long its history.
            let rows = draws[first..].iter().take_while(fits).count().max(1);
            let words = asks(&draws[first..first + rows]);
            let args = [
                logits.into(),
                Arg::U32(logits.dims.cols as u32),
                Arg::Pointer(queue.arguments(op, &words)?),
                Arg::U32(most as u32),
                Arg::Pointer(said + (first * SAID_BYTES) as u64),
                Arg::Pointer(lists + (first * most * CANDIDATE_BYTES) as u64),
            ];
            queue.launch(Kernel::Candidates, Grid::of(rows, THREADS), &args)?;
            first += rows;
        }
        let mut host = self.pool.take(said_bytes + list_bytes)?;
        queue.stream.download(op, said, host.address(), said_bytes)?;
        queue.stream.download(op, lists, host.address() + said_bytes as u64, list_bytes)?;
        host.used_until(queue.stream.record(op)?);
        Ok(Some(Draws { host, count, most, event: queue.record(op)? }))
    }
}

/// Requests, and behind them their lists.
fn asks(draws: &[&Draw]) -> Vec<u32> {
    let mut words = Vec::with_capacity(draws.iter().map(|draw| ASK_WORDS + draw.list_words()).sum());
    let mut list = draws.len() * ASK_WORDS;
    for draw in draws {
        let (banned, params) = (list, &draw.params);
        let changes = banned + draw.banned.len();
        list += draw.list_words();
        let raw_total = if params.logprobs.is_some() { WANTS_RAW_TOTAL } else { 0 };
        words.extend([
            draw.row as u32,
            draw.candidates as u32,
            params.temperature.to_bits(),
            params.repetition_penalty.to_bits(),
            params.frequency_penalty.to_bits(),
            params.presence_penalty.to_bits(),
            if draw.total { WANTS_TOTAL | raw_total } else { raw_total },
            banned as u32,
            draw.banned.len() as u32,
            changes as u32,
            draw.changes().len() as u32,
        ]);
    }
    for draw in draws {
        words.extend(&draw.banned);
        words.extend(draw.changes().iter().flat_map(|(token, count)| [*token, *count]));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row<'a>(params: &'a SamplingParams, history: History<'a>) -> SampleRow<'a> {
        SampleRow { row: 3, params, history, position: 7 }
    }

    /// What candidates.cu says of a row, computed here.
    fn say(draw: &Draw, logits: &[f32]) -> (Said, Vec<f32>) {
        let largest = |row: &[f32]| row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut row = logits.to_vec();
        for token in &draw.banned {
            row[*token as usize] = f32::NEG_INFINITY;
        }
        for (token, count) in draw.changes() {
            let change = cadre_sampler::PenaltyChange { token: *token, count: *count };
            row[*token as usize] = change.apply(row[*token as usize], &draw.params);
        }
        let top = largest(&row);
        let mut ids: Vec<u32> =
            (0..row.len() as u32).filter(|id| row[*id as usize] > f32::NEG_INFINITY).collect();
        let possible = ids.len();
        ids.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
        ids.truncate(draw.candidates);
        ids.reverse();
        let list: Vec<[u8; CANDIDATE_BYTES]> = ids
            .iter()
            .map(|id| {
                let word = u64::from(*id) | u64::from(row[*id as usize].to_bits()) << 32;
                word.to_le_bytes()
            })
            .collect();
        let total = match draw.total {
            true => cadre_sampler::total_weight(&row, top, draw.params.temperature),
            false => 0,
        };
        let raw_total = cadre_sampler::total_weight(logits, largest(logits), 1.0);
        let words =
            [largest(logits).to_bits(), NONE, 0, top.to_bits(), NONE, 0, ids.len() as u32, possible as u32];
        let longs = [total, raw_total].into_iter().flat_map(u64::to_le_bytes);
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).chain(longs).collect();
        let bytes: [u8; SAID_BYTES] = bytes.try_into().expect("the bytes of a row");
        (Said::read(&bytes, &list), row)
    }

    #[test]
    fn tokens_are_the_samplers_also_when_the_list_is_too_short() {
        let logits: Vec<f32> = (0..3000).map(|i: i32| ((i * 7919) % 97) as f32 / 40.0).collect();
        let (prompt, output, banned) = ([5, 9, 2999], [9, 9, 17], [4, 2998, 70_000]);
        let mut short = 0;
        for (nth, temperature) in [0.0, 0.7, 1.0, 1.9].into_iter().cycle().take(64).enumerate() {
            let penalised = nth % 3 == 1;
            let params = SamplingParams {
                temperature,
                top_k: (nth % 4 == 2).then_some(40),
                top_p: if nth % 5 == 0 { 0.9 } else { 1.0 },
                repetition_penalty: if penalised { 1.3 } else { 1.0 },
                presence_penalty: if penalised { -0.4 } else { 0.0 },
                logprobs: (nth % 3 == 0).then_some(5),
                seed: nth as u64,
                ..SamplingParams::default()
            };
            let banned = if params.logprobs.is_none() { &banned[..] } else { &[] };
            let history = History { prompt: &prompt, output: &output, banned };
            let expected = Sampler::new().sample(&mut logits.clone(), &params, history, 7);
            let draw = Draw::new(&row(&params, history), logits.len()).expect("the device draws it");
            let (said, mut changed) = say(&draw, &logits);
            let got = draw.finish(&said, logits.len()).unwrap_or_else(|| {
                short += 1;
                draw.finish_from_row(&said, &mut changed)
            });
            assert_eq!(got, expected, "{params:?}");
        }
        assert!(short > 0, "a flat row needs more candidates than are listed");
    }

    #[test]
    fn what_the_device_cannot_do_is_the_hosts() {
        let default = SamplingParams::default();
        let none = History::default();
        let draws = |params: &SamplingParams, history, vocabulary| {
            Draw::new(&row(params, history), vocabulary).is_some()
        };
        assert!(draws(&default, none, 2000));
        assert!(!draws(&default, none, super::super::MOST + 1), "no such vocabulary");
        assert!(!draws(&SamplingParams { top_p: 7.0, ..default.clone() }, none, 2000));
        assert!(!draws(&SamplingParams { top_k: Some(1500), ..default.clone() }, none, 2000));
        let logprobs = SamplingParams { logprobs: Some(3), ..default };
        assert!(draws(&logprobs, none, 2000));
        assert!(
            !draws(&logprobs, History { banned: &[3], ..none }, 2000),
            "logprobs are of the row before bans"
        );
    }

    #[test]
    fn requests_name_their_lists() {
        let params = SamplingParams { presence_penalty: 0.5, ..SamplingParams::default() };
        let history = History { prompt: &[8], output: &[6, 6], banned: &[1] };
        let draw = Draw::new(&row(&params, history), 100).expect("the device draws it");
        let plain = SamplingParams::default();
        let other = Draw::new(&row(&plain, History::default()), 100).expect("the device draws it");
        let words = asks(&[&other, &draw]);
        assert_eq!(words.len(), 2 * ASK_WORDS + 1 + 4);
        assert_eq!(words[ASK_WORDS - 4..ASK_WORDS], [22, 0, 22, 0]);
        assert_eq!(words[2 * ASK_WORDS - 4..2 * ASK_WORDS], [22, 1, 23, 2]);
        assert_eq!(words[2 * ASK_WORDS..], [1, 6, 2, 8, 0]);
    }
}
