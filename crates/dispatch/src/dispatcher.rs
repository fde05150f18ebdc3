//! [`Dispatcher`]: the worker's [`ExpertExchange`]. One thread owns it; links and their tasks only put
//! events into its mailbox.
//!
//! `dispatch` groups the batch, sends one frame per shard and returns. `combine` takes answers as they
//! come and hands their rows on. A frame that fails, or has no answer within `frame_timeout`, ejects its shard
//! and its pairs are planned again at once over the copies that remain. A frame that takes many times what its
//! peers take is planned again as well if others have copies of all that it wants, and its shard is avoided. Pairs without a usable copy are
//! *stranded*: the dispatcher waits for a probe, a link or a view to bring a copy back, until
//! `uncovered_wait` after the step's first failure, and then names the expert. All waits are on the
//! mailbox with a deadline. The rows that come back do not depend on who computed them or in how many
//! attempts, so retries never show in the text.
//!
//! A new placement is taken up between two exchanges, or by a retry inside one; the coordinator lets shards
//! drop the old one only when every worker says that it has no frame of it out ([`DispatchHandle::taken`]).

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering, fence},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use bytes::BytesMut;
use cadre_ops::{
    DispatchBatch, EncodedRows, ExchangeError, ExchangeTicket, ExpertExchange, ExpertRows, RowFormat,
};
use cadre_types::{ClusterView, Generation, LayerId, LogicalExpert, Placement, ShardIndex};
use crossbeam_channel::Receiver;
use tokio::sync::watch;

use crate::{
    frame::{DispatchFrame, frame_of_ones},
    health::{ChoiceRng, HealthPolicy, choose},
    plan::{FrameLimits, Pair, Plan, PlannedFrame, Planner, gather, slice},
    stats::{DispatchStats, add},
    transport::{Connect, Drive, Reply},
};

mod links;
mod mailbox;
mod recovery;
mod step;

use links::Links;
use mailbox::{Event, Mailbox};
use step::{InFlight, Step, Stranded};

/// Exchanges begun and not combined. Two micro-batches need two; more means that their owner gave up on
/// them (a failed step), and the oldest is forgotten.
const MAX_OPEN_STEPS: usize = 4;

/// Time bounds.
#[derive(Clone, Copy, Debug)]
pub struct DispatchConfig {
    /// A frame without an answer for this long is taken for lost: the bound on a hung shard. Broken
    /// connections are noticed at once and do not wait for it.
    pub frame_timeout: Duration,
    /// How long an exchange with failures may go on looking for a live copy.
    pub uncovered_wait: Duration,
    /// Ejection and signals.
    pub health: HealthPolicy,
}

impl Default for DispatchConfig {
    fn default() -> Self {
        Self {
            frame_timeout: Duration::from_secs(5),
            uncovered_wait: Duration::from_secs(30),
            health: HealthPolicy::default(),
        }
    }
}

/// What a dispatcher shares with the rest of its process.
#[derive(Debug)]
struct Shared {
    weights: Generation,
    view: ArcSwapOption<ClusterView>,
    /// An exchange is open: the owner may be working by an older view than `view`.
    active: AtomicBool,
    /// The newest placement such that no frame of an older one is out or will be sent.
    taken: watch::Sender<Option<Arc<Placement>>>,
    /// Its epoch, to be compared without a lock.
    taken_epoch: AtomicU64,
    closed: AtomicBool,
    mailbox: Arc<Mailbox>,
    stats: Arc<DispatchStats>,
}

impl Shared {
    /// Epochs of a coordinator only grow; of two that are told at once the newer stays.
    fn take_up(&self, placement: &Arc<Placement>) {
        self.taken.send_if_modified(|taken| {
            let newer = taken.as_ref().is_none_or(|taken| taken.epoch() < placement.epoch());
            if newer {
                self.taken_epoch.store(placement.epoch().0, Ordering::Release);
                *taken = Some(Arc::clone(placement));
            }
            newer
        });
    }
}

