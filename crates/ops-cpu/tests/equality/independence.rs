//! What results may not depend on: the rest of the batch, threads, chunking, places of pages.

use cadre_ops::{Backend, DecodeRow, PrefillSegment, RowGroup};
use cadre_types::{NumericsClass, PageId, Position};

use crate::{
    attention::{Case, Widths},
    backends,
    data::{DTYPES, Matrix, Stream, assert_bits, bits, buffer},
};

/// A row alone equals the row in a batch, for every batch size up to beyond a register tile.
#[test]
fn a_row_alone_equals_the_row_in_a_batch() {
    let (n, k) = (72, 300);
    for class in NumericsClass::ALL {
        for dtype in DTYPES {
            let stream = &mut Stream::new(11);
            let weight = Matrix::new(stream, dtype, n, k);
            let x = stream.values(20 * k);
            for backend in backends(class) {
                let mut queue = backend.queue().unwrap();
                let loaded = backend.load_matrix(weight.host()).unwrap();
                let mut run = |rows: &[f32]| {
                    let count = rows.len() / k;
                    let mut y = backend.alloc(count, n).unwrap();
                    let x = buffer(backend, rows, k, 0);
                    backend.linear(&mut queue, &x, &loaded, count, &mut y).unwrap();
                    bits(backend, &y, count)
                };
                let alone: Vec<Vec<u32>> = x.chunks(k).map(&mut run).collect();
                for rows in 1..=20 {
                    let batch = run(&x[..rows * k]);
                    let what = format!("{rows} rows, {}", backend.describe());
                    assert_bits(&what, &batch, &alone[..rows].concat(), n);
                }
            }
        }
    }
}

/// An expert's row does not depend on which other rows and experts share the call.
#[test]
fn an_expert_row_alone_equals_the_row_in_a_group() {
    let (hidden, inner) = (96, 200);
    for class in NumericsClass::ALL {
        let stream = &mut Stream::new(12);
        let matrices: Vec<Matrix> = [(inner, hidden), (inner, hidden), (hidden, inner)]
            .map(|(rows, cols)| Matrix::new(stream, DTYPES[2], rows, cols))
            .into();
        let x = stream.values(30 * hidden);
        for backend in backends(class) {
            let mut queue = backend.queue().unwrap();
            let [gate, up, down] = [0, 1, 2].map(|i| matrices[i].host());
            let ffn = backend.load_ffn(gate, up, down).unwrap();
            let mut run = |x: &[f32], groups: &[RowGroup]| {
                let rows = x.len() / hidden;
                let x = buffer(backend, x, hidden, 0);
                let mut y = backend.alloc(rows, hidden).unwrap();
                backend.grouped_ffn(&mut queue, &x, &[&ffn, &ffn], groups, &mut y).unwrap();
                bits(backend, &y, rows)
            };
            let one = [RowGroup { expert: 0, first_row: 0, rows: 1 }];
            let alone: Vec<u32> = x.chunks(hidden).flat_map(|row| run(row, &one)).collect();
            let groups = [
                RowGroup { expert: 1, first_row: 0, rows: 3 },
                RowGroup { expert: 0, first_row: 3, rows: 0 },
                RowGroup { expert: 0, first_row: 3, rows: 20 },
                RowGroup { expert: 1, first_row: 23, rows: 7 },
            ];
            assert_bits(&backend.describe(), &run(&x, &groups), &alone, hidden);
        }
    }
}

/// One chunk, chunks of odd sizes, and single rows give the same bits in naive form.
#[test]
fn prefill_does_not_depend_on_chunking() {
    let widths = Widths { heads: 3, nope: 24, rope: 8, v: 20, kv_lora: 72 };
    let rows = 150;
    let case = Case::new(13, DTYPES[2], &widths, &[(0, rows)]);
    let table = &case.sequences[0].table;
    for class in NumericsClass::ALL {
        for backend in backends(class) {
            let mut queue = backend.queue().unwrap();
            let (attention, cache) = case.fill(backend, 0);
            let q = case.queries(backend, &attention);
            let kv_up = backend.load_kv_up(&case.shape, case.kv_b.host()).unwrap();
            let mut run = |chunks: &[usize]| {
                let mut out = backend.alloc(rows, 60).unwrap();
                let mut first = 0;
                for chunk in chunks {
                    let segment = PrefillSegment {
                        first_row: first,
                        rows: *chunk,
                        first_position: first as Position,
                        block_table: table,
                    };
                    backend
                        .attention_prefill(
                            &mut queue,
                            &attention,
                            &kv_up,
                            &q,
                            &[segment],
                            0,
                            &cache,
                            &mut out,
                        )
                        .unwrap();
                    first += chunk;
                }
                assert_eq!(first, rows);
                bits(backend, &out, rows)
            };
            let whole = run(&[rows]);
            assert_bits("odd chunks", &run(&[1, 63, 64, 7, 15]), &whole, 60);
            assert_bits("single rows", &run(&vec![1; rows]), &whole, 60);
        }
    }
}

