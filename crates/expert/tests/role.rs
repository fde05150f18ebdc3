//! The expert role as a process would run it, against a coordinator of the test's own and a real
//! dispatcher: registers, loads, proves itself, serves, drains; and what it does when told nonsense.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::HashMap,
    net::SocketAddr,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use cadre_checkpoint::{
    Checkpoint,
    synth::{self, SynthSpec, WeightFormat},
};
use cadre_dispatch::{DispatchConfig, Dispatcher, GrpcConnector, IoThread, tuning};
use cadre_expert::{BoundAddresses, ExpertOptions};
use cadre_ops::{DispatchBatch, EncodedRows, ExpertExchange, ExpertRows, RowFormat};
use cadre_proto::v1;
use cadre_types::{
    ClusterView, Generation, LayerPlacement, LogicalExpert, Member, MemberState, NumericsClass, Placement,
    PlacementEpoch, ShardIndex,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tokio_stream::{Stream, StreamExt, wrappers::WatchStream};
use tonic::{Request, Response, Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(120);

/// Lists whoever reports, under a placement that the test sets.
#[derive(Clone)]
struct Coordinator {
    view: watch::Sender<ClusterView>,
    refuse: Option<&'static str>,
    /// Every (state, applied epoch) that was reported, in order, repeats left out.
    reported: Arc<Mutex<Vec<(MemberState, u64)>>>,
    /// Epoch of the prepared placement that each member reported last.
    prepared: Arc<Mutex<HashMap<String, u64>>>,
}

impl Coordinator {
    fn record(&self, report: &v1::Report) {
        let member = Member::try_from(report.member.as_ref().unwrap()).unwrap();
        let epoch = report.generation.as_ref().unwrap().epoch;
        assert_eq!(report.prepared_epoch == 0, report.prepared_digest == 0);
        self.prepared.lock().unwrap().insert(member.id.0.clone(), report.prepared_epoch);
        let mut reported = self.reported.lock().unwrap();
        if reported.last() != Some(&(member.state, epoch)) {
            reported.push((member.state, epoch));
        }
        self.view.send_if_modified(|view| {
            let changed = !view.members.contains(&member);
            view.members.retain(|other| other.id != member.id);
            view.members.push(member.clone());
            changed
        });
    }
}

#[tonic::async_trait]
impl v1::coordinator_server::Coordinator for Coordinator {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::ClusterView, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<v1::Report>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        if let Some(reason) = self.refuse {
            return Err(Status::failed_precondition(reason));
        }
        let mut reports = request.into_inner();
        let first = reports.message().await?.ok_or_else(|| Status::cancelled("no report"))?;
        let id = first.member.as_ref().unwrap().id.clone();
        self.record(&first);
        let ours = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(report)) = reports.message().await {
                ours.record(&report);
            }
            ours.view.send_modify(|view| view.members.retain(|member| member.id.0 != id));
        });
        let views = WatchStream::new(self.view.subscribe()).map(|view| Ok((&view).into()));
        Ok(Response::new(Box::pin(views)))
    }

    type OperateStream = tokio_stream::Empty<Result<v1::CoordinatorStatus, Status>>;

    async fn operate(
        &self,
        _request: Request<Streaming<v1::OperatorView>>,
    ) -> Result<Response<Self::OperateStream>, Status> {
        Err(Status::unimplemented("no operator in this test"))
    }
}

/// A checkpoint, a coordinator for it, and where it listens.
struct Cluster {
    _dir: tempfile::TempDir,
    model: PathBuf,
    checkpoint: Checkpoint,
    coordinator: Coordinator,
    address: String,
}

fn placement(checkpoint: &Checkpoint, epoch: u64, shards: usize) -> Placement {
    let config = checkpoint.config();
    let experts = config.n_routed_experts;
    let layers = config.served_moe_layers().map(|layer| {
        let mut slots = vec![Vec::new(); shards];
        for expert in 0..experts {
            slots[expert % shards].push(LogicalExpert(expert as u16));
        }
        LayerPlacement { layer, slots }
    });
    Placement::new(PlacementEpoch(epoch), experts, layers.collect()).unwrap()
}

