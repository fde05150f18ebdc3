//! Room for the rows of all hand-offs of a process.
//!
//! A hand-off alone buffers 16 MiB ([`super::KV_QUEUE`]); a worker with a thousand of them, whose peers take
//! nothing or whose own loop is busy, would hold 16 GiB. So what waits in queues holds room, from when it is there until
//! whoever takes it has let it go.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Rows that wait, of all hand-offs one way: eight turns of the loop, which writes 32 MiB into the cache between two
/// steps, or the full queues of 16 hand-offs. Of V3 it is the KV of 3,800 tokens.
pub const KV_ROOM_BYTES: usize = 256 << 20;

/// Bytes of a permit: semaphores count in `u32`.
const UNIT: usize = 1024;

/// The room. Clones share it.
#[derive(Clone, Debug)]
pub struct KvRoom {
    room: Arc<Semaphore>,
    units: usize,
}

/// Room that is taken; free again when dropped.
#[derive(Debug)]
pub(crate) struct Held {
    /// `None` for what is outside the room.
    _permit: Option<OwnedSemaphorePermit>,
}

impl KvRoom {
    /// Room for so many bytes.
    pub fn new(bytes: usize) -> Self {
        let units = bytes / UNIT;
        Self { room: Arc::new(Semaphore::new(units)), units }
    }

    /// Bytes that are free.
    pub fn free(&self) -> usize {
        self.room.available_permits() * UNIT
    }

    fn units(&self, bytes: usize) -> u32 {
        // More than all of it is what one message may be that is larger than the room.
        u32::try_from(bytes.div_ceil(UNIT).min(self.units)).unwrap_or(u32::MAX)
    }

    /// Waits for room for these rows; who waits first gets it first. It is held for as long as the rows are.
    pub async fn hold(&self, rows: Bytes) -> Bytes {
        let permit = Arc::clone(&self.room).acquire_many_owned(self.units(rows.len())).await;
        // Never closed.
        Held { _permit: permit.ok() }.over(rows)
    }

    /// Room for so many bytes, if there is.
    pub(crate) fn try_take(&self, bytes: usize) -> Option<Held> {
        let permit = Arc::clone(&self.room).try_acquire_many_owned(self.units(bytes));
        permit.ok().map(|permit| Held { _permit: Some(permit) })
    }
}

impl Held {
    /// What one hand-off may have whatever others hold, so that those whose peers take nothing cannot stop the rest.
    pub(crate) fn outside() -> Self {
        Self { _permit: None }
    }

    /// Rows that hold the room until they are dropped.
    pub(crate) fn over(self, memory: impl AsRef<[u8]> + Send + 'static) -> Bytes {
        Bytes::from_owner(Rows { memory, _held: self })
    }
}

struct Rows<M> {
    memory: M,
    _held: Held,
}

impl<M: AsRef<[u8]>> AsRef<[u8]> for Rows<M> {
    fn as_ref(&self) -> &[u8] {
        self.memory.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn rows_hold_room_until_they_are_dropped_and_others_wait_for_it() {
        let room = KvRoom::new(4 * UNIT);
        let first = room.hold(Bytes::from(vec![1; 3 * UNIT])).await;
        assert_eq!((first.len(), room.free()), (3 * UNIT, UNIT));
        assert!(room.try_take(2 * UNIT).is_none());
        let second = room.hold(Bytes::from(vec![2; 2 * UNIT]));
        let mut second = std::pin::pin!(second);
        let waited = tokio::time::timeout(Duration::from_secs(60), &mut second).await;
        assert!(waited.is_err(), "it waits for the first");
        // A part of the rows holds all of it.
        let part = first.slice(..1);
        drop(first);
        assert!(tokio::time::timeout(Duration::from_secs(60), &mut second).await.is_err());
        drop(part);
        assert_eq!(second.await.len(), 2 * UNIT);
        assert_eq!(room.free(), 4 * UNIT);
        // What is larger than all of it takes all of it.
        let huge = room.hold(Bytes::from(vec![3; 9 * UNIT])).await;
        assert_eq!(room.free(), 0);
        drop((huge, Held::outside().over(vec![4_u8])));
        assert_eq!(room.free(), 4 * UNIT);
    }
}
