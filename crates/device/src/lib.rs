//! Which device a process computes on: the one place that knows every backend.
//!
//! A role says what it does with a backend, whatever its type ([`OnBackend`]), and [`open`] calls it with the
//! backend of the device asked for. A new backend is a variant of [`Device`] and an arm of [`open`]; no role
//! changes. Nothing falls back: a device that was asked for and cannot be had is an error that says what was
//! looked for.

use std::{
    fmt,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cadre_ops::{Backend, OpsError, Sizes};
pub use cadre_ops_cpu::Isa;
use cadre_ops_cpu::{CpuBackend, CpuOptions, CpuSizes};
pub use cadre_ops_cuda::CudaError;
use cadre_ops_cuda::{CudaBackend, CudaSizes};
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
        Choice::of_machine().device
    }

    /// Whether it is a GPU.
    pub fn is_gpu(self) -> bool {
        matches!(self, Self::Cuda(_))
    }
}

/// A device that was chosen, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Choice {
    device: Device,
    why: String,
}

/// A GPU as the driver shows it: number, name, compute capability.
type Gpu = (usize, String, (i32, i32));

impl Choice {
    fn of(asked: Option<Device>) -> Self {
        match asked {
            Some(device) => Self { device, why: "by --device".to_owned() },
            None => Self::of_machine(),
        }
    }

    fn of_machine() -> Self {
        if STATIC {
            let why = "no GPU is used: a program that is linked statically can open no driver".to_owned();
            return Self { device: Device::Cpu, why };
        }
        let gpus = cadre_ops_cuda::devices()
            .map(|gpus| gpus.into_iter().map(|gpu| (gpu.ordinal, gpu.name, gpu.capability)).collect())
            .map_err(|error| error.to_string());
        let kernels = cadre_ops_cuda::kernels::folder(None).map(|_| ()).map_err(|error| error.to_string());
        Self::among(gpus, kernels)
    }

