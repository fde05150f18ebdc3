#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::AtomicUsize;

use bytes::Bytes;
use cadre_dispatch::{Answer, AnswerSink, LinkError};
use cadre_ops::{
    EncodedRows, HostMatrix, MatrixData, PassLimits, PassRows, RowFormat, RowGroup,
    reference::ReferenceBackend,
};
use cadre_types::{LayerPlacement, LogicalExpert, ModelHash, NumericsClass};
use proptest::prelude::*;

use super::*;
use crate::{queue::Job, self_test::OneAnswer, source::Loaded};

const HIDDEN: usize = 130;
const INNER: usize = 7;
const LAYERS: [u16; 2] = [3, 5];
const PATIENCE: Duration = Duration::from_secs(60);

/// Weights that differ from expert to expert, made on the fly; counts loads and fails where told.
struct Weights {
    backend: Arc<ReferenceBackend>,
    scale: f32,
    loads: AtomicUsize,
    missing: Option<ExpertKey>,
}

impl Weights {
    fn new(backend: &Arc<ReferenceBackend>) -> Self {
        Self { backend: backend.clone(), scale: 0.01, loads: AtomicUsize::new(0), missing: None }
    }

    fn matrix(&self, rows: usize, cols: usize, salt: usize) -> Vec<u8> {
        (0..rows * cols)
            .map(|at| ((at * 37 + salt * 101) % 41) as f32 - 20.0)
            .flat_map(|value| (value * self.scale).to_le_bytes())
            .collect()
    }
}

impl ExpertSource<ReferenceBackend> for Weights {
    fn expert_bytes(&self, _key: ExpertKey) -> Result<u64, SourceError> {
        Ok(10)
    }

    fn load(&self, key: ExpertKey) -> Result<Loaded<<ReferenceBackend as Backend>::Weight>, SourceError> {
        if self.missing == Some(key) {
            return Err("no such tensor".into());
        }
        self.loads.fetch_add(1, Ordering::Relaxed);
        let salt = key.layer.index() * 64 + key.expert.index();
        let gate = self.matrix(INNER, HIDDEN, salt);
        let up = self.matrix(INNER, HIDDEN, salt + 7);
        let down = self.matrix(HIDDEN, INNER, salt + 13);
        let wide = |data| HostMatrix { rows: INNER, cols: HIDDEN, data: MatrixData::F32(data) };
        let tall = HostMatrix { rows: HIDDEN, cols: INNER, data: MatrixData::F32(&down) };
        let ffn = self.backend.load_ffn(wide(&gate), wide(&up), tall)?;
        Ok(Loaded { ffn, digest: salt as u64 })
    }
}

fn options(class: NumericsClass) -> ShardOptions {
    let weights = Generation { model: ModelHash([4; 16]), numerics: class, epoch: PlacementEpoch(0) };
    ShardOptions { shard: ShardIndex(1), weights, hidden: HIDDEN }
}

/// Shard 0 holds all eight experts, so that every placement is valid; shard 1 is under test.
fn placement(epoch: u64, ours: &[u16]) -> Placement {
    let experts = |ids: &[u16]| ids.iter().copied().map(LogicalExpert).collect::<Vec<_>>();
    let all: Vec<u16> = (0..8).collect();
    let layers = LAYERS
        .map(|layer| LayerPlacement { layer: LayerId(layer), slots: vec![experts(&all), experts(ours)] })
        .to_vec();
    Placement::new(PlacementEpoch(epoch), 8, layers).unwrap()
}

struct Bench {
    class: NumericsClass,
    backend: Arc<ReferenceBackend>,
    weights: Arc<Weights>,
}

impl Bench {
    fn new(class: NumericsClass) -> Self {
        let backend = Arc::new(ReferenceBackend::new(class));
        let weights = Arc::new(Weights::new(&backend));
        Self { class, backend, weights }
    }

    fn inline(&self) -> Shard<ReferenceBackend> {
        let source = self.weights.clone();
        Shard::inline(options(self.class), self.backend.clone(), source).unwrap()
    }

    fn spawn(&self) -> Shard<ReferenceBackend> {
        let source = self.weights.clone();
        Shard::spawn(options(self.class), self.backend.clone(), source, None).unwrap()
    }

