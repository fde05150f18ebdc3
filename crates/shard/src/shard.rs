//! [`Shard`]: which slots it has, what is loaded, and who computes.
//!
//! A shard holds one placement, and for the time of a change of layout more than one: each is a contract of
//! its own, and a frame is computed under the placement whose epoch it carries. Placements share the
//! experts that they have in common; a frame keeps what it was accepted under until it is answered.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use cadre_dispatch::{DispatchFrame, Drive, Refusal, RefusalCode, Reply, ShardContract, ShardService};
use cadre_model::{ExpertKey, MemoryPlan, MemoryShort};
use cadre_ops::{Backend, OpsError, backend::Ffn};
use cadre_types::{Generation, LayerId, LogicalExpert, Placement, PlacementEpoch, ShardIndex};
use parking_lot::{Mutex, RwLock};

use crate::{
    compute::Compute,
    queue::{Full, Job, Queue},
    self_test::{self, SelfTestError},
    source::{ExpertSource, SourceError},
    stats::ShardStats,
};

/// Who a shard is.
#[derive(Clone, Copy, Debug)]
pub struct ShardOptions {
    /// Its index in placements.
    pub shard: ShardIndex,
    /// Model and numerics (the epoch is ignored).
    pub weights: Generation,
    /// Row width.
    pub hidden: usize,
}

/// An expert shard. Share it by `Arc`; dropping the last one ends its thread.
pub struct Shard<B: Backend> {
    inner: Arc<Inner<B>>,
    thread: Option<JoinHandle<()>>,
}

struct Inner<B: Backend> {
    options: ShardOptions,
    backend: Arc<B>,
    source: Arc<dyn ExpertSource<B>>,
    /// Ascending by epoch: rarely more than the one in force, the one before and the one to come.
    held: RwLock<Vec<Arc<Held<B>>>>,
    /// One placement is loaded at a time.
    loading: Mutex<()>,
    /// Epoch of the placement in force; 0 for none.
    in_force: AtomicU64,
    executor: Executor<B>,
    draining: AtomicBool,
    stopping: AtomicBool,
    bytes_read: AtomicU64,
    bytes_expected: AtomicU64,
    stats: Arc<ShardStats>,
}

/// Who computes: the submitting thread, or the shard's own.
enum Executor<B: Backend> {
    Inline(Mutex<Compute<B>>),
    Queue(Arc<Queue<B>>),
}

/// What is loaded under one placement.
pub(crate) struct Held<B: Backend> {
    pub(crate) contract: ShardContract,
    /// Of the placement: an epoch means one placement, unless a coordinator has lost its memory.
    digest: u64,
    /// By position in `contract.slots`; each is by slot.
    tables: Vec<B::ExpertTable>,
    /// Names of the same, for errors.
    names: Vec<Vec<LogicalExpert>>,
    experts: HashMap<ExpertKey, Arc<Ffn<B::Weight>>>,
    /// Of the bytes that each expert was packed from.
    digests: HashMap<ExpertKey, u64>,
}

impl<B: Backend> Held<B> {
    /// Nothing loaded.
    #[cfg(test)]
    pub(crate) fn empty(contract: ShardContract) -> Self {
        Self {
            contract,
            digest: 0,
            tables: Vec::new(),
            names: Vec::new(),
            experts: HashMap::new(),
            digests: HashMap::new(),
        }
    }

    /// The experts of a layer; `None` if none of them is placed here.
    pub(crate) fn experts(&self, layer: LayerId) -> Option<&B::ExpertTable> {
        let at = self.contract.slots.binary_search_by_key(&layer, |(layer, _)| *layer);
        at.ok().and_then(|at| self.tables.get(at))
    }

    /// Which expert a slot holds.
    pub(crate) fn expert_at(&self, layer: LayerId, slot: usize) -> Option<LogicalExpert> {
        let at = self.contract.slots.binary_search_by_key(&layer, |(layer, _)| *layer).ok()?;
        self.names.get(at)?.get(slot).copied()
    }
}

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Progress {
    /// Checkpoint bytes of the experts loaded for the placement loaded last, kept ones included.
    pub bytes_read: u64,
    /// Checkpoint bytes of all its experts.
    pub bytes_expected: u64,
}

