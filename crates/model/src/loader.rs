//! From a checkpoint to resident weights.
//!
//! Tensors are read in the order of the layers, packed by the backend, and their pages released at once,
//! so that the mapping never holds more than one tensor's bytes resident.

use std::sync::Arc;

use cadre_checkpoint::{
    Checkpoint, CheckpointError, Digest, DrawnData, DrawnView, MatrixBytes, MatrixSource, MatrixView,
    table::table,
};
use cadre_ops::{
    Backend, DrawnElements, DrawnMatrix, HostMatrix, KvLayout, MatrixData, OpsError, backend::Ffn,
    shape::GateShape,
};
use cadre_types::{LayerId, ModelConfig, config::ScaleFormat};

use crate::rope::attention_shape;

/// What to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Load the MTP module if the checkpoint has one.
    pub mtp: bool,
}

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Checkpoint bytes read so far.
    pub bytes_read: u64,
    /// Checkpoint bytes that will be read.
    pub bytes_expected: u64,
}

/// Why weights could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint is wrong.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The backend refused a tensor.
    #[error("load {tensor}: {source}")]
    Backend {
        /// The tensor.
        tensor: String,
        /// What the backend said.
        source: OpsError,
    },
}

/// The network without its routed experts, resident on a backend.
pub struct Model<B: Backend> {
    pub(crate) backend: Arc<B>,
    pub(crate) config: ModelConfig,
    pub(crate) gate_shape: GateShape,
    pub(crate) attention: B::Attention,
    pub(crate) embed: B::Weight,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) norm: B::Vector,
    pub(crate) head: B::Weight,
    pub(crate) mtp: Option<Mtp<B>>,
    pub(crate) weights_digest: u64,
}

/// One transformer block.
pub(crate) struct Layer<B: Backend> {
    pub(crate) input_norm: B::Vector,
    pub(crate) query: Query<B>,
    pub(crate) kv_a: B::Weight,
    pub(crate) kv_a_norm: B::Vector,
    pub(crate) kv_up: B::KvUp,
    pub(crate) o: B::Weight,
    pub(crate) post_norm: B::Vector,
    pub(crate) mlp: Mlp<B>,
}

/// The query projection: low-rank, or one matrix where `q_lora_rank` is null.
pub(crate) enum Query<B: Backend> {
    LowRank { a: B::Weight, norm: B::Vector, b: B::Weight },
    Full(B::Weight),
}

/// The second half of a block.
pub(crate) enum Mlp<B: Backend> {
    Dense(Ffn<B::Weight>),
    Moe { gate: B::Weight, bias: B::Vector, shared: Option<Ffn<B::Weight>> },
}

/// The MTP module: `block(eh_proj[enorm(embedding of the next token), hnorm(hidden)])`, then its own norm
/// and the main head (whose duplicate in the checkpoint is not loaded).
pub(crate) struct Mtp<B: Backend> {
    pub(crate) enorm: B::Vector,
    pub(crate) hnorm: B::Vector,
    pub(crate) eh_proj: B::Weight,
    pub(crate) block: Layer<B>,
    pub(crate) norm: B::Vector,
}

impl<B: Backend> Model<B> {
    /// Loads everything but the routed experts. `progress` is called after every tensor.
    pub fn load(
        backend: Arc<B>,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config().clone();
        let with_mtp = options.mtp && config.num_nextn_predict_layers > 0;
        let bytes_expected = resident_bytes(checkpoint, with_mtp)?;
        let mut reader = Reader::new(&*backend, checkpoint, bytes_expected, progress);

        let shape = attention_shape(&config);
        let attention = reader.packed("rotary tables", |backend| backend.load_attention(&shape))?;
        let embed = reader.matrix("model.embed_tokens.weight")?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| reader.layer(&config, &shape, LayerId(layer as u16)))
            .collect::<Result<Vec<_>, _>>()?;
        let norm = reader.vector("model.norm.weight")?;
        let head = reader.matrix("lm_head.weight")?;
        let mtp = with_mtp
            .then(|| reader.mtp(&config, &shape, LayerId(config.num_hidden_layers as u16)))
            .transpose()?;
        let weights_digest = reader.digest.value();
        Ok(Self {
            weights_digest,
            gate_shape: GateShape::of(&config),
            backend,
            config,
            attention,
            embed,
            layers,
            norm,
            head,
            mtp,
        })
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The backend that holds the weights.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }

    /// Digest of the bytes that were read: the same in every process that loaded the same tensors.
    pub fn weights_digest(&self) -> u64 {
        self.weights_digest
    }

    /// Whether the MTP module is loaded.
    pub fn has_mtp(&self) -> bool {
        self.mtp.is_some()
    }

    /// The cache geometry for a pool of `pages`; the MTP layer has one too if it is loaded.
    pub fn kv_layout(&self, pages: usize) -> KvLayout {
        KvLayout {
            layers: self.layers.len() + usize::from(self.has_mtp()),
            pages,
            page_tokens: KvLayout::PAGE_TOKENS,
            kv_lora_rank: self.config.kv_lora_rank,
            qk_rope_head_dim: self.config.qk_rope_head_dim,
        }
    }

    /// A zeroed cache of `pages` pages.
    pub fn new_cache(&self, pages: usize) -> Result<B::KvCache, OpsError> {
        self.backend.kv_cache(self.kv_layout(pages))
    }
}