    /// A frame of `tokens` rows and these (slot, token) pairs.
    fn frame(&self, tokens: usize, pairs: &[(u32, u32)], salt: usize) -> DispatchFrame {
        let format = RowFormat::dispatch(self.class);
        let value = |at: usize| ((at * 29 + salt * 17) % 31) as f32 / 8.0 - 2.0;
        let data: Vec<u8> = match format {
            RowFormat::F32 => (0..tokens * HIDDEN).flat_map(|at| value(at).to_le_bytes()).collect(),
            RowFormat::Bf16 => (0..tokens * HIDDEN)
                .flat_map(|at| ((value(at).to_bits() >> 16) as u16).to_le_bytes())
                .collect(),
            RowFormat::E4m3 => (0..tokens * HIDDEN).map(|at| (at * 29 + salt) as u8 & 0x77).collect(),
        };
        let scales = (0..tokens * format.row_scales(HIDDEN))
            .flat_map(|at| (0.25 + at as f32 / 64.0).to_le_bytes())
            .collect::<Vec<u8>>();
        DispatchFrame {
            sequence: 0,
            generation: Generation { epoch: PlacementEpoch(1), ..options(self.class).weights },
            layer: LayerId(LAYERS[0]),
            tokens,
            format,
            data: data.into(),
            scales: scales.into(),
            pair_tokens: pairs.iter().map(|pair| pair.1).collect(),
            pair_slots: pairs.iter().map(|pair| pair.0).collect(),
        }
    }

    /// Each pair by itself through its expert.
    fn expected(&self, frame: &DispatchFrame, slots: &[u16]) -> Vec<u8> {
        let (width, scale_width) = (frame.format.row_bytes(HIDDEN), 4 * frame.format.row_scales(HIDDEN));
        let (backend, one) = (&self.backend, PassLimits { rows: 1, pairs: 1 });
        let queue = &mut backend.queue().unwrap();
        let mut x = backend.alloc_rows(1, HIDDEN).unwrap();
        let mut pass = backend.alloc_pass(one).unwrap();
        let groups = [RowGroup { expert: 0, rows: 1 }];
        backend
            .begin_pass(queue, &PassRows { input: &[0], output: &[0], groups: &groups }, &mut pass)
            .unwrap();
        let mut y = backend.alloc_activations(1, HIDDEN).unwrap();
        let mut memory = backend.staging(RowFormat::combine(self.class).row_bytes(HIDDEN)).unwrap();
        let mut out = Vec::new();
        for (&slot, &token) in frame.pair_slots.iter().zip(&frame.pair_tokens) {
            let token = token as usize;
            let expert = LogicalExpert(slots[slot as usize]);
            let ffn = self.weights.load(ExpertKey { layer: frame.layer, expert }).unwrap();
            let table = backend.expert_table(vec![Arc::new(ffn.ffn)]).unwrap();
            let row = EncodedRows {
                format: frame.format,
                rows: 1,
                cols: HIDDEN,
                data: frame.data.slice(token * width..(token + 1) * width),
                scales: frame.scales.slice(token * scale_width..(token + 1) * scale_width),
            };
            backend.upload_rows(queue, &row, 0, &mut x).unwrap();
            backend.grouped_ffn(queue, &pass, &table, &x, &mut y).unwrap();
            backend.download_activations(queue, &y, 0..1, &mut memory, 0).unwrap();
            out.extend_from_slice(&memory);
        }
        out
    }
}

fn ask(shard: &impl ShardService, frame: DispatchFrame) -> Answer {
    let (sink, answers) = crossbeam_channel::bounded(1);
    shard.submit(frame, Reply::new(Arc::new(OneAnswer(sink)), 7));
    answers.recv_timeout(PATIENCE).unwrap()
}

fn refusal(answer: Answer) -> Refusal {
    match answer.unwrap_err() {
        LinkError::Refused(refusal) => refusal,
        other => panic!("{other}"),
    }
}

const SLOTS: [u16; 3] = [6, 1, 4];
const PAIRS: [(u32, u32); 5] = [(0, 0), (0, 2), (1, 1), (2, 0), (2, 1)];

#[test]
fn rows_are_those_of_each_pair_alone_in_every_class_and_mode() {
    for class in NumericsClass::ALL {
        let bench = Bench::new(class);
        let frame = bench.frame(3, &PAIRS, 0);
        let expected = bench.expected(&frame, &SLOTS);
        for shard in [bench.inline(), bench.spawn()] {
            shard.apply(&placement(1, &SLOTS)).unwrap();
            for _ in 0..3 {
                let combined = ask(&shard, frame.clone()).unwrap();
                assert_eq!(combined.format, RowFormat::combine(class));
                assert!(combined.rows == expected, "class {class}");
            }
            assert_eq!(shard.stats().pairs.load(Ordering::Relaxed), 15);
        }
    }
}

