//! The whole role: `cadre_worker::run` against expert servers and a coordinator that the test plays.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use cadre_dispatch::tuning;
use cadre_proto::{connection::ConnectionEnd, v1};
use cadre_types::NumericsClass;
use cadre_worker::{WorkerOptions, WorkerRole, options::BoundAddresses, run};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::support::{Experts, generate, open, pocket, prompt, request, small};

/// A coordinator that hands the two ends of every Watch to the test.
struct Coordinator {
    sessions: mpsc::Sender<Session>,
    refuse: Option<&'static str>,
}

pub(crate) struct Session {
    pub(crate) reports: Streaming<v1::Report>,
    pub(crate) views: mpsc::Sender<Result<v1::ClusterView, Status>>,
}

impl Session {
    /// The next report with this state.
    pub(crate) async fn report(&mut self, state: v1::MemberState) -> v1::Report {
        loop {
            let report = self.reports.next().await.expect("the worker reports").unwrap();
            if report.member.as_ref().unwrap().state() == state {
                return report;
            }
        }
    }
}

#[tonic::async_trait]
impl v1::coordinator_server::Coordinator for Coordinator {
    type WatchStream = ReceiverStream<Result<v1::ClusterView, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<v1::Report>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        if let Some(reason) = self.refuse {
            return Err(Status::failed_precondition(reason));
        }
        let (views, outgoing) = mpsc::channel(4);
        let session = Session { reports: request.into_inner(), views };
        self.sessions.send(session).await.map_err(|_| Status::unavailable("the test is over"))?;
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

pub(crate) async fn coordinate(refuse: Option<&'static str>) -> (SocketAddr, mpsc::Receiver<Session>) {
    let (sessions, played) = mpsc::channel(4);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = v1::coordinator_server::CoordinatorServer::new(Coordinator { sessions, refuse });
    tokio::spawn(async move {
        let serving = tuning::server().add_service(service);
        serving.serve_with_incoming(tuning::incoming(listener)).await.unwrap();
    });
    (address, played)
}

fn options(coordinator: SocketAddr) -> (WorkerOptions, oneshot::Receiver<BoundAddresses>) {
    let (bound, addresses) = oneshot::channel();
    let options = WorkerOptions {
        threads: std::num::NonZeroUsize::new(1),
        kv_bytes: 8 << 20,
        bound: Some(bound),
        ..WorkerOptions::new(pocket(), WorkerRole::Both, coordinator.to_string())
    };
    (options, addresses)
}

struct Running {
    addresses: BoundAddresses,
    stop: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

async fn start(coordinator: SocketAddr) -> Running {
    let (options, addresses) = options(coordinator);
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(run(options, async move {
        let _ = stopped.await;
    }));
    Running { addresses: addresses.await.unwrap(), stop, task }
}

/// Status and body of one request to the admin port.
pub(crate) async fn fetch(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

pub(crate) async fn wait_ready(admin: SocketAddr) {
    while fetch(admin, "/readyz").await.0 != 200 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn client(address: SocketAddr) -> v1::worker_client::WorkerClient<tonic::transport::Channel> {
    let endpoint = tuning::endpoint(&address.to_string()).unwrap();
    v1::worker_client::WorkerClient::new(endpoint.connect_lazy())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_start_to_drain() {
    let experts = Experts::start(NumericsClass::Bf16, 2, 0).await;
    let (coordinator, mut sessions) = coordinate(None).await;
    let worker = start(coordinator).await;
    let mut session = sessions.recv().await.unwrap();
    let first = session.report(v1::MemberState::Starting).await;
    assert_eq!(first.member.unwrap().address, worker.addresses.grpc.to_string());
    assert_eq!(first.generation.unwrap().epoch, 0);

    // Without a placement: alive, not ready, and it says why.
    assert_eq!(fetch(worker.addresses.admin, "/healthz").await.0, 200);
    let (status, body) = fetch(worker.addresses.admin, "/readyz").await;
    assert_eq!(status, 503);
    assert!(body.contains("placement"), "{body}");
    let wanted = request("wanted", prompt(1, 30), 6);
    let call = v1::DecodeRequest {
        generation: Some(experts.view.generation.into()),
        request_id: wanted.request_id.clone(),
        prompt: wanted.prompt.clone(),
        sampling: Some((&wanted.sampling).into()),
        max_tokens: 6,
        prefill: v1::PrefillMode::Local.into(),
        ..Default::default()
    };
    let status = client(worker.addresses.grpc).decode(call.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);

    session.views.send(Ok((&*experts.view).into())).await.unwrap();
    let ready = session.report(v1::MemberState::Ready).await;
    assert_eq!(ready.generation.unwrap().epoch, 1, "the epoch is applied by then");
    let load = ready.worker.unwrap();
    assert_eq!(load.free_pages, load.total_pages);
    assert!(load.total_pages > 0);
    let loading = ready.loading.unwrap();
    assert!(loading.bytes_read > 0 && loading.bytes_read == loading.bytes_expected);
    wait_ready(worker.addresses.admin).await;
    // What the self-test sent to experts is no traffic.
    session.report(v1::MemberState::Ready).await;
    let (_, metrics) = fetch(worker.addresses.admin, "/metrics").await;
    assert!(!metrics.contains("cadre_worker_expert_tokens_total{"), "{metrics}");

    let mut stream = client(worker.addresses.grpc).decode(call.clone()).await.unwrap().into_inner();
    let mut tokens = Vec::new();
    while let Some(event) = stream.next().await {
        if let Some(v1::decode_event::Event::Token(token)) = event.unwrap().event {
            tokens.push((token.position, token.token, token.logprob));
        }
    }
    let local = generate(&open(&small(NumericsClass::Bf16)).handle(), wanted).await;
    let local: Vec<_> = local.iter().map(|token| (token.position, token.token, token.logprob)).collect();
    assert_eq!(tokens, local);

    // Which experts were asked is reported, by layer, and in the metrics.
    let mut reported = 0;
    while reported == 0 {
        let report = session.report(v1::MemberState::Ready).await;
        reported += report.expert_load.iter().flat_map(|layer| &layer.tokens).sum::<u64>();
    }
    loop {
        let (_, metrics) = fetch(worker.addresses.admin, "/metrics").await;
        if metrics.contains("cadre_worker_sequences_ended_total{reason=\"length\"} 2") {
            assert!(metrics.contains("cadre_dispatch_shard_usable{shard=\"1\"} 1"), "{metrics}");
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    // A sequence that runs when the worker is told to stop finishes; a new one is refused.
    let mut long = client(worker.addresses.grpc)
        .decode(v1::DecodeRequest { request_id: "long".into(), max_tokens: 200, ..call.clone() })
        .await
        .unwrap()
        .into_inner();
    long.next().await.unwrap().unwrap();
    worker.stop.send(()).unwrap();
    session.report(v1::MemberState::Draining).await;
    let refused = client(worker.addresses.grpc).decode(call).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    let mut received = 0;
    let mut reason = None;
    while let Some(event) = long.next().await {
        match event.unwrap().event.unwrap() {
            v1::decode_event::Event::Token(_) => received += 1,
            v1::decode_event::Event::Finished(finished) => reason = Some(finished.reason()),
            v1::decode_event::Event::Reserved(_) => {}
        }
    }
    assert_eq!((received, reason), (200, Some(v1::FinishReason::Length)));
    worker.task.await.unwrap().unwrap();
    // It has left: what it reported before comes to an end.
    while session.reports.next().await.is_some_and(|report| report.is_ok()) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_worker_ends_with_the_reason() {
    let (coordinator, _sessions) = coordinate(Some("numerics class bf16 is not ours (f32)")).await;
    let worker = start(coordinator).await;
    let error = worker.task.await.unwrap().unwrap_err();
    assert!(format!("{error:#}").contains("numerics class bf16 is not ours"), "{error:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn told_to_stop_before_it_is_ready_it_stops() {
    let (coordinator, mut sessions) = coordinate(None).await;
    let worker = start(coordinator).await;
    let _session = sessions.recv().await.unwrap();
    worker.stop.send(()).unwrap();
    worker.task.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn told_to_stop_while_it_tests_itself_it_does_not_wait_for_the_test() {
    let experts = Experts::start(NumericsClass::Bf16, 1, 0).await;
    // The self-test waits for a shard that is gone; draining would take an hour.
    experts.kill(0);
    let (coordinator, mut sessions) = coordinate(None).await;
    let (mut options, addresses) = options(coordinator);
    options.timeouts.drain = Duration::from_secs(3600);
    options.timeouts.uncovered = Duration::from_secs(3600);
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(run(options, async move {
        let _ = stopped.await;
    }));
    let admin = addresses.await.unwrap().admin;
    let mut session = sessions.recv().await.unwrap();
    session.views.send(Ok((&*experts.view).into())).await.unwrap();
    // With a placement it begins to test itself, and a report later it is at it.
    while session.report(v1::MemberState::Starting).await.generation.unwrap().epoch == 0 {}
    session.report(v1::MemberState::Starting).await;
    assert_eq!(fetch(admin, "/readyz").await.0, 503);
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(120), task).await.expect("stops soon").unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_during_the_drain_and_after_it_are_unavailable_and_nothing_else() {
    let experts = Experts::start(NumericsClass::Bf16, 1, 0).await;
    let (coordinator, mut sessions) = coordinate(None).await;
    let worker = start(coordinator).await;
    let mut session = sessions.recv().await.unwrap();
    session.views.send(Ok((&*experts.view).into())).await.unwrap();
    wait_ready(worker.addresses.admin).await;
    let wanted = request("x", prompt(1, 30), 2);
    let generation = experts.view.generation;
    let call = move |id: usize| v1::DecodeRequest {
        generation: Some(generation.into()),
        request_id: format!("call-{id}"),
        prompt: wanted.prompt.clone(),
        sampling: Some((&wanted.sampling).into()),
        max_tokens: 2,
        prefill: v1::PrefillMode::Local.into(),
        ..Default::default()
    };
    // One connection that was there before, used without a pause until the port is closed; and a new
    // connection for every call.
    let at = worker.addresses.grpc;
    let mut callers = Vec::new();
    let answered = Arc::new(Semaphore::new(0));
    for kept in [true, false] {
        let (call, answered) = (call.clone(), answered.clone());
        let mut client_kept = client(at);
        callers.push(tokio::spawn(async move {
            let (mut ok, mut codes) = (0, Vec::new());
            for id in 0.. {
                let mut fresh = client(at);
                let client = if kept { &mut client_kept } else { &mut fresh };
                let id = 2 * id + usize::from(kept);
                let outcome = async {
                    let mut events = client.decode(call(id)).await?.into_inner();
                    while events.message().await?.is_some() {}
                    Ok::<_, tonic::Status>(())
                };
                match outcome.await {
                    Ok(()) => {
                        ok += 1;
                        answered.add_permits(1);
                    }
                    Err(status) => {
                        // Nobody listens any more: it is over.
                        let over = ConnectionEnd::of_status(&status) == Some(ConnectionEnd::NotMade);
                        codes.push(status);
                        if over {
                            break;
                        }
                    }
                }
            }
            (ok, codes)
        }));
    }
    session.report(v1::MemberState::Ready).await;
    answered.acquire_many(4).await.unwrap().forget();
    worker.stop.send(()).unwrap();
    session.report(v1::MemberState::Draining).await;
    worker.task.await.unwrap().unwrap();
    for caller in callers {
        let (ok, statuses) = caller.await.unwrap();
        println!("{ok} answered, {} refused", statuses.len());
        for status in statuses {
            // The server may have closed the connection before it saw the call: then our own side says so, in
            // whatever code. What the worker says itself is that it is draining.
            let expected = match ConnectionEnd::of_status(&status) {
                Some(end) => end.is_before_work(),
                None => status.code() == Code::Unavailable,
            };
            assert!(expected, "{status:?}");
        }
    }
}

#[tokio::test]
async fn unusable_options_are_named() {
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 9));
    let mut missing = options(nowhere).0;
    missing.model_dir = "/no/such/model".into();
    let mut tiny = options(nowhere).0;
    tiny.kv_bytes = 1000;
    let mut wildcard = options(nowhere).0;
    wildcard.listen = "0.0.0.0:0".parse().unwrap();
    for (options, words) in [(missing, "/no/such/model"), (tiny, "kv-bytes"), (wildcard, "advertise")] {
        let error = run(options, std::future::pending()).await.unwrap_err();
        assert!(format!("{error:#}").contains(words), "{words}: {error:#}");
    }
}