/// Tells a running dispatcher about the cluster; cheap to clone, usable from any thread.
#[derive(Clone, Debug)]
pub struct DispatchHandle {
    shared: Arc<Shared>,
}

impl DispatchHandle {
    /// Makes a view the one to dispatch by. Views of other weights or numerics are ignored with an error
    /// in the log: the coordinator refuses such members before it sends them anything.
    pub fn update(&self, view: Arc<ClusterView>) {
        if let Err(error) = self.shared.weights.check_weights(&view.generation) {
            tracing::error!(%error, "cluster view ignored");
            return;
        }
        self.shared.stats.observe_placement(&view.placement);
        let placement = Arc::clone(&view.placement);
        self.shared.view.store(Some(view));
        // With the fence in `Dispatcher::begin`: either we see that it is active, or it sees this view.
        fence(Ordering::SeqCst);
        if !self.shared.active.load(Ordering::Relaxed) {
            self.shared.take_up(&placement);
        }
        self.shared.mailbox.wake();
    }

    /// The placement that has been taken up: no frame of an older one is out, or will be sent.
    pub fn taken(&self) -> watch::Receiver<Option<Arc<Placement>>> {
        self.shared.taken.subscribe()
    }

    /// Ends every wait with [`ExchangeError::Closed`].
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.mailbox.wake();
    }

    /// The dispatcher's counters.
    pub fn stats(&self) -> Arc<DispatchStats> {
        self.shared.stats.clone()
    }
}

/// Sends rows to the shards that hold their experts and collects what comes back.
pub struct Dispatcher {
    config: DispatchConfig,
    shared: Arc<Shared>,
    events: Receiver<Event>,
    driver: Option<Arc<dyn Drive>>,
    links: Links,
    /// Frames gathered and about to be sent.
    outgoing: Vec<(ShardIndex, DispatchFrame)>,
    planner: Planner,
    pairs: Vec<Pair>,
    rng: ChoiceRng,
    /// Gathered frames are split off this; it takes its memory back when they are gone.
    buffer: BytesMut,
    /// Width of the rows, once one has been seen.
    hidden: usize,
    next_sequence: u64,
    next_ticket: u64,
    steps: VecDeque<Step>,
}

impl std::fmt::Debug for Dispatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let open = self.steps.len();
        f.debug_struct("Dispatcher").field("shared", &self.shared).field("open", &open).finish()
    }
}

impl Dispatcher {
    /// A dispatcher without a view yet. `weights` is our model and numerics (its epoch is ignored).
    pub fn new(config: DispatchConfig, weights: Generation, connector: Arc<dyn Connect>) -> Self {
        let (mailbox, events) = Mailbox::new();
        let stats = Arc::new(DispatchStats::default());
        let shared = Arc::new(Shared {
            weights,
            view: ArcSwapOption::empty(),
            active: AtomicBool::new(false),
            taken: watch::Sender::new(None),
            taken_epoch: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            mailbox: mailbox.clone(),
            stats: stats.clone(),
        });
        // Dispatchers of different processes, and of one, must not choose alike.
        static INSTANCES: AtomicU64 = AtomicU64::new(0);
        let instance = INSTANCES.fetch_add(1, Ordering::Relaxed);
        let seed = (u64::from(std::process::id()) << 32) | instance;
        Self {
            config,
            shared,
            events,
            driver: connector.driver(),
            outgoing: Vec::new(),
            links: Links::new(config.health, connector, mailbox, stats),
            planner: Planner::default(),
            pairs: Vec::new(),
            rng: ChoiceRng::new(seed),
            buffer: BytesMut::new(),
            hidden: 0,
            next_sequence: 1,
            next_ticket: 0,
            steps: VecDeque::new(),
        }
    }

    /// For the threads that feed it views and export its counters.
    pub fn handle(&self) -> DispatchHandle {
        DispatchHandle { shared: self.shared.clone() }
    }

