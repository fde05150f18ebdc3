//! Hand-offs: delivered, refused, aborted, stalled; each with a typed end and every page free after it.

use std::time::Duration;

use cadre_engine::{
    EngineError, EngineEvent, EngineHandle, HandoffError, HandoffOffer, KvFinish, KvMessage, KvRows,
    KvStream, KvWriter, PrefillPlace, PrefillRequest, SequenceRequest, SequenceStream, prompt_hash,
};
use cadre_types::LayerId;

use crate::support::{Outcome, Setup, outcome, prompt, request, wait_empty};

fn remote(mut request: SequenceRequest) -> SequenceRequest {
    request.prefill = PrefillPlace::Remote;
    request
}

fn offer(engine: &EngineHandle, request: &SequenceRequest) -> HandoffOffer {
    let shape = engine.kv_shape();
    HandoffOffer {
        request_id: request.request_id.clone(),
        prompt_tokens: request.prompt.len() as u32,
        prompt_hash: prompt_hash(&request.prompt),
        layers: shape.layers as u32,
        row_width: shape.row_width as u32,
        format: shape.format,
    }
}

fn prefill_of(request: &SequenceRequest) -> PrefillRequest {
    PrefillRequest {
        request_id: request.request_id.clone(),
        prompt: request.prompt.clone(),
        sampling: request.sampling.clone(),
        stop: request.stop.clone(),
        deadline: request.deadline,
    }
}

/// Submits to the decode side and waits for its pages.
async fn reserved(decode: &EngineHandle, request: SequenceRequest) -> SequenceStream {
    let mut events = decode.submit(remote(request)).unwrap();
    assert!(matches!(events.recv().await, Some(EngineEvent::Reserved)));
    events
}

async fn pass(mut kv: KvStream, mut writer: KvWriter) -> Result<u64, HandoffError> {
    while let Some(message) = kv.recv().await {
        match message {
            KvMessage::Rows(rows) => writer.rows(rows).await?,
            KvMessage::Finish(finish) => return writer.finish(finish).await,
        }
    }
    panic!("the KV ends without finish");
}

/// The whole way: decode reserves, prefill computes and sends, decode generates.
pub(crate) async fn hand_off(
    prefill: &EngineHandle,
    decode: &EngineHandle,
    request: SequenceRequest,
) -> Outcome {
    let events = reserved(decode, request.clone()).await;
    let (prefilled, kv) = prefill.submit_prefill(prefill_of(&request)).unwrap();
    let writer = decode.begin_handoff(offer(decode, &request)).await.unwrap();
    let shape = decode.kv_shape();
    let bytes = pass(kv, writer).await.unwrap();
    assert_eq!(bytes as usize, shape.layers * request.prompt.len() * shape.row_bytes());
    let prefilled = outcome(prefilled).await;
    assert_eq!(prefilled.tokens.len(), 1, "the prefill side samples the first token");
    let decoded = outcome(events).await;
    assert_eq!(decoded.tokens.first(), prefilled.tokens.first());
    decoded
}

#[tokio::test]
async fn rows_leave_layer_by_layer_before_the_prompt_is_done() {
    let mut setup = Setup::default();
    setup.scheduler.max_chunk_tokens = 16;
    let engine = setup.spawn();
    let request = request("streamed", prompt(3, 40), 1);
    let (mut events, mut kv) = engine.handle().submit_prefill(prefill_of(&request)).unwrap();
    let layers = engine.handle().kv_shape().layers;
    let mut received = Vec::new();
    loop {
        match kv.recv().await.unwrap() {
            KvMessage::Rows(rows) => received.push((rows.layer.index(), rows.first_position, rows.count)),
            KvMessage::Finish(finish) => {
                assert_eq!(finish.first_token.position, 40);
                break;
            }
        }
    }
    // Three chunks (16, 16, 8), every layer of one before the next.
    let expected: Vec<_> = [(0, 16), (16, 16), (32, 8)]
        .into_iter()
        .flat_map(|(first, count)| (0..layers).map(move |layer| (layer, first, count)))
        .collect();
    assert_eq!(received, expected);
    assert!(kv.recv().await.is_none());
    let mut computed = Vec::new();
    while let Some(event) = events.recv().await {
        if let EngineEvent::Computed(tokens) = event {
            computed.push(tokens);
        }
    }
    assert_eq!(computed, [16, 32, 40]);
    wait_empty(&engine.handle()).await;
}

