// What a greedy token needs of a row of logits.
#include "numerics.cuh"

#define THREADS 512
#define NONE 0xffffffffu

// Of row rows[i] of the logits: [bits of the largest, its lowest id, the lowest id whose logit is NaN or plus infinity
// or NONE, that logit's bits]. Comparisons are IEEE's: the two zeros are equal, minus infinity is a number.
extern "C" __global__ void __launch_bounds__(THREADS) largest(
    const float *logits, u32 vocabulary, const u32 *rows, uint4 *found
) {
    __shared__ float value_of[THREADS / 32];
    __shared__ u32 id_of[THREADS / 32], bad_of[THREADS / 32];
    const float *row = logits + (u64)rows[blockIdx.x] * vocabulary;
    float value = -infinity();
    u32 id = 0u, bad = NONE;
    for (u32 i = threadIdx.x; i < vocabulary; i += THREADS) {
        float logit = row[i];
        if (!(logit < infinity())) bad = min(bad, i);
        if (logit > value) {
            value = logit;
            id = i;
        }
    }
    if (value == -infinity()) id = NONE; // so that an empty lane wins no tie
    for (int step = 16; step > 0; step >>= 1) {
        float other = __shfl_xor_sync(FULL_WARP, value, step);
        u32 other_id = __shfl_xor_sync(FULL_WARP, id, step);
        bad = min(bad, __shfl_xor_sync(FULL_WARP, bad, step));
        if (other > value || (other == value && other_id < id)) {
            value = other;
            id = other_id;
        }
    }
    if (threadIdx.x % 32u == 0u) {
        value_of[threadIdx.x / 32u] = value;
        id_of[threadIdx.x / 32u] = id;
        bad_of[threadIdx.x / 32u] = bad;
    }
    __syncthreads();
    if (threadIdx.x != 0u) return;
    for (u32 w = 1; w < THREADS / 32; w++) {
        bad = min(bad, bad_of[w]);
        if (value_of[w] > value || (value_of[w] == value && id_of[w] < id)) {
            value = value_of[w];
            id = id_of[w];
        }
    }
    found[blockIdx.x] = make_uint4(bits_of(value), id, bad, bad == NONE ? 0u : bits_of(row[bad]));
}