    /// An exchange begins; called before the view is looked at.
    fn begin(&self) {
        self.shared.active.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// An exchange has begun or ended: tells which placement is taken up, if that has changed.
    fn settle_epoch(&self) {
        let taken = self.shared.taken_epoch.load(Ordering::Acquire);
        if self.steps.is_empty() {
            self.shared.active.store(false, Ordering::Relaxed);
            // A view that came while we were active and was not looked at is the next exchange's.
            fence(Ordering::SeqCst);
            if let Some(view) = &*self.shared.view.load()
                && view.placement.epoch().0 != taken
            {
                self.shared.take_up(&view.placement);
            }
        } else if let Some(view) = self.links.view()
            && view.placement.epoch().0 != taken
        {
            let epoch = view.placement.epoch();
            if !self.steps.iter().any(|step| step.waits_under_older(epoch)) {
                self.shared.take_up(&view.placement);
            }
        }
    }

    /// Takes up the latest view, the events that wait, and probes that are due.
    fn catch_up(&mut self) {
        self.follow_view();
        while let Ok(event) = self.events.try_recv() {
            self.handle_event(event);
        }
        if self.links.any_to_probe() {
            self.send_probes(Instant::now());
        }
    }

    fn follow_view(&mut self) {
        let Some(view) = self.shared.view.load_full() else { return };
        let now = Instant::now();
        let expired = self.links.follow(&view, now);
        for shard in expired {
            self.expire(shard, now);
        }
    }

    fn send_probes(&mut self, now: Instant) {
        let Some(view) = self.links.view().cloned() else { return };
        let Some(layer) = view.placement.layers().first().map(|placed| placed.layer) else { return };
        for shard in self.links.take_due_probes(now) {
            let sequence = self.next_sequence();
            let generation = Generation { epoch: view.placement.epoch(), ..self.shared.weights };
            // Empty, so that it costs nothing; but rows that were not finite are only disproven by finite ones.
            let (layer, hidden, slots) = match self.links.suspected(shard) {
                Some((layer, slot)) => (layer, self.hidden, vec![slot]),
                None => (layer, 0, Vec::new()),
            };
            let mut frame = frame_of_ones(generation, layer, hidden, slots);
            (frame.sequence, frame.tokens) = (sequence, usize::from(hidden > 0));
            self.links.probing(sequence, shard, now);
            add(&self.shared.stats.probes, 1);
            self.links.send(shard, frame, Reply::new(self.shared.mailbox.clone(), sequence));
        }
    }

    fn next_sequence(&mut self) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        sequence
    }

    /// Groups pairs of a step over the usable copies, sends what has one and strands the rest. `rows` is
    /// where the pairs' rows are; `late` names the frame whose answer is still good for stranded pairs.
    fn place(&mut self, step: &mut Step, rows: &EncodedRows, pairs: &[Pair], late: Option<u64>) {
        let Some(view) = self.links.view().cloned() else { return };
        let now = Instant::now();
        let limits = FrameLimits::of(rows.format, step.combine, rows.cols);
        let mut plan = {
            let (links, policy, rng) = (&mut self.links, &self.config.health, &mut self.rng);
            self.planner.plan(step.layer, &view.placement, pairs, limits, |_, replicas, tokens| {
                let usable = |shard| links.usable(shard);
                let chosen = choose(replicas, links.health(), usable, tokens, policy, now, rng);
                // Counted at once, so that the next run of this very plan sees it.
                if let Some(at) = chosen {
                    links.health_mut(replicas[at].shard).sent(tokens);
                }
                chosen
            })
        };
        self.gather_and_send(step, rows, &mut plan, now);
        if !plan.unplaced.is_empty() {
            self.links.publish();
            step.strand(now, Stranded::new(rows, &plan.unplaced, late));
        }
    }

