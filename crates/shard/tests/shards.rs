//! The rows of a MoE layer are the same bits for any number of shards, with and without copies, computed
//! inline or by shards' own threads, in-process or over gRPC, and while a shard is lost.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use cadre_checkpoint::{
    Checkpoint,
    synth::{self, SynthSpec, WeightFormat},
};
use cadre_dispatch::{
    Connect, DispatchConfig, Dispatcher, Driver, ExpertServer, GrpcConnector, IoThread, LocalConnector,
    tuning,
};
use cadre_ops::{
    Backend, DispatchBatch, EncodedRows, ExpertExchange, ExpertRows, RowFormat, RowLayout,
    reference::ReferenceBackend,
};
use cadre_shard::{CheckpointSource, Shard, ShardOptions};
use cadre_types::{
    ClusterView, Generation, LayerPlacement, LogicalExpert, Member, MemberId, MemberState, NumericsClass,
    Placement, PlacementEpoch, Role, ShardIndex, config::ScaleFormat,
};

const PATIENCE: Duration = Duration::from_secs(120);

/// A busy machine makes no shard slow: what is tested here is that nothing is sent twice.
fn config() -> DispatchConfig {
    let mut config = DispatchConfig::default();
    config.health.slow_floor = PATIENCE;
    config
}

/// Expert `e` on shard `e % shards`, and its copy (of the first `redundant` experts) on the next.
fn placement(checkpoint: &Checkpoint, shards: usize, redundant: usize) -> Placement {
    placement_under(1, checkpoint, shards, redundant)
}

fn placement_under(epoch: u64, checkpoint: &Checkpoint, shards: usize, redundant: usize) -> Placement {
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
    Placement::new(PlacementEpoch(epoch), experts, layers.collect()).unwrap()
}

/// A checkpoint, a batch for it, and where its shards are.
struct Bench {
    checkpoint: Arc<Checkpoint>,
    class: NumericsClass,
    backend: Arc<ReferenceBackend>,
    activations: EncodedRows,
    topk_idx: Vec<u16>,
}

const TOKENS: usize = 11;

impl Bench {
    fn new(checkpoint: &Arc<Checkpoint>, class: NumericsClass) -> Self {
        let backend = Arc::new(ReferenceBackend::new(class));
        let config = checkpoint.config();
        let (hidden, top_k) = (config.hidden_size, config.num_experts_per_tok);
        // Values go through the backend's own encoder, as a worker's do.
        let values: Vec<f32> = (0..TOKENS * hidden).map(|at| ((at * 31 % 97) as f32 - 48.0) / 32.0).collect();
        let mut queue = backend.queue().unwrap();
        let mut x = backend.alloc_activations(TOKENS, hidden).unwrap();
        backend.write_activations(&mut queue, &values, &mut x).unwrap();
        let mut rows = backend.alloc_rows(TOKENS, hidden).unwrap();
        backend.encode(&mut queue, &x, TOKENS, ScaleFormat::F32, &mut rows).unwrap();
        let format = RowFormat::dispatch(class);
        let mut memory = backend.staging(RowLayout::of(format, TOKENS, hidden).bytes).unwrap();
        backend.download_rows(&mut queue, &rows, TOKENS, &mut memory, 0).unwrap();
        let activations = EncodedRows::in_memory(memory, format, TOKENS, hidden);
        let mut topk_idx = Vec::new();
        for token in 0..TOKENS {
            let mut chosen: Vec<u16> = (0..top_k)
                .map(|choice| ((token * 5 + choice * 3) % config.n_routed_experts) as u16)
                .collect();
            chosen.sort_unstable();
            topk_idx.extend(chosen);
        }
        Self { checkpoint: checkpoint.clone(), class, backend, activations, topk_idx }
    }

    fn weights(&self) -> Generation {
        let model = self.checkpoint.model_hash();
        Generation { model, numerics: self.class, epoch: PlacementEpoch(1) }
    }

    fn shard(&self, index: usize, placement: &Placement, inline: bool) -> Arc<Shard<ReferenceBackend>> {
        let shard = self.empty_shard(index, inline);
        shard.apply(placement).unwrap();
        shard.self_test(placement.epoch(), PATIENCE).unwrap();
        shard
    }

    fn empty_shard(&self, index: usize, inline: bool) -> Arc<Shard<ReferenceBackend>> {
        let options = ShardOptions {
            shard: ShardIndex(index as u16),
            weights: self.weights(),
            hidden: self.checkpoint.config().hidden_size,
        };
        let source = Arc::new(CheckpointSource::new(self.backend.clone(), self.checkpoint.clone()));
        let shard = match inline {
            true => Shard::inline(options, self.backend.clone(), source),
            false => Shard::spawn(options, self.backend.clone(), source, None),
        };
        Arc::new(shard.unwrap())
    }

    fn view(&self, placement: &Arc<Placement>, addresses: &[String]) -> ClusterView {
        let member = |(at, address): (usize, &String)| Member {
            id: MemberId(format!("shard-{at}")),
            role: Role::Expert(ShardIndex(at as u16)),
            address: address.clone(),
            state: MemberState::Ready,
            pod: None,
        };
        let generation = Generation { epoch: placement.epoch(), ..self.weights() };
        let members = addresses.iter().enumerate().map(member).collect();
        ClusterView::settled(generation, placement.clone(), members)
    }

