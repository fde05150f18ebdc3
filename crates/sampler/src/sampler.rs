//! The order of operations, in one place (docs/sampling.md explains the choice):
//!
//! 1. log-softmax of the raw logits, if logprobs are asked for;
//! 2. banned tokens become impossible;
//! 3. penalties: repetition, frequency, presence;
//! 4. temperature 0: the largest logit, lowest id on a tie, and done;
//! 5. temperature, top-k, top-p, min-p, in the order of Hugging Face's warpers. Each keeps a prefix of
//!    the ranking, so together they are one number: how many candidates remain;
//! 6. one random number, multiplied with the weight of what remains, names the token by walking down
//!    the ranking.

#[cfg(test)]
mod tests;

use cadre_types::{Position, SamplingParams, SamplingParamsError, TokenId};

use crate::{
    found,
    logprobs::{LogSoftmax, TokenLogprob},
    penalties::{self, Penalties},
    philox::random_bits,
    ranking::{self, Candidate, Ranked, Ranking},
    weight::{MAX_VOCABULARY, ONE, Scale, Weight},
};

/// Chooses tokens. Holds scratch space only: two samplers, or one used for many sequences in any
/// order, give the same answers. One per thread.
#[derive(Debug, Default)]
pub struct Sampler {
    penalties: Penalties,
    candidates: Vec<Candidate>,
    raw: Vec<f32>,
}

/// What a choice depends on beside logits and parameters: the tokens that penalties look at, and those
/// that may not come next. With speculation, `output` holds the drafts before the position as if they had
/// been emitted.
#[derive(Clone, Copy, Debug, Default)]
pub struct History<'a> {
    /// The prompt.
    pub prompt: &'a [TokenId],
    /// What was generated so far.
    pub output: &'a [TokenId],
    /// Tokens that must not be chosen at this position (EOS and stop ids before `min_tokens`), in any
    /// order. Ids beyond the vocabulary ban nothing.
    pub banned: &'a [TokenId],
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The token.
    pub token: TokenId,
    /// Its log probability, if the request asked for logprobs.
    pub logprob: Option<TokenLogprob>,
    /// The most likely tokens, most likely first, ties by id; as many as were asked for.
    pub top: Vec<TokenLogprob>,
}

impl Sampler {
    /// A sampler; its scratch space grows with the first calls.
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses the token at `position` (its index in the sequence, prompt included) from its logits
    /// `[vocabulary]`. The logits are scratch space afterwards.
    ///
    /// The answer depends on the arguments alone. Greedy without logprobs and penalties is one scan.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        params: &SamplingParams,
        history: History<'_>,
        position: Position,
    ) -> Result<Sample, SampleError> {
        params.validate()?;
        if logits.len() > MAX_VOCABULARY {
            return Err(SampleError::Vocabulary { vocabulary: logits.len() });
        }
        let mut largest = checked_largest(logits, position)?;
        let penalised = penalties::are_on(params);
        let log_softmax = params.logprobs.map(|_| LogSoftmax::new(logits, largest));
        let top = match (log_softmax, params.logprobs) {
            (Some(log), Some(count)) => log.top(logits, count as usize, &mut self.candidates),
            _ => Vec::new(),
        };
        if !history.banned.is_empty() {
            for &token in history.banned {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            largest = checked_largest(logits, position)?;
        }
        if penalised {
            self.raw.clear();
            if log_softmax.is_some() {
                // Without the banned ones, of which none is chosen.
                self.raw.extend_from_slice(logits);
            }
            self.penalties.apply(logits, params, history)?;
            // A penalty below 1 or beyond F32's range can make an infinity.
            largest = checked_largest(logits, position)?;
        }
        let token = if params.temperature == 0.0 {
            first_of(logits, largest)
        } else {
            self.draw(logits, largest, params, random_bits(params.seed, position))
        };
        let raw = if penalised { &self.raw } else { &*logits };
        let logprob = log_softmax.map(|log| log.of(token, raw[token as usize]));
        Ok(Sample { token, logprob, top })
    }

    fn draw(&mut self, logits: &[f32], largest: f32, params: &SamplingParams, bits: u64) -> TokenId {
        let scale = Scale::new(largest, params.temperature);
        let top_k = params.top_k.map_or(usize::MAX, |k| k as usize);
        let (mut ranking, total) = if top_k < logits.len() {
            let ranking = Ranking::closed(logits, top_k, &mut self.candidates);
            let total = ranking.found().iter().map(|kept| scale.weight(kept.logit)).sum();
            (ranking, total)
        } else {
            let total = if found::needs_total(params, logits.len()) { scale.total(logits) } else { 0 };
            (Ranking::open(logits, &mut self.candidates), total)
        };
        draw_ranked(&mut ranking, scale, params, total, bits)
    }
}

