//! Zeroed arrays on cache-line boundaries. Large ones are mapped directly, untouched pages cost nothing,
//! and the kernel is asked for huge pages where the data fills them (a packed weight is read front to back
//! on every step). The last, partly filled stretch stays on small pages: a shard's memory is its experts'
//! bytes, and an expert of 1 MiB on a huge page would cost two.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use cadre_ops::OpsError;

use crate::system;

/// Bytes of all arrays of this process.
static LIVE: AtomicU64 = AtomicU64::new(0);

/// Bytes of all arrays of this process's backends: weights, caches, buffers, scratch memory.
pub fn allocated_bytes() -> u64 {
    LIVE.load(Ordering::Relaxed)
}

/// Alignment of every array, one cache line.
const ALIGN: usize = 64;
/// From this size on an array is mapped: a heap rounds sizes up by an eighth or more, a mapping by a page.
const MAP_FROM: usize = 256 << 10;
/// Size and alignment of a huge page.
const HUGE: usize = 2 << 20;

/// Element types for which all-zero bytes are a value and any bytes are valid.
pub(crate) trait Plain: Copy + Send + Sync + 'static {}
impl Plain for f32 {}
impl Plain for u8 {}

/// A zero-initialised, aligned array of fixed length.
#[derive(Debug)]
pub(crate) struct Aligned<T: Plain> {
    data: NonNull<T>,
    len: usize,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    Empty,
    Heap(Layout),
    /// Start and length of the mapping, which begins up to a huge page before the data.
    Mapped(NonNull<libc::c_void>, usize),
}

// SAFETY: an `Aligned` owns its memory exclusively, like a `Vec` of a `Send + Sync` type.
unsafe impl<T: Plain> Send for Aligned<T> {}
// SAFETY: as above; shared access is read-only.
unsafe impl<T: Plain> Sync for Aligned<T> {}

impl<T: Plain> Aligned<T> {
    /// `len` zeros.
    pub(crate) fn zeroed(op: &'static str, len: usize) -> Result<Self, OpsError> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .filter(|bytes| *bytes < isize::MAX as usize - 2 * HUGE)
            .ok_or_else(|| out_of_memory(op, usize::MAX))?;
        if bytes == 0 {
            return Ok(Self { data: NonNull::dangling(), len, backing: Backing::Empty });
        }
        let allocated = if bytes < MAP_FROM { Self::heap(bytes) } else { Self::map(bytes) };
        let (data, backing) = allocated.ok_or_else(|| out_of_memory(op, bytes))?;
        LIVE.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(Self { data, len, backing })
    }

    fn heap(bytes: usize) -> Option<(NonNull<T>, Backing)> {
        let layout = Layout::from_size_align(bytes, ALIGN).ok()?;
        // SAFETY: the layout's size is not zero.
        let data = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some((data.cast(), Backing::Heap(layout)))
    }

    fn map(bytes: usize) -> Option<(NonNull<T>, Backing)> {
        let len = bytes.next_multiple_of(HUGE) + HUGE;
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches nothing of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return None;
        }
        let start = NonNull::new(start)?;
        let offset = start.as_ptr().align_offset(HUGE);
        // SAFETY: `offset < HUGE` and the mapping is at least `HUGE` longer than `bytes`.
        let data = unsafe { start.byte_add(offset) };
        let filled = bytes / HUGE * HUGE;
        #[cfg(target_os = "linux")]
        // SAFETY: together the ranges are the data rounded up to a huge page, which lies inside the mapping.
        // Advice only: a failure costs speed or memory, nothing else.
        unsafe {
            let rest = bytes.next_multiple_of(HUGE) - filled;
            libc::madvise(data.as_ptr(), filled, libc::MADV_HUGEPAGE);
            libc::madvise(data.byte_add(filled).as_ptr(), rest, libc::MADV_NOHUGEPAGE);
        }
        Some((data.cast(), Backing::Mapped(start, len)))
    }
}

fn out_of_memory(op: &'static str, bytes: usize) -> OpsError {
    OpsError::OutOfMemory { op, bytes, free: system::memory().free }
}

impl<T: Plain> Drop for Aligned<T> {
    fn drop(&mut self) {
        if !matches!(self.backing, Backing::Empty) {
            LIVE.fetch_sub((self.len * size_of::<T>()) as u64, Ordering::Relaxed);
        }
        match self.backing {
            Backing::Empty => {}
            // SAFETY: allocated in `heap` with this layout, freed once.
            Backing::Heap(layout) => unsafe { dealloc(self.data.as_ptr().cast(), layout) },
            // SAFETY: mapped in `map` with this start and length, unmapped once.
            Backing::Mapped(start, len) => unsafe {
                libc::munmap(start.as_ptr(), len);
            },
        }
    }
}

impl<T: Plain> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `data` points to `len` initialised elements (zeroed at creation), or `len` is 0.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

/// Scratch memory that only grows; contents are whatever the last user left (always initialised).
#[derive(Debug)]
pub(crate) struct Scratch(Aligned<f32>);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(Aligned { data: NonNull::dangling(), len: 0, backing: Backing::Empty })
    }

    /// At least `len` floats.
    pub(crate) fn floats(&mut self, op: &'static str, len: usize) -> Result<&mut [f32], OpsError> {
        if self.0.len < len {
            // Grow by half at least, so that a slowly growing batch does not reallocate on every step.
            let target = len.max(self.0.len + self.0.len / 2).next_multiple_of(1024);
            self.0 = Aligned::zeroed(op, target)?;
        }
        Ok(&mut self.0[..len])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn arrays_are_zeroed_aligned_and_writable() {
        for len in [0, 1, 100, MAP_FROM / 4 - 1, MAP_FROM / 4, 3 * HUGE / 4 + 5] {
            let mut array = Aligned::<f32>::zeroed("test", len).unwrap();
            assert_eq!(array.len(), len);
            assert!(array.iter().all(|v| *v == 0.0));
            if len > 0 {
                assert_eq!(array.as_ptr() as usize % ALIGN, 0);
                array[len - 1] = 1.0;
                assert_eq!(array[len - 1], 1.0);
            }
        }
    }

    #[test]
    fn impossible_sizes_are_typed_errors() {
        assert!(matches!(
            Aligned::<f32>::zeroed("test", usize::MAX / 2),
            Err(OpsError::OutOfMemory { op: "test", .. })
        ));
        assert!(matches!(
            Aligned::<f32>::zeroed("test", 1 << 58),
            Err(OpsError::OutOfMemory { op: "test", .. })
        ));
    }

    #[test]
    fn scratch_grows_and_stays() {
        let mut scratch = Scratch::new();
        assert_eq!(scratch.floats("test", 0).unwrap().len(), 0);
        scratch.floats("test", 10).unwrap().fill(2.0);
        assert_eq!(scratch.floats("test", 10).unwrap()[9], 2.0);
        assert_eq!(scratch.floats("test", 5000).unwrap().len(), 5000);
    }
}
