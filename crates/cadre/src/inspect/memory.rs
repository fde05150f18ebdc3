//! What a worker and the shards of a layout take of a device: the plans that they make before they load.

use std::fmt;

use anyhow::Result;
use cadre_checkpoint::inspect::LayoutTotals;
use cadre_device::Device;
use cadre_model::{
    MemoryPlan, WorkerSizes,
    plan::{expert_elements, gib},
    shard_plan, worker_plan,
};
use cadre_types::{ModelConfig, NumericsClass};
use cadre_worker::options::{WorkerOptions, WorkerRole, scheduler_config};
use serde::Serialize;

use super::InspectArgs;

/// Memory by process.
#[derive(Debug, Serialize)]
pub(super) struct Memory {
    device: String,
    numerics: NumericsClass,
    /// Most rows of a step.
    max_step_tokens: usize,
    kv_pages: u32,
    worker: Bytes,
    /// By shard, of a layout in which they are spread evenly.
    shards: Vec<Bytes>,
}

/// Bytes of one process, without the driver's own (some 500 MB a process on a GPU).
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Bytes {
    total: u64,
    weights: u64,
    kv: u64,
    workspace: u64,
}

impl From<MemoryPlan> for Bytes {
    fn from(plan: MemoryPlan) -> Self {
        let MemoryPlan { weights, kv, workspace } = plan;
        Self { total: plan.total(), weights, kv, workspace }
    }
}

/// Plans for a device, which need not be there.
pub(super) fn of(
    device: Device,
    args: &InspectArgs,
    config: &ModelConfig,
    layout: Option<&LayoutTotals>,
) -> Result<Memory> {
    let sizes = cadre_device::sizes(device, args.numerics, None);
    let rows = args.max_step_tokens.unwrap_or_else(|| {
        WorkerOptions::new(args.dir.clone(), WorkerRole::Both, String::new()).max_step_tokens
    });
    let scheduler = scheduler_config(config, args.numerics, args.kv_bytes, rows)?;
    let worker = WorkerSizes { mtp: config.drafts(), pages: scheduler.pages as usize, rows };
    let (elements, layers) = (expert_elements(config), config.moe_layers().count());
    let shards = layout.map_or(&[][..], |layout| &layout.shards);
    let shard = |experts| shard_plan(&*sizes, config, elements, experts).map(Bytes::from);
    Ok(Memory {
        device: device.to_string(),
        numerics: args.numerics,
        max_step_tokens: rows,
        kv_pages: scheduler.pages,
        worker: worker_plan(&*sizes, config, &|_| None, worker)?.into(),
        shards: shards
            .iter()
            .map(|totals| shard(totals.slots_per_layer as usize * layers))
            .collect::<Result<_, _>>()?,
    })
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, numerics, worker, .. } = self;
        let plan =
            |bytes: &Bytes| MemoryPlan { weights: bytes.weights, kv: bytes.kv, workspace: bytes.workspace };
        write!(
            f,
            "memory        on {device} in class {numerics}: worker {} ({}",
            gib(worker.total),
            plan(worker)
        )?;
        write!(f, "; {} KV pages, steps of {} rows)", self.kv_pages, self.max_step_tokens)?;
        let (least, most) =
            (self.shards.iter().map(|s| s.total).min(), self.shards.iter().max_by_key(|s| s.total));
        if let (Some(least), Some(most)) = (least, most) {
            write!(f, "\n              each of {} shards {}", self.shards.len(), gib(most.total))?;
            if least != most.total {
                write!(f, " (the least {})", gib(least))?;
            }
            write!(f, " ({})", plan(most))?;
        }
        Ok(())
    }
}