/// Why a placement was not loaded. What was held before still is.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The placement has no such shard.
    #[error("apply {epoch}: it has {shards} shards and we are {shard}")]
    UnknownShard {
        /// The placement.
        epoch: PlacementEpoch,
        /// Us.
        shard: ShardIndex,
        /// Its shards.
        shards: usize,
    },
    /// An expert could not be loaded.
    #[error("apply {epoch}: load {} of {}: {source}", key.expert, key.layer)]
    Load {
        /// The placement.
        epoch: PlacementEpoch,
        /// The expert.
        key: ExpertKey,
        /// Why.
        source: SourceError,
    },
    /// The experts of a layer do not go together.
    #[error("apply {epoch}: {layer}: {source}")]
    Table {
        /// The placement.
        epoch: PlacementEpoch,
        /// The layer.
        layer: LayerId,
        /// What the backend said.
        source: OpsError,
    },
    /// The device has no room for its experts.
    #[error("apply {epoch}: {source}")]
    Memory {
        /// The placement.
        epoch: PlacementEpoch,
        /// What was planned and what there is.
        source: Box<MemoryShort>,
    },
    /// The shard was told to stop meanwhile, or the placement is not wanted any more.
    #[error("apply {epoch}: given up")]
    GivenUp {
        /// The placement.
        epoch: PlacementEpoch,
    },
}

impl<B: Backend> Shard<B> {
    /// A shard that computes on the thread that submits: for an engine in the same process, whose
    /// threads it then uses.
    pub fn inline(
        options: ShardOptions,
        backend: Arc<B>,
        source: Arc<dyn ExpertSource<B>>,
    ) -> Result<Self, OpsError> {
        let stats = Arc::new(ShardStats::default());
        let compute = Compute::new(backend.clone(), options.hidden, stats.clone())?;
        let executor = Executor::Inline(Mutex::new(compute));
        Ok(Self { inner: Inner::new(options, backend, source, executor, stats), thread: None })
    }

    /// A shard with a compute thread of its own, which runs the I/O of the streams that frames come by while it
    /// waits for them, if it is told how.
    pub fn spawn(
        options: ShardOptions,
        backend: Arc<B>,
        source: Arc<dyn ExpertSource<B>>,
        drive: Option<Arc<dyn Drive>>,
    ) -> Result<Self, OpsError> {
        let stats = Arc::new(ShardStats::default());
        let queue = Arc::new(Queue::new());
        let compute = Compute::new(backend.clone(), options.hidden, stats.clone())?;
        let executor = Executor::Queue(queue.clone());
        let inner = Inner::new(options, backend, source, executor, stats);
        let thread = thread::Builder::new()
            .name(format!("shard-{}", options.shard.0))
            .spawn(move || serve(&queue, compute, drive.as_deref()))
            .map_err(|error| OpsError::Device { op: "spawn", message: error.to_string() })?;
        Ok(Self { inner, thread: Some(thread) })
    }

    /// Loads what a placement gives us and then serves under it alone: [`Self::hold`],
    /// [`Self::put_in_force`] and [`Self::release`] in one.
    pub fn apply(&self, placement: &Placement) -> Result<(), ApplyError> {
        self.hold(placement, &AtomicBool::new(false))?;
        self.put_in_force(placement.epoch());
        self.release(|epoch| epoch == placement.epoch());
        Ok(())
    }

    /// Loads what a placement gives us, beside what is held, and answers frames of its epoch from then on.
    /// Experts that are loaded already are shared. Blocks while loading, until `given_up` says that nobody
    /// wants the placement any more; call it from a thread that may. Nothing to do for a placement that is
    /// held.
    pub fn hold(&self, placement: &Placement, given_up: &AtomicBool) -> Result<(), ApplyError> {
        self.inner.hold(placement, given_up)
    }

    /// Whether exactly this placement is held.
    pub fn holds(&self, placement: &Placement) -> bool {
        self.inner.holds(placement)
    }

    /// Says which of the held placements is in force; frames are answered under each of them alike.
    pub fn put_in_force(&self, epoch: PlacementEpoch) {
        self.inner.in_force.store(epoch.0, Ordering::Release);
    }

