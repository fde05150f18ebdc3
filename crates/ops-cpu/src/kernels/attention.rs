//! Online-softmax attention over blocks of 64 keys (`cadre_numerics::softmax`), for tiles of query rows that
//! share their keys: rows of a prompt chunk (one head, naive form) or heads of one token (absorbed form).

use cadre_numerics::softmax::KEYS;

use super::{product::tile, rows};
use crate::lanes::{LANES, Lanes, Work};

/// Query rows of one tile, on the instruction sets that matter for splitting work.
pub(crate) const QUERIES: usize = 6;

/// Running state of query rows: `o` has a row of `stride` per query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    /// Running maxima, one per query.
    pub(crate) max: *mut f32,
    /// Running denominators, one per query.
    pub(crate) sum: *mut f32,
    /// Running outputs.
    pub(crate) o: *mut f32,
    /// Elements from one row of `o` to the next, a multiple of 16.
    pub(crate) stride: usize,
}

/// One block of keys and values in F32, rows padded to multiples of 16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    /// `[64][key_stride]`, padded with zeros.
    pub(crate) keys: *const f32,
    /// A multiple of 16; also the padded width of queries.
    pub(crate) key_stride: usize,
    /// `[64][value_stride]`.
    pub(crate) values: *const f32,
    /// Elements from one value to the next.
    pub(crate) value_stride: usize,
    /// Vectors of 16 that a value has.
    pub(crate) value_vectors: usize,
    /// Factor on scores.
    pub(crate) scale: f32,
}

/// Which keys of the block a query sees: `seen(i) = min(first + i * step, 64)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// Keys that query 0 sees, at least 1.
    pub(crate) first: usize,
    /// 1 for the rows of a prompt chunk, 0 for the heads of a token.
    pub(crate) step: usize,
}

impl Seen {
    #[inline(always)]
    fn of(self, query: usize) -> usize {
        (self.first + query * self.step).min(KEYS)
    }
}

/// Takes one block into the state of queries `0..count`. `q` has a row of `key_stride` per query, padded
/// with zeros.
///
/// # Safety
/// The machine has `V`'s instruction set; block, queries and state are as their fields say; the state is not
/// shared.
#[inline(always)]
pub(crate) unsafe fn block<V: Lanes>(block: &Block, q: *const f32, count: usize, seen: Seen, state: &State) {
    let mut first = 0;
    while first < count {
        let rows = (count - first).min(V::QUERIES);
        // SAFETY: queries `first..first + rows` exist.
        unsafe {
            let q = q.add(first * block.key_stride);
            let state = State {
                max: state.max.add(first),
                sum: state.sum.add(first),
                o: state.o.add(first * state.stride),
                stride: state.stride,
            };
            let seen = Seen { first: seen.first + first * seen.step, step: seen.step };
            match rows {
                1 => queries::<V, 1>(Queries { block, q, seen, state }),
                2 => queries::<V, 2>(Queries { block, q, seen, state }),
                3 => queries::<V, 3>(Queries { block, q, seen, state }),
                4 => queries::<V, 4>(Queries { block, q, seen, state }),
                5 => queries::<V, 5>(Queries { block, q, seen, state }),
                _ => queries::<V, 6>(Queries { block, q, seen, state }),
            }
        }
        first += rows;
    }
}

/// Enters the tile of R queries, if the instruction set has tiles that high.
#[inline(always)]
unsafe fn queries<V: Lanes, const R: usize>(queries: Queries<'_>) {
    if const { R <= V::QUERIES } {
        // SAFETY: the contract of `block` for R queries.
        unsafe { V::enter(QueriesOf::<R>(queries)) }
    }
}

/// Queries of one tile and their block.
struct Queries<'a> {
    block: &'a Block,
    q: *const f32,
    seen: Seen,
    state: State,
}

struct QueriesOf<'a, const R: usize>(Queries<'a>);

