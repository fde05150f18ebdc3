#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;

use cadre_types::{
    LayerId, LayerPlacement, LogicalExpert, MemberId, ModelHash, NumericsClass, Placement, Role, ShardIndex,
};
use tokio::net::TcpListener;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::*;

/// A coordinator that a test plays by hand: each Watch hands its two ends over.
struct Scripted {
    sessions: mpsc::Sender<Played>,
    refuse: bool,
}

struct Played {
    reports: Streaming<v1::Report>,
    views: mpsc::Sender<Result<v1::ClusterView, Status>>,
}

impl Played {
    async fn report(&mut self) -> v1::Report {
        self.reports.next().await.expect("the member reports").expect("an intact report")
    }
}

#[tonic::async_trait]
impl v1::coordinator_server::Coordinator for Scripted {
    type WatchStream = ReceiverStream<Result<v1::ClusterView, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<v1::Report>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        if self.refuse {
            return Err(Status::failed_precondition("model hash differs"));
        }
        let (views, outgoing) = mpsc::channel(4);
        let played = Played { reports: request.into_inner(), views };
        self.sessions.send(played).await.map_err(|_| Status::unavailable("test is over"))?;
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    type OperateStream = tokio_stream::Empty<Result<v1::CoordinatorStatus, Status>>;

    async fn operate(
        &self,
        _request: Request<Streaming<v1::OperatorView>>,
    ) -> Result<Response<Self::OperateStream>, Status> {
        Err(Status::unimplemented("no operator in this test"))
    }
}

struct Server {
    address: SocketAddr,
    sessions: mpsc::Receiver<Played>,
    task: JoinHandle<()>,
}

async fn serve(address: &str, refuse: bool) -> Server {
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tx, sessions) = mpsc::channel(4);
    let service = v1::coordinator_server::CoordinatorServer::new(Scripted { sessions: tx, refuse });
    let task = tokio::spawn(async move {
        let serving = tuning::server().add_service(service);
        serving.serve_with_incoming(tuning::incoming(listener)).await.unwrap();
    });
    Server { address, sessions, task }
}

fn generation(epoch: u64) -> Generation {
    Generation { model: ModelHash([7; 16]), numerics: NumericsClass::Bf16, epoch: PlacementEpoch(epoch) }
}

fn view(epoch: u64, model: u8) -> v1::ClusterView {
    let layers = vec![LayerPlacement { layer: LayerId(1), slots: vec![vec![LogicalExpert(0)]] }];
    let placement = Placement::new(PlacementEpoch(epoch), 1, layers).unwrap();
    let generation = Generation { model: ModelHash([model; 16]), ..generation(epoch) };
    (&ClusterView::settled(generation, Arc::new(placement), Vec::new())).into()
}

fn join_as_shard(address: SocketAddr, interval: Duration) -> Membership {
    let member = Member {
        id: MemberId("shard-3".to_owned()),
        role: Role::Expert(ShardIndex(3)),
        address: "127.0.0.1:1".to_owned(),
        state: MemberState::Starting,
        pod: None,
    };
    let mut options = MembershipOptions::new(address.to_string());
    options.interval = interval;
    options.backoff.first = Duration::from_millis(5);
    let load = || LoadReport {
        loading: Some(v1::LoadProgress { bytes_read: 5, bytes_expected: 9 }),
        ..LoadReport::default()
    };
    join(options, member, generation(0), load).unwrap()
}

/// Long enough that no tick falls into a test: what arrives was caused by something else.
const NEVER: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn registers_receives_views_and_reports_changes_at_once() {
    let mut server = serve("127.0.0.1:0", false).await;
    let membership = join_as_shard(server.address, NEVER);
    let mut session = server.sessions.recv().await.unwrap();

    let first = session.report().await;
    let member = Member::try_from(first.member.as_ref().unwrap()).unwrap();
    assert_eq!(member.role, Role::Expert(ShardIndex(3)));
    assert_eq!(member.state, MemberState::Starting);
    assert_eq!(first.generation.as_ref().unwrap().epoch, 0);
    assert_eq!(first.loading.as_ref().unwrap().bytes_expected, 9);

    let mut views = membership.views();
    assert!(views.borrow().is_none());
    session.views.send(Ok(view(4, 7))).await.unwrap();
    views.wait_for(|view| view.as_ref().is_some_and(|view| view.generation.epoch.0 == 4)).await.unwrap();

    let placement = views.borrow().as_ref().unwrap().placement.clone();
    membership.set_applied(&placement);
    let applied = session.report().await;
    assert_eq!(applied.placement_digest, placement.digest());
    assert_eq!(applied.generation.unwrap().epoch, placement.epoch().0);
    membership.set_state(MemberState::Ready);
    let ready = session.report().await;
    assert_eq!(ready.member.unwrap().state(), v1::MemberState::Ready);

    membership.leave().await;
    assert!(session.reports.next().await.is_none_or(|end| end.is_err()), "the stream is closed");
}

