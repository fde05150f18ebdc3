//! A small cluster for a case: a placement, its shards, a dispatcher, and the expected rows.

use std::{sync::Arc, time::Duration};

use cadre_dispatch::{DispatchConfig, DispatchHandle, Dispatcher, ShardContract};
use cadre_ops::{
    DispatchBatch, EncodedRows, ExchangeError, ExchangeTicket, ExpertExchange, ExpertRows, RowFormat,
};
use cadre_types::{
    ClusterView, Generation, LayerId, LayerPlacement, LogicalExpert, Member, MemberId, MemberState,
    ModelHash, NumericsClass, Placement, PlacementEpoch, Role, ShardIndex,
};

use super::{
    rig::Rig,
    scripted::{Scripted, compute, shard_name},
};

pub(crate) const LAYER: LayerId = LayerId(3);
pub(crate) const HIDDEN: usize = 130;

pub(crate) struct Cluster<R> {
    pub(crate) rig: R,
    pub(crate) shards: Vec<Arc<Scripted>>,
    pub(crate) view: ClusterView,
    pub(crate) weights: Generation,
}

/// Which experts each shard holds: all copies of four experts, by shard.
pub(crate) const SPLIT: &[&[u16]] = &[&[3, 0], &[1, 2]];
pub(crate) const TWO_COPIES: &[&[u16]] = &[&[0, 1, 2, 3], &[3, 2, 1, 0]];

impl<R: Rig> Cluster<R> {
    pub(crate) fn new(class: NumericsClass, slots: &[&[u16]]) -> Self {
        let epoch = PlacementEpoch(1);
        let weights = Generation { model: ModelHash([5; 16]), numerics: class, epoch };
        let placement = Arc::new(placement(epoch, slots));
        let mut rig = R::new();
        let mut shards = Vec::new();
        let mut members = Vec::new();
        for (at, held) in slots.iter().enumerate() {
            let shard = ShardIndex(at as u16);
            let contract = ShardContract {
                shard,
                generation: weights,
                hidden: HIDDEN,
                slots: vec![(LAYER, held.len())],
            };
            let service = Scripted::new(contract, placement.clone());
            let address = rig.start(shard, service.clone(), None);
            shards.push(service);
            members.push(Member {
                id: MemberId(shard_name(shard)),
                role: Role::Expert(shard),
                address,
                state: MemberState::Ready,
                pod: None,
            });
        }
        let view = ClusterView::settled(weights, placement, members);
        Self { rig, shards, view, weights }
    }

    /// A dispatcher that follows the view, with all shards connected.
    pub(crate) fn dispatcher(&self, config: DispatchConfig) -> Dispatcher {
        let dispatcher = Dispatcher::new(config, self.weights, self.rig.connector());
        dispatcher.handle().update(Arc::new(self.view.clone()));
        dispatcher
    }

    pub(crate) fn member(&mut self, shard: usize) -> &mut Member {
        &mut self.view.members[shard]
    }

    /// Sends the view, as changed by the case, to a dispatcher.
    pub(crate) fn publish(&self, handle: &DispatchHandle) {
        handle.update(Arc::new(self.view.clone()));
    }

    pub(crate) fn restart(&mut self, shard: usize, same_address: bool) {
        let address = same_address.then(|| self.view.members[shard].address.clone());
        let index = ShardIndex(shard as u16);
        let address = self.rig.start(index, self.shards[shard].clone(), address);
        self.view.members[shard].address = address;
    }

    pub(crate) fn stop(&mut self, shard: usize) {
        self.rig.stop(ShardIndex(shard as u16));
    }
}

pub(crate) fn placement(epoch: PlacementEpoch, slots: &[&[u16]]) -> Placement {
    let experts = slots.iter().flat_map(|held| held.iter()).max().map_or(0, |max| *max as usize + 1);
    let slots = slots.iter().map(|held| held.iter().copied().map(LogicalExpert).collect()).collect();
    Placement::new(epoch, experts, vec![LayerPlacement { layer: LAYER, slots }]).unwrap()
}

/// Bounds that no passing case meets: cases that test a bound shorten it.
pub(crate) fn patient() -> DispatchConfig {
    let mut config = DispatchConfig {
        frame_timeout: Duration::from_secs(120),
        uncovered_wait: Duration::from_secs(60),
        ..DispatchConfig::default()
    };
    config.health.probe_timeout = Duration::from_secs(120);
    config.health.slow_floor = Duration::from_secs(120);
    config
}

