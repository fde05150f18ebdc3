//! Host memory for transfers: blocks of a few sizes that come back when they are dropped, so that a steady
//! stream of frames allocates nothing.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use cadre_ops::OpsError;

use crate::memory::Aligned;

/// Smallest block, a page.
const SMALLEST: usize = 4096;

/// Bytes of free blocks that are kept. Answers that are being written while the next is computed, and KV on
/// its way out (16 MiB a hand-off): a few of each.
const KEPT_BYTES: usize = 64 << 20;

/// A block of host memory.
#[derive(Debug)]
pub struct Staging {
    block: Option<Aligned<u8>>,
    len: usize,
    pool: Arc<StagingPool>,
}

/// Free blocks by size.
#[derive(Debug, Default)]
pub(crate) struct StagingPool {
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    blocks: BTreeMap<usize, Vec<Aligned<u8>>>,
    bytes: usize,
}

impl StagingPool {
    /// A block of `len` bytes: sizes are rounded up to powers of two.
    pub(crate) fn take(self: &Arc<Self>, len: usize) -> Result<Staging, OpsError> {
        let size = match len.max(SMALLEST).checked_next_power_of_two() {
            Some(size) => size,
            None => return Err(OpsError::OutOfMemory { op: "staging", bytes: len, free: None }),
        };
        let kept = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let block = free.blocks.get_mut(&size).and_then(Vec::pop);
            free.bytes -= block.as_ref().map_or(0, |_| size);
            block
        };
        let block = match kept {
            Some(block) => block,
            None => Aligned::zeroed("staging", size)?,
        };
        Ok(Staging { block: Some(block), len, pool: Arc::clone(self) })
    }

    fn give_back(&self, block: Aligned<u8>) {
        let size = block.len();
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.bytes + size <= KEPT_BYTES {
            free.bytes += size;
            free.blocks.entry(size).or_default().push(block);
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.give_back(block);
        }
    }
}

impl AsRef<[u8]> for Staging {
    fn as_ref(&self) -> &[u8] {
        self.block.as_ref().map_or(&[], |block| &block[..self.len])
    }
}

impl AsMut<[u8]> for Staging {
    fn as_mut(&mut self) -> &mut [u8] {
        self.block.as_mut().map_or(&mut [], |block| &mut block[..self.len])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn blocks_come_back_and_are_used_again() {
        let pool = Arc::new(StagingPool::default());
        let mut first = pool.take(5000).unwrap();
        first.as_mut()[4999] = 7;
        assert_eq!(first.as_ref().len(), 5000);
        let place = first.as_ref().as_ptr();
        let second = pool.take(5000).unwrap();
        assert_ne!(second.as_ref().as_ptr(), place);
        drop(first);
        assert_eq!(pool.take(8192).unwrap().as_ref().as_ptr(), place, "the same power of two");
        assert_eq!(pool.take(0).unwrap().as_ref().len(), 0);
        assert!(pool.take(usize::MAX).is_err());
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let pool = Arc::new(StagingPool::default());
        let blocks: Vec<_> = (0..5).map(|_| pool.take(KEPT_BYTES / 4).unwrap()).collect();
        drop(blocks);
        assert_eq!(pool.free.lock().unwrap().bytes, KEPT_BYTES);
        drop(pool.take(2 * KEPT_BYTES).unwrap());
        assert_eq!(pool.free.lock().unwrap().bytes, KEPT_BYTES);
    }
}
