//! The step: embedding, blocks, head. One queue, buffers that live as long as the worker.
//!
//! Rows of all segments go through the dense operations together; attention is done segment by segment
//! in the form of its kind. Nothing here depends on how rows are grouped into steps: every operation
//! computes a row from that row, its sequence's cache and the weights alone.

use cadre_ops::{
    Backend, DispatchBatch, ExchangeError, ExpertExchange, ExpertRows, HostRows, OpsError, RowFormat,
    shape::{DecodeRow, PrefillSegment},
};
use cadre_types::{LayerId, PageId, Position, TokenId};

use crate::{
    batch::{SegmentKind, StepBatch, StepOutput},
    loader::{Layer, Mlp, Model, Query},
};

/// Why a step failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ModelError {
    /// The backend failed or refused an argument.
    #[error("{layer}, {operation}: {source}")]
    Backend {
        /// Where in the network (the layer after the last for the head).
        layer: LayerId,
        /// What was computed.
        operation: &'static str,
        /// What the backend said.
        source: OpsError,
    },
    /// Routed experts could not be had.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// More rows than the workspace holds.
    #[error("step of {rows} rows: the workspace holds {capacity}")]
    TooManyRows {
        /// Rows of the step.
        rows: usize,
        /// The workspace's bound.
        capacity: usize,
    },
    /// An observer refused to go on.
    #[error("{layer}: {message}")]
    Observer {
        /// The layer.
        layer: LayerId,
        /// The observer's reason.
        message: String,
    },
    /// The MTP module is not loaded.
    #[error("the MTP module is not loaded")]
    NoMtp,
}

/// A point in a block where an activation can be observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// Output of o_proj, `[rows, hidden]`.
    Attention,
    /// The residual stream after the block, `[rows, hidden]`.
    Block,
}

/// Watches a step from inside. Every method does nothing unless overridden.
pub trait StepObserver<B: Backend> {
    /// The layer's KV rows of this step are in the cache: a hand-off may read them.
    fn kv_ready(
        &mut self,
        _backend: &B,
        _queue: &mut B::Queue,
        _layer: LayerId,
        _cache: &B::KvCache,
    ) -> Result<(), ModelError> {
        Ok(())
    }

    /// The gate has chosen: `[rows, top_k]`, ascending expert id within a row.
    fn routed(&mut self, _layer: LayerId, _topk_idx: &[u16], _topk_weights: &[f32]) {}

    /// An activation is computed.
    fn activation(
        &mut self,
        _backend: &B,
        _queue: &mut B::Queue,
        _layer: LayerId,
        _site: Site,
        _buffer: &B::Buffer,
        _rows: usize,
    ) -> Result<(), ModelError> {
        Ok(())
    }
}

impl<B: Backend> StepObserver<B> for () {}

/// Buffers and queue of one step loop.
pub struct Workspace<B: Backend> {
    queue: B::Queue,
    capacity: usize,
    residual: B::Buffer,
    normed: B::Buffer,
    q_latent: B::Buffer,
    q_latent_normed: B::Buffer,
    query: B::Buffer,
    kv_a: B::Buffer,
    attended: B::Buffer,
    projected: B::Buffer,
    wanted: B::Buffer,
    mtp: Option<MtpBuffers<B>>,
    ids: Vec<TokenId>,
    positions: Vec<Position>,
    topk_idx: Vec<u16>,
    topk_weights: Vec<f32>,
    payload: Vec<u8>,
    scales: Vec<u8>,
    expert_rows: ExpertRows,
}

struct MtpBuffers<B: Backend> {
    hidden: B::Buffer,
    hidden_normed: B::Buffer,
    pair: B::Buffer,
}

