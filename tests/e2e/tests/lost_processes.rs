//! Shards and workers that die or hang while requests run.

use cadre_e2e::{Cluster, cluster::Member, golden, grpc, http, process, wait};
use cadre_proto::v1;
use tonic::Code;

/// Long enough to be cut in the middle, and the same every time.
fn long() -> v1::GenerateRequest {
    v1::GenerateRequest {
        sampling: Some(v1::SamplingOptions {
            temperature: Some(0.0),
            logprobs: Some(1),
            ..Default::default()
        }),
        ..grpc::endless("What is a Pod?", 400)
    }
}

/// Streams [`long`], does `harm` after the tenth token, and returns everything.
async fn harmed(
    cluster: &Cluster,
    harm: impl FnOnce() + Send,
) -> Result<Vec<v1::GeneratedToken>, tonic::Status> {
    let mut client = grpc::connect(&cluster.grpc()).await;
    let mut chunks = client.generate_stream(long()).await?.into_inner();
    let mut tokens = Vec::new();
    let mut harm = Some(harm);
    while let Some(chunk) = chunks.message().await? {
        tokens.extend(chunk.tokens);
        if tokens.len() >= 10
            && let Some(harm) = harm.take()
        {
            harm();
        }
    }
    assert!(harm.is_none(), "the stream ended before the harm was done");
    Ok(tokens)
}

async fn unharmed(cluster: &Cluster) -> Vec<v1::GeneratedToken> {
    let mut client = grpc::connect(&cluster.grpc()).await;
    let tokens = client.generate(long()).await.expect("an answer").into_inner().tokens;
    assert_eq!(tokens.len(), 400);
    tokens
}