    /// The first GPU that there are kernels for, if they are installed.
    fn among(gpus: Result<Vec<Gpu>, String>, kernels: Result<(), String>) -> Self {
        let cpu = |why: String| Self { device: Device::Cpu, why: format!("no GPU is used: {why}") };
        let gpus = match gpus {
            Ok(gpus) if gpus.is_empty() => return cpu("the driver sees none".to_owned()),
            Ok(gpus) => gpus,
            Err(error) => return cpu(error),
        };
        let usable = gpus.iter().find(|(.., capability)| *capability == cadre_ops_cuda::CAPABILITY);
        let Some((ordinal, name, _)) = usable else {
            let seen = gpus.iter().map(|(ordinal, name, (major, minor))| {
                format!("cuda:{ordinal} is a {name} of compute capability {major}.{minor}")
            });
            let (major, minor) = cadre_ops_cuda::CAPABILITY;
            return cpu(format!(
                "there are kernels for {major}.{minor} alone, and {}",
                seen.collect::<Vec<_>>().join(", ")
            ));
        };
        match (u32::try_from(*ordinal), kernels) {
            (Ok(number), Ok(())) => Self {
                device: Device::Cuda(number),
                why: format!("the first {name} of this machine; --device says otherwise"),
            },
            (_, Err(error)) => cpu(format!("cuda:{ordinal} is a {name}, but {error}")),
            (Err(error), _) => cpu(format!("cuda:{ordinal}: {error}")),
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

/// What allocations take on a device, whether or not this machine has it: for plans. `threads` as in
/// [`BackendOptions`].
pub fn sizes(device: Device, class: NumericsClass, threads: Option<usize>) -> Box<dyn Sizes> {
    match device {
        Device::Cpu => {
            let machine = || std::thread::available_parallelism().map_or(1, usize::from);
            Box::new(CpuSizes { class, threads: threads.unwrap_or_else(machine) })
        }
        Device::Cuda(_) => Box::new(CudaSizes { class }),
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
    Ok(OpenDevice::open(options)?.with(with))
}

/// A device with its backend, for every role of a process that computes on it: one context, one set of kernels. Cheap
/// to clone.
#[derive(Clone)]
pub struct OpenDevice {
    device: Device,
    backend: AnyBackend,
    loading: Arc<Mutex<()>>,
}

#[derive(Clone)]
enum AnyBackend {
    Cpu(Arc<CpuBackend>),
    Cuda(Arc<CudaBackend>),
}

impl fmt::Debug for OpenDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OpenDevice").field(&self.device).finish()
    }
}

impl OpenDevice {
    /// Opens the device asked for, or what the machine has, and says in the log which and why.
    pub fn open(options: &BackendOptions) -> Result<Self, DeviceError> {
        let Choice { device, why } = Choice::of(options.device);
        let backend = match device {
            Device::Cpu if options.class.needs_cuda() => {
                return Err(DeviceError::Class { device, class: options.class, why });
            }
            Device::Cpu => {
                let cpu = CpuOptions {
                    threads: options.threads,
                    isa: options.isa,
                    ..CpuOptions::new(options.class)
                };
                let backend = CpuBackend::new(cpu).map_err(|source| DeviceError::Open { device, source })?;
                AnyBackend::Cpu(Arc::new(backend))
            }
            Device::Cuda(_) if STATIC => return Err(DeviceError::Static { device }),
            Device::Cuda(number) => {
                let backend = CudaBackend::open(number as usize, options.class, None)
                    .map_err(|source| DeviceError::Cuda { device, source })?;
                AnyBackend::Cuda(Arc::new(backend))
            }
        };
        let open = Self { device, backend, loading: Arc::default() };
        open.with(Announce { device, why });
        Ok(open)
    }

    /// Which it is.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Reads its memory, and does not keep it open.
    pub fn meter(&self) -> DeviceMeter {
        struct Meter;
        impl OnBackend for Meter {
            type Output = DeviceMeter;
            fn run<B: Backend>(self, backend: Arc<B>) -> DeviceMeter {
                DeviceMeter::of(&backend)
            }
        }
        self.with(Meter)
    }

    /// Hands the backend over, as often as wanted.
    pub fn with<W: OnBackend>(&self, with: W) -> W::Output {
        match &self.backend {
            AnyBackend::Cpu(backend) => with.run(Arc::clone(backend)),
            AnyBackend::Cuda(backend) => with.run(Arc::clone(backend)),
        }
    }

    /// Held while a role plans what it will take of the device's memory and takes it, so that two roles of a process
    /// never count on the same free bytes.
    pub fn loading(&self) -> MutexGuard<'_, ()> {
        // It guards no data.
        self.loading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says in the log what is computed on.
struct Announce {
    device: Device,
    why: String,
}

impl OnBackend for Announce {
    type Output = ();

    fn run<B: Backend>(self, backend: Arc<B>) {
        let Self { device, why } = self;
        let memory = backend.memory();
        tracing::info!(
            %device,
            chosen = why,
            backend = backend.describe(),
            memory_total = memory.total,
            memory_used = memory.used,
            "computing"
        );
        // Our own context has a few hundred MiB by now.
        if device.is_gpu() && memory.used > memory.total / 2 {
            tracing::warn!(
                %device,
                chosen = why,
                memory_total = memory.total,
                memory_used = memory.used,
                "others use most of this GPU's memory: choose another with --device cuda:N, or --device cpu"
            );
        }
    }
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
    #[error(
        "device {device} ({why}): numerics class {class} is computed by CUDA devices only; use --device cuda:N"
    )]
    Class {
        /// The device.
        device: Device,
        /// The class.
        class: NumericsClass,
        /// Why this device.
        why: String,
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
    fn what_the_machine_has_is_chosen_for_a_reason_that_is_told() {
        let gpu = |ordinal: usize, name: &str, capability| (ordinal, name.to_owned(), capability);
        let h200 = || gpu(1, "NVIDIA H200", cadre_ops_cuda::CAPABILITY);
        let a100 = || gpu(0, "NVIDIA A100", (8, 0));
        let cases = [
            (Err("no NVIDIA driver".to_owned()), Ok(()), Device::Cpu, "no GPU is used: no NVIDIA driver"),
            (Ok(vec![]), Ok(()), Device::Cpu, "the driver sees none"),
            (Ok(vec![a100()]), Ok(()), Device::Cpu, "cuda:0 is a NVIDIA A100 of compute capability 8.0"),
            (Ok(vec![a100(), h200()]), Ok(()), Device::Cuda(1), "the first NVIDIA H200 of this machine"),
            (Ok(vec![h200()]), Err("no kernels".to_owned()), Device::Cpu, "a NVIDIA H200, but no kernels"),
        ];
        for (gpus, kernels, device, words) in cases {
            let choice = Choice::among(gpus, kernels);
            assert_eq!(choice.device, device, "{choice:?}");
            assert!(choice.why.contains(words), "{choice:?}");
        }
        assert_eq!(Choice::of(Some(Device::Cuda(3))).device, Device::Cuda(3));
    }

    #[test]
    fn every_role_of_a_process_gets_the_same_backend() {
        struct Address;
        impl OnBackend for Address {
            type Output = usize;
            fn run<B: Backend>(self, backend: Arc<B>) -> usize {
                Arc::as_ptr(&backend).addr()
            }
        }
        let options = BackendOptions {
            device: Some(Device::Cpu),
            threads: Some(1),
            ..BackendOptions::new(NumericsClass::F32)
        };
        let open = OpenDevice::open(&options).unwrap();
        assert_eq!(open.with(Address), open.clone().with(Address));
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