/// A shard that answers within the bounds of `patient` is left as slow after 200 ms or its usual time.
pub(crate) fn impatient() -> DispatchConfig {
    let mut config = patient();
    config.health.slow_floor = Duration::from_millis(200);
    config.health.slow_factor = 1;
    config
}

/// A hang is noticed after 50 ms.
pub(crate) fn quick() -> DispatchConfig {
    let mut config = patient();
    config.frame_timeout = Duration::from_millis(50);
    config.health.first_probe_after_hang = Duration::from_millis(5);
    config
}

/// Rows and choices of one exchange, and what must come back.
#[derive(Clone)]
pub(crate) struct Batch {
    class: NumericsClass,
    tokens: usize,
    top_k: usize,
    pub(crate) activations: EncodedRows,
    pub(crate) topk_idx: Vec<u16>,
}

impl Batch {
    /// Token `t` chooses experts in a pattern that differs from token to token.
    pub(crate) fn new(class: NumericsClass, tokens: usize, top_k: usize, salt: u8) -> Self {
        let format = RowFormat::dispatch(class);
        // Finite in every format: an exponent (or an e4m3 code) without its second bit is not all ones.
        let bytes = |len: usize| (0..len).map(|at| ((at * 31 % 251) as u8 ^ salt) & 0xBF).collect();
        let topk_idx = (0..tokens)
            .flat_map(|token| {
                let mut chosen: Vec<u16> =
                    (0..top_k as u16).map(|choice| (choice + token as u16 + u16::from(salt)) % 4).collect();
                chosen.sort_unstable();
                chosen
            })
            .collect();
        Self {
            class,
            tokens,
            top_k,
            activations: EncodedRows {
                format,
                rows: tokens,
                cols: HIDDEN,
                data: bytes(tokens * format.row_bytes(HIDDEN)),
                scales: bytes(tokens * 4 * format.row_scales(HIDDEN)),
            },
            topk_idx,
        }
    }

    pub(crate) fn f32(tokens: usize) -> Self {
        Self::new(NumericsClass::F32, tokens, 2, 7)
    }

    pub(crate) fn dispatch_batch(&self) -> DispatchBatch<'_> {
        DispatchBatch {
            layer: LAYER,
            activations: &self.activations,
            top_k: self.top_k,
            topk_idx: &self.topk_idx,
        }
    }

    fn expected(&self) -> Vec<u8> {
        let format = RowFormat::dispatch(self.class);
        let (width, scale_width) = (format.row_bytes(HIDDEN), 4 * format.row_scales(HIDDEN));
        let out = RowFormat::combine(self.class).row_bytes(HIDDEN);
        let pair = |(target, &expert): (usize, &u16)| {
            let token = target / self.top_k;
            let row = &self.activations.data[token * width..(token + 1) * width];
            let scales = &self.activations.scales[token * scale_width..(token + 1) * scale_width];
            compute(row, scales, expert, out)
        };
        self.topk_idx.iter().enumerate().flat_map(pair).collect()
    }

    pub(crate) fn send(&self, dispatcher: &mut Dispatcher) -> ExchangeTicket {
        dispatcher.dispatch(self.dispatch_batch()).unwrap()
    }

    /// Combines and compares.
    pub(crate) fn receive(&self, dispatcher: &mut Dispatcher, ticket: ExchangeTicket) {
        let mut out = ExpertRows::default();
        dispatcher.combine(ticket, &mut out).unwrap();
        assert_eq!(out.format, RowFormat::combine(self.class));
        assert_eq!((out.pairs, out.hidden), (self.tokens * self.top_k, HIDDEN));
        // Every pair once, whatever failed on the way.
        let mut pairs: Vec<u32> = out.chunks.iter().flat_map(|chunk| chunk.targets.clone()).collect();
        pairs.sort_unstable();
        assert_eq!(pairs, (0..out.pairs as u32).collect::<Vec<_>>());
        assert!(out.in_order() == self.expected(), "rows differ");
    }

    pub(crate) fn run(&self, dispatcher: &mut Dispatcher) {
        let ticket = self.send(dispatcher);
        self.receive(dispatcher, ticket);
    }

    pub(crate) fn fail(&self, dispatcher: &mut Dispatcher) -> ExchangeError {
        let ticket = self.send(dispatcher);
        dispatcher.combine(ticket, &mut ExpertRows::default()).unwrap_err()
    }
}
