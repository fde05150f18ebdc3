// Pages of the latent cache to and from contiguous rows [c | k_pe]. places[i] is the place of row i; `layer` is where
// the layer's pages start.
#include "numerics.cuh"
#include "cache.cuh"

// rows[i] = the cached row, as it is stored (hand-off).
extern "C" __global__ void kv_read(
    const u8 *layer, u32 kv_lora, u32 rope, u32 bf16, u32 tiled, const u32 *places, u8 *rows
) {
    Cached cache = {layer, kv_lora, rope, bf16, tiled};
    u32 width = kv_lora + rope;
    u64 row = blockIdx.x;
    for (u32 k = threadIdx.x; k < width; k += blockDim.x) {
        u64 from = cache.at(places[row], k), to = row * width + k;
        if (bf16) ((u16 *)rows)[to] = ((const u16 *)layer)[from];
        else ((u32 *)rows)[to] = ((const u32 *)layer)[from];
    }
}

// The cached row = rows[i].
extern "C" __global__ void kv_write(
    u8 *layer, u32 kv_lora, u32 rope, u32 bf16, u32 tiled, const u32 *places, const u8 *rows
) {
    Cached cache = {layer, kv_lora, rope, bf16, tiled};
    u32 width = kv_lora + rope;
    u64 row = blockIdx.x;
    for (u32 k = threadIdx.x; k < width; k += blockDim.x) {
        u64 to = cache.at(places[row], k), from = row * width + k;
        if (bf16) ((u16 *)layer)[to] = ((const u16 *)rows)[from];
        else ((u32 *)layer)[to] = ((const u32 *)rows)[from];
    }
}

// rows[i] = the cached row of position first + i of a sequence in F32: what prefill expands.
extern "C" __global__ void kv_gather(
    const u8 *layer, u32 kv_lora, u32 rope, u32 bf16, u32 tiled, const u32 *pages, u32 first, float *rows
) {
    Cached cache = {layer, kv_lora, rope, bf16, tiled};
    u32 position = first + blockIdx.x, width = kv_lora + rope;
    u32 place = pages[position / KEYS] * KEYS + position % KEYS;
    for (u32 k = threadIdx.x; k < width; k += blockDim.x) rows[(u64)blockIdx.x * width + k] = cache.value(place, k);
}
