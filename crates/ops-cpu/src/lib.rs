//! The CPU backend: kernels for AVX2 and AVX-512 beside a portable form, packed weights, a thread pool.
//!
//! [`CpuBackend`] gives the bits that docs/numerics.md specifies, on every instruction set and with any
//! number of threads: kernels are written once over `lanes::Lanes` (16 F32 values, each operation rounded
//! like its scalar form) and instantiated per instruction set; what is split over threads is whole output
//! elements, never a sum. `cadre_ops::reference` is what the tests compare with.
//!
//! Where to look: `options` what a backend is made from; `memory` aligned arrays; `staging` host memory that sockets use; `pool` the threads;
//! `packed` the layout of weights; `kernels` arithmetic; `table` one instance of the kernels per
//! instruction set; `backend` validation and the split into tasks; [`measure`] what the machine can do.
//!
//! Every operation is done when its call returns; a queue only owns scratch memory.
#![allow(unsafe_code, reason = "vector intrinsics, aligned memory and a fork-join pool need it")]

#[cfg(target_endian = "big")]
compile_error!("packed weights, cached rows and frames are little-endian and used in place");

mod backend;
mod kernels;
mod lanes;
pub mod measure;
mod memory;
mod options;
mod packed;
mod pool;
mod staging;
mod system;
mod table;

pub use backend::{
    Attention, Buffer, CpuBackend, CpuQueue, CpuSizes, DispatchRows, Done, KvCache, KvUp, Vector,
};
pub use memory::allocated_bytes;
pub use options::{CpuOptions, Isa, UnsupportedIsa};
pub use packed::Weight;
pub use staging::Staging;

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
