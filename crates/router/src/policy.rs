//! Which workers a request goes to. Pure: candidates in, order out; `workers` gathers the numbers.
//!
//! Decode workers: those with enough free pages first, then the fewest sequences, then the id, so that
//! equal numbers give one answer. A worker without enough pages is still a candidate (it queues the
//! sequence until others end), just the last. Prefill workers: the fewest prompt tokens outstanding.

use cadre_types::MemberId;

/// Positions per KV page (design: pages of 64 tokens).
pub(crate) const PAGE_TOKENS: u64 = 64;

/// Pages that a sequence of so many tokens occupies on its decode worker, which reserves for prompt and
/// answer at once.
pub(crate) fn pages_for(tokens: u64) -> u64 {
    tokens.div_ceil(PAGE_TOKENS)
}

/// A decode worker as the policy sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DecodeCandidate {
    /// The worker.
    pub(crate) id: MemberId,
    /// Pages free, after what this router gave it since its last report.
    pub(crate) free_pages: u64,
    /// Sequences running and waiting there, with what this router gave it since its last report.
    pub(crate) sequences: u64,
}

/// A prefill worker as the policy sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PrefillCandidate {
    /// The worker.
    pub(crate) id: MemberId,
    /// Prompt tokens that this router has given it and that are not handed off.
    pub(crate) outstanding_tokens: u64,
}

/// Decode workers in the order in which to ask them.
pub(crate) fn order_decode(mut candidates: Vec<DecodeCandidate>, needed_pages: u64) -> Vec<MemberId> {
    candidates.sort_by(|a, b| {
        let key = |c: &DecodeCandidate| (c.free_pages < needed_pages, c.sequences);
        key(a).cmp(&key(b)).then_with(|| a.id.cmp(&b.id))
    });
    candidates.into_iter().map(|candidate| candidate.id).collect()
}

/// The prefill worker to use.
pub(crate) fn pick_prefill(candidates: &[PrefillCandidate]) -> Option<MemberId> {
    candidates
        .iter()
        .min_by(|a, b| a.outstanding_tokens.cmp(&b.outstanding_tokens).then_with(|| a.id.cmp(&b.id)))
        .map(|candidate| candidate.id.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(id: &str, free_pages: u64, sequences: u64) -> DecodeCandidate {
        DecodeCandidate { id: MemberId(id.into()), free_pages, sequences }
    }

    fn order(candidates: &[DecodeCandidate], needed: u64) -> Vec<String> {
        order_decode(candidates.to_vec(), needed).into_iter().map(|id| id.0).collect()
    }

    #[test]
    fn pages_come_before_load_and_load_before_name() {
        let candidates = [decode("d", 100, 9), decode("c", 100, 2), decode("b", 100, 2), decode("a", 3, 0)];
        assert_eq!(order(&candidates, 4), ["b", "c", "d", "a"]);
        assert_eq!(order(&candidates, 3), ["a", "b", "c", "d"]);
        assert_eq!(order(&[], 1), Vec::<String>::new());
    }

    #[test]
    fn the_order_does_not_depend_on_the_order_of_candidates() {
        let mut candidates = vec![decode("a", 9, 1), decode("b", 9, 1), decode("c", 1, 0)];
        let expected = order(&candidates, 5);
        candidates.reverse();
        assert_eq!(order(&candidates, 5), expected);
    }

    #[test]
    fn prefill_goes_where_the_fewest_tokens_wait() {
        let candidate =
            |id: &str, outstanding_tokens| PrefillCandidate { id: MemberId(id.into()), outstanding_tokens };
        let candidates = [candidate("b", 10), candidate("c", 5), candidate("a", 10)];
        assert_eq!(pick_prefill(&candidates), Some(MemberId("c".into())));
        assert_eq!(pick_prefill(&candidates[..1]), Some(MemberId("b".into())));
        let tied = [candidate("b", 7), candidate("a", 7)];
        assert_eq!(pick_prefill(&tied), Some(MemberId("a".into())));
        assert_eq!(pick_prefill(&[]), None);
    }

    #[test]
    fn a_page_is_begun_by_its_first_token() {
        assert_eq!([0, 1, 64, 65].map(pages_for), [0, 1, 1, 2]);
    }
}