/// Reads and packs tensors, counting bytes.
pub(crate) struct Reader<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_expected: u64,
    pub(crate) digest: Digest,
    pub(crate) progress: &'a mut dyn FnMut(LoadProgress),
}

impl<'a, B: Backend> Reader<'a, B> {
    pub(crate) fn new(
        backend: &'a B,
        checkpoint: &'a Checkpoint,
        bytes_expected: u64,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Self {
        Self { backend, checkpoint, bytes_read: 0, bytes_expected, digest: Digest::default(), progress }
    }

    fn layer(
        &mut self,
        config: &ModelConfig,
        shape: &cadre_ops::AttentionShape,
        layer: LayerId,
    ) -> Result<Layer<B>, LoadError> {
        let block = format!("model.layers.{}.", layer.0);
        let attention = format!("{block}self_attn.");
        let query = if config.q_lora_rank.is_some() {
            Query::LowRank {
                a: self.matrix(&format!("{attention}q_a_proj.weight"))?,
                norm: self.vector(&format!("{attention}q_a_layernorm.weight"))?,
                b: self.matrix(&format!("{attention}q_b_proj.weight"))?,
            }
        } else {
            Query::Full(self.matrix(&format!("{attention}q_proj.weight"))?)
        };
        let kv_b = format!("{attention}kv_b_proj.weight");
        Ok(Layer {
            input_norm: self.vector(&format!("{block}input_layernorm.weight"))?,
            query,
            kv_a: self.matrix(&format!("{attention}kv_a_proj_with_mqa.weight"))?,
            kv_a_norm: self.vector(&format!("{attention}kv_a_layernorm.weight"))?,
            kv_up: self.with_matrix(
                &kv_b,
                |backend, matrix| backend.load_kv_up(shape, matrix),
                |backend, matrix| backend.draw_kv_up(shape, matrix),
            )?,
            o: self.matrix(&format!("{attention}o_proj.weight"))?,
            post_norm: self.vector(&format!("{block}post_attention_layernorm.weight"))?,
            mlp: self.mlp(config, layer, &format!("{block}mlp."))?,
        })
    }

    fn mlp(&mut self, config: &ModelConfig, layer: LayerId, prefix: &str) -> Result<Mlp<B>, LoadError> {
        if !config.is_moe(layer) {
            return Ok(Mlp::Dense(self.ffn(prefix)?));
        }
        let shared = (config.n_shared_experts > 0)
            .then(|| self.ffn(&format!("{prefix}shared_experts.")))
            .transpose()?;
        Ok(Mlp::Moe {
            gate: self.matrix(&format!("{prefix}gate.weight"))?,
            bias: self.vector(&format!("{prefix}gate.e_score_correction_bias"))?,
            shared,
        })
    }

    fn mtp(
        &mut self,
        config: &ModelConfig,
        shape: &cadre_ops::AttentionShape,
        layer: LayerId,
    ) -> Result<Mtp<B>, LoadError> {
        let prefix = format!("model.layers.{}.", layer.0);
        Ok(Mtp {
            enorm: self.vector(&format!("{prefix}enorm.weight"))?,
            hnorm: self.vector(&format!("{prefix}hnorm.weight"))?,
            eh_proj: self.matrix(&format!("{prefix}eh_proj.weight"))?,
            block: self.layer(config, shape, layer)?,
            norm: self.vector(&format!("{prefix}shared_head.norm.weight"))?,
        })
    }

    /// The three matrices of a feed-forward block under a prefix.
    pub(crate) fn ffn(&mut self, prefix: &str) -> Result<Ffn<B::Weight>, LoadError> {
        let names = ["gate_proj", "up_proj", "down_proj"].map(|matrix| format!("{prefix}{matrix}.weight"));
        let [gate, up, down] = &names;
        let sources =
            [self.checkpoint.source(gate)?, self.checkpoint.source(up)?, self.checkpoint.source(down)?];
        let scales = scale_format(self.checkpoint.config());
        let packed = match &sources {
            [MatrixSource::Stored(gate), MatrixSource::Stored(up), MatrixSource::Stored(down)] => {
                let [gate, up, down] = [gate, up, down].map(|view| host_matrix(view, scales));
                self.backend.load_ffn(gate, up, down)
            }
            [MatrixSource::Drawn(gate), MatrixSource::Drawn(up), MatrixSource::Drawn(down)] => {
                let [gate, up, down] = [gate, up, down].map(|view| drawn_matrix(view, scales));
                self.backend.draw_ffn(&gate, &up, &down)
            }
            // A checkpoint's weights all come from one place.
            _ => Err(OpsError::Device { op: "load_ffn", message: "stored and drawn matrices mixed".into() }),
        }
        .map_err(|source| LoadError::Backend { tensor: format!("{prefix}*"), source })?;
        names.iter().try_for_each(|name| self.done(name))?;
        Ok(packed)
    }

    fn matrix(&mut self, name: &str) -> Result<B::Weight, LoadError> {
        self.with_matrix(name, B::load_matrix, B::draw_matrix)
    }

    fn with_matrix<T>(
        &mut self,
        name: &str,
        pack: impl FnOnce(&B, HostMatrix<'_>) -> Result<T, OpsError>,
        draw: impl FnOnce(&B, &DrawnMatrix<'_>) -> Result<T, OpsError>,
    ) -> Result<T, LoadError> {
        let (source, scales) = (self.checkpoint.source(name)?, scale_format(self.checkpoint.config()));
        let packed = self.packed(name, |backend| match &source {
            MatrixSource::Stored(view) => pack(backend, host_matrix(view, scales)),
            MatrixSource::Drawn(view) => draw(backend, &drawn_matrix(view, scales)),
        })?;
        self.done(name)?;
        Ok(packed)
    }

    fn vector(&mut self, name: &str) -> Result<B::Vector, LoadError> {
        let values = self.checkpoint.vector_f32(name)?;
        let packed = self.packed(name, |backend| backend.load_vector(&values))?;
        self.done(name)?;
        Ok(packed)
    }

    fn packed<T>(&self, name: &str, pack: impl FnOnce(&B) -> Result<T, OpsError>) -> Result<T, LoadError> {
        pack(self.backend).map_err(|source| LoadError::Backend { tensor: name.to_owned(), source })
    }

    /// Counts a tensor and lets its pages go.
    fn done(&mut self, name: &str) -> Result<(), LoadError> {
        self.bytes_read += self.checkpoint.tensor_bytes(name)?;
        self.checkpoint.digest(name, &mut self.digest)?;
        self.checkpoint.release(name)?;
        (self.progress)(LoadProgress { bytes_read: self.bytes_read, bytes_expected: self.bytes_expected });
        Ok(())
    }
}

/// Checkpoint bytes that [`Model::load`] reads.
fn resident_bytes(checkpoint: &Checkpoint, with_mtp: bool) -> Result<u64, LoadError> {
    let config = checkpoint.config();
    let main_layers = config.num_hidden_layers;
    let mut bytes = 0;
    for spec in table(config) {
        let loaded = with_mtp || spec.layer.is_none_or(|layer| layer.index() < main_layers);
        if loaded && spec.tier.on_workers() && !spec.is_scale() {
            bytes += checkpoint.tensor_bytes(&spec.name)?;
        }
    }
    Ok(bytes)
}

/// How activations are quantised for e4m3 matrices of a model.
pub(crate) fn scale_format(config: &ModelConfig) -> ScaleFormat {
    config.quantization.as_ref().map_or(ScaleFormat::F32, |fp8| fp8.scale_fmt)
}

fn drawn_matrix(view: &DrawnView, input_scales: ScaleFormat) -> DrawnMatrix<'_> {
    let elements = match &view.data {
        DrawnData::F32 => DrawnElements::F32,
        DrawnData::Bf16 => DrawnElements::Bf16,
        DrawnData::E4m3 { scales } => DrawnElements::E4m3 { scales, input_scales },
    };
    DrawnMatrix { rows: view.rows, cols: view.cols, draw: view.draw, elements }
}

fn host_matrix<'a>(view: &'a MatrixView<'_>, input_scales: ScaleFormat) -> HostMatrix<'a> {
    let data = match &view.data {
        MatrixBytes::F32(bytes) => MatrixData::F32(bytes),
        MatrixBytes::Bf16(bytes) => MatrixData::Bf16(bytes),
        // The checkpoint has no other blocks: it was refused otherwise.
        MatrixBytes::E4m3 { codes, scales } => {
            MatrixData::E4m3 { codes, scales, block: MatrixData::BLOCK, input_scales }
        }
    };
    HostMatrix { rows: view.rows, cols: view.cols, data }
}
