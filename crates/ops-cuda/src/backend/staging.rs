//! Pinned host memory for transfers: blocks of a few sizes that come back when they are dropped, so that a steady
//! stream of frames allocates nothing (pinning a block costs a system call and a walk over its pages).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use cadre_ops::OpsError;

use crate::device::{Device, Event, Pinned};

/// Smallest block, a page.
const SMALLEST: usize = 4096;

/// Bytes of free blocks that are kept: answers that are being written while the next is computed, and KV on its way
/// out (16 MiB a hand-off): a few of each.
const KEPT_BYTES: usize = 256 << 20;

/// A block of pinned memory.
#[derive(Debug)]
pub struct Staging {
    /// `None` only while it is being dropped.
    block: Option<Block>,
    len: usize,
    pool: Arc<StagingPool>,
}

#[derive(Debug)]
struct Block {
    memory: Pinned,
    /// The last transfer that uses it.
    used: Option<Arc<Event>>,
}

impl Block {
    fn is_free(&self) -> bool {
        self.used.as_ref().is_none_or(|event| event.is_done("staging").unwrap_or(true))
    }
}

/// Free blocks by size.
#[derive(Debug)]
pub(crate) struct StagingPool {
    device: Arc<Device>,
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    blocks: BTreeMap<usize, Vec<Block>>,
    bytes: usize,
}

impl StagingPool {
    pub(crate) fn new(device: Arc<Device>) -> Self {
        Self { device, free: Mutex::default() }
    }

    /// A block of `len` bytes: sizes are rounded up to powers of two.
    pub(crate) fn take(self: &Arc<Self>, len: usize) -> Result<Staging, OpsError> {
        let Some(size) = len.max(SMALLEST).checked_next_power_of_two() else {
            return Err(OpsError::OutOfMemory { op: "staging", bytes: len, free: None });
        };
        let kept = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let blocks = free.blocks.entry(size).or_default();
            let block = blocks.iter().position(Block::is_free).map(|at| blocks.swap_remove(at));
            free.bytes -= block.as_ref().map_or(0, |_| size);
            block
        };
        let block = match kept {
            Some(block) => Block { used: None, ..block },
            None => Block { memory: Pinned::new(&self.device, "staging", size)?, used: None },
        };
        Ok(Staging { block: Some(block), len, pool: Arc::clone(self) })
    }

    fn give_back(&self, block: Block, size: usize) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.bytes + size <= KEPT_BYTES {
            free.bytes += size;
            free.blocks.entry(size).or_default().push(block);
        }
    }
}

impl Staging {
    /// Its bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where it is, for the device.
    pub(crate) fn address(&self) -> u64 {
        self.block.as_ref().map_or(0, |block| block.memory.address())
    }

    /// Says that the device uses it until the event.
    pub(crate) fn used_until(&mut self, event: Event) {
        if let Some(block) = &mut self.block {
            block.used = Some(Arc::new(event));
        }
    }

    /// Waits until the device has done with it. What failed there is told by the queue's events, not here.
    fn wait(&self) {
        let used = self.block.as_ref().and_then(|block| block.used.as_ref());
        if let Some(Err(error)) = used.map(|event| event.wait("staging")) {
            tracing::warn!(target: "cadre::cuda", "a transfer failed: {error}");
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            let size = block.memory.as_slice().len();
            self.pool.give_back(block, size);
        }
    }
}

impl AsRef<[u8]> for Staging {
    fn as_ref(&self) -> &[u8] {
        self.wait();
        self.block.as_ref().map_or(&[], |block| &block.memory.as_slice()[..self.len])
    }
}

impl AsMut<[u8]> for Staging {
    fn as_mut(&mut self) -> &mut [u8] {
        self.wait();
        let len = self.len;
        self.block.as_mut().map_or(&mut [], |block| &mut block.memory.as_mut_slice()[..len])
    }
}
