//! What the gRPC server does with clients that are not ours: each abuse has a typed answer or ends its
//! own stream only.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use cadre_dispatch::{
    CombineFrame, DispatchFrame, ExpertServer, Reply, ShardContract, ShardService, ShardSignals,
    frame::{MAX_FRAME_BYTES, MAX_FRAME_TOKENS},
    transport::server::MAX_STREAM_FRAMES,
    tuning,
};
use cadre_ops::RowFormat;
use cadre_proto::{MAX_MESSAGE_BYTES, v1};
use cadre_types::{Generation, LayerId, ModelHash, NumericsClass, PlacementEpoch, ShardIndex};
use parking_lot::{Condvar, Mutex};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(60);

const GENERATION: Generation =
    Generation { model: ModelHash([1; 16]), numerics: NumericsClass::F32, epoch: PlacementEpoch(4) };

/// Checks its contract and holds what passes, or echoes.
struct Shard {
    contract: ShardContract,
    hold: bool,
    held: Mutex<Vec<Reply>>,
    arrived: Condvar,
}

impl ShardService for Shard {
    fn submit(&self, frame: DispatchFrame, reply: Reply) {
        if let Err(refusal) = self.contract.check(&frame) {
            return reply.send(Err(refusal.into()));
        }
        if self.hold {
            self.held.lock().push(reply);
            self.arrived.notify_all();
            return;
        }
        let signals = ShardSignals::default();
        reply.send(Ok(CombineFrame { format: RowFormat::F32, rows: frame.data, signals }));
    }
}

impl Shard {
    /// Waits, off the runtime, until this many frames are held.
    async fn wait_held(self: &Arc<Self>, count: usize) {
        let shard = self.clone();
        let waiting = move || {
            let mut held = shard.held.lock();
            while held.len() < count {
                assert!(!shard.arrived.wait_for(&mut held, PATIENCE).timed_out());
            }
        };
        tokio::task::spawn_blocking(waiting).await.unwrap();
    }
}

struct Client {
    frames: mpsc::Sender<v1::DispatchFrame>,
    answers: Streaming<v1::CombineFrame>,
}

impl Client {
    async fn send(&self, frame: v1::DispatchFrame) {
        self.frames.send(frame).await.unwrap();
    }

    async fn answer(&mut self) -> Result<v1::CombineFrame, Status> {
        let message = tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("in time");
        Ok(message?.expect("the stream goes on"))
    }

    async fn error(&mut self, frame: v1::DispatchFrame) -> (v1::DispatchErrorCode, String) {
        self.send(frame).await;
        let answer = self.answer().await.unwrap();
        let error = answer.error.expect("a refusal");
        assert!(answer.rows.is_empty());
        (error.code(), error.message)
    }
}

async fn serve(hold: bool) -> (Arc<Shard>, String) {
    let contract = ShardContract {
        shard: ShardIndex(0),
        generation: GENERATION,
        hidden: 4,
        slots: vec![(LayerId(3), 2)],
    };
    let (held, arrived) = (Mutex::default(), Condvar::new());
    let shard = Arc::new(Shard { contract, hold, held, arrived });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let service = ExpertServer::new(shard.clone()).into_service();
    tokio::spawn(async move {
        let serving = tuning::server().add_service(service);
        serving.serve_with_incoming(tuning::incoming(listener)).await.unwrap();
    });
    (shard, address)
}

