//! Penalties on tokens that were seen, in the order of vLLM: repetition, frequency, presence.
//!
//! Each is one rounded F32 operation per token (frequency: two), whatever the order of the history.

use cadre_types::{SamplingParams, TokenId};

use crate::sampler::{History, SampleError};

/// Scratch space, kept between calls to spare the allocations.
#[derive(Debug, Default)]
pub(crate) struct Penalties {
    /// One bit per token of the vocabulary.
    seen: Vec<u64>,
    sorted: Vec<TokenId>,
}

/// What penalties do to one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PenaltyChange {
    /// The token; it is in the prompt or in the output.
    pub token: TokenId,
    /// How often it is in the output.
    pub count: u32,
}

impl PenaltyChange {
    /// The token's logit after penalties, in this order and with these roundings: repetition (a logit above 0 is
    /// divided by the penalty, another multiplied), then, if the token is in the output, `- frequency * count`
    /// and `- presence`, each product and difference rounded to F32. A penalty that does nothing is left out.
    pub fn apply(&self, logit: f32, params: &SamplingParams) -> f32 {
        let mut logit = logit;
        if params.repetition_penalty != 1.0 {
            logit = repeated(logit, params.repetition_penalty);
        }
        if self.count > 0 && (params.frequency_penalty != 0.0 || params.presence_penalty != 0.0) {
            logit = counted(logit, params, self.count as usize);
        }
        logit
    }
}

/// What penalties change in a vocabulary (after [`History::banned`] became minus infinity): every token of the history once, ascending; nothing if none is on.
pub fn penalty_changes(
    params: &SamplingParams,
    history: History<'_>,
    vocabulary: usize,
) -> Result<Vec<PenaltyChange>, SampleError> {
    if !are_on(params) {
        return Ok(Vec::new());
    }
    known(history, vocabulary)?;
    let prompt = history.prompt.iter().map(|&token| PenaltyChange { token, count: 0 });
    let output = history.output.iter().map(|&token| PenaltyChange { token, count: 1 });
    let mut changes: Vec<PenaltyChange> = prompt.chain(output).collect();
    changes.sort_unstable_by_key(|change| change.token);
    changes.dedup_by(|later, first| {
        let same = later.token == first.token;
        first.count += if same { later.count } else { 0 };
        same
    });
    Ok(changes)
}

/// That the logits hold every token of the history.
fn known(history: History<'_>, vocabulary: usize) -> Result<(), SampleError> {
    match history.prompt.iter().chain(history.output).find(|&&token| token as usize >= vocabulary) {
        Some(&token) => Err(SampleError::UnknownToken { token, vocabulary }),
        None => Ok(()),
    }
}

fn repeated(logit: f32, penalty: f32) -> f32 {
    if logit > 0.0 { logit / penalty } else { logit * penalty }
}

fn counted(logit: f32, params: &SamplingParams, count: usize) -> f32 {
    let logit = logit - params.frequency_penalty * count as f32;
    logit - params.presence_penalty
}

/// Whether any penalty changes anything.
pub(crate) fn are_on(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0
}

impl Penalties {
    /// Changes the logits of the tokens in the history. Takes time in proportion to the history (and
    /// n log n in the output's length for frequency and presence).
    pub(crate) fn apply(
        &mut self,
        logits: &mut [f32],
        params: &SamplingParams,
        history: History<'_>,
    ) -> Result<(), SampleError> {
        known(history, logits.len())?;
        if params.repetition_penalty != 1.0 {
            self.repetition(logits, params.repetition_penalty, history);
        }
        if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
            self.counts(logits, params, history.output);
        }
        Ok(())
    }

    fn repetition(&mut self, logits: &mut [f32], penalty: f32, history: History<'_>) {
        self.seen.clear();
        self.seen.resize(logits.len().div_ceil(64), 0);
        for &token in history.prompt.iter().chain(history.output) {
            let (word, bit) = (token as usize / 64, 1 << (token % 64));
            if self.seen[word] & bit == 0 {
                self.seen[word] |= bit;
                let logit = &mut logits[token as usize];
                *logit = repeated(*logit, penalty);
            }
        }
    }

    fn counts(&mut self, logits: &mut [f32], params: &SamplingParams, output: &[TokenId]) {
        self.sorted.clear();
        self.sorted.extend_from_slice(output);
        self.sorted.sort_unstable();
        for run in self.sorted.chunk_by(|a, b| a == b) {
            let logit = &mut logits[run[0] as usize];
            *logit = counted(*logit, params, run.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn penalised(logits: &[f32], params: &SamplingParams, prompt: &[u32], output: &[u32]) -> Vec<f32> {
        let mut logits = logits.to_vec();
        Penalties::default()
            .apply(&mut logits, params, History { prompt, output, ..History::default() })
            .expect("known tokens");
        logits
    }

    #[test]
    fn each_penalty_by_hand() {
        let logits = [2.0, -2.0, 1.0, 0.5, 0.0];
        let repetition = SamplingParams { repetition_penalty: 2.0, ..Default::default() };
        assert_eq!(penalised(&logits, &repetition, &[0, 0, 1], &[1, 3]), [1.0, -4.0, 1.0, 0.25, 0.0]);
        let frequency = SamplingParams { frequency_penalty: 0.5, ..Default::default() };
        assert_eq!(penalised(&logits, &frequency, &[0, 1], &[2, 2, 4]), [2.0, -2.0, 0.0, 0.5, -0.5]);
        let presence = SamplingParams { presence_penalty: -1.5, ..Default::default() };
        assert_eq!(penalised(&logits, &presence, &[0], &[2, 2]), [2.0, -2.0, 2.5, 0.5, 0.0]);
        let all = SamplingParams {
            repetition_penalty: 2.0,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            ..Default::default()
        };
        // 2 / 2 - 0.5 * 2 - 0.25
        assert_eq!(penalised(&logits, &all, &[], &[0, 0])[0], -0.25);
    }

    #[test]
    fn a_token_beyond_the_vocabulary_is_refused() {
        let params = SamplingParams { presence_penalty: 1.0, ..Default::default() };
        for (prompt, output) in [(&[5_u32][..], &[][..]), (&[], &[0, 5])] {
            let error = Penalties::default()
                .apply(&mut [0.0; 5], &params, History { prompt, output, ..History::default() })
                .expect_err("token 5 of 5");
            assert_eq!(error, SampleError::UnknownToken { token: 5, vocabulary: 5 });
        }
    }

    proptest! {
        #[test]
        fn the_order_of_the_history_does_not_matter(
            logits in prop::collection::vec(-5.0..5.0_f32, 8),
            mut prompt in prop::collection::vec(0..8_u32, 0..20),
            mut output in prop::collection::vec(0..8_u32, 0..20),
            repetition in 0.5..2.0_f32,
            frequency in -2.0..2.0_f32,
            presence in -2.0..2.0_f32,
        ) {
            let params = SamplingParams {
                repetition_penalty: repetition,
                frequency_penalty: frequency,
                presence_penalty: presence,
                ..Default::default()
            };
            let before = penalised(&logits, &params, &prompt, &output);
            // Token by token, as a device applies them.
            let mut one_by_one = logits.clone();
            let history = History { prompt: &prompt, output: &output, ..History::default() };
            for change in penalty_changes(&params, history, logits.len()).expect("known tokens") {
                let logit = &mut one_by_one[change.token as usize];
                *logit = change.apply(*logit, &params);
            }
            prop_assert_eq!(&before, &one_by_one);
            prompt.reverse();
            output.reverse();
            prop_assert_eq!(before, penalised(&logits, &params, &prompt, &output));
        }
    }
}
