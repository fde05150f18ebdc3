//! What allocations take in memory: rules that need no backend.

use cadre_ops::{Allocation, AttentionShape, ElementType, OpsError, PassLimits, RowFormat, Sizes};
use cadre_types::NumericsClass;

use super::attention;
use crate::{lanes::LANES, packed::packed_bytes};

/// Device memory of the buffers of a pass of a shard (received rows and results), in F32: bounds its rows. At
/// hidden 7168 a pass has 128 pairs, for which each expert's weights are read once; at hidden 2048 it has 512.
/// Pairs are ordered by expert, so of a larger batch at most one expert per pass is read again.
const PASS_BYTES: usize = 8 << 20;

/// Passes have at least this many pairs, however wide they are.
const LEAST_PAIRS: usize = 64;

/// The rules of a processor that computes in a class with so many threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuSizes {
    /// The numerics class.
    pub class: NumericsClass,
    /// Threads, the caller's included.
    pub threads: usize,
}

impl Sizes for CpuSizes {
    fn planned(&self, allocation: &Allocation<'_>) -> Result<u64, OpsError> {
        let panels = |rows: usize| rows.div_ceil(LANES);
        // Refuses sizes that overflow.
        let elements = allocation.elements("bytes_of")?;
        Ok(match *allocation {
            Allocation::Residual { .. }
            | Allocation::Activations { .. }
            | Allocation::Logits { .. }
            | Allocation::Vector { .. }
            | Allocation::Attention { .. } => 4 * elements,
            Allocation::Rows { rows, cols } => match RowFormat::dispatch(self.class) {
                RowFormat::E4m3 => elements + 4 * (rows * RowFormat::E4m3.row_scales(cols)) as u64,
                RowFormat::F32 | RowFormat::Bf16 => 4 * elements,
            },
            Allocation::Matrix { rows, cols, elements } => packed_bytes(elements, panels(rows), cols),
            Allocation::Ffn { hidden, inner, elements } => {
                packed_bytes(elements, 2 * panels(inner), hidden)
                    + packed_bytes(elements, panels(hidden), inner)
            }
            Allocation::KvUp { shape, elements } => shape.heads as u64 * head_bytes(shape, elements),
            Allocation::KvCache { .. } => elements * if self.class != NumericsClass::F32 { 2 } else { 4 },
            Allocation::StepScratch { shape, rows, hidden, inner, .. } => {
                let threads = self.threads as u64;
                attention::scratch_bytes(shape, rows as u64, threads) + 4 * (rows * (hidden + inner)) as u64
            }
            Allocation::PassScratch { limits, hidden, inner } => {
                4 * (limits.rows * hidden + limits.pairs * inner) as u64
            }
        })
    }

    fn planned_pass(&self, hidden: usize) -> PassLimits {
        let pairs = pass_pairs(hidden);
        PassLimits { rows: pairs, pairs }
    }
}

/// Pairs of a pass: the largest power of two whose buffers fit [`PASS_BYTES`].
fn pass_pairs(hidden: usize) -> usize {
    let fitting = (PASS_BYTES / (2 * 4 * hidden.max(1))).max(LEAST_PAIRS);
    1 << fitting.ilog2()
}

/// Keys, values and absorbed queries of one head.
fn head_bytes(shape: &AttentionShape, elements: ElementType) -> u64 {
    let panels = |rows: usize| rows.div_ceil(LANES);
    let expand = panels(shape.nope) + panels(shape.v);
    packed_bytes(elements, expand, shape.kv_lora) + packed_bytes(elements, panels(shape.kv_lora), shape.nope)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_pass_fits_its_memory() {
        assert_eq!((pass_pairs(7168), pass_pairs(2048), pass_pairs(512)), (128, 512, 2048));
        for hidden in [1, 130, 512, 7168, 1 << 17] {
            let bytes = 2 * 4 * hidden * pass_pairs(hidden);
            assert!(bytes <= PASS_BYTES || pass_pairs(hidden) == LEAST_PAIRS, "hidden {hidden}");
        }
    }
}
