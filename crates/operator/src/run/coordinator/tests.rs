#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::SocketAddr, pin::Pin};

use cadre_proto::v1::coordinator_server::{self, CoordinatorServer};
use cadre_telemetry::Metrics;
use cadre_types::{
    Coverage, Generation, Layout, LoadProgress, Member, MemberId, MemberState, MemberStatus, ModelHash,
    NumericsClass, PlacementEpoch, PodRef, PodView, Role, ShardIndex,
};
use tokio::{net::TcpListener, runtime::Runtime, sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status};

use super::*;
use crate::run::{metrics::OperatorMetrics, testing::key};

const PATIENCE: Duration = Duration::from_secs(20);

type Statuses = mpsc::UnboundedSender<Result<v1::CoordinatorStatus, Status>>;

/// A coordinator that is played by the test.
#[derive(Clone)]
struct Played {
    views: mpsc::UnboundedSender<Option<OperatorView>>,
    streams: mpsc::UnboundedSender<Statuses>,
    shown: mpsc::UnboundedSender<Option<String>>,
}

#[tonic::async_trait]
impl coordinator_server::Coordinator for Played {
    type WatchStream = Pin<Box<dyn futures::Stream<Item = Result<v1::ClusterView, Status>> + Send>>;
    type OperateStream = UnboundedReceiverStream<Result<v1::CoordinatorStatus, Status>>;

    async fn watch(&self, _: Request<Streaming<v1::Report>>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("members are none of this"))
    }

    async fn operate(
        &self,
        request: Request<Streaming<v1::OperatorView>>,
    ) -> Result<Response<Self::OperateStream>, Status> {
        let shown = request.metadata().get("authorization").map(|value| value.to_str().unwrap().to_owned());
        let _ = self.shown.send(shown);
        let mut incoming = request.into_inner();
        let views = self.views.clone();
        tokio::spawn(async move {
            while let Ok(Some(view)) = incoming.message().await {
                let _ = views.send(Some(OperatorView::try_from(&view).unwrap()));
            }
            let _ = views.send(None);
        });
        let (statuses, outgoing) = mpsc::unbounded_channel();
        let _ = self.streams.send(statuses);
        Ok(Response::new(UnboundedReceiverStream::new(outgoing)))
    }
}

struct Server {
    address: SocketAddr,
    views: mpsc::UnboundedReceiver<Option<OperatorView>>,
    streams: mpsc::UnboundedReceiver<Statuses>,
    shown: mpsc::UnboundedReceiver<Option<String>>,
    /// Its own, so that it ends with all of its connections.
    runtime: Option<Runtime>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Server {
    async fn start(address: SocketAddr) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let ((views, seen), (streams, opened)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        let (shown, showed) = mpsc::unbounded_channel();
        let service = CoordinatorServer::new(Played { views, streams, shown });
        let listening = runtime.spawn(async move {
            let listener = TcpListener::bind(address).await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = tonic::transport::Server::builder().add_service(service);
            tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
            address
        });
        let address = listening.await.unwrap();
        Self { address, views: seen, streams: opened, shown: showed, runtime: Some(runtime) }
    }

    /// The next view; `None` is the end of the operator's stream.
    async fn view(&mut self) -> Option<OperatorView> {
        tokio::time::timeout(PATIENCE, self.views.recv()).await.unwrap().unwrap()
    }

    async fn stream(&mut self) -> Statuses {
        tokio::time::timeout(PATIENCE, self.streams.recv()).await.unwrap().unwrap()
    }

    /// Like a process that is killed: connections break.
    async fn kill(mut self) -> SocketAddr {
        let runtime = self.runtime.take().unwrap();
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(PATIENCE)).await.unwrap();
        self.address
    }
}

fn view(shards: u16) -> OperatorView {
    let pod = PodRef { name: "m-experts-0".into(), uid: "u".into() };
    OperatorView {
        layout: Layout { shards, redundant_slots: 0, min_copies: 1 },
        pods: vec![PodView { pod, domain: None, withdrawn: false, ips: Vec::new() }],
    }
}

