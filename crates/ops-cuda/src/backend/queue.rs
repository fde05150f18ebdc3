//! A queue: a stream with scratch memory of its own, a ring for small arguments, and what the device still reads.

use std::{cell::RefCell, collections::VecDeque, sync::Arc};

use bytes::Bytes;
use cadre_ops::OpsError;

use crate::{
    device::{Device, Event, Memory, Pinned, Stream},
    error::CudaError,
    kernels::Kernel,
    launch::{Arg, Grid},
};

/// Bytes of the ring at first: index lists of a large step (2,048 rows x 8 experts x 4 bytes = 64 KiB) many times over,
/// so that going round, which waits for the device, is rare.
const RING_BYTES: usize = 4 << 20;

/// Every address that is handed out is a multiple of this.
const ALIGNMENT: usize = 256;

/// Uploads that may be under way before the oldest is waited for: each holds a frame in memory.
const MOST_HELD: usize = 1024;

/// What scratch memory is for; one area each, so that an operation can use several.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scratch {
    /// Gate and up before SwiGLU; gate logits; latent queries.
    Wide,
    /// Inner activations; latent outputs.
    Inner,
    /// Codes of a quantised input.
    Codes,
    /// Their scales.
    Scales,
    /// Rows that arrived; cached rows on their way.
    Arrived,
    /// Latents of a sequence.
    Latents,
    /// Keys and values expanded from them.
    Expanded,
}

const AREAS: usize = 7;

/// An ordered stream of operations.
#[derive(Debug)]
pub struct CudaQueue {
    pub(crate) stream: Stream,
    areas: [Option<Memory>; AREAS],
    ring: Ring,
    held: VecDeque<(Event, Bytes)>,
    /// Memory that is zero between launches.
    zeros: Option<Memory>,
    fault: Arc<Fault>,
    /// Launches with the events around them, where they are timed.
    timed: Option<RefCell<Vec<(Kernel, Event, Event)>>>,
}

/// A word that kernels write when they give up a bounded wait; zero as long as all is well.
#[derive(Debug)]
pub(crate) struct Fault(Pinned);

impl Fault {
    /// An error if a kernel gave up.
    pub(crate) fn check(&self, op: &'static str) -> Result<(), OpsError> {
        match self.0.first_word() {
            0 => Ok(()),
            code => {
                let message =
                    format!("a kernel gave up waiting (code {code}); results of this queue are void");
                Err(OpsError::Device { op, message })
            }
        }
    }
}

/// A point in a queue, with what tells whether its kernels held.
#[derive(Debug)]
pub struct QueueEvent {
    event: Event,
    fault: Arc<Fault>,
}

impl QueueEvent {
    pub(crate) fn is_done(&self, op: &'static str) -> Result<bool, OpsError> {
        let done = self.event.is_done(op)?;
        if done {
            self.fault.check(op)?;
        }
        Ok(done)
    }

    pub(crate) fn wait(&self, op: &'static str) -> Result<(), OpsError> {
        self.event.wait(op)?;
        self.fault.check(op)
    }

    pub(crate) fn point(&self) -> &Event {
        &self.event
    }
}

#[derive(Debug)]
struct Ring {
    host: Pinned,
    device: Memory,
    next: usize,
}

impl Ring {
    fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let op = "queue";
        Ok(Self { host: Pinned::new(device, op, bytes)?, device: Memory::new(device, op, bytes)?, next: 0 })
    }
}

impl CudaQueue {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self, OpsError> {
        Ok(Self {
            stream: Stream::new(device)?,
            areas: Default::default(),
            ring: Ring::new(device, RING_BYTES)?,
            held: VecDeque::new(),
            zeros: None,
            timed: None,
            fault: Arc::new(Fault(Pinned::new(device, "queue", 4)?)),
        })
    }

    /// The address of an area of at least `bytes` bytes. Its contents are those of its last user; growing waits for
    /// the device.
    pub(crate) fn scratch(&mut self, op: &'static str, area: Scratch, bytes: usize) -> Result<u64, OpsError> {
        let place = &mut self.areas[area as usize];
        if let Some(memory) = place.as_ref().filter(|memory| memory.bytes() >= bytes) {
            return Ok(memory.address());
        }
        // The smaller one first, so that both need not fit.
        *place = None;
        let memory = Memory::new(self.stream.device(), op, bytes.next_multiple_of(1 << 20))?;
        let address = memory.address();
        *place = Some(memory);
        Ok(address)
    }

