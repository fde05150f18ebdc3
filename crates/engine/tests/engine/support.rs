//! A checkpoint, engines over it, and an exchange with switches.

use std::{
    path::Path,
    sync::{Arc, Condvar, LazyLock, Mutex},
    time::Duration,
};

use cadre_checkpoint::{
    Checkpoint,
    synth::{self, SynthSpec, WeightFormat},
};
use cadre_engine::{
    Engine, EngineEvent, EngineHandle, EngineParts, GeneratedToken, PrefillPlace, SequenceRequest,
    SequenceStream,
};
use cadre_model::{ExpertKey, ExpertLoader, LoadOptions, Model};
use cadre_ops::{
    Backend, DispatchBatch, EncodedRows, ExchangeError, ExchangeTicket, ExpertChunk, ExpertExchange,
    ExpertRows, Ffn, PassLimits, PassRows, RowFormat, RowGroup, reference::ReferenceBackend,
};
use cadre_scheduler::SchedulerConfig;
use cadre_types::{
    FinishReason, LayerId, LogicalExpert, ModelConfig, NumericsClass, PlacementEpoch, SamplingParams,
    StopConditions, TokenId,
};

/// One checkpoint for all tests of the process; the folder goes with it.
static CHECKPOINT: LazyLock<(tempfile::TempDir, Arc<Checkpoint>)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    write(&path);
    let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
    (dir, checkpoint)
});

fn write(path: &Path) {
    let mut spec = SynthSpec::tiny(WeightFormat::Bf16, 7).with_mtp(false);
    spec.config = ModelConfig {
        vocab_size: 256,
        hidden_size: 128,
        num_hidden_layers: 3,
        intermediate_size: 128,
        n_routed_experts: 8,
        num_experts_per_tok: 2,
        num_attention_heads: 2,
        max_position_embeddings: 512,
        ..spec.config
    };
    synth::write(path, &spec, &|_, _| {}).unwrap();
}

pub(crate) fn config() -> ModelConfig {
    CHECKPOINT.1.config().clone()
}

/// Pages of a test engine: 24 sequences of a page each, and then some.
pub(crate) const PAGES: u32 = 40;

/// What a test engine is made of.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) scheduler: SchedulerConfig,
    pub(crate) handoff_timeout: Duration,
    pub(crate) handoff_begin_timeout: Duration,
    pub(crate) max_unread_bytes: u64,
    pub(crate) switches: Arc<Switches>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            scheduler: SchedulerConfig::with_pages(PAGES),
            // Nothing in a test waits that long: a hand-off that ends by time-out has to ask for it.
            handoff_timeout: Duration::from_secs(600),
            handoff_begin_timeout: Duration::from_secs(600),
            max_unread_bytes: u64::MAX,
            switches: Arc::default(),
        }
    }
}

impl Setup {
    pub(crate) fn spawn(&self) -> Engine {
        let backend = Arc::new(ReferenceBackend::new(NumericsClass::Bf16));
        let checkpoint = Arc::clone(&CHECKPOINT.1);
        let model =
            Model::load(Arc::clone(&backend), &checkpoint, &LoadOptions { mtp: false }, &mut |_| {}).unwrap();
        let exchange = InlineExperts::new(backend, checkpoint, Arc::clone(&self.switches));
        Engine::spawn(EngineParts {
            handoff_timeout: self.handoff_timeout,
            handoff_begin_timeout: self.handoff_begin_timeout,
            max_unread_bytes: self.max_unread_bytes,
            ..EngineParts::new(model, self.scheduler.clone(), Box::new(exchange))
        })
        .unwrap()
    }
}

/// Commands to the exchange.
#[derive(Debug, Default)]
pub(crate) struct Switches {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Exchanges wait.
    held: bool,
    /// Exchanges that may pass all the same.
    permits: usize,
    /// An exchange waits now.
    waiting: bool,
    /// The next exchange fails.
    fail: bool,
}

