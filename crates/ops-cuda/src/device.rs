//! The driver: a device with its kernels; `device/` memory on it and beside it, streams and events.
//!
//! Thin owners over `cudarc`'s result layer. Its safe layer is left aside: it records and waits for an event around
//! every launch, which the hot path must not. The driver is looked for before any call of `cudarc`, which would panic.

mod memory;
mod stream;

use std::{
    ffi::{CString, c_void},
    path::Path,
    sync::Arc,
};

use cudarc::driver::{
    result,
    sys::{self, CUdevice_attribute, CUfunction_attribute_enum as Attribute, CUresult},
};

pub use self::{
    memory::{Memory, Pinned},
    stream::{Event, Stream},
};
use crate::{
    error::{CudaError, describe},
    kernels::{self, Kernel, SHARED_BYTES, TABLE},
};

/// The oldest driver that loads our machine code (1000 x major + 10 x minor).
const DRIVER: i32 = 13_000;

/// The compute capability that there are kernels for.
pub const CAPABILITY: (i32, i32) = (9, 0);

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number among those that the driver shows.
    pub ordinal: usize,
    /// `NVIDIA H200`.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of memory.
    pub memory: usize,
}

/// A device with every kernel of the table loaded.
#[derive(Debug)]
pub struct Device {
    info: DeviceInfo,
    raw: sys::CUdevice,
    context: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
    /// By [`Kernel`]: the function and the shared memory that a launch may ask for.
    functions: Vec<(sys::CUfunction, usize)>,
}

// SAFETY: the driver's handles may be used by any thread; calls that need a current context set it first.
unsafe impl Send for Device {}
// SAFETY: as above; nothing here changes after `open`.
unsafe impl Sync for Device {}

/// Loads the driver, once it is known to be there. `Err` says what was looked for.
fn driver() -> Result<(), CudaError> {
    // SAFETY: opens a library and runs its initialisers, which is what a driver's library is for.
    if !unsafe { sys::is_culib_present() } {
        // Those of its names that drivers for Linux have; the others are of toolkits and of Windows.
        let mut looked_for = cudarc::get_lib_name_candidates("cuda");
        looked_for.retain(|name| name == "libcuda.so" || name == "libcuda.so.1");
        return Err(CudaError::NoDriver { looked_for });
    }
    match result::init() {
        Ok(()) => {}
        Err(error) if error.0 == CUresult::CUDA_ERROR_NO_DEVICE => {
            return Err(CudaError::NoDevice { ordinal: 0, count: 0 });
        }
        Err(error) => return Err(CudaError::failed("cuInit")(error)),
    }
    let mut found = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&raw mut found) }
        .result()
        .map_err(CudaError::failed("cuDriverGetVersion"))?;
    if found < DRIVER { Err(CudaError::OldDriver { found }) } else { Ok(()) }
}

/// The devices that the driver shows, usable or not.
pub fn devices() -> Result<Vec<DeviceInfo>, CudaError> {
    driver()?;
    (0..count()?).map(|ordinal| Ok(look_at(ordinal)?.1)).collect()
}

