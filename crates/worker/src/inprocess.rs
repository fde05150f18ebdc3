//! A complete engine in one process: attention, experts, dispatch between them. For tests and benches.
//!
//! Nothing is simplified away: frames are grouped, copies are chosen and rows are combined as between
//! processes; only the link is a function call, and an inline shard computes on the dispatching thread
//! with the same thread pool. The text is the cluster's, bit for bit (`tests/determinism.rs`).

use std::{path::Path, sync::Arc};

use cadre_checkpoint::{Checkpoint, CheckpointError, WeightsOptions};
use cadre_device::{BackendOptions, Device, DeviceError, Isa, OnBackend};
use cadre_dispatch::{DispatchConfig, DispatchHandle, Dispatcher, LocalConnector};
use cadre_engine::{Engine, EngineHandle, EngineParts, EngineStartError};
use cadre_model::{LoadOptions, Model, loader::LoadError};
use cadre_ops::{Backend, OpsError};
use cadre_placement::{ExpertLoad, PlanError, affordable_copies, plan_initial};
use cadre_scheduler::SchedulerConfig;
use cadre_shard::{ApplyError, CheckpointSource, Shard, ShardOptions};
use cadre_types::{
    ClusterView, Generation, Layout, Member, MemberId, MemberState, ModelConfig, NumericsClass, Placement,
    PlacementEpoch, Role, ShardIndex,
};

/// Default of [`InProcessOptions::kv_pages`]: 32 sequences of 4096 tokens.
pub const DEFAULT_KV_PAGES: u32 = 2048;

/// What to build.
#[derive(Clone, Debug)]
pub struct InProcessOptions {
    /// Where weights come from, and what is changed of the configuration.
    pub weights: WeightsOptions,
    /// The numerics class.
    pub class: NumericsClass,
    /// What it computes on; absent takes what the machine has.
    pub device: Option<Device>,
    /// Threads, the engine's included; absent takes what the machine allows.
    pub threads: Option<usize>,
    /// Instruction set; absent takes the best.
    pub isa: Option<Isa>,
    /// Expert shards; at least 1.
    pub shards: usize,
    /// Extra slots per layer over all shards.
    pub redundant_slots: usize,
    /// Pages of the KV cache.
    pub kv_pages: u32,
    /// Limits of batching; absent takes the defaults for `kv_pages`.
    pub scheduler: Option<SchedulerConfig>,
}

impl InProcessOptions {
    /// One shard, no redundancy, defaults otherwise.
    pub fn new(class: NumericsClass) -> Self {
        Self {
            weights: WeightsOptions::default(),
            class,
            device: None,
            threads: None,
            isa: None,
            shards: 1,
            redundant_slots: 0,
            kv_pages: DEFAULT_KV_PAGES,
            scheduler: None,
        }
    }
}