fn status(epoch: u64) -> CoordinatorStatus {
    let member = Member {
        id: MemberId("shard-0".into()),
        role: Role::Expert(ShardIndex(0)),
        address: "10.0.0.1:50053".into(),
        state: MemberState::Starting,
        pod: None,
    };
    CoordinatorStatus {
        generation: Generation {
            model: ModelHash([7; 16]),
            numerics: NumericsClass::Bf16,
            epoch: PlacementEpoch(epoch),
        },
        layout: Layout { shards: 2, redundant_slots: 0, min_copies: 1 },
        next: None,
        members: vec![MemberStatus {
            member,
            routable: false,
            applied: PlacementEpoch(0),
            loading: Some(LoadProgress { bytes_read: 1, bytes_expected: 9 }),
            sequences: 0,
            stranger: None,
            device: None,
            failed_proof: None,
        }],
        coverage: Coverage::default(),
        imbalance: None,
        serving: true,
    }
}

fn wire(epoch: u64) -> Result<v1::CoordinatorStatus, Status> {
    let wire = (&status(epoch)).into();
    assert_eq!(CoordinatorStatus::try_from(&wire).unwrap(), status(epoch));
    Ok(wire)
}

struct Rig {
    coordinators: Coordinators,
    triggered: mpsc::UnboundedReceiver<ModelKey>,
    metrics: OperatorMetrics,
    _reconciles: JoinSet<()>,
}

fn rig(address: SocketAddr) -> Rig {
    let metrics = OperatorMetrics::register(&Metrics::new()).unwrap();
    let queue = Arc::new(Queue::new(metrics.due.clone()));
    let address = CoordinatorAddress::new(move |_, _| address.to_string());
    let coordinators = Coordinators::new(address, queue.clone(), metrics.streams.clone());
    let (trigger, triggered) = mpsc::unbounded_channel();
    let mut reconciles = JoinSet::new();
    reconciles.spawn(async move {
        let work = |key| {
            let _ = trigger.send(key);
            async { None }
        };
        queue.run(1, std::future::pending(), work).await;
    });
    Rig { coordinators, triggered, metrics, _reconciles: reconciles }
}

impl Rig {
    /// Waits for the reconcile that a change triggers.
    async fn triggered(&mut self) {
        let triggered = tokio::time::timeout(PATIENCE, self.triggered.recv()).await;
        assert_eq!(triggered.unwrap(), Some(key()));
    }

    fn epoch(&self) -> u64 {
        self.coordinators.report(&key()).unwrap().status.generation.epoch.0
    }
}

#[tokio::test]
async fn views_go_down_and_statuses_come_up_and_trigger() {
    let mut server = Server::start(([127, 0, 0, 1], 0).into()).await;
    let mut rig = rig(server.address);
    assert!(rig.coordinators.report(&key()).is_none());
    rig.coordinators.tell(&key(), view(2), None);
    assert_eq!(server.view().await, Some(view(2)));
    let statuses = server.stream().await;
    statuses.send(wire(1)).unwrap();
    rig.triggered().await;
    assert!(rig.coordinators.report(&key()).unwrap().connected.is_ok());
    assert_eq!((rig.epoch(), rig.metrics.streams.get()), (1, 1.0));
    statuses.send(wire(2)).unwrap();
    rig.triggered().await;
    assert_eq!(rig.epoch(), 2);

    // The same view again is not sent again.
    rig.coordinators.tell(&key(), view(2), None);
    rig.coordinators.tell(&key(), view(4), None);
    assert_eq!(server.view().await, Some(view(4)));

    rig.coordinators.forget(&key());
    assert_eq!(server.view().await, None, "the stream ends with the model");
    assert!(rig.coordinators.report(&key()).is_none());
}

