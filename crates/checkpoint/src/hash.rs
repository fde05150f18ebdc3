//! The identity of a checkpoint, cheap enough to compute in every process at start.
//!
//! Over: the bytes of `config.json`; the map from tensor name to file; and per shard, in file-name
//! order, its name, length, header and sixteen evenly spaced samples of its bytes. Every variable part
//! is preceded by its length. The directory's path, timestamps and the spelling of the index do not
//! enter. Two checkpoints that differ only in bytes between the samples are not told apart: this
//! guards against mixing versions, not against tampering.

use cadre_mapping::Access;
use cadre_types::ModelHash;
use sha2::{Digest, Sha256};

use crate::{
    catalog::{Catalog, Tensor},
    listing::Shard,
    weights::WeightsOptions,
};

/// Samples per shard, the first at its start and the last at its end.
pub(crate) const SAMPLES: usize = 16;
/// Bytes per sample: one page.
pub(crate) const SAMPLE_BYTES: usize = 4096;

pub(crate) fn model_hash(config: &[u8], weights: &WeightsOptions, catalog: &Catalog) -> ModelHash {
    let mut hash = Sha256::new();
    hash.update(b"cadre checkpoint 1\0");
    part(&mut hash, config);
    for change in weights.sorted() {
        part(&mut hash, change.to_string().as_bytes());
    }
    let known = || catalog.iter().filter(Tensor::is_known);
    hash.update((known().count() as u64).to_le_bytes());
    for tensor in known() {
        part(&mut hash, tensor.name.as_bytes());
        part(&mut hash, tensor.shard.file.as_bytes());
    }
    hash.update((catalog.shards().len() as u64).to_le_bytes());
    catalog.shards().iter().for_each(|shard| shard_part(&mut hash, shard));
    let digest = hash.finalize();
    let mut cut = [0; 16];
    cut.copy_from_slice(&digest[..16]);
    ModelHash(cut)
}

fn part(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

fn shard_part(hash: &mut Sha256, shard: &Shard) {
    let bytes = shard.mapping.bytes();
    // Reads the samples and not their neighbourhoods. Refused hints cost only time and memory.
    let _ = shard.mapping.expect(Access::Scattered);
    part(hash, shard.file.as_bytes());
    hash.update((bytes.len() as u64).to_le_bytes());
    part(hash, &bytes[..shard.data_start.min(bytes.len())]);
    let last = bytes.len().saturating_sub(SAMPLE_BYTES);
    for sample in 0..SAMPLES {
        // In u128: a length times fifteen may not fit a usize.
        let start = (last as u128 * sample as u128 / (SAMPLES as u128 - 1)) as usize;
        let end = bytes.len().min(start + SAMPLE_BYTES);
        hash.update(&bytes[start..end]);
    }
    let _ = shard.mapping.expect(Access::Runs);
    let _ = shard.mapping.release(0..bytes.len());
}
