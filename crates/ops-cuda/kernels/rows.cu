// Row moves and element-wise operations: exact copies, the residual sum, and the encodings of the wire.
//
// `bf16` beside a pointer: its elements are BF16, else F32 (activations and rows of the wire; the residual stream is
// always F32).
#include "numerics.cuh"

// Word `word` of a row of a matrix in tiles of 128 rows by 128 bytes, rows permuted and swizzled as pack.cu does it.
__device__ __forceinline__ u64 tile_word(u32 row, u32 word, u32 row_bytes) {
    u32 in = row % 128u, at = (in & ~15u) + (in % 16u) / 2u + (in % 2u) * 8u, byte = word * 4u;
    u64 tile = (u64)(row / 128u) * ((row_bytes + 127u) / 128u) + byte / 128u;
    return (tile * 16384u + at * 128u + ((byte % 128u / 16u ^ at % 8u) * 16u) + byte % 16u) / 4u;
}

// y[t, k] = the element of row ids[t] of a packed matrix, times its block scale: in panels (product.cu has the
// packing) or in tiles (pack.cu). bytes: of an element (4, 2 or 1).
extern "C" __global__ void embed(
    const u32 *words, const float *scales, u32 bytes, u32 tiled, u32 cols, const u32 *ids, float *y
) {
    u64 id = ids[blockIdx.x];
    u32 per_word = 4u / bytes;
    u64 words_of_row = (cols + per_word - 1u) / per_word;
    const u32 *column = words + id / BLOCK * words_of_row * BLOCK + id % BLOCK;
    u32 blocks = (cols + BLOCK - 1u) / BLOCK;
    for (u32 k = threadIdx.x; k < cols; k += blockDim.x) {
        u32 word = tiled ? words[tile_word((u32)id, k * bytes / 4u, cols * bytes)] : column[(u64)(k / per_word) * BLOCK];
        float value;
        if (bytes == 4u) value = f32_of(word);
        else if (bytes == 2u) value = bf16_decode((u16)(word >> (16u * (k % 2u))));
        else value = e4m3_folded(word >> (8u * (k % 4u)) & 0xffu) * (scales[id / BLOCK * blocks + k / BLOCK] * 256.0f);
        y[(u64)blockIdx.x * cols + k] = value;
    }
}

// x += delta
extern "C" __global__ void add(float *x, const u8 *delta, u32 bf16, u64 elements) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += step)
        x[i] = x[i] + load(delta, i, bf16);
}

// y = x, from one element type to the other; BF16 from F32 rounds.
extern "C" __global__ void convert(const u8 *x, u32 x_bf16, u64 elements, u8 *y, u32 y_bf16) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += step)
        store(y, i, load(x, i, x_bf16), y_bf16);
}

// y[t] = [a[t], b[t]]
extern "C" __global__ void concat(const u8 *a, u32 a_cols, const u8 *b, u32 b_cols, u32 bf16, u8 *y) {
    u64 row = blockIdx.x;
    u32 cols = a_cols + b_cols;
    for (u32 k = threadIdx.x; k < cols; k += blockDim.x) {
        float value = k < a_cols ? load(a, row * a_cols + k, bf16) : load(b, row * b_cols + (k - a_cols), bf16);
        store(y, row * cols + k, value, bf16);
    }
}

// y[i] = x[rows[i]] of the residual stream.
extern "C" __global__ void gather_rows(const float *x, u32 cols, const u32 *rows, float *y) {
    u64 from = rows[blockIdx.x], to = blockIdx.x;
    for (u32 k = threadIdx.x; k < cols; k += blockDim.x) y[to * cols + k] = x[from * cols + k];
}

// e4m3 rows with their scales to F32: code x scale, rounded once. One thread block a row.
extern "C" __global__ void decode_codes(const u8 *codes, const float *scales, u32 cols, float *y) {
    u64 row = blockIdx.x;
    u32 blocks = (cols + BLOCK - 1u) / BLOCK;
    for (u32 k = threadIdx.x; k < cols; k += blockDim.x)
        y[row * cols + k] = e4m3_decode(codes[row * cols + k]) * scales[row * blocks + k / BLOCK];
}

// x[t] += (sum over j ascending of weights[t, j] * rows[index[t * k + j]]) + shared[t]: a chain of FMA from +0, then
// the shared output (null: none), then the residual.
extern "C" __global__ void combine(
    const u8 *rows, u32 bf16, const u32 *index, const float *weights, u32 top_k, const u8 *shared, u32 shared_bf16,
    u32 cols, float *x
) {
    u64 t = blockIdx.x;
    for (u32 k = threadIdx.x; k < cols; k += blockDim.x) {
        float sum = 0.0f;
        for (u32 j = 0; j < top_k; j++) {
            u64 pair = t * top_k + j;
            sum = fmaf(weights[pair], load(rows, (u64)index[pair] * cols + k, bf16), sum);
        }
        if (shared) sum = sum + load(shared, t * cols + k, shared_bf16);
        x[t * cols + k] = x[t * cols + k] + sum;
    }
}