    fn gather_and_send(&mut self, step: &mut Step, rows: &EncodedRows, plan: &mut Plan, now: Instant) {
        let width = rows.format.row_bytes(rows.cols);
        let scale_width = 4 * rows.format.row_scales(rows.cols);
        // Reserved for all frames of the step at once, so that they share one allocation and it can be
        // taken back as a whole when they are answered.
        let peers = self.links.peers();
        let copied = |frame: &&PlannedFrame| slice(rows, &frame.rows).is_none();
        let gathered: usize = plan.frames.iter().filter(copied).map(|frame| frame.rows.len()).sum();
        self.buffer.reserve(gathered * (width + scale_width));
        for planned in plan.frames.drain(..) {
            let PlannedFrame { shard, rows: wanted, pair_tokens, pair_slots, targets } = planned;
            let (data, scales) = match slice(rows, &wanted) {
                Some(rows) => (rows.data, rows.scales),
                None => {
                    let mut scales = BytesMut::with_capacity(wanted.len() * scale_width);
                    gather(rows.as_host_rows(), &wanted, &mut self.buffer, &mut scales);
                    (self.buffer.split().freeze(), scales.freeze())
                }
            };
            let sequence = self.next_sequence();
            let frame = DispatchFrame {
                sequence,
                generation: Generation { epoch: self.links.epoch(), ..self.shared.weights },
                layer: step.layer,
                tokens: wanted.len(),
                format: rows.format,
                data,
                scales,
                pair_tokens,
                pair_slots,
            };
            let stats = self.links.stats(shard);
            add(&stats.frames, 1);
            add(&stats.pairs, targets.len());
            add(&self.shared.stats.bytes_out, frame.payload_bytes());
            let mut in_flight = InFlight::new(shard, frame.clone(), targets, now);
            in_flight.slow_after = peers.map(|peers| self.links.slow_after(&peers, shard, now));
            step.frames.push(in_flight);
            self.outgoing.push((shard, frame));
        }
        self.send_outgoing();
    }

    fn send_outgoing(&mut self) {
        if self.outgoing.is_empty() {
            return;
        }
        let bytes = self.outgoing.iter().map(|(_, frame)| frame.payload_bytes()).sum();
        let (links, outgoing, mailbox) = (&self.links, &mut self.outgoing, &self.shared.mailbox);
        let mut send = || {
            for (shard, frame) in outgoing.drain(..) {
                let reply = Reply::new(mailbox.clone(), frame.sequence);
                links.send(shard, frame, reply);
            }
        };
        match &self.driver {
            Some(driver) => driver.flush(bytes, &mut send),
            None => send(),
        }
    }

    fn handle_event(&mut self, event: Event) {
        match event {
            Event::Wake => {
                self.shared.mailbox.awake();
                self.follow_view();
                self.links.notice_ups(Instant::now());
            }
            Event::Answer { sequence, answer, at } => {
                self.shared.mailbox.received();
                self.handle_answer(sequence, answer, at);
            }
        }
    }

    /// Waits until every row of the front step is in `out`, as it arrived.
    fn collect(&mut self, out: &mut ExpertRows) -> Result<(), ExchangeError> {
        loop {
            self.catch_up();
            let Some(mut step) = self.steps.pop_front() else { return Ok(()) };
            step.await_answers(Instant::now());
            step.hand_on(out);
            if step.fatal.is_none() && step.is_done() {
                return Ok(());
            }
            let (layer, now) = (step.layer, Instant::now());
            self.time_out(&mut step, now);
            self.leave_slow(&mut step, now);
            self.rescue(&mut step);
            let closed = self.shared.closed.load(Ordering::Acquire);
            let failed = step
                .fatal
                .take()
                .or_else(|| closed.then_some(ExchangeError::Closed { layer }))
                .or_else(|| self.give_up(&step, now));
            if let Some(error) = failed {
                self.forget(step);
                return Err(error);
            }
            let deadline = self.deadline(&step, now);
            self.steps.push_front(step);
            self.wait(deadline);
        }
    }

    /// Waits for an event or the deadline, running the links' I/O meanwhile if they want that.
    fn wait(&mut self, deadline: Instant) {
        if let Some(driver) = &self.driver {
            // The notification of an event taken before may be left over; the caller looks and waits again.
            if !self.events.is_empty() || driver.wait(self.shared.mailbox.arrived(), deadline) {
                return;
            }
        }
        // Never disconnected: `shared` holds the sending side.
        if let Ok(event) = self.events.recv_deadline(deadline) {
            self.handle_event(event);
        }
    }

