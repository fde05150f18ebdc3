//! The model that this router serves: what of the checkpoint the front doors need.

use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::error::RouterError;
use cadre_checkpoint::{Checkpoint, WeightsOptions};
use cadre_proto::v1;
use cadre_text::Tokenizer;
use cadre_types::{Generation, ModelConfig, ModelHash, NumericsClass, PlacementEpoch, SamplingParams};

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
    /// Where they come from, and what was overridden of the configuration.
    pub weights: WeightsOptions,
    /// Arithmetic of the cluster.
    pub numerics: NumericsClass,
    /// What a request gets for the fields that it leaves out.
    pub defaults: SamplingParams,
    /// When this router began to serve it, in seconds of the Unix epoch.
    pub created_unix_s: u64,
}

impl ServedModel {
    /// Reads a checkpoint's configuration, headers and tokenizer; no weights.
    pub fn load(
        dir: &Path,
        weights: &WeightsOptions,
        name: Option<String>,
        numerics: NumericsClass,
    ) -> Result<Self, RouterError> {
        let checkpoint = Checkpoint::open_with(dir, weights)?;
        if !weights.is_plain() {
            tracing::warn!(%weights, "not the published model: random weights or an override");
        }
        let tokenizer = Tokenizer::load_for(dir, checkpoint.config())?;
        for warning in checkpoint.warnings() {
            tracing::warn!(%warning, "checkpoint");
        }
        for warning in tokenizer.warnings() {
            tracing::warn!(%warning, "checkpoint");
        }
        let name = match name {
            Some(name) => name,
            None => folder_name(dir)?,
        };
        Ok(Self {
            name,
            config: checkpoint.config().clone(),
            defaults: tokenizer.sampling_defaults().clone(),
            tokenizer,
            hash: checkpoint.model_hash(),
            weights: weights.clone(),
            numerics,
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

/// The folder's own name, or of a snapshot in Hugging Face's cache (`models--org--name/snapshots/HASH`) the
/// repository's: clients know that, and the hash changes with every commit.
fn folder_name(dir: &Path) -> Result<String, RouterError> {
    let failed = |problem: String| RouterError::File { path: dir.to_owned(), problem };
    let full = dir.canonicalize().map_err(|error| failed(error.to_string()))?;
    if let Some(name) = cached_repository(&full) {
        return Ok(name);
    }
    let name = full.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    name.ok_or_else(|| failed("the folder's name is no text; give the model a name".into()))
}

fn cached_repository(snapshot: &Path) -> Option<String> {
    let snapshots = snapshot.parent().filter(|parent| parent.ends_with("snapshots"))?;
    let repository = snapshots.parent()?.file_name()?.to_str()?.strip_prefix("models--")?;
    // A repository has one owner at most; its own name may hold the separator.
    Some(repository.replacen("--", "/", 1)).filter(|name| !name.is_empty())
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

    use std::fs;

    use super::*;

    #[test]
    fn a_folder_of_the_hugging_face_cache_is_named_by_its_repository() {
        let root = tempfile::tempdir().unwrap();
        let name = |path: &str| {
            let dir = root.path().join(path);
            fs::create_dir_all(&dir).unwrap();
            folder_name(&dir).unwrap()
        };
        let hash = "4236a6af538feda4548eca9ab308586007567f52";
        let cache = format!("hub/models--deepseek-ai--DeepSeek-V3--x/snapshots/{hash}");
        assert_eq!(name(&cache), "deepseek-ai/DeepSeek-V3--x");
        assert_eq!(name(&format!("models--gpt2/snapshots/{hash}")), "gpt2");
        assert_eq!(name("models/snapshots/v3"), "v3", "no cache");
        assert_eq!(name("datasets--a--b/snapshots/v3"), "v3", "no model");
        assert_eq!(name("models--a--b/refs/v3"), "v3", "no snapshot");
        assert_eq!(name("models--a--b"), "models--a--b");
        // Where the cache is pointed at by a link, as in a volume.
        let link = root.path().join("model");
        std::os::unix::fs::symlink(root.path().join(&cache), &link).unwrap();
        assert_eq!(folder_name(&link).unwrap(), "deepseek-ai/DeepSeek-V3--x");
    }

    #[test]
    fn a_given_field_wins_over_the_default_even_when_neutral() {
        let defaults = SamplingParams { temperature: 0.6, top_k: Some(5), ..SamplingParams::default() };
        let given = v1::SamplingOptions { temperature: Some(1.0), ..Default::default() };
        let params = with_defaults(&defaults, &given, 9);
        assert_eq!((params.temperature, params.top_k, params.seed), (1.0, Some(5), 9));
    }
}
