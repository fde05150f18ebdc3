//! Log probabilities as the model gave them.
//!
//! They are the log-softmax of the raw logits: before penalties, temperature and filters, as vLLM
//! reports them, so they say what the model thought and not what the request asked for. The sum under
//! the logarithm is the integer of [`crate::weight`] at temperature 1; a vocabulary of 129,280 makes
//! its relative error at most 6e-8 (half a unit of 2^-40 per token), the size of F32's own rounding.

use cadre_types::TokenId;

use crate::{
    ranking::{Candidate, most_preferred},
    weight::{ONE, Scale, Weight},
};

/// A token and the natural logarithm of its probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenId,
    /// At most 0, and finite: a token with probability 0 is never reported.
    pub logprob: f32,
}

/// What turns the raw logits of one row into log probabilities.
#[derive(Clone, Copy, Debug)]
pub struct LogSoftmax {
    largest: f64,
    log_total: f64,
}

impl LogSoftmax {
    /// `largest` is finite and is the largest of `logits`.
    pub(crate) fn new(logits: &[f32], largest: f32) -> Self {
        Self::from_parts(largest, Scale::new(largest, 1.0).total(logits))
    }

    /// From the largest logit and the weight of all at temperature 1 ([`crate::total_weight`]).
    pub fn from_parts(largest: f32, total: u64) -> Self {
        Self { largest: f64::from(largest), log_total: ln_of_weight(total) }
    }

    /// The log probability of a token with this raw logit.
    pub fn of(&self, token: TokenId, logit: f32) -> TokenLogprob {
        let logprob = (f64::from(logit) - self.largest) - self.log_total;
        // A finite logit may lie further below the largest than F32 can say.
        TokenLogprob { token, logprob: logprob.max(f64::from(f32::MIN)) as f32 }
    }

    /// The `count` most likely tokens, ties by id; fewer if fewer are possible.
    pub(crate) fn top(
        &self,
        logits: &[f32],
        count: usize,
        scratch: &mut Vec<Candidate>,
    ) -> Vec<TokenLogprob> {
        most_preferred(logits, count, scratch);
        scratch.iter().map(|candidate| self.of(candidate.token, candidate.logit)).collect()
    }
}

const LN_2: f64 = std::f64::consts::LN_2;

/// `ln(total * 2^-40)` for `total >= 2^40`, by additions, multiplications and one division:
/// `total = 2^e m` with `m` in [sqrt(1/2), sqrt 2), `f = (m - 1) / (m + 1)`,
/// `ln m = 2 (f + f^3/3 + ... + f^21/21)`. |f| <= 0.1716 makes the rest of the series less than 2e-19
/// and the error of the whole less than 1e-14 for every possible total.
fn ln_of_weight(total: Weight) -> f64 {
    let ratio = total as f64 / ONE as f64;
    let bits = ratio.to_bits();
    let mut exponent = f64::from(((bits >> 52) as u32 & 0x7ff).cast_signed() - 1023);
    let mut m = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        exponent += 1.0;
    }
    let f = (m - 1.0) / (m + 1.0);
    let square = f * f;
    let mut series = 1.0 / 21.0;
    for odd in [19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = series * square + 1.0 / odd;
    }
    exponent * LN_2 + 2.0 * (f * series)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ranking::largest, weight::MAX_VOCABULARY};

    #[test]
    fn ln_of_one_and_of_powers() {
        assert_eq!(ln_of_weight(ONE), 0.0);
        assert_eq!(ln_of_weight(2 * ONE), LN_2);
        assert_eq!(ln_of_weight(1024 * ONE), 10.0 * LN_2);
    }

    #[test]
    fn a_uniform_row() {
        let logits = [1.5_f32; 4096];
        let log = LogSoftmax::new(&logits, 1.5);
        assert_eq!(log.of(7, 1.5), TokenLogprob { token: 7, logprob: -(4096_f64.ln()) as f32 });
        let top = log.top(&logits, 3, &mut Vec::new());
        assert_eq!(top.iter().map(|entry| entry.token).collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn impossible_tokens_are_not_reported() {
        let logits = [f32::NEG_INFINITY, 0.0, f32::MIN];
        let top = LogSoftmax::new(&logits, 0.0).top(&logits, 3, &mut Vec::new());
        assert_eq!(top.iter().map(|entry| entry.token).collect::<Vec<_>>(), [1, 2]);
        assert!(top.iter().all(|entry| entry.logprob.is_finite()));
    }

    proptest! {
        #[test]
        fn ln_is_within_its_bound(total in ONE..=ONE * MAX_VOCABULARY as u64) {
            let exact = (total as f64 / ONE as f64).ln();
            prop_assert!((ln_of_weight(total) - exact).abs() < 1e-14);
        }

        #[test]
        fn logprobs_are_the_log_softmax(logits in prop::collection::vec(-30.0..30.0_f32, 1..300)) {
            let most = largest(&logits).expect("finite");
            let log = LogSoftmax::new(&logits, most);
            let exact = logits.iter().map(|&l| f64::from(l - most).exp()).sum::<f64>().ln() + f64::from(most);
            for (token, &logit) in (0..).zip(&logits) {
                let got = f64::from(log.of(token, logit).logprob);
                let expected = f64::from(logit) - exact;
                prop_assert!((got - expected).abs() <= 4e-6_f64.max(expected.abs() * 2e-7), "{got} {expected}");
            }
        }
    }
}
