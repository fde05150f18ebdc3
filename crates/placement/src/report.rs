//! What a placement means under a load: balance, copies, and what the loss of each shard would uncover.
//!
//! A shard's tokens are counted as if an expert's copies shared its tokens evenly. Dispatch chooses the
//! copy with the shortest queue, so the imbalance seen live is at most about this one.

use std::{collections::BTreeMap, fmt};

use cadre_types::{LayerId, LayerPlacement, LogicalExpert, Placement, PlacementEpoch, ShardIndex};
use serde::{Deserialize, Serialize};

use crate::load::ExpertLoad;

/// Experts named per line before the text says "and more"; the data has them all.
const SHOWN: usize = 8;

/// A placement explained. `Display` prints it for people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlacementReport {
    /// The placement's version.
    pub epoch: PlacementEpoch,
    /// Routed experts per layer.
    pub num_experts: usize,
    /// Shards.
    pub shards: usize,
    /// Max / mean of tokens per shard, all layers together. 1 is perfect, and what an idle model has.
    pub imbalance: f64,
    /// The same of the worst layer: what the slowest step of a token waits for.
    pub worst_layer_imbalance: f64,
    /// Every layer, ascending.
    pub layers: Vec<LayerReport>,
    /// How many (layer, expert) pairs have how many copies, ascending by copies.
    pub copies: Vec<CopyCount>,
    /// What the loss of each shard uncovers, by shard.
    pub shard_loss: Vec<ShardLoss>,
}

/// One layer of a placement explained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// The layer.
    pub layer: LayerId,
    /// Slots per shard.
    pub slots_per_shard: Vec<usize>,
    /// Tokens per shard.
    pub tokens_per_shard: Vec<f64>,
    /// Max / mean of tokens per shard.
    pub imbalance: f64,
}

/// One bar of the histogram of copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyCount {
    /// Copies.
    pub copies: usize,
    /// (layer, expert) pairs that have so many.
    pub experts: usize,
}

/// The experts that only one shard holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardLoss {
    /// The shard.
    pub shard: ShardIndex,
    /// Layers in which its loss leaves experts without a copy; empty if its loss uncovers nothing.
    pub uncovers: Vec<Uncovered>,
}

/// Experts of a layer that would have no copy left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uncovered {
    /// The layer.
    pub layer: LayerId,
    /// The experts, ascending.
    pub experts: Vec<LogicalExpert>,
}

/// The load does not describe the placement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// A placed layer has no load.
    #[error("explain: the expert load has no {layer}, which the placement has")]
    MissingLayer {
        /// The layer.
        layer: LayerId,
    },
    /// The load counts another number of experts.
    #[error("explain: the expert load counts {found} experts per layer, the placement {expected}")]
    ExpertCount {
        /// Experts in the load.
        found: usize,
        /// Experts in the placement.
        expected: usize,
    },
}

/// Explains a placement under a load, which may cover more layers than the placement.
pub fn explain(placement: &Placement, load: &ExpertLoad) -> Result<PlacementReport, ReportError> {
    let expected = placement.num_experts();
    if load.num_experts() != expected {
        return Err(ReportError::ExpertCount { found: load.num_experts(), expected });
    }
    let layers = placement
        .layers()
        .iter()
        .map(|layer| explain_layer(placement, layer, load))
        .collect::<Result<Vec<_>, _>>()?;
    let mut tokens_per_shard = vec![0.0; placement.num_shards()];
    for layer in &layers {
        for (sum, tokens) in tokens_per_shard.iter_mut().zip(&layer.tokens_per_shard) {
            *sum += tokens;
        }
    }
    Ok(PlacementReport {
        epoch: placement.epoch(),
        num_experts: expected,
        shards: placement.num_shards(),
        imbalance: imbalance(&tokens_per_shard),
        worst_layer_imbalance: layers.iter().map(|layer| layer.imbalance).fold(1.0, f64::max),
        layers,
        copies: count_copies(placement),
        shard_loss: shard_loss(placement),
    })
}

