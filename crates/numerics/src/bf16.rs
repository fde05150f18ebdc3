//! bfloat16: the upper half of an F32.

/// The F32 that a bf16 stands for; exact.
#[inline]
pub fn decode(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bf16, ties to even. Values beyond the largest finite bf16 become infinite as IEEE says;
/// a NaN stays a NaN (its quiet bit is set, so that cutting the payload cannot make an infinity of it).
#[inline]
pub fn encode(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return ((bits >> 16) | 0x0040) as u16;
    }
    let odd = (bits >> 16) & 1;
    (bits.wrapping_add(0x7FFF + odd) >> 16) as u16
}

/// Rounds to bf16 and back: what a value is after one rounding point of the classes bf16 and fp8.
#[inline]
pub fn round(value: f32) -> f32 {
    decode(encode(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_a_round_trip() {
        for bits in 0..=u16::MAX {
            let value = decode(bits);
            if value.is_nan() {
                assert!(decode(encode(value)).is_nan(), "{bits:#06x}");
            } else {
                assert_eq!(encode(value), bits);
            }
        }
    }

    #[test]
    fn rounds_like_the_half_crate() {
        // Every pattern of the lower half that decides, below and above every 251st upper half.
        for upper in (0..=u16::MAX).step_by(251) {
            for lower in [0_u16, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let value = f32::from_bits(u32::from(upper) << 16 | u32::from(lower));
                let expected = half::bf16::from_f32(value);
                if value.is_nan() {
                    assert!(decode(encode(value)).is_nan());
                } else {
                    assert_eq!(encode(value), expected.to_bits(), "{value:?}");
                }
            }
        }
    }

    #[test]
    fn ties_go_to_even_and_overflow_to_infinity() {
        assert_eq!(round(1.0 + 2.0_f32.powi(-8)), 1.0);
        assert_eq!(round(1.0 + 3.0 * 2.0_f32.powi(-8)), 1.0 + 2.0_f32.powi(-6));
        assert_eq!(round(f32::MAX), f32::INFINITY);
        assert_eq!(round(-0.0).to_bits(), (-0.0_f32).to_bits());
    }
}
