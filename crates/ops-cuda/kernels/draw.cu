// Random weights by position: cadre_numerics::draw.
#include "numerics.cuh"

__device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// Elements first .. first + count of a tensor, rounded to `width` bytes each: F32, BF16 or e4m3.
extern "C" __global__ void __launch_bounds__(256) draw(
    u64 key, u64 first, u64 count, float factor, u32 width, u8 *out
) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        u64 word = mix(key + (first + i + 1ull) * 0x9e3779b97f4a7c15ull);
        u32 low = (u32)word, high = (u32)(word >> 32);
        u32 sum = (low & 0xffffu) + (low >> 16) + (high & 0xffffu) + (high >> 16);
        float value = (float)((int)sum - 2 * 0xffff) * factor;
        if (width == 4u) ((float *)out)[i] = value;
        else if (width == 2u) ((u16 *)out)[i] = bf16_encode(value);
        else out[i] = e4m3_encode(value);
    }
}
