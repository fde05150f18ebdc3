//! The layout changes under load: processes started by flags, as pods are, and an operator that asks.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use cadre_e2e::{
    golden, grpc, http,
    operator::{Operator, pod},
    role::RoleProcess,
    wait,
};
use cadre_proto::v1;
use tokio::task::JoinHandle;

const ANY: &str = "127.0.0.1:0";

/// A router whose addresses are chosen once, so that it can be restarted.
fn router(addresses: &[String; 4], args: &[&str]) -> RoleProcess {
    let [grpc, http, coordinator, admin] = addresses;
    let fixed = [
        "--grpc",
        grpc,
        "--http",
        http,
        "--coordinator",
        coordinator,
        "--admin",
        admin,
        "--max-concurrent",
        "16",
    ];
    RoleProcess::start("router", &[&fixed, args].concat())
}

fn any_addresses() -> [String; 4] {
    [ANY, ANY, ANY, ANY].map(str::to_owned)
}

fn expert(coordinator: &str, shard: u16) -> RoleProcess {
    expert_in(coordinator, shard, &format!("expert-{shard}"))
}

fn expert_in(coordinator: &str, shard: u16, name: &str) -> RoleProcess {
    let index = shard.to_string();
    let uid = format!("uid-{name}");
    let args = ["--coordinator", coordinator, "--shard", &index, "--pod-name", name, "--pod-uid", &uid];
    RoleProcess::start("expert", &[&args[..], &["--threads", "1"]].concat())
}

fn worker(coordinator: &str, role: &str) -> RoleProcess {
    let uid = format!("uid-{role}");
    let args = ["--coordinator", coordinator, "--role", role, "--pod-name", role, "--pod-uid", &uid];
    RoleProcess::start("worker", &[&args[..], &["--threads", "1"]].concat())
}

/// Workers and eight possible shards, two nodes.
fn view(shards: u32, pods: u16) -> v1::OperatorView {
    let experts =
        (0..pods).map(|shard| pod(&format!("expert-{shard}"), ["node-a", "node-b"][usize::from(shard % 2)]));
    let workers = ["prefill", "decode"].map(|role| pod(role, "node-a"));
    let layout = v1::Layout { shards, redundant_slots: 32, min_copies: 2 };
    v1::OperatorView { layout: Some(layout), pods: experts.chain(workers).collect() }
}

