//! Everything a worker can be told, with its defaults in one place. Nothing below `main` reads flags or
//! the environment.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    time::Duration,
};

use cadre_checkpoint::WeightsOptions;
use cadre_device::Device;
use cadre_expert::SharedProcess;
use cadre_ops::RowFormat;
use cadre_proto::secret::ClusterSecret;
use cadre_scheduler::{PAGE_TOKENS, SchedulerConfig};
use cadre_types::{AdvertiseError, ModelConfig, NumericsClass, PodRef, Role};
use serde::Serialize;
use tokio::sync::oneshot;

/// Default of [`WorkerOptions::kv_bytes`].
pub const DEFAULT_KV_BYTES: u64 = 512 << 20;

/// How a worker is set up.
#[derive(Debug)]
pub struct WorkerOptions {
    /// The checkpoint.
    pub model_dir: PathBuf,
    /// Where its weights come from, and what is changed of its configuration. The same in every process of a model.
    pub weights: WeightsOptions,
    /// Prompts, decoding, or both.
    pub role: WorkerRole,
    /// `host:port` of the coordinator (the router's).
    pub coordinator: String,
    /// Where `cadre.v1.Worker` and health are served. Port 0 takes any free one.
    pub listen: SocketAddr,
    /// `host:port` under which the router and other workers reach it; absent is the bound address, which
    /// must then not be a wildcard.
    pub advertise: Option<String>,
    /// Where metrics, health and readiness are served.
    pub admin: SocketAddr,
    /// The numerics class; the coordinator refuses another than its own.
    pub numerics: NumericsClass,
    /// What it computes on; absent takes what the machine has.
    pub device: Option<Device>,
    /// Threads of the backend; absent takes what the machine or its container allows.
    pub threads: Option<NonZeroUsize>,
    /// Bytes of the latent KV cache; the number of pages follows.
    pub kv_bytes: u64,
    /// Most rows of a step, decode rows and prompt tokens together.
    pub max_step_tokens: usize,
    /// Bounds of waits.
    pub timeouts: WorkerTimeouts,
    /// The pod that it runs in; `None` outside Kubernetes.
    pub pod: Option<PodRef>,
    /// The pod's address, advertised where `advertise` is absent.
    pub pod_ip: Option<IpAddr>,
    /// The cluster's secret: asked of every caller, shown to every peer.
    pub secret: Option<ClusterSecret>,
    /// The process that it is a role of; `None` for a process of its own. `device`, `threads` and `admin` are then the
    /// process's.
    pub shared: Option<SharedProcess>,
    /// Receives the real addresses once every port is bound.
    pub bound: Option<oneshot::Sender<BoundAddresses>>,
}

impl WorkerOptions {
    /// The defaults for a checkpoint, a role and a coordinator.
    pub fn new(model_dir: PathBuf, role: WorkerRole, coordinator: impl Into<String>) -> Self {
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self {
            model_dir,
            weights: WeightsOptions::default(),
            role,
            coordinator: coordinator.into(),
            listen: any_port,
            advertise: None,
            admin: any_port,
            numerics: NumericsClass::default(),
            device: None,
            threads: None,
            kv_bytes: DEFAULT_KV_BYTES,
            max_step_tokens: SchedulerConfig::with_pages(1).max_step_tokens,
            timeouts: WorkerTimeouts::default(),
            pod: None,
            pod_ip: None,
            secret: None,
            shared: None,
            bound: None,
        }
    }
}

/// What an attention worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerRole {
    /// Computes prompts and hands them off.
    Prefill,
    /// Decodes what it is handed (and computes prompts itself when asked to).
    Decode,
    /// Both.
    Both,
}

impl From<WorkerRole> for Role {
    fn from(role: WorkerRole) -> Self {
        match role {
            WorkerRole::Prefill => Self::Prefill,
            WorkerRole::Decode => Self::Decode,
            WorkerRole::Both => Self::Both,
        }
    }
}

/// Bounds of a worker's waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerTimeouts {
    /// A hand-off in which nothing moves for this long has failed.
    pub handoff: Duration,
    /// A sequence with pages whose prefill worker has not begun by then has failed. Longer: its prompt may
    /// wait in the prefill worker's queue.
    pub handoff_begin: Duration,
    /// Longest that running sequences are waited for when the worker is told to stop.
    pub drain: Duration,
    /// How long an expert without a live copy is waited for before its sequences fail.
    pub uncovered: Duration,
    /// How long a shard may take to answer a frame before its pairs go to another copy.
    pub dispatch: Duration,
}