fn explain_layer(
    placement: &Placement,
    layer: &LayerPlacement,
    load: &ExpertLoad,
) -> Result<LayerReport, ReportError> {
    let tokens = load.layer(layer.layer).ok_or(ReportError::MissingLayer { layer: layer.layer })?;
    let share = |expert: &LogicalExpert| {
        let copies = placement.replicas(layer.layer, *expert).len();
        tokens[expert.index()] as f64 / copies as f64
    };
    let tokens_per_shard: Vec<f64> = layer.slots.iter().map(|slots| slots.iter().map(share).sum()).collect();
    Ok(LayerReport {
        layer: layer.layer,
        slots_per_shard: layer.slots.iter().map(Vec::len).collect(),
        imbalance: imbalance(&tokens_per_shard),
        tokens_per_shard,
    })
}

/// Max / mean; 1 where there is nothing to balance, and where rounding makes it a hair less.
fn imbalance(tokens: &[f64]) -> f64 {
    let total: f64 = tokens.iter().sum();
    let largest = tokens.iter().copied().fold(0.0, f64::max);
    if total > 0.0 { (largest * tokens.len() as f64 / total).max(1.0) } else { 1.0 }
}

fn experts_of(placement: &Placement) -> impl Iterator<Item = LogicalExpert> {
    // A placement's experts have 16-bit ids: each is held by some slot.
    (0..placement.num_experts()).map_while(|expert| u16::try_from(expert).ok().map(LogicalExpert))
}

fn count_copies(placement: &Placement) -> Vec<CopyCount> {
    let mut counts = BTreeMap::<usize, usize>::new();
    for layer in placement.layers() {
        for expert in experts_of(placement) {
            *counts.entry(placement.replicas(layer.layer, expert).len()).or_default() += 1;
        }
    }
    counts.into_iter().map(|(copies, experts)| CopyCount { copies, experts }).collect()
}

fn shard_loss(placement: &Placement) -> Vec<ShardLoss> {
    let mut losses: Vec<ShardLoss> = (0..placement.num_shards())
        .map_while(|shard| u16::try_from(shard).ok())
        .map(|shard| ShardLoss { shard: ShardIndex(shard), uncovers: Vec::new() })
        .collect();
    for layer in placement.layers().iter().map(|layer| layer.layer) {
        for expert in experts_of(placement) {
            let [only] = placement.replicas(layer, expert) else { continue };
            let uncovers = &mut losses[only.shard.index()].uncovers;
            match uncovers.last_mut() {
                Some(last) if last.layer == layer => last.experts.push(expert),
                _ => uncovers.push(Uncovered { layer, experts: vec![expert] }),
            }
        }
    }
    losses
}

impl PlacementReport {
    /// Copies that every expert of every layer has at least.
    pub fn min_copies(&self) -> usize {
        self.copies.first().map_or(0, |count| count.copies)
    }
}

impl fmt::Display for PlacementReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "placement {}: {} experts in each of {} layers over {} shards",
            self.epoch,
            self.num_experts,
            self.layers.len(),
            self.shards
        )?;
        let slots = || self.layers.iter().flat_map(|layer| &layer.slots_per_shard);
        writeln!(
            f,
            "slots per shard and layer: {} to {}",
            slots().min().unwrap_or(&0),
            slots().max().unwrap_or(&0)
        )?;
        write!(f, "copies:")?;
        for (at, count) in self.copies.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma} {} experts x {}", count.experts, count.copies)?;
        }
        writeln!(f)?;
        writeln!(f, "imbalance (max/mean tokens per shard): {:.3} over all layers", self.imbalance)?;
        for layer in &self.layers {
            writeln!(f, "  {}: {:.3}", layer.layer, layer.imbalance)?;
        }
        self.shard_loss.iter().try_for_each(|loss| writeln!(f, "{loss}"))
    }
}

impl fmt::Display for ShardLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "losing {} uncovers: ", self.shard)?;
        let Some(first) = self.uncovers.first() else { return f.write_str("nothing") };
        let total: usize = self.uncovers.iter().map(|layer| layer.experts.len()).sum();
        write!(f, "{total} experts in {} layers ({}:", self.uncovers.len(), first.layer)?;
        for expert in first.experts.iter().take(SHOWN) {
            write!(f, " {}", expert.0)?;
        }
        let more = total - first.experts.len().min(SHOWN);
        if more > 0 { write!(f, " and {more} more)") } else { f.write_str(")") }
    }
}

#[cfg(test)]
mod tests;
