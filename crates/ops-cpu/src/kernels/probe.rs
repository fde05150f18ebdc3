//! Loops that measure the machine: how fast it reads, how fast it multiplies and adds.

use crate::lanes::{LANES, Lanes};

/// Reads `len` floats (a multiple of 128) and returns a value that depends on all of them.
///
/// # Safety
/// The machine has `V`'s instruction set; `from` holds `len` values.
#[inline(always)]
pub(crate) unsafe fn read<V: Lanes>(from: *const f32, len: usize) -> f32 {
    // SAFETY: the caller's contract.
    unsafe {
        let mut sums = [V::splat(0.0); 4];
        for i in (0..len).step_by(4 * LANES) {
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = sum.add(V::load(from.add(i + n * LANES)));
            }
        }
        let [a, b, c, d] = sums;
        a.add(b).add(c.add(d)).tree()
    }
}

/// Independent chains in [`multiply_add`].
const CHAINS: usize = 6;

/// FLOP of one round of [`multiply_add`].
pub(crate) const FLOP_PER_ROUND: usize = 2 * CHAINS * LANES;

/// `rounds` FMA in each of six independent chains of 16 lanes, in registers.
///
/// # Safety
/// The machine has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn multiply_add<V: Lanes>(rounds: usize, seed: f32) -> f32 {
    // SAFETY: the caller's contract.
    unsafe {
        let (a, b) = (V::splat(0.999_999), V::splat(seed));
        let mut sums = [V::splat(seed); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = sum.fma(a, b);
            }
        }
        let mut total = V::splat(0.0);
        for sum in sums {
            total = total.add(sum);
        }
        total.tree()
    }
}