#[tokio::test]
async fn a_lost_coordinator_is_found_again_and_hears_the_newest_view_first() {
    let mut server = Server::start(([127, 0, 0, 1], 0).into()).await;
    let mut rig = rig(server.address);
    rig.coordinators.tell(&key(), view(2), None);
    server.view().await;
    let statuses = server.stream().await;
    statuses.send(wire(1)).unwrap();
    rig.triggered().await;

    let address = server.kill().await;
    rig.triggered().await;
    let report = rig.coordinators.report(&key()).unwrap();
    assert!(report.connected.unwrap_err().contains(&address.to_string()));
    assert_eq!(report.status.generation.epoch.0, 1, "what it said last is kept");
    assert_eq!(rig.metrics.streams.get(), 0.0);

    for shards in [3, 4, 5] {
        rig.coordinators.tell(&key(), view(shards), None);
    }
    let mut server = Server::start(address).await;
    assert_eq!(server.view().await, Some(view(5)));
    let statuses = server.stream().await;
    statuses.send(wire(7)).unwrap();
    rig.triggered().await;
    assert!(rig.coordinators.report(&key()).unwrap().connected.is_ok());
    assert_eq!(rig.epoch(), 7);
}

#[tokio::test]
async fn a_status_that_cannot_be_read_ends_the_stream_by_name() {
    let mut server = Server::start(([127, 0, 0, 1], 0).into()).await;
    let mut rig = rig(server.address);
    rig.coordinators.tell(&key(), view(2), None);
    let statuses = server.stream().await;
    statuses.send(wire(1)).unwrap();
    rig.triggered().await;
    statuses.send(Ok(v1::CoordinatorStatus::default())).unwrap();
    rig.triggered().await;
    let problem = rig.coordinators.report(&key()).unwrap().connected.unwrap_err();
    assert!(problem.contains("cannot be read"), "{problem}");
    // And another is opened.
    server.stream().await;
}

#[test]
fn progress_and_numbers_wait_and_news_does_not() {
    let before = status(1);
    assert_eq!(worth(&before, &before), None);
    let mut numbers = before.clone();
    numbers.imbalance = Some(1.5);
    numbers.members[0].sequences = 9;
    assert_eq!(worth(&before, &numbers), Some(NUMBERS_EVERY));
    let mut progress = numbers.clone();
    progress.members[0].loading = Some(LoadProgress { bytes_read: 5, bytes_expected: 9 });
    assert_eq!(worth(&before, &progress), Some(PROGRESS_EVERY));
    let mut loaded = before.clone();
    loaded.members[0].loading = Some(LoadProgress { bytes_read: 9, bytes_expected: 9 });
    assert_eq!(worth(&before, &loaded), Some(Duration::ZERO));
    let mut routable = progress.clone();
    routable.members[0].routable = true;
    assert_eq!(worth(&before, &routable), Some(Duration::ZERO));
    let mut gone = before.clone();
    gone.members.clear();
    assert_eq!(worth(&before, &gone), Some(Duration::ZERO));
}

#[test]
fn the_address_is_the_models_service_or_what_the_template_says() {
    assert_eq!(CoordinatorAddress::default().of(&key()), "m-coordinator.ns.svc:50050");
    let template = CoordinatorAddress::template("{name}.{namespace}.local:1".into());
    assert_eq!(template.of(&key()), "m.ns.local:1");
}

#[tokio::test]
async fn the_models_secret_is_shown_and_another_one_is_another_stream() {
    let mut server = Server::start(([127, 0, 0, 1], 0).into()).await;
    let rig = rig(server.address);
    for secret in [None, Some("0123456789abcdef-first"), Some("0123456789abcdef-second")] {
        for _ in 0..2 {
            rig.coordinators.tell(&key(), view(2), secret);
        }
        let shown = tokio::time::timeout(PATIENCE, server.shown.recv()).await.unwrap().unwrap();
        assert_eq!(shown, secret.map(|secret| format!("Bearer {secret}")));
        server.stream().await.send(wire(1)).unwrap();
    }
    server.shown.try_recv().expect_err("the same secret is the same stream");
}
