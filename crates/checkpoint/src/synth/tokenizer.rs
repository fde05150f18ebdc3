//! Tokenizer files, copied from another checkpoint.

use std::{fs, path::Path};

use serde_json::Value;

use super::SynthError;

const TOKENIZER: &str = "tokenizer.json";
/// Copied where present.
const OTHERS: [&str; 4] =
    ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"];

/// Copies the files from `from` to `to`, after checking that the model's vocabulary covers the ids.
pub(super) fn copy(from: &Path, to: &Path, vocab_size: usize) -> Result<(), SynthError> {
    let path = from.join(TOKENIZER);
    let failed = |reason: String| SynthError::Tokenizer { path: path.clone(), reason };
    let bytes = fs::read(&path).map_err(|error| failed(error.to_string()))?;
    let tokenizer: Value = serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))?;
    let largest = largest_id(&tokenizer).ok_or_else(|| failed("has no vocabulary".to_owned()))?;
    if largest >= vocab_size as u64 {
        return Err(failed(format!(
            "its largest id is {largest}, which needs a vocab_size above it; the model has {vocab_size}"
        )));
    }
    save(&to.join(TOKENIZER), &bytes)?;
    for name in OTHERS {
        let path = from.join(name);
        if path.is_file() {
            let bytes =
                fs::read(&path).map_err(|source| SynthError::Io { operation: "read", path, source })?;
            save(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}

fn largest_id(tokenizer: &Value) -> Option<u64> {
    let vocabulary = tokenizer.get("model")?.get("vocab")?.as_object()?;
    let added = tokenizer.get("added_tokens").and_then(Value::as_array);
    let added = added.into_iter().flatten().filter_map(|token| token.get("id"));
    vocabulary.values().chain(added).filter_map(Value::as_u64).max()
}

fn save(path: &Path, bytes: &[u8]) -> Result<(), SynthError> {
    fs::write(path, bytes).map_err(|source| SynthError::Io {
        operation: "write",
        path: path.to_owned(),
        source,
    })
}
