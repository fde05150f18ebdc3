//! e4m3fn: sign, four exponent bits of bias 7, three mantissa bits; no infinities; the two codes with all
//! bits below the sign set are NaN; largest magnitude 448, smallest normal 2^-6, subnormal step 2^-9.

/// Largest finite magnitude.
pub const MAX: f32 = 448.0;

/// Kernels widen a code by moving its bits into an F16, whose exponent bias is 8 larger: what they
/// multiply with is `value * 2^-8`, exactly. [`FOLD`] in the scale undoes it, exactly.
pub const FOLD: f32 = 256.0;

/// Whether a code is one of the two NaN.
#[inline]
pub fn is_nan(code: u8) -> bool {
    code & 0x7F == 0x7F
}

/// The value of a code; exact.
#[inline]
pub fn decode(code: u8) -> f32 {
    if is_nan(code) {
        return f32::NAN;
    }
    let sign = u32::from(code & 0x80) << 24;
    let exponent = u32::from(code >> 3) & 0xF;
    let mantissa = u32::from(code & 7);
    let magnitude = if exponent == 0 {
        mantissa as f32 * (1.0 / 512.0)
    } else {
        f32::from_bits((exponent + 120) << 23 | mantissa << 20)
    };
    f32::from_bits(magnitude.to_bits() | sign)
}

/// The nearest value that has a code, ties to even, saturating at 448. NaN stays NaN.
#[inline]
pub fn round(value: f32) -> f32 {
    if value.is_nan() {
        return f32::NAN;
    }
    let sign = value.to_bits() & 0x8000_0000;
    let magnitude = f32::from_bits(value.to_bits() & 0x7FFF_FFFF);
    let rounded = if magnitude < 1.0 / 64.0 {
        // One unit in the last place of 2^14 is the subnormal step 2^-9, so this sum rounds to it.
        (magnitude + 16384.0) - 16384.0
    } else {
        let bits = magnitude.to_bits();
        let odd = (bits >> 20) & 1;
        let cut = f32::from_bits(bits.wrapping_add(0x7_FFFF + odd) & 0xFFF0_0000);
        if cut > MAX { MAX } else { cut }
    };
    f32::from_bits(rounded.to_bits() | sign)
}

/// The code of [`round`]`(value)`; NaN becomes 0x7F or 0xFF by its sign.
#[inline]
pub fn encode(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    if value.is_nan() {
        return sign | 0x7F;
    }
    let magnitude = f32::from_bits(round(value).to_bits() & 0x7FFF_FFFF);
    let code = if magnitude < 1.0 / 64.0 {
        (magnitude * 512.0) as u8
    } else {
        ((magnitude.to_bits() >> 20) - (120 << 3)) as u8
    };
    sign | code
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of a code from the definition, in F64 powers.
    fn defined(code: u8) -> f64 {
        let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
        let exponent = i32::from(code >> 3 & 0xF);
        let mantissa = f64::from(code & 7);
        sign * match exponent {
            0 => mantissa / 8.0 * 2.0_f64.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2.0_f64.powi(exponent - 7),
        }
    }

    #[test]
    fn all_codes_decode_as_defined_and_encode_back() {
        for code in 0..=u8::MAX {
            let value = decode(code);
            if is_nan(code) {
                assert!(value.is_nan() && is_nan(encode(value)), "{code:#04x}");
            } else {
                assert_eq!(f64::from(value), defined(code), "{code:#04x}");
                assert_eq!(value.is_sign_negative(), code & 0x80 != 0);
                assert_eq!(encode(value), code);
                assert_eq!(round(value).to_bits(), value.to_bits());
            }
        }
    }

    /// Between every two neighbours: just below the middle, the middle (to the even code), just above.
    #[test]
    fn rounds_to_nearest_and_ties_to_even() {
        for code in 0..0x7E_u8 {
            let (low, high) = (decode(code), decode(code + 1));
            let middle = (low + high) / 2.0;
            let even = if code & 1 == 0 { code } else { code + 1 };
            for (value, expected) in
                [(middle.next_down(), code), (middle, even), (middle.next_up(), code + 1)]
            {
                assert_eq!(encode(value), expected, "{value}");
                assert_eq!(encode(-value), expected | 0x80, "-{value}");
                assert_eq!(round(value), decode(expected));
            }
        }
    }

    #[test]
    fn saturates_and_keeps_nan() {
        for value in [448.1, 463.9, 464.0, 465.0, 1e30, f32::MAX, f32::INFINITY] {
            assert_eq!(encode(value), 0x7E, "{value}");
            assert_eq!(encode(-value), 0xFE, "-{value}");
        }
        assert!(is_nan(encode(f32::NAN)) && is_nan(encode(-f32::NAN)));
        assert_eq!(encode(0.0), 0);
        assert_eq!(encode(-0.0), 0x80);
        assert_eq!(encode(f32::MIN_POSITIVE), 0);
    }

    /// The widening that kernels use: sign and the other bits moved to their places in an F16.
    #[test]
    fn f16_bits_of_a_code_are_the_value_folded() {
        for code in (0..=u8::MAX).filter(|code| !is_nan(*code)) {
            let bits = (u16::from(code) & 0x80) << 8 | (u16::from(code) & 0x7F) << 7;
            let folded = half::f16::from_bits(bits).to_f32();
            assert_eq!((folded * FOLD).to_bits(), decode(code).to_bits(), "{code:#04x}");
        }
    }
}
