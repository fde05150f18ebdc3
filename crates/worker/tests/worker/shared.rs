//! A worker and shards in one process against a coordinator that the test plays.
//!
//! On a GPU: `CADRE_TEST_DEVICE=cuda:0 CADRE_TEST_NUMERICS=cuda-fp8 CADRE_TEST_MODEL=DIR worker shared::`.

use std::{path::PathBuf, sync::Arc};

use cadre_checkpoint::Checkpoint;
use cadre_device::Device;
use cadre_expert::ExpertOptions;
use cadre_placement::{ExpertLoad, plan_initial};
use cadre_proto::v1;
use cadre_types::{ClusterView, Generation, Layout, NumericsClass, PlacementEpoch, ShardIndex};
use cadre_worker::{WorkerOptions, WorkerRole, run_with_experts, with_experts::SharedAddresses};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt;
use tonic::Status;

use crate::{
    process::{Session, client, coordinate, fetch, wait_ready},
    support::{pocket, prompt, request},
};

#[allow(clippy::disallowed_methods, reason = "which device a test runs on is its runner's to say")]
fn told(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn model() -> PathBuf {
    told("CADRE_TEST_MODEL").map_or_else(pocket, PathBuf::from)
}

fn device() -> Device {
    told("CADRE_TEST_DEVICE").map_or(Device::Cpu, |device| device.parse().unwrap())
}

fn class() -> NumericsClass {
    told("CADRE_TEST_NUMERICS").map_or(NumericsClass::Bf16, |class| class.parse().unwrap())
}

/// Two shards with every expert on both, at the addresses of the process.
fn view(addresses: &SharedAddresses) -> v1::ClusterView {
    let checkpoint = Checkpoint::open(model()).unwrap();
    let config = checkpoint.config();
    let load = ExpertLoad::uniform(config.served_moe_layers(), config.n_routed_experts).unwrap();
    let redundant_slots = config.n_routed_experts;
    let layout = Layout { shards: 2, redundant_slots: redundant_slots as u32, min_copies: 2 };
    let placement = plan_initial(&load, config.n_routed_experts, layout, &[], PlacementEpoch(1)).unwrap();
    let generation =
        Generation { model: checkpoint.model_hash(), numerics: class(), epoch: placement.epoch() };
    let members = addresses.experts.iter().map(|expert| cadre_types::Member {
        id: cadre_types::MemberId(format!("shard-{}", expert.shard.0)),
        role: cadre_types::Role::Expert(expert.shard),
        address: expert.grpc.to_string(),
        state: cadre_types::MemberState::Ready,
        pod: None,
    });
    (&ClusterView::settled(generation, Arc::new(placement), members.collect())).into()
}

/// The next member that joins: its role, its shard, and its session.
async fn join(sessions: &mut mpsc::Receiver<Session>) -> (v1::Role, u32, Session) {
    let mut session = sessions.recv().await.unwrap();
    let member = session.report(v1::MemberState::Starting).await.member.unwrap();
    (member.role(), member.shard, session)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_shard_thread_does_not_show_and_is_started_again_and_the_worker_drains_first() {
    let (coordinator, mut sessions) = coordinate(None).await;
    let worker = WorkerOptions {
        threads: std::num::NonZeroUsize::new(1),
        device: Some(device()),
        numerics: class(),
        kv_bytes: 8 << 20,
        ..WorkerOptions::new(model(), WorkerRole::Both, coordinator.to_string())
    };
    let expert = |shard| ExpertOptions {
        numerics: class(),
        ..ExpertOptions::new(model(), ShardIndex(shard), coordinator.to_string())
    };
    let (bound, addresses) = oneshot::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let process = tokio::spawn(run_with_experts(worker, vec![expert(0), expert(1)], bound, async move {
        let _ = stopped.await;
    }));
    let mut addresses = addresses.await.unwrap();
    let (mut of_worker, mut of_shards) = (None, [None, None]);
    for _ in 0..3 {
        match join(&mut sessions).await {
            (v1::Role::Expert, shard, session) => of_shards[shard as usize] = Some(session),
            (_, _, session) => of_worker = Some(session),
        }
    }
    let (mut of_worker, [Some(of_first), Some(mut of_second)]) = (of_worker.unwrap(), of_shards) else {
        panic!("three members join")
    };
    let (status, body) = fetch(addresses.admin, "/readyz").await;
    assert_eq!(status, 503);
    for condition in ["worker: placement", "expert 0: placement", "expert 1: placement"] {
        assert!(body.contains(condition), "{condition}: {body}");
    }
    let told = view(&addresses);
    for session in [&of_worker, &of_first, &of_second] {
        session.views.send(Ok(told.clone())).await.unwrap();
    }
    of_worker.report(v1::MemberState::Ready).await;
    wait_ready(addresses.admin).await;

    let wanted = request("wanted", prompt(1, 30), 200);
    let call = v1::DecodeRequest {
        generation: told.generation.clone(),
        request_id: wanted.request_id.clone(),
        prompt: wanted.prompt.clone(),
        sampling: Some((&wanted.sampling).into()),
        max_tokens: 200,
        prefill: v1::PrefillMode::Local.into(),
        ..Default::default()
    };
    let generate = async |harm: Option<Session>| {
        let mut harm = harm;
        let mut stream = client(addresses.grpc).decode(call.clone()).await.unwrap().into_inner();
        let mut tokens = Vec::new();
        while let Some(event) = stream.next().await {
            if let Some(v1::decode_event::Event::Token(token)) = event.unwrap().event {
                tokens.push((token.position, token.token, token.logprob));
            }
            if tokens.len() >= 10
                && let Some(session) = harm.take()
            {
                // Nothing that a shard can live with.
                let refused = Status::failed_precondition("the test takes it out");
                session.views.send(Err(refused)).await.unwrap();
            }
        }
        tokens
    };
    let expected = generate(None).await;
    assert_eq!(expected.len(), 200);
    // Frames went from thread to thread, not through sockets: both shards computed.
    let (_, metrics) = fetch(addresses.admin, "/metrics").await;
    assert!(!metrics.contains("cadre_expert_frames_total{outcome=\"computed\"} 0"), "{metrics}");

    assert_eq!(generate(Some(of_first)).await, expected, "same tokens, same logprobs");
    // The shard that ended comes again, a member of its own, at the address that it had.
    let (role, shard, mut of_first) = join(&mut sessions).await;
    assert_eq!((role, shard), (v1::Role::Expert, 0));
    let (status, body) = fetch(addresses.admin, "/readyz").await;
    assert!(status == 503 && body.contains("expert 0: "), "{status} {body}");
    of_first.views.send(Ok(told.clone())).await.unwrap();
    let again = of_first.report(v1::MemberState::Ready).await.member.unwrap();
    assert_eq!(again.address, addresses.experts.remove(0).grpc.to_string());
    wait_ready(addresses.admin).await;
    assert_eq!(generate(None).await, expected);

    // Told to stop, the worker leaves before any shard says that it drains.
    stop.send(()).unwrap();
    of_worker.report(v1::MemberState::Draining).await;
    let worker_left = async { while of_worker.reports.next().await.is_some_and(|report| report.is_ok()) {} };
    tokio::select! {
        biased;
        () = worker_left => {}
        _ = of_first.report(v1::MemberState::Draining) => panic!("shard 0 drained before the worker had left"),
        _ = of_second.report(v1::MemberState::Draining) => panic!("shard 1 drained before the worker had left"),
    }
    process.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_is_refused_at_the_start_ends_the_process_with_the_reason() {
    let (coordinator, _sessions) = coordinate(Some("numerics class bf16 is not ours (cuda-fp8)")).await;
    let worker = WorkerOptions {
        threads: std::num::NonZeroUsize::new(1),
        device: Some(device()),
        kv_bytes: 8 << 20,
        ..WorkerOptions::new(model(), WorkerRole::Decode, coordinator.to_string())
    };
    let expert = ExpertOptions::new(model(), ShardIndex(0), coordinator.to_string());
    let (bound, _addresses) = oneshot::channel();
    let error = run_with_experts(worker, vec![expert], bound, std::future::pending()).await.unwrap_err();
    assert!(format!("{error:#}").contains("numerics class bf16 is not ours"), "{error:#}");
}
