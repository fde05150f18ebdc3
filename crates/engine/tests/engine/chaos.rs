//! Any mixture of requests, cancellations, failed steps and broken hand-offs: every stream ends once, and
//! every page is free afterwards.

use cadre_engine::{
    EngineHandle, HandoffOffer, KvMessage, PrefillPlace, PrefillRequest, SequenceStream, prompt_hash,
};
use proptest::prelude::*;

use crate::support::{PAGES, Setup, Switches, outcome, prompt, request, wait_empty};

#[derive(Clone, Copy, Debug)]
enum Act {
    /// A local sequence of (prompt, max) tokens.
    Local(u32, u32),
    /// A hand-off that is cut after so many messages.
    Handoff { tokens: u32, messages: usize },
    /// A sequence that waits for a hand-off which never comes.
    Forgotten(u32),
    /// The n-th open stream is dropped.
    Drop(usize),
    /// The next expert exchange fails.
    FailStep,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (1u32..100, 1u32..20).prop_map(|(tokens, most)| Act::Local(tokens, most)),
        2 => (1u32..100, 0usize..12).prop_map(|(tokens, messages)| Act::Handoff { tokens, messages }),
        1 => (1u32..100).prop_map(Act::Forgotten),
        3 => (0usize..8).prop_map(Act::Drop),
        1 => Just(Act::FailStep),
    ]
}

/// Sends a hand-off from the engine to itself, cut after `messages`.
async fn cut_handoff(engine: &EngineHandle, name: &str, tokens: u32, messages: usize) -> [SequenceStream; 2] {
    let prompt = prompt(tokens, tokens);
    let mut sequence = request(&format!("{name}-decode"), prompt.clone(), 3);
    sequence.prefill = PrefillPlace::Remote;
    let decoding = engine.submit(sequence.clone()).unwrap();
    let (prefilling, mut kv) = engine
        .submit_prefill(PrefillRequest {
            request_id: format!("{name}-prefill"),
            prompt: prompt.clone(),
            sampling: sequence.sampling,
            stop: sequence.stop,
            deadline: None,
        })
        .unwrap();
    let shape = engine.kv_shape();
    let offer = HandoffOffer {
        request_id: sequence.request_id,
        prompt_tokens: tokens,
        prompt_hash: prompt_hash(&prompt),
        layers: shape.layers as u32,
        row_width: shape.row_width as u32,
        format: shape.format,
    };
    // Refused while its pages are not reserved, or if a failed step took the sequence.
    let Ok(mut writer) = engine.begin_handoff(offer).await else { return [decoding, prefilling] };
    for _ in 0..messages {
        let sent = match kv.recv().await {
            Some(KvMessage::Rows(rows)) => writer.rows(rows).await,
            Some(KvMessage::Finish(finish)) => {
                let _ = writer.finish(finish).await;
                break;
            }
            None => break,
        };
        if sent.is_err() {
            break;
        }
    }
    [decoding, prefilling]
}

async fn play(engine: &EngineHandle, switches: &Switches, acts: Vec<Act>) -> (usize, usize) {
    let mut open: Vec<SequenceStream> = Vec::new();
    let mut forgotten: Vec<SequenceStream> = Vec::new();
    let mut dropped = 0;
    for (at, act) in acts.into_iter().enumerate() {
        match act {
            Act::Local(tokens, most) => {
                open.push(
                    engine.submit(request(&format!("local-{at}"), prompt(tokens, tokens), most)).unwrap(),
                );
            }
            Act::Handoff { tokens, messages } => {
                let [decoding, prefilling] = cut_handoff(engine, &at.to_string(), tokens, messages).await;
                open.push(prefilling);
                // Refused hand-offs leave the decode side waiting.
                forgotten.push(decoding);
            }
            Act::Forgotten(tokens) => {
                let mut sequence = request(&format!("forgotten-{at}"), prompt(tokens, tokens), 3);
                sequence.prefill = PrefillPlace::Remote;
                forgotten.push(engine.submit(sequence).unwrap());
            }
            Act::Drop(nth) if nth < open.len() => {
                drop(open.swap_remove(nth));
                dropped += 1;
            }
            Act::Drop(_) => {}
            Act::FailStep => switches.fail_next(),
        }
    }
    drop(forgotten);
    let ended = open.len();
    for events in open {
        // Panics unless it ends exactly once.
        outcome(events).await;
    }
    (ended, dropped)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn nothing_leaks(acts in prop::collection::vec(act(), 1..20)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let setup = Setup::default();
        let engine = setup.spawn();
        runtime.block_on(async {
            play(&engine.handle(), &setup.switches, acts).await;
            wait_empty(&engine.handle()).await;
            assert_eq!(engine.handle().stats().load().pages_free, u64::from(PAGES));
        });
    }
}
