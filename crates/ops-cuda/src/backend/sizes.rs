//! Bytes on the device of what a process plans to hold.

use cadre_ops::{Allocation, ElementType, OpsError, PassLimits, RowFormat, Sizes, check, check::Dims};
use cadre_types::NumericsClass;

use super::{
    PASS, attend,
    planes::{plane_bytes, rows_bytes},
    product::inner_bytes,
    step, tensor,
    weights::{element_bytes, panel_bytes, scale_bytes, up_row},
};

/// The rules of a GPU that computes in a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaSizes {
    /// The numerics class.
    pub class: NumericsClass,
}

impl CudaSizes {
    /// Whether products go to tensor cores where they can.
    pub(crate) fn tensor(self) -> bool {
        self.class == NumericsClass::CudaFp8
    }

    /// Whether the class rounds activations to BF16.
    pub(crate) fn rounds(self) -> bool {
        self.class != NumericsClass::F32
    }
}

impl Sizes for CudaSizes {
    fn planned_pass(&self, _: usize) -> PassLimits {
        PASS
    }

    /// The same numbers that the allocating operations use.
    fn planned(&self, allocation: &Allocation<'_>) -> Result<u64, OpsError> {
        let op = "bytes_of";
        let matrix = |rows, cols, elements| -> Result<usize, OpsError> {
            let dims = Dims { rows, cols };
            let tiles = self.tensor() && tensor::covers_matrix(dims, elements);
            let packed = if tiles {
                tensor::matrix_bytes(op, dims, elements)
            } else {
                panel_bytes(op, dims, elements)
            };
            Ok(packed? + scale_bytes(dims, elements))
        };
        let plane = |rows, cols, bf16| plane_bytes(op, Dims { rows, cols }, bf16);
        let bytes = match *allocation {
            Allocation::Residual { rows, cols } | Allocation::Logits { rows, vocab: cols } => {
                plane(rows, cols, false)?
            }
            Allocation::Activations { rows, cols } => plane(rows, cols, self.rounds())?,
            Allocation::Rows { rows, cols } => {
                rows_bytes(op, Dims { rows, cols }, RowFormat::dispatch(self.class))?.1
            }
            Allocation::Matrix { rows, cols, elements } => matrix(rows, cols, elements)?,
            Allocation::Ffn { hidden, inner, elements } => {
                let dims = Dims { rows: up_row(inner) + inner, cols: hidden };
                let tiles =
                    self.tensor() && tensor::covers_matrix(Dims { rows: inner, cols: hidden }, elements);
                let gate_up = if tiles {
                    tensor::gate_up_bytes(op, inner, hidden, elements)?
                } else {
                    panel_bytes(op, dims, elements)?
                };
                gate_up + scale_bytes(dims, elements) + matrix(hidden, inner, elements)?
            }
            Allocation::Vector { len } => len * 4,
            Allocation::KvUp { shape, elements } => {
                let rows = shape.heads * (shape.nope + shape.v);
                if self.tensor() && tensor::covers_attention(shape) && elements != ElementType::F32 {
                    let sizes = tensor::KvUpTiles::of(shape);
                    return Ok((shape.heads * (sizes.head + sizes.absorb)) as u64);
                }
                let stored = check::product(op, rows, shape.kv_lora)? * element_bytes(elements);
                matrix(rows, shape.kv_lora, elements)? + stored
            }
            Allocation::Attention { shape } => {
                check::product(op, shape.max_positions, shape.inv_freq.len() * 8)?
            }
            Allocation::KvCache { layout } => {
                check::kv_layout(op, &layout)?;
                let tiled = self.tensor() && tensor::covers_cache(&layout);
                layout.layers * layout.pages * attend::page_bytes(&layout, self.rounds(), tiled)
            }
            Allocation::StepScratch { shape, rows, hidden, inner, positions } => {
                let latent = attend::LATENT_ROWS.min(rows) * shape.heads * shape.kv_lora * 4;
                let head_width = shape.nope + shape.v;
                let heads = attend::heads_at_once(shape.heads, positions, head_width);
                let expanded = positions * (heads * head_width + shape.kv_lora + shape.rope) * 4;
                let wide = latent.max(rows * 2 * up_row(inner) * 4);
                let narrow = latent.max(rows * inner * 4);
                // Codes, scales, and expert rows that come back (16 a row at most in any model so far).
                let codes = rows * hidden.max(inner) * 2;
                let step = step::step_bytes(rows, positions) as usize;
                wide + narrow + expanded + codes + rows * 16 * hidden * 4 + step
            }
            Allocation::PassScratch { limits, hidden, inner } => {
                // Whole blocks leave each group room for all the rows that they take.
                let (codes, scales) = if self.tensor() { inner_bytes(limits.pairs, inner) } else { (0, 0) };
                let blocks = codes + scales;
                limits.pairs * (2 * up_row(inner) * 4 + inner * 6 + 20) + limits.rows * hidden * 4 + blocks
            }
        };
        Ok(bytes as u64)
    }
}