impl Default for WorkerTimeouts {
    fn default() -> Self {
        Self {
            handoff: Duration::from_secs(10),
            handoff_begin: Duration::from_secs(60),
            drain: Duration::from_secs(30),
            uncovered: Duration::from_secs(30),
            dispatch: Duration::from_secs(5),
        }
    }
}

/// Where a worker listens indeed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BoundAddresses {
    /// gRPC.
    pub grpc: SocketAddr,
    /// Admin.
    pub admin: SocketAddr,
}

/// Why options are unusable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// The cache holds not even one page.
    #[error("kv-bytes: {kv_bytes} bytes hold no page, one has {page_bytes} bytes")]
    NoPage {
        /// What was given.
        kv_bytes: u64,
        /// Bytes of a page of all layers.
        page_bytes: u64,
    },
    /// A step has no room for decode rows and a prompt.
    #[error("max-step-tokens: {given}, must be at least 2")]
    StepTokens {
        /// What was given.
        given: usize,
    },
    /// Nobody could reach the worker.
    #[error(transparent)]
    Advertise(#[from] AdvertiseError),
}

/// Bytes of a KV page over all main layers.
pub fn page_bytes(config: &ModelConfig, class: NumericsClass) -> u64 {
    let row = RowFormat::combine(class).row_bytes(config.kv_width());
    (config.num_hidden_layers * PAGE_TOKENS * row) as u64
}

/// The scheduler's limits for a cache of `kv_bytes` and steps of `max_step_tokens`: at most an eighth of a
/// step for decode rows where it is smaller than the default, so that a prompt always advances.
pub fn scheduler_config(
    config: &ModelConfig,
    class: NumericsClass,
    kv_bytes: u64,
    max_step_tokens: usize,
) -> Result<SchedulerConfig, OptionsError> {
    let page_bytes = page_bytes(config, class);
    // Beyond 2^32 positions the scheduler refuses; a cache that large is cut to what it can name.
    let most = u64::from(u32::MAX) / PAGE_TOKENS as u64;
    let pages = (kv_bytes / page_bytes.max(1)).min(most) as u32;
    if pages == 0 {
        return Err(OptionsError::NoPage { kv_bytes, page_bytes });
    }
    if max_step_tokens < 2 {
        return Err(OptionsError::StepTokens { given: max_step_tokens });
    }
    let defaults = SchedulerConfig::with_pages(pages);
    Ok(SchedulerConfig {
        max_step_tokens,
        max_decode_rows: defaults.max_decode_rows.min((max_step_tokens / 8).max(1)),
        max_chunk_tokens: (max_step_tokens / 2).max(1),
        prefill_tokens_with_decode: defaults.prefill_tokens_with_decode.min((max_step_tokens / 4).max(1)),
        ..defaults
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn v3() -> ModelConfig {
        let mut config =
            cadre_checkpoint::synth::SynthSpec::tiny(cadre_checkpoint::synth::WeightFormat::Bf16, 1).config;
        config.num_hidden_layers = 61;
        config.kv_lora_rank = 512;
        config.qk_rope_head_dim = 64;
        config
    }

    #[test]
    fn pages_follow_from_bytes() {
        // 61 layers x 64 tokens x 576 bf16 values: 64 times the 70,272 bytes of spec §4.
        assert_eq!(page_bytes(&v3(), NumericsClass::Bf16), 64 * 70_272);
        assert_eq!(page_bytes(&v3(), NumericsClass::F32), 2 * 64 * 70_272);
        let config = scheduler_config(&v3(), NumericsClass::Bf16, 10 * 64 * 70_272 + 5, 512).unwrap();
        assert_eq!(config.pages, 10);
    }

    #[test]
    fn unusable_limits_are_named() {
        let scheduler = |bytes, tokens| scheduler_config(&v3(), NumericsClass::Bf16, bytes, tokens);
        assert_eq!(scheduler(7, 512), Err(OptionsError::NoPage { kv_bytes: 7, page_bytes: 64 * 70_272 }));
        assert_eq!(scheduler(1 << 30, 1), Err(OptionsError::StepTokens { given: 1 }));
    }

    #[test]
    fn every_step_size_gives_limits_that_the_scheduler_takes() {
        for tokens in [2, 3, 7, 8, 64, 512, 4096] {
            let config = scheduler_config(&v3(), NumericsClass::Bf16, 1 << 30, tokens).unwrap();
            assert_eq!(config.check(), Ok(()), "{tokens}");
        }
    }
}
