//! The step: embedding, blocks, head. One queue, buffers that live as long as the worker.
//!
//! What a step is goes to the device once ([`Model::begin`]); hidden states, routing and logits stay there.
//! A layer is entered and left: [`Model::enter`] computes attention and the gate and sends rows to experts,
//! [`Model::leave`] takes their results, and between the two another micro-batch (a workspace of its own) may
//! use the device. Rows of all segments go through the dense operations together; attention is done segment
//! by segment in the form of its kind. Nothing here depends on how rows are grouped into steps: every
//! operation computes a row from that row, its sequence's cache and the weights alone.

use std::ops::Range;

use cadre_ops::{
    Backend, DispatchBatch, EncodedRows, ExchangeError, ExchangeTicket, ExpertExchange, ExpertRows, OpsError,
    RowFormat, RowLayout, SampleRow, StepRows, StepSegment,
};
use cadre_sampler::{Sample, SampleError};
use cadre_types::{LayerId, TokenId};

use crate::{
    batch::{StepBatch, StepOutput},
    loader::{Layer, Mlp, Model, Query, scale_format},
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
    /// More rows' logits are wanted than the workspace holds.
    #[error("logits of {rows} rows: the workspace holds {capacity}")]
    TooManyLogits {
        /// Wanted rows of the step.
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

/// What is observed there.
pub enum Observed<'a, B: Backend> {
    /// At [`Site::Attention`].
    Activations(&'a B::Activations),
    /// At [`Site::Block`].
    Residual(&'a B::Residual),
}

impl<B: Backend> Observed<'_, B> {
    /// The values of the leading rows.
    pub fn read(&self, backend: &B, queue: &mut B::Queue, rows: usize) -> Result<Vec<f32>, OpsError> {
        let mut values = Vec::new();
        match self {
            Self::Activations(x) => backend.read_activations(queue, x, 0..rows, &mut values)?,
            Self::Residual(x) => backend.read_residual(queue, x, 0..rows, &mut values)?,
        }
        Ok(values)
    }
}

/// Watches a step from inside. Every method does nothing unless overridden.
pub trait StepObserver<B: Backend> {
    /// The layer's KV rows of this step are in the cache as far as later operations of the queue are
    /// concerned: a hand-off may read them.
    fn kv_ready(
        &mut self,
        _backend: &B,
        _queue: &mut B::Queue,
        _layer: LayerId,
        _cache: &B::KvCache,
    ) -> Result<(), ModelError> {
        Ok(())
    }

    /// The gate has chosen `topk_idx [rows, top_k]`, ascending expert id within a row; the weights are in
    /// `routing`.
    fn routed(
        &mut self,
        _backend: &B,
        _queue: &mut B::Queue,
        _layer: LayerId,
        _topk_idx: &[u16],
        _routing: &B::Routing,
    ) -> Result<(), ModelError> {
        Ok(())
    }

    /// An activation is computed.
    fn activation(
        &mut self,
        _backend: &B,
        _queue: &mut B::Queue,
        _layer: LayerId,
        _site: Site,
        _observed: Observed<'_, B>,
        _rows: usize,
    ) -> Result<(), ModelError> {
        Ok(())
    }
}

impl<B: Backend> StepObserver<B> for () {}

/// Queue, step and buffers of one step loop, or of one of several micro-batches.
pub struct Workspace<B: Backend> {
    queue: B::Queue,
    step: B::Step,
    capacity: usize,
    logit_capacity: usize,
    rows: usize,
    wanted_rows: usize,
    residual: B::Residual,
    normed: B::Activations,
    q_latent: B::Activations,
    q_latent_normed: B::Activations,
    query: B::Activations,
    kv_a: B::Activations,
    attended: B::Activations,
    projected: B::Activations,
    routing: B::Routing,
    sent: B::Rows,
    wanted: B::Residual,
    hidden: B::Activations,
    logits: B::Logits,
    mtp: Option<MtpBuffers<B>>,
    ids: Vec<TokenId>,
    wanted_index: Vec<u32>,
    expert_rows: ExpertRows,
}

struct MtpBuffers<B: Backend> {
    hidden: B::Activations,
    hidden_normed: B::Activations,
    pair: B::Activations,
}

impl<B: Backend> Workspace<B> {
    /// Buffers for steps of at most `max_rows` rows, of which at most `max_logits` want logits.
    pub fn new(model: &Model<B>, max_rows: usize, max_logits: usize) -> Result<Self, OpsError> {
        let backend = &*model.backend;
        let config = &model.config;
        let hidden = config.hidden_size;
        let max_logits = max_logits.min(max_rows);
        let q_latent = config.q_lora_rank.unwrap_or(1);
        let alloc = |cols: usize| backend.alloc_activations(max_rows, cols);
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
            step: backend.alloc_step(max_rows)?,
            capacity: max_rows,
            logit_capacity: max_logits,
            rows: 0,
            wanted_rows: 0,
            residual: backend.alloc_residual(max_rows, hidden)?,
            normed: alloc(hidden)?,
            q_latent: alloc(q_latent)?,
            q_latent_normed: alloc(q_latent)?,
            query: alloc(config.num_attention_heads * config.qk_head_dim())?,
            kv_a: alloc(config.kv_width())?,
            attended: alloc(config.num_attention_heads * config.v_head_dim)?,
            projected: alloc(hidden)?,
            routing: backend.alloc_routing(max_rows, model.gate_shape.top_k)?,
            sent: backend.alloc_rows(max_rows, hidden)?,
            wanted: backend.alloc_residual(max_logits, hidden)?,
            hidden: backend.alloc_activations(max_logits, hidden)?,
            logits: backend.alloc_logits(max_logits, config.vocab_size)?,
            mtp,
            ids: Vec::new(),
            wanted_index: Vec::new(),
            expert_rows: ExpertRows::default(),
        })
    }

    /// Most rows of a step.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Rows of the step whose logits were wanted.
    pub fn wanted_rows(&self) -> usize {
        self.wanted_rows
    }

    /// The queue, for cache transfers between steps.
    pub fn queue(&mut self) -> &mut B::Queue {
        &mut self.queue
    }
}

