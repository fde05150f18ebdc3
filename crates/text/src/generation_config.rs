//! `generation_config.json`: what a request gets for the sampling fields that it leaves out.

use std::path::Path;

use cadre_types::SamplingParams;
use serde_json::{Map, Value};

use crate::error::TextError;

const FIX: &str = "correct the field";

/// The file over the neutral values; an absent file changes nothing.
pub(crate) fn sampling_defaults(path: &Path) -> Result<SamplingParams, TextError> {
    let invalid = |reason: String| TextError::Invalid { path: path.to_owned(), reason, fix: FIX };
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(SamplingParams::default()),
        Err(source) => {
            return Err(TextError::Read { path: path.to_owned(), fix: "make it readable", source });
        }
    };
    let fields: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|error| invalid(format!("no JSON object: {error}")))?;
    let params = params_of(&fields).map_err(invalid)?;
    params.validate().map_err(|error| invalid(error.to_string()))?;
    Ok(params)
}

/// As Hugging Face reads it: `do_sample: false` is greedy, `top_k: 0` keeps all.
fn params_of(fields: &Map<String, Value>) -> Result<SamplingParams, String> {
    let number = |name: &str| match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value
            .as_f64()
            .map(|number| Some(number as f32))
            .ok_or_else(|| format!("{name}: {value} is no number")),
    };
    let neutral = SamplingParams::default();
    let mut params = SamplingParams {
        temperature: number("temperature")?.unwrap_or(neutral.temperature),
        top_p: number("top_p")?.unwrap_or(neutral.top_p),
        top_k: number("top_k")?.map(|k| k as u32).filter(|&k| k > 0),
        min_p: number("min_p")?.unwrap_or(neutral.min_p),
        repetition_penalty: number("repetition_penalty")?.unwrap_or(neutral.repetition_penalty),
        ..neutral
    };
    if fields.get("do_sample") == Some(&Value::Bool(false)) {
        params.temperature = 0.0;
    }
    Ok(params)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use serde_json::json;

    use super::*;

    fn params(value: Value) -> Result<SamplingParams, String> {
        params_of(value.as_object().unwrap())
    }

    #[test]
    fn generation_config_is_read_as_hugging_face_does() {
        let published = params(json!({"do_sample": true, "temperature": 0.6, "top_p": 0.95})).unwrap();
        assert_eq!((published.temperature, published.top_p, published.top_k), (0.6, 0.95, None));
        assert_eq!(params(json!({"do_sample": false, "temperature": 0.6})).unwrap().temperature, 0.0);
        assert_eq!(params(json!({"top_k": 0})).unwrap().top_k, None);
        assert_eq!(params(json!({"top_k": 40})).unwrap().top_k, Some(40));
        assert_eq!(params(json!({})).unwrap(), SamplingParams::default());
        assert!(params(json!({"top_p": "high"})).unwrap_err().contains("top_p"));
    }
}
