//! The backend: validation, memory and the order of launches. What a kernel computes is in `kernels/`.
//!
//! `operations` implements the trait; each operation's arguments and launches are in the module of its kind: `rows`,
//! `product` (dense, and the experts), `attend`, `routed` (the gate and combine), `sample`, `transfer` (to the host and
//! back). `tensor` is what class `cuda-fp8` launches in their place, `weights` what stays on the device, `step` what
//! comes with every step, `sizes` what all of it takes.
//!
//! The classes `f32`, `bf16` and `fp8` are computed on CUDA cores in the order of docs/numerics.md, so a device gives
//! the bits of the reference and of every CPU, and may serve beside them. Activations are BF16 in the classes that
//! round, F32 in `f32`; every sum is F32.

mod attend;
mod operations;
mod planes;
mod product;
mod queue;
mod routed;
mod rows;
mod sample;
mod sizes;
mod staging;
mod step;
mod tensor;
mod transfer;
mod weights;

use std::{path::Path, sync::Arc};

use cadre_ops::{OpsError, PassLimits, check::Dims};
use cadre_types::NumericsClass;

pub use self::{
    attend::KvCache,
    planes::{Plane, Rows},
    product::ExpertTable,
    queue::CudaQueue,
    queue::QueueEvent,
    sample::Samples,
    sizes::CudaSizes,
    staging::Staging,
    step::{Pass, Routing, Step},
    weights::{Attention, KvUp, Vector, Weight},
};
use self::{staging::StagingPool, weights::Loader};
use crate::{
    device::{Device, Stream},
    error::CudaError,
    launch::Grid,
};

/// Threads of a block for operations over the elements of a row.
const THREADS: u32 = 256;

/// Received rows and pairs of one pass: gate and up of V3's experts in F32 are 16 KiB a pair, so that a pass has
/// 128 MiB of them.
const PASS: PassLimits = PassLimits { rows: 4096, pairs: 8192 };

/// A CUDA device in one numerics class.
#[derive(Debug)]
pub struct CudaBackend {
    device: Arc<Device>,
    class: NumericsClass,
    pool: Arc<StagingPool>,
    loader: Loader,
    /// For what has no queue: zeroing.
    stream: Stream,
}

impl CudaBackend {
    /// Opens `cuda:ordinal` for a class, with the kernels of a folder or of the one that
    /// [`kernels::folder`](crate::kernels::folder) finds.
    pub fn open(ordinal: usize, class: NumericsClass, folder: Option<&Path>) -> Result<Self, CudaError> {
        let device = Device::open(ordinal, folder)?;
        let loader = Loader::new(&device, class == NumericsClass::CudaFp8)?;
        Ok(Self {
            pool: Arc::new(StagingPool::new(device.clone())),
            loader,
            stream: Stream::new(&device)?,
            device,
            class,
        })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Whether the class uses tensor cores.
    fn tensor(&self) -> bool {
        self.sizes().tensor()
    }

    fn sizes(&self) -> CudaSizes {
        CudaSizes { class: self.class }
    }

    /// Whether the class rounds activations to BF16.
    fn rounds(&self) -> bool {
        self.sizes().rounds()
    }

    fn plane(&self, op: &'static str, rows: usize, cols: usize, bf16: bool) -> Result<Plane, OpsError> {
        let plane = Plane::new(&self.stream, op, Dims { rows, cols }, bf16)?;
        // A queue does not wait for our stream.
        self.stream.synchronize(op)?;
        Ok(plane)
    }
}

/// Blocks of threads for operations over elements: enough to fill the device, each thread takes several.
fn over(elements: usize) -> Grid {
    Grid::of(elements.div_ceil(THREADS as usize).min(4096), THREADS)
}

const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<CudaBackend>();
};
