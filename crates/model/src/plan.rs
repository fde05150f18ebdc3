//! What a process will take of its device, added up before it takes any.
//!
//! The list follows [`Model::load`], [`Workspace::new`] and a shard's loading allocation by allocation; a test
//! compares the sum with what a backend accounts for. [`Sizes`] says what each takes, so that a plan needs a device's
//! rules and not the device: `cadre inspect --device` uses the same functions.
//!
//! [`Model::load`]: crate::Model::load
//! [`Workspace::new`]: crate::Workspace::new

use std::fmt;

use cadre_checkpoint::{
    Checkpoint, DrawnData, MatrixBytes, MatrixSource,
    header::Dtype,
    table::{TensorSpec, table},
};
use cadre_ops::{Allocation, DeviceMemory, ElementType, KvLayout, OpsError, Sizes};
use cadre_types::ModelConfig;

use crate::rope::attention_shape;

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Matrices, vectors and tables, packed.
    pub weights: u64,
    /// The latent cache.
    pub kv: u64,
    /// Buffers and scratch memory of steps or passes.
    pub workspace: u64,
}

/// What a worker will hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerSizes {
    /// The MTP module is loaded.
    pub mtp: bool,
    /// Pages of the cache.
    pub pages: usize,
    /// Most rows of a step; as many may want logits.
    pub rows: usize,
}

/// What a device has no room for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{who}: {device} needs {} ({plan}), {} free: {advice}", gib(plan.total()), gib(*free))]
pub struct MemoryShort {
    /// The role.
    pub who: String,
    /// The device.
    pub device: String,
    /// What was planned.
    pub plan: MemoryPlan,
    /// What there is.
    pub free: u64,
    /// What can be done.
    pub advice: &'static str,
}

/// What helps a worker.
pub const WORKER_ADVICE: &str = "fewer --kv-bytes or --max-step-tokens, or nothing else on the device";
/// What helps a shard.
pub const SHARD_ADVICE: &str = "more shards, fewer redundant slots, or nothing else on the device";

/// Bytes in GiB, as people compare them.
pub fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}

impl fmt::Display for MemoryPlan {
    /// `weights 40.1, KV 20.0, workspace 1.1`, in GiB; without a cache if there is none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        write!(f, "weights {:.1}, ", gib(self.weights))?;
        if self.kv > 0 {
            write!(f, "KV {:.1}, ", gib(self.kv))?;
        }
        write!(f, "workspace {:.1}", gib(self.workspace))
    }
}

impl MemoryPlan {
    /// Everything.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.workspace
    }

    /// Compares with what a device has free. On a GPU that is exact, and too much is an error. A processor's free
    /// memory is an estimate that other processes change, so there only what is beyond all memory (or the container's
    /// limit) is an error; what is beyond the free part is a warning.
    pub fn check(
        &self,
        who: &str,
        device: &str,
        memory: &DeviceMemory,
        advice: &'static str,
    ) -> Result<(), Box<MemoryShort>> {
        let Some(free) = memory.free else { return Ok(()) };
        let (who, device) = (who.to_owned(), device.to_owned());
        tracing::info!(
            who,
            device,
            needs = self.total(),
            weights = self.weights,
            kv = self.kv,
            workspace = self.workspace,
            free,
            total = memory.total,
            "memory planned"
        );
        if self.total() <= free {
            return Ok(());
        }
        let short = MemoryShort { who, device, plan: *self, free, advice };
        let estimate = short.device == "cpu";
        if estimate && self.total() <= memory.total {
            tracing::warn!("{short}");
            return Ok(());
        }
        Err(Box::new(short))
    }
}

/// What a worker takes. `elements` tells the stored type of a matrix; `None` is the published one.
pub fn worker_plan(
    sizes: &dyn Sizes,
    config: &ModelConfig,
    elements: &dyn Fn(&str) -> Option<ElementType>,
    worker: WorkerSizes,
) -> Result<MemoryPlan, OpsError> {
    let with_mtp = worker.mtp && config.num_nextn_predict_layers > 0;
    let shape = attention_shape(config);
    let mut weights = sizes.planned(&Allocation::Attention { shape: &shape })?;
    for spec in table(config) {
        let main = spec.layer.is_none_or(|layer| layer.index() < config.num_hidden_layers);
        // Copies of embedding and head are not loaded.
        if spec.optional || spec.is_scale() || !spec.tier.on_workers() || !(main || with_mtp) {
            continue;
        }
        // Quantised matrices have one type only; others may be stored in F32.
        let elements = match of_dtype(spec.dtypes[0]) {
            ElementType::E4m3 => ElementType::E4m3,
            plain if spec.shape.len() == 2 => elements(&spec.name).unwrap_or(plain),
            plain => plain,
        };
        weights += match *spec.shape.as_slice() {
            [len] => sizes.planned(&Allocation::Vector { len })?,
            [inner, hidden] if spec.name.ends_with("mlp.gate_proj.weight") || is_shared_gate(&spec) => {
                sizes.planned(&Allocation::Ffn { hidden, inner, elements })?
            }
            // With their gate_proj.
            _ if is_ffn(&spec) => 0,
            [..] if spec.name.ends_with("kv_b_proj.weight") => {
                sizes.planned(&Allocation::KvUp { shape: &shape, elements })?
            }
            [rows, cols] => sizes.planned(&Allocation::Matrix { rows, cols, elements })?,
            _ => 0,
        };
    }
    let layout = KvLayout {
        layers: config.num_hidden_layers + usize::from(with_mtp),
        pages: worker.pages,
        page_tokens: KvLayout::PAGE_TOKENS,
        kv_lora_rank: config.kv_lora_rank,
        qk_rope_head_dim: config.qk_rope_head_dim,
    };
    let kv = sizes.planned(&Allocation::KvCache { layout })?;
    Ok(MemoryPlan { weights, kv, workspace: workspace(sizes, config, with_mtp, worker)? })
}

