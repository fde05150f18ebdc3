// Packing of matrices at load, on the device: row-major checkpoint order into tiles of 128 rows x 128 bytes of the reduction, 128-byte
// swizzled, as gemm.cu copies and wgmma reads them. Rows and columns beyond the matrix become zeros. Run once per weight; every kernel is
// grid-strided over 16-byte chunks of the output, so any grid is right.
//
// Row r of a tile holds matrix row 16 (r / 16) + 2 (r % 8) + (r % 16) / 8: a thread of wgmma's result then owns two neighbours. In a gate + up
// tile rows with r % 16 < 8 are gate's, the others up's, of column 64 tile + 8 (r / 16) + r % 8.

#include "numerics.cuh"

enum { TILE = 16384 };

struct Chunk {
  i64 tile;        // index over row tiles
  int block, row, k;  // block of the reduction; row in the tile; first byte of the chunk within the block's 128
};
static __device__ __forceinline__ Chunk chunk_at(i64 i, int blocks) {
  Chunk c;
  int in = (int)(i % (TILE / 16));
  i64 tile = i / (TILE / 16);
  c.block = (int)(tile % blocks);
  c.tile = tile / blocks;
  c.row = in >> 3;
  c.k = ((in & 7) ^ (c.row & 7)) * 16;
  return c;
}
static __device__ __forceinline__ int plain_row(int r) { return (r & ~15) + (r & 7) * 2 + ((r >> 3) & 1); }
// 16 bytes of a row of `bytes` bytes from byte `at`, zeros beyond its end; `row` may be null.
static __device__ __forceinline__ uint4 row_bytes(const u8* row, i64 at, i64 bytes) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (row && at + 16 <= bytes && (((size_t)row + at) & 15) == 0) return *(const uint4*)(row + at);
  if (row)
    for (int b = 0; b < 16; b++)
      if (at + b < bytes) {
        u32 byte = (u32)row[at + b] << (8 * (b & 3));
        if (b < 4) v.x |= byte; else if (b < 8) v.y |= byte; else if (b < 12) v.z |= byte; else v.w |= byte;
      }
  return v;
}
#define STRIDED(i, count) for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < (count); i += (i64)gridDim.x * blockDim.x)

// src [n][k] e4m3, rows `src_row` bytes apart.
extern "C" __global__ void __launch_bounds__(256) pack_fp8(const u8* src, i64 src_row, u8* dst, int n, int k) {
  int blocks = (k + 127) / 128;
  STRIDED(i, (i64)((n + 127) / 128) * blocks * (TILE / 16)) {
    Chunk c = chunk_at(i, blocks);
    i64 row = c.tile * 128 + plain_row(c.row);
    ((uint4*)dst)[i] = row_bytes(row < n ? src + row * src_row : nullptr, (i64)c.block * 128 + c.k, k);
  }
}

// src [groups][n][k] bf16, rows `src_row` and groups `src_group` elements apart; with transpose the source is [groups][k][n] (W_UK). Groups of
// dst lie `dst_group` bytes apart.
extern "C" __global__ void __launch_bounds__(256) pack_bf16(const u16* src, i64 src_row, i64 src_group, u8* dst, i64 dst_group, int groups, int n, int k, int transpose) {
  int blocks = (k + 63) / 64;
  i64 each = (i64)((n + 127) / 128) * blocks * (TILE / 16);
  STRIDED(i, each * groups) {
    i64 group = i / each, at = i % each;
    Chunk c = chunk_at(at, blocks);
    i64 row = c.tile * 128 + plain_row(c.row);
    const u16* s = src + group * src_group;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (!transpose) {
      v = row_bytes(row < n ? (const u8*)(s + row * src_row) : nullptr, (i64)c.block * 128 + c.k, (i64)k * 2);
    } else if (row < n) {
      u32 e[8];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        i64 d = (i64)c.block * 64 + c.k / 2 + j;
        e[j] = d < k ? s[d * src_row + row] : 0;
      }
      v = make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16);
    }
    *(uint4*)(dst + group * dst_group + at * 16) = v;
  }
}

static __device__ __forceinline__ void pack_gate_up(const u8* gate, const u8* up, u8* dst, int inner, i64 bytes) {
  int blocks = (int)((bytes + 127) / 128);
  STRIDED(i, (i64)((inner + 63) / 64) * blocks * (TILE / 16)) {
    Chunk c = chunk_at(i, blocks);
    i64 column = c.tile * 64 + (c.row >> 4) * 8 + (c.row & 7);
    const u8* src = (c.row & 8) ? up : gate;
    ((uint4*)dst)[i] = row_bytes(column < inner ? src + column * bytes : nullptr, (i64)c.block * 128 + c.k, bytes);
  }
}
// gate and up [inner][k], contiguous.
extern "C" __global__ void __launch_bounds__(256) pack_gate_up_fp8(const u8* gate, const u8* up, u8* dst, int inner, int k) { pack_gate_up(gate, up, dst, inner, k); }
extern "C" __global__ void __launch_bounds__(256) pack_gate_up_bf16(const u16* gate, const u16* up, u8* dst, int inner, int k) { pack_gate_up((const u8*)gate, (const u8*)up, dst, inner, (i64)k * 2); }

// out = bf16(code * scale), one rounding after an F32 product: kv_b_proj, which attention takes in bf16 in both forms.
extern "C" __global__ void __launch_bounds__(256) dequant_fp8(const u8* codes, const float* scales, u16* out, int n, int k) {
  int blocks = (k + 127) / 128;
  STRIDED(i, (i64)n * k) {
    i64 row = i / k;
    int column = (int)(i % k);
    u32 half2;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(half2) : "h"((u16)codes[i]));
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)half2));
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(0.f), "f"(__fmul_rn(value, scales[(row >> 7) * blocks + (column >> 7)])));
    out[i] = (u16)r;
  }
}

// ue8m0 scale bytes to F32: 2^(byte - 127). 0 is the subnormal 2^-127, 255 is NaN.
extern "C" __global__ void __launch_bounds__(256) scales_ue8m0(const u8* src, float* dst, int count) {
  STRIDED(i, count) dst[i] = src[i] == 255 ? __int_as_float(0x7fffffff) : src[i] ? __int_as_float((int)src[i] << 23) : __int_as_float(0x00400000);
}
