//! Memory on the device, and pinned memory of the host.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::{Device, Stream, log};
use crate::error::{CudaError, is_out_of_memory};

/// Memory on the device; freed when dropped (the driver waits for what uses it).
#[derive(Debug)]
pub struct Memory {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// Room for `bytes` bytes with any contents.
    pub fn new(device: &Arc<Device>, op: &'static str, bytes: usize) -> Result<Self, CudaError> {
        device.enter()?;
        if bytes == 0 {
            return Ok(Self { device: device.clone(), address: 0, bytes });
        }
        // SAFETY: the context is current.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(address) => Ok(Self { device: device.clone(), address, bytes }),
            Err(error) if is_out_of_memory(error) => {
                let free = device.memory().map_or(0, |(free, _)| free);
                Err(CudaError::OutOfMemory { op, bytes, free })
            }
            Err(error) => Err(CudaError::failed(op)(error)),
        }
    }

    /// Zeroed room; the zeroing is queued on the stream.
    pub fn zeroed(stream: &Stream, op: &'static str, bytes: usize) -> Result<Self, CudaError> {
        let memory = Self::new(stream.device(), op, bytes)?;
        stream.zero(op, memory.address, bytes)?;
        Ok(memory)
    }

    /// Where it is on the device; 0 for no bytes.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The address of a byte of it.
    pub fn at(&self, byte: usize) -> u64 {
        debug_assert!(byte <= self.bytes);
        self.address + byte as u64
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.address != 0 && self.device.enter().is_ok() {
            // SAFETY: allocated by us and freed once.
            log(unsafe { result::free_sync(self.address) }, "cuMemFree");
        }
    }
}

/// Pinned host memory: the device reads and writes it under the same address.
#[derive(Debug)]
pub struct Pinned {
    device: Arc<Device>,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}
// SAFETY: reads through `&Pinned` only read.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Room for `bytes` bytes, zeroed.
    pub fn new(device: &Arc<Device>, op: &'static str, bytes: usize) -> Result<Self, CudaError> {
        device.enter()?;
        let mut start = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the context is current; at least one byte is asked.
        let outcome = unsafe { sys::cuMemHostAlloc(&raw mut start, bytes.max(1), flags) }.result();
        outcome.map_err(CudaError::failed(op))?;
        // SAFETY: just allocated with that many bytes; the device has not seen it.
        unsafe { start.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self { device: device.clone(), start: start.cast(), bytes })
    }

    /// The address, for the host and (64-bit Linux maps both alike) for the device.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// The first word, as the device last wrote it.
    pub fn first_word(&self) -> u32 {
        debug_assert!(self.bytes >= 4);
        // SAFETY: page-aligned, at least four bytes, initialised in `new`; the device may write it at any time, which
        // a volatile read of one word allows for.
        unsafe { self.start.cast::<u32>().read_volatile() }
    }

    /// Its bytes. The caller knows that the device does not write them now.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated with that many bytes, initialised in `new`.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// Its bytes. The caller knows that the device does not use them now.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only owner.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: allocated by us and freed once; the driver waits for what uses it.
            log(unsafe { sys::cuMemFreeHost(self.start.cast()) }.result(), "cuMemFreeHost");
        }
    }
}