impl<B: Backend> Workspace<B> {
    /// Buffers for steps of at most `max_rows` rows.
    pub fn new(model: &Model<B>, max_rows: usize) -> Result<Self, OpsError> {
        let backend = &*model.backend;
        let config = &model.config;
        let hidden = config.hidden_size;
        let q_latent = config.q_lora_rank.unwrap_or(1);
        let alloc = |cols: usize| backend.alloc(max_rows, cols);
        let mtp = model
            .mtp
            .is_some()
            .then(|| -> Result<_, OpsError> {
                Ok(MtpBuffers {
                    hidden: alloc(hidden)?,
                    hidden_normed: alloc(hidden)?,
                    pair: alloc(2 * hidden)?,
                })
            })
            .transpose()?;
        Ok(Self {
            queue: backend.queue()?,
            capacity: max_rows,
            residual: alloc(hidden)?,
            normed: alloc(hidden)?,
            q_latent: alloc(q_latent)?,
            q_latent_normed: alloc(q_latent)?,
            query: alloc(config.num_attention_heads * config.qk_head_dim())?,
            kv_a: alloc(config.kv_width())?,
            attended: alloc(config.num_attention_heads * config.v_head_dim)?,
            projected: alloc(hidden)?,
            wanted: alloc(hidden)?,
            mtp,
            ids: Vec::new(),
            positions: Vec::new(),
            topk_idx: Vec::new(),
            topk_weights: Vec::new(),
            payload: Vec::new(),
            scales: Vec::new(),
            expert_rows: ExpertRows::default(),
        })
    }

    /// Most rows of a step.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The queue, for cache transfers between steps.
    pub fn queue(&mut self) -> &mut B::Queue {
        &mut self.queue
    }
}

/// The batch in the backend's terms.
struct Rows<'a> {
    count: usize,
    tables: Vec<&'a [PageId]>,
    prefill: Vec<PrefillSegment<'a>>,
    decode: Vec<DecodeRow<'a>>,
    wanted: Vec<usize>,
}

impl<'a> Rows<'a> {
    fn of(batch: &StepBatch<'a>) -> Self {
        let mut rows = Self {
            count: 0,
            tables: Vec::with_capacity(batch.rows()),
            prefill: Vec::new(),
            decode: Vec::new(),
            wanted: batch.logit_rows().collect(),
        };
        for segment in &batch.segments {
            let first_row = rows.count;
            let len = segment.tokens.len();
            rows.tables.extend(std::iter::repeat_n(segment.block_table, len));
            match segment.kind {
                SegmentKind::Prefill => rows.prefill.push(PrefillSegment {
                    first_row,
                    rows: len,
                    first_position: segment.first_position,
                    block_table: segment.block_table,
                }),
                SegmentKind::Decode => rows.decode.extend((0..len).map(|row| DecodeRow {
                    row: first_row + row,
                    position: segment.first_position + row as Position,
                    block_table: segment.block_table,
                })),
            }
            rows.count += len;
        }
        rows
    }
}

fn at(layer: LayerId, operation: &'static str) -> impl Fn(OpsError) -> ModelError {
    move |source| ModelError::Backend { layer, operation, source }
}

impl<B: Backend> Model<B> {
    /// Computes a step: writes the rows' KV into `cache`, and logits and final hidden states of the wanted
    /// rows into `out`.
    pub fn forward(
        &self,
        ws: &mut Workspace<B>,
        batch: &StepBatch<'_>,
        cache: &mut B::KvCache,
        experts: &mut dyn ExpertExchange,
        observer: &mut dyn StepObserver<B>,
        out: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let rows = self.begin(ws, batch)?;
        self.backend
            .embed(&mut ws.queue, &self.embed, &ws.ids, &mut ws.residual)
            .map_err(at(LayerId(0), "embed"))?;
        for (index, layer) in self.layers.iter().enumerate() {
            self.block(ws, &rows, LayerId(index as u16), layer, cache, experts, observer)?;
        }
        self.finish(ws, &rows, &self.norm, out)
    }

    /// Computes the MTP module for rows whose next tokens are `batch`'s tokens and whose main hidden states
    /// after the final norm are `hidden` (`[rows, hidden_size]`): logits for the token after the next.
    /// The module has its own cache layer, after the main ones.
    #[allow(clippy::too_many_arguments, reason = "as forward, with the main model's hidden states")]
    pub fn forward_mtp(
        &self,
        ws: &mut Workspace<B>,
        batch: &StepBatch<'_>,
        hidden: HostRows<'_>,
        cache: &mut B::KvCache,
        experts: &mut dyn ExpertExchange,
        observer: &mut dyn StepObserver<B>,
        out: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let mtp = self.mtp.as_ref().ok_or(ModelError::NoMtp)?;
        let rows = self.begin(ws, batch)?;
        let layer = LayerId(self.layers.len() as u16);
        let eps = self.config.rms_norm_eps;
        let backend = &*self.backend;
        let queue = &mut ws.queue;
        let buffers = ws.mtp.as_mut().ok_or(ModelError::NoMtp)?;
        backend
            .embed(queue, &self.embed, &ws.ids, &mut ws.projected)
            .and_then(|()| {
                backend.rms_norm(queue, &ws.projected, &mtp.enorm, eps, rows.count, &mut ws.normed)
            })
            .and_then(|()| backend.upload_rows(queue, hidden, &mut buffers.hidden))
            .and_then(|()| {
                let normed = &mut buffers.hidden_normed;
                backend.rms_norm(queue, &buffers.hidden, &mtp.hnorm, eps, rows.count, normed)
            })
            .and_then(|()| {
                backend.concat(queue, &ws.normed, &buffers.hidden_normed, rows.count, &mut buffers.pair)
            })
            .and_then(|()| backend.linear(queue, &buffers.pair, &mtp.eh_proj, rows.count, &mut ws.residual))
            .map_err(at(layer, "mtp input"))?;
        self.block(ws, &rows, layer, &mtp.block, cache, experts, observer)?;
        self.finish(ws, &rows, &mtp.norm, out)
    }

