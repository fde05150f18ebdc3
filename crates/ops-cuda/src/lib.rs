//! The CUDA backend: kernels for Hopper, device memory, streams, and the loader of machine code.
//!
//! It builds, lints and runs its unit tests on machines without CUDA: the driver is a library that is opened at run
//! time ([`Device::open`] says what was looked for when it is missing), and kernels are files of machine code that
//! `cargo xtask kernels` makes and that lie beside the binary ([`kernels::folder`]). No part of NVIDIA's toolkit is
//! needed to run: only a driver of CUDA 13.0 or newer.
//!
//! Where to look: `kernels/` the arithmetic, one family a file; [`kernels`] the table of entry points; `device` the
//! driver, memory, streams and events; `launch` arguments and the launch itself; [`backend`] the operations.
#![allow(unsafe_code, reason = "every call of the driver is one")]

#[cfg(target_endian = "big")]
compile_error!("packed weights, cached rows and frames are little-endian and used in place");

pub mod backend;
mod device;
mod error;
pub mod kernels;
mod launch;
pub mod measure;

pub use backend::{CudaBackend, CudaSizes};
pub use device::{CAPABILITY, Device, DeviceInfo, Event, Memory, Pinned, Stream, devices};
pub use error::CudaError;
pub use launch::{Arg, Grid};
