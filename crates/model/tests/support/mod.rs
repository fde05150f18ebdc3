//! What the model's tests share: the bundled checkpoint on the CPU backend, experts computed in place,
//! and the golden tensors.
#![allow(
    clippy::unwrap_used,
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "test support; not every test uses all of it"
)]

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use cadre_checkpoint::Checkpoint;
use cadre_model::{
    ExpertKey, ExpertLoader, LoadOptions, LogitRows, Model, Segment, SegmentKind, StepBatch, StepObserver,
    StepOutput, Workspace,
};
use cadre_ops::{
    Backend, DispatchBatch, ExchangeError, ExchangeTicket, ExpertChunk, ExpertExchange, ExpertRows, KvLayout,
    PassLimits, PassRows, RowFormat, RowGroup,
};
use cadre_ops_cpu::{CpuBackend, CpuOptions};
use cadre_types::{LogicalExpert, NumericsClass, PageId, TokenId};

/// Longest sequence of the tests, in pages.
pub const PAGES: usize = 50;

/// Where the repository's files are, for a program that was carried to another machine.
pub static ROOT: OnceLock<PathBuf> = OnceLock::new();

pub fn repo(path: &str) -> PathBuf {
    ROOT.get_or_init(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).join(path)
}

/// A tensor of a golden file, as F32 or I32 bits.
pub struct Golden(Vec<u8>);

impl Golden {
    pub fn case(case: usize) -> Self {
        Self(std::fs::read(repo(&format!("tests/golden/case{case}.safetensors"))).unwrap())
    }