impl State {
    fn stuck(&self) -> bool {
        self.held && self.permits == 0
    }
}

impl Switches {
    /// Steps stop at their next expert layer until released.
    pub(crate) fn hold(&self) {
        self.state.lock().unwrap().held = true;
    }

    pub(crate) fn release(&self) {
        self.state.lock().unwrap().held = false;
        self.changed.notify_all();
    }

    /// Lets so many exchanges through the hold.
    pub(crate) fn let_through(&self, exchanges: usize) {
        self.state.lock().unwrap().permits += exchanges;
        self.changed.notify_all();
    }

    /// Waits until a step has come to the hold and cannot go on.
    pub(crate) fn wait_held(&self) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| !(state.waiting && state.stuck())).unwrap());
    }

    /// The next exchange finds no live copy.
    pub(crate) fn fail_next(&self) {
        self.state.lock().unwrap().fail = true;
    }

    fn pass(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        if state.stuck() {
            state.waiting = true;
            self.changed.notify_all();
            state = self.changed.wait_while(state, |state| state.stuck()).unwrap();
            state.waiting = false;
        }
        state.permits = state.permits.saturating_sub(1);
        !std::mem::take(&mut state.fail)
    }
}

/// Routed experts on the calling thread.
struct InlineExperts {
    backend: Arc<ReferenceBackend>,
    loader: ExpertLoader<ReferenceBackend>,
    experts: std::collections::BTreeMap<ExpertKey, Arc<Ffn<<ReferenceBackend as Backend>::Weight>>>,
    switches: Arc<Switches>,
    pending: Option<Pending>,
    tickets: u64,
}

struct Pending {
    layer: LayerId,
    top_k: usize,
    activations: EncodedRows,
    topk_idx: Vec<u16>,
}

impl InlineExperts {
    fn new(backend: Arc<ReferenceBackend>, checkpoint: Arc<Checkpoint>, switches: Arc<Switches>) -> Self {
        let loader = ExpertLoader::new(Arc::clone(&backend), checkpoint);
        Self { backend, loader, experts: Default::default(), switches, pending: None, tickets: 0 }
    }
}

impl ExpertExchange for InlineExperts {
    fn dispatch(&mut self, batch: DispatchBatch<'_>) -> Result<ExchangeTicket, ExchangeError> {
        self.pending = Some(Pending {
            layer: batch.layer,
            top_k: batch.top_k,
            activations: batch.activations.clone(),
            topk_idx: batch.topk_idx.to_vec(),
        });
        self.tickets += 1;
        Ok(ExchangeTicket(self.tickets))
    }

    fn combine(&mut self, _ticket: ExchangeTicket, out: &mut ExpertRows) -> Result<(), ExchangeError> {
        let pending = self.pending.take().unwrap();
        let layer = pending.layer;
        if !self.switches.pass() {
            return Err(ExchangeError::Uncovered {
                layer,
                expert: LogicalExpert(pending.topk_idx[0]),
                epoch: PlacementEpoch(1),
                waited_ms: 0,
                causes: "switched off".into(),
            });
        }
        let backend = &*self.backend;
        let queue = &mut backend.queue().unwrap();
        let (rows, cols) = (pending.activations.rows, pending.activations.cols);
        let mut received = backend.alloc_rows(rows, cols).unwrap();
        backend.upload_rows(queue, &pending.activations, 0, &mut received).unwrap();
        out.format = RowFormat::combine(backend.class());
        out.pairs = pending.topk_idx.len();
        out.hidden = cols;
        out.chunks.clear();
        let mut output = backend.alloc_activations(rows, cols).unwrap();
        let mut pass = backend.alloc_pass(PassLimits { rows, pairs: rows }).unwrap();
        let mut chosen = pending.topk_idx.clone();
        chosen.sort_unstable();
        chosen.dedup();
        for expert in chosen {
            let key = ExpertKey { layer, expert: LogicalExpert(expert) };
            let ffn = self.experts.entry(key).or_insert_with(|| Arc::new(self.loader.load(key).unwrap()));
            let table = backend.expert_table(vec![Arc::clone(ffn)]).unwrap();
            let targets: Vec<u32> =
                (0..out.pairs as u32).filter(|&target| pending.topk_idx[target as usize] == expert).collect();
            let input: Vec<u32> = targets.iter().map(|target| target / pending.top_k as u32).collect();
            let order: Vec<u32> = (0..targets.len() as u32).collect();
            let groups = [RowGroup { expert: 0, rows: targets.len() }];
            let described = PassRows { input: &input, output: &order, groups: &groups };
            backend.begin_pass(queue, &described, &mut pass).unwrap();
            backend.grouped_ffn(queue, &pass, &table, &received, &mut output).unwrap();
            let mut rows = backend.staging(targets.len() * out.row_bytes()).unwrap();
            backend.download_activations(queue, &output, 0..targets.len(), &mut rows, 0).unwrap();
            out.chunks.push(ExpertChunk { rows: rows.into(), targets });
        }
        Ok(())
    }
}

