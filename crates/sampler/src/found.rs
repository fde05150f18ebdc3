//! The short half of a draw: from what a scan of the logits found to a token.
//!
//! A device that holds a row of logits applies the penalties, finds the largest logit, sums the weights and
//! lists the most preferred candidates; what is left is a walk down that list, here, by the code of
//! [`crate::Sampler`]. A walk that needs more candidates than were listed says so.

use cadre_types::{Position, SamplingParams, TokenId};

use crate::{
    philox::random_bits,
    ranking::{Candidate, Ranked},
    sampler::draw_ranked,
    weight::Scale,
};

/// Candidates listed at first when their number is open: most draws end within the first few.
const FIRST: usize = 256;

/// What a scan of one row of penalised logits found. The row has been checked: no NaN, no plus infinity, not
/// only minus infinities.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// Logits of the row.
    pub vocabulary: usize,
    /// The largest.
    pub largest: f32,
    /// [`total_weight`] of the row; looked at where [`needs_total`] says so.
    pub total: u64,
    /// The most preferred candidates in order: logit descending, id ascending; none at minus infinity.
    pub candidates: &'a [Candidate],
    /// Whether these are all above minus infinity.
    pub complete: bool,
}

/// How many candidates to list at first; 1 for a greedy choice.
pub fn first_candidates(params: &SamplingParams, vocabulary: usize) -> usize {
    if params.temperature == 0.0 {
        return 1.min(vocabulary);
    }
    closed(params, vocabulary).unwrap_or_else(|| FIRST.min(vocabulary))
}

/// Whether a draw looks at the weight of the whole row.
pub fn needs_total(params: &SamplingParams, vocabulary: usize) -> bool {
    let open = params.temperature > 0.0 && closed(params, vocabulary).is_none();
    open && (params.top_p < 1.0 || params.min_p == 0.0)
}

/// The sum of the weights of logits: `round(e^((logit - largest) / temperature) * 2^40)` each, in F64 by the
/// operations of docs/sampling.md, so that any order gives the same integer. The specification for a device.
pub fn total_weight(logits: &[f32], largest: f32, temperature: f32) -> u64 {
    Scale::new(largest, temperature).total(logits)
}

/// The number of candidates that top-k leaves, if it leaves any out.
fn closed(params: &SamplingParams, vocabulary: usize) -> Option<usize> {
    params.top_k.map(|k| k as usize).filter(|k| *k < vocabulary)
}

/// The token at a position; `None` if more candidates are needed to tell.
pub fn draw_from(found: &Found<'_>, params: &SamplingParams, position: Position) -> Option<TokenId> {
    if params.temperature == 0.0 {
        return found.candidates.first().map(|best| best.token);
    }
    let scale = Scale::new(found.largest, params.temperature);
    let closed = closed(params, found.vocabulary);
    let limit = closed.unwrap_or(found.vocabulary);
    let mut listed = Listed { found, limit, short: false };
    let total = match closed {
        None => found.total,
        Some(limit) => {
            if found.candidates.len() < limit && !found.complete {
                return None;
            }
            found.candidates.iter().take(limit).map(|kept| scale.weight(kept.logit)).sum()
        }
    };
    let token = draw_ranked(&mut listed, scale, params, total, random_bits(params.seed, position));
    (!listed.short).then_some(token)
}

/// The list, which remembers whether it was asked for more than it has.
struct Listed<'a> {
    found: &'a Found<'a>,
    limit: usize,
    short: bool,
}

impl Ranked for Listed<'_> {
    fn get(&mut self, rank: usize) -> Option<Candidate> {
        if rank >= self.limit {
            return None;
        }
        let candidate = self.found.candidates.get(rank).copied();
        self.short |= candidate.is_none() && !self.found.complete;
        candidate
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{History, Sampler, ranking::most_preferred};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// However long the list, the token is the sampler's or the list is too short; and the list that
        /// is asked for is long enough where the number is known.
        #[test]
        fn a_list_draws_what_the_sampler_draws(
            logits in prop::collection::vec(prop_oneof![-9.0..9.0_f32, (-3..3_i8).prop_map(f32::from),
                Just(f32::NEG_INFINITY)], 1..500),
            temperature in prop_oneof![Just(0.0_f32), Just(1.0), 0.05..2.0_f32],
            top_k in prop::option::of(1..600_u32),
            top_p in prop_oneof![Just(1.0_f32), 0.01..1.0_f32],
            min_p in prop_oneof![Just(0.0_f32), 0.0..1.0_f32],
            (seed, position) in (any::<u64>(), 0..9999_u32),
            listed in 1..600_usize,
        ) {
            prop_assume!(logits.iter().any(|logit| *logit > f32::NEG_INFINITY));
            let params = SamplingParams { temperature, top_k, top_p, min_p, seed, ..SamplingParams::default() };
            let expected = Sampler::new()
                .sample(&mut logits.clone(), &params, History::default(), position)
                .expect("a sane row");
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total = if needs_total(&params, logits.len()) {
                total_weight(&logits, largest, temperature)
            } else {
                0
            };
            let draw = |count: usize| {
                let mut candidates = Vec::new();
                most_preferred(&logits, count, &mut candidates);
                let all = logits.iter().filter(|logit| **logit > f32::NEG_INFINITY).count();
                let (vocabulary, complete) = (logits.len(), candidates.len() == all);
                let found = Found { vocabulary, largest, total, candidates: &candidates, complete };
                draw_from(&found, &params, position)
            };
            if let Some(token) = draw(listed) {
                prop_assert_eq!(token, expected.token);
            }
            prop_assert_eq!(draw(logits.len()), Some(expected.token));
            let first = draw(first_candidates(&params, logits.len()));
            let known = temperature == 0.0 || top_k.is_some_and(|k| (k as usize) < logits.len());
            prop_assert!(first.is_some() || !known);
        }
    }
}
