//! Placement: which slots of which shards hold which logical experts. Pure data, versioned by epoch.

use serde::{Deserialize, Serialize};

use crate::ids::{LayerId, LogicalExpert, PlacementEpoch, ShardIndex, SlotIndex};

/// One physical copy of an expert: the slot that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Replica {
    /// The shard that has the slot.
    pub shard: ShardIndex,
    /// The slot, counted per (shard, layer).
    pub slot: SlotIndex,
}

/// The placement of one MoE layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerPlacement {
    /// The layer.
    pub layer: LayerId,
    /// `slots[shard][slot]` is the logical expert that the slot holds.
    pub slots: Vec<Vec<LogicalExpert>>,
}

/// The placement of a model under one epoch, checked by [`Placement::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    epoch: PlacementEpoch,
    num_experts: usize,
    layers: Vec<LayerPlacement>,
    /// `replicas[layer position][logical expert]`: its copies, by ascending shard. Derived.
    replicas: Vec<Vec<Vec<Replica>>>,
}

impl Placement {
    /// Builds a placement and checks it: layers ascending, every layer over the same number of
    /// shards, every expert id below `num_experts`, every expert held at least once, and no shard
    /// holding two copies of one expert of a layer.
    pub fn new(
        epoch: PlacementEpoch,
        num_experts: usize,
        layers: Vec<LayerPlacement>,
    ) -> Result<Self, PlacementError> {
        if let Some(pair) = layers.windows(2).find(|pair| pair[0].layer >= pair[1].layer) {
            return Err(PlacementError::LayerOrder { layer: pair[1].layer });
        }
        let shards = layers.first().map_or(0, |layer| layer.slots.len());
        let mut replicas = Vec::with_capacity(layers.len());
        for layer in &layers {
            if layer.slots.len() != shards {
                return Err(PlacementError::ShardCount {
                    layer: layer.layer,
                    expected: shards,
                    found: layer.slots.len(),
                });
            }
            replicas.push(replicas_of(layer, num_experts)?);
        }
        Ok(Self { epoch, num_experts, layers, replicas })
    }

    /// The version.
    pub fn epoch(&self) -> PlacementEpoch {
        self.epoch
    }

    /// The same slots under another epoch.
    pub fn with_epoch(&self, epoch: PlacementEpoch) -> Self {
        Self { epoch, ..self.clone() }
    }

    /// FNV-1a (64 bits) over layers, shards and slots in order, without the epoch: two processes that
    /// hold the same epoch can tell whether they mean the same placement by it. Never 0.
    pub fn digest(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut eat = |value: u16| {
            for byte in value.to_le_bytes() {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        };
        for layer in &self.layers {
            eat(layer.layer.0);
            for slots in &layer.slots {
                // Counts fit: `replicas_of` has narrowed every slot index.
                eat(slots.len() as u16);
                slots.iter().for_each(|expert| eat(expert.0));
            }
        }
        hash.max(1)
    }

    /// Routed experts per layer.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Number of shards that the placement spreads over.
    pub fn num_shards(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.slots.len())
    }

    /// The layers, ascending.
    pub fn layers(&self) -> &[LayerPlacement] {
        &self.layers
    }

    /// The layer's placement, if it is a placed (MoE) layer.
    pub fn layer(&self, layer: LayerId) -> Option<&LayerPlacement> {
        self.position(layer).map(|at| &self.layers[at])
    }

    /// The copies of one expert, by ascending shard; empty for a layer or expert that is not placed.
    pub fn replicas(&self, layer: LayerId, expert: LogicalExpert) -> &[Replica] {
        self.position(layer).and_then(|at| self.replicas[at].get(expert.index())).map_or(&[], Vec::as_slice)
    }

    /// What one shard must hold, layer by layer: `(layer, experts by slot)`.
    pub fn shard_slots(&self, shard: ShardIndex) -> impl Iterator<Item = (LayerId, &[LogicalExpert])> {
        self.layers.iter().filter_map(move |layer| {
            layer.slots.get(shard.index()).map(|slots| (layer.layer, slots.as_slice()))
        })
    }

    fn position(&self, layer: LayerId) -> Option<usize> {
        self.layers.binary_search_by_key(&layer, |placed| placed.layer).ok()
    }
}

fn replicas_of(layer: &LayerPlacement, num_experts: usize) -> Result<Vec<Vec<Replica>>, PlacementError> {
    let mut replicas = vec![Vec::new(); num_experts];
    for (shard, slots) in layer.slots.iter().enumerate() {
        for (slot, &expert) in slots.iter().enumerate() {
            let shard = ShardIndex(narrow(shard, layer.layer)?);
            let copies: &mut Vec<Replica> = replicas
                .get_mut(expert.index())
                .ok_or(PlacementError::UnknownExpert { layer: layer.layer, expert, num_experts })?;
            if copies.last().is_some_and(|last| last.shard == shard) {
                return Err(PlacementError::Duplicate { layer: layer.layer, expert, shard });
            }
            copies.push(Replica { shard, slot: SlotIndex(narrow(slot, layer.layer)?) });
        }
    }
    match replicas.iter().position(Vec::is_empty) {
        Some(missing) => Err(PlacementError::Uncovered {
            layer: layer.layer,
            expert: LogicalExpert(narrow(missing, layer.layer)?),
        }),
        None => Ok(replicas),
    }
}

fn narrow(value: usize, layer: LayerId) -> Result<u16, PlacementError> {
    u16::try_from(value).map_err(|_| PlacementError::TooLarge { layer, value })
}

/// Why a placement is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// Layers are not strictly ascending.
    #[error("placement: {layer} is out of order or given twice")]
    LayerOrder {
        /// The offending layer.
        layer: LayerId,
    },
    /// Layers disagree on the number of shards.
    #[error("placement of {layer}: {found} shards, expected {expected}")]
    ShardCount {
        /// The offending layer.
        layer: LayerId,
        /// Shards of the first layer.
        expected: usize,
        /// Shards of this layer.
        found: usize,
    },
    /// A slot names an expert that the model does not have.
    #[error("placement of {layer}: {expert} does not exist, the model has {num_experts}")]
    UnknownExpert {
        /// The layer.
        layer: LayerId,
        /// The unknown expert.
        expert: LogicalExpert,
        /// Routed experts of the model.
        num_experts: usize,
    },
    /// One shard holds an expert twice, which protects nothing.
    #[error("placement of {layer}: {shard} holds {expert} twice")]
    Duplicate {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: LogicalExpert,
        /// The shard.
        shard: ShardIndex,
    },
    /// No slot holds the expert.
    #[error("placement of {layer}: no slot holds {expert}")]
    Uncovered {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: LogicalExpert,
    },
    /// A count does not fit its id type.
    #[error("placement of {layer}: {value} does not fit an id")]
    TooLarge {
        /// The layer.
        layer: LayerId,
        /// The count.
        value: usize,
    },
}

#[cfg(test)]
mod tests;
