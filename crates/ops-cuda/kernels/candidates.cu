// Drawn tokens: what the sampler's short half (cadre_sampler::draw_from) needs of a row of logits. Bans and penalties
// are applied in place; weights are the integers of cadre_sampler::total_weight, so that no order of their sum shows.
#include "numerics.cuh"

#define THREADS 1024
#define WARPS (THREADS / 32)
#define NONE 0xffffffffu
#define WANTS_TOTAL 1u
#define WANTS_RAW_TOTAL 2u

// A request, as cadre_ops_cuda::backend::sample::Ask lays it out.
struct Ask {
    u32 row, candidates;
    float temperature, repetition, frequency, presence;
    u32 flags;
    // Places among the words behind the requests.
    u32 banned, banned_count, changes, changes_count;
};

// What is said of it; candidates follow in a list of their own.
struct Said {
    // Largest logit, and the lowest id that is NaN or plus infinity (or NONE) with its logit: before bans and
    // penalties, and after.
    u32 raw_largest, raw_bad, raw_bad_logit, largest, bad, bad_logit;
    // Candidates listed, and logits above minus infinity.
    u32 listed, possible;
    // Weight of the row at the temperature, and of the raw row at temperature 1.
    u64 total, raw_total;
};

// weight() of crates/sampler/src/weight.rs: e^d * 2^40 to the nearest integer, d <= 0, in F64 without a fused step.
__device__ __forceinline__ u64 weight(double distance) {
    double d = distance > -29.0 ? distance : -29.0;
    const double magic = 6755399441055744.0;
    double shifted = d * 1.4426950408889634 + magic;
    double n = shifted - magic;
    double r = (d - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
    double p = 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    u64 exponent = ((u64)__double_as_longlong(shifted) + 40ull) << 52;
    double scaled = __longlong_as_double((i64)((u64)__double_as_longlong(p) + exponent));
    return (u64)__double_as_longlong(scaled + 4503599627370496.0) & ((1ull << 52) - 1ull);
}

// Ascends with the logit; the two zeros are one.
__device__ __forceinline__ u32 key_of(float logit) {
    u32 bits = bits_of(logit == 0.0f ? 0.0f : logit);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The sum over the block, in every thread.
__device__ __forceinline__ u64 block_sum(u64 value, u64 *shared) {
    for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(FULL_WARP, value, step);
    __syncthreads(); // the last call's results have been read
    if (threadIdx.x % 32u == 0u) shared[threadIdx.x / 32u] = value;
    __syncthreads();
    value = shared[0];
    for (u32 w = 1; w < WARPS; w++) value += shared[w];
    return value;
}

// The largest logit and the lowest id that is NaN or plus infinity, in every thread.
__device__ __forceinline__ void look(const float *row, u32 vocabulary, u64 *shared, float &largest, u32 &bad) {
    float value = -infinity();
    u32 first = NONE;
    for (u32 i = threadIdx.x; i < vocabulary; i += THREADS) {
        float logit = row[i];
        if (!(logit < infinity())) first = min(first, i);
        if (logit > value) value = logit;
    }
    for (int step = 16; step > 0; step >>= 1) {
        float other = __shfl_xor_sync(FULL_WARP, value, step);
        value = other > value ? other : value;
        first = min(first, __shfl_xor_sync(FULL_WARP, first, step));
    }
    __syncthreads();
    if (threadIdx.x % 32u == 0u) shared[threadIdx.x / 32u] = (u64)bits_of(value) << 32 | first;
    __syncthreads();
    largest = -infinity();
    bad = NONE;
    for (u32 w = 0; w < WARPS; w++) {
        float other = f32_of((u32)(shared[w] >> 32));
        largest = other > largest ? other : largest;
        bad = min(bad, (u32)shared[w]);
    }
}

__device__ __forceinline__ u64 total(const float *row, u32 vocabulary, float largest, float temperature, u64 *shared) {
    double inverse = __ddiv_rn(1.0, (double)temperature);
    u64 sum = 0ull;
    for (u32 i = threadIdx.x; i < vocabulary; i += THREADS) sum += weight(((double)row[i] - (double)largest) * inverse);
    return block_sum(sum, shared);
}

// One block per request: tokens and logits of the `candidates` most preferred (fewer if fewer are possible), in any
// order; of equal logits the lowest ids.
extern "C" __global__ void __launch_bounds__(THREADS) candidates_of(
    float *logits, u32 vocabulary, const u32 *words, u32 most, Said *said, uint2 *candidates
) {
    __shared__ u64 shared[WARPS];
    __shared__ u32 histogram[256], chosen[2], listed;
    const Ask ask = ((const Ask *)words)[blockIdx.x];
    float *row = logits + (u64)ask.row * vocabulary;
    uint2 *list = candidates + (u64)blockIdx.x * most;
    Said out = {};
    float largest;
    u32 bad;
    look(row, vocabulary, shared, largest, bad);
    out.raw_largest = bits_of(largest);
    out.raw_bad = bad;
    out.raw_bad_logit = bad == NONE ? 0u : bits_of(row[bad]);
    bool sane = bad == NONE && largest > -infinity();
    if (sane && (ask.flags & WANTS_RAW_TOTAL)) out.raw_total = total(row, vocabulary, largest, 1.0f, shared);
    __syncthreads(); // everybody has read the row as it was
    if (sane && ask.banned_count + ask.changes_count > 0u) {
        for (u32 i = threadIdx.x; i < ask.banned_count; i += THREADS) row[words[ask.banned + i]] = -infinity();
        __syncthreads();
        for (u32 i = threadIdx.x; i < ask.changes_count; i += THREADS) {
            u32 token = words[ask.changes + 2u * i], count = words[ask.changes + 2u * i + 1u];
            float logit = row[token];
            if (ask.repetition != 1.0f) logit = logit > 0.0f ? __fdiv_rn(logit, ask.repetition) : logit * ask.repetition;
            if (count > 0u && (ask.frequency != 0.0f || ask.presence != 0.0f)) {
                logit = logit - ask.frequency * __uint2float_rn(count);
                logit = logit - ask.presence;
            }
            row[token] = logit;
        }
        __syncthreads();
        look(row, vocabulary, shared, largest, bad);
        sane = bad == NONE && largest > -infinity();
    }
    out.largest = bits_of(largest);
    out.bad = bad;
    out.bad_logit = bad == NONE ? 0u : bits_of(row[bad]);
    if (sane) {
        if (ask.flags & WANTS_TOTAL) out.total = total(row, vocabulary, largest, ask.temperature, shared);
        u64 possible = 0ull;
        for (u32 i = threadIdx.x; i < vocabulary; i += THREADS) possible += row[i] > -infinity();
        out.possible = (u32)block_sum(possible, shared);
        u32 wanted = min(min(ask.candidates, most), out.possible);
        // The key of the last candidate, byte by byte: `above` candidates have a larger key.
        u32 prefix = 0u, above = 0u;
        for (int shift = 24; shift >= 0 && wanted > 0u; shift -= 8) {
            if (threadIdx.x < 256u) histogram[threadIdx.x] = 0u;
            __syncthreads();
            for (u32 i = threadIdx.x; i < vocabulary; i += THREADS) {
                u32 key = key_of(row[i]);
                if (row[i] > -infinity() && (shift == 24 || key >> (shift + 8) == prefix >> (shift + 8)))
                    atomicAdd(&histogram[key >> shift & 255u], 1u);
            }
            __syncthreads();
            if (threadIdx.x == 0u) {
                u32 digit = 255u, sum = above;
                while (sum + histogram[digit] < wanted) sum += histogram[digit--];
                chosen[0] = digit;
                chosen[1] = sum;
            }
            __syncthreads();
            prefix |= chosen[0] << shift;
            above = chosen[1];
        }
        if (threadIdx.x == 0u) listed = 0u;
        __syncthreads();
        // Of those with the last key the first ids: chunk by chunk, in order.
        u32 equal = 0u;
        for (u32 first = 0u; first < vocabulary && wanted > 0u; first += THREADS) {
            u32 i = first + threadIdx.x;
            float logit = i < vocabulary ? row[i] : -infinity();
            u32 key = key_of(logit);
            bool possible_here = logit > -infinity();
            if (possible_here && key > prefix) list[atomicAdd(&listed, 1u)] = make_uint2(i, bits_of(logit));
            bool same = possible_here && key == prefix;
            u32 ballot = __ballot_sync(FULL_WARP, same);
            if (threadIdx.x % 32u == 0u) shared[threadIdx.x / 32u] = (u64)__popc(ballot);
            __syncthreads();
            u32 before = equal, all = 0u;
            for (u32 w = 0; w < WARPS; w++) {
                if (w == threadIdx.x / 32u) before += all;
                all += (u32)shared[w];
            }
            before += __popc(ballot & ((1u << (threadIdx.x % 32u)) - 1u));
            if (same && above + before < wanted) list[above + before] = make_uint2(i, bits_of(logit));
            equal += all;
            __syncthreads();
        }
        out.listed = wanted;
    }
    if (threadIdx.x == 0u) said[blockIdx.x] = out;
}
