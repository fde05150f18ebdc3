//! Device memory before it is taken: what will be allocated, and how much there is.

use crate::{
    backend::Backend,
    check,
    error::OpsError,
    host::ElementType,
    shape::{AttentionShape, KvLayout},
};

/// Something that a role will allocate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Allocation<'a> {
    /// [`Backend::alloc_residual`].
    Residual {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// [`Backend::alloc_activations`].
    Activations {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// [`Backend::alloc_rows`].
    Rows {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// [`Backend::alloc_logits`].
    Logits {
        /// Rows.
        rows: usize,
        /// Columns.
        vocab: usize,
    },
    /// [`Backend::load_matrix`].
    Matrix {
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
        /// Elements.
        elements: ElementType,
    },
    /// [`Backend::load_ffn`].
    Ffn {
        /// Width of the rows.
        hidden: usize,
        /// Inner width.
        inner: usize,
        /// Elements of all three matrices.
        elements: ElementType,
    },
    /// [`Backend::load_vector`].
    Vector {
        /// Elements.
        len: usize,
    },
    /// [`Backend::load_kv_up`].
    KvUp {
        /// The attention.
        shape: &'a AttentionShape,
        /// Elements of kv_b.
        elements: ElementType,
    },
    /// [`Backend::load_attention`].
    Attention {
        /// The attention.
        shape: &'a AttentionShape,
    },
    /// [`Backend::kv_cache`].
    KvCache {
        /// The cache.
        layout: KvLayout,
    },
    /// Scratch memory of a queue that runs steps, the step itself included.
    StepScratch {
        /// The attention.
        shape: &'a AttentionShape,
        /// Most rows of a step.
        rows: usize,
        /// Width of the residual stream.
        hidden: usize,
        /// Widest inner activation of a feed-forward block.
        inner: usize,
        /// Longest sequence.
        positions: usize,
    },
    /// Scratch memory of a queue that runs passes, the pass itself included.
    PassScratch {
        /// The limits.
        limits: PassLimits,
        /// Width of the rows.
        hidden: usize,
        /// Inner width of the experts.
        inner: usize,
    },
}

impl Allocation<'_> {
    /// Elements of it, whatever their size; scratch memory counts as none.
    pub fn elements(&self, op: &'static str) -> Result<u64, OpsError> {
        let product = |a: usize, b: usize| check::product(op, a, b);
        let elements = match *self {
            Self::Residual { rows, cols }
            | Self::Activations { rows, cols }
            | Self::Rows { rows, cols }
            | Self::Logits { rows, vocab: cols }
            | Self::Matrix { rows, cols, .. } => product(rows, cols)?,
            Self::Ffn { hidden, inner, .. } => product(3, product(hidden, inner)?)?,
            Self::Vector { len } => len,
            Self::KvUp { shape, .. } => product(shape.heads * (shape.nope + shape.v), shape.kv_lora)?,
            Self::Attention { shape } => product(shape.max_positions, shape.rope)?,
            Self::KvCache { layout } => check::kv_layout(op, &layout)?,
            Self::StepScratch { .. } | Self::PassScratch { .. } => 0,
        };
        Ok(elements as u64)
    }
}

/// What a device takes: the rules of a backend's allocations, which can be had without the device. Every backend has
/// them.
pub trait Sizes {
    /// As [`Backend::bytes_of`].
    fn planned(&self, allocation: &Allocation<'_>) -> Result<u64, OpsError>;

    /// As [`Backend::pass_limits`].
    fn planned_pass(&self, hidden: usize) -> PassLimits;
}

impl<B: Backend> Sizes for B {
    fn planned(&self, allocation: &Allocation<'_>) -> Result<u64, OpsError> {
        self.bytes_of(allocation)
    }

    fn planned_pass(&self, hidden: usize) -> PassLimits {
        self.pass_limits(hidden)
    }
}

/// How large one pass of a shard may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassLimits {
    /// Received rows.
    pub rows: usize,
    /// Pairs of (row, expert).
    pub pairs: usize,
}

/// Which device it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceIdentity {
    /// As `--device` names it: `cpu`, `cuda:0`.
    pub device: String,
    /// What it is: `NVIDIA H200`; `cpu` for a processor.
    pub name: String,
    /// What its code is compiled for: `sm_90`, `avx512`.
    pub architecture: String,
}

/// Memory of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DeviceMemory {
    /// Bytes in use: by everybody on a GPU, by this process on a CPU.
    pub used: u64,
    /// Bytes that there are; 0 where nobody can say.
    pub total: u64,
    /// Bytes that can still be taken; on a CPU not beyond what the machine has left, or the limit of any control
    /// group over the process. `None` where nobody can say.
    pub free: Option<u64>,
}
