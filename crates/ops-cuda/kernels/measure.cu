// What every figure stands beside: how fast memory is read.
#include "numerics.cuh"

// Reads `count` x 16 bytes, eight loads of a thread in flight, and keeps nothing (the store is what stops the compiler from leaving them out).
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* from, u64 count, u32* sink) {
  u64 step = (u64)gridDim.x * blockDim.x, at = blockIdx.x * (u64)blockDim.x + threadIdx.x;
  u32 seen = 0;
  for (; at + 7 * step < count; at += 8 * step) {
    uint4 v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = from[at + i * step];
#pragma unroll
    for (int i = 0; i < 8; i++) seen ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  for (; at < count; at += step) seen ^= from[at].x;
  if (seen == 0x9e3779b9u) *sink = seen;
}
