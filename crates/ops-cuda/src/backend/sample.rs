//! Tokens: greedy ones from what the device finds in a row; drawn ones from its largest logit, its weight and its most
//! preferred candidates, which the device finds too ([`draw`]); the few that need more by the host's sampler from the
//! whole row.

use cadre_ops::{OpsError, SampleRow, check};
use cadre_sampler::{Sample, SampleError, Sampler};
use cadre_types::{Position, SamplingParams, TokenId};

use super::{
    CudaBackend, Plane, Staging,
    queue::{CudaQueue, QueueEvent, Scratch},
};
use crate::{
    kernels::Kernel,
    launch::{Arg, Grid},
};

mod draw;

use draw::{Draw, Draws};

/// Bytes that the device says of a greedy row.
const FOUND_BYTES: usize = 16;

/// No logit is NaN or plus infinity.
const NONE: u32 = u32::MAX;

/// Vocabularies up to here are the sampler's; a larger one is its error.
const MOST: usize = 1 << 23;

/// Tokens that were asked for.
#[derive(Debug)]
pub struct Samples {
    rows: Vec<Asked>,
    /// What the device says of the greedy rows, and when it is there.
    found: Option<(Staging, QueueEvent)>,
    /// The same of rows that are drawn from.
    draws: Option<Draws>,
}

#[derive(Debug)]
enum Asked {
    /// The next of what the device found, for a position.
    Greedy(Position),
    /// The next of what the device drew from.
    Draw(Box<Draw>),
    /// Known already.
    Drawn(Result<Sample, SampleError>),
}

/// Whether the largest logit is the token and nothing else is asked for.
fn is_greedy(params: &SamplingParams, banned: &[TokenId]) -> bool {
    banned.is_empty()
        && params.temperature == 0.0
        && params.logprobs.is_none()
        && params.repetition_penalty == 1.0
        && params.frequency_penalty == 0.0
        && params.presence_penalty == 0.0
        && params.validate().is_ok()
}

