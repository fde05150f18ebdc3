// Matrix products on CUDA cores, in the blocked chain of docs/numerics.md: inside a block of 128 one FMA chain over
// ascending k from +0, between blocks acc = fma(block sum, t, acc). One thread an output and up to ROWS rows; no row
// knows of its neighbours.
//
// Packed weights: panels of 128 outputs; a panel holds words of 4 bytes, word w of output n at [w * 128 + n % 128],
// with 1, 2 or 4 consecutive k (F32, BF16, e4m3), lowest k in the lowest bits. So 128 threads of one k read 512
// consecutive bytes. A panel's missing outputs and a word's missing k are zero and never read into a sum.
#include "numerics.cuh"

// Rows of one task.
#define ROWS 8

template <int BYTES> __device__ __forceinline__ float element(u32 word, u32 j) {
    if (BYTES == 4) return f32_of(word);
    if (BYTES == 2) return bf16_decode((u16)(word >> (16u * j)));
    return e4m3_folded(word >> (8u * j) & 0xffu);
}

struct Product {
    const u8 *x;             // [.., x_stride], BF16 or F32; or codes below
    u32 x_bf16;
    const u8 *codes;         // [.., x_stride]: the quantised input, CODED only
    const float *code_scales; // [.., blocks]
    u32 x_stride;
    const u32 *x_rows;       // which row of x belongs to output row i; null: row i
    const u32 *words;        // the matrix, where experts is null
    const float *scales;
    const u64 *experts;      // per expert: address of words, address of scales, kind of its elements
    u32 kind;                // the kind that this launch is for; tasks of other experts are another launch's
    const u32 *tasks;        // per task: expert, first row, rows (at most ROWS); null: rows in order
    u32 rows;                // total, where tasks is null
    u32 cols;
    u32 n_first, n_count;    // outputs
    const u32 *y_rows;       // where output row i goes; null: to row i
    u8 *y;                   // [.., y_stride], output n at n - n_first
    u32 y_bf16;
    u32 y_stride;
};