#[tokio::test]
async fn a_slow_receiver_delays_itself_alone_and_loses_nothing() {
    // 20 chunks of 3 layers are 60 messages, more than the channel holds.
    let mut setup = Setup::default();
    setup.scheduler.max_chunk_tokens = 4;
    let prefill = setup.spawn();
    let decode = Setup::default().spawn();
    let slow = request("slow", prompt(8, 80), 4);
    let expected = outcome(prefill.handle().submit(slow.clone()).unwrap()).await.finished();

    let events = reserved(&decode.handle(), slow.clone()).await;
    let (prefilled, kv) = prefill.handle().submit_prefill(prefill_of(&slow)).unwrap();
    // Nobody reads; the engine goes on with others, to their end.
    for other in 0..3 {
        let other = request(&format!("other-{other}"), prompt(other, 30), 5);
        assert_eq!(outcome(prefill.handle().submit(other).unwrap()).await.finished().len(), 5);
    }
    let writer = decode.handle().begin_handoff(offer(&decode.handle(), &slow)).await.unwrap();
    pass(kv, writer).await.unwrap();
    assert_eq!(outcome(prefilled).await.finished().len(), 1);
    assert_eq!(outcome(events).await.finished(), expected);
}

#[tokio::test]
async fn a_receiver_that_never_reads_is_given_up() {
    let mut setup = Setup { handoff_timeout: Duration::from_millis(20), ..Setup::default() };
    setup.scheduler.max_chunk_tokens = 4;
    let engine = setup.spawn();
    let (events, _kv) =
        engine.handle().submit_prefill(prefill_of(&request("stuck", prompt(1, 80), 1))).unwrap();
    let failure = outcome(events).await.failed();
    assert!(matches!(failure, EngineError::Handoff(HandoffError::Stalled { .. })), "{failure}");
    wait_empty(&engine.handle()).await;
}

#[tokio::test]
async fn a_receiver_that_goes_away_ends_the_prefill() {
    let engine = Setup::default().spawn();
    let (events, kv) =
        engine.handle().submit_prefill(prefill_of(&request("left", prompt(1, 80), 1))).unwrap();
    drop(kv);
    let failure = outcome(events).await.failed();
    assert!(matches!(failure, EngineError::Handoff(HandoffError::Aborted { .. })), "{failure}");
    wait_empty(&engine.handle()).await;
}

#[tokio::test]
async fn an_offer_that_does_not_fit_is_refused_and_the_sequence_still_waits() {
    let (prefill, decode) = (Setup::default().spawn(), Setup::default().spawn());
    let request = request("wanted", prompt(4, 70), 3);
    let events = reserved(&decode.handle(), request.clone()).await;
    let good = offer(&decode.handle(), &request);
    let bad = [
        ("prompt length", HandoffOffer { prompt_tokens: 69, ..good.clone() }),
        ("prompt hash", HandoffOffer { prompt_hash: 1, ..good.clone() }),
        ("number of layers", HandoffOffer { layers: good.layers + 1, ..good.clone() }),
        ("row width", HandoffOffer { row_width: good.row_width - 1, ..good.clone() }),
        ("row size in bytes", HandoffOffer { format: cadre_ops::RowFormat::F32, ..good.clone() }),
    ];
    for (field, offer) in bad {
        let refused = decode.handle().begin_handoff(offer).await.unwrap_err();
        assert!(
            matches!(&refused, HandoffError::Mismatch { what, .. } if *what == field),
            "{field}: {refused}"
        );
    }
    let stranger = HandoffOffer { request_id: "stranger".into(), ..good.clone() };
    let refused = decode.handle().begin_handoff(stranger).await.unwrap_err();
    assert_eq!(refused, HandoffError::Unknown { request_id: "stranger".into() });

    let (prefilled, kv) = prefill.handle().submit_prefill(prefill_of(&request)).unwrap();
    let writer = decode.handle().begin_handoff(good.clone()).await.unwrap();
    let second = decode.handle().begin_handoff(good).await.unwrap_err();
    assert!(matches!(second, HandoffError::AlreadyBegun { .. }), "{second}");
    pass(kv, writer).await.unwrap();
    outcome(prefilled).await.finished();
    assert_eq!(outcome(events).await.finished().len(), 3);
}

