//! Probabilities as integers.
//!
//! The weight of a token is `e^d` for `d = (logit - largest) / temperature <= 0`, rounded to a
//! multiple of 2^-40 and held as an integer. Sums of integers are exact, so no order has to be
//! prescribed for them: a scan by id, a walk by rank and a vectorised loop agree to the bit, and the
//! cumulative weight over all candidates *is* the total. A token that weighs less than half a
//! unit (`d < -28.42`: two million million times less likely than the most likely one) weighs nothing
//! and is never drawn.
//!
//! `e^d` is computed in F64 by additions and multiplications alone, each rounded once, so every
//! machine gets the same bits (a fused multiply-add would too, but without the instruction it is a
//! slow library call): `n = round_ties_even(d * log2 e)`, `r = d - n ln 2` with ln 2 split in two, the
//! Taylor polynomial of degree 11 in Horner form (truncation below 7e-15 relative on |r| <= 0.3466),
//! times 2^n. The relative error is below 1e-14, far under the 2^-40 of the rounding.

/// A weight: `e^d * 2^40`, at most `ONE`.
pub(crate) type Weight = u64;

const BITS: u32 = 40;
/// The weight of the most likely token.
pub(crate) const ONE: Weight = 1 << BITS;

/// Largest vocabulary whose total weight fits 64 bits with a bit to spare.
pub(crate) const MAX_VOCABULARY: usize = 1 << (63 - BITS);

/// Logits looked at together.
const BLOCK: usize = 32;
/// `e^-29 * 2^40 = 0.28` rounds to 0, so distances may be clamped here.
const FARTHEST: f64 = -29.0;
/// The upper 32 bits of ln 2: a product with `|n| <= 42` is exact.
const LN_2_HIGH: f64 = 0.693_147_180_369_123_8;
/// ln 2 less the upper part.
const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// Adding and subtracting 1.5 * 2^52 rounds to an integer, ties to even.
const ROUND_MAGIC: f64 = 6_755_399_441_055_744.0;
/// 1/11!, ..., 1/0!: the polynomial in Horner order.
const POLYNOMIAL: [f64; 12] = [
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// Turns logits into weights: the largest logit and the reciprocal of the temperature.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    pub(crate) largest: f32,
    inverse_temperature: f64,
}

impl Scale {
    /// `largest` is finite and no logit exceeds it; `temperature > 0`.
    pub(crate) fn new(largest: f32, temperature: f32) -> Self {
        Self { largest, inverse_temperature: 1.0 / f64::from(temperature) }
    }

    /// The weight of one logit; 0 for minus infinity.
    #[inline]
    pub(crate) fn weight(&self, logit: f32) -> Weight {
        weight((f64::from(logit) - f64::from(self.largest)) * self.inverse_temperature)
    }

    /// The weight of all logits together.
    ///
    /// Blocks in which nothing weighs anything are passed over: most of a vocabulary is far below the
    /// most likely token.
    pub(crate) fn total(&self, logits: &[f32]) -> Weight {
        let nothing_below = f64::from(self.largest) + FARTHEST / self.inverse_temperature;
        let nothing_below = nothing_below.max(f64::from(f32::MIN)) as f32;
        let mut total = 0;
        for block in logits.chunks(BLOCK) {
            if block.iter().fold(false, |any, &logit| any | (logit >= nothing_below)) {
                total += block.iter().map(|&logit| self.weight(logit)).sum::<Weight>();
            }
        }
        total
    }
}

/// `e^distance * 2^40` rounded to the nearest integer, for `distance <= 0`. Branch-free, so that the
/// loop over a vocabulary vectorises.
#[inline]
fn weight(distance: f64) -> Weight {
    let d = distance.max(FARTHEST);
    let shifted = d * std::f64::consts::LOG2_E + ROUND_MAGIC;
    let n = shifted - ROUND_MAGIC;
    let r = (d - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = POLYNOMIAL[0];
    for c in &POLYNOMIAL[1..] {
        p = p * r + c;
    }
    // The low bits of `shifted` are n in two's complement; adding (n + 40) to the exponent of a p
    // near 1 leaves it between -2 and 41.
    let exponent = shifted.to_bits().wrapping_add(u64::from(BITS)) << 52;
    let scaled = f64::from_bits(p.to_bits().wrapping_add(exponent));
    // At most 2^40, so that adding 2^52 leaves the nearest integer in the low bits.
    (scaled + (1_u64 << 52) as f64).to_bits() & ((1 << 52) - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_ends() {
        assert_eq!(weight(0.0), ONE);
        assert_eq!(weight(-0.0), ONE);
        assert_eq!(weight(f64::NEG_INFINITY), 0);
        assert_eq!(weight(-1e300), 0);
        assert_eq!(weight(-29.0), 0);
        assert_eq!(weight(-28.0), 1);
        assert_eq!(Scale::new(3.0, 1.0).total(&[3.0, f32::NEG_INFINITY, 3.0]), 2 * ONE);
        // A temperature so small that the distance overflows F32.
        assert_eq!(Scale::new(f32::MAX, f32::MIN_POSITIVE).weight(f32::MIN), 0);
    }

    /// The parts of ln 2 are what the comments claim.
    #[test]
    fn ln_2_is_split_exactly() {
        assert_eq!(LN_2_HIGH.to_bits() & ((1 << 21) - 1), 0, "32 significant bits");
        assert_eq!(LN_2_HIGH + LN_2_LOW, std::f64::consts::LN_2);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn within_half_a_unit_of_exp(distance in -29.5..0.0_f64) {
            let exact = distance.exp() * ONE as f64;
            let error = (weight(distance) as f64 - exact).abs();
            prop_assert!(error <= 0.5 + exact * 1e-14, "{distance}: off by {error}");
        }

        #[test]
        fn blocks_passed_over_weigh_nothing(
            row in prop::collection::vec(prop_oneof![-40.0..0.0_f32, Just(f32::NEG_INFINITY), Just(f32::MIN)], 1..200),
            largest in prop_oneof![Just(0.0_f32), Just(1e6), Just(f32::MAX), -1e30..1e30_f32],
            temperature in prop_oneof![0.01..2.0_f32, Just(f32::MIN_POSITIVE)],
        ) {
            let row: Vec<f32> = row.iter().map(|offset| (offset * temperature + largest).min(largest)).collect();
            let scale = Scale::new(largest, temperature);
            let one_by_one: Weight = row.iter().map(|&logit| scale.weight(logit)).sum();
            prop_assert_eq!(scale.total(&row), one_by_one);
        }

        #[test]
        fn never_grows_with_the_distance(distance in -29.5..0.0_f32) {
            let next = f64::from(distance.next_up());
            prop_assert!(weight(f64::from(distance)) <= weight(next));
        }
    }
}
