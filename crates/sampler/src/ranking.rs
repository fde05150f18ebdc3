//! Candidates in order of preference, without sorting a vocabulary.
//!
//! The order is (logit descending, id ascending). It is total, so the first `k` are the same however
//! they are found: here by one scan that keeps at most `2 k` of them. Most draws end within the first
//! few candidates; [`Ranking`] finds more only when it is asked for them.

use cadre_types::TokenId;

/// Candidates found by the first scan when their number is open.
const FIRST_SCAN: usize = 256;
/// Each further scan finds this many times more.
const GROWTH: usize = 16;
/// Logits compared at once; a block without a candidate costs no branch per logit.
const BLOCK: usize = 64;
/// Accumulators of the scan for the largest logit, so that it vectorises.
const LANES: usize = 16;

/// A token and its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Its logit.
    pub logit: f32,
    /// The token.
    pub token: TokenId,
}

/// Candidates by rank.
pub(crate) trait Ranked {
    /// The candidate at a rank; `None` beyond the limit and for minus infinities.
    fn get(&mut self, rank: usize) -> Option<Candidate>;
}

fn preference(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    // No NaN gets here, and the two zeros are equal: `partial_cmp` always has an answer.
    let by_logit = b.logit.partial_cmp(&a.logit).unwrap_or(std::cmp::Ordering::Equal);
    by_logit.then(a.token.cmp(&b.token))
}

/// The largest logit, or the id of the first that is NaN or plus infinity. Of no logits, and of only
/// minus infinities, the largest is minus infinity.
pub(crate) fn largest(logits: &[f32]) -> Result<f32, usize> {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut valid = true;
    let mut blocks = logits.chunks_exact(LANES);
    for block in &mut blocks {
        for (lane, &logit) in lanes.iter_mut().zip(block) {
            *lane = if logit > *lane { logit } else { *lane };
            valid &= logit < f32::INFINITY;
        }
    }
    for (lane, &logit) in lanes.iter_mut().zip(blocks.remainder()) {
        *lane = if logit > *lane { logit } else { *lane };
        valid &= logit < f32::INFINITY;
    }
    if !valid {
        // NaN is not below infinity either.
        let is_bad = |logit: &f32| logit.partial_cmp(&f32::INFINITY) != Some(std::cmp::Ordering::Less);
        return Err(logits.iter().position(is_bad).unwrap_or(0));
    }
    Ok(lanes.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// The `k` most preferred candidates in order, fewer if fewer logits are above minus infinity.
pub(crate) fn most_preferred(logits: &[f32], k: usize, found: &mut Vec<Candidate>) {
    found.clear();
    if k == 0 {
        return;
    }
    let capacity = k.saturating_mul(2).min(logits.len());
    found.reserve(capacity);
    // Ids ascend, so a logit equal to that of the last candidate kept comes after it.
    let mut threshold = f32::NEG_INFINITY;
    for (block, first) in logits.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
        if !block.iter().fold(false, |any, &logit| any | (logit > threshold)) {
            continue;
        }
        for (&logit, token) in block.iter().zip(first..) {
            if logit > threshold {
                found.push(Candidate { logit, token });
                if found.len() == capacity && capacity < logits.len() {
                    keep_best(found, k);
                    threshold = found[k - 1].logit;
                }
            }
        }
    }
    if found.len() > k {
        keep_best(found, k);
    }
    found.sort_unstable_by(preference);
}

/// Leaves the best `k` of more than `k`, the least preferred of them last.
fn keep_best(found: &mut Vec<Candidate>, k: usize) {
    found.select_nth_unstable_by(k - 1, preference);
    found.truncate(k);
}

/// The first `limit` candidates, found as far as they are asked for.
pub(crate) struct Ranking<'a> {
    logits: &'a [f32],
    limit: usize,
    /// How many the last scan was for.
    scanned: usize,
    found: &'a mut Vec<Candidate>,
}