/// Rows of one layer that are right in every respect.
fn rows(engine: &EngineHandle, layer: u16, first_position: u32, count: u32) -> KvRows {
    let bytes = count as usize * engine.kv_shape().row_bytes();
    KvRows { layer: LayerId(layer), first_position, count, rows: vec![0; bytes].into() }
}

#[tokio::test]
async fn malformed_rows_fail_their_sequence_alone() {
    let engine = Setup::default().spawn();
    let handle = engine.handle();
    let layers = handle.kv_shape().layers as u16;
    let short = {
        let good = rows(&handle, 0, 0, 4);
        KvRows { rows: good.rows.slice(1..), ..good }
    };
    type Expected = fn(&HandoffError) -> bool;
    let cases: [(&str, KvRows, Expected); 6] = [
        ("layer", rows(&handle, layers, 0, 4), |error| matches!(error, HandoffError::UnknownLayer { .. })),
        ("order", rows(&handle, 0, 4, 4), |error| {
            matches!(error, HandoffError::OutOfOrder { expected: 0, first: 4, .. })
        }),
        ("range", rows(&handle, 0, 0, 11), |error| matches!(error, HandoffError::OutOfRange { .. })),
        ("overflow", KvRows { first_position: u32::MAX, ..rows(&handle, 0, 0, 4) }, |error| {
            matches!(error, HandoffError::OutOfRange { .. })
        }),
        ("none", rows(&handle, 0, 0, 0), |error| matches!(error, HandoffError::OutOfRange { .. })),
        ("size", short, |error| matches!(error, HandoffError::WrongSize { .. })),
    ];
    let bystander = handle.submit(request("bystander", prompt(1, 9), 40)).unwrap();
    for (name, bad, expected) in cases {
        let request = request(name, prompt(2, 10), 3);
        let events = reserved(&handle, request.clone()).await;
        let mut writer = handle.begin_handoff(offer(&handle, &request)).await.unwrap();
        writer.rows(bad).await.unwrap();
        // The refusal comes with the next message at the latest.
        let told = loop {
            match writer.rows(rows(&handle, 1, 0, 0)).await {
                Ok(()) => tokio::task::yield_now().await,
                Err(error) => break error,
            }
        };
        assert!(expected(&told), "{name}: {told}");
        match outcome(events).await.failed() {
            EngineError::Handoff(error) => assert_eq!(error, told, "{name}"),
            other => panic!("{name}: {other}"),
        }
    }
    assert_eq!(outcome(bystander).await.finished().len(), 40);
    wait_empty(&handle).await;
}

fn finish_with(token: u32, position: u32) -> KvFinish {
    let first_token = cadre_engine::GeneratedToken { position, token, logprob: None, top: Vec::new() };
    KvFinish { first_token }
}

#[tokio::test]
async fn an_incomplete_cache_is_never_decoded_from() {
    let engine = Setup::default().spawn();
    let handle = engine.handle();
    let layers = handle.kv_shape().layers as u16;
    type Expected = fn(&HandoffError) -> bool;
    // Which rows come, how it ends, what is said.
    let cases: [(&str, Vec<KvRows>, KvFinish, Expected); 4] = [
        ("nothing", vec![], finish_with(1, 10), |error| {
            matches!(error, HandoffError::Incomplete { layer: LayerId(0), received: 0, .. })
        }),
        (
            "a layer short",
            (0..layers - 1).map(|layer| rows(&handle, layer, 0, 10)).collect(),
            finish_with(1, 10),
            |error| matches!(error, HandoffError::Incomplete { layer: LayerId(2), received: 0, .. }),
        ),
        (
            "a row short",
            (0..layers).map(|layer| rows(&handle, layer, 0, 10 - u32::from(layer == 1))).collect(),
            finish_with(1, 10),
            |error| matches!(error, HandoffError::Incomplete { layer: LayerId(1), received: 9, .. }),
        ),
        (
            "a token that is none",
            (0..layers).map(|layer| rows(&handle, layer, 0, 10)).collect(),
            finish_with(256, 10),
            |error| matches!(error, HandoffError::FirstToken { token: 256, .. }),
        ),
    ];
    for (name, rows, finish, expected) in cases {
        let request = request(name, prompt(2, 10), 3);
        let events = reserved(&handle, request.clone()).await;
        let mut writer = handle.begin_handoff(offer(&handle, &request)).await.unwrap();
        for rows in rows {
            writer.rows(rows).await.unwrap();
        }
        let told = writer.finish(finish).await.unwrap_err();
        assert!(expected(&told), "{name}: {told}");
        let ended = outcome(events).await;
        assert!(ended.tokens.is_empty(), "{name}: nothing was generated");
        assert!(matches!(ended.failed(), EngineError::Handoff(error) if error == told), "{name}");
    }
    wait_empty(&handle).await;
}

