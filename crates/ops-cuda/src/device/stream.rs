//! Streams, in order of which work is queued, and events, which are points in them.

use std::{ffi::c_void, sync::Arc};

use cudarc::driver::{
    result,
    sys::{self, CUresult},
};

use super::{Device, log};
use crate::error::CudaError;

/// An ordered stream of work on a device.
#[derive(Debug)]
pub struct Stream {
    device: Arc<Device>,
    raw: sys::CUstream,
}

// SAFETY: the driver allows any thread; order among threads is the owner's.
unsafe impl Send for Stream {}
// SAFETY: calls through `&Stream` only queue.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream that waits for no other.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.enter()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(CudaError::failed("cuStreamCreate"))?;
        Ok(Self { device: device.clone(), raw })
    }

    /// Its device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits for everything queued so far.
    pub fn synchronize(&self, op: &'static str) -> Result<(), CudaError> {
        self.device.enter()?;
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.raw) }.map_err(CudaError::failed(op))
    }

    /// An event that is done when everything queued so far is.
    pub fn record(&self, op: &'static str) -> Result<Event, CudaError> {
        self.record_with(op, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// The same that also keeps the time, which costs the device a little.
    pub(crate) fn record_timed(&self, op: &'static str) -> Result<Event, CudaError> {
        self.record_with(op, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn record_with(&self, op: &'static str, flags: sys::CUevent_flags) -> Result<Event, CudaError> {
        self.device.enter()?;
        let raw = result::event::create(flags).map_err(CudaError::failed(op))?;
        let event = Event { device: self.device.clone(), raw };
        // SAFETY: both live.
        unsafe { result::event::record(event.raw, self.raw) }.map_err(CudaError::failed(op))?;
        Ok(event)
    }

    /// What is queued from here on runs after the event.
    pub fn run_after(&self, event: &Event, op: &'static str) -> Result<(), CudaError> {
        self.device.enter()?;
        // SAFETY: both live; the driver keeps what it needs of the event.
        unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) }.result().map_err(CudaError::failed(op))
    }

    /// Host memory to the device. Of pageable memory the driver has a copy when this returns; pinned memory must stay
    /// as it is until the copy has run.
    pub fn upload(&self, op: &'static str, from: &[u8], to: u64) -> Result<(), CudaError> {
        if from.is_empty() {
            return Ok(());
        }
        self.device.enter()?;
        // SAFETY: `to` is the caller's; the source's life is as said above.
        unsafe { result::memcpy_htod_async(to, from, self.raw) }.map_err(CudaError::failed(op))
    }

    /// Device memory to pinned memory at `to`; it must stay until the copy has run.
    pub fn download(&self, op: &'static str, from: u64, to: u64, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        self.device.enter()?;
        // SAFETY: both addresses are the caller's.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to as *mut c_void, from, bytes, self.raw) }
            .result()
            .map_err(CudaError::failed(op))
    }

    /// Zeros on the device.
    pub fn zero(&self, op: &'static str, to: u64, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        self.device.enter()?;
        // SAFETY: the address is the caller's.
        unsafe { result::memset_d8_async(to, 0, bytes, self.raw) }.map_err(CudaError::failed(op))
    }

    /// Device to device.
    pub fn copy(&self, op: &'static str, from: u64, to: u64, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        self.device.enter()?;
        // SAFETY: both addresses are the caller's.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.raw) }.map_err(CudaError::failed(op))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // What is queued may use memory that its owners drop right after.
            // SAFETY: made by us; destroyed once.
            unsafe {
                log(result::stream::synchronize(self.raw), "cuStreamSynchronize");
                log(result::stream::destroy(self.raw), "cuStreamDestroy");
            }
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    device: Arc<Device>,
    raw: sys::CUevent,
}

// SAFETY: the driver allows any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Whether the point is reached.
    pub fn is_done(&self, op: &'static str) -> Result<bool, CudaError> {
        self.device.enter()?;
        // SAFETY: the event lives.
        match unsafe { result::event::query(self.raw) } {
            Ok(()) => Ok(true),
            Err(error) if error.0 == CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(error) => Err(CudaError::failed(op)(error)),
        }
    }

    /// Seconds since an earlier one; both keep the time and are done.
    pub(crate) fn seconds_since(&self, earlier: &Self, op: &'static str) -> Result<f64, CudaError> {
        self.device.enter()?;
        // SAFETY: both live.
        let milliseconds =
            unsafe { result::event::elapsed(earlier.raw, self.raw) }.map_err(CudaError::failed(op))?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    /// Waits until it is.
    pub fn wait(&self, op: &'static str) -> Result<(), CudaError> {
        self.device.enter()?;
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.raw) }.map_err(CudaError::failed(op))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: made by us; destroyed once.
            log(unsafe { result::event::destroy(self.raw) }, "cuEventDestroy");
        }
    }
}