fn count() -> Result<usize, CudaError> {
    let count = result::device::get_count().map_err(CudaError::failed("cuDeviceGetCount"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn look_at(ordinal: usize) -> Result<(sys::CUdevice, DeviceInfo), CudaError> {
    let count = count()?;
    let number = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
    let Some(number) = number else { return Err(CudaError::NoDevice { ordinal, count }) };
    let raw = result::device::get(number).map_err(CudaError::failed("cuDeviceGet"))?;
    let attribute = |attribute| {
        // SAFETY: the device exists.
        unsafe { result::device::get_attribute(raw, attribute) }
            .map_err(CudaError::failed("cuDeviceGetAttribute"))
    };
    let capability = (
        attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let multiprocessors = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let info = DeviceInfo {
        ordinal,
        name: result::device::get_name(raw).map_err(CudaError::failed("cuDeviceGetName"))?,
        capability,
        multiprocessors: usize::try_from(multiprocessors).unwrap_or(1),
        // SAFETY: the device exists.
        memory: unsafe { result::device::total_mem(raw) }.map_err(CudaError::failed("cuDeviceTotalMem"))?,
    };
    Ok((raw, info))
}

impl Device {
    /// Opens `cuda:ordinal` with the kernels of a folder, or of the one that [`kernels::folder`] finds.
    pub fn open(ordinal: usize, folder: Option<&Path>) -> Result<Arc<Self>, CudaError> {
        driver()?;
        let (raw, info) = look_at(ordinal)?;
        if info.capability != CAPABILITY {
            let found = format!("{}.{}", info.capability.0, info.capability.1);
            return Err(CudaError::Architecture { ordinal, name: info.name, found });
        }
        let folder = kernels::folder(folder)?;
        // SAFETY: the device exists; released in drop.
        let context = unsafe { result::primary_ctx::retain(raw) }
            .map_err(CudaError::failed("cuDevicePrimaryCtxRetain"))?;
        let mut device = Self { info, raw, context, modules: Vec::new(), functions: Vec::new() };
        device.enter()?;
        device.load(&folder)?;
        Ok(Arc::new(device))
    }

    fn load(&mut self, folder: &Path) -> Result<(), CudaError> {
        let mut modules = Vec::new();
        for file in kernels::files() {
            let path = folder.join(format!("{file}.cubin"));
            let looked_in = vec![folder.to_path_buf()];
            let bytes = std::fs::read(&path)
                .map_err(|_| CudaError::NoKernels { file: format!("{file}.cubin"), looked_in })?;
            // The driver reads as far as the headers of the file say, so a cut one must not reach it.
            let wrong = |message: String| CudaError::WrongKernels { file: path.clone(), message };
            if bytes.len() < 64 || !bytes.starts_with(b"\x7fELF") {
                return Err(wrong("not machine code".to_owned()));
            }
            // SAFETY: the context is current, `bytes` is a whole ELF file that lives through the call.
            let module = unsafe { result::module::load_data(bytes.as_ptr().cast::<c_void>()) }
                .map_err(|error| wrong(describe(error)))?;
            self.modules.push(module);
            modules.push((file, path, module));
        }
        for entry in TABLE {
            let module = modules.iter().find(|(file, ..)| *file == entry.file);
            let Some((_, path, module)) = module else { continue };
            let wrong = |message: String| CudaError::WrongKernels { file: path.clone(), message };
            let name = CString::new(entry.name).map_err(|error| wrong(error.to_string()))?;
            // SAFETY: the module is loaded.
            let function = unsafe { result::module::get_function(*module, name) }
                .map_err(|error| wrong(format!("no entry {}: {}", entry.name, describe(error))))?;
            compare_arguments(function, entry).map_err(wrong)?;
            let most = if entry.shared { room(function)? } else { 0 };
            self.functions.push((function, most));
        }
        Ok(())
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Bytes (free, total) now, whoever uses them.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.enter()?;
        result::mem_get_info().map_err(CudaError::failed("cuMemGetInfo"))
    }

    /// Makes the device's context the calling thread's.
    pub(crate) fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(CudaError::failed("cuCtxSetCurrent"))
    }

    pub(crate) fn function(&self, kernel: Kernel) -> sys::CUfunction {
        self.functions[kernel as usize].0
    }

    pub(crate) fn shared_bytes(&self, kernel: Kernel) -> usize {
        self.functions[kernel as usize].1
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        for module in self.modules.drain(..) {
            // SAFETY: loaded by us; whoever launches its functions holds the device.
            log(unsafe { result::module::unload(module) }, "cuModuleUnload");
        }
        // SAFETY: retained once in `open`.
        log(unsafe { result::primary_ctx::release(self.raw) }, "cuDevicePrimaryCtxRelease");
    }
}

/// That the function takes what the table says, argument by argument.
fn compare_arguments(function: sys::CUfunction, entry: &kernels::Entry) -> Result<(), String> {
    let mut found = Vec::new();
    // One further than the table: a function with more arguments is found out too.
    for index in 0..=entry.args.len() {
        let (mut offset, mut bytes) = (0, 0);
        // SAFETY: the function is loaded; writes two integers.
        match unsafe { sys::cuFuncGetParamInfo(function, index, &raw mut offset, &raw mut bytes) }.result() {
            Ok(()) => found.push(bytes),
            Err(_) => break,
        }
    }
    let expected: Vec<usize> = entry.args.iter().map(|kind| kind.bytes()).collect();
    if found == expected {
        return Ok(());
    }
    Err(format!("{} takes arguments of {found:?} bytes, expected {expected:?}", entry.name))
}

/// Lets a function's launches ask for all the shared memory that there is beside its own.
fn room(function: sys::CUfunction) -> Result<usize, CudaError> {
    let op = "cuFuncSetAttribute";
    // SAFETY: the function is loaded.
    let fixed = unsafe {
        result::function::get_function_attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
    }
    .map_err(CudaError::failed(op))?;
    let most = SHARED_BYTES as i32 - fixed;
    let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: as above.
    unsafe { result::function::set_function_attribute(function, attribute, most) }
        .map_err(CudaError::failed(op))?;
    Ok(usize::try_from(most).unwrap_or(0))
}

/// A failure that nobody can be told of any more.
fn log(outcome: Result<(), result::DriverError>, op: &'static str) {
    if let Err(error) = outcome {
        tracing::warn!(target: "cadre::cuda", "{op}: {}", describe(error));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    /// On a machine without a driver the error says so; with one, device 4,096 is not there.
    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        match Device::open(4096, None).unwrap_err() {
            CudaError::NoDriver { looked_for } => {
                assert!(looked_for.iter().any(|name| name == "libcuda.so.1"), "{looked_for:?}");
            }
            CudaError::NoDevice { ordinal, count } => assert!(ordinal >= count),
            CudaError::OldDriver { found } => assert!(found < DRIVER),
            other => panic!("{other}"),
        }
    }
}