impl<const R: usize> Work for QueriesOf<'_, R> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Queries { block, q, seen, state } = self.0;
        // SAFETY: the contract of `block` for R queries.
        unsafe {
            let mut p = [[0.0_f32; KEYS]; R];
            let longest = seen.of(R - 1);
            if const { V::SCORE_KEYS == 4 } {
                scores::<V, R, 4>(block, q, longest, &mut p);
            } else {
                scores::<V, R, 2>(block, q, longest, &mut p);
            }
            let mut alpha = [0.0_f32; R];
            for r in 0..R {
                let (max, sum) = (state.max.add(r), state.sum.add(r));
                let (p, seen) = (&mut p[r], seen.of(r));
                alpha[r] = V::enter(Softmax { p, seen, scale: block.scale, max, sum });
            }
            let mut rows = [std::ptr::null::<f32>(); R];
            for r in 0..R {
                rows[r] = p[r].as_ptr();
            }
            let shared = seen.of(0);
            for vector in 0..block.value_vectors {
                let values = block.values.add(vector * LANES);
                let sums = tile::<V, R, 1>(rows, values, 0, block.value_stride, shared);
                for r in 0..R {
                    let mut sum = sums[r][0];
                    for j in shared..seen.of(r) {
                        let v = V::load(values.add(j * block.value_stride));
                        sum = V::splat(p[r][j]).fma(v, sum);
                    }
                    let o = state.o.add(r * state.stride + vector * LANES);
                    V::load(o).fma(V::splat(alpha[r]), sum).store(o);
                }
            }
        }
    }
}

/// Inner products of R queries with the first `count` keys (rounded up to whole tiles; the block has 64).
#[inline(always)]
unsafe fn scores<V: Lanes, const R: usize, const K: usize>(
    block: &Block,
    q: *const f32,
    count: usize,
    p: &mut [[f32; KEYS]; R],
) {
    // SAFETY: keys and queries exist; KEYS is a multiple of K.
    unsafe {
        for j in (0..count).step_by(K) {
            let keys = block.keys.add(j * block.key_stride);
            let mut r = 0;
            while r + 2 <= R {
                let q = q.add(r * block.key_stride);
                let dots = score_tile::<V, 2, K>(q, keys, block.key_stride);
                p[r][j..j + K].copy_from_slice(&dots[0]);
                p[r + 1][j..j + K].copy_from_slice(&dots[1]);
                r += 2;
            }
            if r < R {
                let q = q.add(r * block.key_stride);
                let dots = score_tile::<V, 1, K>(q, keys, block.key_stride);
                p[r][j..j + K].copy_from_slice(&dots[0]);
            }
        }
    }
}

/// Q queries times K keys, each as `cadre_numerics::reduce::dot`.
#[inline(always)]
unsafe fn score_tile<V: Lanes, const Q: usize, const K: usize>(
    q: *const f32,
    keys: *const f32,
    stride: usize,
) -> [[f32; K]; Q] {
    // SAFETY: rows of `stride`, a multiple of 16, exist.
    unsafe {
        let zero = V::splat(0.0);
        let mut lanes = [[zero; K]; Q];
        for i in (0..stride).step_by(LANES) {
            let mut key = [zero; K];
            for (k, key) in key.iter_mut().enumerate() {
                *key = V::load(keys.add(k * stride + i));
            }
            for (a, lanes) in lanes.iter_mut().enumerate() {
                let q = V::load(q.add(a * stride + i));
                for (lanes, key) in lanes.iter_mut().zip(key) {
                    *lanes = q.fma(key, *lanes);
                }
            }
        }
        let mut dots = [[0.0_f32; K]; Q];
        if K == 4 {
            for a in 0..Q {
                let sums = V::tree4([lanes[a][0], lanes[a][1], lanes[a][2], lanes[a][3]]);
                dots[a].copy_from_slice(&sums);
            }
        } else {
            let last = Q - 1;
            let sums = V::tree4([lanes[0][0], lanes[0][1], lanes[last][0], lanes[last][1]]);
            dots[0].copy_from_slice(&sums[..2]);
            dots[last].copy_from_slice(&sums[2..]);
        }
        dots
    }
}

