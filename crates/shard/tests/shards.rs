//! The rows of a MoE layer are the same bits for any number of shards, with and without copies, computed
//! inline or by shards' own threads, in-process or over gRPC, and while a shard is lost.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cadre_checkpoint::{
    Checkpoint,
    synth::{self, SynthSpec, WeightFormat},
};
use cadre_dispatch::{
    Connect, DispatchConfig, Dispatcher, ExpertServer, GrpcConnector, IoThread, LocalConnector, tuning,
};
use cadre_ops::{
    Backend, DispatchBatch, ExpertExchange, ExpertRows, HostRows, RowFormat, reference::ReferenceBackend,
};
use cadre_shard::{CheckpointSource, Shard, ShardOptions};
use cadre_types::{
    ClusterView, Generation, LayerPlacement, LogicalExpert, Member, MemberId, MemberState, NumericsClass,
    Placement, PlacementEpoch, Role, ShardIndex,
};

const PATIENCE: Duration = Duration::from_secs(120);

/// Expert `e` on shard `e % shards`, and its copy (of the first `redundant` experts) on the next.
fn placement(checkpoint: &Checkpoint, shards: usize, redundant: usize) -> Placement {
    let config = checkpoint.config();
    let experts = config.n_routed_experts;
    let layers = config.moe_layers().map(|layer| {
        let mut slots = vec![Vec::new(); shards];
        for expert in 0..experts {
            slots[expert % shards].push(LogicalExpert(expert as u16));
            if expert < redundant {
                slots[(expert + 1) % shards].push(LogicalExpert(expert as u16));
            }
        }
        LayerPlacement { layer, slots }
    });
    Placement::new(PlacementEpoch(1), experts, layers.collect()).unwrap()
}

/// A checkpoint, a batch for it, and where its shards are.
struct Bench {
    checkpoint: Arc<Checkpoint>,
    class: NumericsClass,
    backend: Arc<ReferenceBackend>,
    data: Vec<u8>,
    scales: Vec<u8>,
    topk_idx: Vec<u16>,
}

const TOKENS: usize = 11;

impl Bench {
    fn new(checkpoint: &Arc<Checkpoint>, class: NumericsClass) -> Self {
        let backend = Arc::new(ReferenceBackend::new(class));
        let config = checkpoint.config();
        let (hidden, top_k) = (config.hidden_size, config.num_experts_per_tok);
        // Values go through the backend's own encoder, as a worker's do.
        let values: Vec<u8> = (0..TOKENS * hidden)
            .flat_map(|at| (((at * 31 % 97) as f32 - 48.0) / 32.0).to_le_bytes())
            .collect();
        let rows =
            HostRows { format: RowFormat::F32, rows: TOKENS, cols: hidden, data: &values, scales: &[] };
        let mut queue = backend.queue().unwrap();
        let mut x = backend.alloc(TOKENS, hidden).unwrap();
        backend.upload_rows(&mut queue, rows, &mut x).unwrap();
        let (mut data, mut scales) = (Vec::new(), Vec::new());
        let format = RowFormat::dispatch(class);
        backend.download_rows(&mut queue, &x, TOKENS, format, &mut data, &mut scales).unwrap();
        let mut topk_idx = Vec::new();
        for token in 0..TOKENS {
            let mut chosen: Vec<u16> = (0..top_k)
                .map(|choice| ((token * 5 + choice * 3) % config.n_routed_experts) as u16)
                .collect();
            chosen.sort_unstable();
            topk_idx.extend(chosen);
        }
        Self { checkpoint: checkpoint.clone(), class, backend, data, scales, topk_idx }
    }

    fn weights(&self) -> Generation {
        let model = self.checkpoint.model_hash();
        Generation { model, numerics: self.class, epoch: PlacementEpoch(1) }
    }

    fn shard(&self, index: usize, placement: &Placement, inline: bool) -> Arc<Shard<ReferenceBackend>> {
        let options = ShardOptions {
            shard: ShardIndex(index as u16),
            weights: self.weights(),
            hidden: self.checkpoint.config().hidden_size,
        };
        let source = Arc::new(CheckpointSource::new(self.backend.clone(), self.checkpoint.clone()));
        let make = if inline { Shard::inline } else { Shard::spawn };
        let shard = make(options, self.backend.clone(), source).unwrap();
        shard.apply(placement).unwrap();
        shard.self_test(PATIENCE).unwrap();
        Arc::new(shard)
    }

