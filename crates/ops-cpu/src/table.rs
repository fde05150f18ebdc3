//! One instance of the kernels per instruction set, behind function pointers chosen once.
//!
//! The macro makes, for each instruction set, functions that enable it and inline the generic kernel: inside
//! them the intrinsics are instructions. A [`Kernels`] table can only be had through [`Kernels::of`], which
//! checks that the machine has the set; that is the precondition on instructions of every kernel.

use std::ops::Range;

use crate::{
    kernels::{
        attention::{self, Block, Page, Seen, State},
        probe,
        product::{self, Product},
        rows::{self, ExpertRows},
    },
    lanes::scalar::Scalar,
    options::{Isa, UnsupportedIsa},
};

/// Declares the table and its instances from one list of kernels, so that they cannot drift apart.
macro_rules! kernels {
    ($($(#[$doc:meta])* $name:ident = $module:ident::$kernel:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)?;)*) => {
        /// The kernels of one instruction set. Every function's safety contract is that of the generic
        /// kernel, less the instruction set.
        pub(crate) struct Kernels {
            $($(#[$doc])* pub(crate) $name: unsafe fn($($ty),*) $(-> $out)?,)*
        }

        kernels!(@instance scalar, Scalar, [], $($name = $module::$kernel($($arg: $ty),*) $(-> $out)?;)*);
        #[cfg(target_arch = "x86_64")]
        kernels!(@instance avx2, crate::lanes::avx2::Avx2, [#[target_feature(enable = "avx2,fma")]],
            $($name = $module::$kernel($($arg: $ty),*) $(-> $out)?;)*);
        #[cfg(target_arch = "x86_64")]
        kernels!(@instance avx512, crate::lanes::avx512::Avx512,
            [#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]],
            $($name = $module::$kernel($($arg: $ty),*) $(-> $out)?;)*);
    };
    (@instance $isa:ident, $lanes:ty, $features:tt, $($name:ident = $module:ident::$kernel:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)?;)*) => {
        mod $isa {
            use super::*;
            $(kernels!(@function $features, $lanes, $name = $module::$kernel($($arg: $ty),*) $(-> $out)?);)*
            pub(super) static KERNELS: Kernels = Kernels { $($name,)* };
        }
    };
    (@function [$($feature:tt)*], $lanes:ty, $name:ident = $module:ident::$kernel:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)?) => {
        $($feature)*
        #[allow(clippy::too_many_arguments, reason = "the kernel's arguments")]
        unsafe fn $name($($arg: $ty),*) $(-> $out)? {
            // SAFETY: the kernel's contract is passed on; `Kernels::of` checked the instruction set.
            unsafe { $module::$kernel::<$lanes>($($arg),*) }
        }
    };
}

kernels! {
    /// Entries `rows` of panels `panels` of a product.
    product = product::run(p: &Product, panels: Range<usize>, rows: Range<usize>);
    /// RMSNorm of one row.
    rms_norm = rows::rms_norm(x: *const f32, weight: *const f32, eps: f32, cols: usize, round: bool, y: *mut f32);
    /// Activation quantiser of one row.
    quantise = rows::quantise(x: *const f32, cols: usize, powers_of_two: bool, y: *mut f32, scales: *mut f32);
    /// Codes of one row of e4m3 values.
    encode_e4m3 = rows::encode_e4m3(from: *const f32, cols: usize, to: *mut u8);
    /// Sigmoid of one row.
    sigmoid = rows::sigmoid(x: *mut f32, cols: usize);
    /// Rotation of one rotary part.
    rotate = rows::rotate(x: *mut f32, table: *const f32, pairs: usize, round: bool);
    /// One row of bf16 to F32.
    widen_bf16 = rows::widen_bf16(from: *const u8, cols: usize, to: *mut f32);
    /// One row of F32 to bf16.
    narrow_bf16 = rows::narrow_bf16(from: *const f32, cols: usize, to: *mut u8);
    /// Weighted sum of one token's expert rows.
    combine = rows::combine(rows: &ExpertRows, weights: *const f32, top_k: usize, shared: *const f32, cols: usize, x: *mut f32);
    /// `x += delta`.
    add = rows::add(x: *mut f32, delta: *const f32, len: usize);
    /// One block of keys into the state of queries.
    attend = attention::block(block: &Block, q: *const f32, count: usize, seen: Seen, state: &State);
    /// Division by the denominators.
    normalise = attention::normalise(state: &State, count: usize, vectors: usize);
    /// Cached rows of a page to F32.
    widen_page = attention::widen_page(page: &Page, count: usize, from: usize, width: usize, to: *mut f32, stride: usize);
    /// Reads memory.
    read = probe::read(from: *const f32, len: usize) -> f32;
    /// Multiplies and adds in registers.
    multiply_add = probe::multiply_add(rounds: usize, seed: f32) -> f32;
}

impl Kernels {
    /// The table of an instruction set that this machine has.
    pub(crate) fn of(isa: Isa) -> Result<&'static Self, UnsupportedIsa> {
        if !isa.available() {
            return Err(UnsupportedIsa(isa));
        }
        Ok(match isa {
            Isa::Scalar => &scalar::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &avx512::KERNELS,
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => return Err(UnsupportedIsa(isa)),
        })
    }
}
