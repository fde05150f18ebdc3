//! The model that this router serves: what of the checkpoint the front doors need.

use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use cadre_checkpoint::Checkpoint;
use cadre_proto::v1;
use cadre_text::Tokenizer;
use cadre_types::{Generation, ModelConfig, ModelHash, NumericsClass, PlacementEpoch, SamplingParams};
use serde_json::{Map, Value};

use crate::error::RouterError;

const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// Name, tokenizer, limits and defaults of the served model. Immutable.
#[derive(Debug)]
pub struct ServedModel {
    /// What clients call it.
    pub name: String,
    /// The architecture.
    pub config: ModelConfig,
    /// Tokenizer and chat template.
    pub tokenizer: Tokenizer,
    /// Identity of the weights.
    pub hash: ModelHash,
    /// Arithmetic of the cluster.
    pub numerics: NumericsClass,
    /// What a request gets for the fields that it leaves out.
    pub defaults: SamplingParams,
    /// When this router began to serve it, in seconds of the Unix epoch.
    pub created_unix_s: u64,
}

impl ServedModel {
    /// Reads a checkpoint's configuration, headers and tokenizer; no weights.
    pub fn load(dir: &Path, name: Option<String>, numerics: NumericsClass) -> Result<Self, RouterError> {
        let checkpoint = Checkpoint::open(dir)?;
        let tokenizer = Tokenizer::load(dir)?;
        let name = match name {
            Some(name) => name,
            None => folder_name(dir)?,
        };
        Ok(Self {
            name,
            config: checkpoint.config().clone(),
            tokenizer,
            hash: checkpoint.model_hash(),
            numerics,
            defaults: sampling_defaults(&dir.join(GENERATION_CONFIG_FILE))?,
            created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        })
    }

    /// Longest sequence, prompt and answer, in tokens.
    pub fn context_tokens(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// The stamp of this model before any placement.
    pub fn generation(&self) -> Generation {
        Generation { model: self.hash, numerics: self.numerics, epoch: PlacementEpoch(0) }
    }

    /// Whether a client's name for the model means this one.
    pub fn answers_to(&self, requested: &str) -> bool {
        requested == self.name
    }
}

fn folder_name(dir: &Path) -> Result<String, RouterError> {
    let failed = |problem: String| RouterError::File { path: dir.to_owned(), problem };
    let full = dir.canonicalize().map_err(|error| failed(error.to_string()))?;
    let name = full.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    name.ok_or_else(|| failed("the folder's name is no text; give the model a name".into()))
}

/// `generation_config.json` over the neutral values; an absent file changes nothing.
fn sampling_defaults(path: &Path) -> Result<SamplingParams, RouterError> {
    let failed = |problem: String| RouterError::File { path: path.to_owned(), problem };
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(SamplingParams::default()),
        Err(error) => return Err(failed(error.to_string())),
    };
    let fields: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|error| failed(format!("no JSON object: {error}")))?;
    let params = params_of(&fields).map_err(&failed)?;
    params.validate().map_err(|error| failed(error.to_string()))?;
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

/// A request's fields over the model's defaults. The seed stays the caller's business.
pub fn with_defaults(defaults: &SamplingParams, given: &v1::SamplingOptions, seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: given.temperature.unwrap_or(defaults.temperature),
        top_p: given.top_p.unwrap_or(defaults.top_p),
        top_k: given.top_k.or(defaults.top_k),
        min_p: given.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: given.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: given.presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: given.frequency_penalty.unwrap_or(defaults.frequency_penalty),
        seed,
        logprobs: given.logprobs,
    }
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

    #[test]
    fn a_given_field_wins_over_the_default_even_when_neutral() {
        let defaults = SamplingParams { temperature: 0.6, top_k: Some(5), ..SamplingParams::default() };
        let given = v1::SamplingOptions { temperature: Some(1.0), ..Default::default() };
        let params = with_defaults(&defaults, &given, 9);
        assert_eq!((params.temperature, params.top_k, params.seed), (1.0, Some(5), 9));
    }
}