    fn dispatcher(
        &self,
        placement: &Placement,
        addresses: &[String],
        connector: Arc<dyn Connect>,
    ) -> Dispatcher {
        let view = self.view(&Arc::new(placement.clone()), addresses);
        let config = DispatchConfig { frame_timeout: PATIENCE, uncovered_wait: PATIENCE, ..config() };
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
            let batch = DispatchBatch {
                layer,
                activations: &self.activations,
                top_k: config.num_experts_per_tok,
                topk_idx: &self.topk_idx,
            };
            let ticket = dispatcher.dispatch(batch).unwrap();
            dispatcher.combine(ticket, &mut out).unwrap();
            all.extend(out.in_order());
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

/// A shard behind gRPC on a runtime of its own.
fn serve(shard: Arc<Shard<ReferenceBackend>>) -> (String, tokio::runtime::Runtime) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.enable_all().worker_threads(1).build().unwrap();
    runtime.spawn(accept(listener, shard));
    (address, runtime)
}

async fn accept(listener: std::net::TcpListener, shard: Arc<Shard<ReferenceBackend>>) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let serving = tuning::server().add_service(ExpertServer::new(shard).into_service());
    serving.serve_with_incoming(tuning::incoming(listener)).await.unwrap();
}

/// The protocol of a change of layout (docs/wire.md) while a worker computes without a pause: 4 shards, 8,
/// 4 again, by the order that the coordinator keeps. No frame is refused, none is sent twice, and every
/// row has the same bits.
fn the_layout_changes_under_way(
    shards: &[Arc<Shard<ReferenceBackend>>],
    addresses: &[String],
    connector: Arc<dyn Connect>,
    bench: &Bench,
    expected: &[u8],
) {
    let layout = |epoch, shards| Arc::new(placement_under(epoch, &bench.checkpoint, shards, 5));
    let mut in_force = layout(1, 4);
    shards[..4].iter().for_each(|shard| shard.apply(&in_force).unwrap());
    let mut dispatcher = bench.dispatcher(&in_force, &addresses[..4], connector);
    let handle = dispatcher.handle();
    let (stop, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    let wait = |what: &str, condition: &mut dyn FnMut() -> bool| {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < PATIENCE, "{what} in time");
            std::thread::sleep(Duration::from_millis(1)); // between looks
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert!(bench.rows(&mut dispatcher) == expected, "the same bits");
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        // Ends the other thread even if this one fails.
        let stopping = scopeguard(&stop);
        for (epoch, count) in [(2, 8), (3, 4), (4, 7), (5, 4)] {
            let next = layout(epoch, count);
            let old = in_force.epoch();
            let some_more = |rounds: &AtomicUsize| {
                let seen = rounds.load(Ordering::Relaxed);
                wait("work", &mut || rounds.load(Ordering::Relaxed) >= seen + 2);
            };
            let mut view = bench.view(&in_force, addresses);
            view.next = Some(next.clone());
            handle.update(Arc::new(view));
            for shard in &shards[..count] {
                shard.hold(&next, &AtomicBool::new(false)).unwrap();
                shard.self_test(next.epoch(), PATIENCE).unwrap();
            }
            some_more(&rounds);
            in_force = next;
            let mut view = bench.view(&in_force, addresses);
            view.oldest_epoch = old;
            handle.update(Arc::new(view));
            let taken = handle.taken();
            wait("taken", &mut || {
                taken.borrow().as_ref().is_some_and(|taken| taken.epoch() == in_force.epoch())
            });
            shards.iter().for_each(|shard| shard.release(|epoch| epoch == in_force.epoch()));
            handle.update(Arc::new(bench.view(&in_force, addresses)));
            some_more(&rounds);
        }
        drop(stopping);
    });
    for shard in shards {
        let refused: u64 = shard.stats().refused.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        assert_eq!(refused, 0, "{shard:?}");
    }
    assert_eq!(handle.stats().retried_pairs.load(Ordering::Relaxed), 0);
    assert_eq!(shards[7].resident().0, 0, "a shard that the layout lost holds nothing");
}

/// Sets the flag when it is dropped.
fn scopeguard(flag: &AtomicBool) -> impl Drop {
    struct Set<'a>(&'a AtomicBool);
    impl Drop for Set<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    Set(flag)
}

#[test]
fn the_layout_changes_under_way_in_one_process() {
    let (_dir, checkpoint) = checkpoint(WeightFormat::Bf16);
    let bench = Bench::new(&checkpoint, NumericsClass::Bf16);
    let expected = bench.local(1, 0, true);
    let connector = LocalConnector::default();
    let addresses: Vec<String> = (0..8).map(|at| at.to_string()).collect();
    let shards: Vec<_> = (0..8).map(|at| bench.empty_shard(at, at % 2 == 0)).collect();
    for (shard, address) in shards.iter().zip(&addresses) {
        connector.register(address.clone(), shard.clone());
    }
    the_layout_changes_under_way(&shards, &addresses, Arc::new(connector), &bench, &expected);
}

