// The published activation quantiser (docs/numerics.md): per row and 128 columns (the last block may be short) s = max(amax, 1e-4) / 448,
// code = e4m3(x / s), IEEE divisions, nearest even, saturating. One warp a block of 128; bits depend on the block's values alone.
// pow2: the scale is rounded up to a power of two (checkpoints whose scale_fmt is ue8m0).

#include "numerics.cuh"

static __device__ __forceinline__ u32 e4m3x2(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}

template <bool BF16> static __device__ __forceinline__ void quantise(const void* x, i64 x_row, u8* codes, float* scales, const int* rows_on_device, int rows, int cols, int pow2) {
  int blocks = (cols + 127) / 128, lane = threadIdx.x & 31;
  if (rows_on_device) rows = *rows_on_device;
  i64 warps = (i64)gridDim.x * (blockDim.x >> 5);
  for (i64 i = blockIdx.x * (i64)(blockDim.x >> 5) + (threadIdx.x >> 5); i < (i64)rows * blocks; i += warps) {
    i64 row = i / blocks;
    int block = (int)(i % blocks), column = block * 128 + lane * 4;
    float v[4];
    if (column + 4 <= cols) { // cols and x_row are multiples of 4
      if (BF16) {
        uint2 raw = *(const uint2*)((const u16*)x + row * x_row + column);
        v[0] = __uint_as_float(raw.x << 16); v[1] = __uint_as_float(raw.x & 0xffff0000u);
        v[2] = __uint_as_float(raw.y << 16); v[3] = __uint_as_float(raw.y & 0xffff0000u);
      } else {
        float4 raw = *(const float4*)((const float*)x + row * x_row + column);
        v[0] = raw.x; v[1] = raw.y; v[2] = raw.z; v[3] = raw.w;
      }
    } else {
      v[0] = v[1] = v[2] = v[3] = 0.f;
    }
    float amax = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
    float s = quant_scale(amax, pow2);
    if (lane == 0) scales[i] = s;
    if (column + 4 <= cols)
      *(u32*)(codes + row * cols + column) = e4m3x2(__fdiv_rn(v[0], s), __fdiv_rn(v[1], s)) | e4m3x2(__fdiv_rn(v[2], s), __fdiv_rn(v[3], s)) << 16;
  }
}

extern "C" __global__ void __launch_bounds__(256) quantise_bf16(const u16* x, i64 x_row, u8* codes, float* scales, const int* rows_on_device, int rows, int cols, int pow2) {
  quantise<true>(x, x_row, codes, scales, rows_on_device, rows, cols, pow2);
}
extern "C" __global__ void __launch_bounds__(256) quantise_f32(const float* x, i64 x_row, u8* codes, float* scales, const int* rows_on_device, int rows, int cols, int pow2) {
  quantise<false>(x, x_row, codes, scales, rows_on_device, rows, cols, pow2);
}
