//! Routed experts, one at a time: what a shard loads into its slots.

use std::sync::Arc;

use cadre_checkpoint::Checkpoint;
use cadre_ops::{Allocation, Backend, ElementType, backend::Ffn};
use cadre_types::{LayerId, LogicalExpert, ModelConfig};

use crate::{
    loader::{LoadError, Reader},
    plan::{element_type, expert_elements},
};

/// Names one routed expert of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertKey {
    /// The layer.
    pub layer: LayerId,
    /// The expert.
    pub expert: LogicalExpert,
}

/// Loads experts; touches only the byte ranges of those asked for.
pub struct ExpertLoader<B: Backend> {
    backend: Arc<B>,
    checkpoint: Arc<Checkpoint>,
}

impl<B: Backend> ExpertLoader<B> {
    /// A loader of one checkpoint's experts onto one backend.
    pub fn new(backend: Arc<B>, checkpoint: Arc<Checkpoint>) -> Self {
        Self { backend, checkpoint }
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    /// The backend that the experts are loaded onto.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }

    /// Checkpoint bytes of one expert, scales included.
    pub fn expert_bytes(&self, key: ExpertKey) -> Result<u64, LoadError> {
        Ok(self.checkpoint.expert_size(key.layer, key.expert)?)
    }

    /// Bytes that one expert takes on a backend.
    pub fn resident_bytes(&self, backend: &B, key: ExpertKey) -> Result<u64, LoadError> {
        let gate = format!("model.layers.{}.mlp.experts.{}.gate_proj.weight", key.layer.0, key.expert.0);
        let config = self.checkpoint.config();
        let elements = match expert_elements(config) {
            // Quantised matrices have one type only; others may be stored in F32.
            ElementType::E4m3 => ElementType::E4m3,
            plain => element_type(&self.checkpoint, &gate).unwrap_or(plain),
        };
        let (hidden, inner) = (config.hidden_size, config.moe_intermediate_size);
        backend
            .bytes_of(&Allocation::Ffn { hidden, inner, elements })
            .map_err(|source| LoadError::Backend { tensor: gate, source })
    }

    /// Loads one expert.
    pub fn load(&self, key: ExpertKey) -> Result<Ffn<B::Weight>, LoadError> {
        self.load_digested(key).map(|(ffn, _)| ffn)
    }

    /// Loads one expert, with the digest of the bytes that were read: gate, up and down matrix, each with its
    /// scales.
    pub fn load_digested(&self, key: ExpertKey) -> Result<(Ffn<B::Weight>, u64), LoadError> {
        let bytes_expected = self.expert_bytes(key)?;
        let mut progress = |_| {};
        let mut reader = Reader::new(&*self.backend, &self.checkpoint, bytes_expected, &mut progress);
        let ffn = reader.ffn(&format!("model.layers.{}.mlp.experts.{}.", key.layer.0, key.expert.0))?;
        Ok((ffn, reader.digest.value()))
    }
}
