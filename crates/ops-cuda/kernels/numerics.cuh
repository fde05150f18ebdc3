// docs/numerics.md for the device: the functions of cadre-numerics, operation by operation.
//
// Every file is compiled with -fmad=false, so that a product and a sum stay two roundings unless fmaf is written,
// and without flushing subnormals or approximate division. No header of CUDA or of the system is included: the
// types and intrinsics used are the compiler's own.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

enum : u32 {
    // Elements along a reduction that share one scale, and the length of a block sum (cadre_numerics::BLOCK).
    BLOCK = 128,
    // Lanes of the 16-lane order (cadre_numerics::reduce::LANES).
    LANES = 16,
    // Keys of one softmax block, and tokens of a cache page.
    KEYS = 64,
    FULL_WARP = 0xffffffffu,
};

__device__ __forceinline__ float f32_of(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float infinity() { return f32_of(0x7f800000u); }
__device__ __forceinline__ bool is_nan(float value) { return value != value; }

// bf16::{decode, encode, round}
__device__ __forceinline__ float bf16_decode(u16 code) { return f32_of((u32)code << 16); }
__device__ __forceinline__ u16 bf16_encode(float value) {
    u32 bits = bits_of(value);
    if (is_nan(value)) return (u16)((bits >> 16) | 0x40u);
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// An element of activations or of the cache: BF16 in the classes that round, F32 in class f32. Storing is the
// rounding point.
__device__ __forceinline__ float load(const u8 *values, u64 at, u32 bf16) {
    return bf16 ? bf16_decode(((const u16 *)values)[at]) : ((const float *)values)[at];
}
__device__ __forceinline__ void store(u8 *values, u64 at, float value, u32 bf16) {
    if (bf16) ((u16 *)values)[at] = bf16_encode(value);
    else ((float *)values)[at] = value;
}

// F16 bits to F32, exact.
__device__ __forceinline__ float f16_decode(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// The value of an e4m3 code times 2^-8 (a code's bits in their places of an F16); NaN codes are no input.
__device__ __forceinline__ float e4m3_folded(u32 code) {
    return f16_decode((u16)(((code & 0x80u) << 8) | ((code & 0x7fu) << 7)));
}
// e4m3::decode
__device__ __forceinline__ float e4m3_decode(u32 code) {
    if ((code & 0x7fu) == 0x7fu) return f32_of(0x7fc00000u);
    return e4m3_folded(code) * 256.0f;
}
// e4m3::encode: nearest even, saturating at 448, NaN to NaN.
__device__ __forceinline__ u8 e4m3_encode(float value) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
    return (u8)(pair & 0xffu);
}

// exp::{exp, sigmoid, silu}
__device__ __forceinline__ float exp_f32(float x) {
    const float magic = 12582912.0f;
    float n = (x * f32_of(0x3fb8aa3bu) + magic) - magic;
    float r = fmaf(n, -f32_of(0x3f317218u), x);
    r = fmaf(n, 1.9046542e-9f, r);
    float p = 1.0f / 5040.0f;
    p = fmaf(p, r, 1.0f / 720.0f);
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    float y = f32_of(bits_of(p) + ((u32)(int)n << 23));
    // Beyond its range y is no number of ours; chosen last, so that no thread branches.
    return is_nan(x) ? x : x < -87.0f ? 0.0f : x > 88.0f ? infinity() : y;
}
__device__ __forceinline__ float sigmoid(float x) { return __fdiv_rn(1.0f, 1.0f + exp_f32(-x)); }
__device__ __forceinline__ float silu(float x) { return __fdiv_rn(x, 1.0f + exp_f32(-x)); }

// reduce::tree over 16 neighbouring threads of a warp; the sum is in the first of them. All 32 threads call it.
__device__ __forceinline__ float tree16(float lane) {
    lane += __shfl_down_sync(FULL_WARP, lane, 8, 16);
    lane += __shfl_down_sync(FULL_WARP, lane, 4, 16);
    lane += __shfl_down_sync(FULL_WARP, lane, 2, 16);
    lane += __shfl_down_sync(FULL_WARP, lane, 1, 16);
    return lane;
}

// quant::scale of a block from the largest magnitude of its elements; pow2: rounded up to a power of two (ue8m0).
__device__ __forceinline__ float quant_scale(float amax, u32 pow2) {
    float scale = __fdiv_rn(fmaxf(amax, 1e-4f), 448.0f);
    if (!pow2) return scale;
    u32 bits = bits_of(scale);
    return f32_of((bits + 0x7fffffu) & 0xff800000u);
}

// The largest of a warp; NaN does not count.
__device__ __forceinline__ float warp_max(float value) {
    for (int step = 16; step > 0; step >>= 1) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, step));
    return value;
}
