//! Launches: arguments checked against the table, then given to the driver.

use std::ffi::c_void;

use cudarc::driver::result;

use crate::{
    device::{Memory, Stream},
    error::CudaError,
    kernels::{Kernel, Kind},
};

/// Most arguments of a kernel in the table.
const MOST: usize = 24;

/// One argument.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// An address.
    Pointer(u64),
    /// 32 bits.
    U32(u32),
    /// 64 bits.
    U64(u64),
    /// F32.
    F32(f32),
    /// A structure, as its bytes.
    Struct(&'a [u8]),
}

impl Arg<'_> {
    /// No address.
    pub const NULL: Self = Self::Pointer(0);

    fn kind(&self) -> Kind {
        match self {
            Self::Pointer(_) => Kind::Pointer,
            Self::U32(_) => Kind::U32,
            Self::U64(_) => Kind::U64,
            Self::F32(_) => Kind::F32,
            Self::Struct(bytes) => Kind::Struct(bytes.len()),
        }
    }
}

impl From<&Memory> for Arg<'_> {
    fn from(memory: &Memory) -> Self {
        Self::Pointer(memory.address())
    }
}

impl From<u32> for Arg<'_> {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<bool> for Arg<'_> {
    fn from(value: bool) -> Self {
        Self::U32(u32::from(value))
    }
}

impl From<f32> for Arg<'_> {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

/// Thread blocks and their threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks along x and y.
    pub blocks: (usize, usize),
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory that a block asks for.
    pub shared: usize,
}

impl Grid {
    /// Blocks along x.
    pub fn of(blocks: usize, threads: u32) -> Self {
        Self { blocks: (blocks, 1), threads, shared: 0 }
    }

    /// Blocks along y too.
    pub fn by(self, y: usize) -> Self {
        Self { blocks: (self.blocks.0, y), ..self }
    }

    /// With shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes, ..self }
    }
}

impl Stream {
    /// Queues a kernel. A grid without blocks is nothing to do. The caller answers for the addresses: that they hold
    /// what the kernel reads and writes until it has run.
    pub fn launch(&self, kernel: Kernel, grid: Grid, args: &[Arg<'_>]) -> Result<(), CudaError> {
        let entry = kernel.entry();
        let refuse = |message: String| Err(CudaError::Failed { op: entry.name, message });
        if !args.iter().map(Arg::kind).eq(entry.args.iter().copied()) {
            return refuse(format!("arguments {args:?} are not {:?}", entry.args));
        }
        let (x, y) = grid.blocks;
        if x == 0 || y == 0 {
            return Ok(());
        }
        // The limits of compute capability 9.0.
        if x > i32::MAX as usize || y > 65_535 {
            return refuse(format!("a grid of {x} x {y} thread blocks is too large"));
        }
        let most = self.device().shared_bytes(kernel);
        if grid.shared > most {
            return refuse(format!("{} bytes of shared memory are asked, {most} are there", grid.shared));
        }
        // Each scalar in a place of its own; the driver copies them before it returns.
        let mut words = [0_u64; MOST];
        let mut places = [std::ptr::null_mut::<c_void>(); MOST];
        for ((arg, word), place) in args.iter().zip(&mut words).zip(&mut places) {
            match arg {
                Arg::Pointer(value) | Arg::U64(value) => *word = *value,
                Arg::U32(value) => *word = u64::from(*value),
                Arg::F32(value) => *word = u64::from(value.to_bits()),
                Arg::Struct(_) => {}
            }
            *place = match arg {
                Arg::Struct(bytes) => bytes.as_ptr().cast_mut().cast(),
                _ => std::ptr::from_mut(word).cast(),
            };
        }
        self.device().enter()?;
        // SAFETY: the context is current; the function belongs to it; one place per argument of the table, which the
        // loader compared with the function; the addresses behind pointers are the caller's promise.
        unsafe {
            result::launch_kernel(
                self.device().function(kernel),
                (x as u32, y as u32, 1),
                (grid.threads, 1, 1),
                grid.shared as u32,
                self.raw(),
                &mut places[..args.len()],
            )
        }
        .map_err(CudaError::failed(entry.name))
    }
}