impl Cluster {
    async fn new(shards: usize, refuse: Option<&'static str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("tiny");
        synth::write(&model, &SynthSpec::tiny(WeightFormat::Fp8, 3), &|_, _| {}).unwrap();
        let checkpoint = Checkpoint::open(&model).unwrap();
        let generation = Generation {
            model: checkpoint.model_hash(),
            numerics: NumericsClass::Bf16,
            epoch: PlacementEpoch(1),
        };
        let placement = Arc::new(placement(&checkpoint, 1, shards));
        let view = ClusterView::settled(generation, placement, Vec::new());
        let coordinator = Coordinator {
            view: watch::Sender::new(view),
            refuse,
            reported: Arc::default(),
            prepared: Arc::default(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = v1::coordinator_server::CoordinatorServer::new(coordinator.clone());
        tokio::spawn(async move {
            let serving = tuning::server().add_service(service);
            serving.serve_with_incoming(tuning::incoming(listener)).await.unwrap();
        });
        Self { _dir: dir, model, checkpoint, coordinator, address }
    }

    fn options(&self, shard: u16) -> ExpertOptions {
        let mut options = ExpertOptions::new(self.model.clone(), ShardIndex(shard), self.address.clone());
        options.threads = Some(NonZeroUsize::MIN);
        options
    }

    fn start(&self, shard: u16) -> Process {
        let mut options = self.options(shard);
        let (bound, addresses) = oneshot::channel();
        options.bound = Some(bound);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(cadre_expert::run(options, async move {
            let _ = stopped.await;
        }));
        Process { task, stop, addresses }
    }

    async fn wait(&self, condition: impl FnMut(&ClusterView) -> bool) -> ClusterView {
        let mut views = self.coordinator.view.subscribe();
        let waiting = views.wait_for(condition);
        tokio::time::timeout(PATIENCE, waiting).await.expect("in time").unwrap().clone()
    }

    async fn wait_ready(&self, shards: usize) -> ClusterView {
        let ready = |member: &Member| member.state == MemberState::Ready;
        self.wait(|view| view.members.iter().filter(|member| ready(member)).count() == shards).await
    }

    async fn wait_reported(&self, wanted: (MemberState, u64)) {
        until("reported", || self.coordinator.reported.lock().unwrap().contains(&wanted)).await;
    }

    /// Waits until exactly so many shards report this epoch as prepared.
    async fn wait_prepared(&self, shards: usize, epoch: u64) {
        let prepared = || self.coordinator.prepared.lock().unwrap().values().filter(|p| **p == epoch).count();
        until("prepared", || prepared() == shards).await;
    }

    /// Sends a batch through every MoE layer by this view; blocking, so on its own thread.
    async fn exchange(&self, view: ClusterView) -> Vec<u8> {
        let config = self.checkpoint.config().clone();
        let blocking = move || {
            let io = IoThread::start("test-io").unwrap();
            let bounds = DispatchConfig { frame_timeout: PATIENCE, ..DispatchConfig::default() };
            let connector = Arc::new(GrpcConnector::new(io.handle()));
            let mut dispatcher = Dispatcher::new(bounds, view.generation, connector);
            dispatcher.handle().update(Arc::new(view));
            let (tokens, hidden, top_k) = (5, config.hidden_size, config.num_experts_per_tok);
            let data: bytes::Bytes = (0..tokens * hidden).flat_map(|at| [0, 0x3F + (at % 2) as u8]).collect();
            let topk_idx: Vec<u16> =
                (0..tokens).flat_map(|t| (0..top_k).map(move |k| (t + 3 * k) as u16)).collect();
            let (mut all, mut out) = (Vec::new(), ExpertRows::default());
            for layer in config.served_moe_layers() {
                let activations = EncodedRows {
                    format: RowFormat::Bf16,
                    rows: tokens,
                    cols: hidden,
                    data: data.clone(),
                    scales: bytes::Bytes::new(),
                };
                let batch = DispatchBatch { layer, activations: &activations, top_k, topk_idx: &topk_idx };
                let ticket = dispatcher.dispatch(batch).unwrap();
                dispatcher.combine(ticket, &mut out).unwrap();
                all.extend(out.in_order());
            }
            all
        };
        tokio::task::spawn_blocking(blocking).await.unwrap()
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await; // between looks
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("{what} in time"));
}

/// A running role.
struct Process {
    task: JoinHandle<anyhow::Result<()>>,
    stop: oneshot::Sender<()>,
    addresses: oneshot::Receiver<BoundAddresses>,
}

impl Process {
    async fn stop(self) -> anyhow::Result<()> {
        let _ = self.stop.send(());
        tokio::time::timeout(PATIENCE, self.task).await.expect("stops in time").unwrap()
    }

    async fn fails(self) -> String {
        let ended = tokio::time::timeout(PATIENCE, self.task).await.expect("ends in time").unwrap();
        format!("{:#}", ended.unwrap_err())
    }
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registers_loads_proves_itself_serves_and_drains() {
    let cluster = Cluster::new(2, None).await;
    let mut shards = [cluster.start(0), cluster.start(1)];
    let view = cluster.wait_ready(2).await;
    let reported = cluster.coordinator.reported.lock().unwrap().clone();
    assert_eq!(reported[0], (MemberState::Starting, 0), "registered before anything was loaded");
    assert!(reported.contains(&(MemberState::Ready, 1)));

    let rows = cluster.exchange(view.clone()).await;
    assert!(rows.iter().any(|byte| *byte != 0));

    let addresses = (&mut shards[0].addresses).await.unwrap();
    assert!(get(addresses.admin, "/readyz").await.starts_with("HTTP/1.1 200"));
    let metrics = get(addresses.admin, "/metrics").await;
    assert!(metrics.contains("cadre_expert_resident_experts 24"), "{metrics}");

    let [first, second] = shards;
    first.stop().await.unwrap();
    assert!(cluster.coordinator.reported.lock().unwrap().contains(&(MemberState::Draining, 1)));
    cluster.wait(|view| view.members.len() == 1).await;

    // A new life of the shard takes its place, and the rows are the same bits.
    let third = cluster.start(0);
    let view = cluster.wait_ready(2).await;
    assert!(cluster.exchange(view).await == rows);
    second.stop().await.unwrap();
    third.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn follows_a_new_placement_without_a_restart() {
    let cluster = Cluster::new(2, None).await;
    let process = cluster.start(0);
    cluster.wait_reported((MemberState::Ready, 1)).await;
    // One shard gets everything.
    let all = Arc::new(placement(&cluster.checkpoint, 2, 1));
    cluster.coordinator.view.send_modify(|view| {
        view.placement = all;
        view.generation.epoch = PlacementEpoch(2);
    });
    cluster.wait_reported((MemberState::Ready, 2)).await;
    let view = cluster.wait_ready(1).await;
    assert!(cluster.exchange(view).await.iter().any(|byte| *byte != 0));
    process.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_by_the_coordinator_ends_the_process_with_its_words() {
    let cluster = Cluster::new(1, Some("numerics class bf16 is not ours (fp8)")).await;
    let error = cluster.start(0).fails().await;
    assert!(
        error.contains("shard 0: the coordinator refused this member: numerics class bf16 is not ours (fp8)"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_that_is_none_ends_the_process_and_names_it() {
    let cluster = Cluster::new(1, None).await;
    let mut options = cluster.options(0);
    options.model_dir = Path::new("/nonexistent/model").to_owned();
    let error = cadre_expert::run(options, std::future::pending()).await.unwrap_err();
    assert!(format!("{error:#}").contains("/nonexistent/model"), "{error:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_the_placement_does_not_have_waits_unready() {
    let cluster = Cluster::new(1, None).await;
    let mut process = cluster.start(1);
    let addresses = (&mut process.addresses).await.unwrap();
    let waiting = async {
        while !get(addresses.admin, "/readyz").await.contains("epoch 1 has 1 shards and this is shard 1") {
            tokio::time::sleep(Duration::from_millis(5)).await; // between looks
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("the reason shows");
    process.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_placement_is_prepared_beside_the_one_in_force_and_both_are_answered() {
    let cluster = Cluster::new(2, None).await;
    let shards = [cluster.start(0), cluster.start(1)];
    let before = cluster.wait_ready(2).await;
    let rows = cluster.exchange(before.clone()).await;

    // From two shards to three; the third waits for it, held by nothing.
    let mut third = cluster.start(2);
    let admin = (&mut third.addresses).await.unwrap().admin;
    let next = Arc::new(placement(&cluster.checkpoint, 2, 3));
    cluster.coordinator.view.send_modify(|view| view.next = Some(next.clone()));
    cluster.wait_ready(3).await;
    cluster.wait_prepared(3, 2).await;
    assert!(get(admin, "/readyz").await.starts_with("HTTP/1.1 200"), "ready for the next placement");
    assert!(cluster.exchange(before.clone()).await == rows, "the one in force is untouched");

    cluster.coordinator.view.send_modify(|view| {
        view.placement = next.clone();
        view.generation.epoch = next.epoch();
        view.next = None;
    });
    let flipped = cluster.wait(|view| view.generation.epoch == next.epoch()).await;
    assert!(cluster.exchange(flipped).await == rows, "under the new placement");
    assert!(cluster.exchange(before.clone()).await == rows, "by a worker that has not taken it up yet");

    // Nobody is left on the old one: it goes, and the memory with it.
    cluster.coordinator.view.send_modify(|view| view.oldest_epoch = next.epoch());
    let waiting = async {
        while !get(admin, "/metrics").await.contains("cadre_expert_placement_epoch 2") {
            tokio::time::sleep(Duration::from_millis(5)).await; // between looks
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("in force");

    // And back to two: the third holds nothing in the end, and says that it waits.
    let back = Arc::new(placement(&cluster.checkpoint, 3, 2));
    cluster.coordinator.view.send_modify(|view| view.next = Some(back.clone()));
    cluster.wait_prepared(2, 3).await;
    cluster.coordinator.view.send_modify(|view| {
        view.placement = back.clone();
        view.generation.epoch = back.epoch();
        view.oldest_epoch = back.epoch();
        view.next = None;
    });
    cluster.wait_reported((MemberState::Starting, 0)).await;
    let waiting = async {
        while !get(admin, "/metrics").await.contains("cadre_expert_resident_experts 0") {
            tokio::time::sleep(Duration::from_millis(5)).await; // between looks
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("everything is dropped");
    for process in shards.into_iter().chain([third]) {
        process.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_next_placement_that_is_replaced_is_forgotten() {
    let cluster = Cluster::new(1, None).await;
    let process = cluster.start(0);
    cluster.wait_reported((MemberState::Ready, 1)).await;
    for epoch in 2..6 {
        let next = Arc::new(placement(&cluster.checkpoint, epoch, 1));
        cluster.coordinator.view.send_modify(|view| view.next = Some(next));
    }
    cluster.wait_prepared(1, 5).await;
    cluster.coordinator.view.send_modify(|view| view.next = None);
    cluster.wait_prepared(1, 0).await;
    process.stop().await.unwrap();
}
