//! How a token is chosen, and when a sequence ends.

use serde::{Deserialize, Serialize};

use crate::ids::TokenId;

/// Parameters of one request's sampling. [`SamplingParams::default`] is plain sampling at
/// temperature 1; greedy is `temperature == 0`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// Divides the logits; 0 chooses the largest logit (lowest id on a tie). Range 0 to 2.
    pub temperature: f32,
    /// Keep the smallest set of most likely tokens whose probability reaches this. In (0, 1].
    pub top_p: f32,
    /// Keep this many most likely tokens; `None` keeps all.
    pub top_k: Option<u32>,
    /// Keep tokens at least this likely relative to the most likely one. In [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output. Range 0.01 to 100
    /// (beyond it F32 overflows long before a text has a use for it); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every token that the output contains. Range -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once per occurrence in the output. Range -2 to 2.
    pub frequency_penalty: f32,
    /// Keys the random numbers together with the position. The router draws one if the client gives none.
    pub seed: u64,
    /// How many most likely tokens to report at each position beside the chosen one; `None` reports nothing.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logprobs: None,
        }
    }
}

/// Most alternatives that a request may ask for at each position, as in OpenAI's API.
pub const MAX_LOGPROBS: u32 = 20;

impl SamplingParams {
    /// Checks every field against the range that its documentation gives.
    pub fn validate(&self) -> Result<(), SamplingParamsError> {
        let top_k = self.top_k.map_or(1.0, f64::from);
        let logprobs = f64::from(self.logprobs.unwrap_or(0));
        let (temperature, top_p) = (as_written(self.temperature), as_written(self.top_p));
        let (min_p, repetition) = (as_written(self.min_p), as_written(self.repetition_penalty));
        let (presence, frequency) = (as_written(self.presence_penalty), as_written(self.frequency_penalty));
        // NaN fails every comparison, so it is refused like any value out of range.
        let checks = [
            ("temperature", temperature, (0.0..=2.0).contains(&temperature), "between 0 and 2"),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", top_k, top_k >= 1.0, "at least 1 (leave it out to keep all)"),
            ("min_p", min_p, (0.0..=1.0).contains(&min_p), "between 0 and 1"),
            ("repetition_penalty", repetition, (0.01..=100.0).contains(&repetition), "between 0.01 and 100"),
            ("presence_penalty", presence, (-2.0..=2.0).contains(&presence), "between -2 and 2"),
            ("frequency_penalty", frequency, (-2.0..=2.0).contains(&frequency), "between -2 and 2"),
            ("logprobs", logprobs, logprobs <= f64::from(MAX_LOGPROBS), "at most 20"),
        ];
        match checks.into_iter().find(|(_, _, valid, _)| !valid) {
            Some((field, value, _, expected)) => Err(SamplingParamsError { field, value, expected }),
            None => Ok(()),
        }
    }
}

/// The shortest decimal that is this F32: 2.1 and not 2.0999999046325684, in bounds and in errors.
fn as_written(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

/// A sampling parameter is out of its range.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field}: {value} is not allowed, it must be {expected}")]
pub struct SamplingParamsError {
    /// The field, as clients spell it.
    pub field: &'static str,
    /// What was given.
    pub value: f64,
    /// The range.
    pub expected: &'static str,
}

/// When generation ends, beside the length limit.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StopConditions {
    /// Most tokens to generate; at least 1.
    pub max_tokens: u32,
    /// Ids that end the sequence and are not part of the text (EOS and the client's own).
    pub stop_token_ids: Vec<TokenId>,
    /// Generate at least this many tokens: until then none that would end the sequence is chosen.
    pub min_tokens: u32,
    /// Ignore EOS (benches); the client's own stop ids still count because the router leaves EOS out.
    pub ignore_eos: bool,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token or stop string.
    Stop,
    /// `max_tokens` or the context length.
    Length,
    /// The client went away or asked to.
    Cancelled,
    /// The deadline passed.
    Deadline,
    /// Something failed; the error says what.
    Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_checked_and_named() {
        let good = SamplingParams::default();
        assert_eq!(good.validate(), Ok(()));
        let edges = SamplingParams {
            temperature: 2.0,
            top_p: f32::MIN_POSITIVE,
            top_k: Some(1),
            min_p: 1.0,
            repetition_penalty: 0.01,
            presence_penalty: -2.0,
            frequency_penalty: 2.0,
            logprobs: Some(MAX_LOGPROBS),
            ..good.clone()
        };
        assert_eq!(edges.validate(), Ok(()));
        type Change = fn(&mut SamplingParams, f32);
        let fields: [(&str, Change, &[f32]); 8] = [
            ("temperature", |p, v| p.temperature = v, &[-0.1, 2.1]),
            ("top_p", |p, v| p.top_p = v, &[0.0, -1.0, 1.1]),
            ("top_k", |p, v| p.top_k = Some(v as u32), &[0.0]),
            ("min_p", |p, v| p.min_p = v, &[-0.1, 1.1]),
            ("repetition_penalty", |p, v| p.repetition_penalty = v, &[0.0, -1.0, 1e-44, 0.0099, 100.1, 1e38]),
            ("presence_penalty", |p, v| p.presence_penalty = v, &[-2.1, 2.1]),
            ("frequency_penalty", |p, v| p.frequency_penalty = v, &[-2.1, 2.1]),
            ("logprobs", |p, v| p.logprobs = Some(v as u32), &[21.0]),
        ];
        for (field, change, values) in fields {
            let not_numbers: &[f32] = &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
            let is_float = field != "top_k" && field != "logprobs";
            let more = if is_float { not_numbers } else { &[] };
            for &value in values.iter().chain(more) {
                let mut params = good.clone();
                change(&mut params, value);
                let error = params.validate().expect_err(field);
                assert_eq!(error.field, field, "{value}");
                let words = format!("{field}: {value} is not allowed");
                assert!(error.to_string().starts_with(&words), "{error} is not {words}");
            }
        }
    }
}
