//! The same bits whatever runs beside a sequence and wherever its prompt is computed.

use cadre_types::SamplingParams;

use crate::{
    handoff::hand_off,
    support::{Setup, outcome, prompt, request, wait_empty},
};

/// A request whose sampling makes use of everything that is position- or history-dependent.
fn picky(name: &str, seed: u32, tokens: u32, max_tokens: u32) -> cadre_engine::SequenceRequest {
    let mut request = request(name, prompt(seed, tokens), max_tokens);
    request.sampling = SamplingParams {
        temperature: 0.9,
        top_p: 0.95,
        repetition_penalty: 1.1,
        presence_penalty: 0.3,
        seed: u64::from(seed),
        logprobs: Some(4),
        ..SamplingParams::default()
    };
    request
}

#[tokio::test]
async fn alone_and_among_31_others() {
    let engine = Setup::default().spawn();
    let handle = engine.handle();
    let alone = outcome(handle.submit(picky("alone", 5, 21, 12)).unwrap()).await.finished();
    assert_eq!(alone.len(), 12);
    let others: Vec<_> = (0..31)
        .map(|other| {
            let (tokens, max_tokens) = (1 + other * 3 % 50, 1 + other % 14);
            handle.submit(picky(&format!("other-{other}"), 100 + other, tokens, max_tokens)).unwrap()
        })
        .collect();
    let among = handle.submit(picky("among", 5, 21, 12)).unwrap();
    assert_eq!(outcome(among).await.finished(), alone);
    for (other, events) in others.into_iter().enumerate() {
        assert_eq!(outcome(events).await.finished().len(), 1 + other % 14);
    }
    wait_empty(&handle).await;
}

#[tokio::test]
async fn chunked_and_whole_prefill() {
    let mut results = Vec::new();
    for chunk in [1, 7, 64, 512] {
        let mut setup = Setup::default();
        setup.scheduler.max_chunk_tokens = chunk;
        let engine = setup.spawn();
        // 131 tokens: three pages, and no multiple of any chunk.
        let events = engine.handle().submit(picky("long", 9, 131, 5)).unwrap();
        results.push((chunk, outcome(events).await.finished()));
    }
    let (_, whole) = results.last().unwrap();
    for (chunk, tokens) in &results {
        assert_eq!(tokens, whole, "chunks of {chunk}");
    }
}

#[tokio::test]
async fn local_and_handed_off() {
    let mut chunked = Setup::default();
    chunked.scheduler.max_chunk_tokens = 50;
    let (prefill, decode) = (chunked.spawn(), Setup::default().spawn());
    for (seed, tokens) in [(1, 1), (2, 63), (3, 64), (4, 65), (5, 200)] {
        let request = picky(&format!("request-{seed}"), seed, tokens, 9);
        let local = outcome(prefill.handle().submit(request.clone()).unwrap()).await.finished();
        let remote = hand_off(&prefill.handle(), &decode.handle(), request).await.finished();
        assert_eq!(remote, local, "a prompt of {tokens} tokens");
    }
    wait_empty(&prefill.handle()).await;
    wait_empty(&decode.handle()).await;
}

#[tokio::test]
async fn decode_rotation_and_tight_budgets_change_nothing() {
    let reference = Setup::default().spawn();
    let mut tight = Setup::default();
    tight.scheduler.max_decode_rows = 2;
    tight.scheduler.max_step_tokens = 5;
    tight.scheduler.prefill_tokens_with_decode = 1;
    let tight = tight.spawn();
    let submitted: Vec<_> = (0..6)
        .map(|nth| {
            let request = picky(&format!("request-{nth}"), nth, 10 + nth, 6);
            (reference.handle().submit(request.clone()).unwrap(), tight.handle().submit(request).unwrap())
        })
        .collect();
    for (reference, tight) in submitted {
        assert_eq!(outcome(tight).await.finished(), outcome(reference).await.finished());
    }
}