    /// Puts words on the device. Who reads them is launched before this is called again: the place is used anew after
    /// the ring has gone round, when everything launched before has run.
    pub(crate) fn arguments(&mut self, op: &'static str, words: &[u32]) -> Result<u64, OpsError> {
        let bytes = size_of_val(words);
        if bytes > self.ring.device.bytes() {
            self.stream.synchronize(op)?;
            self.ring = Ring::new(self.stream.device(), bytes.next_power_of_two())?;
        }
        if self.ring.next + bytes > self.ring.device.bytes() {
            self.stream.synchronize(op)?;
            self.ring.next = 0;
        }
        let at = self.ring.next;
        let host = &mut self.ring.host.as_mut_slice()[at..at + bytes];
        for (to, word) in host.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        let address = self.ring.device.at(at);
        self.stream.upload(op, &self.ring.host.as_slice()[at..at + bytes], address)?;
        self.ring.next = (at + bytes).next_multiple_of(ALIGNMENT);
        Ok(address)
    }

    /// Copies bytes to the device and keeps them until that is done.
    pub(crate) fn upload(&mut self, op: &'static str, bytes: &Bytes, to: u64) -> Result<(), OpsError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.stream.upload(op, bytes, to)?;
        let event = self.stream.record(op)?;
        while let Some((oldest, _)) = self.held.front() {
            if self.held.len() >= MOST_HELD {
                oldest.wait(op)?;
            } else if !oldest.is_done(op)? {
                break;
            }
            self.held.pop_front();
        }
        self.held.push_back((event, bytes.clone()));
        Ok(())
    }

    /// Where kernels say that they gave up.
    pub(crate) fn error(&self) -> u64 {
        self.fault.0.address()
    }

    /// Waits for everything and says whether it held.
    pub(crate) fn finish(&self, op: &'static str) -> Result<(), OpsError> {
        self.stream.synchronize(op)?;
        self.fault.check(op)
    }

    /// Whether kernels held so far.
    pub(crate) fn check(&self, op: &'static str) -> Result<(), OpsError> {
        self.fault.check(op)
    }

    /// An event that is done when everything so far is.
    pub(crate) fn record(&self, op: &'static str) -> Result<QueueEvent, OpsError> {
        Ok(QueueEvent { event: self.stream.record(op)?, fault: Arc::clone(&self.fault) })
    }

    /// At least `bytes` bytes of zeros, which kernels leave as they found them.
    pub(crate) fn zeros(&mut self, op: &'static str, bytes: usize) -> Result<u64, OpsError> {
        if let Some(memory) = self.zeros.as_ref().filter(|memory| memory.bytes() >= bytes) {
            return Ok(memory.address());
        }
        let memory = Memory::zeroed(&self.stream, op, bytes.next_power_of_two().max(1 << 16))?;
        let address = memory.address();
        self.zeros = Some(memory);
        Ok(address)
    }

    /// Queues a kernel.
    pub(crate) fn launch(&self, kernel: Kernel, grid: Grid, args: &[Arg<'_>]) -> Result<(), OpsError> {
        let Some(timed) = &self.timed else { return Ok(self.stream.launch(kernel, grid, args)?) };
        let begun = self.stream.record_timed("launch")?;
        self.stream.launch(kernel, grid, args)?;
        timed.borrow_mut().push((kernel, begun, self.stream.record_timed("launch")?));
        Ok(())
    }

    /// Begins or ends to time every launch.
    pub(crate) fn time_launches(&mut self, timed: bool) {
        self.timed = timed.then(RefCell::default);
    }

    /// Launches that were timed, and their seconds; waits.
    pub(crate) fn laps(&self, op: &'static str) -> Result<Vec<(Kernel, f64)>, OpsError> {
        self.finish(op)?;
        let Some(timed) = &self.timed else { return Ok(Vec::new()) };
        let seconds =
            |(kernel, begun, ended): &(Kernel, Event, Event)| Ok((*kernel, ended.seconds_since(begun, op)?));
        timed.borrow().iter().map(seconds).collect()
    }
}

impl Drop for CudaQueue {
    fn drop(&mut self) {
        // What is held must outlive the copies.
        if let Err(error) = self.stream.synchronize("queue") {
            tracing::warn!(target: "cadre::cuda", "a queue ends with an error: {error}");
        }
    }
}
