//! Byte buffers that come back: an answer's rows leave as [`Bytes`] and return their memory to the pool
//! when the transport has sent them, so that a steady stream of frames allocates nothing.

use std::{mem, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;

/// Buffers kept. Answers that are being written while the next is computed: a few per worker.
const KEPT: usize = 8;

/// Larger buffers are given back to the system: eight of these are 8 MiB at most, and allocating anew
/// costs little beside filling that much.
const KEPT_BYTES: usize = 1 << 20;

/// The buffers at hand. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct BytePool {
    free: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// A buffer on loan.
struct Loan {
    buffer: Vec<u8>,
    pool: BytePool,
}

impl AsRef<[u8]> for Loan {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.pool.give_back(mem::take(&mut self.buffer));
    }
}

impl BytePool {
    /// An empty buffer, with whatever capacity it had before.
    pub fn take(&self) -> Vec<u8> {
        self.free.lock().pop().unwrap_or_default()
    }

    /// Keeps a buffer that was not sent.
    pub fn give_back(&self, mut buffer: Vec<u8>) {
        if buffer.capacity() == 0 || buffer.capacity() > KEPT_BYTES {
            return;
        }
        buffer.clear();
        let mut free = self.free.lock();
        if free.len() < KEPT {
            free.push(buffer);
        }
    }

    /// The buffer as bytes that return it when the last slice is gone.
    pub fn lend(&self, buffer: Vec<u8>) -> Bytes {
        Bytes::from_owner(Loan { buffer, pool: self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_its_last_slice_is_gone() {
        let pool = BytePool::default();
        let mut buffer = pool.take();
        buffer.extend_from_slice(&[1, 2, 3]);
        let at = buffer.as_ptr();
        let bytes = pool.lend(buffer);
        let slice = bytes.slice(1..);
        drop(bytes);
        assert_eq!(slice, [2, 3][..]);
        assert_eq!(pool.take().capacity(), 0, "still lent");
        drop(slice);
        let again = pool.take();
        assert!(again.is_empty());
        assert_eq!(again.as_ptr(), at);
    }

    #[test]
    fn the_pool_is_bounded_in_number_and_size() {
        let pool = BytePool::default();
        for _ in 0..2 * KEPT {
            pool.give_back(Vec::with_capacity(10));
        }
        pool.give_back(Vec::with_capacity(KEPT_BYTES + 1));
        assert_eq!(pool.free.lock().len(), KEPT);
        assert!(pool.free.lock().iter().all(|buffer| buffer.capacity() <= KEPT_BYTES));
    }
}