#[tokio::test]
async fn reports_again_every_interval() {
    let mut server = serve("127.0.0.1:0", false).await;
    let _membership = join_as_shard(server.address, Duration::from_millis(1));
    let mut session = server.sessions.recv().await.unwrap();
    for _ in 0..3 {
        session.report().await;
    }
}

#[tokio::test]
async fn a_restarted_coordinator_is_rejoined_and_the_last_view_stays() {
    let mut server = serve("127.0.0.1:0", false).await;
    let membership = join_as_shard(server.address, NEVER);
    let session = server.sessions.recv().await.unwrap();
    session.views.send(Ok(view(1, 7))).await.unwrap();
    let mut views = membership.views();
    views.wait_for(Option::is_some).await.unwrap();
    membership.set_state(MemberState::Ready);

    server.task.abort();
    drop(session);
    assert!((&mut server.task).await.unwrap_err().is_cancelled());
    assert_eq!(views.borrow().as_ref().unwrap().generation.epoch.0, 1);

    let mut second = serve(&server.address.to_string(), false).await;
    let mut session = second.sessions.recv().await.unwrap();
    let report = session.report().await;
    assert_eq!(report.member.unwrap().state(), v1::MemberState::Ready, "the state survives the reconnect");
    assert_eq!(report.applied_placement, None, "nothing was applied");
}

#[tokio::test]
async fn the_first_report_of_each_stream_carries_the_applied_placement() {
    let mut server = serve("127.0.0.1:0", false).await;
    let membership = join_as_shard(server.address, NEVER);
    let mut session = server.sessions.recv().await.unwrap();
    assert_eq!(session.report().await.applied_placement, None);
    let placement = ClusterView::try_from(&view(4, 7)).unwrap().placement;
    let next = Arc::new(placement.with_epoch(PlacementEpoch(5)));
    membership.set_applied(&placement);
    let later = session.report().await;
    assert_eq!((later.generation.unwrap().epoch, later.applied_placement), (4, None));
    membership.set_prepared(Some(&next));
    let prepared = session.report().await;
    assert_eq!((prepared.prepared_epoch, prepared.prepared_digest), (5, next.digest()));

    server.task.abort();
    drop(session);
    assert!((&mut server.task).await.unwrap_err().is_cancelled());
    let mut second = serve(&server.address.to_string(), false).await;
    let first = second.sessions.recv().await.unwrap().report().await;
    assert_eq!(first.applied_placement, Some(v1::Placement::from(&*placement)));
    assert_eq!((first.placement_digest, first.prepared_epoch), (placement.digest(), 5));
    membership.set_prepared(None);
    membership.clear_applied();
}

#[tokio::test]
async fn digests_are_told_when_they_change_and_first_thing_on_each_stream() {
    let mut server = serve("127.0.0.1:0", false).await;
    let membership = join_as_shard(server.address, NEVER);
    let mut session = server.sessions.recv().await.unwrap();
    let told = |report: v1::Report| (report.expert_digests, report.weights_digest);
    assert_eq!(told(session.report().await), (vec![], 0));
    let digests = vec![v1::LayerDigests { layer: 3, experts: vec![0, 5], digests: vec![7, 9] }];
    membership.set_expert_digests(digests.clone());
    assert_eq!(told(session.report().await), (digests.clone(), 0));
    membership.set_state(MemberState::Ready);
    assert_eq!(told(session.report().await), (vec![], 0), "they are known");
    membership.set_weights_digest(4);
    assert_eq!(session.report().await.weights_digest, 4);

    server.task.abort();
    drop(session);
    assert!((&mut server.task).await.unwrap_err().is_cancelled());
    let mut second = serve(&server.address.to_string(), false).await;
    let first = second.sessions.recv().await.unwrap().report().await;
    assert_eq!(told(first), (digests, 4), "another coordinator knows nothing");
}

#[tokio::test]
async fn views_of_other_weights_and_broken_views_are_not_published() {
    let mut server = serve("127.0.0.1:0", false).await;
    let membership = join_as_shard(server.address, NEVER);
    let session = server.sessions.recv().await.unwrap();
    session.views.send(Ok(view(1, 8))).await.unwrap();
    session.views.send(Ok(v1::ClusterView::default())).await.unwrap();
    session.views.send(Ok(view(3, 7))).await.unwrap();
    let mut views = membership.views();
    views.changed().await.unwrap();
    assert_eq!(views.borrow().as_ref().unwrap().generation.epoch.0, 3, "the first one published");
}

#[tokio::test]
async fn a_refusal_is_final_and_says_why() {
    let server = serve("127.0.0.1:0", true).await;
    let membership = join_as_shard(server.address, NEVER);
    assert_eq!(membership.refused().await.reason, "model hash differs");
    assert!(!membership.views().has_changed().unwrap(), "views stay open: only the refusal says why");
}
