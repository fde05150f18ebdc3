//! Where a shard's weights come from.

use std::{error::Error, sync::Arc};

use cadre_checkpoint::Checkpoint;
use cadre_model::{ExpertKey, ExpertLoader};
use cadre_ops::{Backend, backend::Ffn};

/// Why an expert could not be loaded, in the words of whoever tried.
pub type SourceError = Box<dyn Error + Send + Sync>;

/// Loads experts onto a backend.
pub trait ExpertSource<B: Backend>: Send + Sync + 'static {
    /// Bytes that loading this expert reads.
    fn expert_bytes(&self, key: ExpertKey) -> Result<u64, SourceError>;

    /// Bytes that it takes on the backend once loaded; 0 if nobody planned.
    fn resident_bytes(&self, _: &B, _: ExpertKey) -> Result<u64, SourceError> {
        Ok(0)
    }

    /// Loads it. Called from one thread at a time.
    fn load(&self, key: ExpertKey) -> Result<Loaded<B::Weight>, SourceError>;
}

/// An expert that was loaded.
#[derive(Debug)]
pub struct Loaded<W> {
    /// Its packed weights.
    pub ffn: Ffn<W>,
    /// Digest of the bytes that it was packed from: the same for every copy.
    pub digest: u64,
}

/// Experts of a checkpoint on disk. Only the byte ranges of the experts asked for are touched, and they
/// are given back to the system once packed, so that no expert is in memory twice.
pub struct CheckpointSource<B: Backend> {
    loader: ExpertLoader<B>,
    checkpoint: Arc<Checkpoint>,
}

impl<B: Backend> CheckpointSource<B> {
    /// The experts of a checkpoint, packed by a backend.
    pub fn new(backend: Arc<B>, checkpoint: Arc<Checkpoint>) -> Self {
        Self { loader: ExpertLoader::new(backend, checkpoint.clone()), checkpoint }
    }
}

impl<B: Backend> ExpertSource<B> for CheckpointSource<B> {
    fn expert_bytes(&self, key: ExpertKey) -> Result<u64, SourceError> {
        Ok(self.loader.expert_bytes(key)?)
    }

    fn resident_bytes(&self, backend: &B, key: ExpertKey) -> Result<u64, SourceError> {
        Ok(self.loader.resident_bytes(backend, key)?)
    }

    fn load(&self, key: ExpertKey) -> Result<Loaded<B::Weight>, SourceError> {
        let (ffn, digest) = self.loader.load_digested(key)?;
        self.checkpoint.release_expert(key.layer, key.expert)?;
        Ok(Loaded { ffn, digest })
    }
}