async fn connect(address: &str) -> Client {
    let channel = tuning::endpoint(address).unwrap().connect().await.unwrap();
    let mut client = v1::expert_client::ExpertClient::new(channel)
        .max_encoding_message_size(usize::MAX)
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let (frames, outgoing) = mpsc::channel(4);
    let answers = client.dispatch(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    Client { frames, answers }
}

fn good(sequence: u64) -> v1::DispatchFrame {
    v1::DispatchFrame {
        sequence,
        generation: Some(GENERATION.into()),
        layer: 3,
        num_tokens: 1,
        dtype: v1::Dtype::F32.into(),
        activations: vec![7; 16].into(),
        scales: Default::default(),
        pair_tokens: vec![0],
        pair_slots: vec![1],
    }
}

#[tokio::test]
async fn every_refusal_is_typed_and_the_stream_goes_on() {
    let (_shard, address) = serve(false).await;
    let mut client = connect(&address).await;
    use v1::DispatchErrorCode as Code;
    type Change = fn(&mut v1::DispatchFrame);
    let cases: [(Code, &str, Change); 9] = [
        (Code::Malformed, "dispatch.dtype: unknown value 9", |frame| frame.dtype = 9),
        (Code::Malformed, "dispatch.generation: missing", |frame| frame.generation = None),
        (Code::Malformed, "rows are Bf16", |frame| frame.dtype = v1::Dtype::Bf16.into()),
        (Code::Malformed, "slot 2 of 2", |frame| frame.pair_slots[0] = 2),
        (Code::Malformed, "15 activation bytes", |frame| frame.activations.truncate(15)),
        (Code::Epoch, "placement epoch 9 is not ours (epoch 4)", |frame| {
            frame.generation.as_mut().unwrap().epoch = 9;
        }),
        (Code::Generation, "numerics class fp8 is not ours (f32)", |frame| {
            frame.generation.as_mut().unwrap().numerics = v1::NumericsClass::Fp8.into();
        }),
        (Code::Oversize, "4097 tokens", |frame| frame.num_tokens = MAX_FRAME_TOKENS as u32 + 1),
        (Code::Oversize, "at most", |frame| frame.activations = vec![0; MAX_FRAME_BYTES + 1].into()),
    ];
    for (code, words, change) in cases {
        let mut frame = good(5);
        change(&mut frame);
        let (found, message) = client.error(frame).await;
        assert_eq!(found, code, "{message}");
        assert!(message.contains(words), "{words:?} not in {message:?}");
    }
    client.send(good(6)).await;
    let answer = client.answer().await.unwrap();
    assert_eq!((answer.sequence, answer.rows.len(), answer.error), (6, 16, None));
}

#[tokio::test]
async fn a_message_beyond_the_wire_limit_ends_only_its_own_stream() {
    let (_shard, address) = serve(false).await;
    let (mut abuser, mut other) = (connect(&address).await, connect(&address).await);
    let mut frame = good(1);
    frame.activations = vec![0; MAX_MESSAGE_BYTES + 1].into();
    abuser.send(frame).await;
    let ended = tokio::time::timeout(PATIENCE, abuser.answers.message()).await.expect("in time");
    match ended {
        Ok(None) => {}
        Ok(Some(answer)) => panic!("answered {answer:?}"),
        Err(status) => assert_ne!(status.code(), Code::Ok),
    }
    other.send(good(2)).await;
    assert_eq!(other.answer().await.unwrap().sequence, 2);
}

#[tokio::test]
async fn frames_beyond_the_bound_of_a_stream_are_overloaded() {
    let (shard, address) = serve(true).await;
    let mut client = connect(&address).await;
    for sequence in 0..MAX_STREAM_FRAMES as u64 {
        client.send(good(sequence)).await;
    }
    shard.wait_held(MAX_STREAM_FRAMES).await;
    let (code, message) = client.error(good(999)).await;
    assert_eq!(code, v1::DispatchErrorCode::Overloaded, "{message}");
    // Room again once one is answered: dropping a frame answers it.
    drop(shard.held.lock().pop());
    let dropped = client.answer().await.unwrap();
    assert_eq!(dropped.error.unwrap().code(), v1::DispatchErrorCode::Unavailable);
    client.send(good(1000)).await;
    shard.wait_held(MAX_STREAM_FRAMES).await;
}

#[tokio::test]
async fn a_stream_that_ends_cancels_its_frames() {
    let (shard, address) = serve(true).await;
    let client = connect(&address).await;
    client.send(good(1)).await;
    shard.wait_held(1).await;
    assert!(!shard.held.lock()[0].is_cancelled());
    drop(client);
    let cancelled = async {
        while !shard.held.lock()[0].is_cancelled() {
            tokio::time::sleep(Duration::from_millis(1)).await; // between looks
        }
    };
    tokio::time::timeout(PATIENCE, cancelled).await.expect("cancelled in time");
}

#[tokio::test]
async fn a_worker_that_sends_nothing_more_still_gets_its_answers() {
    let (shard, address) = serve(true).await;
    let Client { frames, mut answers } = connect(&address).await;
    frames.send(good(1)).await.unwrap();
    shard.wait_held(1).await;
    drop(frames);
    let signals = ShardSignals::default();
    let rows = vec![1; 16].into();
    let reply = shard.held.lock().pop().unwrap();
    reply.send(Ok(CombineFrame { format: RowFormat::F32, rows, signals }));
    assert_eq!(answers.message().await.unwrap().unwrap().sequence, 1);
    assert!(answers.message().await.unwrap().is_none(), "and then the stream ends");
}