/// Why it could not be built.
#[derive(Debug, thiserror::Error)]
pub enum InProcessError {
    /// The checkpoint is unusable.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// No backend, for instance because the machine lacks the instruction set.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model has no experts to place.
    #[error(transparent)]
    Experts(#[from] cadre_placement::LoadError),
    /// The attention weights could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// No placement over so many shards and slots.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A shard could not be made.
    #[error("{shard}: {source}")]
    Shard {
        /// Which.
        shard: ShardIndex,
        /// Why.
        source: OpsError,
    },
    /// A shard's experts could not be loaded.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The engine did not start.
    #[error(transparent)]
    Engine(#[from] EngineStartError),
}

/// An engine with its experts. Dropping it ends everything.
#[derive(Debug)]
pub struct InProcess {
    // First: its loop uses the links, and ends before them.
    engine: Engine,
    dispatch: DispatchHandle,
    connector: LocalConnector,
    config: ModelConfig,
    generation: Generation,
}

impl InProcess {
    /// Loads a checkpoint and starts an engine over it. Blocks while loading.
    pub fn open(dir: &Path, options: &InProcessOptions) -> Result<Self, InProcessError> {
        let checkpoint = Arc::new(Checkpoint::open_with(dir, &options.weights)?);
        let backend = BackendOptions {
            device: options.device,
            class: options.class,
            threads: options.threads,
            isa: options.isa,
        };
        cadre_device::open(&backend, Parts { checkpoint, options })?
    }

    /// Submits work.
    pub fn handle(&self) -> EngineHandle {
        self.engine.handle()
    }

    /// The dispatcher's side, for its counters.
    pub fn dispatch(&self) -> &DispatchHandle {
        &self.dispatch
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Weights, numerics and placement epoch.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Makes a shard unreachable, as if its process had died: frames to it fail and go to other copies.
    pub fn lose_shard(&self, shard: ShardIndex) {
        self.connector.unregister(&local_address(shard));
    }
}

/// What an engine is made of, but for the backend.
struct Parts<'a> {
    checkpoint: Arc<Checkpoint>,
    options: &'a InProcessOptions,
}

impl OnBackend for Parts<'_> {
    type Output = Result<InProcess, InProcessError>;

    fn run<B: Backend>(self, backend: Arc<B>) -> Self::Output {
        let Self { checkpoint, options } = self;
        let config = checkpoint.config().clone();
        let placement = Arc::new(plan(&config, options)?);
        let generation =
            Generation { model: checkpoint.model_hash(), numerics: options.class, epoch: placement.epoch() };
        let model = Model::load(Arc::clone(&backend), &checkpoint, &LoadOptions { mtp: false }, &mut |_| {})?;
        let connector = LocalConnector::default();
        for index in 0..placement.num_shards() {
            let shard = shard_index(index);
            let options = ShardOptions { shard, weights: generation, hidden: config.hidden_size };
            let source = CheckpointSource::new(Arc::clone(&backend), Arc::clone(&checkpoint));
            let served = Shard::inline(options, Arc::clone(&backend), Arc::new(source))
                .map_err(|source| InProcessError::Shard { shard, source })?;
            served.apply(&placement)?;
            connector.register(local_address(shard), Arc::new(served));
        }
        let dispatcher = Dispatcher::new(DispatchConfig::default(), generation, Arc::new(connector.clone()));
        let dispatch = dispatcher.handle();
        dispatch.update(Arc::new(view(generation, placement)));
        let scheduler =
            options.scheduler.clone().unwrap_or_else(|| SchedulerConfig::with_pages(options.kv_pages));
        let engine = Engine::spawn(EngineParts::new(model, scheduler, Box::new(dispatcher)))?;
        Ok(InProcess { engine, dispatch, connector, config, generation })
    }
}

fn plan(config: &ModelConfig, options: &InProcessOptions) -> Result<Placement, InProcessError> {
    let experts = config.n_routed_experts;
    let load = ExpertLoad::uniform(config.served_moe_layers(), experts)?;
    let narrow = |value: usize| u16::try_from(value).unwrap_or(u16::MAX);
    let layout = Layout {
        shards: narrow(options.shards),
        redundant_slots: u32::try_from(options.redundant_slots).unwrap_or(u32::MAX),
        min_copies: narrow(affordable_copies(experts, options.redundant_slots)),
    };
    Ok(plan_initial(&load, experts, layout, &[], PlacementEpoch(1))?)
}

fn view(generation: Generation, placement: Arc<Placement>) -> ClusterView {
    let members = (0..placement.num_shards())
        .map(|index| {
            let shard = shard_index(index);
            Member {
                id: MemberId(local_address(shard)),
                role: Role::Expert(shard),
                address: local_address(shard),
                state: MemberState::Ready,
                pod: None,
            }
        })
        .collect();
    ClusterView::settled(generation, placement, members)
}

fn local_address(shard: ShardIndex) -> String {
    format!("shard-{}", shard.0)
}

/// A placement has fewer than 2^16 shards; the planner refuses more.
fn shard_index(index: usize) -> ShardIndex {
    ShardIndex(u16::try_from(index).unwrap_or(u16::MAX))
}
