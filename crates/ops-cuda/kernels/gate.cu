// The choice of experts from rows of logits, as cadre_ops::gate::Chooser makes it.
#include "numerics.cuh"

#define THREADS 128
#define NONE 0xffffffffu

// The candidate with the larger value; of equal ones the lower id. NONE loses; NaN never gets here.
__device__ __forceinline__ void better(float &value, u32 &id, float other, u32 other_id) {
    if (other_id == NONE) return;
    if (id == NONE || other > value || (other == value && other_id < id)) {
        value = other;
        id = other_id;
    }
}

// The id of the best of `count` values that are not NaN, or NONE; in every thread. Lowest ids win ties.
__device__ __forceinline__ u32 largest(const float *values, u32 count) {
    __shared__ float value_of[THREADS / 32];
    __shared__ u32 id_of[THREADS / 32];
    float value = 0.0f;
    u32 id = NONE;
    for (u32 i = threadIdx.x; i < count; i += THREADS)
        if (!is_nan(values[i])) better(value, id, values[i], i);
    for (int step = 16; step > 0; step >>= 1) {
        float other = __shfl_xor_sync(FULL_WARP, value, step);
        u32 other_id = __shfl_xor_sync(FULL_WARP, id, step);
        better(value, id, other, other_id);
    }
    __syncthreads(); // the last call's results have been read
    if (threadIdx.x % 32u == 0u) {
        value_of[threadIdx.x / 32u] = value;
        id_of[threadIdx.x / 32u] = id;
    }
    __syncthreads();
    value = value_of[0];
    id = id_of[0];
    for (u32 w = 1; w < THREADS / 32; w++) better(value, id, value_of[w], id_of[w]);
    return id;
}

// exp(logit - largest) / sum in place, the sum in the 16-lane order; infinite logits share everything among them.
__device__ __forceinline__ void softmax_scores(float *scores, u32 experts) {
    __shared__ float total;
    u32 best = largest(scores, experts);
    float top = best == NONE ? -infinity() : scores[best];
    __syncthreads();
    for (u32 e = threadIdx.x; e < experts; e += THREADS)
        scores[e] = exp_f32(scores[e] == top ? 0.0f : scores[e] - top);
    __syncthreads();
    if (threadIdx.x < 32u) {
        float lane = 0.0f;
        if (threadIdx.x < LANES)
            for (u32 e = threadIdx.x; e < experts; e += LANES) lane = lane + scores[e];
        lane = tree16(lane);
        if (threadIdx.x == 0u) total = lane;
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < experts; e += THREADS) scores[e] = __fdiv_rn(scores[e], total);
    __syncthreads();
}

// topk_idx ascending by id within a row, topk_weights beside it; nan[row] is the lowest expert whose logit is NaN, or
// NONE. Shared memory: experts + experts + groups F32 and top_k ids.
extern "C" __global__ void __launch_bounds__(THREADS) choose(
    const float *logits, const float *bias, u32 experts, u32 groups, u32 topk_group, u32 top_k, u32 normalise,
    float factor, u32 softmax, u32 group_by_largest, u16 *topk_idx, float *topk_weights, u32 *nan
) {
    extern __shared__ float shared[];
    float *scores = shared, *selection = scores + experts, *group_scores = selection + experts;
    u32 *chosen = (u32 *)(group_scores + groups);
    __shared__ u32 first_nan;
    u64 row = blockIdx.x;
    if (threadIdx.x == 0u) first_nan = NONE;
    __syncthreads();
    for (u32 e = threadIdx.x; e < experts; e += THREADS) {
        float logit = logits[row * experts + e];
        scores[e] = softmax ? logit : sigmoid(logit);
        if (is_nan(logit)) atomicMin(&first_nan, e);
    }
    __syncthreads();
    if (softmax && first_nan == NONE) softmax_scores(scores, experts);
    for (u32 e = threadIdx.x; e < experts; e += THREADS) selection[e] = scores[e] + bias[e];
    __syncthreads();
    if (threadIdx.x == 0u) nan[row] = first_nan;
    if (first_nan != NONE) {
        for (u32 j = threadIdx.x; j < top_k; j += THREADS) {
            topk_idx[row * top_k + j] = (u16)j;
            topk_weights[row * top_k + j] = 0.0f;
        }
        return;
    }
    u32 size = experts / groups;
    if (topk_group < groups) {
        for (u32 g = threadIdx.x; g < groups; g += THREADS) {
            const float *group = selection + g * size;
            float one = -infinity(), two = -infinity();
            for (u32 i = 0; i < size; i++) {
                float value = group[i];
                if (value > one) {
                    two = one;
                    one = value;
                } else if (value > two) {
                    two = value;
                }
            }
            group_scores[g] = size == 1u ? group[0] : group_by_largest ? one : one + two;
        }
        __syncthreads();
        // A group that is kept becomes NaN; what is not NaN after topk_group rounds is left out.
        for (u32 i = 0; i < topk_group; i++) {
            u32 best = largest(group_scores, groups);
            if (threadIdx.x == 0u && best != NONE) group_scores[best] = f32_of(0x7fc00000u);
            __syncthreads();
        }
        for (u32 e = threadIdx.x; e < experts; e += THREADS)
            if (!is_nan(group_scores[e / size])) selection[e] = f32_of(0x7fc00000u);
        __syncthreads();
    }
    for (u32 j = 0; j < top_k; j++) {
        u32 best = largest(selection, experts);
        if (threadIdx.x == 0u) {
            // Insertion keeps the ids ascending.
            u32 at = j;
            for (; at > 0u && chosen[at - 1u] > best; at--) chosen[at] = chosen[at - 1u];
            chosen[at] = best;
            if (best != NONE) selection[best] = f32_of(0x7fc00000u);
        }
        __syncthreads();
    }
    if (threadIdx.x == 0u) {
        float sum = 0.0f;
        for (u32 j = 0; j < top_k; j++) sum = sum + scores[chosen[j]];
        sum = sum + 1e-20f;
        for (u32 j = 0; j < top_k; j++) {
            float score = scores[chosen[j]];
            topk_idx[row * top_k + j] = (u16)chosen[j];
            topk_weights[row * top_k + j] = (normalise ? __fdiv_rn(score, sum) : score) * factor;
        }
    }
}
