// Attention on CUDA cores, in the order of docs/numerics.md: keys in blocks of 64 from position 0, scores in the
// 16-lane order, one FMA chain over the keys of a block per output element. One thread block a (row, head).
#include "numerics.cuh"
#include "cache.cuh"

#define THREADS 256

// An element of kv_b as stored, row-major [heads * (nope + v), kv_lora]: times 2^-8 if it is e4m3. bytes: 4, 2 or 1.
__device__ __forceinline__ float stored(const u8 *matrix, u32 bytes, u64 at) {
    if (bytes == 4u) return ((const float *)matrix)[at];
    if (bytes == 2u) return bf16_decode(((const u16 *)matrix)[at]);
    return e4m3_folded(matrix[at]);
}

// q_lat[i, head, c] = blocked chain over d of q_nope[d] * kv_b[head * (nope + v) + d, c]; its blocks end where the row
// blocks of kv_b end. Grid: (row of the list, head).
extern "C" __global__ void absorb(
    const u8 *q, u32 q_bf16, const u32 *rows, u32 heads, u32 nope, u32 rope, u32 v, u32 kv_lora, const u8 *kv_b,
    u32 bytes, const float *scales, float *q_lat
) {
    u32 head = blockIdx.y, first = head * (nope + v);
    u64 row = rows[blockIdx.x];
    u64 x = (row * heads + head) * (nope + rope);
    u32 phase = first % BLOCK, scale_cols = (kv_lora + BLOCK - 1u) / BLOCK;
    u32 blocks = nope == 0u ? 0u : (phase + nope + BLOCK - 1u) / BLOCK;
    for (u32 c = threadIdx.x; c < kv_lora; c += blockDim.x) {
        float acc = 0.0f;
        for (u32 block = 0; block < blocks; block++) {
            u32 start = block == 0u ? 0u : block * BLOCK - phase, end = min((block + 1u) * BLOCK - phase, nope);
            float sum = 0.0f;
            for (u32 d = start; d < end; d++)
                sum = fmaf(load(q, x + d, q_bf16), stored(kv_b, bytes, (u64)(first + d) * kv_lora + c), sum);
            float scale = bytes == 1u ? scales[(u64)((first + start) / BLOCK) * scale_cols + c / BLOCK] * 256.0f : 1.0f;
            acc = fmaf(sum, scale, acc);
        }
        q_lat[((u64)blockIdx.x * heads + head) * kv_lora + c] = acc;
    }
}

// Cached rows of a sequence as keys and values.
struct Latent {
    Cached cache;
    const u32 *pages;
    __device__ __forceinline__ u32 place(u32 j) const { return pages[j / KEYS] * KEYS + j % KEYS; }
    __device__ __forceinline__ float key(u32 j, u32 i) const { return cache.value(place(j), i); }
    __device__ __forceinline__ float value(u32 j, u32 d) const { return cache.value(place(j), d); }
};

// Keys and values expanded from contiguous latents [c | k_pe]: `expanded` [positions, stride] with this head's
// [k_nope | v] at its start.
struct Expanded {
    const float *latent, *expanded;
    u32 kv_lora, width, nope, stride;
    __device__ __forceinline__ float key(u32 j, u32 i) const {
        return i < nope ? expanded[(u64)j * stride + i] : latent[(u64)j * width + kv_lora + (i - nope)];
    }
    __device__ __forceinline__ float value(u32 j, u32 d) const { return expanded[(u64)j * stride + nope + d]; }
};

// o[0 .. out_width] of one query of q_width elements over keys 0 .. keys. `shared` holds q, o and 64 probabilities;
// q is there already.
template <class Keys>
__device__ __forceinline__ void attend(
    const Keys &source, float softmax_scale, u32 keys, u32 q_width, u32 out_width, float *shared, u8 *out,
    u64 out_at, u32 out_bf16
) {
    float *q = shared, *o = q + q_width, *p = o + out_width;
    __shared__ float alpha_of_block, inverse;
    u32 padded = (q_width + LANES - 1u) / LANES * LANES, lane = threadIdx.x % LANES;
    for (u32 d = threadIdx.x; d < out_width; d += THREADS) o[d] = 0.0f;
    float max = -infinity(), total = 0.0f; // of warp 0
    for (u32 first = 0; first < keys; first += KEYS) {
        u32 count = min((u32)KEYS, keys - first);
        __syncthreads();
        for (u32 j = threadIdx.x / LANES; j < KEYS; j += THREADS / LANES) {
            float sum = 0.0f;
            if (j < count)
                for (u32 i = lane; i < padded; i += LANES)
                    sum = fmaf(i < q_width ? q[i] : 0.0f, i < q_width ? source.key(first + j, i) : 0.0f, sum);
            sum = tree16(sum);
            if (lane == 0u && j < count) p[j] = sum * softmax_scale;
        }
        __syncthreads();
        if (threadIdx.x < 32u) {
            u32 j0 = threadIdx.x, j1 = threadIdx.x + 32u;
            float s0 = j0 < count ? p[j0] : -infinity(), s1 = j1 < count ? p[j1] : -infinity();
            float block_max = fmaxf(max, warp_max(fmaxf(s0, s1)));
            float alpha = exp_f32(max - block_max);
            if (j0 < count) p[j0] = exp_f32(s0 - block_max);
            if (j1 < count) p[j1] = exp_f32(s1 - block_max);
            __syncwarp();
            float sum = 0.0f;
            if (threadIdx.x < LANES)
                for (u32 j = threadIdx.x; j < count; j += LANES) sum = sum + p[j];
            sum = tree16(sum);
            total = fmaf(total, alpha, sum);
            max = block_max;
            if (threadIdx.x == 0u) alpha_of_block = alpha;
        }
        __syncthreads();
        float alpha = alpha_of_block;
        for (u32 d = threadIdx.x; d < out_width; d += THREADS) {
            float sum = 0.0f;
#pragma unroll 4
            for (u32 j = 0; j < count; j++) sum = fmaf(p[j], source.value(first + j, d), sum);
            o[d] = fmaf(o[d], alpha, sum);
        }
    }
    if (threadIdx.x == 0u) inverse = __fdiv_rn(1.0f, total);
    __syncthreads();
    for (u32 d = threadIdx.x; d < out_width; d += THREADS) store(out, out_at + d, o[d] * inverse, out_bf16);
}

