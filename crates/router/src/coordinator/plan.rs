//! The placement at start: from a file of measured load, or as if all experts were alike.

use std::path::{Path, PathBuf};

use cadre_placement::{ExpertLoad, plan_initial};
use cadre_types::{ModelConfig, Placement, PlacementEpoch};

use crate::{error::RouterError, options::RouterOptions};

/// Looked for in the checkpoint's folder when no file is named.
const LOAD_FILE: &str = "cadre-expert-load.json";

/// Largest load file. V3 needs 59 layers × 256 counts of at most 21 characters: 320 KB.
const MAX_LOAD_BYTES: u64 = 64 << 20;

/// The placement under epoch 1.
pub(crate) fn plan(options: &RouterOptions, config: &ModelConfig) -> Result<Placement, RouterError> {
    let load = expert_load(options, config)?;
    Ok(plan_initial(
        &load,
        config.n_routed_experts,
        usize::from(options.shards.get()),
        options.redundant_slots,
        PlacementEpoch(1),
    )?)
}

fn expert_load(options: &RouterOptions, config: &ModelConfig) -> Result<ExpertLoad, RouterError> {
    let beside = options.model_dir.join(LOAD_FILE);
    let path = match &options.expert_load {
        Some(path) => path.clone(),
        None if beside.is_file() => beside,
        None => {
            let uniform = ExpertLoad::uniform(config.moe_layers(), config.n_routed_experts);
            return uniform.map_err(|source| RouterError::Load { path: options.model_dir.clone(), source });
        }
    };
    let load = read(&path)?;
    let checked = load.check_model(config.moe_layers(), config.n_routed_experts);
    checked.map_err(|source| RouterError::Load { path: path.clone(), source })?;
    tracing::info!(path = %path.display(), "placement planned from measured expert load");
    Ok(load)
}

fn read(path: &Path) -> Result<ExpertLoad, RouterError> {
    let failed = |problem: String| RouterError::File { path: PathBuf::from(path), problem };
    let size = std::fs::metadata(path).map_err(|error| failed(error.to_string()))?.len();
    if size > MAX_LOAD_BYTES {
        return Err(failed(format!("{size} bytes, an expert load has at most {MAX_LOAD_BYTES}")));
    }
    let text = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
    serde_json::from_slice(&text)
        .map_err(|error| failed(format!("{error}; export one from /expert-load of a router's admin port")))
}

#[cfg(test)]
mod tests;
