// Where an element of the latent cache lies. A place is page * 64 + slot.
//
// Plain: rows [place, kv_lora + rope] of the class's cached type. Tiled (BF16 only, for the attention on tensor cores):
// a page is sub-tiles of 64 rows by 64 columns, each in the 128-byte swizzle; the latent columns first, k_pe in the
// last one, whose columns from rope on stay zero.
#pragma once

struct Cached {
    const u8 *layer;
    u32 kv_lora, rope, bf16, tiled;

    __device__ __forceinline__ u64 at(u32 place, u32 column) const {
        if (!tiled) return (u64)place * (kv_lora + rope) + column;
        u32 latent_tiles = (kv_lora + 63u) / 64u;
        if (column >= kv_lora) column = latent_tiles * 64u + (column - kv_lora);
        u32 slot = place % KEYS, within = column % 64u;
        return (u64)(place / KEYS) * (latent_tiles + 1u) * 4096u + column / 64u * 4096u + slot * 64u
            + (within / 8u ^ slot % 8u) * 8u + within % 8u;
    }
    __device__ __forceinline__ float value(u32 place, u32 column) const { return load(layer, at(place, column), bf16); }
};