#[test]
fn a_probe_is_answered_with_nothing() {
    let shard = Bench::new(NumericsClass::Fp8).spawn();
    shard.apply(&placement(1, &SLOTS)).unwrap();
    let probe = Bench::new(NumericsClass::Fp8).frame(0, &[], 0);
    assert_eq!(ask(&shard, probe).unwrap().rows, Bytes::new());
}

fn arbitrary_frames() -> impl Strategy<Value = Vec<(usize, Vec<(u32, u32)>)>> {
    let frame = (1_usize..5).prop_flat_map(|tokens| {
        let pair = (0_u32..3, 0..tokens as u32);
        (Just(tokens), prop::collection::btree_set(pair, 0..8))
    });
    let listed = frame.prop_map(|(tokens, pairs)| (tokens, pairs.into_iter().collect()));
    prop::collection::vec(listed, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Merging frames, and cutting the merged rows into passes of any size, changes no bit.
    #[test]
    fn merged_and_split_frames_give_the_rows_of_each_alone(
        frames in arbitrary_frames(),
        max_rows in 1_usize..8,
        class in prop::sample::select(NumericsClass::ALL.to_vec()),
    ) {
        let bench = Bench::new(class);
        let shard = bench.inline();
        shard.apply(&placement(1, &SLOTS)).unwrap();
        let held = shard.inner.held(PlacementEpoch(1)).unwrap();
        let frames: Vec<_> =
            frames.iter().enumerate().map(|(at, (tokens, pairs))| bench.frame(*tokens, pairs, at)).collect();
        let mut receivers = Vec::new();
        let jobs = frames.iter().map(|frame| {
            let (sink, answers) = crossbeam_channel::bounded(1);
            receivers.push(answers);
            let reply = Reply::new(Arc::new(OneAnswer(sink)), 0);
            Job { frame: frame.clone(), reply, held: held.clone(), accepted: Instant::now() }
        }).collect();
        let Executor::Inline(compute) = &shard.inner.executor else { unreachable!() };
        let mut compute = compute.lock();
        compute.set_max_rows(max_rows);
        compute.run(jobs, || 0, None);
        for (frame, answer) in frames.iter().zip(receivers) {
            let combined = answer.try_recv().unwrap().unwrap();
            prop_assert!(combined.rows == bench.expected(frame, &SLOTS));
        }
    }
}

#[test]
fn before_a_placement_frames_are_unavailable_and_strangers_are_told() {
    let bench = Bench::new(NumericsClass::Bf16);
    let shard = bench.inline();
    let early = refusal(ask(&shard, bench.frame(1, &[(0, 0)], 0)));
    assert_eq!(early.code, RefusalCode::Unavailable);
    let mut stranger = bench.frame(1, &[(0, 0)], 0);
    stranger.generation.model = ModelHash([5; 16]);
    assert_eq!(refusal(ask(&shard, stranger)).code, RefusalCode::Generation);
}

#[test]
fn frames_that_do_not_fit_the_placement_are_refused() {
    let bench = Bench::new(NumericsClass::Bf16);
    let shard = bench.spawn();
    shard.apply(&placement(2, &SLOTS)).unwrap();
    assert_eq!(refusal(ask(&shard, bench.frame(1, &[(0, 0)], 0))).code, RefusalCode::Epoch);
    let mut slot = bench.frame(1, &[(3, 0)], 0);
    slot.generation.epoch = PlacementEpoch(2);
    assert_eq!(refusal(ask(&shard, slot)).code, RefusalCode::Malformed);
    assert_eq!(shard.stats().refused[1].load(Ordering::Relaxed), 1);
}

#[test]
fn a_new_placement_keeps_what_is_loaded_and_drops_what_is_not_wanted() {
    let bench = Bench::new(NumericsClass::F32);
    let shard = bench.inline();
    shard.apply(&placement(1, &[0, 1])).unwrap();
    let loads = || bench.weights.loads.load(Ordering::Relaxed);
    assert_eq!(loads(), 4, "two experts in two layers");
    assert_eq!(shard.progress(), Progress { bytes_read: 40, bytes_expected: 40 });
    let (experts, bytes) = shard.resident();
    assert_eq!(experts, 4);
    shard.apply(&placement(2, &[7, 1, 0])).unwrap();
    assert_eq!(loads(), 6, "only expert 7 is new");
    assert_eq!(shard.epoch(), Some(PlacementEpoch(2)));
    shard.apply(&placement(3, &[7])).unwrap();
    assert_eq!((loads(), shard.resident()), (6, (2, bytes / 2)));

    let mut frame = bench.frame(1, &[(0, 0)], 0);
    let expected = bench.expected(&frame, &[7]);
    frame.generation.epoch = PlacementEpoch(3);
    assert!(ask(&shard, frame).unwrap().rows == expected);
}

#[test]
fn placements_are_held_side_by_side_share_experts_and_answer_by_epoch() {
    let bench = Bench::new(NumericsClass::F32);
    let shard = bench.spawn();
    shard.apply(&placement(4, &[0, 1])).unwrap();
    let (_, bytes) = shard.resident();
    let loads = || bench.weights.loads.load(Ordering::Relaxed);
    let go_on = AtomicBool::new(false);
    let next = placement(5, &[1, 7]);
    assert!(!shard.holds(&next));
    shard.hold(&next, &go_on).unwrap();
    assert!(shard.holds(&next));
    assert_eq!((loads(), shard.resident()), (6, (6, bytes / 2 * 3)), "expert 1 is there once");
    assert_eq!((shard.epoch(), shard.epochs()), (Some(PlacementEpoch(4)), [4, 5].map(PlacementEpoch).into()));

    let ask_under = |epoch: u64| {
        let mut frame = bench.frame(1, &[(0, 0)], 0);
        frame.generation.epoch = PlacementEpoch(epoch);
        ask(&shard, frame)
    };
    let expected = |slots: &[u16]| {
        let rows = bench.expected(&bench.frame(1, &[(0, 0)], 0), slots);
        bench.weights.loads.store(6, Ordering::Relaxed);
        rows
    };
    assert!(ask_under(4).unwrap().rows == expected(&[0, 1]));
    assert!(ask_under(5).unwrap().rows == expected(&[1, 7]));
    assert_eq!(refusal(ask_under(6)).code, RefusalCode::Epoch);
    shard.self_test(PlacementEpoch(5), PATIENCE).unwrap();

    // A plan that came to nothing is replaced under its own number or another one.
    let other = placement(5, &[3]);
    assert!(!shard.holds(&other));
    shard.hold(&other, &go_on).unwrap();
    assert!(ask_under(5).unwrap().rows == expected(&[3]));
    shard.put_in_force(PlacementEpoch(5));
    shard.release(|epoch| epoch.0 >= 5);
    assert_eq!(refusal(ask_under(4)).code, RefusalCode::Epoch);
    assert_eq!(shard.resident(), (2, bytes / 2));
    shard.release(|_| false);
    assert_eq!((shard.epoch(), shard.resident()), (None, (0, 0)));
    assert_eq!(refusal(ask_under(5)).code, RefusalCode::Unavailable);
}

#[test]
fn a_load_that_nobody_wants_any_more_is_given_up() {
    let bench = Bench::new(NumericsClass::F32);
    let shard = bench.inline();
    shard.apply(&placement(1, &[0])).unwrap();
    let given_up = AtomicBool::new(true);
    let error = shard.hold(&placement(2, &[0, 6]), &given_up).unwrap_err();
    assert!(matches!(error, ApplyError::GivenUp { epoch: PlacementEpoch(2) }));
    assert_eq!(shard.epochs(), [PlacementEpoch(1)]);
}

#[test]
fn a_placement_that_cannot_be_loaded_leaves_the_former_in_force() {
    let mut bench = Bench::new(NumericsClass::F32);
    let key = ExpertKey { layer: LayerId(5), expert: LogicalExpert(6) };
    Arc::get_mut(&mut bench.weights).unwrap().missing = Some(key);
    let shard = bench.inline();
    shard.apply(&placement(1, &[0])).unwrap();
    let error = shard.apply(&placement(2, &[0, 6])).unwrap_err().to_string();
    assert_eq!(error, "apply epoch 2: load expert 6 of layer 5: no such tensor");
    assert_eq!(shard.epoch(), Some(PlacementEpoch(1)));
    ask(&shard, bench.frame(1, &[(0, 0)], 0)).unwrap();

    let narrow = Placement::new(
        PlacementEpoch(3),
        1,
        vec![LayerPlacement { layer: LayerId(3), slots: vec![vec![LogicalExpert(0)]] }],
    );
    let error = shard.apply(&narrow.unwrap()).unwrap_err().to_string();
    assert_eq!(error, "apply epoch 3: it has 1 shards and we are shard 1");
}

#[test]
fn a_frame_accepted_before_a_flip_is_computed_with_what_it_was_accepted_under() {
    let bench = Bench::new(NumericsClass::F32);
    let shard = bench.inline();
    shard.apply(&placement(1, &SLOTS)).unwrap();
    let frame = bench.frame(3, &PAIRS, 0);
    let expected = bench.expected(&frame, &SLOTS);
    let (sink, answers) = crossbeam_channel::bounded(1);
    let held = shard.inner.held(PlacementEpoch(1)).unwrap();
    let reply = Reply::new(Arc::new(OneAnswer(sink)), 0);
    let job = Job { frame, reply, held, accepted: Instant::now() };
    shard.apply(&placement(2, &[0])).unwrap();
    let Executor::Inline(compute) = &shard.inner.executor else { unreachable!() };
    compute.lock().run(vec![job], || 0, None);
    assert!(answers.try_recv().unwrap().unwrap().rows == expected);
}

#[test]
fn the_self_test_takes_the_way_of_frames() {
    for class in NumericsClass::ALL {
        let bench = Bench::new(class);
        let shard = bench.spawn();
        let epoch = PlacementEpoch(1);
        let untested = shard.self_test(epoch, PATIENCE);
        assert!(matches!(untested, Err(SelfTestError::NothingLoaded { .. })));
        shard.apply(&placement(1, &SLOTS)).unwrap();
        shard.self_test(epoch, PATIENCE).unwrap();
        assert_eq!(shard.stats().pairs.load(Ordering::Relaxed), 6);
    }
}

#[test]
fn weights_that_overflow_do_not_pass_the_self_test() {
    let mut bench = Bench::new(NumericsClass::F32);
    Arc::get_mut(&mut bench.weights).unwrap().scale = 1e30;
    let shard = bench.inline();
    shard.apply(&placement(1, &SLOTS)).unwrap();
    let error = shard.self_test(PlacementEpoch(1), PATIENCE).unwrap_err().to_string();
    assert!(error.contains("self-test of layer 3") && error.contains("not finite"), "{error}");
}

#[test]
fn a_draining_shard_finishes_what_it_has_and_takes_nothing_new() {
    let bench = Bench::new(NumericsClass::F32);
    let shard = bench.spawn();
    shard.apply(&placement(1, &SLOTS)).unwrap();
    let (sink, answers) = crossbeam_channel::bounded(8);
    let sink = Arc::new(OneAnswer(sink));
    for _ in 0..8 {
        shard.submit(bench.frame(3, &PAIRS, 0), Reply::new(sink.clone(), 0));
    }
    shard.drain();
    assert_eq!(refusal(ask(&shard, bench.frame(1, &[(0, 0)], 0))).code, RefusalCode::Unavailable);
    assert!(shard.wait_idle(Instant::now() + PATIENCE));
    assert_eq!(answers.try_iter().filter(Result::is_ok).count(), 8);
}

#[test]
fn cancelled_frames_are_not_computed() {
    struct Gone;
    impl AnswerSink for Gone {
        fn deliver(&self, _: u64, _: Answer) {}
        fn is_cancelled(&self) -> bool {
            true
        }
    }
    let bench = Bench::new(NumericsClass::F32);
    let shard = bench.inline();
    shard.apply(&placement(1, &SLOTS)).unwrap();
    shard.submit(bench.frame(3, &PAIRS, 0), Reply::new(Arc::new(Gone), 0));
    assert_eq!(shard.stats().cancelled.load(Ordering::Relaxed), 1);
    assert_eq!(shard.stats().frames.load(Ordering::Relaxed), 0);
}

#[test]
fn a_shard_whose_thread_is_gone_says_so() {
    let bench = Bench::new(NumericsClass::F32);
    let shard = bench.spawn();
    shard.apply(&placement(1, &SLOTS)).unwrap();
    assert!(!shard.is_dead());
    let Executor::Queue(queue) = &shard.inner.executor else { unreachable!() };
    queue.close();
    assert!(shard.is_dead());
    let gone = refusal(ask(&shard, bench.frame(1, &[(0, 0)], 0)));
    assert_eq!(gone.code, RefusalCode::Unavailable);
    assert!(gone.message.contains("the compute thread is gone"));
}
