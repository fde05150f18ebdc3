//! DeepSeek-V3 on one node, on four, and over node pools.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::Toleration, apimachinery::pkg::api::resource::Quantity};

use super::{Object, Sample};
use crate::{
    IMAGE_CUDA, MoEModel, MoEModelSpec,
    model::{
        Accelerator, BudgetSpec, ClaimSource, ExpertLimits, ExpertTierSpec, ModelSource, ModelSpec,
        NetworkSpec, Numerics, PodSpec, Resources, RouterSpec, ShardWorkerSpec, WorkerLimits, WorkerTierSpec,
    },
};

const GPU: &str = "nvidia.com/gpu";
const POOL: &str = "example.com/pool";

pub(super) fn quantity(text: &str) -> Quantity {
    Quantity(text.to_owned())
}

/// A pod that asks for so much.
pub(super) fn resources(cpu: &str, memory: &str) -> PodSpec {
    let requests = [("cpu", cpu), ("memory", memory)].map(|(name, size)| (name.to_owned(), quantity(size)));
    let resources = Resources { requests: BTreeMap::from(requests), limits: BTreeMap::new() };
    PodSpec { resources, ..PodSpec::default() }
}

/// The same, on the nodes of a pool.
fn in_pool(pool: &str, pod: PodSpec) -> PodSpec {
    let toleration = |key: &str, value: &str| Toleration {
        key: Some(key.to_owned()),
        operator: Some("Equal".to_owned()),
        value: Some(value.to_owned()),
        effect: Some("NoSchedule".to_owned()),
        ..Toleration::default()
    };
    PodSpec {
        node_selector: BTreeMap::from([(POOL.to_owned(), pool.to_owned())]),
        tolerations: vec![toleration(POOL, pool)],
        ..pod
    }
}

fn workers(replicas: i32, kv_cache: &str, pod: PodSpec) -> WorkerTierSpec {
    let limits = WorkerLimits::default();
    WorkerTierSpec { replicas, kv_cache: quantity(kv_cache), limits, accelerator: gpu(), pod }
}

fn gpu() -> Option<Accelerator> {
    Some(Accelerator { resource: GPU.to_owned(), count: 1 })
}

/// What differs between the three.
struct Sizes {
    path: Option<&'static str>,
    router: PodSpec,
    prefill: WorkerTierSpec,
    decode: WorkerTierSpec,
    experts: ExpertTierSpec,
    gpus: i32,
}

fn model(sizes: Sizes) -> Result<serde_json::Value, serde_json::Error> {
    let claim = ClaimSource { claim_name: "deepseek-v3".to_owned(), path: sizes.path.map(str::to_owned) };
    let spec = MoEModelSpec {
        image: Some(IMAGE_CUDA.to_owned()),
        image_pull_secrets: Vec::new(),
        model: ModelSpec {
            source: ModelSource { persistent_volume_claim: Some(claim), ..ModelSource::default() },
            served_name: Some("deepseek-ai/DeepSeek-V3".to_owned()),
            routed_experts: 256,
            numerics: Numerics::CudaFp8,
        },
        router: RouterSpec { pod: sizes.router, ..RouterSpec::default() },
        prefill: sizes.prefill,
        decode: sizes.decode,
        experts: sizes.experts,
        network: NetworkSpec::default(),
        budget: Some(BudgetSpec { gpus: sizes.gpus }),
        drain_seconds: 120,
    };
    serde_json::to_value(MoEModel::new("deepseek-v3", spec))
}

pub(super) fn one_node() -> Result<Sample, serde_json::Error> {
    let value = model(Sizes {
        path: None,
        router: resources("2", "2Gi"),
        prefill: workers(1, "32Gi", resources("8", "32Gi")),
        decode: workers(1, "64Gi", resources("8", "32Gi")),
        experts: ExpertTierSpec {
            shards: 6,
            redundant_slots: 8,
            min_copies: 1,
            spread_by: "kubernetes.io/hostname".to_owned(),
            limits: ExpertLimits::default(),
            accelerator: gpu(),
            worker: None,
            pod: resources("8", "16Gi"),
        },
        gpus: 8,
    })?;
    Ok(Sample {
        file: "deepseek-v3-one-node.yaml",
        about: "DeepSeek-V3 on one node with 8 accelerators: 6 shards, 1 prefill worker, 1 decode worker.

Sizes, from `cadre inspect DIR --shards 6 --redundant-slots 8` on the published FP8 checkpoint (641 GiB): an
expert has 42 MiB in each of 58 MoE layers and the MTP layer, so a slot is 2.42 GiB; 264 slots on 6 shards are
44 each, 106.6 GiB. A worker has 17.9 GiB of its own, and 1 GiB of KV cache holds about 15,000 tokens. An
accelerator of 141 GB (131 GiB) holds a shard; one of 80 GB does not: see deepseek-v3-ep32.yaml.

Weights and KV are on the accelerators; the memory requests are for what is on its way there and for staging.
What nodes need (driver, device plugin, runtime) is in docs/operations.md, GPU nodes.",
        objects: vec![Object {
            value,
            notes: &[(
                "spec.experts",
                "One node is one failure domain and one copy of each expert fills it: a lost shard pauses the sequences \
                 that\nneed its experts until its pod is back. 8 redundant slots make 264, which 6 divides, and double the \
                 busiest.",
            )],
        }],
    })
}