#[test]
fn the_layout_changes_under_way_over_grpc() {
    let (_dir, checkpoint) = checkpoint(WeightFormat::Bf16);
    let bench = Bench::new(&checkpoint, NumericsClass::Bf16);
    let expected = bench.local(1, 0, true);
    let shards: Vec<_> = (0..8).map(|at| bench.empty_shard(at, false)).collect();
    let (addresses, servers): (Vec<_>, Vec<_>) = shards.iter().map(|shard| serve(shard.clone())).unzip();
    let io = IoThread::start("test-io").unwrap();
    let connector = Arc::new(GrpcConnector::new(io.handle()));
    the_layout_changes_under_way(&shards, &addresses, connector, &bench, &expected);
    for server in servers {
        server.shutdown_background();
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
        let (address, runtime) = serve(bench.shard(at, &placement, false));
        addresses.push(address);
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

/// As `cadre expert` runs it: the compute thread reads the sockets while it waits.
#[test]
fn shards_that_run_their_own_io_give_the_same_bits_and_end() {
    let (_dir, checkpoint) = checkpoint(WeightFormat::Bf16);
    let bench = Bench::new(&checkpoint, NumericsClass::Bf16);
    let expected = bench.local(1, 0, true);
    let placement = placement(&checkpoint, 2, 0);
    let (mut shards, mut addresses) = (Vec::new(), Vec::new());
    for at in 0..2_u16 {
        let io = IoThread::start("test-shard-io").unwrap();
        let options = ShardOptions {
            shard: ShardIndex(at),
            weights: bench.weights(),
            hidden: checkpoint.config().hidden_size,
        };
        let source = Arc::new(CheckpointSource::new(bench.backend.clone(), checkpoint.clone()));
        let drive = Arc::new(Driver::new(io.handle()));
        let shard = Arc::new(Shard::spawn(options, bench.backend.clone(), source, Some(drive)).unwrap());
        shard.apply(&placement).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        addresses.push(listener.local_addr().unwrap().to_string());
        io.handle().runtime().spawn(accept(listener, shard.clone()));
        shards.push((shard, io));
    }
    let io = IoThread::start("test-io").unwrap();
    let mut dispatcher = bench.dispatcher(&placement, &addresses, Arc::new(GrpcConnector::new(io.handle())));
    for _ in 0..20 {
        assert!(bench.rows(&mut dispatcher) == expected);
    }
    for (shard, io) in shards {
        shard.stop();
        let deadline = Instant::now() + PATIENCE;
        assert!(shard.wait_idle(deadline) && shard.is_dead());
        drop(io);
    }
}

#[test]
fn copies_have_one_digest_and_a_changed_byte_changes_that_experts_alone() {
    let (_dir, checkpoint) = checkpoint(WeightFormat::Bf16);
    let layer = checkpoint.config().moe_layers().next().unwrap();
    let digests = |checkpoint: &Arc<Checkpoint>, shard: u16| {
        let backend = Arc::new(ReferenceBackend::new(NumericsClass::F32));
        let (model, numerics, epoch) = (checkpoint.model_hash(), NumericsClass::F32, PlacementEpoch(1));
        let weights = Generation { model, numerics, epoch };
        let hidden = checkpoint.config().hidden_size;
        let options = ShardOptions { shard: ShardIndex(shard), weights, hidden };
        let source = Arc::new(CheckpointSource::new(backend.clone(), checkpoint.clone()));
        let shard = Shard::inline(options, backend, source).unwrap();
        // Every expert on both.
        shard.apply(&placement(checkpoint, 2, checkpoint.config().n_routed_experts)).unwrap();
        shard.digests()
    };
    let before = digests(&checkpoint, 0);
    assert_eq!(before, digests(&checkpoint, 1));
    let mut values: Vec<u64> = before.values().copied().collect();
    values.sort_unstable();
    values.dedup();
    assert_eq!(values.len(), before.len(), "experts differ");

    // A byte that the model hash does not see.
    let (expert, hash) = (LogicalExpert(3), checkpoint.model_hash());
    let unseen = checkpoint.expert_bytes(layer, expert).unwrap().into_iter().flat_map(|part| {
        let path = checkpoint.dir().join(part.file);
        part.range.step_by(97).map(move |at| (path.clone(), at as usize))
    });
    let changed = unseen.into_iter().find_map(|(path, at)| {
        let original = std::fs::read(&path).unwrap();
        let mut bytes = original.clone();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let changed = Arc::new(Checkpoint::open(checkpoint.dir()).unwrap());
        if changed.model_hash() == hash {
            return Some(changed);
        }
        std::fs::write(&path, original).unwrap();
        None
    });
    let after = digests(&changed.expect("a byte between the samples"), 0);
    let differ: Vec<_> = before.iter().filter(|(key, digest)| after[*key] != **digest).collect();
    assert_eq!(differ.len(), 1);
    assert_eq!((differ[0].0.layer, differ[0].0.expert), (layer, expert));
}