    fn dispatcher(
        &self,
        placement: &Placement,
        addresses: &[String],
        connector: Arc<dyn Connect>,
    ) -> Dispatcher {
        let member = |(at, address): (usize, &String)| Member {
            id: MemberId(format!("shard-{at}")),
            role: Role::Expert(ShardIndex(at as u16)),
            address: address.clone(),
            state: MemberState::Ready,
        };
        let view = ClusterView {
            generation: self.weights(),
            placement: Arc::new(placement.clone()),
            members: addresses.iter().enumerate().map(member).collect(),
        };
        let config =
            DispatchConfig { frame_timeout: PATIENCE, uncovered_wait: PATIENCE, ..DispatchConfig::default() };
        let dispatcher = Dispatcher::new(config, self.weights(), connector);
        dispatcher.handle().update(Arc::new(view));
        dispatcher
    }

    /// The rows of every MoE layer, one after the other.
    fn rows(&self, dispatcher: &mut Dispatcher) -> Vec<u8> {
        let config = self.checkpoint.config();
        let mut all = Vec::new();
        let mut out = ExpertRows::default();
        for layer in config.moe_layers() {
            let activations = HostRows {
                format: RowFormat::dispatch(self.class),
                rows: TOKENS,
                cols: config.hidden_size,
                data: &self.data,
                scales: &self.scales,
            };
            let batch = DispatchBatch {
                layer,
                activations,
                top_k: config.num_experts_per_tok,
                topk_idx: &self.topk_idx,
            };
            let ticket = dispatcher.dispatch(batch).unwrap();
            dispatcher.combine(ticket, &mut out).unwrap();
            all.extend_from_slice(&out.data);
        }
        all
    }

    fn local(&self, shards: usize, redundant: usize, inline: bool) -> Vec<u8> {
        let placement = placement(&self.checkpoint, shards, redundant);
        let connector = LocalConnector::default();
        let addresses: Vec<String> = (0..shards).map(|at| at.to_string()).collect();
        for (at, address) in addresses.iter().enumerate() {
            connector.register(address.clone(), self.shard(at, &placement, inline));
        }
        let mut dispatcher = self.dispatcher(&placement, &addresses, Arc::new(connector));
        self.rows(&mut dispatcher)
    }
}

fn checkpoint(format: WeightFormat) -> (tempfile::TempDir, Arc<Checkpoint>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny");
    synth::write(&path, &SynthSpec::tiny(format, 7), &|_, _| {}).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
    (dir, checkpoint)
}

#[test]
fn any_number_of_shards_and_copies_gives_the_same_bits() {
    let (_dir, checkpoint) = checkpoint(WeightFormat::Fp8);
    for class in NumericsClass::ALL {
        let bench = Bench::new(&checkpoint, class);
        let one = bench.local(1, 0, true);
        assert!(one.iter().any(|byte| *byte != 0));
        for (shards, redundant) in [(2, 0), (4, 16), (7, 3)] {
            let rows = bench.local(shards, redundant, true);
            assert!(rows == one, "class {class}, {shards} shards, {redundant} copies, inline");
        }
        assert!(bench.local(2, 16, false) == one, "class {class}, 2 shards, own threads");
    }
}

#[test]
fn over_grpc_and_with_a_shard_lost_on_the_way_the_bits_are_the_same() {
    let (_dir, checkpoint) = checkpoint(WeightFormat::Bf16);
    let bench = Bench::new(&checkpoint, NumericsClass::Bf16);
    let expected = bench.local(1, 0, true);

    let experts = checkpoint.config().n_routed_experts;
    let placement = placement(&checkpoint, 3, experts);
    let mut servers = Vec::new();
    let mut addresses = Vec::new();
    for at in 0..3 {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        addresses.push(listener.local_addr().unwrap().to_string());
        let shard = bench.shard(at, &placement, false);
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.enable_all().worker_threads(1).build().unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let service = ExpertServer::new(shard).into_service();
            let serving = tuning::server().add_service(service);
            serving.serve_with_incoming(tuning::incoming(listener)).await.unwrap();
        });
        servers.push(runtime);
    }
    let io = IoThread::start("test-io").unwrap();
    let connector = Arc::new(GrpcConnector::new(io.handle()));
    let mut dispatcher = bench.dispatcher(&placement, &addresses, connector);
    assert!(bench.rows(&mut dispatcher) == expected);
    let start = Instant::now();
    servers.remove(1).shutdown_background();
    for _ in 0..5 {
        assert!(bench.rows(&mut dispatcher) == expected);
    }
    assert!(start.elapsed() < PATIENCE, "a broken link is not waited for");
    for server in servers {
        server.shutdown_background();
    }
}
