//! Bit-identical tokens and log-probabilities, whatever the layout.

use std::sync::Arc;

use cadre_dispatch::{DispatchConfig, Dispatcher, GrpcConnector, IoThread};
use cadre_engine::{Engine, EngineParts, GeneratedToken};
use cadre_model::{LoadOptions, Model};
use cadre_ops_cpu::{CpuBackend, CpuOptions, Isa};
use cadre_scheduler::SchedulerConfig;
use cadre_types::{NumericsClass, SamplingParams, ShardIndex};
use cadre_worker::inprocess::InProcessOptions;

use crate::support::{Experts, generate, golden, open, pocket, prompt, request, small, tokens, wait_empty};

/// What every layout is asked: a short prompt, one of several pages, and the company of each other.
async fn answers(engine: &cadre_engine::EngineHandle) -> Vec<Vec<GeneratedToken>> {
    let submitted = [(1, 9, 24), (2, 130, 12), (3, 64, 8)].map(|(seed, length, most)| {
        engine.submit(request(&format!("request-{seed}"), prompt(seed, length), most)).unwrap()
    });
    let mut answers = Vec::new();
    for events in submitted {
        answers.push(tokens(events).await);
    }
    answers
}

#[tokio::test]
async fn one_two_four_and_seven_shards_with_and_without_copies() {
    for class in NumericsClass::ALL {
        let reference = answers(&open(&small(class)).handle()).await;
        for (shards, redundant_slots) in [(2, 0), (4, 0), (7, 0), (2, 32), (4, 9), (7, 32)] {
            let engine = open(&InProcessOptions { shards, redundant_slots, ..small(class) });
            let answers = answers(&engine.handle()).await;
            assert_eq!(answers, reference, "{class}, {shards} shards, {redundant_slots} redundant slots");
        }
    }
}

#[tokio::test]
async fn every_instruction_set_and_thread_count() {
    for class in NumericsClass::ALL {
        let reference = answers(&open(&small(class)).handle()).await;
        for isa in Isa::ALL {
            if !isa.available() {
                eprintln!("NOT TESTED: this machine has no {isa}");
                continue;
            }
            let options = InProcessOptions { isa: Some(isa), threads: Some(2), ..small(class) };
            assert_eq!(answers(&open(&options).handle()).await, reference, "{class} on {isa}");
        }
    }
}

#[tokio::test]
async fn alone_among_31_others_and_in_small_chunks() {
    let class = NumericsClass::Bf16;
    let engine = open(&small(class));
    let handle = engine.handle();
    let wanted = || request("wanted", prompt(5, 71), 16);
    let alone = generate(&handle, wanted()).await;
    let others: Vec<_> = (0..31)
        .map(|other| {
            let (length, most) = (1 + other * 5 % 90, 1 + other % 20);
            let request = request(&format!("other-{other}"), prompt(100 + other, length), most);
            handle.submit(request).unwrap()
        })
        .collect();
    assert_eq!(generate(&handle, wanted()).await, alone);
    for events in others {
        tokens(events).await;
    }
    wait_empty(&handle).await;
    for max_chunk_tokens in [1, 33] {
        let scheduler = SchedulerConfig { max_chunk_tokens, ..SchedulerConfig::with_pages(160) };
        let engine = open(&InProcessOptions { scheduler: Some(scheduler), ..small(class) });
        assert_eq!(generate(&engine.handle(), wanted()).await, alone, "chunks of {max_chunk_tokens}");
    }
}

#[tokio::test]
async fn a_shard_lost_on_the_way_changes_nothing() {
    let options = InProcessOptions { shards: 4, redundant_slots: 32, ..small(NumericsClass::Bf16) };
    let engine = open(&options);
    let handle = engine.handle();
    let wanted = || request("wanted", prompt(8, 40), 40);
    let whole = generate(&handle, wanted()).await;
    let mut events = handle.submit(wanted()).unwrap();
    let mut lost = Vec::new();
    while lost.len() < 3 {
        if let Some(cadre_engine::EngineEvent::Token(token)) = events.recv().await {
            lost.push(token);
        }
    }
    engine.lose_shard(ShardIndex(2));
    lost.extend(tokens(events).await);
    assert_eq!(lost, whole);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_grpc_and_with_a_shard_killed_on_the_way() {
    let class = NumericsClass::Bf16;
    let reference = answers(&open(&small(class)).handle()).await;
    let experts = Experts::start(class, 4, 32).await;
    let checkpoint = cadre_checkpoint::Checkpoint::open(pocket()).unwrap();
    let cpu = CpuOptions { threads: Some(1), ..CpuOptions::new(class) };
    let backend = Arc::new(CpuBackend::new(cpu).unwrap());
    let model = Model::load(backend, &checkpoint, &LoadOptions { mtp: false }, &mut |_| {}).unwrap();
    let io = IoThread::start("test-dispatch-io").unwrap();
    let connector = Arc::new(GrpcConnector::new(io.handle()));
    let dispatcher = Dispatcher::new(DispatchConfig::default(), experts.view.generation, connector);
    dispatcher.handle().update(Arc::clone(&experts.view));
    let parts = EngineParts::new(model, SchedulerConfig::with_pages(160), Box::new(dispatcher));
    let engine = Engine::spawn(parts).unwrap();

    assert_eq!(answers(&engine.handle()).await, reference);
    let whole = generate(&engine.handle(), request("wanted", prompt(8, 40), 40)).await;
    let mut events = engine.handle().submit(request("wanted", prompt(8, 40), 40)).unwrap();
    let mut killed = Vec::new();
    while killed.len() < 3 {
        if let Some(cadre_engine::EngineEvent::Token(token)) = events.recv().await {
            killed.push(token);
        }
    }
    experts.kill(1);
    killed.extend(tokens(events).await);
    assert_eq!(killed, whole);
}

#[tokio::test]
async fn greedy_text_is_the_golden_text() {
    let engine = open(&small(NumericsClass::F32));
    let handle = engine.handle();
    let ids = |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let golden = golden();
    let cases = golden["generation"].as_array().unwrap();
    assert!(!cases.is_empty());
    for (nth, case) in cases.iter().enumerate() {
        let mut greedy = request(&format!("golden-{nth}"), ids(&case["prompt_ids"]), 96);
        greedy.sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        greedy.stop.ignore_eos = false;
        let generated: Vec<u32> = generate(&handle, greedy).await.iter().map(|token| token.token).collect();
        let mut expected = ids(&case["greedy_ids"]);
        let margins: Vec<f32> = serde_json::from_value(case["margins"].clone()).unwrap();
        // Where the reference itself is undecided, the texts may part.
        expected.truncate(margins.iter().position(|margin| *margin <= 1e-2).unwrap_or(expected.len()));
        // EOS ends the text and is not part of it.
        if expected.last() == Some(&1) {
            expected.pop();
        }
        assert!(expected.len() > 8, "case {nth} is decided for {} tokens", expected.len());
        assert_eq!(generated[..expected.len()], expected, "case {nth}");
    }
}
