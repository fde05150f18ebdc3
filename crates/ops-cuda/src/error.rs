//! What can go wrong between us and a device, each with what was looked for and what was found.

use std::path::PathBuf;

use cadre_ops::OpsError;
use cudarc::driver::{DriverError, sys::CUresult};

/// Why a device cannot be used, or what it refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// No driver on this machine.
    #[error(
        "no NVIDIA driver: none of {} could be loaded; install one of CUDA 13.0 or newer, or run the container with \
         the NVIDIA runtime",
        looked_for.join(", ")
    )]
    NoDriver {
        /// Names of the library, in the order tried.
        looked_for: Vec<String>,
    },
    /// The driver is older than our kernels.
    #[error("the NVIDIA driver is of CUDA {}.{}; 13.0 or newer is needed", found / 1000, found % 1000 / 10)]
    OldDriver {
        /// Its version, 1000 x major + 10 x minor.
        found: i32,
    },
    /// The machine has no device of that number.
    #[error("no device cuda:{ordinal}: the driver sees {count} (CUDA_VISIBLE_DEVICES may hide some)")]
    NoDevice {
        /// The device asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// There are no kernels for the device.
    #[error(
        "cuda:{ordinal} is a {name} of compute capability {found}; kernels are there for 9.0 (H100, H200) only"
    )]
    Architecture {
        /// The device.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Its compute capability.
        found: String,
    },
    /// The machine code is not where it is looked for.
    #[error(
        "no kernels: {file} is in none of {}; `cargo xtask kernels` makes them",
        looked_in.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NoKernels {
        /// A file that was looked for.
        file: String,
        /// The folders, in order.
        looked_in: Vec<PathBuf>,
    },
    /// A file of machine code is there and is not what the binary was built for.
    #[error("{}: {message}; kernels and binary are of different builds", file.display())]
    WrongKernels {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The device has no room.
    #[error("{op}: {} asked, {} free on the device", gib(*bytes), gib(*free))]
    OutOfMemory {
        /// The operation.
        op: &'static str,
        /// Bytes asked for.
        bytes: usize,
        /// Bytes free when it was refused.
        free: usize,
    },
    /// Anything else that the driver says.
    #[error("{op}: {message}")]
    Failed {
        /// The operation.
        op: &'static str,
        /// The driver's name of the error and its sentence.
        message: String,
    },
}

impl CudaError {
    /// Names the operation of a driver's error.
    pub(crate) fn failed(op: &'static str) -> impl Fn(DriverError) -> Self {
        move |error| Self::Failed { op, message: describe(error) }
    }
}

impl From<CudaError> for OpsError {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::OutOfMemory { op, bytes, free } => {
                Self::OutOfMemory { op, bytes, free: Some(free as u64) }
            }
            CudaError::Failed { op, message } => Self::Device { op, message },
            other => Self::Device { op: "device", message: other.to_string() },
        }
    }
}

/// The driver's name and sentence for an error. Only called after a call of the driver, which therefore is loaded.
pub(crate) fn describe(error: DriverError) -> String {
    let text = |found: Result<&std::ffi::CStr, DriverError>| {
        found.map_or_else(|_| "unknown".to_owned(), |text| text.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(error.error_name()), text(error.error_string()))
}

/// Whether an error says that there is no room.
pub(crate) fn is_out_of_memory(error: DriverError) -> bool {
    error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY
}

/// Bytes as people read them.
pub(crate) fn gib(bytes: usize) -> String {
    const GIB: f64 = (1_u64 << 30) as f64;
    if bytes < 1 << 20 { format!("{bytes} bytes") } else { format!("{:.1} GiB", bytes as f64 / GIB) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_was_looked_for() {
        let looked_for = vec!["libcuda.so".to_owned(), "libcuda.so.1".to_owned()];
        let text = CudaError::NoDriver { looked_for }.to_string();
        assert!(text.contains("libcuda.so, libcuda.so.1"), "{text}");
        let text = CudaError::OldDriver { found: 12080 }.to_string();
        assert!(text.contains("CUDA 12.8;"), "{text}");
        let text = CudaError::OutOfMemory { op: "kv_cache", bytes: 61 << 30, free: 58 << 30 }.to_string();
        assert_eq!(text, "kv_cache: 61.0 GiB asked, 58.0 GiB free on the device");
    }
}
