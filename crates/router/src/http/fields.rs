//! The fields of a JSON request, taken by name. `null` is the same as absent, as in OpenAI's API. Every
//! wrong type is refused by name with what was found.

use cadre_proto::v1;
use serde_json::{Map, Value};

use super::{
    unknown::{self, Unknown},
    unsupported::{self, Endpoint},
};
use crate::{
    error::{RequestError, RequestResult},
    request::Submission,
};

/// Longest excerpt of a bad value in an error.
const EXCERPT: usize = 80;

/// A request's object.
#[derive(Debug)]
pub(super) struct Fields(Map<String, Value>);

/// How the answer is delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Delivery {
    pub(super) stream: bool,
    /// One more event at the end with the usage.
    pub(super) include_usage: bool,
}

impl Fields {
    pub(super) fn parse(bytes: &[u8]) -> RequestResult<Self> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(other) => Err(RequestError::Malformed {
                problem: format!("expected an object, found {}", excerpt(&other)),
            }),
            Err(error) => Err(RequestError::Malformed { problem: error.to_string() }),
        }
    }

    pub(super) fn value(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &mut self,
        name: &'static str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> RequestResult<Option<T>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match read(&value) {
            Some(read) => Ok(Some(read)),
            None => {
                Err(RequestError::invalid(name, format!("expected {expected}, found {}", excerpt(&value))))
            }
        }
    }

    pub(super) fn f32(&mut self, name: &'static str) -> RequestResult<Option<f32>> {
        // A number that a 32-bit float turns into 0 or infinity would be another than the client's.
        let read = |value: &Value| {
            let number = value.as_f64()?;
            Some(number as f32).filter(|read| read.is_finite() && (*read != 0.0 || number == 0.0))
        };
        self.typed(name, "a number that a 32-bit float holds", read)
    }

    pub(super) fn u32(&mut self, name: &'static str) -> RequestResult<Option<u32>> {
        self.typed(name, "an integer from 0 to 4294967295", as_u32)
    }

    pub(super) fn bool(&mut self, name: &'static str) -> RequestResult<Option<bool>> {
        self.typed(name, "true or false", Value::as_bool)
    }

    pub(super) fn string(&mut self, name: &'static str) -> RequestResult<Option<String>> {
        self.typed(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(super) fn object(&mut self, name: &'static str) -> RequestResult<Option<Map<String, Value>>> {
        self.typed(name, "an object", |value| value.as_object().cloned())
    }

    /// Any 64-bit integer; -1 is a drawn one, as in other servers, any other negative one is taken by its bits.
    fn seed(&mut self) -> RequestResult<Option<u64>> {
        if self.0.get("seed").and_then(Value::as_i64) == Some(-1) {
            self.0.remove("seed");
        }
        self.typed("seed", "a 64-bit integer", |value| {
            value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned))
        })
    }

    fn stop(&mut self) -> RequestResult<Vec<String>> {
        let read = |value: &Value| match value {
            Value::String(one) => Some(vec![one.clone()]),
            Value::Array(many) => many.iter().map(|one| one.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        Ok(self.typed("stop", "a string or a list of strings", read)?.unwrap_or_default())
    }

    fn ids(&mut self, name: &'static str) -> RequestResult<Vec<u32>> {
        Ok(self.typed(name, "a list of token ids", as_ids)?.unwrap_or_default())
    }

    /// What both endpoints share, without prompt, length and logprobs. Refuses what is not supported first.
    pub(super) fn submission(&mut self, endpoint: Endpoint) -> RequestResult<Submission> {
        let model = self.string("model")?;
        let model = model.ok_or_else(|| RequestError::invalid("model", "it is required"))?;
        let n = self.u32("n")?.unwrap_or(1);
        unsupported::refuse(self, endpoint, n)?;
        Ok(Submission {
            model: Some(model),
            n,
            sampling: v1::SamplingOptions {
                temperature: self.f32("temperature")?,
                top_p: self.f32("top_p")?,
                // Clients of other servers write 0 or -1 for "off".
                top_k: self.top_k()?,
                min_p: self.f32("min_p")?,
                repetition_penalty: self.f32("repetition_penalty")?,
                presence_penalty: self.f32("presence_penalty")?,
                frequency_penalty: self.f32("frequency_penalty")?,
                seed: self.seed()?,
                logprobs: None,
            },
            stop: self.stop()?,
            stop_token_ids: self.ids("stop_token_ids")?,
            min_tokens: self.u32("min_tokens")?.unwrap_or(0),
            ignore_eos: self.bool("ignore_eos")?.unwrap_or(false),
            ..Submission::default()
        })
    }

    fn top_k(&mut self) -> RequestResult<Option<u32>> {
        if matches!(self.0.get("top_k").and_then(Value::as_i64), Some(0 | -1)) {
            self.0.remove("top_k");
        }
        self.u32("top_k")
    }

    /// Names of fields that nobody took, that changed nothing and are unknown here; one that is nearly a known
    /// name is refused.
    pub(super) fn ignored(self) -> RequestResult<Vec<String>> {
        let mut ignored = Vec::new();
        for (name, value) in self.0 {
            match unknown::judge(&name) {
                _ if value.is_null() => {}
                Unknown::Harmless => {}
                Unknown::Misspelled(known) => {
                    return Err(RequestError::invalid(name, format!("unknown field; {known} is meant?")));
                }
                Unknown::Ignored => ignored.push(name),
            }
        }
        ignored.sort();
        Ok(ignored)
    }

    pub(super) fn delivery(&mut self) -> RequestResult<Delivery> {
        let stream = self.bool("stream")?.unwrap_or(false);
        let options = self.object("stream_options")?;
        if options.is_some() && !stream {
            return Err(RequestError::invalid("stream_options", "only allowed with stream = true"));
        }
        let include_usage = match options.as_ref().and_then(|options| options.get("include_usage")) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(include)) => *include,
            Some(other) => {
                let problem = format!("expected true or false, found {}", excerpt(other));
                return Err(RequestError::invalid("stream_options.include_usage", problem));
            }
        };
        Ok(Delivery { stream, include_usage })
    }
}

