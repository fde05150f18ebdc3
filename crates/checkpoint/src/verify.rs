//! Every number of a checkpoint, judged: what opening leaves to the moment of access.
//!
//! Walks all tensors of the table once, in file order and in parallel, and drops the pages behind
//! itself, so that a checkpoint larger than memory can be walked. One finding per tensor.

use std::{
    num::NonZeroUsize,
    panic,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
};

use crate::{
    catalog::Tensor,
    checkpoint::{Checkpoint, bad_scale, decode, not_finite},
    header::Dtype,
    problem::{About, Problem, ProblemKind, Problems},
    table::{TensorSpec, duplicate_of, table},
};

/// Bytes judged at a time: small enough to stay in cache while the offender is located.
const CHUNK_BYTES: usize = 32 * 1024;

impl Checkpoint {
    /// Reads every tensor and reports NaN codes, bad scales, values that are not finite, and MTP copies
    /// of embedding and head that differ from the originals. `progress(done, total)` is told in bytes,
    /// from any of the threads.
    pub fn verify(&self, threads: NonZeroUsize, progress: &(dyn Fn(u64, u64) + Sync)) -> Problems {
        let mut work: Vec<(TensorSpec, Tensor<'_>)> = table(self.config())
            .filter_map(|spec| {
                let tensor = self.catalog.get_known(&spec.name)?;
                Some((spec, tensor))
            })
            .collect();
        // Shards are sorted by file name.
        work.sort_by_key(|(_, tensor)| (&tensor.shard.file, tensor.range().start));
        let total: u64 = work.iter().map(|(_, tensor)| tensor.range().len() as u64).sum();
        let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
        let walk = || {
            let mut found = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some((spec, tensor)) = work.get(at) else { return found };
                found.extend(self.judge(spec, tensor).map(|problem| (at, problem)));
                // A refused hint costs only memory.
                let _ = tensor.shard.mapping.release(tensor.range());
                let bytes = tensor.range().len() as u64;
                progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
            }
        };
        let mut found: Vec<(usize, Box<Problem>)> = thread::scope(|scope| {
            let walkers: Vec<_> = (0..threads.get()).map(|_| scope.spawn(walk)).collect();
            // A walker that died has judged nothing; that must not pass for "nothing found".
            let joined = |walker: thread::ScopedJoinHandle<'_, _>| {
                walker.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
            };
            walkers.into_iter().flat_map(joined).collect()
        });
        // File order, whichever thread came first.
        found.sort_by_key(|(at, _)| *at);
        let mut problems = Problems::default();
        found.into_iter().for_each(|(_, problem)| problems.push(problem));
        problems
    }

    fn judge(&self, spec: &TensorSpec, tensor: &Tensor<'_>) -> Option<Box<Problem>> {
        if let Some(problem) = judge_numbers(spec, tensor) {
            return Some(problem);
        }
        let original = duplicate_of(spec)?;
        let first = self.catalog.get_known(original)?;
        let same = first.dtype == tensor.dtype && first.bytes() == tensor.bytes();
        (!same).then(|| {
            About::new(tensor.shard.mapping.path()).tensor(
                ProblemKind::Mismatch,
                &spec.name,
                format!("the same bytes as `{original}`, of which it is a copy"),
                "other bytes",
                "cadre would compute with the original; fetch this shard again",
            )
        })
    }
}

fn judge_numbers(spec: &TensorSpec, tensor: &Tensor<'_>) -> Option<Box<Problem>> {
    let bytes = tensor.bytes();
    if spec.is_scale() {
        let scales = decode(Dtype::F32, bytes);
        let at = scales.iter().position(|scale| !(scale.is_finite() && *scale > 0.0))?;
        return Some(bad_scale(tensor, at, scales[at]));
    }
    let at = match tensor.dtype {
        Dtype::E4m3 => first_bad::<1>(bytes, |code| cadre_numerics::e4m3::is_nan(code[0])),
        Dtype::Bf16 => first_bad::<2>(bytes, |pair| u16::from_le_bytes(pair) & 0x7F80 == 0x7F80),
        _ => first_bad::<4>(bytes, |quad| !f32::from_le_bytes(quad).is_finite()),
    }?;
    let width = tensor.dtype.bytes();
    let value = match tensor.dtype {
        Dtype::E4m3 => f32::NAN,
        dtype => decode(dtype, &bytes[at * width..(at + 1) * width])[0],
    };
    let place = match *tensor.shape {
        [_, cols] => format!("row {}, column {}", at / cols, at % cols),
        _ => format!("element {at}"),
    };
    Some(not_finite(tensor, &place, value))
}

/// The first element for which `bad` holds. Whole chunks are folded without a branch, so that the
/// search vectorises: the answer is nearly always "none".
fn first_bad<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    let (elements, _) = bytes.as_chunks::<N>();
    let chunk_len = CHUNK_BYTES / N;
    for (number, chunk) in elements.chunks(chunk_len).enumerate() {
        if chunk.iter().fold(false, |any, &element| any | bad(element)) {
            let inside = chunk.iter().position(|&element| bad(element))?;
            return Some(number * chunk_len + inside);
        }
    }
    None
}
