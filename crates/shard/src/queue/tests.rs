#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use bytes::Bytes;
use cadre_dispatch::{Answer, AnswerSink, LinkError, ShardContract};
use cadre_ops::{ReferenceBackend, RowFormat};
use cadre_types::{Generation, LayerId, ModelHash, NumericsClass, PlacementEpoch, ShardIndex};

use super::*;

/// Keeps answers by sequence number.
#[derive(Default)]
struct Answers(Mutex<Vec<(u64, Answer)>>);

impl AnswerSink for Answers {
    fn deliver(&self, sequence: u64, answer: Answer) {
        self.0.lock().push((sequence, answer));
    }

    fn is_cancelled(&self) -> bool {
        false
    }
}

const GENERATION: Generation =
    Generation { model: ModelHash([0; 16]), numerics: NumericsClass::F32, epoch: PlacementEpoch(1) };

fn held() -> Arc<Held<ReferenceBackend>> {
    let contract =
        ShardContract { shard: ShardIndex(0), generation: GENERATION, hidden: 4, slots: Vec::new() };
    Arc::new(Held::empty(contract))
}

struct Bench {
    queue: Queue<ReferenceBackend>,
    answers: Arc<Answers>,
    held: Arc<Held<ReferenceBackend>>,
    sequence: u64,
}

impl Bench {
    fn new() -> Self {
        Self { queue: Queue::new(), answers: Arc::default(), held: held(), sequence: 0 }
    }

    fn push(&mut self, layer: u16, tokens: usize, bytes: usize) -> Result<(), Full> {
        self.sequence += 1;
        let frame = DispatchFrame {
            sequence: self.sequence,
            generation: GENERATION,
            layer: LayerId(layer),
            tokens,
            format: RowFormat::F32,
            data: Bytes::from(vec![0; bytes]),
            scales: Bytes::new(),
            pair_tokens: (0..tokens as u32).collect(),
            pair_slots: vec![0; tokens],
        };
        let reply = Reply::new(self.answers.clone(), self.sequence);
        let job = Job { frame, reply, held: self.held.clone(), accepted: Instant::now() };
        self.queue.push(job).map_err(|(_, full)| full)
    }

    fn take(&self) -> Vec<u64> {
        self.queue.take(None).unwrap().iter().map(|job| job.frame.sequence).collect()
    }
}

#[test]
fn the_oldest_goes_first_with_all_of_its_layer() {
    let mut bench = Bench::new();
    for layer in [3, 5, 3, 4, 5, 3] {
        bench.push(layer, 1, 16).unwrap();
    }
    assert_eq!(bench.queue.pairs(), 6);
    assert_eq!(bench.take(), [1, 3, 6]);
    assert_eq!(bench.queue.pairs(), 3);
    assert_eq!(bench.take(), [2, 5]);
    assert_eq!(bench.take(), [4]);
}

#[test]
fn frames_of_another_placement_are_not_merged() {
    let mut bench = Bench::new();
    bench.push(3, 1, 0).unwrap();
    bench.held = held();
    bench.push(3, 1, 0).unwrap();
    assert_eq!(bench.take(), [1]);
    assert_eq!(bench.take(), [2]);
}

#[test]
fn merging_stops_at_its_token_bound() {
    let mut bench = Bench::new();
    for tokens in [MERGED_TOKENS - 1, 2, 1] {
        bench.push(3, tokens, 0).unwrap();
    }
    assert_eq!(bench.take(), [1, 3], "the second does not fit, the third does");
    assert_eq!(bench.take(), [2]);
}

#[test]
fn the_bound_is_in_bytes_and_an_empty_queue_takes_any_frame() {
    let mut bench = Bench::new();
    bench.push(3, 0, QUEUE_BYTES + 100).unwrap();
    assert_eq!(bench.push(3, 0, 1), Err(Full::Bytes(QUEUE_BYTES + 100)));
    bench.take();
    bench.push(3, 0, QUEUE_BYTES / 2).unwrap();
    bench.push(3, 0, QUEUE_BYTES / 2).unwrap();
    assert_eq!(bench.push(3, 0, 1), Err(Full::Bytes(QUEUE_BYTES)));
    bench.take();
    for _ in 0..QUEUE_FRAMES {
        bench.push(3, 0, 0).unwrap();
    }
    assert_eq!(bench.push(3, 0, 0), Err(Full::Frames(QUEUE_FRAMES)));
}

#[test]
fn closing_answers_what_waits_and_refuses_what_comes() {
    let mut bench = Bench::new();
    bench.push(3, 1, 0).unwrap();
    bench.queue.close();
    assert_eq!(*bench.answers.0.lock(), [(1, Err(LinkError::Dropped))]);
    assert_eq!(bench.push(3, 1, 0), Err(Full::Closed));
    assert!(bench.queue.take(None).is_none());
    assert!(bench.queue.is_closed());
}

#[test]
fn idle_is_neither_waiting_nor_computing() {
    let mut bench = Bench::new();
    let soon = || Instant::now() + Duration::from_millis(1);
    assert!(bench.queue.wait_idle(soon()));
    bench.push(3, 1, 0).unwrap();
    assert!(!bench.queue.wait_idle(soon()));
    bench.take();
    assert!(!bench.queue.wait_idle(soon()), "the taken frame is being computed");
    std::thread::scope(|scope| {
        let done = scope.spawn(|| bench.queue.wait_idle(Instant::now() + Duration::from_secs(60)));
        scope.spawn(|| assert!(bench.queue.take(None).is_none()));
        assert!(done.join().unwrap());
        bench.queue.close();
    });
}
