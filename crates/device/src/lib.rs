//! Which device a process computes on: the one place that knows every backend.
//!
//! A role says what it does with a backend, whatever its type ([`OnBackend`]), and [`open`] calls it with the
//! backend of the device asked for. A new backend is a variant of [`Device`] and an arm of [`open`]; no role
//! changes. Nothing falls back: a device that was asked for and cannot be had is an error that says what was
//! looked for.

use std::{fmt, str::FromStr, sync::Arc};

use cadre_ops::{Backend, OpsError};
pub use cadre_ops_cpu::Isa;
use cadre_ops_cpu::{CpuBackend, CpuOptions};
use cadre_ops_cuda::CudaBackend;
pub use cadre_ops_cuda::CudaError;
use cadre_types::NumericsClass;

pub mod metrics;

pub use metrics::{DeviceMeter, DeviceMetrics};

/// A device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU by its number in the order of the driver (`CUDA_VISIBLE_DEVICES` counts).
    Cuda(u32),
}

/// A static executable has no loader that could open a driver's library.
const STATIC: bool = cfg!(target_feature = "crt-static");

impl Device {
    /// What the machine has, best first: its first GPU that there are kernels for, if they are installed beside the
    /// program, or the processor.
    pub fn of_machine() -> Self {
        if STATIC {
            return Self::Cpu;
        }
        let gpus = cadre_ops_cuda::devices().unwrap_or_default();
        let usable = gpus.iter().find(|gpu| gpu.capability == cadre_ops_cuda::CAPABILITY);
        match usable.map(|gpu| u32::try_from(gpu.ordinal)) {
            Some(Ok(number)) if cadre_ops_cuda::kernels::folder(None).is_ok() => Self::Cuda(number),
            _ => Self::Cpu,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(name: &str) -> Result<Self, UnknownDevice> {
        if name == "cpu" {
            return Ok(Self::Cpu);
        }
        // Digits alone: `cuda:+1` is no name of a device.
        let number = name.strip_prefix("cuda:").filter(|number| number.bytes().all(|b| b.is_ascii_digit()));
        let number = number.and_then(|number| number.parse().ok());
        number.map(Self::Cuda).ok_or_else(|| UnknownDevice(name.to_owned()))
    }
}

/// A name that is no device's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no device: give cpu or cuda:N")]
pub struct UnknownDevice(String);

/// What a backend is made from.
#[derive(Clone, Debug)]
pub struct BackendOptions {
    /// The device; absent takes what the machine has.
    pub device: Option<Device>,
    /// The numerics class.
    pub class: NumericsClass,
    /// Threads on a processor, the caller's included; absent takes what the machine or its container allows.
    pub threads: Option<usize>,
    /// Instruction set on a processor; absent takes the best.
    pub isa: Option<Isa>,
}

impl BackendOptions {
    /// The machine's device with all it has.
    pub fn new(class: NumericsClass) -> Self {
        Self { device: None, class, threads: None, isa: None }
    }
}

/// What is done with a backend, whatever its type.
pub trait OnBackend {
    /// What comes of it: free of the backend's type.
    type Output;

    /// Does it.
    fn run<B: Backend>(self, backend: Arc<B>) -> Self::Output;
}

/// Opens the device and hands its backend over.
pub fn open<W: OnBackend>(options: &BackendOptions, with: W) -> Result<W::Output, DeviceError> {
    let device = options.device.unwrap_or_else(Device::of_machine);
    match device {
        Device::Cpu if options.class.needs_cuda() => Err(DeviceError::Class { device, class: options.class }),
        Device::Cpu => {
            let cpu =
                CpuOptions { threads: options.threads, isa: options.isa, ..CpuOptions::new(options.class) };
            let backend = CpuBackend::new(cpu).map_err(|source| DeviceError::Open { device, source })?;
            Ok(hand_over(options, device, backend, with))
        }
        Device::Cuda(_) if STATIC => Err(DeviceError::Static { device }),
        Device::Cuda(number) => {
            let backend = CudaBackend::open(number as usize, options.class, None)
                .map_err(|source| DeviceError::Cuda { device, source })?;
            Ok(hand_over(options, device, backend, with))
        }
    }
}

fn hand_over<B: Backend, W: OnBackend>(
    options: &BackendOptions,
    device: Device,
    backend: B,
    with: W,
) -> W::Output {
    let memory = backend.memory();
    tracing::info!(
        %device,
        chosen = if options.device.is_some() { "by --device" } else { "as what this machine has" },
        backend = backend.describe(),
        memory_total = memory.total,
        memory_used = memory.used,
        "computing"
    );
    with.run(Arc::new(backend))
}

/// Why a device cannot be computed on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DeviceError {
    /// The backend did not start.
    #[error("device {device}: {source}")]
    Open {
        /// The device.
        device: Device,
        /// What the backend said.
        source: OpsError,
    },
    /// The GPU cannot be had.
    #[error("device {device}: {source}")]
    Cuda {
        /// The device.
        device: Device,
        /// What was looked for and not found, or what the driver said.
        source: CudaError,
    },
    /// The program cannot open a driver.
    #[error(
        "device {device}: this program is linked statically and can open no GPU's driver; use a build that is linked \
         dynamically, as in the image of `cargo xtask image --cuda`"
    )]
    Static {
        /// The device.
        device: Device,
    },
    /// The device does not compute the class.
    #[error("device {device}: numerics class {class} is computed by CUDA devices only; use --device cuda:N")]
    Class {
        /// The device.
        device: Device,
        /// The class.
        class: NumericsClass,
    },
}