/// One token from candidates in order, of whose weights `total` is the sum.
pub(crate) fn draw_ranked(
    ranking: &mut impl Ranked,
    scale: Scale,
    params: &SamplingParams,
    total: Weight,
    bits: u64,
) -> TokenId {
    let kept = if params.top_p < 1.0 || params.min_p > 0.0 {
        kept_weight(ranking, scale, params, total)
    } else {
        total
    };
    // Uniform over 0..kept up to a bias of kept / 2^64.
    let target = ((u128::from(bits) * u128::from(kept)) >> 64) as Weight;
    walk_to(ranking, scale, target)
}

/// The weight of the prefix that top-p and min-p leave; the first candidate always stays.
fn kept_weight(ranking: &mut impl Ranked, scale: Scale, params: &SamplingParams, total: Weight) -> Weight {
    // Both thresholds are exact: F32 times a power of two. A top-p below 2^-32 keeps one candidate.
    let share = (f64::from(params.top_p) * (1_u64 << 32) as f64) as u64;
    let least = f64::from(params.min_p) * ONE as f64;
    let mut kept = 0;
    let mut rank = 0;
    while let Some(candidate) = ranking.get(rank) {
        let weight = scale.weight(candidate.logit);
        if rank > 0 && (weight == 0 || (weight as f64) < least) {
            break;
        }
        kept += weight;
        rank += 1;
        if params.top_p < 1.0 && u128::from(kept) << 32 >= u128::from(share) * u128::from(total) {
            break;
        }
    }
    kept
}

/// The candidate at which the cumulative weight exceeds the target.
fn walk_to(ranking: &mut impl Ranked, scale: Scale, target: Weight) -> TokenId {
    let mut cumulative = 0;
    let mut rank = 0;
    let mut token = 0;
    // Ends by `return`: the target is below the cumulative weight of all candidates, exactly.
    while let Some(candidate) = ranking.get(rank) {
        token = candidate.token;
        cumulative += scale.weight(candidate.logit);
        if cumulative > target {
            return token;
        }
        rank += 1;
    }
    token
}

fn checked_largest(logits: &[f32], position: Position) -> Result<f32, SampleError> {
    match ranking::largest(logits) {
        Ok(f32::NEG_INFINITY) => Err(SampleError::NoCandidate { position, vocabulary: logits.len() }),
        Ok(largest) => Ok(largest),
        Err(at) => Err(SampleError::NotFinite { position, token: at as TokenId, value: logits[at] }),
    }
}

fn first_of(logits: &[f32], largest: f32) -> TokenId {
    // Blocks first: a comparison of a whole block vectorises, a search for an element does not.
    const BLOCK: usize = 64;
    let holds = |block: &[f32]| block.iter().fold(false, |any, &logit| any | (logit == largest));
    let block = logits.chunks(BLOCK).position(holds).unwrap_or(0);
    let rest = &logits[block * BLOCK..];
    (block * BLOCK + rest.iter().position(|&logit| logit == largest).unwrap_or(0)) as TokenId
}

/// Why no token could be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// A parameter is out of range.
    #[error("sampling: {0}")]
    Params(#[from] SamplingParamsError),
    /// The vocabulary is too large for the arithmetic.
    #[error("sampling: a vocabulary of {vocabulary} exceeds {MAX_VOCABULARY}")]
    Vocabulary {
        /// Logits given.
        vocabulary: usize,
    },
    /// The model computed NaN or infinity, or a penalty made infinity.
    #[error("sampling at position {position}: the logit of token {token} is {value}")]
    NotFinite {
        /// The position.
        position: Position,
        /// The first such token.
        token: TokenId,
        /// Its logit.
        value: f32,
    },
    /// Nothing can be chosen.
    #[error("sampling at position {position}: all {vocabulary} logits are minus infinity")]
    NoCandidate {
        /// The position.
        position: Position,
        /// Logits given.
        vocabulary: usize,
    },
    /// The history holds a token that the logits do not.
    #[error("sampling: token {token} of the history is beyond the vocabulary of {vocabulary}")]
    UnknownToken {
        /// The token.
        token: TokenId,
        /// Logits given.
        vocabulary: usize,
    },
}