    /// Drops the placements that are not wanted. Experts that only they had go when the last frame that
    /// needs them is answered.
    pub fn release(&self, wanted: impl Fn(PlacementEpoch) -> bool) {
        self.inner.held.write().retain(|held| wanted(held.contract.generation.epoch));
        if self.epoch().is_some_and(|epoch| !wanted(epoch)) {
            self.put_in_force(PlacementEpoch(0));
        }
    }

    /// Epochs of the placements held, ascending.
    pub fn epochs(&self) -> Vec<PlacementEpoch> {
        self.inner.held.read().iter().map(|held| held.contract.generation.epoch).collect()
    }

    /// The placement in force.
    pub fn epoch(&self) -> Option<PlacementEpoch> {
        Some(PlacementEpoch(self.inner.in_force.load(Ordering::Acquire))).filter(|epoch| epoch.0 != 0)
    }

    /// How far loading is.
    pub fn progress(&self) -> Progress {
        Progress {
            bytes_read: self.inner.bytes_read.load(Ordering::Acquire),
            bytes_expected: self.inner.bytes_expected.load(Ordering::Acquire),
        }
    }

    /// Experts loaded, and the bytes of their packed weights.
    pub fn resident(&self) -> (usize, u64) {
        self.inner.resident()
    }

    /// Digests of the bytes of the experts loaded, ascending.
    pub fn digests(&self) -> BTreeMap<ExpertKey, u64> {
        let held = self.inner.held.read().clone();
        held.iter().flat_map(|held| held.digests.iter().map(|(key, digest)| (*key, *digest))).collect()
    }

    /// One real step under a placement that is held: a row through every slot of every layer, by the way
    /// that frames take. Finite rows of the right size prove the weights, the kernels and the compute
    /// thread.
    pub fn self_test(&self, epoch: PlacementEpoch, timeout: Duration) -> Result<(), SelfTestError> {
        let held = self.inner.held(epoch).ok_or(SelfTestError::NothingLoaded { epoch })?;
        self_test::run(self, &held.contract, Instant::now() + timeout)
    }

    /// Refuses new frames from now on.
    pub fn drain(&self) {
        self.inner.draining.store(true, Ordering::Release);
    }

    /// Waits until nothing is queued or being computed; false at the deadline.
    pub fn wait_idle(&self, deadline: Instant) -> bool {
        match &self.inner.executor {
            // Whoever computes inline holds the lock.
            Executor::Inline(compute) => compute.try_lock_until(deadline).is_some(),
            Executor::Queue(queue) => queue.wait_idle(deadline),
        }
    }

    /// Ends loading and the compute thread; frames that wait are refused.
    pub fn stop(&self) {
        self.inner.stopping.store(true, Ordering::Release);
        if let Executor::Queue(queue) = &self.inner.executor {
            queue.close();
        }
    }

    /// Whether the compute thread has ended: it was stopped, or a backend panicked.
    pub fn is_dead(&self) -> bool {
        match &self.inner.executor {
            Executor::Inline(_) => false,
            Executor::Queue(queue) => queue.is_closed(),
        }
    }

    /// (token, slot) pairs waiting.
    pub fn queued_pairs(&self) -> usize {
        self.inner.queued_pairs()
    }

    /// The shard's counters.
    pub fn stats(&self) -> &ShardStats {
        &self.inner.stats
    }
}

impl<B: Backend> Drop for Shard<B> {
    fn drop(&mut self) {
        self.stop();
        // The last owner may be a stream whose I/O the compute thread itself was running.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!(shard = %self.inner.options.shard, "the compute thread had panicked");
        }
    }
}

impl<B: Backend> ShardService for Shard<B> {
    fn submit(&self, frame: DispatchFrame, reply: Reply) {
        self.inner.submit(frame, reply);
    }
}

impl<B: Backend> std::fmt::Debug for Shard<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("options", &self.inner.options).finish_non_exhaustive()
    }
}