impl DeviceError {
    /// Whether the device has no room.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Cuda { source, .. } => matches!(source, CudaError::OutOfMemory { .. }),
            Self::Open { source, .. } => matches!(source, OpsError::OutOfMemory { .. }),
            Self::Static { .. } | Self::Class { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    struct Describe;

    impl OnBackend for Describe {
        type Output = (String, NumericsClass);

        fn run<B: Backend>(self, backend: Arc<B>) -> Self::Output {
            (backend.identity().device, backend.class())
        }
    }

    #[test]
    fn names_are_read_and_written() {
        for (name, device) in
            [("cpu", Device::Cpu), ("cuda:0", Device::Cuda(0)), ("cuda:17", Device::Cuda(17))]
        {
            assert_eq!(name.parse(), Ok(device));
            assert_eq!(device.to_string(), name);
        }
        for name in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:+1", "cuda:4294967296", "CPU", "cpu:0"] {
            let error = name.parse::<Device>().unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}")) && error.contains("cpu or cuda:N"), "{error}");
        }
    }

    #[test]
    fn the_processor_is_opened_when_asked_for_and_by_default() {
        let class = NumericsClass::F32;
        for device in [None, Some(Device::Cpu)] {
            let options = BackendOptions { device, threads: Some(1), ..BackendOptions::new(class) };
            let (name, found) = open(&options, Describe).unwrap();
            assert_eq!(found, class);
            // A machine with a GPU and kernels takes that by default.
            assert!(name == "cpu" || (device.is_none() && name.starts_with("cuda:")), "{name}");
        }
    }

    #[test]
    fn a_gpu_that_cannot_be_had_is_an_error_and_not_the_processor() {
        let options =
            BackendOptions { device: Some(Device::Cuda(1000)), ..BackendOptions::new(NumericsClass::Fp8) };
        let error = open(&options, Describe).unwrap_err().to_string();
        // Without a driver it says so; with one, number 1,000 is not there.
        assert!(error.contains("cuda:1000"), "{error}");
        assert!(error.contains("libcuda.so.1") || error.contains("the driver sees"), "{error}");
    }

    #[test]
    fn a_class_of_gpus_is_refused_by_the_processor() {
        let options =
            BackendOptions { device: Some(Device::Cpu), ..BackendOptions::new(NumericsClass::CudaFp8) };
        let error = open(&options, Describe).unwrap_err().to_string();
        for words in ["cpu", "cuda-fp8", "--device cuda:N"] {
            assert!(error.contains(words), "{words:?} not in {error:?}");
        }
    }
}
