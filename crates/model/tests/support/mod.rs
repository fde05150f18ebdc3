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
    path::{Path, PathBuf},
    sync::Arc,
};

use cadre_checkpoint::Checkpoint;
use cadre_model::{
    ExpertKey, ExpertLoader, LoadOptions, LogitRows, Model, Segment, SegmentKind, StepBatch, StepObserver,
    StepOutput, Workspace,
};
use cadre_ops::{
    Backend, DispatchBatch, ExchangeError, ExchangeTicket, ExpertExchange, ExpertRows, HostRows, KvLayout,
    RowFormat, RowGroup, backend::Ffn,
};
use cadre_ops_cpu::{CpuBackend, CpuOptions};
use cadre_types::{LogicalExpert, NumericsClass, PageId, TokenId};

/// Longest sequence of the tests, in pages.
pub const PAGES: usize = 50;

pub fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
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
        let ws = Workspace::new(&model, max_rows).unwrap();
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
        let mut out = StepOutput::default();
        let batch = StepBatch {
            segments: vec![Segment {
                kind,
                tokens,
                first_position: first as u32,
                block_table: table,
                logits: LogitRows::All,
            }],
        };
        self.model
            .forward(&mut self.ws, &batch, &mut self.cache, &mut self.experts, observer, &mut out)
            .unwrap();
        out
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
        let bytes: Vec<u8> = hidden.iter().flat_map(|value| value.to_le_bytes()).collect();
        let width = self.model.config().hidden_size;
        let mut out = StepOutput::default();
        let batch = StepBatch {
            segments: vec![Segment {
                kind: SegmentKind::Prefill,
                tokens: next,
                first_position: 0,
                block_table: table,
                logits: LogitRows::All,
            }],
        };
        let hidden =
            HostRows { format: RowFormat::F32, rows: next.len(), cols: width, data: &bytes, scales: &[] };
        self.model
            .forward_mtp(&mut self.ws, &batch, hidden, &mut self.cache, &mut self.experts, &mut (), &mut out)
            .unwrap();
        out
    }

    /// Bytes of every layer's cached rows of a sequence.
    pub fn kv(&mut self, table: &[PageId], tokens: usize) -> Vec<Vec<u8>> {
        let backend = self.model.backend().clone();
        (0..self.model.config().num_hidden_layers)
            .map(|layer| {
                let mut rows = Vec::new();
                let queue = self.ws.queue();
                backend.kv_read(queue, &self.cache, layer, table, 0, tokens, &mut rows).unwrap();
                rows
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
    hidden: usize,
    first_layer: usize,
    layers: Vec<Vec<Ffn<B::Weight>>>,
    done: Option<(ExchangeTicket, ExpertRows)>,
    next: u64,
}

impl<B: Backend> InPlaceExperts<B> {
    pub fn load(loader: &ExpertLoader<B>) -> Self {
        let config = loader.config();
        let layers = config
            .moe_layers()
            .map(|layer| {
                (0..config.n_routed_experts as u16)
                    .map(|e| loader.load(ExpertKey { layer, expert: LogicalExpert(e) }).unwrap())
                    .collect()
            })
            .collect();
        Self {
            backend: loader.backend().clone(),
            hidden: config.hidden_size,
            first_layer: config.first_k_dense_replace,
            layers,
            done: None,
            next: 0,
        }
    }
}

impl<B: Backend> ExpertExchange for InPlaceExperts<B> {
    fn dispatch(&mut self, batch: DispatchBatch<'_>) -> Result<ExchangeTicket, ExchangeError> {
        let experts = &self.layers[batch.layer.index() - self.first_layer];
        let pairs = batch.topk_idx.len();
        // Pairs by expert, then token.
        let mut order: Vec<usize> = (0..pairs).collect();
        order.sort_by_key(|&pair| (batch.topk_idx[pair], pair));
        let tokens: Vec<usize> = order.iter().map(|&pair| pair / batch.top_k).collect();
        let mut groups = Vec::new();
        for (row, &pair) in order.iter().enumerate() {
            let expert = usize::from(batch.topk_idx[pair]);
            match groups.last_mut() {
                Some(RowGroup { expert: last, rows, .. }) if *last == expert => *rows += 1,
                _ => groups.push(RowGroup { expert, first_row: row, rows: 1 }),
            }
        }
        let backend = &*self.backend;
        let mut queue = backend.queue().unwrap();
        let mut input = backend.alloc(batch.activations.rows.max(1), self.hidden).unwrap();
        let mut gathered = backend.alloc(pairs.max(1), self.hidden).unwrap();
        let mut output = backend.alloc(pairs.max(1), self.hidden).unwrap();
        backend.upload_rows(&mut queue, batch.activations, &mut input).unwrap();
        backend.gather_rows(&mut queue, &input, &tokens, &mut gathered).unwrap();
        let refs: Vec<&Ffn<B::Weight>> = experts.iter().collect();
        backend.grouped_ffn(&mut queue, &gathered, &refs, &groups, &mut output).unwrap();
        let format = RowFormat::combine(backend.class());
        let (mut data, mut scales) = (Vec::new(), Vec::new());
        backend.download_rows(&mut queue, &output, pairs, format, &mut data, &mut scales).unwrap();
        let width = format.row_bytes(self.hidden);
        let mut rows = vec![0u8; data.len()];
        for (row, &pair) in order.iter().enumerate() {
            rows[pair * width..][..width].copy_from_slice(&data[row * width..][..width]);
        }
        self.next += 1;
        let ticket = ExchangeTicket(self.next);
        self.done = Some((ticket, ExpertRows { format, rows: pairs, hidden: self.hidden, data: rows }));
        Ok(ticket)
    }

    fn combine(&mut self, ticket: ExchangeTicket, out: &mut ExpertRows) -> Result<(), ExchangeError> {
        let (done, rows) = self.done.take().unwrap();
        assert_eq!(done, ticket);
        *out = rows;
        Ok(())
    }
}