#[tokio::test]
async fn a_sender_that_goes_away_midway_is_an_abort() {
    let engine = Setup::default().spawn();
    let handle = engine.handle();
    let request = request("abandoned", prompt(2, 10), 3);
    let events = reserved(&handle, request.clone()).await;
    let mut writer = handle.begin_handoff(offer(&handle, &request)).await.unwrap();
    writer.rows(rows(&handle, 0, 0, 10)).await.unwrap();
    drop(writer);
    let failure = outcome(events).await.failed();
    assert!(matches!(failure, EngineError::Handoff(HandoffError::Aborted { rows: 10 })), "{failure}");
    wait_empty(&handle).await;
}

#[tokio::test]
async fn silence_is_bounded_before_and_after_the_begin() {
    let short = Duration::from_millis(20);
    let setup = Setup { handoff_timeout: short, handoff_begin_timeout: short, ..Setup::default() };
    let engine = setup.spawn();
    let handle = engine.handle();
    let never = handle.submit(remote(request("never", prompt(1, 10), 3))).unwrap();
    let failure = outcome(never).await.failed();
    assert!(matches!(failure, EngineError::Handoff(HandoffError::NeverBegun { .. })), "{failure}");

    let setup = Setup { handoff_timeout: short, ..Setup::default() };
    let engine = setup.spawn();
    let handle = engine.handle();
    let silent = request("silent", prompt(1, 10), 3);
    let events = reserved(&handle, silent.clone()).await;
    let mut writer = handle.begin_handoff(offer(&handle, &silent)).await.unwrap();
    writer.rows(rows(&handle, 0, 0, 10)).await.unwrap();
    let failure = outcome(events).await.failed();
    assert!(matches!(failure, EngineError::Handoff(HandoffError::Stalled { rows: 10, .. })), "{failure}");
    let told = writer.finish(finish_with(1, 10)).await.unwrap_err();
    assert!(matches!(told, HandoffError::Stalled { .. }), "{told}");
    wait_empty(&handle).await;
}

#[tokio::test]
async fn cancelling_the_receiver_tells_the_sender() {
    let engine = Setup::default().spawn();
    let handle = engine.handle();
    let request = request("gone", prompt(1, 10), 3);
    let events = reserved(&handle, request.clone()).await;
    let writer = handle.begin_handoff(offer(&handle, &request)).await.unwrap();
    drop(events);
    wait_empty(&handle).await;
    let told = writer.finish(finish_with(1, 10)).await.unwrap_err();
    assert_eq!(told, HandoffError::Unknown { request_id: "gone".into() });
}

#[tokio::test]
async fn a_sequence_without_pages_takes_no_hand_off() {
    let mut setup = Setup::default();
    setup.scheduler.pages = 2;
    let engine = setup.spawn();
    let handle = engine.handle();
    let first = reserved(&handle, request("first", prompt(1, 10), 100)).await;
    let second = request("second", prompt(2, 10), 100);
    let waiting = handle.submit(remote(second.clone())).unwrap();
    let refused = handle.begin_handoff(offer(&handle, &second)).await.unwrap_err();
    assert_eq!(refused, HandoffError::NotReserved { request_id: "second".into() });
    drop((first, waiting));
    wait_empty(&handle).await;
}
