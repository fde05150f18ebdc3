// RMSNorm of rows (squares in the 16-lane order), and what rotates: the cached row and the query.
#include "numerics.cuh"
#include "cache.cuh"

// 1 / sqrt(mean of squares + eps) of a row, in every thread of the block; called by all of them.
__device__ __forceinline__ float inverse_rms(const u8 *x, u64 first, u32 bf16, u32 cols, float eps) {
    __shared__ float inverse;
    if (threadIdx.x < 32u) {
        float lane = 0.0f;
        if (threadIdx.x < LANES) {
            u32 padded = (cols + LANES - 1u) / LANES * LANES;
#pragma unroll 8
            for (u32 i = threadIdx.x; i < padded; i += LANES) {
                float value = i < cols ? load(x, first + i, bf16) : 0.0f;
                lane = fmaf(value, value, lane);
            }
        }
        lane = tree16(lane);
        if (threadIdx.x == 0u) inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(lane, (float)cols) + eps));
    }
    __syncthreads();
    return inverse;
}

// y = (x * inverse_rms) * weight, rounded once. One thread block a row.
extern "C" __global__ void rms_norm(
    const u8 *x, u32 x_bf16, const float *weight, float eps, u32 cols, u8 *y, u32 y_bf16
) {
    u64 first = (u64)blockIdx.x * cols;
    float inverse = inverse_rms(x, first, x_bf16, cols, eps);
    for (u32 k = threadIdx.x; k < cols; k += blockDim.x)
        store(y, first + k, (load(x, first + k, x_bf16) * inverse) * weight[k], y_bf16);
}

// The cached row [c | k_pe] of kv_a at each row's place: c normalised, k_pe rotated (pairs 2i, 2i+1), both rounded
// to the cached type. places[t] is page * 64 + slot; angles: cos and sin by position and pair.
extern "C" __global__ void kv_append(
    const u8 *kv_a, u32 bf16, const float *weight, float eps, u32 kv_lora, u32 rope, const u32 *positions,
    const u32 *places, const float2 *angles, u8 *layer, u32 tiled
) {
    u64 row = blockIdx.x;
    Cached cache = {layer, kv_lora, rope, bf16, tiled};
    u32 width = kv_lora + rope;
    u64 first = row * width;
    float inverse = inverse_rms(kv_a, first, bf16, kv_lora, eps);
    const float2 *table = angles + (u64)positions[row] * (rope / 2u);
    for (u32 k = threadIdx.x; k < width; k += blockDim.x) {
        float value;
        if (k < kv_lora) {
            value = (load(kv_a, first + k, bf16) * inverse) * weight[k];
        } else {
            u32 pair = (k - kv_lora) / 2u;
            float2 angle = table[pair];
            float a = load(kv_a, first + kv_lora + 2u * pair, bf16), b = load(kv_a, first + kv_lora + 2u * pair + 1u, bf16);
            value = (k - kv_lora) % 2u == 0u ? fmaf(a, angle.x, -(b * angle.y)) : fmaf(a, angle.y, b * angle.x);
        }
        store(layer, cache.at(places[row], k), value, bf16);
    }
}

// Rotates q_pe of every row and head in place, rounded once.
extern "C" __global__ void rope_query(
    u8 *q, u32 bf16, u32 heads, u32 nope, u32 rope, const u32 *positions, const float2 *angles
) {
    u64 row = blockIdx.x;
    u32 pairs = rope / 2u;
    const float2 *table = angles + (u64)positions[row] * pairs;
    for (u32 i = threadIdx.x; i < heads * pairs; i += blockDim.x) {
        u64 at = (row * heads + i / pairs) * (nope + rope) + nope + 2u * (i % pairs);
        float2 angle = table[i % pairs];
        float a = load(q, at, bf16), b = load(q, at + 1u, bf16);
        store(q, at, fmaf(a, angle.x, -(b * angle.y)), bf16);
        store(q, at + 1u, fmaf(a, angle.y, b * angle.x), bf16);
    }
}
