// SwiGLU, and the published activation quantiser (per row and 128 columns) from rows of any width.
#include "numerics.cuh"

// Codes and scales of rows [rows, cols]. One warp a block of 128 columns; grid.x: rows, grid.y: as many blocks
// of warps as the row's blocks need.
extern "C" __global__ void quantise(const u8 *x, u32 bf16, u32 cols, u32 pow2, u8 *codes, float *scales) {
    u64 row = blockIdx.x;
    u32 blocks = (cols + BLOCK - 1u) / BLOCK;
    u32 block = blockIdx.y * (blockDim.x / 32u) + threadIdx.x / 32u, lane = threadIdx.x % 32u;
    if (block >= blocks) return;
    float values[BLOCK / 32];
    float amax = 0.0f;
#pragma unroll
    for (u32 i = 0; i < BLOCK / 32; i++) {
        u32 k = block * BLOCK + i * 32u + lane;
        values[i] = k < cols ? load(x, row * cols + k, bf16) : 0.0f;
        amax = fmaxf(amax, fabsf(values[i]));
    }
    float scale = quant_scale(warp_max(amax), pow2);
    if (lane == 0u) scales[row * blocks + block] = scale;
#pragma unroll
    for (u32 i = 0; i < BLOCK / 32; i++) {
        u32 k = block * BLOCK + i * 32u + lane;
        if (k < cols) codes[row * cols + k] = e4m3_encode(__fdiv_rn(values[i], scale));
    }
}

// a = silu(gate) * up, rounded once. gate_up [rows, stride]: gate from column 0, up from column up_first.
extern "C" __global__ void swiglu(
    const float *gate_up, u32 stride, u32 up_first, u32 inner, u8 *a, u32 bf16
) {
    u64 row = blockIdx.x;
    const float *gate = gate_up + row * stride, *up = gate + up_first;
    for (u32 i = threadIdx.x; i < inner; i += blockDim.x) store(a, row * inner + i, silu(gate[i]) * up[i], bf16);
}