    fn validate(&self, batch: &DispatchBatch<'_>) -> Result<(), ExchangeError> {
        let layer = batch.layer;
        let malformed = |message: String| Err(ExchangeError::Malformed { layer, message });
        let Some(view) = self.links.view() else {
            return Err(ExchangeError::NoPlacement { layer });
        };
        let rows = batch.activations;
        let class = self.shared.weights.numerics;
        if rows.format != RowFormat::dispatch(class) {
            return malformed(format!("rows are {:?} in class {class}", rows.format));
        }
        let sizes = [
            ("activation bytes", rows.data.len(), rows.rows * rows.format.row_bytes(rows.cols)),
            ("scale bytes", rows.scales.len(), rows.rows * rows.format.row_scales(rows.cols) * 4),
            ("chosen experts", batch.topk_idx.len(), rows.rows * batch.top_k),
        ];
        for (what, found, expected) in sizes {
            if found != expected {
                let tokens = rows.rows;
                return malformed(format!("{found} {what} for {tokens} tokens, expected {expected}"));
            }
        }
        if view.placement.layer(layer).is_none() && !batch.topk_idx.is_empty() {
            return malformed(format!("no experts of this layer are placed in {}", self.links.epoch()));
        }
        let experts = view.placement.num_experts();
        match batch.topk_idx.iter().find(|&&expert| usize::from(expert) >= experts) {
            Some(expert) => malformed(format!("expert {expert} of {experts}")),
            None => Ok(()),
        }
    }
}

impl ExpertExchange for Dispatcher {
    fn dispatch(&mut self, batch: DispatchBatch<'_>) -> Result<ExchangeTicket, ExchangeError> {
        self.begin();
        let ticket = self.dispatch_step(&batch);
        self.settle_epoch();
        ticket
    }

    fn combine(&mut self, ticket: ExchangeTicket, out: &mut ExpertRows) -> Result<(), ExchangeError> {
        let combined = self.combine_step(ticket, out);
        self.settle_epoch();
        combined
    }
}

impl Dispatcher {
    fn dispatch_step(&mut self, batch: &DispatchBatch<'_>) -> Result<ExchangeTicket, ExchangeError> {
        if self.shared.closed.load(Ordering::Acquire) {
            return Err(ExchangeError::Closed { layer: batch.layer });
        }
        self.catch_up();
        self.validate(batch)?;
        self.hidden = batch.activations.cols;
        self.shared.stats.count_experts(batch.layer, batch.topk_idx);
        while self.steps.len() >= MAX_OPEN_STEPS {
            if let Some(abandoned) = self.steps.pop_front() {
                self.forget(abandoned);
            }
        }
        let ticket = ExchangeTicket(self.next_ticket);
        self.next_ticket += 1;
        let combine = RowFormat::combine(self.shared.weights.numerics);
        let mut step = Step::new(ticket, batch, combine);

        let mut pairs = std::mem::take(&mut self.pairs);
        pairs.clear();
        pairs.extend(batch.topk_idx.iter().enumerate().map(|(target, &expert)| Pair {
            row: (target / batch.top_k) as u32,
            expert: LogicalExpert(expert),
            target: target as u32,
        }));
        self.place(&mut step, batch.activations, &pairs, None);
        self.pairs = pairs;
        self.steps.push_back(step);
        Ok(ticket)
    }

    fn combine_step(&mut self, ticket: ExchangeTicket, out: &mut ExpertRows) -> Result<(), ExchangeError> {
        // Tickets are combined in order: what is older was given up by its owner.
        while let Some(step) = self.steps.pop_front_if(|step| step.ticket != ticket) {
            self.forget(step);
        }
        let Some(step) = self.steps.front() else {
            let message = format!("ticket {} was never dispatched or is combined already", ticket.0);
            return Err(ExchangeError::Malformed { layer: LayerId(0), message });
        };
        out.format = step.combine;
        out.hidden = step.hidden;
        out.pairs = step.topk_idx.len();
        out.chunks.clear();
        self.collect(out)
    }
}