impl CudaBackend {
    pub(crate) fn ask(
        &self,
        queue: &mut CudaQueue,
        logits: &Plane,
        rows: &[SampleRow<'_>],
    ) -> Result<Samples, OpsError> {
        let op = "sample";
        check::sample_rows(op, logits.dims.rows, rows.iter().map(|row| row.row))?;
        let vocabulary = logits.dims.cols;
        let greedy = |row: &&SampleRow<'_>| vocabulary <= MOST && is_greedy(row.params, row.history.banned);
        let list: Vec<u32> = rows.iter().filter(greedy).map(|row| row.row as u32).collect();
        let found = if list.is_empty() {
            None
        } else {
            let places = queue.arguments(op, &list)?;
            let bytes = list.len() * FOUND_BYTES;
            let out = queue.scratch(op, Scratch::Scales, bytes)?;
            let args = [logits.into(), Arg::U32(vocabulary as u32), Arg::Pointer(places), Arg::Pointer(out)];
            queue.launch(Kernel::Largest, Grid::of(list.len(), 512), &args)?;
            let mut host = self.pool.take(bytes)?;
            queue.stream.download(op, out, host.address(), bytes)?;
            host.used_until(queue.stream.record(op)?);
            Some((host, queue.record(op)?))
        };
        let mut sampler = Sampler::new();
        let mut values = Vec::new();
        let mut asked = Vec::with_capacity(rows.len());
        for row in rows {
            if greedy(&row) {
                asked.push(Asked::Greedy(row.position));
            } else if let Some(draw) = Draw::new(row, vocabulary) {
                asked.push(Asked::Draw(Box::new(draw)));
            } else {
                values.clear();
                self.read(op, queue, logits, &(row.row..row.row + 1), &mut values)?;
                asked.push(Asked::Drawn(sampler.sample(&mut values, row.params, row.history, row.position)));
            }
        }
        let mut draws: Vec<&Draw> = Vec::new();
        for asked in &asked {
            if let Asked::Draw(draw) = asked {
                draws.push(draw);
            }
        }
        let draws = self.look(queue, logits, &draws)?;
        Ok(Samples { rows: asked, found, draws })
    }

    /// The tokens, in the order asked; waits for them.
    pub(crate) fn tokens(
        &self,
        queue: &mut CudaQueue,
        logits: &Plane,
        samples: Samples,
    ) -> Result<Vec<Result<Sample, SampleError>>, OpsError> {
        let op = "samples";
        let Samples { rows, found, draws } = samples;
        let vocabulary = logits.dims.cols;
        if let Some((_, event)) = &found {
            event.wait(op)?;
        }
        if let Some(draws) = &draws {
            draws.wait(op)?;
        }
        let found = found.as_ref().map_or(&[][..], |(host, _)| host.as_ref());
        let mut found = found.as_chunks::<FOUND_BYTES>().0.iter();
        let mut nth = 0;
        let mut tokens = Vec::with_capacity(rows.len());
        for asked in rows {
            tokens.push(match asked {
                Asked::Drawn(sample) => sample,
                Asked::Greedy(position) => match found.next() {
                    Some(found) => greedy_token(found, position, vocabulary),
                    None => Err(SampleError::NoCandidate { position, vocabulary }),
                },
                Asked::Draw(draw) => {
                    let said = draws.as_ref().and_then(|draws| draws.said(nth));
                    nth += 1;
                    let Some(said) = said else {
                        let message = format!("nothing was said of draw {nth}");
                        return Err(OpsError::Device { op, message });
                    };
                    match draw.finish(&said, vocabulary) {
                        Some(sample) => sample,
                        None => {
                            // More candidates than were listed: the whole row, with what was changed in it.
                            let mut values = Vec::new();
                            self.read(op, queue, logits, &(draw.row()..draw.row() + 1), &mut values)?;
                            draw.finish_from_row(&said, &mut values)
                        }
                    }
                }
            });
        }
        Ok(tokens)
    }
}

/// What the sampler says of a row with this largest logit.
fn greedy_token(
    found: &[u8; FOUND_BYTES],
    position: Position,
    vocabulary: usize,
) -> Result<Sample, SampleError> {
    let word = |at: usize| u32::from_le_bytes([found[at], found[at + 1], found[at + 2], found[at + 3]]);
    let (largest, token, bad): (f32, TokenId, u32) = (f32::from_bits(word(0)), word(4), word(8));
    if bad != NONE {
        return Err(SampleError::NotFinite { position, token: bad, value: f32::from_bits(word(12)) });
    }
    if largest == f32::NEG_INFINITY {
        return Err(SampleError::NoCandidate { position, vocabulary });
    }
    Ok(Sample { token, logprob: None, top: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: [u32; 4]) -> [u8; FOUND_BYTES] {
        let mut bytes = [0; FOUND_BYTES];
        for (to, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        bytes
    }

    #[test]
    fn what_was_found_is_what_the_sampler_says() {
        let row = [0.5_f32, 3.0, 3.0, -1.0];
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        assert!(is_greedy(&params, &[]));
        let sampled = Sampler::new().sample(&mut row.clone(), &params, cadre_sampler::History::default(), 7);
        assert_eq!(greedy_token(&words([3.0_f32.to_bits(), 1, NONE, 0]), 7, 4), sampled);
        let mut none = [f32::NEG_INFINITY; 4];
        let sampled = Sampler::new().sample(&mut none, &params, cadre_sampler::History::default(), 7);
        assert_eq!(greedy_token(&words([f32::NEG_INFINITY.to_bits(), NONE, NONE, 0]), 7, 4), sampled);
        let mut bad = [0.0, f32::INFINITY, 1.0, 0.0];
        let sampled = Sampler::new().sample(&mut bad, &params, cadre_sampler::History::default(), 7);
        assert_eq!(greedy_token(&words([1.0_f32.to_bits(), 2, 1, f32::INFINITY.to_bits()]), 7, 4), sampled);
    }

    #[test]
    fn only_plain_greedy_rows_stay_on_the_device() {
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        assert!(!is_greedy(&SamplingParams { temperature: 0.7, ..greedy.clone() }, &[]));
        assert!(!is_greedy(&SamplingParams { logprobs: Some(0), ..greedy.clone() }, &[]));
        assert!(!is_greedy(&SamplingParams { presence_penalty: 0.5, ..greedy.clone() }, &[]));
        assert!(!is_greedy(&SamplingParams { repetition_penalty: 1.1, ..greedy.clone() }, &[]));
        assert!(!is_greedy(&greedy, &[3]), "what the device finds may be banned");
    }
}