template <int BYTES, bool CODED> __device__ __forceinline__ void product(const Product &p) {
    constexpr u32 PER_WORD = 4 / BYTES;
    __shared__ __align__(16) float xs[ROWS][BLOCK];
    __shared__ float x_scales[ROWS];
    u32 expert = 0, first = blockIdx.x * ROWS, rows;
    if (p.tasks) {
        expert = p.tasks[3u * blockIdx.x];
        first = p.tasks[3u * blockIdx.x + 1u];
        rows = p.tasks[3u * blockIdx.x + 2u];
    } else {
        rows = min((u32)ROWS, p.rows - first);
    }
    if (p.experts && p.experts[3u * expert + 2u] != p.kind) return;
    const u32 *words = p.experts ? (const u32 *)p.experts[3u * expert] : p.words;
    const float *scales = p.experts ? (const float *)p.experts[3u * expert + 1u] : p.scales;
    u32 n = p.n_first + blockIdx.y * BLOCK + threadIdx.x;
    bool mine = n < p.n_first + p.n_count;
    u32 blocks = (p.cols + BLOCK - 1u) / BLOCK, words_of_row = (p.cols + PER_WORD - 1u) / PER_WORD;
    const u32 *column = words + (u64)(n / BLOCK) * words_of_row * BLOCK + n % BLOCK;
    float acc[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) acc[r] = 0.0f;
    for (u32 block = 0; block < blocks; block++) {
        u32 k0 = block * BLOCK, count = min((u32)BLOCK, p.cols - k0);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float value = 0.0f;
            if (r < rows && threadIdx.x < count) {
                u64 row = p.x_rows ? p.x_rows[first + r] : first + r;
                u64 at = row * p.x_stride + k0 + threadIdx.x;
                value = CODED ? e4m3_decode(p.codes[at]) : load(p.x, at, p.x_bf16);
                if (CODED && threadIdx.x == 0u) x_scales[r] = p.code_scales[row * blocks + block];
            }
            xs[r][threadIdx.x] = value;
        }
        __syncthreads();
        if (!mine) continue;
        float sum[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) sum[r] = 0.0f;
        const u32 *at = column + (u64)(k0 / PER_WORD) * BLOCK;
        u32 whole = count / PER_WORD;
#pragma unroll 4
        for (u32 w = 0; w < whole; w++) {
            u32 word = at[w * BLOCK];
#pragma unroll
            for (u32 j = 0; j < PER_WORD; j++) {
                float weight = element<BYTES>(word, j);
#pragma unroll
                for (int r = 0; r < ROWS; r++) sum[r] = fmaf(xs[r][w * PER_WORD + j], weight, sum[r]);
            }
        }
        for (u32 k = whole * PER_WORD; k < count; k++) {
            float weight = element<BYTES>(at[whole * BLOCK], k % PER_WORD);
#pragma unroll
            for (int r = 0; r < ROWS; r++) sum[r] = fmaf(xs[r][k], weight, sum[r]);
        }
        float scale = BYTES == 1 ? scales[(u64)(n / BLOCK) * blocks + block] * 256.0f : 1.0f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) acc[r] = fmaf(sum[r], CODED ? scale * x_scales[r] : scale, acc[r]);
    }
    if (!mine) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= rows) continue;
        u64 row = p.y_rows ? p.y_rows[first + r] : first + r;
        store(p.y, row * p.y_stride + (n - p.n_first), acc[r], p.y_bf16);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 6) product_f32(
    const u8 *x, u32 x_bf16, const u8 *codes, const float *code_scales, u32 x_stride, const u32 *x_rows,
    const u32 *words, const float *scales, const u64 *experts, u32 kind, const u32 *tasks, u32 rows, u32 cols,
    u32 n_first, u32 n_count, const u32 *y_rows, u8 *y, u32 y_bf16, u32 y_stride
) {
    Product p = {x, x_bf16, codes, code_scales, x_stride, x_rows, words, scales, experts, kind,
                 tasks, rows, cols, n_first, n_count, y_rows, y, y_bf16, y_stride};
    product<4, false>(p);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 6) product_bf16(
    const u8 *x, u32 x_bf16, const u8 *codes, const float *code_scales, u32 x_stride, const u32 *x_rows,
    const u32 *words, const float *scales, const u64 *experts, u32 kind, const u32 *tasks, u32 rows, u32 cols,
    u32 n_first, u32 n_count, const u32 *y_rows, u8 *y, u32 y_bf16, u32 y_stride
) {
    Product p = {x, x_bf16, codes, code_scales, x_stride, x_rows, words, scales, experts, kind,
                 tasks, rows, cols, n_first, n_count, y_rows, y, y_bf16, y_stride};
    product<2, false>(p);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 6) product_e4m3(
    const u8 *x, u32 x_bf16, const u8 *codes, const float *code_scales, u32 x_stride, const u32 *x_rows,
    const u32 *words, const float *scales, const u64 *experts, u32 kind, const u32 *tasks, u32 rows, u32 cols,
    u32 n_first, u32 n_count, const u32 *y_rows, u8 *y, u32 y_bf16, u32 y_stride
) {
    Product p = {x, x_bf16, codes, code_scales, x_stride, x_rows, words, scales, experts, kind,
                 tasks, rows, cols, n_first, n_count, y_rows, y, y_bf16, y_stride};
    product<1, false>(p);
}

extern "C" __global__ void __launch_bounds__(BLOCK, 6) product_e4m3_coded(
    const u8 *x, u32 x_bf16, const u8 *codes, const float *code_scales, u32 x_stride, const u32 *x_rows,
    const u32 *words, const float *scales, const u64 *experts, u32 kind, const u32 *tasks, u32 rows, u32 cols,
    u32 n_first, u32 n_count, const u32 *y_rows, u8 *y, u32 y_bf16, u32 y_stride
) {
    Product p = {x, x_bf16, codes, code_scales, x_stride, x_rows, words, scales, experts, kind,
                 tasks, rows, cols, n_first, n_count, y_rows, y, y_bf16, y_stride};
    product<1, true>(p);
}

// Row-major elements of `bytes` each, [rows, cols], to panels; grid: words of a panel over x, panels over y.
extern "C" __global__ void pack(const u8 *raw, u32 rows, u32 cols, u32 bytes, u32 *panels) {
    u32 per_word = 4u / bytes, words_of_row = (cols + per_word - 1u) / per_word;
    u64 n = (u64)blockIdx.y * BLOCK + threadIdx.x;
    for (u32 w = blockIdx.x; w < words_of_row; w += gridDim.x) {
        u32 word = 0;
        if (n < rows) {
            for (u32 j = 0; j < per_word; j++) {
                u32 k = w * per_word + j;
                if (k >= cols) break;
                u64 at = n * cols + k;
                if (bytes == 4u) word = ((const u32 *)raw)[at];
                else if (bytes == 2u) word |= (u32)((const u16 *)raw)[at] << (16u * j);
                else word |= (u32)raw[at] << (8u * j);
            }
        }
        panels[((u64)blockIdx.y * words_of_row + w) * BLOCK + threadIdx.x] = word;
    }
}
