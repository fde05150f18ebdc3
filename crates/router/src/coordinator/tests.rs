#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use cadre_telemetry::Metrics;
use cadre_types::{
    LayerId, LayerPlacement, LogicalExpert, ModelHash, NumericsClass, Placement, PlacementEpoch, PodRef,
    PodView, ShardIndex,
};

use cadre_placement::LayerLoad;

use super::{
    digests::ReportedDigests,
    layouts::Stamp,
    owner::{IMBALANCE_INTERVAL, STATUS_INTERVAL},
    proof::{Step, Verdict},
    report::ReportedFault,
    state::{Effect, Refusal},
    *,
};

const LEASE: Duration = Duration::from_secs(3);

/// Width of rows.
const HIDDEN: usize = 4;

fn generation(epoch: u64) -> Generation {
    Generation { model: ModelHash([7; 16]), numerics: NumericsClass::Bf16, epoch: PlacementEpoch(epoch) }
}

/// Two shards; expert 0 on both, expert 1 on shard 0, expert 2 on shard 1.
fn placement() -> Placement {
    let slots = vec![vec![LogicalExpert(0), LogicalExpert(1)], vec![LogicalExpert(2), LogicalExpert(0)]];
    let layers = vec![LayerPlacement { layer: LayerId(1), slots }];
    Placement::new(PlacementEpoch(1), 3, layers).unwrap()
}

fn report(id: &str, role: Role, state: MemberState) -> MemberReport {
    MemberReport {
        member: Member { id: MemberId(id.into()), role, address: format!("{id}:1"), state, pod: None },
        generation: generation(0),
        placement_digest: 0,
        prepared: Stamp::default(),
        applied_placement: None,
        load: WorkerLoad { total_pages: 10, free_pages: 10, ..WorkerLoad::default() },
        loading: None,
        device: None,
        weights: String::new(),
        expert_load: Vec::new(),
        digests: ReportedDigests::default(),
        faults: Vec::new(),
    }
}

fn shard(index: u16, state: MemberState) -> MemberReport {
    report(&format!("shard-{index}"), Role::Expert(ShardIndex(index)), state)
}

fn planner() -> Planner {
    let load = ExpertLoad::new(vec![LayerLoad { layer: LayerId(1), tokens: vec![2, 1, 1] }]).unwrap();
    Planner::for_load(load)
}

/// A coordinator with [`placement`] in force, as if it had planned it.
fn state() -> State {
    let layout = Layout { shards: 2, redundant_slots: 1, min_copies: 1 };
    let mut layouts = Layouts::new(planner(), layout, Duration::ZERO);
    layouts.force(placement());
    State::new(generation(0), layouts, LEASE, Duration::from_secs(60))
}

fn view(state: &State) -> ClusterView {
    state.view().unwrap()
}

fn join(state: &mut State, report: MemberReport) -> (ConnectionId, oneshot::Receiver<Status>) {
    let (end, ended) = oneshot::channel();
    let (connection, replaced) = state.join(Instant::now(), report, end).unwrap();
    assert!(replaced.is_none());
    (connection, ended)
}

fn refusal(state: &mut State, report: MemberReport) -> Refusal {
    state.join(Instant::now(), report, oneshot::channel().0).unwrap_err()
}