// The absorbed form: the normalised latent output of every row of the list and head, not rounded. positions and
// tables (first entry in `pages`) by row of the step. Grid: (row of the list, head).
extern "C" __global__ void __launch_bounds__(THREADS) attend_latent(
    const u8 *q, u32 q_bf16, const float *q_lat, const u32 *rows, const u32 *positions, const u32 *tables,
    const u32 *pages, u32 heads, u32 nope, u32 rope, u32 kv_lora, float softmax_scale, const u8 *layer, u32 bf16,
    u32 tiled, float *latent
) {
    extern __shared__ float shared[];
    u32 i = blockIdx.x, head = blockIdx.y;
    u64 row = rows[i], at = (u64)i * heads + head;
    for (u32 k = threadIdx.x; k < kv_lora + rope; k += THREADS)
        shared[k] = k < kv_lora ? q_lat[at * kv_lora + k]
                                : load(q, (row * heads + head) * (nope + rope) + nope + (k - kv_lora), q_bf16);
    Latent source = {{layer, kv_lora, rope, bf16, tiled}, pages + tables[row]};
    attend(
        source, softmax_scale, positions[row] + 1u, kv_lora + rope, kv_lora, shared, (u8 *)latent, at * kv_lora, 0u
    );
}

// The naive form for rows first_row .. of one segment and heads first_head .. of it: expanded holds [k_nope | v] of
// those heads for all positions. Grid: (row of the segment, head of the group).
extern "C" __global__ void __launch_bounds__(THREADS) attend_expanded(
    const u8 *q, u32 bf16, u32 first_row, u32 first_position, u32 first_head, u32 heads, u32 nope, u32 rope, u32 v,
    u32 kv_lora, float softmax_scale, const float *latent, const float *expanded, u32 stride, u8 *out
) {
    extern __shared__ float shared[];
    u64 row = first_row + blockIdx.x;
    u32 head = first_head + blockIdx.y, width = nope + rope;
    for (u32 k = threadIdx.x; k < width; k += THREADS) shared[k] = load(q, (row * heads + head) * width + k, bf16);
    Expanded source = {latent, expanded + (u64)blockIdx.y * (nope + v), kv_lora, kv_lora + rope, nope, stride};
    attend(
        source, softmax_scale, first_position + blockIdx.x + 1u, width, v, shared, out, (row * heads + head) * v, bf16
    );
}

// The latent output through the value rows of kv_b (packed as in product.cu): a blocked chain, rounded once.
// Grid: (row of the list, head); one thread an output.
extern "C" __global__ void value_up(
    const float *latent, const u32 *rows, u32 heads, u32 nope, u32 v, u32 kv_lora, const u32 *words, u32 bytes,
    const float *scales, u8 *out, u32 bf16
) {
    u32 head = blockIdx.y, per_word = 4u / bytes;
    u64 at = (u64)blockIdx.x * heads + head, row = rows[blockIdx.x];
    const float *x = latent + at * kv_lora;
    u32 blocks = (kv_lora + BLOCK - 1u) / BLOCK;
    u64 words_of_row = (kv_lora + per_word - 1u) / per_word;
    for (u32 d = threadIdx.x; d < v; d += blockDim.x) {
        u64 n = (u64)head * (nope + v) + nope + d;
        const u32 *column = words + n / BLOCK * words_of_row * BLOCK + n % BLOCK;
        float acc = 0.0f;
        for (u32 block = 0; block < blocks; block++) {
            float sum = 0.0f;
            u32 end = min((block + 1u) * BLOCK, kv_lora);
            for (u32 c = block * BLOCK; c < end; c++) {
                u32 word = column[(u64)(c / per_word) * BLOCK];
                float weight = bytes == 4u   ? f32_of(word)
                               : bytes == 2u ? bf16_decode((u16)(word >> (16u * (c % 2u))))
                                             : e4m3_folded(word >> (8u * (c % 4u)) & 0xffu);
                sum = fmaf(x[c], weight, sum);
            }
            acc = fmaf(sum, bytes == 1u ? scales[n / BLOCK * blocks + block] * 256.0f : 1.0f, acc);
        }
        store(out, (row * heads + head) * v + d, acc, bf16);
    }
}