/// One row of scores becomes probabilities (0 beyond `seen`); gives the factor on what was summed before.
struct Softmax<'a> {
    p: &'a mut [f32; KEYS],
    seen: usize,
    scale: f32,
    max: *mut f32,
    sum: *mut f32,
}

impl Work for Softmax<'_> {
    type Out = f32;

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) -> f32 {
        // SAFETY: the state of one query.
        unsafe {
            let at = self.p.as_mut_ptr();
            for i in (0..KEYS).step_by(LANES) {
                V::load(at.add(i)).mul(V::splat(self.scale)).store(at.add(i));
            }
            self.p[self.seen..].fill(f32::NEG_INFINITY);
            let at = self.p.as_mut_ptr();
            let mut largest = V::splat(*self.max);
            for i in (0..KEYS).step_by(LANES) {
                largest = V::load(at.add(i)).max(largest);
            }
            let new = largest.reduce_max();
            let mut lanes = V::splat(0.0);
            for i in (0..KEYS).step_by(LANES) {
                let v = V::load(at.add(i)).sub(V::splat(new)).exp();
                v.store(at.add(i));
                lanes = lanes.add(v);
            }
            let alpha = cadre_numerics::exp::exp(*self.max - new);
            *self.sum = (*self.sum).mul_add(alpha, lanes.tree());
            *self.max = new;
            alpha
        }
    }
}

/// `o *= 1 / sum` for `count` queries.
///
/// # Safety
/// The machine has `V`'s instruction set; the state is as its fields say and not shared.
#[inline(always)]
pub(crate) unsafe fn normalise<V: Lanes>(state: &State, count: usize, vectors: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        for query in 0..count {
            let inverse = V::splat(1.0 / *state.sum.add(query));
            for vector in 0..vectors {
                let o = state.o.add(query * state.stride + vector * LANES);
                V::load(o).mul(inverse).store(o);
            }
        }
    }
}

/// Sets the state of `count` queries to nothing seen.
///
/// # Safety
/// The state is as its fields say and not shared.
#[inline(always)]
pub(crate) unsafe fn start(state: &State, count: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        for query in 0..count {
            *state.max.add(query) = f32::NEG_INFINITY;
            *state.sum.add(query) = 0.0;
        }
        std::slice::from_raw_parts_mut(state.o, count * state.stride).fill(0.0);
    }
}

/// Copies a row of `width` values and pads it with zeros to `stride`.
///
/// # Safety
/// `from` holds `width` values, `to` `stride`; `to` is not shared.
#[inline(always)]
pub(crate) unsafe fn pad(from: *const f32, width: usize, to: *mut f32, stride: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, width);
        std::slice::from_raw_parts_mut(to.add(width), stride - width).fill(0.0);
    }
}

/// Cached rows of one page, from the first slot on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    /// Row of slot 0.
    pub(crate) rows: *const u8,
    /// Elements of a row.
    pub(crate) width: usize,
    /// bf16 or F32.
    pub(crate) bf16: bool,
}

/// Widens `width` elements from `from` on of the first `count` rows of a page into `to` with a row stride.
///
/// # Safety
/// The machine has `V`'s instruction set; rows exist; `to` has room and is not shared.
#[inline(always)]
pub(crate) unsafe fn widen_page<V: Lanes>(
    page: &Page,
    count: usize,
    from: usize,
    width: usize,
    to: *mut f32,
    stride: usize,
) {
    let element = if page.bf16 { 2 } else { 4 };
    for row in 0..count {
        // SAFETY: the caller's contract.
        unsafe {
            let source = page.rows.add((row * page.width + from) * element);
            let to = to.add(row * stride);
            if page.bf16 {
                rows::widen_bf16::<V>(source, width, to);
            } else {
                std::ptr::copy_nonoverlapping(source.cast::<f32>(), to, width);
            }
        }
    }
}
