//! Counting: parameters, bytes by tier, KV bytes, and bytes per expert shard. Pure.

use cadre_types::ModelConfig;
use serde::{Deserialize, Serialize};

use crate::table::{TensorSpec, Tier, table};

/// Parameters and bytes of one tier. Scales count as bytes, not as parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierTotals {
    /// The tier.
    pub tier: Tier,
    /// Parameters.
    pub params: u64,
    /// Bytes as stored.
    pub bytes: u64,
}

/// Bytes of latent cache per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvBytes {
    /// Main layers, BF16.
    pub bf16: u64,
    /// Main and MTP layers, BF16.
    pub bf16_with_mtp: u64,
    /// Main layers, F32.
    pub f32: u64,
    /// Main and MTP layers, F32.
    pub f32_with_mtp: u64,
}

/// What a configuration amounts to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Tensors of the table, optional ones included.
    pub tensors: u64,
    /// Parameters of the main model.
    pub main_params: u64,
    /// Parameters that only the MTP layer has.
    pub mtp_params: u64,
    /// Parameters that take part in one token's main forward pass, embedding and head included.
    pub active_params: u64,
    /// Every tier that the model has, in the order of [`Tier::ALL`].
    pub tiers: Vec<TierTotals>,
    /// Bytes that an attention worker loads: without the MTP module if nothing drafts with it.
    pub worker_bytes: u64,
    /// Bytes of all routed experts that shards load, one copy each.
    pub expert_bytes: u64,
    /// Bytes of the MTP layer's routed experts that no shard loads, because nothing drafts with them.
    pub idle_expert_bytes: u64,
    /// Bytes of one routed expert of one layer.
    pub bytes_per_expert: u64,
    /// Layers whose routed experts shards load.
    pub moe_layers: u64,
    /// Bytes of latent cache per token.
    pub kv: KvBytes,
}

impl Totals {
    /// Counts the configuration's table. `bytes_of` gives a tensor's stored bytes where known; else the
    /// published element type is assumed.
    pub fn of(config: &ModelConfig, bytes_of: impl Fn(&str) -> Option<u64>) -> Self {
        let mut tiers = Tier::ALL.map(|tier| TierTotals { tier, params: 0, bytes: 0 });
        let (mut tensors, mut main_params, mut mtp_params, mut active_params) = (0, 0, 0, 0);
        let (mut worker_bytes, mut expert_bytes, mut idle_expert_bytes) = (0, 0, 0);
        for spec in table(config) {
            let params = if spec.is_scale() { 0 } else { spec.elements() };
            tensors += 1;
            let tier = &mut tiers[spec.tier as usize];
            tier.params += params;
            let bytes = bytes_of(&spec.name).unwrap_or_else(|| spec.published_bytes());
            tier.bytes += bytes;
            let idle = is_mtp(config, &spec) && !config.drafts();
            match spec.tier {
                Tier::Expert if idle => idle_expert_bytes += bytes,
                Tier::Expert => expert_bytes += bytes,
                tier if tier.on_workers() && !idle => worker_bytes += bytes,
                _ => {}
            }
            if is_mtp(config, &spec) {
                mtp_params += if spec.tier == Tier::MtpDuplicate { 0 } else { params };
            } else {
                main_params += params;
                // All experts of a layer have one size: any `num_experts_per_tok` of them will do.
                let idle = spec.expert.is_some_and(|e| e.index() >= config.num_experts_per_tok);
                active_params += if idle { 0 } else { params };
            }
        }
        let moe_layers = config.served_moe_layers().count() as u64;
        Self {
            tensors,
            main_params,
            mtp_params,
            active_params,
            worker_bytes,
            expert_bytes,
            idle_expert_bytes,
            bytes_per_expert: expert_bytes / (moe_layers * config.n_routed_experts as u64).max(1),
            moe_layers,
            kv: kv_bytes(config),
            tiers: tiers.into_iter().filter(|totals| totals.params > 0).collect(),
        }
    }

    /// Counts a configuration of which no file is known.
    pub fn published(config: &ModelConfig) -> Self {
        Self::of(config, |_| None)
    }
}

fn is_mtp(config: &ModelConfig, spec: &TensorSpec) -> bool {
    spec.layer.is_some_and(|layer| layer.index() >= config.num_hidden_layers)
}

fn kv_bytes(config: &ModelConfig) -> KvBytes {
    let per = |layers: usize, bytes: usize| (config.kv_width() * layers * bytes) as u64;
    let (main, all) = (config.num_hidden_layers, config.total_layers());
    KvBytes { bf16: per(main, 2), bf16_with_mtp: per(all, 2), f32: per(main, 4), f32_with_mtp: per(all, 4) }
}

/// How routed experts are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Expert shards.
    pub shards: usize,
    /// Slots per MoE layer beyond one per expert, over all shards.
    pub redundant_slots: usize,
}

/// What one shard holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardTotals {
    /// Slots in each MoE layer.
    pub slots_per_layer: u64,
    /// Bytes of expert weights as stored.
    pub bytes: u64,
}

/// What every shard of a layout holds: the slots of a layer are spread evenly, the first shards having
/// one more where they do not divide.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayoutTotals {
    /// The layout.
    pub layout: Layout,
    /// By shard.
    pub shards: Vec<ShardTotals>,
}

/// A layout that no placement can satisfy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("layout: expected {expected}, found {found}; fix: {fix}")]
pub struct LayoutError {
    /// The rule.
    pub expected: String,
    /// The layout.
    pub found: String,
    /// What to do.
    pub fix: String,
}

impl LayoutTotals {
    /// Most shards of a layout: shard indices are 16 bits wide.
    const MAX_SHARDS: usize = u16::MAX as usize;

    /// Spreads the experts of a model.
    pub fn of(config: &ModelConfig, totals: &Totals, layout: &Layout) -> Result<Self, LayoutError> {
        let Layout { shards, redundant_slots } = *layout;
        let experts = config.n_routed_experts;
        let slots = experts.saturating_add(redundant_slots);
        let found = || format!("{shards} shards with {redundant_slots} redundant slots per layer");
        if !(1..=Self::MAX_SHARDS).contains(&shards) || shards > slots {
            return Err(LayoutError {
                expected: format!("between 1 shard and one per slot ({slots} slots per layer)"),
                found: found(),
                fix: "choose a number of shards in that range".to_owned(),
            });
        }
        // Two copies of an expert on one shard protect nothing, so a shard has at most one of each.
        if slots.div_ceil(shards) > experts {
            return Err(LayoutError {
                expected: format!("at most {experts} slots per shard and layer, one per expert"),
                found: found(),
                fix: "use fewer redundant slots or more shards".to_owned(),
            });
        }
        let per_slot = totals.bytes_per_expert * totals.moe_layers;
        let shard = |at: usize| {
            let slots_per_layer = (slots / shards + usize::from(at < slots % shards)) as u64;
            ShardTotals { slots_per_layer, bytes: slots_per_layer * per_slot }
        };
        Ok(Self { layout: *layout, shards: (0..shards).map(shard).collect() })
    }
}
