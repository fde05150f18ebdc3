#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::task::Waker;

use bytes::Bytes;
use cadre_types::{Generation, ModelHash, NumericsClass, PlacementEpoch};

use super::*;
use crate::frame::{CombineFrame, ShardSignals};

const PATIENCE: Duration = Duration::from_secs(60);
const KIB: usize = 1024;

/// Answers every frame at once with as many rows as it wants.
#[derive(Default)]
struct Echo {
    computed: AtomicUsize,
}

impl ShardService for Echo {
    fn submit(&self, frame: DispatchFrame, reply: Reply) {
        self.computed.fetch_add(1, Ordering::Relaxed);
        let rows = Bytes::from(vec![0; frame.pairs() * frame.data.len()]);
        reply.send(Ok(CombineFrame { format: RowFormat::F32, rows, signals: ShardSignals::default() }));
    }
}

/// One token of 1 KiB that wants so many experts: with its answer under `2 + experts` KiB.
fn frame(sequence: u64, experts: usize) -> v1::DispatchFrame {
    let epoch = PlacementEpoch(1);
    let generation = Generation { model: ModelHash([1; 16]), numerics: NumericsClass::F32, epoch };
    v1::DispatchFrame {
        sequence,
        generation: Some(generation.into()),
        layer: 3,
        num_tokens: 1,
        dtype: v1::Dtype::F32.into(),
        activations: vec![0; KIB].into(),
        scales: Bytes::new(),
        pair_tokens: vec![0; experts],
        pair_slots: (0..experts as u32).collect(),
    }
}

fn server(stream_kib: usize, process_kib: usize) -> (Arc<Echo>, ExpertServer) {
    let echo = Arc::new(Echo::default());
    let limits = Limits {
        stream_bytes: stream_kib * KIB,
        process_bytes: process_kib * KIB,
        unread: Duration::from_millis(50),
    };
    (Arc::clone(&echo), ExpertServer::with_limits(echo, limits))
}

/// Submits frames of 10 KiB (with their answers) until one has to wait; how many went in.
fn fill(state: &Arc<StreamState>, echo: &Echo) -> usize {
    for sequence in 0..1000 {
        let accepting = std::pin::pin!(state.accept(echo, frame(sequence, 8)));
        if accepting.poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            return sequence as usize;
        }
    }
    panic!("nothing bounds this stream");
}

/// Takes one answer, as the transport does.
fn take(answers: &mut Answers) {
    let next = Pin::new(answers).poll_next(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(next, Poll::Ready(Some(Ok(_)))));
}

#[tokio::test]
async fn answers_that_nobody_reads_keep_frames_out() {
    let (echo, server) = server(100, 1000);
    let (state, mut answers) = server.open();
    assert_eq!(fill(&state, &echo), 10, "10 KiB each of 100");
    assert_eq!(fill(&state, &echo), 0);
    take(&mut answers);
    take(&mut answers);
    assert_eq!(fill(&state, &echo), 2);
    assert_eq!(state.inside(), 10);
    // A frame larger than all of it gets in alone.
    (0..10).for_each(|_| take(&mut answers));
    assert_eq!(state.inside(), 0);
    state.accept(echo.as_ref(), frame(7, 500)).await;
    assert_eq!((state.inside(), fill(&state, &echo)), (1, 0));
}

#[tokio::test]
async fn streams_share_the_room_of_the_process() {
    let (echo, server) = server(100, 250);
    let streams: Vec<_> = (0..4).map(|_| server.open()).collect();
    let filled: Vec<usize> = streams.iter().map(|(state, _)| fill(state, &echo)).collect();
    assert_eq!(filled, [10, 10, 5, 0]);
    // A stream that is let go gives its room back, to the one that waits.
    let mut streams = streams.into_iter();
    drop(streams.next().unwrap().1);
    let (state, _answers) = streams.next_back().unwrap();
    assert_eq!(fill(&state, &echo), 10);
}

#[tokio::test]
async fn a_stream_whose_answers_are_not_read_ends_and_gives_its_room_back() {
    let (echo, server) = server(100, 100);
    let (neglected, mut unread) = server.open();
    fill(&neglected, &echo);
    let (state, _answers) = server.open();
    assert_eq!(fill(&state, &echo), 0, "it has all the room there is");
    tokio::time::timeout(PATIENCE, neglected.neglected()).await.expect("in time");
    neglected.cut();
    let sink = FrameSink { state: Arc::clone(&neglected), place: Mutex::new(None) };
    assert!(sink.is_cancelled());
    assert_eq!(fill(&state, &echo), 10);
    let end = Pin::new(&mut unread).poll_next(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(end, Poll::Ready(Some(Err(_)))));
}

#[tokio::test]
async fn a_stream_whose_answers_are_read_lives() {
    let (echo, server) = server(100, 100);
    let (state, mut answers) = server.open();
    let reading = async {
        for sequence in 0..100 {
            state.accept(echo.as_ref(), frame(sequence, 8)).await;
            tokio::time::sleep(Duration::from_millis(2)).await; // time passes, more than `unread` in all
            take(&mut answers);
        }
    };
    tokio::select! {
        () = reading => {}
        () = state.neglected() => panic!("it reads"),
    }
}