/// Waits until the coordinator has every process ready again.
async fn recovered(cluster: &Cluster, name: &str, before: &Member) {
    let now = cluster.restarted(name, before);
    wait::until_async(&format!("{name} is ready again"), || async {
        http::send("GET", &now.admin, "/readyz", "").await.ok().filter(|answer| answer.status == 200)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_copies_nobody_notices_a_lost_shard() {
    // Two shards, every expert on both. A hung shard is given up after a second instead of five.
    let cluster =
        Cluster::start(&["--experts=2", "--redundant-slots=32", "--worker-arg=--dispatch-timeout=1"]);
    let expected = unharmed(&cluster).await;
    let decode = cluster.member("decode 0").admin;

    let victim = cluster.member("expert 1");
    let tokens = harmed(&cluster, || process::signal(victim.pid, "KILL")).await.expect("no error");
    assert_eq!(tokens, expected, "killed: same tokens, same logprobs");
    wait::until_async("the failure is counted", || async {
        (http::metric(&decode, "cadre_dispatch_failures_total", &[]).await >= 1.0).then_some(())
    })
    .await;
    let ended = cluster.ended("expert 1");
    assert!(ended["status"].as_str().is_some_and(|status| status.contains("signal: 9")), "{ended}");
    recovered(&cluster, "expert 1", &victim).await;

    // A shard that neither answers nor closes its connections.
    let victim = cluster.member("expert 0");
    let tokens = harmed(&cluster, || process::signal(victim.pid, "STOP")).await.expect("no error");
    assert_eq!(tokens, expected, "hung: same tokens, same logprobs");
    process::signal(victim.pid, "CONT");
    assert_eq!(unharmed(&cluster).await, expected, "and back again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_copies_sequences_wait_for_the_restarted_shard() {
    let cluster = Cluster::start(&["--experts=3"]);
    let expected = unharmed(&cluster).await;
    let victim = cluster.member("expert 2");
    let tokens = harmed(&cluster, || process::signal(victim.pid, "KILL")).await.expect("it waited");
    assert_eq!(tokens, expected);
    recovered(&cluster, "expert 2", &victim).await;
    assert!(cluster.log().contains("expert 2 ended"), "{}", cluster.log());
    assert!(cluster.log().contains("expert 2 runs again"), "{}", cluster.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_copies_and_without_a_shard_the_layer_and_the_expert_are_named() {
    let cluster = Cluster::start(&[
        "--experts=2",
        "--prefill=0",
        "--worker-arg=--uncovered-timeout=1",
        "--worker-arg=--dispatch-timeout=1",
    ]);
    let expected = unharmed(&cluster).await;
    // It hangs, and for less time than a hung process is restarted after.
    let victim = cluster.member("expert 1");
    let status = harmed(&cluster, || process::signal(victim.pid, "STOP")).await.expect_err("no copy");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    for word in ["layer", "expert", "epoch"] {
        assert!(status.message().contains(word), "{word}: {status}");
    }
    process::signal(victim.pid, "CONT");
    let again = wait::until_async("the shard is used again", || async {
        let mut client = grpc::connect(&cluster.grpc()).await;
        client.generate(long()).await.ok().map(|answer| answer.into_inner().tokens)
    })
    .await;
    assert_eq!(again, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_process_is_restarted_and_requests_are_refused_meanwhile() {
    let cluster = Cluster::start(&["--experts=2", "--prefill=0"]);
    let expected = unharmed(&cluster).await;
    let victim = cluster.signal("expert 1", "STOP");
    let refused = wait::until_async("requests that cannot run are refused", || async {
        let mut client = grpc::connect(&cluster.grpc()).await;
        let mut request = tonic::Request::new(grpc::endless("What is a Pod?", 1));
        request.set_timeout(std::time::Duration::from_secs(1));
        client.generate(request).await.err().filter(|status| status.code() == Code::Unavailable)
    })
    .await;
    assert!(refused.message().contains("has no ready copy"), "{refused}");
    recovered(&cluster, "expert 1", &victim).await;
    let ended = cluster.ended("expert 1");
    assert!(ended["status"].as_str().is_some_and(|status| status.contains("hung: 4 times")), "{ended}");
    let again = wait::until_async("requests are served again", || async {
        let mut client = grpc::connect(&cluster.grpc()).await;
        client.generate(long()).await.ok().map(|answer| answer.into_inner().tokens)
    })
    .await;
    assert_eq!(again, expected);
}

async fn decode_rows(admin: &str) -> f64 {
    http::metric(admin, "cadre_worker_tokens_total", &["kind=\"decode\""]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_decode_worker_ends_its_requests_with_its_name_and_no_others() {
    let cluster = Cluster::start(&["--decode=2", "--experts=1"]);
    let expected = unharmed(&cluster).await;
    let victim = cluster.member("decode 0");
    let admins = [victim.admin.clone(), cluster.member("decode 1").admin];
    let mut idle = Vec::new();
    for admin in &admins {
        idle.push(decode_rows(admin).await);
    }
    // Enough streams that both workers have some; which worker has which is the router's business.
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let mut client = grpc::connect(&cluster.grpc()).await;
        tasks.push(tokio::spawn(async move { grpc::stream(&mut client, long()).await }));
    }
    // A request that has no token yet is tried again on the other worker, so both have to be past their first.
    for (admin, idle) in admins.iter().zip(idle) {
        wait::until_async(&format!("the worker at {admin} decodes"), || async {
            (decode_rows(admin).await > idle).then_some(())
        })
        .await;
    }
    process::signal(victim.pid, "KILL");
    let (mut whole, mut broken) = (0, 0);
    for task in tasks {
        match task.await.expect("the task") {
            Ok(streamed) => {
                assert_eq!(streamed.tokens, expected, "the rest is unharmed");
                whole += 1;
            }
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status}");
                assert!(status.message().contains("decode"), "{status}");
                broken += 1;
            }
        }
    }
    assert!(whole >= 1 && broken >= 1, "{whole} whole, {broken} broken");
    assert_eq!(unharmed(&cluster).await, expected, "new requests are served");
    recovered(&cluster, "decode 0", &victim).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_router_finds_its_members_again() {
    let cluster = Cluster::start(&["--experts=2"]);
    let (grpc_address, victim) = (cluster.grpc(), cluster.member("router"));
    process::signal(victim.pid, "KILL");
    let now = cluster.restarted("router", &victim);
    assert_eq!(now.grpc, grpc_address, "clients know its address");
    let text = wait::until_async("requests are answered again", || async {
        let mut client =
            v1::inference_client::InferenceClient::connect(format!("http://{grpc_address}")).await.ok()?;
        let answer = client.generate(grpc::chat(&golden::pod().prompt)).await.ok()?;
        Some(answer.into_inner().text)
    })
    .await;
    assert_eq!(text, golden::pod().greedy_text);
}