    pub fn names(&self) -> Vec<String> {
        let tensors = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        tensors.names().into_iter().map(|name| name.to_string()).collect()
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        let tensors = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        let view = tensors.tensor(name).unwrap();
        assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub fn u32(&self, name: &str) -> Vec<u32> {
        let tensors = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        let view = tensors.tensor(name).unwrap();
        assert_eq!(view.dtype(), safetensors::Dtype::I32, "{name}");
        view.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

/// The bundled model with all its experts in this process.
pub struct Pocket<B: Backend = CpuBackend> {
    pub model: Model<B>,
    pub experts: InPlaceExperts<B>,
    pub ws: Workspace<B>,
    pub cache: B::KvCache,
}

impl Pocket {
    pub fn open(class: NumericsClass, max_rows: usize) -> Self {
        let backend = CpuBackend::new(CpuOptions::new(class)).unwrap();
        Self::on(backend, max_rows)
    }
}

impl<B: Backend> Pocket<B> {
    pub fn on(backend: B, max_rows: usize) -> Self {
        let backend = Arc::new(backend);
        let checkpoint = Arc::new(Checkpoint::open(repo("models/pocket")).unwrap());
        let model =
            Model::load(backend.clone(), &checkpoint, &LoadOptions { mtp: true }, &mut |_| {}).unwrap();
        let loader = ExpertLoader::new(backend.clone(), checkpoint);
        let experts = InPlaceExperts::load(&loader);
        let ws = Workspace::new(&model, max_rows, max_rows).unwrap();
        let cache = model.new_cache(PAGES).unwrap();
        Self { model, experts, ws, cache }
    }

    /// Computes rows of one sequence at `first`, observed.
    pub fn step(
        &mut self,
        kind: SegmentKind,
        tokens: &[TokenId],
        first: usize,
        table: &[PageId],
        observer: &mut dyn StepObserver<B>,
    ) -> StepOutput {
        let batch = StepBatch {
            segments: vec![Segment {
                kind,
                tokens,
                first_position: first as u32,
                block_table: table,
                logits: LogitRows::All,
            }],
        };
        self.model.forward(&mut self.ws, &batch, &mut self.cache, &mut self.experts, observer).unwrap();
        self.model.read(&mut self.ws).unwrap()
    }

    /// Prefills in chunks; returns the outputs of all rows.
    pub fn prefill(&mut self, tokens: &[TokenId], chunk: usize, table: &[PageId]) -> StepOutput {
        let mut all = StepOutput::default();
        for (index, part) in tokens.chunks(chunk).enumerate() {
            let out = self.step(SegmentKind::Prefill, part, index * chunk, table, &mut ());
            all.logits.extend(out.logits);
            all.hidden.extend(out.hidden);
        }
        all
    }

    /// The MTP module over a whole sequence, in prefill form.
    pub fn mtp(&mut self, next: &[TokenId], hidden: &[f32], table: &[PageId]) -> StepOutput {
        let batch = StepBatch {
            segments: vec![Segment {
                kind: SegmentKind::Prefill,
                tokens: next,
                first_position: 0,
                block_table: table,
                logits: LogitRows::All,
            }],
        };
        self.model
            .forward_mtp(&mut self.ws, &batch, hidden, &mut self.cache, &mut self.experts, &mut ())
            .unwrap();
        self.model.read(&mut self.ws).unwrap()
    }

    /// Bytes of every layer's cached rows of a sequence.
    pub fn kv(&mut self, table: &[PageId], tokens: usize) -> Vec<Vec<u8>> {
        let backend = self.model.backend().clone();
        let width = RowFormat::combine(backend.class()).row_bytes(self.model.config().kv_width());
        (0..self.model.config().num_hidden_layers)
            .map(|layer| {
                let mut rows = backend.staging(tokens * width).unwrap();
                let queue = self.ws.queue();
                backend.kv_read(queue, &self.cache, layer, table, 0, tokens, &mut rows, 0).unwrap();
                rows.as_ref().to_vec()
            })
            .collect()
    }
}

/// Pages `0..` in order.
pub fn table(tokens: usize) -> Vec<PageId> {
    (0..tokens.div_ceil(KvLayout::PAGE_TOKENS)).map(|page| PageId(page as u32)).collect()
}

pub fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best as u32
}

/// Largest difference of a row relative to the expected row's largest magnitude.
pub fn relative_distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let distance = found.iter().zip(expected).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(found.iter().all(|v| v.is_finite()));
    distance / largest.max(1e-20)
}

/// All routed experts on one backend, computed when asked: the exchange with nothing in between.
pub struct InPlaceExperts<B: Backend> {
    backend: Arc<B>,
    first_layer: usize,
    layers: Vec<B::ExpertTable>,
    done: VecDeque<(ExchangeTicket, ExpertRows)>,
    next: u64,
}

impl<B: Backend> InPlaceExperts<B> {
    pub fn load(loader: &ExpertLoader<B>) -> Self {
        let config = loader.config();
        let backend = loader.backend().clone();
        let layers = config
            .moe_layers()
            .map(|layer| {
                let experts = (0..config.n_routed_experts as u16)
                    .map(|e| Arc::new(loader.load(ExpertKey { layer, expert: LogicalExpert(e) }).unwrap()))
                    .collect();
                backend.expert_table(experts).unwrap()
            })
            .collect();
        Self { backend, first_layer: config.first_k_dense_replace, layers, done: VecDeque::new(), next: 0 }
    }
}

impl<B: Backend> ExpertExchange for InPlaceExperts<B> {
    fn dispatch(&mut self, batch: DispatchBatch<'_>) -> Result<ExchangeTicket, ExchangeError> {
        let experts = &self.layers[batch.layer.index() - self.first_layer];
        let (pairs, hidden) = (batch.topk_idx.len(), batch.activations.cols);
        // Pairs by expert, then token; results in the order of pairs.
        let mut order: Vec<u32> = (0..pairs as u32).collect();
        order.sort_by_key(|&pair| (batch.topk_idx[pair as usize], pair));
        let tokens: Vec<u32> = order.iter().map(|pair| pair / batch.top_k as u32).collect();
        let mut groups: Vec<RowGroup> = Vec::new();
        for &pair in &order {
            let expert = usize::from(batch.topk_idx[pair as usize]);
            match groups.last_mut() {
                Some(group) if group.expert == expert => group.rows += 1,
                _ => groups.push(RowGroup { expert, rows: 1 }),
            }
        }
        let backend = &*self.backend;
        let queue = &mut backend.queue().unwrap();
        let rows = batch.activations.rows;
        let mut received = backend.alloc_rows(rows, hidden).unwrap();
        backend.upload_rows(queue, batch.activations, 0, &mut received).unwrap();
        let mut pass = backend.alloc_pass(PassLimits { rows, pairs }).unwrap();
        let described = PassRows { input: &tokens, output: &order, groups: &groups };
        backend.begin_pass(queue, &described, &mut pass).unwrap();
        let mut results = backend.alloc_activations(pairs, hidden).unwrap();
        backend.grouped_ffn(queue, &pass, experts, &received, &mut results).unwrap();
        let format = RowFormat::combine(backend.class());
        let mut memory = backend.staging(pairs * format.row_bytes(hidden)).unwrap();
        backend.download_activations(queue, &results, 0..pairs, &mut memory, 0).unwrap();
        backend.synchronize(queue).unwrap();
        let targets = (0..pairs as u32).collect();
        let chunks = vec![ExpertChunk { rows: Bytes::from_owner(memory), targets }];
        self.next += 1;
        let ticket = ExchangeTicket(self.next);
        self.done.push_back((ticket, ExpertRows { format, pairs, hidden, chunks }));
        Ok(ticket)
    }

    fn combine(&mut self, ticket: ExchangeTicket, out: &mut ExpertRows) -> Result<(), ExchangeError> {
        let (done, rows) = self.done.pop_front().unwrap();
        assert_eq!(done, ticket);
        *out = rows;
        Ok(())
    }
}