/// A prompt that depends on `seed`.
pub(crate) fn prompt(seed: u32, tokens: u32) -> Vec<TokenId> {
    (0..tokens).map(|at| (seed.wrapping_mul(2_654_435_761) ^ (at * 40_503)) % 251 + 2).collect()
}

/// A request that samples at temperature 1 with logprobs, ignores EOS and gives `max_tokens` tokens.
pub(crate) fn request(name: &str, prompt: Vec<TokenId>, max_tokens: u32) -> SequenceRequest {
    SequenceRequest {
        request_id: name.to_owned(),
        prompt,
        sampling: SamplingParams { seed: 11, logprobs: Some(3), ..SamplingParams::default() },
        stop: StopConditions { max_tokens, ignore_eos: true, ..StopConditions::default() },
        prefill: PrefillPlace::Local,
        deadline: None,
    }
}

/// How a sequence went.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) reserved: usize,
    pub(crate) tokens: Vec<GeneratedToken>,
    pub(crate) end: Result<FinishReason, cadre_engine::EngineError>,
}

impl Outcome {
    pub(crate) fn ids(&self) -> Vec<TokenId> {
        self.tokens.iter().map(|token| token.token).collect()
    }

    /// The tokens of a sequence that must have finished.
    #[track_caller]
    pub(crate) fn finished(self) -> Vec<GeneratedToken> {
        match self.end {
            Ok(_) => self.tokens,
            Err(error) => panic!("{error}"),
        }
    }

    /// The failure of a sequence that must have failed.
    #[track_caller]
    pub(crate) fn failed(self) -> cadre_engine::EngineError {
        match self.end {
            Ok(reason) => panic!("finished: {reason:?}"),
            Err(error) => error,
        }
    }
}

/// Reads a sequence to its end.
pub(crate) async fn outcome(mut events: SequenceStream) -> Outcome {
    let (mut reserved, mut tokens) = (0, Vec::new());
    let end = loop {
        match events.recv().await {
            Some(EngineEvent::Reserved) => reserved += 1,
            Some(EngineEvent::Token(token)) => tokens.push(token),
            Some(EngineEvent::Computed(_)) => {}
            Some(EngineEvent::Finished(reason)) => break Ok(reason),
            Some(EngineEvent::Failed(error)) => break Err(error),
            None => panic!("the stream ends without an end"),
        }
    };
    assert!(events.recv().await.is_none(), "something follows the end");
    Outcome { reserved, tokens, end }
}

/// Waits until no sequence is left and every page is free.
pub(crate) async fn wait_empty(engine: &EngineHandle) {
    loop {
        let load = engine.stats().load();
        if load.running + load.waiting == 0 {
            assert_eq!(load.pages_free, load.pages_total, "pages leak");
            return;
        }
        tokio::task::yield_now().await;
    }
}