/// A layer that was entered and is to be left.
#[must_use = "a layer that was entered is left with its ticket"]
#[derive(Debug)]
pub struct LayerTicket {
    layer: LayerId,
    /// `None` for a dense layer, which was computed when it was entered.
    exchange: Option<ExchangeTicket>,
}

/// A function that names where an error of the backend came from.
fn at(layer: LayerId, operation: &'static str) -> impl Fn(OpsError) -> ModelError {
    move |source| ModelError::Backend { layer, operation, source }
}

impl<B: Backend> Model<B> {
    /// Computes a step: puts the rows' KV into the cache, and logits and hidden states of the rows that want
    /// them into the workspace ([`Model::sample`], [`Model::read`]). Waits for everything.
    pub fn forward(
        &self,
        ws: &mut Workspace<B>,
        batch: &StepBatch<'_>,
        cache: &mut B::KvCache,
        experts: &mut dyn ExpertExchange,
        observer: &mut dyn StepObserver<B>,
    ) -> Result<(), ModelError> {
        self.begin(ws, batch)?;
        for layer in 0..self.layers.len() {
            let ticket = self.enter(ws, LayerId(layer as u16), cache, experts, observer)?;
            self.leave(ws, ticket, experts, observer)?;
        }
        self.finish(ws)
    }

    /// Puts a step on the device and embeds its tokens.
    pub fn begin(&self, ws: &mut Workspace<B>, batch: &StepBatch<'_>) -> Result<(), ModelError> {
        self.begin_step(ws, batch)?;
        self.backend
            .embed(&mut ws.queue, &ws.step, &self.embed, &mut ws.residual)
            .map_err(at(LayerId(0), "embed"))
    }