/// Clients that ask without a pause and compare every answer.
struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(router: &str, clients: usize, expected: &grpc::Streamed) -> Self {
        let (stop, answers) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let client = |_| {
            let (stop, answers, expected) = (stop.clone(), answers.clone(), expected.clone());
            let router = router.to_owned();
            tokio::spawn(async move {
                let mut client = grpc::connect(&router).await;
                let mut failures = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    match grpc::stream(&mut client, request()).await {
                        Ok(answer) if answer == expected => {}
                        Ok(answer) => failures.push(format!("other text: {:?}", answer.text)),
                        Err(status) => failures.push(status.to_string()),
                    }
                    answers.fetch_add(1, Ordering::Relaxed);
                }
                failures
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { stop, answers, clients }
    }

    /// Waits until so many more answers have come.
    async fn more(&self, answers: usize) {
        let wanted = self.answers.load(Ordering::Relaxed) + answers;
        let enough = || async { (self.answers.load(Ordering::Relaxed) >= wanted).then_some(()) };
        wait::until_async("answers come", enough).await;
    }

    async fn end(mut self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let mut failures = Vec::new();
        for client in std::mem::take(&mut self.clients) {
            failures.extend(client.await.expect("a client"));
        }
        (self.answers.load(Ordering::Relaxed), failures)
    }
}

impl Drop for Load {
    /// A test that fails must not leave its clients asking a router that is gone.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn request() -> v1::GenerateRequest {
    v1::GenerateRequest { max_tokens: Some(64), ..grpc::chat(&golden::pod().prompt) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_are_scaled_up_and_down_under_load_without_a_failed_request() {
    let router = router(&any_addresses(), &["--shards", "4", "--redundant-slots", "32"]);
    let coordinator = router.address("coordinator").to_owned();
    let mut experts: Vec<RoleProcess> = (0..4).map(|shard| expert(&coordinator, shard)).collect();
    let _workers = ["prefill", "decode"].map(|role| worker(&coordinator, role));
    let mut operator = Operator::open(&coordinator, view(4, 4)).await;
    let ready = operator
        .until("everything is routable", |status| {
            status.members.len() == 6 && status.members.iter().all(|member| member.routable) && status.serving
        })
        .await;
    let coverage = ready.coverage.expect("coverage");
    // The MTP layer's experts have no slots while nothing drafts.
    assert_eq!((coverage.experts, coverage.uncovered), (5 * 32, 0));
    assert_eq!(ready.generation.expect("a stamp").epoch, 1);

    let mut client = grpc::connect(router.address("grpc")).await;
    let expected = grpc::stream(&mut client, request()).await.expect("an answer");
    assert!(golden::pod().greedy_text.starts_with(&expected.text), "{}", expected.text);
    let load = Load::start(router.address("grpc"), 16, &expected);
    load.more(16).await;

    // Up: the layout is asked for, the pods come.
    operator.tell(view(8, 4)).await;
    operator
        .until("the new shards are waited for", |status| {
            status
                .next
                .as_ref()
                .is_some_and(|next| next.waiting_for == "shards 4, 5, 6, 7 have not registered")
        })
        .await;
    experts.extend((4..8).map(|shard| expert(&coordinator, shard)));
    operator.tell(view(8, 8)).await;
    let up = operator.settled(8).await;
    assert_eq!(up.generation.expect("a stamp").epoch, 2);
    assert_eq!(up.members.iter().filter(|member| member.routable).count(), 10);
    let coverage = up.coverage.expect("coverage");
    assert_eq!((coverage.uncovered, coverage.at_risk), (0, 0), "copies lie on both nodes: {coverage:?}");
    load.more(32).await;

    // Down: only when nothing is on its way any more may the pods go.
    operator.tell(view(4, 8)).await;
    let down = operator.settled(4).await;
    assert_eq!(down.generation.expect("a stamp").epoch, 3);
    let routable = |member: &&v1::MemberStatus| {
        member.routable && member.member.as_ref().is_some_and(|m| m.role() == v1::Role::Expert)
    };
    assert_eq!(down.members.iter().filter(routable).count(), 4, "the others have nothing to do");
    for mut gone in experts.drain(4..) {
        gone.signal("TERM");
        assert!(gone.wait().success(), "{}", gone.log());
    }
    operator.tell(view(4, 4)).await;
    load.more(32).await;

    // And once more in a hurry, with new pods (a pod that is gone never comes back): the newest wins.
    let names: Vec<String> = (4..8).map(|shard| format!("expert-{shard}-again")).collect();
    experts.extend((4..).zip(&names).map(|(shard, name)| expert_in(&coordinator, shard, name)));
    for shards in [5, 8, 6] {
        let mut view = view(shards, 4);
        view.pods.extend(names.iter().map(|name| pod(name, "node-b")));
        operator.tell(view).await;
    }
    operator.settled(6).await;
    load.more(32).await;
    let (answers, failures) = load.end().await;
    assert!(failures.is_empty(), "{} of {answers} requests failed: {failures:?}", failures.len());
    println!("{answers} requests under 4 → 8 → 4 → 6 shards, none failed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_router_takes_the_placement_over_and_moves_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("layout.json");
    let write = |redundant: u32, copies: u32| {
        let layout = format!("{{\"shards\": 2, \"redundantSlots\": {redundant}, \"minCopies\": {copies}}}");
        std::fs::write(&file, layout).expect("the layout file");
    };
    write(32, 2);
    let path = file.to_str().expect("UTF-8");
    let args = ["--layout-file", path, "--placement-wait", "60", "--routed-experts", "32"];
    let first = router(&any_addresses(), &args);
    let addresses = ["grpc", "http", "coordinator", "admin"].map(|name| first.address(name).to_owned());
    let coordinator = first.address("coordinator").to_owned();
    let mut experts: Vec<RoleProcess> = (0..2).map(|shard| expert(&coordinator, shard)).collect();
    let _worker = worker(&coordinator, "both");
    let pods = |shards: u32| {
        let mut view = view(shards, 3);
        view.pods.push(pod("both", "node-a"));
        view
    };
    let mut operator = Operator::open(&coordinator, pods(2)).await;
    operator.settled(2).await;
    // Two changes, so that the placement in force is none that a plan from nothing would begin with.
    experts.push(expert(&coordinator, 2));
    operator.tell(pods(3)).await;
    operator.settled(3).await;
    let before = operator
        .until("the worker is ready", |status| {
            status.members.len() == 4 && status.members.iter().all(|m| m.routable)
        })
        .await;
    let epoch = before.generation.expect("a stamp").epoch;
    assert_eq!(epoch, 2);
    let expected = grpc::stream(&mut grpc::connect(&addresses[0]).await, request()).await.expect("an answer");
    drop(operator);
    drop(first);

    // The file still says 2, as a ConfigMap may for a while: what the members have is in force at first.
    let second = router(&addresses, &args);
    let mut operator = Operator::open(&coordinator, pods(3)).await;
    let after = operator.settled(3).await;
    assert_eq!(after.generation.expect("a stamp").epoch, epoch, "nothing has moved");
    operator
        .until("everybody is back", |status| {
            status.members.len() == 4 && status.members.iter().all(|m| m.routable)
        })
        .await;
    let answer = grpc::stream(&mut grpc::connect(&addresses[0]).await, request()).await.expect("an answer");
    assert_eq!(answer, expected);

    // Without an operator the file counts.
    drop(operator);
    write(8, 1);
    let changed = || async {
        let cluster = http::get(&addresses[3], "/cluster").await.json();
        (cluster["layout"]["shards"] == 2 && cluster["next"].is_null()).then_some(())
    };
    wait::until_async("the file's layout is in force", changed).await;
    drop(second);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_another_generation_says_why_it_ends_and_the_router_goes_on() {
    let router = router(&any_addresses(), &["--shards", "1"]);
    let coordinator = router.address("coordinator").to_owned();
    let args = ["--coordinator", &coordinator, "--numerics", "fp8"];
    let env = [("CADRE_SHARD", "0"), ("CADRE_ADVERTISE", "127.0.0.1:9")];
    let mut other = RoleProcess::spawn("expert", &args, &env);
    assert!(!other.wait().success());
    let message = other.termination_message().expect("a termination message");
    assert!(message.starts_with("CheckpointMismatch: expert 0: ") && message.contains("fp8"), "{message}");
    let refused =
        http::metric(router.address("admin"), "cadre_router_members_refused_total", &["generation"]).await;
    assert_eq!(refused, 1.0);

    let mut wrong = RoleProcess::spawn(
        "router",
        &["--routed-experts", "256", "--grpc", ANY, "--http", ANY, "--coordinator", ANY, "--admin", ANY],
        &[],
    );
    assert!(!wrong.wait().success());
    let message = wrong.termination_message().expect("a termination message");
    assert!(message.starts_with("CheckpointMismatch: router: "), "{message}");
    assert!(message.contains("has 32 routed experts") && message.contains("256 were asked for"), "{message}");

    let mut usage = RoleProcess::spawn("expert", &["--shard", "many"], &[]);
    assert!(!usage.wait().success());
    let message = usage.termination_message().expect("a termination message");
    assert!(message.starts_with("InvalidConfiguration: ") && message.contains("--shard"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_runs_over_ipv6() {
    const ANY: &str = "[::1]:0";
    let folder = tempfile::tempdir().expect("a temporary folder");
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "0123456789abcdef0123456789abcdef\n").expect("the secret");
    let shared = ["--admin", ANY, "--cluster-secret-file", secret.to_str().expect("UTF-8")];
    let router_args = ["--shards", "1", "--grpc", ANY, "--http", ANY, "--coordinator", ANY];
    let router = RoleProcess::start("router", &[&shared[..], &router_args].concat());
    let coordinator = router.address("coordinator").to_owned();
    assert!(coordinator.starts_with("[::1]:"), "{coordinator}");
    let member = ["--coordinator", &coordinator, "--threads", "1"];
    // The shard listens everywhere and says its pod's address, as pods do.
    let everywhere = ["--listen", "[::]:0", "--pod-ip", "::1", "--shard", "0"];
    let _expert = RoleProcess::start("expert", &[&shared[..], &member, &everywhere].concat());
    let worker = |role, more: &[&str]| {
        let args = ["--role", role, "--listen", ANY];
        RoleProcess::start("worker", &[&shared[..], &member, &args, more].concat())
    };
    let _workers = [worker("prefill", &[]), worker("decode", &[])];
    let text = wait::until_async("an answer comes", || async {
        let mut client = grpc::connect(router.address("grpc")).await;
        client.generate(grpc::chat(&golden::pod().prompt)).await.ok().map(|answer| answer.into_inner().text)
    })
    .await;
    assert_eq!(text, golden::pod().greedy_text);
    let cluster = http::get(router.address("admin"), "/cluster").await.json();
    let addresses: Vec<&str> = cluster["members"]
        .as_array()
        .expect("members")
        .iter()
        .filter_map(|member| member["address"].as_str())
        .collect();
    assert!(addresses.len() == 3 && addresses.iter().all(|at| at.starts_with("[::1]:")), "{addresses:?}");

    for (advertise, words) in
        [("fd00::5:7", "[address]:port"), ("http://a:7", "neither"), ("a", "port is missing")]
    {
        let args = [&shared[..], &member, &["--shard", "0", "--advertise", advertise]].concat();
        let mut refused = RoleProcess::spawn("expert", &args, &[]);
        assert!(!refused.wait().success());
        let message = refused.termination_message().expect("a termination message");
        assert!(message.starts_with("InvalidConfiguration: ") && message.contains(words), "{message}");
    }
}