/// A generated row alone equals the row beside others, and other pages hold the same sequence.
#[test]
fn decode_does_not_depend_on_batch_or_pages() {
    let widths = Widths { heads: 5, nope: 16, rope: 16, v: 16, kv_lora: 48 };
    let mut case = Case::new(14, DTYPES[1], &widths, &[(130, 1), (64, 1), (3, 1)]);
    for backend in backends(NumericsClass::Bf16) {
        let kv_up = backend.load_kv_up(&case.shape, case.kv_b.host()).unwrap();
        let run = |case: &Case, rows: &[usize]| {
            let mut queue = backend.queue().unwrap();
            let (attention, cache) = case.fill(backend, 1);
            let q = case.queries(backend, &attention);
            let decode: Vec<DecodeRow<'_>> = rows
                .iter()
                .map(|row| DecodeRow {
                    row: *row,
                    position: case.sequences[*row].first as Position,
                    block_table: &case.sequences[*row].table,
                })
                .collect();
            let mut out = backend.alloc(3, 80).unwrap();
            backend
                .attention_decode(&mut queue, &attention, &kv_up, &q, &decode, 1, &cache, &mut out)
                .unwrap();
            bits(backend, &out, 3)
        };
        let all = run(&case, &[0, 1, 2]);
        for row in 0..3 {
            let alone = run(&case, &[row]);
            let range = row * 80..(row + 1) * 80;
            assert_bits(&backend.describe(), &alone[range.clone()], &all[range], 80);
        }
        let last = case.layout.pages as u32 - 1;
        let tables: Vec<Vec<PageId>> = case.sequences.iter().map(|s| s.table.clone()).collect();
        for sequence in &mut case.sequences {
            sequence.table.iter_mut().for_each(|page| *page = PageId(last - page.0));
        }
        assert_bits("mirrored pages", &run(&case, &[2, 0, 1]), &all, 80);
        for (sequence, table) in case.sequences.iter_mut().zip(tables) {
            sequence.table = table;
        }
    }
}

/// Rows handed over to another cache, at other pages, serve as well as appended ones.
#[test]
fn handed_over_rows_equal_appended_rows() {
    let widths = Widths { heads: 2, nope: 16, rope: 8, v: 16, kv_lora: 40 };
    let case = Case::new(15, DTYPES[2], &widths, &[(100, 1)]);
    for class in NumericsClass::ALL {
        for backend in backends(class) {
            let mut queue = backend.queue().unwrap();
            let (_, cache) = case.fill(backend, 1);
            let table = &case.sequences[0].table;
            let mut rows = Vec::new();
            backend.kv_read(&mut queue, &cache, 1, table, 0, 60, &mut rows).unwrap();
            backend.kv_read(&mut queue, &cache, 1, table, 60, 41, &mut rows).unwrap();
            let mut other = backend.kv_cache(case.layout).unwrap();
            let elsewhere = [PageId(3), PageId(0)];
            backend.kv_write(&mut queue, &mut other, 0, &elsewhere, 0, 101, &rows).unwrap();
            let mut back = Vec::new();
            backend.kv_read(&mut queue, &other, 0, &elsewhere, 0, 101, &mut back).unwrap();
            assert_eq!(back, rows);
        }
    }
}

/// Two threads on one backend, each with its own queue.
#[test]
fn two_threads_share_a_backend() {
    let stream = &mut Stream::new(16);
    let weight = Matrix::new(stream, DTYPES[2], 256, 256);
    let x = stream.values(40 * 256);
    for backend in backends(NumericsClass::Bf16) {
        let loaded = backend.load_matrix(weight.host()).unwrap();
        let run = || {
            let mut queue = backend.queue().unwrap();
            let input = buffer(backend, &x, 256, 0);
            let mut y = backend.alloc(40, 256).unwrap();
            backend.linear(&mut queue, &input, &loaded, 40, &mut y).unwrap();
            bits(backend, &y, 40)
        };
        let expected = run();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        assert_eq!(run(), expected);
                    }
                });
            }
        });
    }
}