impl<B: Backend> Inner<B> {
    fn new(
        options: ShardOptions,
        backend: Arc<B>,
        source: Arc<dyn ExpertSource<B>>,
        executor: Executor<B>,
        stats: Arc<ShardStats>,
    ) -> Arc<Self> {
        Arc::new(Self {
            options,
            backend,
            source,
            held: RwLock::default(),
            loading: Mutex::new(()),
            in_force: AtomicU64::new(0),
            executor,
            draining: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            bytes_read: AtomicU64::new(0),
            bytes_expected: AtomicU64::new(0),
            stats,
        })
    }

    fn held(&self, epoch: PlacementEpoch) -> Option<Arc<Held<B>>> {
        self.held.read().iter().find(|held| held.contract.generation.epoch == epoch).cloned()
    }

    fn holds(&self, placement: &Placement) -> bool {
        self.held(placement.epoch()).is_some_and(|held| held.digest == placement.digest())
    }

    fn queued_pairs(&self) -> usize {
        match &self.executor {
            Executor::Inline(_) => 0,
            Executor::Queue(queue) => queue.pairs(),
        }
    }

    fn resident(&self) -> (usize, u64) {
        let held = self.held.read().clone();
        // Placements share experts.
        let experts: HashMap<ExpertKey, &Arc<Ffn<B::Weight>>> =
            held.iter().flat_map(|held| held.experts.iter().map(|(key, ffn)| (*key, ffn))).collect();
        let bytes = |ffn: &&Arc<Ffn<B::Weight>>| {
            self.backend.weight_bytes(&ffn.gate_up) + self.backend.weight_bytes(&ffn.down)
        };
        (experts.len(), experts.values().map(bytes).sum::<usize>() as u64)
    }

    fn submit(&self, frame: DispatchFrame, reply: Reply) {
        let held = match self.admit(&frame) {
            Ok(held) => held,
            Err(refusal) => {
                self.stats.refuse(refusal.code);
                return reply.send(Err(refusal.into()));
            }
        };
        let job = Job { frame, reply, held, accepted: Instant::now() };
        match &self.executor {
            Executor::Inline(compute) => compute.lock().run(vec![job], || 0, None),
            Executor::Queue(queue) => {
                if let Err((job, full)) = queue.push(job) {
                    let (shard, layer) = (self.options.shard, job.frame.layer);
                    let (code, what) = match full {
                        Full::Bytes(bytes) => (RefusalCode::Overloaded, format!("{bytes} bytes wait")),
                        Full::Frames(n) => (RefusalCode::Overloaded, format!("{n} frames wait")),
                        Full::Closed => (RefusalCode::Unavailable, "the compute thread is gone".to_owned()),
                    };
                    self.stats.refuse(code);
                    let refusal = Refusal::new(code, format!("{shard}, {layer}: {what}"));
                    job.reply.send(Err(refusal.into()));
                }
            }
        }
    }

    /// What the frame is computed with, or why not.
    fn admit(&self, frame: &DispatchFrame) -> Result<Arc<Held<B>>, Refusal> {
        let (shard, layer) = (self.options.shard, frame.layer);
        if self.draining.load(Ordering::Acquire) {
            let what = format!("{shard}, {layer}: draining");
            return Err(Refusal::new(RefusalCode::Unavailable, what));
        }
        let known = {
            let held = self.held.read();
            let epoch = frame.generation.epoch;
            // Under an epoch that is not held, the newest placement's contract says so.
            held.iter().find(|held| held.contract.generation.epoch == epoch).or(held.last()).cloned()
        };
        if let Some(held) = known {
            held.contract.check(frame)?;
            return Ok(held);
        }
        if let Err(mismatch) = self.options.weights.check_weights(&frame.generation) {
            return Err(Refusal::new(
                RefusalCode::Generation,
                format!("{shard}, {layer}: {}", mismatch.to_peer()),
            ));
        }
        let (read, expected) =
            (self.bytes_read.load(Ordering::Acquire), self.bytes_expected.load(Ordering::Acquire));
        let what = format!("{shard}, {layer}: nothing held yet, {read} of {expected} bytes loaded");
        Err(Refusal::new(RefusalCode::Unavailable, what))
    }

