//! A worker and expert shards in one process: the same text, two kinds of members, and both drained.

use cadre_e2e::{
    Cluster, golden, grpc, http,
    operator::{Operator, pod},
    process,
    role::RoleProcess,
    wait,
};
use cadre_proto::v1;

/// Long enough to be cut in the middle, and the same every time.
fn long() -> v1::GenerateRequest {
    let sampling = v1::SamplingOptions { temperature: Some(0.0), logprobs: Some(1), ..Default::default() };
    v1::GenerateRequest { sampling: Some(sampling), ..grpc::endless("What is a Pod?", 300) }
}

async fn tokens(cluster: &Cluster) -> Vec<v1::GeneratedToken> {
    let mut client = grpc::connect(&cluster.grpc()).await;
    client.generate(long()).await.expect("an answer").into_inner().tokens
}

async fn decode_rows(admin: &str) -> f64 {
    http::metric(admin, "cadre_worker_tokens_total", &["kind=\"decode\""]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_text_is_that_of_separate_processes_also_when_one_of_them_is_lost() {
    let expected = tokens(&Cluster::start(&["--experts=1", "--prefill=0", "--processes=separate"])).await;
    assert_eq!(expected.len(), 300);

    // Every expert on two shards: one of each in either process.
    let shared = ["--processes=shared", "--decode=2", "--experts=4", "--redundant-slots=32"];
    let cluster = Cluster::start(&shared);
    let processes =
        ["decode 0 with expert 0, 2", "decode 1 with expert 1, 3"].map(|name| cluster.member(name));
    assert_eq!(cluster.pids().len(), 4, "up, router and two processes");
    assert_eq!(tokens(&cluster).await, expected);

    // The worker that has the stream goes on when the other one's process dies, shards and all.
    let mut idle = Vec::new();
    for process in &processes {
        idle.push(decode_rows(&process.admin).await);
    }
    let mut client = grpc::connect(&cluster.grpc()).await;
    let mut chunks = client.generate_stream(long()).await.expect("a stream").into_inner();
    let mut streamed = chunks.message().await.expect("a chunk").expect("a chunk").tokens;
    let busy = wait::until_async("one of the workers decodes", || async {
        for (index, process) in processes.iter().enumerate() {
            if decode_rows(&process.admin).await > idle[index] {
                return Some(index);
            }
        }
        None
    })
    .await;
    process::signal(processes[1 - busy].pid, "KILL");
    while let Some(chunk) = chunks.message().await.expect("the other copies answer") {
        streamed.extend(chunk.tokens);
    }
    assert_eq!(streamed, expected, "same tokens, same logprobs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ctrl_c_drains_the_worker_before_the_shards_that_it_needs() {
    let mut cluster = Cluster::start(&["--processes=shared", "--experts=2"]);
    let mut client = grpc::connect(&cluster.grpc()).await;
    let mut chunks =
        client.generate_stream(grpc::endless("What is a Pod?", 100)).await.expect("a stream").into_inner();
    let mut tokens = chunks.message().await.expect("a chunk").map_or(0, |chunk| chunk.tokens.len());
    let ending = std::thread::spawn(move || {
        let status = cluster.interrupt();
        (cluster, status)
    });
    while let Some(chunk) = chunks.message().await.expect("the stream is not cut") {
        tokens += chunk.tokens.len();
    }
    assert_eq!(tokens, 100, "the request in flight finished");
    drop(client);
    let (cluster, status) =
        tokio::task::spawn_blocking(|| ending.join().expect("the thread")).await.expect("joined");
    assert!(status.success(), "{status}\n{}", cluster.log());
    assert_eq!(cluster.pids().len(), 3, "up, router and one process were seen");
    cluster.all_gone();
    assert!(!cluster.log().contains("killed"), "{}", cluster.log());
}

fn card(coordinator: &str, index: u16) -> RoleProcess {
    let (shard, name) = (index.to_string(), format!("card-{index}"));
    let uid = format!("uid-{name}");
    let args =
        ["--coordinator", coordinator, "--with-expert", &shard, "--pod-name", &name, "--pod-uid", &uid];
    RoleProcess::start("worker", &[&args[..], &["--role", "both", "--threads", "1"]].concat())
}

/// Roles of the members, and how many of them are routable.
fn members(status: &v1::CoordinatorStatus) -> (Vec<i32>, usize) {
    let roles = status.members.iter().filter_map(|member| Some(member.member.as_ref()?.role)).collect();
    (roles, status.members.iter().filter(|member| member.routable).count())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_with_both_is_two_members_that_are_planned_covered_and_drained_as_two() {
    let router = RoleProcess::start(
        "router",
        &[
            "--grpc=127.0.0.1:0",
            "--http=127.0.0.1:0",
            "--coordinator=127.0.0.1:0",
            "--admin=127.0.0.1:0",
            "--shards=2",
            "--redundant-slots=32",
        ],
    );
    let coordinator = router.address("coordinator").to_owned();
    let cards = [0, 1].map(|index| card(&coordinator, index));
    let layout = v1::Layout { shards: 2, redundant_slots: 32, min_copies: 2 };
    let pods = vec![pod("card-0", "node-a"), pod("card-1", "node-b")];
    let view = v1::OperatorView { layout: Some(layout), pods };
    let mut operator = Operator::open(&coordinator, view).await;
    let ready = operator
        .until("two workers and two shards are routable", |status| members(status).1 == 4 && status.serving)
        .await;
    let coverage = ready.coverage.clone().expect("coverage");
    assert_eq!((coverage.uncovered, coverage.at_risk), (0, 0), "{ready:?}");
    let of_pod = |status: &v1::CoordinatorStatus, name: &str| {
        let members = status.members.iter().filter_map(|member| member.member.clone());
        members.filter(|member| member.pod.as_ref().is_some_and(|pod| pod.name == name)).collect::<Vec<_>>()
    };
    let mut roles: Vec<_> = of_pod(&ready, "card-0").iter().map(v1::Member::role).collect();
    roles.sort_unstable_by_key(|role| *role as i32);
    assert_eq!(roles, [v1::Role::Both, v1::Role::Expert], "{ready:?}");
    let addresses: Vec<String> = of_pod(&ready, "card-0").into_iter().map(|member| member.address).collect();
    assert_ne!(addresses[0], addresses[1], "each has a port of its own");
    let answer = http::get(cards[0].address("admin"), "/readyz").await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let metrics = http::get(cards[0].address("admin"), "/metrics").await.body;
    for name in ["cadre_worker_tokens_total", "cadre_expert_frames_total", "cadre_device_memory_total_bytes"]
    {
        assert!(metrics.contains(name), "{name} not in\n{metrics}");
    }
    let mut client = grpc::connect(router.address("grpc")).await;
    let answer = client.generate(grpc::chat(&golden::pod().prompt)).await.expect("an answer").into_inner();
    assert_eq!(answer.text, golden::pod().greedy_text);

    // The worker goes first, and its shard after it; with the other pod's copies everything stays covered.
    let [leaving, mut staying] = cards;
    leaving.signal("TERM");
    let alone = operator
        .until("both members of the pod have left", |status| of_pod(status, "card-0").is_empty())
        .await;
    // Half a second apart, which may be too short for two statuses.
    let log = router.log();
    let left = |id: &str| log.find(&format!("member left id={id}")).unwrap_or_else(|| panic!("{id}:\n{log}"));
    let ids: Vec<String> = of_pod(&ready, "card-0").into_iter().map(|member| member.id).collect();
    let shard = ids.iter().find(|id| id.starts_with("shard-")).expect("a shard");
    let worker = ids.iter().find(|id| id.starts_with("both-")).expect("a worker");
    assert!(left(worker) < left(shard), "the worker first:\n{log}");
    let coverage = alone.coverage.clone().expect("coverage");
    assert_eq!(coverage.uncovered, 0, "{alone:?}");
    assert!(coverage.at_risk > 0, "one copy where two are asked for: {alone:?}");
    let again = client.generate(grpc::chat(&golden::pod().prompt)).await.expect("an answer").into_inner();
    assert_eq!(again.text, golden::pod().greedy_text);
    staying.signal("TERM");
    assert!(staying.wait().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_cannot_start_ends_the_process_with_its_reason() {
    let router = RoleProcess::start(
        "router",
        &[
            "--grpc=127.0.0.1:0",
            "--http=127.0.0.1:0",
            "--coordinator=127.0.0.1:0",
            "--admin=127.0.0.1:0",
            "--shards=1",
        ],
    );
    let holder = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = holder.local_addr().expect("bound").to_string();
    let args = ["--coordinator", router.address("coordinator"), "--with-expert=0", "--expert-listen", &taken];
    let mut process = RoleProcess::spawn("worker", &args, &[]);
    let status = process.wait();
    drop(holder);
    assert!(!status.success());
    let message = process.termination_message().expect("a termination message");
    assert!(message.contains("expert 0") && message.contains(&taken), "{message}");
}