impl<'a> Ranking<'a> {
    /// A ranking of which a few will be needed.
    pub(crate) fn open(logits: &'a [f32], found: &'a mut Vec<Candidate>) -> Self {
        let limit = logits.len();
        Self::scan(logits, limit, FIRST_SCAN.min(limit), found)
    }

    /// A ranking of `limit` candidates that will all be needed.
    pub(crate) fn closed(logits: &'a [f32], limit: usize, found: &'a mut Vec<Candidate>) -> Self {
        Self::scan(logits, limit, limit, found)
    }

    fn scan(logits: &'a [f32], limit: usize, scanned: usize, found: &'a mut Vec<Candidate>) -> Self {
        most_preferred(logits, scanned, found);
        Self { logits, limit, scanned, found }
    }

    /// The candidates found so far: all, for a closed ranking.
    pub(crate) fn found(&self) -> &[Candidate] {
        self.found
    }
}

impl Ranked for Ranking<'_> {
    fn get(&mut self, rank: usize) -> Option<Candidate> {
        while rank >= self.found.len() {
            // A scan that found less than it was for has found all.
            if self.found.len() < self.scanned || self.scanned >= self.limit {
                return None;
            }
            self.scanned = self.scanned.saturating_mul(GROWTH).min(self.limit);
            most_preferred(self.logits, self.scanned, self.found);
        }
        Some(self.found[rank])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sorted(logits: &[f32]) -> Vec<Candidate> {
        let mut all: Vec<Candidate> = (0..)
            .zip(logits)
            .map(|(token, &logit)| Candidate { logit, token })
            .filter(|candidate| candidate.logit > f32::NEG_INFINITY)
            .collect();
        all.sort_by(preference);
        all
    }

    /// Few distinct values: many ties.
    fn coarse_logits(longest: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(
            prop_oneof![(-6..6_i8).prop_map(f32::from), Just(-0.0), Just(f32::NEG_INFINITY), -6.0..6.0_f32,],
            0..longest,
        )
    }

    proptest! {
        #[test]
        fn a_partial_selection_is_a_prefix_of_the_sort(logits in coarse_logits(400), k in 0..450_usize) {
            let mut found = Vec::new();
            most_preferred(&logits, k, &mut found);
            let mut expected = sorted(&logits);
            expected.truncate(k);
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn largest_is_the_first_of_the_sort(logits in coarse_logits(100)) {
            let expected = sorted(&logits).first().map_or(f32::NEG_INFINITY, |best| best.logit);
            prop_assert_eq!(largest(&logits), Ok(expected));
        }

        #[test]
        fn a_bad_logit_is_found_wherever_it_is(
            mut logits in coarse_logits(100),
            at in any::<prop::sample::Index>(),
            bad in prop_oneof![Just(f32::NAN), Just(-f32::NAN), Just(f32::INFINITY)],
        ) {
            logits.push(0.0);
            let at = at.index(logits.len());
            logits[at] = bad;
            prop_assert_eq!(largest(&logits), Err(at));
        }
    }

    #[test]
    fn an_open_ranking_grows_to_the_end() {
        // 5,000 logits cross two growths; every seventh is minus infinity.
        let logits: Vec<f32> = (0..5000_u32)
            .map(
                |i| if i % 7 == 0 { f32::NEG_INFINITY } else { (i.wrapping_mul(2_654_435_761) >> 20) as f32 },
            )
            .collect();
        let expected = sorted(&logits);
        let mut found = Vec::new();
        let mut ranking = Ranking::open(&logits, &mut found);
        for (rank, candidate) in expected.iter().enumerate() {
            assert_eq!(ranking.get(rank), Some(*candidate), "rank {rank}");
        }
        assert_eq!(ranking.get(expected.len()), None);
        let mut closed = Ranking::closed(&logits, 10, &mut found);
        assert_eq!(closed.found(), &expected[..10]);
        assert_eq!(closed.get(10), None);
    }
}