pub(super) fn as_u32(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}

pub(super) fn as_ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(as_u32).collect()
}

/// A value as it is shown in an error.
pub(super) fn excerpt(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(EXCERPT) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).unwrap()
    }

    fn refused(error: RequestError) -> (String, String) {
        match error {
            RequestError::Invalid { field, problem } => (field.into_owned(), problem),
            other => (String::new(), other.to_string()),
        }
    }

    #[test]
    fn a_body_that_is_no_object_is_malformed() {
        for (body, words) in [("{\"a\": ", "EOF"), ("[1]", "expected an object, found [1]"), ("", "EOF")] {
            let error = Fields::parse(body.as_bytes()).unwrap_err();
            assert!(
                matches!(&error, RequestError::Malformed { problem } if problem.contains(words)),
                "{error}"
            );
        }
    }

    #[test]
    fn wrong_types_name_the_field_and_the_value() {
        for (json, field) in [
            (r#"{"model": 7}"#, "model"),
            (r#"{"model": "m", "temperature": "hot"}"#, "temperature"),
            (r#"{"model": "m", "n": 1.5}"#, "n"),
            (r#"{"model": "m", "n": -1}"#, "n"),
            (r#"{"model": "m", "stop": [1]}"#, "stop"),
            (r#"{"model": "m", "seed": 1e30}"#, "seed"),
            (r#"{"model": "m", "temperature": 1e-60}"#, "temperature"),
            (r#"{"model": "m", "repetition_penalty": 1e60}"#, "repetition_penalty"),
            (r#"{"model": "m", "logit_bias": {"5": 1}}"#, "logit_bias"),
            (r#"{"model": "m", "stop_token_ids": [4294967296]}"#, "stop_token_ids"),
            (r#"{}"#, "model"),
        ] {
            let (found, problem) = refused(fields(json).submission(Endpoint::Chat).unwrap_err());
            assert_eq!(found, field, "{json}: {problem}");
        }
    }

    #[test]
    fn null_is_absent_and_off_values_of_other_servers_are_off() {
        let json =
            r#"{"model": "m", "temperature": null, "top_k": -1, "logit_bias": {}, "stop": "x", "seed": -2}"#;
        let submission = fields(json).submission(Endpoint::Chat).unwrap();
        assert_eq!(submission.sampling.temperature, None);
        assert_eq!(submission.sampling.top_k, None);
        assert_eq!(submission.sampling.seed, Some(u64::MAX - 1));
        assert_eq!(submission.stop, ["x"]);
        let drawn = fields(r#"{"model": "m", "seed": -1}"#).submission(Endpoint::Completions).unwrap();
        assert_eq!(drawn.sampling.seed, None, "as vLLM and SGLang have it");
    }

    #[test]
    fn what_nobody_takes_is_ignored_unless_it_is_nearly_a_name() {
        let unknown = |json: &str| {
            let mut fields = fields(json);
            fields.submission(Endpoint::Chat).unwrap();
            fields.ignored()
        };
        let sent = r#"{"model": "m", "user": "u", "metadata": {}, "store": true, "service_tier": "auto",
            "parallel_tool_calls": false, "safety_identifier": "s", "prompt_cache_key": "k", "unheard_of": null}"#;
        assert_eq!(unknown(sent), Ok(Vec::new()), "what OpenAI's clients send");
        assert_eq!(
            unknown(r#"{"model": "m", "port": 1, "url": "x"}"#),
            Ok(vec!["port".into(), "url".into()])
        );
        let (field, problem) = refused(unknown(r#"{"model": "m", "temprature": 0}"#).unwrap_err());
        assert_eq!(
            (field.as_str(), problem.as_str()),
            ("temprature", "unknown field; temperature is meant?")
        );
    }

    #[test]
    fn stream_options_need_a_stream() {
        let (field, _) =
            refused(fields(r#"{"stream_options": {"include_usage": true}}"#).delivery().unwrap_err());
        assert_eq!(field, "stream_options");
        let delivery = fields(r#"{"stream": true, "stream_options": {"include_usage": true}}"#).delivery();
        assert_eq!(delivery.unwrap(), Delivery { stream: true, include_usage: true });
        let bad = fields(r#"{"stream": true, "stream_options": {"include_usage": 1}}"#).delivery();
        assert_eq!(refused(bad.unwrap_err()).0, "stream_options.include_usage");
    }
}