    /// Computes a layer up to its experts and sends rows to them. The layer after the last main one is the
    /// MTP module's block.
    pub fn enter(
        &self,
        ws: &mut Workspace<B>,
        layer: LayerId,
        cache: &mut B::KvCache,
        experts: &mut dyn ExpertExchange,
        observer: &mut dyn StepObserver<B>,
    ) -> Result<LayerTicket, ModelError> {
        let weights = self.layer(layer)?;
        let backend = &*self.backend;
        self.attention(ws, layer, weights, cache, observer)?;
        let observed = Observed::Activations(&ws.projected);
        observer.activation(backend, &mut ws.queue, layer, Site::Attention, observed, ws.rows)?;
        let (queue, rows, eps) = (&mut ws.queue, ws.rows, self.config.rms_norm_eps);
        backend
            .add_rms_norm(
                queue,
                &mut ws.residual,
                &ws.projected,
                &weights.post_norm,
                eps,
                rows,
                &mut ws.normed,
            )
            .map_err(at(layer, "post attention"))?;
        let exchange = match &weights.mlp {
            Mlp::Dense(ffn) => {
                backend
                    .ffn(queue, &ws.normed, ffn, rows, &mut ws.projected)
                    .and_then(|()| backend.add(queue, &mut ws.residual, &ws.projected, rows))
                    .map_err(at(layer, "dense mlp"))?;
                None
            }
            Mlp::Moe { gate, bias, shared } => {
                backend
                    .gate(queue, &ws.step, &ws.normed, gate, bias, &self.gate_shape, &mut ws.routing)
                    .map_err(at(layer, "gate"))?;
                Some(self.dispatch(ws, layer, shared.as_ref(), experts, observer)?)
            }
        };
        Ok(LayerTicket { layer, exchange })
    }

    /// Takes the experts' results and completes the layer.
    pub fn leave(
        &self,
        ws: &mut Workspace<B>,
        ticket: LayerTicket,
        experts: &mut dyn ExpertExchange,
        observer: &mut dyn StepObserver<B>,
    ) -> Result<(), ModelError> {
        let LayerTicket { layer, exchange } = ticket;
        let backend = &*self.backend;
        if let Some(exchange) = exchange {
            experts.combine(exchange, &mut ws.expert_rows)?;
            let shared = match &self.layer(layer)?.mlp {
                Mlp::Moe { shared: Some(_), .. } => Some(&ws.projected),
                _ => None,
            };
            let result =
                backend.combine(&mut ws.queue, &ws.expert_rows, &ws.routing, shared, &mut ws.residual);
            // The answers' memory goes back to whoever received them.
            ws.expert_rows.chunks.clear();
            result.map_err(at(layer, "combine"))?;
        }
        let observed = Observed::Residual(&ws.residual);
        observer.activation(backend, &mut ws.queue, layer, Site::Block, observed, ws.rows)
    }

    /// Final norm and logits of the wanted rows, after the last layer was left. Waits for everything.
    pub fn finish(&self, ws: &mut Workspace<B>) -> Result<(), ModelError> {
        self.head(ws, &self.norm)
    }