fn workspace(
    sizes: &dyn Sizes,
    config: &ModelConfig,
    with_mtp: bool,
    worker: WorkerSizes,
) -> Result<u64, OpsError> {
    let shape = attention_shape(config);
    let (rows, hidden) = (worker.rows, config.hidden_size);
    let q_latent = config.q_lora_rank.unwrap_or(1);
    let heads = config.num_attention_heads;
    // `normed`, `projected` and `hidden`; the query's two; query, kv_a and attended.
    let mut widths = vec![hidden, hidden, hidden, q_latent, q_latent];
    widths.extend([heads * config.qk_head_dim(), config.kv_width(), heads * config.v_head_dim]);
    if with_mtp {
        widths.extend([hidden, hidden, 2 * hidden]);
    }
    let shared = config.moe_intermediate_size * config.n_shared_experts;
    let positions = config.max_position_embeddings.min(worker.pages * KvLayout::PAGE_TOKENS);
    let mut bytes = 0;
    for cols in widths {
        bytes += sizes.planned(&Allocation::Activations { rows, cols })?;
    }
    for allocation in [
        Allocation::Residual { rows, cols: hidden },
        Allocation::Residual { rows, cols: hidden },
        Allocation::Rows { rows, cols: hidden },
        Allocation::Logits { rows, vocab: config.vocab_size },
        Allocation::StepScratch {
            shape: &shape,
            rows,
            hidden,
            inner: config.intermediate_size.max(shared),
            positions,
        },
    ] {
        bytes += sizes.planned(&allocation)?;
    }
    Ok(bytes)
}

/// What a shard takes that holds so many experts.
pub fn shard_plan(
    sizes: &dyn Sizes,
    config: &ModelConfig,
    elements: ElementType,
    experts: usize,
) -> Result<MemoryPlan, OpsError> {
    let (hidden, inner) = (config.hidden_size, config.moe_intermediate_size);
    let limits = sizes.planned_pass(hidden);
    let expert = sizes.planned(&Allocation::Ffn { hidden, inner, elements })?;
    let mut workspace = 0;
    for allocation in [
        Allocation::Rows { rows: limits.rows, cols: hidden },
        Allocation::Activations { rows: limits.pairs, cols: hidden },
        Allocation::PassScratch { limits, hidden, inner },
    ] {
        workspace += sizes.planned(&allocation)?;
    }
    Ok(MemoryPlan { weights: expert * experts as u64, kv: 0, workspace })
}

/// The published element type of the routed experts.
pub fn expert_elements(config: &ModelConfig) -> ElementType {
    if config.quantization.is_some() { ElementType::E4m3 } else { ElementType::Bf16 }
}

fn is_shared_gate(spec: &TensorSpec) -> bool {
    spec.name.ends_with("mlp.shared_experts.gate_proj.weight")
}

fn is_ffn(spec: &TensorSpec) -> bool {
    ["up_proj.weight", "down_proj.weight", "gate_proj.weight"].iter().any(|end| spec.name.ends_with(end))
}

/// The stored element type of a matrix of a checkpoint that is published in BF16, for which F32 is accepted; `None` for
/// the published one.
pub fn element_type(checkpoint: &Checkpoint, name: &str) -> Option<ElementType> {
    match checkpoint.source(name).ok()? {
        MatrixSource::Stored(view) => Some(match view.data {
            MatrixBytes::F32(_) => ElementType::F32,
            MatrixBytes::Bf16(_) => ElementType::Bf16,
            MatrixBytes::E4m3 { .. } => ElementType::E4m3,
        }),
        MatrixSource::Drawn(view) => Some(match view.data {
            DrawnData::F32 => ElementType::F32,
            DrawnData::Bf16 => ElementType::Bf16,
            DrawnData::E4m3 { .. } => ElementType::E4m3,
        }),
    }
}

fn of_dtype(dtype: Dtype) -> ElementType {
    match dtype {
        Dtype::E4m3 => ElementType::E4m3,
        Dtype::Bf16 => ElementType::Bf16,
        _ => ElementType::F32,
    }
}