    fn hold(&self, placement: &Placement, given_up: &AtomicBool) -> Result<(), ApplyError> {
        let _one_at_a_time = self.loading.lock();
        let (epoch, shard) = (placement.epoch(), self.options.shard);
        let shards = placement.num_shards();
        if shard.index() >= shards {
            return Err(ApplyError::UnknownShard { epoch, shard, shards });
        }
        if self.holds(placement) {
            return Ok(());
        }
        let before = self.held.read().clone();
        let kept = |key: &ExpertKey| {
            before.iter().find_map(|held| Some((held.experts.get(key)?.clone(), *held.digests.get(key)?)))
        };
        let layers: Vec<(LayerId, Vec<ExpertKey>)> = placement
            .shard_slots(shard)
            .map(|(layer, experts)| {
                (layer, experts.iter().map(|&expert| ExpertKey { layer, expert }).collect())
            })
            .collect();

        let (mut sizes, mut plan) = (HashMap::new(), MemoryPlan::default());
        for &key in layers.iter().flat_map(|(_, keys)| keys) {
            let failed = |source| ApplyError::Load { epoch, key, source };
            sizes.insert(key, self.source.expert_bytes(key).map_err(failed)?);
            if kept(&key).is_none() {
                plan.weights += self.source.resident_bytes(&self.backend, key).map_err(failed)?;
            }
        }
        // Before the first byte is read: a card that is too small is known in seconds, not after minutes.
        plan.check(
            &shard.to_string(),
            &self.backend.identity().device,
            &self.backend.memory(),
            cadre_model::plan::SHARD_ADVICE,
        )
        .map_err(|source| ApplyError::Memory { epoch, source })?;
        self.bytes_read.store(0, Ordering::Release);
        self.bytes_expected.store(sizes.values().sum(), Ordering::Release);

        let mut experts = HashMap::with_capacity(sizes.len());
        let mut digests = HashMap::with_capacity(sizes.len());
        let mut tables = Vec::with_capacity(layers.len());
        for (layer, keys) in &layers {
            let mut row = Vec::with_capacity(keys.len());
            for &key in keys {
                if self.stopping.load(Ordering::Acquire) || given_up.load(Ordering::Acquire) {
                    return Err(ApplyError::GivenUp { epoch });
                }
                let (ffn, digest) = match kept(&key) {
                    Some(kept) => kept,
                    None => {
                        let failed = |source| ApplyError::Load { epoch, key, source };
                        let loaded = self.source.load(key).map_err(failed)?;
                        (Arc::new(loaded.ffn), loaded.digest)
                    }
                };
                digests.insert(key, digest);
                self.bytes_read.fetch_add(sizes[&key], Ordering::AcqRel);
                experts.insert(key, ffn.clone());
                row.push(ffn);
            }
            let table = self.backend.expert_table(row);
            tables.push(table.map_err(|source| ApplyError::Table { epoch, layer: *layer, source })?);
        }
        let contract = ShardContract {
            shard,
            generation: Generation { epoch, ..self.options.weights },
            hidden: self.options.hidden,
            slots: layers.iter().map(|(layer, keys)| (*layer, keys.len())).collect(),
        };
        let names = layers.iter().map(|(_, keys)| keys.iter().map(|key| key.expert).collect()).collect();
        let new = Arc::new(Held { contract, digest: placement.digest(), tables, names, experts, digests });
        let mut held = self.held.write();
        held.retain(|held| held.contract.generation.epoch != epoch);
        let at = held.partition_point(|held| held.contract.generation.epoch < epoch);
        held.insert(at, new);
        Ok(())
    }
}

/// The compute thread.
fn serve<B: Backend>(queue: &Arc<Queue<B>>, mut compute: Compute<B>, drive: Option<&dyn Drive>) {
    /// Closes the queue even if a backend panics, so that frames are refused instead of waiting.
    struct Close<'a, B: Backend>(&'a Queue<B>);
    impl<B: Backend> Drop for Close<'_, B> {
        fn drop(&mut self) {
            self.0.close();
        }
    }
    let close = Close(queue);
    while let Some(jobs) = queue.take(drive) {
        compute.run(jobs, || queue.pairs(), drive);
    }
    drop(close);
}

#[cfg(test)]
mod tests;