    /// Draws tokens from the logits of the last step.
    pub fn sample(
        &self,
        ws: &mut Workspace<B>,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<Result<Sample, SampleError>>, ModelError> {
        let backend = &*self.backend;
        backend
            .sample(&mut ws.queue, &mut ws.logits, rows)
            .and_then(|samples| backend.samples(&mut ws.queue, &mut ws.logits, samples))
            .map_err(at(LayerId(self.config.total_layers() as u16), "sample"))
    }

    /// Hidden states after the final norm of wanted rows of the last step, `[rows, hidden_size]`: what the
    /// MTP module takes.
    pub fn read_hidden(&self, ws: &mut Workspace<B>, rows: Range<usize>) -> Result<Vec<f32>, ModelError> {
        let mut out = Vec::new();
        self.backend
            .read_activations(&mut ws.queue, &ws.hidden, rows, &mut out)
            .map_err(at(LayerId(self.config.total_layers() as u16), "read hidden states"))?;
        Ok(out)
    }

    /// Logits and hidden states of all wanted rows of the last step, before anything was sampled from them:
    /// for tests and tools.
    pub fn read(&self, ws: &mut Workspace<B>) -> Result<StepOutput, ModelError> {
        let wanted = ws.wanted_rows;
        let mut logits = Vec::new();
        self.backend
            .read_logits(&mut ws.queue, &ws.logits, 0..wanted, &mut logits)
            .map_err(at(LayerId(self.config.total_layers() as u16), "read logits"))?;
        Ok(StepOutput { logits, hidden: self.read_hidden(ws, 0..wanted)? })
    }

    /// Computes the MTP module for rows whose next tokens are `batch`'s tokens and whose main hidden states
    /// after the final norm are `hidden` (`[rows, hidden_size]`): logits for the token after the next.
    /// The module has its own cache layer, after the main ones.
    #[allow(clippy::too_many_arguments, reason = "as forward, with the main model's hidden states")]
    pub fn forward_mtp(
        &self,
        ws: &mut Workspace<B>,
        batch: &StepBatch<'_>,
        hidden: &[f32],
        cache: &mut B::KvCache,
        experts: &mut dyn ExpertExchange,
        observer: &mut dyn StepObserver<B>,
    ) -> Result<(), ModelError> {
        let mtp = self.mtp.as_ref().ok_or(ModelError::NoMtp)?;
        self.begin_step(ws, batch)?;
        let layer = LayerId(self.layers.len() as u16);
        let eps = self.config.rms_norm_eps;
        let (backend, queue, rows) = (&*self.backend, &mut ws.queue, ws.rows);
        let buffers = ws.mtp.as_mut().ok_or(ModelError::NoMtp)?;
        backend
            .embed(queue, &ws.step, &self.embed, &mut ws.residual)
            .and_then(|()| {
                backend.rms_norm_residual(queue, &ws.residual, &mtp.enorm, eps, rows, &mut ws.normed)
            })
            .and_then(|()| backend.write_activations(queue, hidden, &mut buffers.hidden))
            .and_then(|()| {
                let normed = &mut buffers.hidden_normed;
                backend.rms_norm(queue, &buffers.hidden, &mtp.hnorm, eps, rows, normed)
            })
            .and_then(|()| backend.concat(queue, &ws.normed, &buffers.hidden_normed, rows, &mut buffers.pair))
            .and_then(|()| backend.linear(queue, &buffers.pair, &mtp.eh_proj, rows, &mut ws.projected))
            .and_then(|()| backend.assign(queue, &mut ws.residual, &ws.projected, rows))
            .map_err(at(layer, "mtp input"))?;
        let ticket = self.enter(ws, layer, cache, experts, observer)?;
        self.leave(ws, ticket, experts, observer)?;
        self.head(ws, &mtp.norm)
    }

    fn layer(&self, layer: LayerId) -> Result<&Layer<B>, ModelError> {
        let main = self.layers.get(layer.index());
        main.or_else(|| self.mtp.as_ref().map(|mtp| &mtp.block)).ok_or(ModelError::NoMtp)
    }

    fn begin_step(&self, ws: &mut Workspace<B>, batch: &StepBatch<'_>) -> Result<(), ModelError> {
        ws.rows = batch.rows();
        if ws.rows > ws.capacity {
            return Err(ModelError::TooManyRows { rows: ws.rows, capacity: ws.capacity });
        }
        ws.ids.clear();
        ws.ids.extend(batch.segments.iter().flat_map(|segment| segment.tokens));
        ws.wanted_index.clear();
        ws.wanted_index.extend(batch.logit_rows().map(|row| row as u32));
        ws.wanted_rows = ws.wanted_index.len();
        if ws.wanted_rows > ws.logit_capacity {
            let (rows, capacity) = (ws.wanted_rows, ws.logit_capacity);
            return Err(ModelError::TooManyLogits { rows, capacity });
        }
        let segments: Vec<StepSegment<'_>> = batch
            .segments
            .iter()
            .map(|segment| StepSegment {
                form: segment.kind.into(),
                rows: segment.tokens.len(),
                first_position: segment.first_position,
                block_table: segment.block_table,
            })
            .collect();
        let rows = StepRows { ids: &ws.ids, segments: &segments, wanted: &ws.wanted_index };
        self.backend.begin_step(&mut ws.queue, &rows, &mut ws.step).map_err(at(LayerId(0), "begin step"))
    }

    fn attention(
        &self,
        ws: &mut Workspace<B>,
        id: LayerId,
        layer: &Layer<B>,
        cache: &mut B::KvCache,
        observer: &mut dyn StepObserver<B>,
    ) -> Result<(), ModelError> {
        let backend = &*self.backend;
        let (eps, rows, index) = (self.config.rms_norm_eps, ws.rows, id.index());
        let queue = &mut ws.queue;
        backend
            .rms_norm_residual(queue, &ws.residual, &layer.input_norm, eps, rows, &mut ws.normed)
            .map_err(at(id, "input norm"))?;
        match &layer.query {
            Query::LowRank { a, norm, b } => backend
                .linear(queue, &ws.normed, a, rows, &mut ws.q_latent)
                .and_then(|()| {
                    backend.rms_norm(queue, &ws.q_latent, norm, eps, rows, &mut ws.q_latent_normed)
                })
                .and_then(|()| backend.linear(queue, &ws.q_latent_normed, b, rows, &mut ws.query)),
            Query::Full(q) => backend.linear(queue, &ws.normed, q, rows, &mut ws.query),
        }
        .and_then(|()| backend.rope_query(queue, &ws.step, &self.attention, &mut ws.query))
        .map_err(at(id, "query"))?;
        backend
            .linear(queue, &ws.normed, &layer.kv_a, rows, &mut ws.kv_a)
            .and_then(|()| {
                let (attention, norm) = (&self.attention, &layer.kv_a_norm);
                backend.kv_append(queue, &ws.step, attention, &ws.kv_a, norm, eps, index, cache)
            })
            .map_err(at(id, "latent append"))?;
        observer.kv_ready(backend, queue, id, cache)?;
        let (attention, kv_up) = (&self.attention, &layer.kv_up);
        backend
            .attend(queue, &ws.step, attention, kv_up, &ws.query, index, cache, &mut ws.attended)
            .map_err(at(id, "attention"))?;
        backend.linear(queue, &ws.attended, &layer.o, rows, &mut ws.projected).map_err(at(id, "o_proj"))
    }

    /// Sends rows to their experts, with the shared expert computed while those work.
    fn dispatch(
        &self,
        ws: &mut Workspace<B>,
        id: LayerId,
        shared: Option<&cadre_ops::Ffn<B::Weight>>,
        experts: &mut dyn ExpertExchange,
        observer: &mut dyn StepObserver<B>,
    ) -> Result<ExchangeTicket, ModelError> {
        let (backend, queue, rows) = (&*self.backend, &mut ws.queue, ws.rows);
        let (format, cols) = (RowFormat::dispatch(backend.class()), self.config.hidden_size);
        let scales = scale_format(&self.config);
        let mut download = || {
            backend.encode(queue, &ws.normed, rows, scales, &mut ws.sent)?;
            let mut memory = backend.staging(RowLayout::of(format, rows, cols).bytes)?;
            backend.download_rows(queue, &ws.sent, rows, &mut memory, 0)?;
            Ok((memory, backend.record(queue)?))
        };
        let (memory, event) = download().map_err(at(id, "dispatch rows"))?;
        // A device is given the shared expert before it is waited for; a backend that computes when it is
        // called first sends, so that both work at the same time.
        let (before, after) = if backend.runs_at_once() { (None, shared) } else { (shared, None) };
        let mut compute = |ffn: Option<&cadre_ops::Ffn<B::Weight>>, queue: &mut B::Queue| match ffn {
            Some(ffn) => {
                backend.ffn(queue, &ws.normed, ffn, rows, &mut ws.projected).map_err(at(id, "shared expert"))
            }
            None => Ok(()),
        };
        compute(before, queue)?;
        let topk_idx = backend.routed(&ws.routing).map_err(at(id, "gate"))?;
        observer.routed(backend, queue, id, topk_idx, &ws.routing)?;
        backend.wait(&event).map_err(at(id, "dispatch rows"))?;
        let activations = EncodedRows::in_memory(memory, format, rows, cols);
        let ticket = experts.dispatch(DispatchBatch {
            layer: id,
            activations: &activations,
            top_k: self.gate_shape.top_k,
            topk_idx,
        })?;
        compute(after, queue)?;
        Ok(ticket)
    }

    fn head(&self, ws: &mut Workspace<B>, norm: &B::Vector) -> Result<(), ModelError> {
        let backend = &*self.backend;
        let head = LayerId(self.config.total_layers() as u16);
        let (queue, wanted) = (&mut ws.queue, ws.wanted_rows);
        if wanted > 0 {
            let eps = self.config.rms_norm_eps;
            backend
                .gather_wanted(queue, &ws.step, &ws.residual, &mut ws.wanted)
                .and_then(|()| {
                    backend.rms_norm_residual(queue, &ws.wanted, norm, eps, wanted, &mut ws.hidden)
                })
                .and_then(|()| backend.logits(queue, &ws.hidden, &self.head, wanted, &mut ws.logits))
                .map_err(at(head, "head"))?;
        }
        backend.synchronize(queue).map_err(at(head, "synchronize"))
    }
}