pub(super) fn ep32() -> Result<Sample, serde_json::Error> {
    let value = model(Sizes {
        path: None,
        router: resources("4", "4Gi"),
        prefill: workers(8, "32Gi", resources("8", "32Gi")),
        decode: workers(0, "24Gi", resources("8", "32Gi")),
        experts: ExpertTierSpec {
            shards: 32,
            redundant_slots: 32,
            min_copies: 1,
            spread_by: "kubernetes.io/hostname".to_owned(),
            limits: ExpertLimits::default(),
            accelerator: gpu(),
            worker: Some(ShardWorkerSpec { kv_cache: quantity("24Gi"), limits: WorkerLimits::default() }),
            pod: resources("8", "32Gi"),
        },
        gpus: 40,
    })?;
    Ok(Sample {
        file: "deepseek-v3-ep32.yaml",
        about: "DeepSeek-V3 with 32 expert shards (EP32) on 4 nodes of 8 accelerators, as in its technical report: every
accelerator holds a shard and a decode worker, in one process (`experts.worker`): two processes that take
turns on a card need 151 us a turn where one alone needs 14. Prompts are computed on a fifth node.

Sizes, from `cadre inspect DIR --shards 32 --redundant-slots 32`: 9 slots of 2.42 GiB per shard, 21.8 GiB; a worker
has 17.9 GiB of its own and 1 GiB of KV cache holds about 15,000 tokens. Together below 80 GB.

Weights and KV are on the accelerators; the memory requests are for what is on its way there and for staging.
What nodes need (driver, device plugin, runtime) is in docs/operations.md, GPU nodes.",
        objects: vec![Object {
            value,
            notes: &[(
                "spec.experts",
                "32 redundant slots give the busiest experts a second copy; most experts have one. For every expert \
                 twice:\n`redundantSlots: 256` and `minCopies: 2`, 16 slots and 38.8 GiB per shard.",
            )],
        }],
    })
}

pub(super) fn pools() -> Result<Sample, serde_json::Error> {
    let value = model(Sizes {
        path: Some("models/DeepSeek-V3"),
        router: resources("4", "4Gi"),
        prefill: workers(2, "32Gi", in_pool("prefill", resources("8", "32Gi"))),
        decode: workers(8, "48Gi", in_pool("decode", resources("8", "32Gi"))),
        experts: ExpertTierSpec {
            shards: 32,
            redundant_slots: 256,
            min_copies: 2,
            spread_by: "topology.kubernetes.io/zone".to_owned(),
            limits: ExpertLimits::default(),
            accelerator: gpu(),
            worker: None,
            pod: in_pool("experts", resources("8", "16Gi")),
        },
        gpus: 48,
    })?;
    Ok(Sample {
        file: "deepseek-v3-pools.yaml",
        about: "DeepSeek-V3 with prefill, decode and experts on node pools of their own. Prefill wants arithmetic, decode wants
memory for KV, experts want memory for weights: each tier is placed, sized and scaled by itself.

Label the nodes `example.com/pool: prefill|decode|experts` and taint them `example.com/pool=NAME:NoSchedule`; the
tolerations for `nvidia.com/gpu` are what most GPU node pools need. Experts are spread over zones: two copies of
every expert, so that a whole zone may be lost.

Sizes, from `cadre inspect DIR --shards 32 --redundant-slots 256`: 16 slots of 2.42 GiB per shard, 38.8 GiB; a
worker has 17.9 GiB of its own and 1 GiB of KV cache holds about 15,000 tokens.

Weights and KV are on the accelerators; the memory requests are for what is on its way there and for staging.
What nodes need (driver, device plugin, runtime) is in docs/operations.md, GPU nodes.",
        objects: vec![Object {
            value,
            notes: &[(
                "spec.budget",
                "2 + 8 + 32 now; autoscalers may add up to 6 workers before the operator cuts them (condition \
                 ScalingLimited).",
            )],
        }],
    })
}
