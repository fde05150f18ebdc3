//! Rows from buffer to buffer and to and from the host: exact in every class.

use bytes::Bytes;
use cadre_types::config::ScaleFormat;

use super::{
    Suite,
    data::{activations, read, read_residual, residual, step_of},
    same_bits,
};
use crate::{
    backend::Backend,
    host::{EncodedRows, RowFormat, RowLayout},
};

pub(super) fn moves<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("row moves", |stream, rows| {
        let cols = suite.width(stream, 300);
        let (x, other) = (stream.values(rows * cols), stream.values(rows * cols));
        let wanted: Vec<u32> = (0..rows as u32).filter(|_| stream.coin()).collect();
        let run = |b: &dyn Fn(&[u32]) -> Vec<f32>| b(&wanted);
        let got = run(&|wanted| moved(suite.backend, &x, &other, cols, rows, wanted));
        let expected = run(&|wanted| moved(&suite.reference, &x, &other, cols, rows, wanted));
        same_bits("row moves", &got, &expected, cols);
    });
}

fn moved<B: Backend>(
    backend: &B,
    x: &[f32],
    other: &[f32],
    cols: usize,
    rows: usize,
    wanted: &[u32],
) -> Vec<f32> {
    let queue = &mut backend.queue().unwrap();
    let mut stream = residual(backend, x, cols, 1);
    let (a, b) = (activations(backend, x, cols, 1), activations(backend, other, cols, 1));
    let mut out = Vec::new();
    let mut wide = backend.alloc_activations(rows + 1, 2 * cols).unwrap();
    backend.concat(queue, &a, &b, rows, &mut wide).unwrap();
    out.extend(read(backend, queue, &wide, rows + 1));
    let step = step_of(backend, queue, &vec![0; rows], wanted);
    let mut picked = backend.alloc_residual(wanted.len() + 1, cols).unwrap();
    backend.gather_wanted(queue, &step, &stream, &mut picked).unwrap();
    out.extend(read_residual(backend, queue, &picked, wanted.len() + 1));
    backend.assign(queue, &mut stream, &b, rows).unwrap();
    out.extend(read_residual(backend, queue, &stream, rows + 1));
    out
}

/// Rows of the dispatch format down, up again in two parts at other places, and down; activations down.
pub(super) fn transfers<B: Backend>(suite: &Suite<'_, B>) {
    suite.each("transfers", |stream, rows| {
        let (backend, class) = (suite.backend, suite.backend.class());
        let (format, cols) = (RowFormat::dispatch(class), suite.width(stream, 300));
        let queue = &mut backend.queue().unwrap();
        let x = activations(backend, &stream.values(rows * cols), cols, 1);
        let mut sent = backend.alloc_rows(rows + 1, cols).unwrap();
        backend.encode(queue, &x, rows, ScaleFormat::F32, &mut sent).unwrap();
        let layout = RowLayout::of(format, rows, cols);
        let at = 4 * stream.below(3);
        let mut memory = backend.staging(layout.bytes + at + 5).unwrap();
        backend.download_rows(queue, &sent, rows, &mut memory, at).unwrap();
        backend.wait(&backend.record(queue).unwrap()).unwrap();
        let bytes = Bytes::from_owner(memory).slice(at..);
        let (data, scales) = (bytes.slice(..layout.data), bytes.slice(layout.scales_at..layout.bytes));
        let whole = EncodedRows { format, rows, cols, data, scales };

        let cut = stream.below(rows + 1);
        let mut arrived = backend.alloc_rows(rows + 3, cols).unwrap();
        // The second part first, and both where others lie in between.
        for (part, first_row) in [(cut..rows, cut + 2), (0..cut, 0)] {
            let width = (format.row_bytes(cols), 4 * format.row_scales(cols));
            let part = EncodedRows {
                rows: part.len(),
                // A frame's payload has any alignment.
                data: unaligned(&whole.data[part.start * width.0..part.end * width.0]),
                scales: unaligned(&whole.scales[part.start * width.1..part.end * width.1]),
                ..whole.clone()
            };
            backend.upload_rows(queue, &part, first_row, &mut arrived).unwrap();
        }
        let mut again = backend.staging(RowLayout::of(format, rows + 2, cols).bytes).unwrap();
        backend.download_rows(queue, &arrived, rows + 2, &mut again, 0).unwrap();
        backend.synchronize(queue).unwrap();
        let again = EncodedRows::in_memory(again, format, rows + 2, cols);
        for (got, expected, width) in [
            (&again.data, &whole.data, format.row_bytes(cols)),
            (&again.scales, &whole.scales, 4 * format.row_scales(cols)),
        ] {
            assert_eq!(got[..cut * width], expected[..cut * width]);
            assert_eq!(got[(cut + 2) * width..], expected[cut * width..]);
        }

        let combine = RowFormat::combine(class).row_bytes(cols);
        let mut memory = backend.staging(3 + combine * rows).unwrap();
        backend.download_activations(queue, &x, 0..cut, &mut memory, 3).unwrap();
        backend.download_activations(queue, &x, cut..rows, &mut memory, 3 + cut * combine).unwrap();
        backend.synchronize(queue).unwrap();
        let values = read(backend, queue, &x, rows);
        let mut decoded = vec![0.0; rows * cols];
        crate::check::decode_row(RowFormat::combine(class), &memory.as_ref()[3..], &[], &mut decoded);
        same_bits("activations", &decoded, &values, cols);
    });
}

/// A copy that begins one byte beyond an aligned place.
pub(super) fn unaligned(bytes: &[u8]) -> Bytes {
    let mut shifted = vec![0];
    shifted.extend_from_slice(bytes);
    Bytes::from(shifted).slice(1..)
}

/// Memory has the size asked for, stays in place when it becomes bytes, and is dropped under way without
/// harm; events of one queue order another.
pub(super) fn staging<B: Backend>(suite: &Suite<'_, B>) {
    let backend = suite.backend;
    for bytes in [0, 1, 4095, 70_000] {
        let mut memory = backend.staging(bytes).unwrap();
        assert_eq!(memory.as_ref().len(), bytes);
        memory.as_mut().fill(3);
        let place = memory.as_ref().as_ptr();
        let shared = Bytes::from_owner(memory);
        assert!(bytes == 0 || shared.as_ptr() == place);
        assert!(shared.iter().all(|byte| *byte == 3));
    }
    let (rows, cols) = (64, 128 * suite.granule.div_ceil(128));
    let values: Vec<f32> = (0..rows * cols).map(|i| i as f32 / 256.0 % 1.0).collect();
    let x = activations(backend, &values, cols, 0);
    let bytes = RowFormat::combine(backend.class()).row_bytes(cols) * rows;
    let queue = &mut backend.queue().unwrap();
    let other = &mut backend.queue().unwrap();
    for _ in 0..20 {
        let mut dropped = backend.staging(bytes).unwrap();
        backend.download_activations(queue, &x, 0..rows, &mut dropped, 0).unwrap();
        drop(dropped);
        let event = backend.record(queue).unwrap();
        backend.run_after(other, &event).unwrap();
        let mut kept = backend.staging(bytes).unwrap();
        backend.download_activations(other, &x, 0..rows, &mut kept, 0).unwrap();
        // Looking waits.
        let mut decoded = vec![0.0; rows * cols];
        let format = RowFormat::combine(backend.class());
        crate::check::decode_row(format, kept.as_ref(), &[], &mut decoded);
        same_bits("what was downloaded", &decoded, &read(backend, other, &x, rows), cols);
        backend.wait(&event).unwrap();
        assert!(backend.is_done(&event).unwrap(), "an event that was waited for is done");
    }
}