fn members(state: &State) -> Vec<String> {
    state.shown_members().iter().map(|member| member.id.0.clone()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_member_of_another_generation_is_refused_and_not_told_the_right_one() {
    let mut state = state();
    let mut other_model = shard(0, MemberState::Ready);
    other_model.generation.model = ModelHash([8; 16]);
    let refused = refusal(&mut state, other_model);
    assert!(refused.to_string().contains(&"07".repeat(16)), "the log has both: {refused}");
    let status = Status::from(refused);
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    for words in ["shard-0", &"08".repeat(16)] {
        assert!(status.message().contains(words), "{} lacks {words}", status.message());
    }
    assert!(!status.message().contains(&"07".repeat(16)), "{}", status.message());
    let mut other_class = shard(0, MemberState::Ready);
    other_class.generation.numerics = NumericsClass::Fp8;
    let status = Status::from(refusal(&mut state, other_class));
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    assert!(status.message().contains("fp8") && status.message().contains("bf16"), "{}", status.message());
    assert!(members(&state).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_shard_beyond_the_placement_is_refused() {
    let status = Status::from(refusal(&mut state(), shard(2, MemberState::Ready)));
    assert_eq!(status.code(), tonic::Code::Unavailable, "it may try again: a layout may have it");
    assert!(
        status.message().contains("shard 2") && status.message().contains("2 shards"),
        "{}",
        status.message()
    );
}

#[tokio::test(start_paused = true)]
async fn a_report_renews_the_lease_and_silence_ends_it() {
    let mut state = state();
    let (connection, _ended) = join(&mut state, shard(0, MemberState::Ready));
    join(&mut state, shard(1, MemberState::Ready));
    tokio::time::advance(Duration::from_secs(2)).await;
    state.report(Instant::now(), connection, shard(0, MemberState::Ready)).unwrap();
    tokio::time::advance(Duration::from_secs(1)).await;
    let lost = state.expire(Instant::now());
    assert_eq!(lost.iter().map(|loss| loss.member.id.0.as_str()).collect::<Vec<_>>(), ["shard-1"]);
    assert_eq!(members(&state), ["shard-0"]);
    assert_eq!(state.next_expiry(Instant::now()), Some(Instant::now() + Duration::from_secs(2)));
}

#[tokio::test(start_paused = true)]
async fn a_second_stream_of_a_member_replaces_the_first() {
    let mut state = state();
    let (first, _ended) = join(&mut state, shard(0, MemberState::Starting));
    let (end, _) = oneshot::channel();
    let (second, replaced) = state.join(Instant::now(), shard(0, MemberState::Ready), end).unwrap();
    assert_eq!(replaced.unwrap().cause.name(), "replaced");
    // The goodbye of the first stream must not remove the second.
    assert!(state.leave(first).is_none());
    assert_eq!(state.report(Instant::now(), first, shard(0, MemberState::Ready)), Err(Refusal::Gone));
    assert_eq!(members(&state), ["shard-0"]);
    assert_eq!(state.leave(second).unwrap().cause.name(), "closed");
    assert!(members(&state).is_empty());
}

#[tokio::test(start_paused = true)]
async fn identity_may_not_change_on_a_stream() {
    let mut state = state();
    let (connection, _ended) = join(&mut state, shard(0, MemberState::Ready));
    let change = |state: &mut State, change: &dyn Fn(&mut Member)| {
        let mut report = shard(0, MemberState::Ready);
        change(&mut report.member);
        state.report(Instant::now(), connection, report).unwrap_err().to_string()
    };
    assert!(
        change(&mut state, &|member| member.role = Role::Both).contains("role changed from expert 0 to both")
    );
    assert!(change(&mut state, &|member| member.address = "x:2".into()).contains("address changed"));
    assert!(change(&mut state, &|member| member.id = MemberId("y".into())).contains("id changed"));
}

#[tokio::test(start_paused = true)]
async fn epochs_never_go_backwards_and_the_placement_stays() {
    let mut state = state();
    assert_eq!(view(&state).generation.epoch, PlacementEpoch(1));
    let mut applied = shard(0, MemberState::Ready);
    applied.generation.epoch = PlacementEpoch(9);
    applied.placement_digest = placement().digest();
    join(&mut state, applied);
    let seen = view(&state);
    assert_eq!((seen.generation.epoch, seen.placement.epoch()), (PlacementEpoch(9), PlacementEpoch(9)));
    assert_eq!(seen.placement.layers(), placement().layers());
    let mut older = shard(1, MemberState::Ready);
    older.generation.epoch = PlacementEpoch(4);
    older.placement_digest = placement().digest();
    join(&mut state, older);
    assert_eq!(view(&state).generation.epoch, PlacementEpoch(9));
}

#[tokio::test(start_paused = true)]
async fn an_epoch_that_means_another_placement_is_passed() {
    let mut state = state();
    let mut other = shard(0, MemberState::Ready);
    other.generation.epoch = PlacementEpoch(1);
    other.placement_digest = placement().digest() ^ 1;
    join(&mut state, other);
    assert_eq!(view(&state).generation.epoch, PlacementEpoch(2), "theirs is 1, and is not ours");
    let mut older = shard(1, MemberState::Ready);
    older.generation.epoch = PlacementEpoch(1);
    older.placement_digest = placement().digest() ^ 2;
    join(&mut state, older);
    assert_eq!(view(&state).generation.epoch, PlacementEpoch(2), "1 is already behind us");
}

#[tokio::test(start_paused = true)]
async fn effects_tell_views_from_loads() {
    let mut state = state();
    let worker = |state| report("w", Role::Both, state);
    let (connection, _ended) = join(&mut state, worker(MemberState::Starting));
    let mut take = |report| state.report(Instant::now(), connection, report).unwrap();
    assert_eq!(take(worker(MemberState::Starting)), Effect::Load);
    assert_eq!(take(worker(MemberState::Ready)), Effect::View);
    assert_eq!(take(worker(MemberState::Ready)), Effect::Load);
    let (connection, _ended) = join(&mut state, shard(0, MemberState::Ready));
    let effect = state.report(Instant::now(), connection, shard(0, MemberState::Ready)).unwrap();
    assert_eq!(effect, Effect::Nothing);
}

#[tokio::test(start_paused = true)]
async fn load_that_does_not_fit_is_refused_and_load_that_does_is_counted() {
    let mut state = state();
    let mut worker = report("w", Role::Both, MemberState::Ready);
    worker.expert_load = vec![(LayerId(1), vec![5, 6, 7])];
    let (connection, _ended) = join(&mut state, worker.clone());
    state.report(Instant::now(), connection, worker.clone()).unwrap();
    assert_eq!(state.expert_load(Instant::now()).layer(LayerId(1)), Some([10, 12, 14].as_slice()));
    worker.expert_load = vec![(LayerId(1), vec![5])];
    let error = state.report(Instant::now(), connection, worker).unwrap_err();
    assert!(error.to_string().contains("1 experts, expected 3"), "{error}");
}

#[test]
fn coverage_counts_ready_shards_only_and_names_the_expert() {
    let mut view = ClusterView::settled(generation(1), Arc::new(placement()), Vec::new());
    view.members.push(shard(0, MemberState::Ready).member);
    view.members.push(shard(1, MemberState::Starting).member);
    let missing = uncovered(&view).unwrap();
    assert!(missing.contains("expert 2 of layer 1") && missing.ends_with("shards not ready: 1"), "{missing}");
    view.members[1].state = MemberState::Ready;
    assert_eq!(uncovered(&view), None);
    // A draining shard is on its way out; its replacement may register under the same index.
    view.members[0].state = MemberState::Draining;
    assert!(uncovered(&view).unwrap().contains("expert 1 of layer 1"));
    view.members.push(Member { id: MemberId("shard-0b".into()), ..shard(0, MemberState::Ready).member });
    assert_eq!(uncovered(&view), None);
}

// --- the owner task --------------------------------------------------------------------------------

fn prover(commands: mpsc::WeakSender<Command>) -> Prover {
    Prover::new(None, HIDDEN, commands)
}

fn coordinator() -> Coordinator {
    spawn(RouterMetrics::register(&Metrics::new()).unwrap()).0
}

fn spawn(metrics: RouterMetrics) -> (Coordinator, tokio::task::JoinHandle<()>) {
    Coordinator::spawn_over(state(), Readiness::new(&[("accepting", "not yet")]), metrics, prover)
}

async fn register(coordinator: &Coordinator, report: MemberReport) -> Joined {
    let (reply, answer) = oneshot::channel();
    coordinator.commands.send(Command::Join { report, reply }).await.unwrap();
    answer.await.unwrap().unwrap()
}

async fn wait_for(views: &mut watch::Receiver<Option<Arc<PublishedView>>>, members: &[&str]) {
    let reached = views.wait_for(|published| {
        published
            .as_ref()
            .unwrap()
            .view
            .members
            .iter()
            .map(|member| member.id.0.as_str())
            .eq(members.iter().copied())
    });
    reached.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_owner_removes_a_silent_member_and_says_so_on_its_stream() {
    let coordinator = coordinator();
    let mut views = coordinator.views();
    let start = Instant::now();
    let joined = register(&coordinator, report("w", Role::Both, MemberState::Ready)).await;
    wait_for(&mut views, &["w"]).await;
    assert_eq!(coordinator.workers().borrow().workers.len(), 1);
    wait_for(&mut views, &[]).await;
    assert_eq!(start.elapsed(), LEASE);
    let status = joined.ended.await.unwrap();
    assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
    assert!(status.message().contains("member w has not reported for 3s"), "{}", status.message());
    assert!(coordinator.workers().borrow().workers.is_empty());
}

#[tokio::test(start_paused = true)]
async fn members_see_whole_views_and_slow_ones_skip_to_the_newest() {
    let coordinator = coordinator();
    let slow = register(&coordinator, shard(0, MemberState::Ready)).await;
    for index in 0..5 {
        register(&coordinator, report(&format!("w{index}"), Role::Both, MemberState::Starting)).await;
    }
    let seen = slow.views.borrow().as_ref().unwrap().view.members.len();
    assert_eq!(seen, 6, "one look, everything at once");
    let left = register(&coordinator, shard(1, MemberState::Ready)).await;
    coordinator.commands.send(Command::Leave { connection: left.connection }).await.unwrap();
    let mut views = coordinator.views();
    wait_for(&mut views, &["shard-0", "w0", "w1", "w2", "w3", "w4"]).await;
    let description = coordinator.describe().await.unwrap();
    assert_eq!(description["covered"], false);
    assert_eq!(description["members"][0]["shard"], 0);
}

#[tokio::test(start_paused = true)]
async fn imbalance_is_measured_over_the_placement_in_force() {
    let registry = Metrics::new();
    let metrics = RouterMetrics::register(&registry).unwrap();
    let (coordinator, owner) = spawn(metrics);
    let mut worker = report("w", Role::Both, MemberState::Ready);
    worker.expert_load = vec![(LayerId(1), vec![4, 6, 0])];
    register(&coordinator, worker).await;
    tokio::time::sleep(IMBALANCE_INTERVAL).await;
    // An answer from the owner means that it has dealt with its tick, too.
    coordinator.describe().await.unwrap();
    // Expert 0 is shared: shard 0 has 2 + 6, shard 1 has 2 of 10 tokens; the mean is 5.
    let text = registry.encode().unwrap();
    assert!(text.contains("cadre_router_expert_imbalance_ratio{layer=\"1\"} 1.6\n"), "{text}");
    owner.abort();
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_owner_ends_every_stream() {
    let metrics = RouterMetrics::register(&Metrics::new()).unwrap();
    let (coordinator, owner) = spawn(metrics);
    let joined = register(&coordinator, shard(0, MemberState::Ready)).await;
    owner.abort();
    assert!(joined.ended.await.is_err());
    assert_eq!(coordinator.describe().await, None);
}

// --- pods, the operator, coverage ------------------------------------------------------------------

fn pod(name: &str) -> PodRef {
    PodRef { name: name.into(), uid: format!("uid-{name}") }
}

fn in_pod(mut report: MemberReport, name: &str) -> MemberReport {
    report.member.pod = Some(pod(name));
    report
}

/// Pods by name, each in its domain; names that begin with `!` are withdrawn.
fn operator_view(shards: u16, pods: &[(&str, &str)]) -> OperatorView {
    let on = |(name, domain): &(&str, &str)| PodView {
        pod: pod(name.trim_start_matches('!')),
        domain: Some((*domain).to_owned()).filter(|domain| !domain.is_empty()),
        withdrawn: name.starts_with('!'),
        ips: Vec::new(),
    };
    let mut pods: Vec<PodView> = pods.iter().map(on).collect();
    pods.sort_by(|a, b| a.pod.uid.cmp(&b.pod.uid));
    OperatorView { layout: Layout { shards, redundant_slots: 1, min_copies: 1 }, pods }
}

#[tokio::test(start_paused = true)]
async fn a_withdrawn_pod_drains_and_one_that_is_gone_is_removed_and_stays_out() {
    let mut state = state();
    join(&mut state, in_pod(report("w", Role::Both, MemberState::Ready), "w"));
    join(&mut state, report("laptop", Role::Both, MemberState::Ready));
    let now = Instant::now();
    assert!(state.operate(now, &operator_view(2, &[("w", "a")])).is_empty());
    assert!(state.status(now, None, true).members.iter().all(|member| member.routable));
    state.operate(now, &operator_view(2, &[("!w", "a")]));
    let states: Vec<MemberState> = state.worker_table().workers.iter().map(|w| w.member.state).collect();
    assert_eq!(states, [MemberState::Ready, MemberState::Draining]);
    assert_eq!(view(&state).members[1].state, MemberState::Draining);
    assert!(!state.status(now, None, true).members[1].routable);

    assert!(state.operate(now, &operator_view(2, &[])).is_empty(), "no pods at all: nothing is said");
    let lost = state.operate(now, &operator_view(2, &[("other", "a")]));
    assert_eq!(lost.iter().map(|loss| loss.cause.name()).collect::<Vec<_>>(), ["pod_gone"]);
    assert_eq!(members(&state), ["laptop"], "a stranger has its grace");
    let status = state.status(now, None, true);
    assert!(status.members[0].routable && status.members[0].stranger.is_some());
    let again = refusal(&mut state, in_pod(report("w2", Role::Both, MemberState::Ready), "w"));
    assert!(again.to_string().contains("pod w (uid-w) has been deleted"), "{again}");
    assert_eq!(Status::from(again).code(), tonic::Code::Unavailable, "tried again, never fatal");
    // A view that was wrong is mended by the next.
    state.operate(now, &operator_view(2, &[("other", "a"), ("w", "a")]));
    join(&mut state, in_pod(report("w2", Role::Both, MemberState::Ready), "w"));
    tokio::time::advance(pods::GRACE).await;
    let lost = state.operate(Instant::now(), &operator_view(2, &[("other", "a"), ("w", "a")]));
    assert_eq!(lost.iter().map(|loss| loss.cause.name()).collect::<Vec<_>>(), ["stranger"]);
    assert_eq!(members(&state), ["w2"]);
}

#[tokio::test(start_paused = true)]
async fn strangers_are_refused_while_an_operator_is_there() {
    let mut state = state();
    let mut view = operator_view(2, &[("w", "a")]);
    view.pods[0].ips = vec!["10.0.0.1".into()];
    state.operate(Instant::now(), &view);
    let at = |address: &str| {
        let mut report = in_pod(report("w", Role::Both, MemberState::Ready), "w");
        report.member.address = address.into();
        report
    };
    for (report, why) in [
        (report("w", Role::Both, MemberState::Ready), "it names no pod"),
        (in_pod(report("w", Role::Both, MemberState::Ready), "x"), "has no pod x (uid-x)"),
        (at("10.0.0.2:1"), "10.0.0.2:1 is not the address of its pod w (uid-w)"),
    ] {
        let refused = refusal(&mut state, report);
        assert!(refused.to_string().contains(why), "{refused}");
        assert_eq!((refused.name(), Status::from(refused).code()), ("stranger", tonic::Code::Unavailable));
    }
    assert!(members(&state).is_empty());
    join(&mut state, at("10.0.0.1:1"));
    assert_eq!(state.status(Instant::now(), None, true).members[0].stranger, None);
    state.operator_left();
    join(&mut state, in_pod(report("new", Role::Both, MemberState::Ready), "new"));
}

/// A worker that answers every request with so many tokens.
#[derive(Clone, Default)]
struct Answering {
    tokens: Arc<std::sync::atomic::AtomicUsize>,
    asked: Arc<tokio::sync::Notify>,
}

type Events<T> = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl v1::worker_server::Worker for Answering {
    type DecodeStream = Events<v1::DecodeEvent>;
    type PrefillStream = Events<v1::PrefillEvent>;

    async fn decode(
        &self,
        request: tonic::Request<v1::DecodeRequest>,
    ) -> Result<tonic::Response<Self::DecodeStream>, Status> {
        use v1::decode_event::Event;
        assert_eq!((request.get_ref().prompt.len(), request.get_ref().max_tokens), (1, 1));
        self.asked.notify_one();
        let tokens = self.tokens.load(std::sync::atomic::Ordering::SeqCst);
        let token = |_| Event::Token(v1::GeneratedToken::default());
        let events = (0..tokens).map(token).chain([Event::Finished(v1::Finished::default())]);
        let events: Vec<_> = events.map(|event| Ok(v1::DecodeEvent { event: Some(event) })).collect();
        Ok(tonic::Response::new(Box::pin(tokio_stream::iter(events))))
    }

    async fn prefill(
        &self,
        _: tonic::Request<v1::PrefillRequest>,
    ) -> Result<tonic::Response<Self::PrefillStream>, Status> {
        Err(Status::unimplemented("not asked"))
    }

    async fn receive_kv(
        &self,
        _: tonic::Request<tonic::Streaming<v1::KvFrame>>,
    ) -> Result<tonic::Response<v1::KvReceipt>, Status> {
        Err(Status::unimplemented("not asked"))
    }
}

#[tokio::test]
async fn a_worker_that_an_operator_sees_is_routable_after_a_step_that_we_asked_for() {
    let worker = Answering::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let service = v1::worker_server::WorkerServer::new(worker.clone());
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));

    let layout = Layout { shards: 2, redundant_slots: 1, min_copies: 1 };
    let mut layouts = Layouts::new(planner(), layout, Duration::ZERO);
    layouts.force(placement());
    let forever = Duration::from_secs(3600);
    let state = State::new(generation(0), layouts, forever, forever);
    let metrics = RouterMetrics::register(&Metrics::new()).unwrap();
    let (coordinator, _owner) = Coordinator::spawn_over(state, Readiness::new(&[]), metrics, prover);
    let _operating = operate(&coordinator, operator_view(2, &[("w", "a")])).await;
    let mut ready = in_pod(report("w", Role::Both, MemberState::Ready), "w");
    ready.member.address = address;
    let _joined = register(&coordinator, ready).await;
    let mut workers = coordinator.workers();
    let state = |workers: &watch::Receiver<Arc<WorkerTable>>| workers.borrow().workers[0].member.state;
    assert_eq!(state(&workers), MemberState::Starting, "its word alone does not count");
    // An answer without a token is no step: it is asked again.
    for _ in 0..2 {
        tokio::time::timeout(Duration::from_secs(60), worker.asked.notified()).await.unwrap();
    }
    assert_eq!(state(&workers), MemberState::Starting);
    worker.tokens.store(1, std::sync::atomic::Ordering::SeqCst);
    let proven = workers.wait_for(|table| table.workers[0].member.state == MemberState::Ready);
    tokio::time::timeout(Duration::from_secs(60), proven).await.unwrap().unwrap();
}

/// A shard that holds the placement in force.
fn proven(index: u16) -> MemberReport {
    let mut report = shard(index, MemberState::Ready);
    (report.generation.epoch, report.placement_digest) = (PlacementEpoch(1), placement().digest());
    report
}

fn accusing(id: &str, of: u16) -> MemberReport {
    let mut worker = report(id, Role::Both, MemberState::Ready);
    let address = shard(of, MemberState::Ready).member.address;
    let (shard, layer, expert) = (ShardIndex(of), LayerId(1), LogicalExpert(0));
    worker.faults = vec![ReportedFault { shard, address, layer, expert }];
    worker
}

#[tokio::test(start_paused = true)]
async fn a_workers_word_makes_a_shard_answer_for_itself_and_takes_nothing_from_the_cluster() {
    let mut state = state();
    let (first, _a) = join(&mut state, proven(0));
    let (_, _b) = join(&mut state, proven(1));
    let (worker, _c) = join(&mut state, report("w", Role::Both, MemberState::Ready));
    let now = Instant::now();
    assert!(state.questions(now).is_empty(), "without an operator nobody is asked");
    state.report(now, worker, accusing("w", 0)).unwrap();
    let questions = state.questions(now);
    let [question] = questions.as_slice() else { panic!("{questions:?}") };
    assert_eq!(question.connection, first);
    assert_eq!(question.generation.epoch, PlacementEpoch(1));
    // Expert 0 is in the first slot of shard 0.
    assert_eq!(question.step, Step::Rows { slots: vec![(LayerId(1), 0)] });
    assert_eq!(state.coverage().uncovered, 0, "it is asked, and in use meanwhile");

    // What cannot be reached, or is busy, has not answered wrongly.
    assert_eq!(state.judge(now, first, Verdict::Unanswered("busy".into())), None);
    assert_eq!((state.coverage().uncovered, state.failed_proofs()), (0, 0));
    assert!(state.questions(now).is_empty(), "not at once again");
    let now = now + Duration::from_secs(1);
    assert_eq!(state.next_question(now - Duration::from_millis(1)), Some(now));
    assert_eq!(state.questions(now).len(), 1);

    // What answers wrongly covers nothing, is named, and is asked until it passes.
    let (member, failed) = state.judge(now, first, Verdict::Wrong("not finite".into())).unwrap();
    assert_eq!((member.0.as_str(), failed.as_deref()), ("shard-0", Some("not finite")));
    assert_eq!(state.coverage().uncovered, 1, "expert 1 is on shard 0 only");
    assert!(uncovered(&view(&state)).unwrap().contains("expert 1 of layer 1"));
    let status = state.status(now, None, true);
    let named = status.members.iter().find(|member| member.member.id.0 == "shard-0").unwrap();
    assert_eq!((named.routable, named.failed_proof.as_deref()), (false, Some("not finite")));
    assert_eq!(state.failed_proofs(), 1);
    // The worker's silence does not heal it.
    state.report(now, worker, report("w", Role::Both, MemberState::Ready)).unwrap();
    let now = now + Duration::from_secs(20);
    assert_eq!(state.questions(now).len(), 1);
    assert_eq!(state.judge(now, first, Verdict::Passed), Some((member, None)));
    assert_eq!((state.coverage().uncovered, state.failed_proofs()), (0, 0));

    // A liar costs a question a second.
    for _ in 0..3 {
        state.report(now, worker, accusing("w", 0)).unwrap();
        assert!(state.questions(now).is_empty());
    }
    let later = now + Duration::from_secs(1);
    assert_eq!(state.questions(later).len(), 1);
    assert_eq!(state.judge(later, first, Verdict::Passed), None, "nothing changes for others");
}

#[tokio::test(start_paused = true)]
async fn a_fault_of_an_expert_that_does_not_exist_or_by_a_shard_is_malformed() {
    let mut state = state();
    let mut unknown = accusing("w", 0);
    unknown.faults[0].expert = LogicalExpert(3);
    assert_eq!(refusal(&mut state, unknown).name(), "malformed");
    let mut by_shard = proven(0);
    by_shard.faults = accusing("w", 1).faults;
    assert_eq!(refusal(&mut state, by_shard).name(), "malformed");
    // Nobody is at that address: nothing is asked.
    let mut nobody = accusing("w", 0);
    nobody.faults[0].address = "elsewhere:1".into();
    join(&mut state, proven(0));
    join(&mut state, nobody);
    assert!(state.questions(Instant::now()).is_empty());
}

#[tokio::test(start_paused = true)]
async fn with_an_operator_every_role_owes_a_step_and_those_before_it_are_asked_too() {
    let mut state = state();
    let (before, _a) = join(&mut state, in_pod(proven(0), "s0"));
    let pods = [("d", "a"), ("p", "a"), ("s0", "a"), ("s1", "a")];
    let now = Instant::now();
    state.operate(now, &operator_view(2, &pods));
    let asked = |state: &State| -> Vec<(String, Step)> {
        let questions = state.questions(Instant::now()).into_iter();
        questions.map(|question| (question.member.id.0, question.step)).collect()
    };
    let rows = Step::Rows { slots: vec![(LayerId(1), 0)] };
    assert_eq!(asked(&state), [("shard-0".to_owned(), rows.clone())]);
    assert!(state.status(now, None, true).members[0].routable, "it serves while it is asked");
    assert_eq!(state.judge(now, before, Verdict::Unanswered("no way there".into())), None);
    assert!(state.status(now, None, true).members[0].routable);
    assert_eq!(state.judge(now, before, Verdict::Passed), None);

    let routable = |state: &State, id: &str| {
        let status = state.status(Instant::now(), None, true);
        status.members.into_iter().find(|member| member.member.id.0 == id).unwrap().routable
    };
    let (shard, _b) = join(&mut state, in_pod(proven(1), "s1"));
    let (prefill, _c) = join(&mut state, in_pod(report("p", Role::Prefill, MemberState::Ready), "p"));
    assert_eq!(asked(&state), [("shard-1".to_owned(), rows)], "there is nobody to hand a prompt to");
    assert!(!routable(&state, "shard-1") && !routable(&state, "p"));
    assert_eq!(state.judge(now, shard, Verdict::Passed), Some((MemberId("shard-1".into()), None)));
    assert!(routable(&state, "shard-1"));
    let (decode, _d) = join(&mut state, in_pod(report("d", Role::Decode, MemberState::Ready), "d"));
    assert_eq!(asked(&state), [("d".to_owned(), Step::Decode)]);
    state.judge(now, decode, Verdict::Passed).unwrap();
    let to = Step::Prefill { decode_address: "d:1".to_owned() };
    assert_eq!(asked(&state), [("p".to_owned(), to)]);
    // A failure is named, and others are told when it changes.
    let failed = state.judge(now, prefill, Verdict::Unanswered("refused".into())).unwrap();
    assert_eq!(failed.1.as_deref(), Some("refused"));
    assert!(!routable(&state, "p"));
    state.judge(now, prefill, Verdict::Passed).unwrap();
    assert!(routable(&state, "p"));
}

/// A shard that answers every frame with such a value.
#[derive(Clone)]
struct AnsweringShard {
    value: Arc<parking_lot::Mutex<f32>>,
}

#[tonic::async_trait]
impl v1::expert_server::Expert for AnsweringShard {
    type DispatchStream = Events<v1::CombineFrame>;

    async fn dispatch(
        &self,
        request: tonic::Request<tonic::Streaming<v1::DispatchFrame>>,
    ) -> Result<tonic::Response<Self::DispatchStream>, Status> {
        use tokio_stream::StreamExt as _;
        let value = Arc::clone(&self.value);
        let answers = request.into_inner().map(move |frame| {
            let frame = frame?;
            assert_eq!(frame.activations.len(), 2 * HIDDEN, "a row of bf16");
            // The upper half of a float is a bf16.
            let [_, _, low, high] = value.lock().to_le_bytes();
            let rows = [low, high].repeat(HIDDEN * frame.pair_slots.len());
            Ok(v1::CombineFrame {
                sequence: frame.sequence,
                dtype: v1::Dtype::Bf16.into(),
                rows: rows.into(),
                ..v1::CombineFrame::default()
            })
        });
        Ok(tonic::Response::new(Box::pin(answers)))
    }
}

#[tokio::test]
async fn a_shard_that_answers_nan_rows_covers_nothing_until_its_rows_are_finite() {
    let broken = AnsweringShard { value: Arc::new(parking_lot::Mutex::new(f32::NAN)) };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let service = v1::expert_server::ExpertServer::new(broken.clone());
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));

    let layout = Layout { shards: 2, redundant_slots: 1, min_copies: 1 };
    let mut layouts = Layouts::new(planner(), layout, Duration::ZERO);
    layouts.force(placement());
    let forever = Duration::from_secs(3600);
    let state = State::new(generation(0), layouts, forever, forever);
    let registry = Metrics::new();
    let metrics = RouterMetrics::register(&registry).unwrap();
    let (coordinator, _owner) = Coordinator::spawn_over(state, Readiness::new(&[]), metrics, prover);
    let mut at_fault = proven(0);
    at_fault.member.address = address.clone();
    let _shards = (register(&coordinator, at_fault).await, register(&coordinator, proven(1)).await);
    assert_eq!(coordinator.describe().await.unwrap()["covered"], true, "it says that it is ready");

    let mut worker = accusing("w", 0);
    worker.faults[0].address = address;
    let _worker = register(&coordinator, worker).await;
    let mut views = coordinator.views();
    let mut covered = async |wanted: bool| {
        let reached = views.wait_for(|published| {
            published.as_ref().is_some_and(|published| uncovered(&published.view).is_none() == wanted)
        });
        tokio::time::timeout(Duration::from_secs(60), reached).await.unwrap().unwrap();
    };
    covered(false).await;
    let described = coordinator.describe().await.unwrap();
    assert_eq!(described["covered"], false);
    let failed = described["members"][0]["failed_proof"].as_str().unwrap().to_owned();
    assert_eq!(failed, "a row of ones through slot 0 of layer 1: element 0 is not finite");
    assert!(registry.encode().unwrap().contains("cadre_router_failed_proofs 1"));
    *broken.value.lock() = 1.0;
    covered(true).await;
    assert!(registry.encode().unwrap().contains("cadre_router_failed_proofs 0"));
}

#[tokio::test(start_paused = true)]
async fn what_a_member_may_make_others_hold_is_bounded() {
    let mut state = state();
    let named = |id: String, role| report(&id, role, MemberState::Starting);
    let mut streams = Vec::new();
    for index in 0..8 {
        streams.push(join(&mut state, named(format!("s{index}"), Role::Expert(ShardIndex(0)))));
    }
    let refused = refusal(&mut state, named("s8".into(), Role::Expert(ShardIndex(0))));
    assert!(refused.to_string().contains("there are 8 members for shard 0"), "{refused}");
    // One that comes again takes no room.
    state
        .join(Instant::now(), named("s7".into(), Role::Expert(ShardIndex(0))), oneshot::channel().0)
        .unwrap();
    for index in 8..4096 {
        streams.push(join(&mut state, named(format!("w{index}"), Role::Both)));
    }
    let refused = refusal(&mut state, named("more".into(), Role::Both));
    assert!(refused.to_string().contains("there are 4096 members already"), "{refused}");
    assert_eq!((refused.name(), Status::from(refused).code()), ("full", tonic::Code::ResourceExhausted));
}

#[tokio::test(start_paused = true)]
async fn copies_whose_bytes_differ_are_refused_for_good_and_unknown_experts_are_malformed() {
    let mut state = state();
    let reading = |index, expert: u16, digest| {
        let mut report = shard(index, MemberState::Ready);
        report.digests.experts = vec![(LayerId(1), LogicalExpert(expert), digest)];
        report
    };
    let (connection, _ended) = join(&mut state, shard(0, MemberState::Starting));
    state.report(Instant::now(), connection, reading(0, 0, 7)).unwrap();
    let refused = refusal(&mut state, reading(1, 0, 8));
    assert_eq!(refused.name(), "digest");
    let status = Status::from(refused);
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    assert!(status.message().contains("expert 0 of layer 1"), "{}", status.message());
    let refused = refusal(&mut state, reading(1, 3, 8));
    assert!(refused.to_string().contains("no expert 3 of layer 1"), "{refused}");
    join(&mut state, reading(1, 0, 7));
    // The same process, reading again for another placement, is judged as well.
    state.report(Instant::now(), connection, reading(0, 0, 9)).unwrap_err();
}

/// Slots of every shard in the one layer with experts.
fn placed(epoch: u64, layer: u16, slots: Vec<Vec<u16>>) -> Placement {
    let slots = slots.into_iter().map(|on| on.into_iter().map(LogicalExpert).collect()).collect();
    Placement::new(PlacementEpoch(epoch), 3, vec![LayerPlacement { layer: LayerId(layer), slots }]).unwrap()
}

fn holding(mut report: MemberReport, placement: &Placement) -> MemberReport {
    report.generation.epoch = placement.epoch();
    report.placement_digest = placement.digest();
    report.applied_placement = Some(placement.clone());
    report
}

#[tokio::test(start_paused = true)]
async fn a_reported_placement_that_cannot_be_is_refused() {
    let mut state = state();
    let many = vec![vec![0, 1, 2]; 17];
    let worker = || report("w", Role::Both, MemberState::Ready);
    for (placement, problem) in [
        (placed(5, 2, vec![vec![0, 1, 2]]), "layers [2], those with experts are [1]"),
        (placed(5, 1, vec![vec![0, 1, 2], vec![]]), "layer 1: a shard of 2 has no slot"),
        (placed(5, 1, many), "51 slots per layer, at most 48"),
    ] {
        let refused = refusal(&mut state, holding(worker(), &placement));
        assert!(refused.to_string().contains(problem), "{refused} lacks {problem}");
        assert_eq!(
            (refused.name(), Status::from(refused).code()),
            ("malformed", tonic::Code::InvalidArgument)
        );
    }
    let mut other_digest = holding(worker(), &placed(5, 1, vec![vec![0, 1, 2]]));
    other_digest.placement_digest ^= 1;
    let refused = refusal(&mut state, other_digest);
    assert!(refused.to_string().contains("another digest"), "{refused}");
    assert_eq!(view(&state).generation.epoch, PlacementEpoch(1));
    assert_eq!(*view(&state).placement, placement());
}

#[tokio::test(start_paused = true)]
async fn a_worker_of_another_cluster_does_not_replace_what_shards_hold() {
    let mut state = state();
    for index in 0..2 {
        join(&mut state, holding(shard(index, MemberState::Ready), &placement()));
    }
    let other = placed(50, 1, vec![vec![0, 1, 2]]);
    let (stray, _ended) = join(&mut state, holding(report("stray", Role::Both, MemberState::Ready), &other));
    let seen = view(&state);
    assert_eq!(seen.placement.layers(), placement().layers(), "nothing has moved");
    assert_eq!(seen.generation.epoch, PlacementEpoch(51), "and no number means two placements");
    // On its stream it can only have applied what it was told.
    let later = placed(60, 1, vec![vec![0, 1, 2]]);
    let refused =
        state.report(Instant::now(), stray, holding(report("stray", Role::Both, MemberState::Ready), &later));
    assert!(matches!(refused, Err(Refusal::Epoch { .. })), "{refused:?}");
    assert_eq!(view(&state).generation.epoch, PlacementEpoch(51));
}

#[tokio::test(start_paused = true)]
async fn a_worker_of_another_cluster_that_is_the_first_to_come_back_is_outvoted_by_shards() {
    let layout = Layout { shards: 2, redundant_slots: 1, min_copies: 1 };
    let layouts = Layouts::new(planner(), layout, Duration::from_secs(15));
    let mut state = State::new(generation(0), layouts, LEASE, Duration::from_secs(60));
    let other = placed(50, 1, vec![vec![0, 1, 2]]);
    join(&mut state, holding(report("stray", Role::Both, MemberState::Ready), &other));
    assert_eq!(view(&state).placement.num_shards(), 1, "it fills the gap");
    join(&mut state, holding(shard(0, MemberState::Ready), &placement()));
    let seen = view(&state);
    assert_eq!(seen.placement.layers(), placement().layers());
    assert_eq!(seen.generation.epoch, PlacementEpoch(51), "above what has meant something else");
    join(&mut state, holding(shard(1, MemberState::Ready), &placement()));
    assert_eq!(view(&state).generation.epoch, PlacementEpoch(51));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_the_operator_has_not_seen_yet_is_left_alone() {
    let mut state = state();
    join(&mut state, in_pod(shard(0, MemberState::Ready), "new"));
    assert!(state.operate(Instant::now(), &operator_view(2, &[("other", "a")])).is_empty());
    tokio::time::advance(pods::GRACE).await;
    assert_eq!(state.operate(Instant::now(), &operator_view(2, &[("other", "a")])).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn coverage_is_counted_over_routable_shards_and_their_domains() {
    let mut state = state();
    join(&mut state, in_pod(shard(0, MemberState::Ready), "s0"));
    join(&mut state, in_pod(shard(1, MemberState::Ready), "s1"));
    let now = Instant::now();
    state.operate(now, &operator_view(2, &[("s0", "zone"), ("!s1", "zone")]));
    let coverage = state.coverage();
    assert_eq!((coverage.experts, coverage.uncovered, coverage.at_risk), (3, 1, 0));
    assert_eq!(coverage.examples[0].expert, LogicalExpert(2), "only on shard 1, which is withdrawn");
    state.operate(now, &operator_view(2, &[("s0", "zone"), ("s1", "zone")]));
    assert_eq!(state.coverage().uncovered, 0);
}

async fn operate(coordinator: &Coordinator, view: OperatorView) -> Operating {
    let (reply, answer) = oneshot::channel();
    coordinator.commands.send(Command::Operate { view, reply }).await.unwrap();
    answer.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_operator_hears_at_once_and_then_twice_a_second_at_most() {
    let coordinator = coordinator();
    let start = Instant::now();
    let mut operating = operate(&coordinator, operator_view(2, &[])).await;
    assert_eq!(operating.statuses.borrow_and_update().members.len(), 0);
    for index in 0..3 {
        register(&coordinator, shard(index % 2, MemberState::Ready)).await;
        register(&coordinator, report(&format!("w{index}"), Role::Both, MemberState::Ready)).await;
    }
    operating.statuses.changed().await.unwrap();
    assert_eq!(start.elapsed(), STATUS_INTERVAL);
    let status = operating.statuses.borrow_and_update().clone();
    assert_eq!(status.members.len(), 5, "everything in one");
    assert!(!status.serving, "the router is not accepting in this test");
    assert_eq!(status.next, None);
    // Leases run out three seconds later; until then nothing changes and nothing is sent.
    operating.statuses.changed().await.unwrap();
    assert!(start.elapsed() >= LEASE);
}

#[tokio::test(start_paused = true)]
async fn a_newer_operator_replaces_the_older_and_views_of_the_older_are_ignored() {
    let coordinator = coordinator();
    let first = operate(&coordinator, operator_view(2, &[])).await;
    let mut second = operate(&coordinator, operator_view(2, &[])).await;
    let status = first.ended.await.unwrap();
    assert_eq!(status.code(), tonic::Code::Aborted);
    let stale = Command::OperatorView { stream: first.stream, view: operator_view(3, &[]) };
    coordinator.commands.send(stale).await.unwrap();
    coordinator.commands.send(Command::OperatorGone { stream: first.stream }).await.unwrap();
    let newer = Command::OperatorView { stream: second.stream, view: operator_view(1, &[]) };
    coordinator.commands.send(newer).await.unwrap();
    // The file does not count while an operator is there, and counts when it has left.
    let layout = |shards| Layout { shards, redundant_slots: 1, min_copies: 1 };
    coordinator.layout_file(layout(3)).await;
    second.statuses.changed().await.unwrap();
    let wanted = |status: &v1::CoordinatorStatus| status.next.as_ref().unwrap().layout.unwrap().shards;
    assert_eq!(wanted(&second.statuses.borrow_and_update()), 1);
    coordinator.commands.send(Command::OperatorGone { stream: second.stream }).await.unwrap();
    assert_eq!(coordinator.describe().await.unwrap()["next"]["layout"]["shards"], 1, "the last view stays");
    coordinator.layout_file(layout(3)).await;
    assert_eq!(coordinator.describe().await.unwrap()["next"]["layout"]["shards"], 3);
}

#[tokio::test(start_paused = true)]
async fn without_a_placement_members_wait_for_their_first_view() {
    let layout = Layout { shards: 2, redundant_slots: 1, min_copies: 1 };
    let layouts = Layouts::new(planner(), layout, Duration::from_secs(15));
    let state = State::new(generation(0), layouts, LEASE, Duration::from_secs(60));
    let metrics = RouterMetrics::register(&Metrics::new()).unwrap();
    let (coordinator, _owner) = Coordinator::spawn_over(state, Readiness::new(&[]), metrics, prover);
    let first = register(&coordinator, shard(0, MemberState::Starting)).await;
    assert!(first.views.borrow().is_none());
    let status = operate(&coordinator, operator_view(2, &[])).await.statuses.borrow().clone();
    assert_eq!(status.generation.as_ref().unwrap().epoch, 0);
    assert_eq!(status.next.as_ref().unwrap().waiting_for, "shard 1 has not registered");
    let second = register(&coordinator, shard(1, MemberState::Starting)).await;
    assert_eq!(second.views.borrow().as_ref().unwrap().view.placement.num_shards(), 2);
}
