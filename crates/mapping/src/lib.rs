//! Read-only file mappings with page release: the one place outside the kernels that needs unsafe.
//!
//! A checkpoint is far larger than what a process may keep, so weights are mapped, repacked by a
//! backend and released. [`Mapping`] is a whole file as bytes, plus hints about how it is used.
//!
//! # Why the unsafe is sound, and its one condition
//! A mapping is exposed as `&[u8]`, which promises that the bytes do not change while it is borrowed.
//! This process never writes to the file and maps it without write permission, so only somebody else
//! could break the promise. The condition on the operator is therefore: **while it is mapped, a
//! checkpoint file is neither truncated nor rewritten in place**; replace checkpoints by writing a new
//! directory and renaming it (the old inode stays mapped and intact), or mount them read-only.
//! If the condition is broken all the same:
//! - truncated: touching a page past the new end raises SIGBUS and the process dies at once. It does
//!   not read another file's data, and cluster peers treat it as any other lost process;
//! - rewritten: reads return the new bytes. They are only ever taken as numbers or copied before they
//!   are interpreted (headers are parsed once, from a copy of what they said), and lengths always come
//!   from the mapping itself, so the result is wrong weights, not memory corruption. The model hash
//!   that every process computes at start samples the bytes and usually tells.

use std::{
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
};

use memmap2::{Advice, Mmap, UncheckedAdvice};

/// Linux maps pages around a fault in aligned windows of this size (`fault_around_bytes`), so a
/// release rounded to single pages would leave neighbours of what was read resident.
const FAULT_AROUND_BYTES: usize = 64 * 1024;

/// How a mapping is about to be read, which decides how much the kernel reads around a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Runs of neighbouring bytes (the default): a fault reads a whole read-ahead window, which may be
    /// megabytes.
    Runs,
    /// Single pages far apart: a fault reads that page only.
    Scattered,
}

/// A whole file, mapped read-only and shared with the page cache.
#[derive(Debug)]
pub struct Mapping {
    path: PathBuf,
    map: Mmap,
}

/// Why a file could not be mapped, or a hint not be given.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The file could not be opened or examined.
    #[error("open {path}: {source}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The path names a directory, a pipe or a device.
    #[error("map {path}: not a regular file", path = path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The kernel refused the mapping.
    #[error("map {path} ({len} bytes): {source}", path = path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// The cause.
        source: io::Error,
    },
    /// A range reaches past the end of the file.
    #[error("{operation} {path}: bytes {start}..{end} are not inside the file of {len} bytes", path = path.display())]
    OutOfRange {
        /// `release` or `will_need`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// First byte asked for.
        start: usize,
        /// One past the last byte asked for.
        end: usize,
        /// Length of the file in bytes.
        len: usize,
    },
    /// The kernel refused the hint.
    #[error("{operation} {path}: {source}", path = path.display())]
    Advise {
        /// `release`, `will_need` or `expect`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl Mapping {
    /// Maps the file at `path`. An empty file gives an empty mapping.
    pub fn open(path: &Path) -> Result<Self, MappingError> {
        let failed = |source| MappingError::Open { path: path.to_owned(), source };
        // Examined before it is opened: opening a pipe would wait for its writer.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(MappingError::NotAFile { path: path.to_owned() });
        }
        let file = File::open(path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        #[expect(unsafe_code, reason = "the purpose of this crate")]
        // SAFETY: the mapping is read-only and nothing in this process writes to the file; that nobody
        // else truncates or rewrites it is the documented condition of this crate (module header).
        let map = unsafe { Mmap::map(&file) };
        let map = map.map_err(|source| MappingError::Map { path: path.to_owned(), len, source })?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// The file's path as given to [`Self::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Drops the pages of `range` from this process (the page cache keeps them as long as it likes).
    /// Slices into the range stay valid: touching them reads the file again. The range is widened to
    /// the windows in which the kernel maps pages on a fault, so that nothing of it stays resident.
    pub fn release(&self, range: Range<usize>) -> Result<(), MappingError> {
        const OPERATION: &str = "release";
        self.check(OPERATION, &range)?;
        if range.is_empty() {
            return Ok(());
        }
        let base = self.map.as_ptr().addr();
        let start = (base + range.start) / FAULT_AROUND_BYTES * FAULT_AROUND_BYTES;
        let start = start.max(base) - base;
        let end = (base + range.end).next_multiple_of(FAULT_AROUND_BYTES) - base;
        let end = end.min(self.map.len());
        #[expect(unsafe_code, reason = "the purpose of this crate")]
        // SAFETY: MADV_DONTNEED loses data only of private or anonymous pages. These are clean pages
        // of a shared, read-only file mapping: the next access maps the same file bytes again, also
        // for slices that other threads hold. The range was checked to lie inside the mapping.
        let advised =
            unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        advised.map_err(|source| self.advise_failed(OPERATION, source))
    }

    /// Tells the kernel how the file will be read from now on.
    pub fn expect(&self, access: Access) -> Result<(), MappingError> {
        let advice = match access {
            Access::Runs => Advice::Normal,
            Access::Scattered => Advice::Random,
        };
        self.map.advise(advice).map_err(|source| self.advise_failed("expect", source))
    }

    /// Asks the kernel to read `range` ahead.
    pub fn will_need(&self, range: Range<usize>) -> Result<(), MappingError> {
        const OPERATION: &str = "will_need";
        self.check(OPERATION, &range)?;
        if range.is_empty() {
            return Ok(());
        }
        self.map
            .advise_range(Advice::WillNeed, range.start, range.len())
            .map_err(|source| self.advise_failed(OPERATION, source))
    }

    fn check(&self, operation: &'static str, range: &Range<usize>) -> Result<(), MappingError> {
        let len = self.map.len();
        if range.start > range.end || range.end > len {
            let path = self.path.clone();
            return Err(MappingError::OutOfRange {
                operation,
                path,
                start: range.start,
                end: range.end,
                len,
            });
        }
        Ok(())
    }

    fn advise_failed(&self, operation: &'static str, source: io::Error) -> MappingError {
        MappingError::Advise { operation, path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests;