    fn begin<'a>(&self, ws: &mut Workspace<B>, batch: &StepBatch<'a>) -> Result<Rows<'a>, ModelError> {
        let rows = Rows::of(batch);
        if rows.count > ws.capacity {
            return Err(ModelError::TooManyRows { rows: rows.count, capacity: ws.capacity });
        }
        ws.ids.clear();
        ws.positions.clear();
        for segment in &batch.segments {
            ws.ids.extend_from_slice(segment.tokens);
            ws.positions
                .extend((0..segment.tokens.len()).map(|row| segment.first_position + row as Position));
        }
        Ok(rows)
    }

    #[allow(clippy::too_many_arguments, reason = "one block of a step")]
    fn block(
        &self,
        ws: &mut Workspace<B>,
        rows: &Rows<'_>,
        id: LayerId,
        layer: &Layer<B>,
        cache: &mut B::KvCache,
        experts: &mut dyn ExpertExchange,
        observer: &mut dyn StepObserver<B>,
    ) -> Result<(), ModelError> {
        let backend = &*self.backend;
        self.attention(ws, rows, id, layer, cache, observer)?;
        observer.activation(backend, &mut ws.queue, id, Site::Attention, &ws.projected, rows.count)?;
        backend
            .add(&mut ws.queue, &mut ws.residual, &ws.projected, rows.count)
            .and_then(|()| {
                let eps = self.config.rms_norm_eps;
                backend.rms_norm(
                    &mut ws.queue,
                    &ws.residual,
                    &layer.post_norm,
                    eps,
                    rows.count,
                    &mut ws.normed,
                )
            })
            .map_err(at(id, "post attention"))?;
        match &layer.mlp {
            Mlp::Dense(ffn) => backend
                .ffn(&mut ws.queue, &ws.normed, ffn, rows.count, &mut ws.projected)
                .and_then(|()| backend.add(&mut ws.queue, &mut ws.residual, &ws.projected, rows.count))
                .map_err(at(id, "dense mlp"))?,
            Mlp::Moe { gate, bias, shared } => {
                backend
                    .gate(
                        &mut ws.queue,
                        &ws.normed,
                        gate,
                        bias,
                        &self.gate_shape,
                        rows.count,
                        &mut ws.topk_idx,
                        &mut ws.topk_weights,
                    )
                    .map_err(at(id, "gate"))?;
                observer.routed(id, &ws.topk_idx, &ws.topk_weights);
                self.routed_experts(ws, rows.count, id, shared.as_ref(), experts)?;
            }
        }
        observer.activation(backend, &mut ws.queue, id, Site::Block, &ws.residual, rows.count)
    }

    fn attention(
        &self,
        ws: &mut Workspace<B>,
        rows: &Rows<'_>,
        id: LayerId,
        layer: &Layer<B>,
        cache: &mut B::KvCache,
        observer: &mut dyn StepObserver<B>,
    ) -> Result<(), ModelError> {
        let backend = &*self.backend;
        let eps = self.config.rms_norm_eps;
        let count = rows.count;
        let index = id.index();
        let queue = &mut ws.queue;
        backend
            .rms_norm(queue, &ws.residual, &layer.input_norm, eps, count, &mut ws.normed)
            .map_err(at(id, "input norm"))?;
        match &layer.query {
            Query::LowRank { a, norm, b } => backend
                .linear(queue, &ws.normed, a, count, &mut ws.q_latent)
                .and_then(|()| {
                    backend.rms_norm(queue, &ws.q_latent, norm, eps, count, &mut ws.q_latent_normed)
                })
                .and_then(|()| backend.linear(queue, &ws.q_latent_normed, b, count, &mut ws.query)),
            Query::Full(q) => backend.linear(queue, &ws.normed, q, count, &mut ws.query),
        }
        .and_then(|()| backend.rope_query(queue, &self.attention, &ws.positions, &mut ws.query))
        .map_err(at(id, "query"))?;
        backend
            .linear(queue, &ws.normed, &layer.kv_a, count, &mut ws.kv_a)
            .and_then(|()| {
                backend.kv_append(
                    queue,
                    &self.attention,
                    &ws.kv_a,
                    &layer.kv_a_norm,
                    eps,
                    &ws.positions,
                    &rows.tables,
                    index,
                    cache,
                )
            })
            .map_err(at(id, "latent append"))?;
        observer.kv_ready(backend, queue, id, cache)?;
        if !rows.prefill.is_empty() {
            backend
                .attention_prefill(
                    queue,
                    &self.attention,
                    &layer.kv_up,
                    &ws.query,
                    &rows.prefill,
                    index,
                    cache,
                    &mut ws.attended,
                )
                .map_err(at(id, "prefill attention"))?;
        }
        if !rows.decode.is_empty() {
            backend
                .attention_decode(
                    queue,
                    &self.attention,
                    &layer.kv_up,
                    &ws.query,
                    &rows.decode,
                    index,
                    cache,
                    &mut ws.attended,
                )
                .map_err(at(id, "decode attention"))?;
        }
        backend.linear(queue, &ws.attended, &layer.o, count, &mut ws.projected).map_err(at(id, "o_proj"))
    }

    /// Dispatch, shared expert while the routed ones work, combine into the residual stream.
    fn routed_experts(
        &self,
        ws: &mut Workspace<B>,
        count: usize,
        id: LayerId,
        shared: Option<&cadre_ops::backend::Ffn<B::Weight>>,
        experts: &mut dyn ExpertExchange,
    ) -> Result<(), ModelError> {
        let backend = &*self.backend;
        let format = RowFormat::dispatch(backend.class());
        backend
            .download_rows(&mut ws.queue, &ws.normed, count, format, &mut ws.payload, &mut ws.scales)
            .map_err(at(id, "dispatch rows"))?;
        let top_k = self.gate_shape.top_k;
        let ticket = experts.dispatch(DispatchBatch {
            layer: id,
            activations: HostRows {
                format,
                rows: count,
                cols: self.config.hidden_size,
                data: &ws.payload,
                scales: &ws.scales,
            },
            top_k,
            topk_idx: &ws.topk_idx,
        })?;
        if let Some(ffn) = shared {
            backend
                .ffn(&mut ws.queue, &ws.normed, ffn, count, &mut ws.projected)
                .map_err(at(id, "shared expert"))?;
        }
        experts.combine(ticket, &mut ws.expert_rows)?;
        backend
            .combine(
                &mut ws.queue,
                ws.expert_rows.as_host_rows(),
                &ws.topk_weights,
                top_k,
                shared.map(|_| &ws.projected),
                count,
                &mut ws.residual,
            )
            .map_err(at(id, "combine"))
    }

    fn finish(
        &self,
        ws: &mut Workspace<B>,
        rows: &Rows<'_>,
        norm: &B::Vector,
        out: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let backend = &*self.backend;
        let head = LayerId(self.config.total_layers() as u16);
        out.logits.clear();
        out.hidden.clear();
        let wanted = rows.wanted.len();
        if wanted > 0 {
            let all: Vec<usize> = (0..wanted).collect();
            let queue = &mut ws.queue;
            backend
                .gather_rows(queue, &ws.residual, &rows.wanted, &mut ws.wanted)
                .and_then(|()| {
                    let eps = self.config.rms_norm_eps;
                    backend.rms_norm(queue, &ws.wanted, norm, eps, wanted, &mut ws.normed)
                })
                .and_then(|()| backend.logits(queue, &ws.normed, &all, &self.head, &mut out.logits))
                .and_then(|()| backend.download_f32(queue, &ws.normed, &all, &mut out.hidden))
                .map_err(at(head, "head"))?;
        }
        backend.synchronize(&mut ws.queue).map_err(at(head, "synchronize"))
    }
}
