//! The arithmetic that every backend must reproduce bit for bit.
//!
//! docs/numerics.md writes down, for every output element, the order of its products and sums; this
//! crate is the same text as code. It is pure and scalar: nothing here looks at the machine, so two
//! processes on different CPUs that follow it write the same bits. Fast kernels repeat these operations
//! one by one in vector registers and are compared with this crate.
//!
//! What is relied on: IEEE 754 binary32/binary64 with round to nearest even for `+ - * /`, square root
//! and fused multiply-add ([`f32::mul_add`]). No function of the platform's mathematics library is used.
//! Payload and sign of a NaN are not specified anywhere.
//!
//! Read [`linear`] first, then [`reduce`], then [`softmax`].

pub mod bf16;
pub mod draw;
pub mod e4m3;
pub mod exp;
pub mod linear;
pub mod norm;
pub mod quant;
pub mod reduce;
pub mod rope;
pub mod softmax;

/// Elements along the reduction that share one scale, and the length of a block sum.
pub const BLOCK: usize = 128;

#[cfg(test)]
mod tests {
    /// Optimised as it is, this crate counts with checks wherever tests run (CONTRIBUTING.md).
    #[test]
    fn overflows_and_assertions_are_checked() {
        let overflow = std::panic::catch_unwind(|| std::hint::black_box(u8::MAX) + std::hint::black_box(1));
        assert!(overflow.is_err(), "255_u8 + 1 is {overflow:?}");
        assert!(std::panic::catch_unwind(|| debug_assert!(std::hint::black_box(false))).is_err());
    }
}
