// The whole routed-expert block at decode sizes in one persistent launch: e4m3 rows -> gate, up -> SwiGLU -> quantise by 128 -> down -> bf16.
//
// Bits equal those of the sequence gemm (SwiGLU), quantise_bf16, gemm (down) in gemm.cu and quantise.cu, so either may be chosen at any size;
// tests/gpu/kernels/gemm.cu holds that, and the suite's part "experts, whole blocks" for the backend. At most 64 rows an expert, inner width a multiple of 128, hidden width of 256; more rows end in ERROR_ROWS.
//
// A task is 128 columns of h (256 rows of the packed gate + up: two tiles) or 256 columns of y (two tiles of down) of one expert with all its
// rows. Tasks are drawn from a counter, gate + up before down: what a task of down waits for was drawn by blocks that run, so neither the grid
// nor what else is on the device can hold it up. Weights have a producer thread and a ring of
// their own, and run ahead into down while its rows are still computed elsewhere; rows of x come through the index list by a warp group's
// 16-byte copies, rows of h (in e4m3, already in wgmma's layout) in bulk after the expert's ready counter. The token tile (8, 16, 32, 64)
// follows each expert's own count.

#include "hopper.cuh"

struct BlockArgs {
  const u8* x;         // distinct rows, e4m3 [rows][x_row bytes]
  const float* xs;     // their scales [rows][xs_row]
  const int* gather;   // input row of each pair; null: the pair's own number
  const int* scatter;  // output row of each pair; null: the pair's own number
  const u64* table;    // per group {gate_up, its scales, down, its scales}, as gemm.cu's
  const int* counts;   // rows of each group, at most 64
  const int* offsets;  // first pair of each group
  u8* h;               // scratch [groups][inner / 128][64][128]
  float* hs;           // scratch [groups][inner / 128][64]
  u16* y;              // bf16 rows of hidden columns
  u32* sync;           // [groups + 2], zero before the first launch; every launch leaves zeros
  int* error;
  i64 x_row;
  int xs_row, groups, hidden, inner;
  int pow2;            // scales of h are powers of two (ue8m0)
};
static_assert(sizeof(BlockArgs) == 128, "the host's copy of this struct");

enum { MAX_GROUPS = 512, MAX_ROWS = 64 };

enum {
  CONSUMERS = 512, THREADS = 640, WEIGHT_THREAD = 512, ROW_THREAD = 544, ROW_THREADS = 96,
  STAGES = 4, STAGE = 32768, ROW_BYTES = 65536, MAX_DEPTH = 8,
  AT_ROWS = STAGES * STAGE, AT_H = AT_ROWS + ROW_BYTES, AT_SCALES = AT_H + MAX_ROWS * 128, AT_AMAX = AT_SCALES + MAX_DEPTH * MAX_ROWS * 4, AT_BARRIERS = AT_AMAX + MAX_ROWS * 4,
  W_FULL = 0, W_EMPTY = STAGES, R_FULL = 2 * STAGES, R_EMPTY = R_FULL + MAX_DEPTH, QUEUED = R_EMPTY + MAX_DEPTH, QUEUE = 8,
  AT_QUEUE = AT_BARRIERS + (QUEUED + QUEUE) * 8, AT_DEAD = AT_QUEUE + QUEUE * 4, AT_ACTIVE = AT_DEAD + 16, BYTES = AT_ACTIVE + 16 + MAX_GROUPS * 8,
};
static_assert(BYTES <= 232448, "shared memory of a block");

struct Ring {
  int w, w_phase, r, r_phase, depth, tile;
};
static __device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, 512;" ::: "memory"); }
// byte of (row, column of 128) inside swizzled rows
static __device__ __forceinline__ int swizzled(int row, int k) { return row * 128 + ((((k >> 4) ^ (row & 7)) << 4) | (k & 15)); }
template <int N> static __device__ __forceinline__ void product(float* sum, const BlockArgs& a, u8* memory, Ring& ring, int blocks, const float* scales0, const float* scales1) {
  int warpgroup = threadIdx.x >> 7, lane = threadIdx.x & 31;
  u32 base = shared(memory), bars = base + AT_BARRIERS;
#pragma unroll
  for (int i = 0; i < N / 2; i++) sum[i] = 0.f;
#pragma unroll 1
  for (int block = 0; block < blocks; block++) {
    float s0 = __ldg(scales0 + block), s1 = __ldg(scales1 + block);
    barrier_wait(bars + (R_FULL + ring.r) * 8, ring.r_phase, a.error);
    barrier_wait(bars + (W_FULL + ring.w) * 8, ring.w_phase, a.error);
    fence_shared();
    float part[N / 2];
    hold<N / 2>(part);
    wgmma_fence();
    u64 wd = operand(base + ring.w * STAGE + warpgroup * 8192), xd = operand(base + AT_ROWS + ring.r * ring.tile * 128);
#pragma unroll
    for (int i = 0; i < 4; i++) Wgmma<N>::e4m3(part, wd + i * 2, xd + i * 2, i);
    wgmma_commit();
    const float* s = (const float*)(memory + AT_SCALES) + ring.r * ring.tile + (lane & 3) * 2;
    wgmma_wait<0>();
    hold<N / 2>(part);
    if (lane == 0) barrier_arrive(bars + (W_EMPTY + ring.w) * 8);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      float2 t = *(const float2*)(s + j * 8);
      sum[4 * j] = fmaf(part[4 * j], t.x * s0, sum[4 * j]);
      sum[4 * j + 1] = fmaf(part[4 * j + 1], t.y * s0, sum[4 * j + 1]);
      sum[4 * j + 2] = fmaf(part[4 * j + 2], t.x * s1, sum[4 * j + 2]);
      sum[4 * j + 3] = fmaf(part[4 * j + 3], t.y * s1, sum[4 * j + 3]);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(bars + (R_EMPTY + ring.r) * 8);
    if (++ring.w == STAGES) { ring.w = 0; ring.w_phase ^= 1; }
    if (++ring.r == ring.depth) { ring.r = 0; ring.r_phase ^= 1; }
  }
}

template <int N> static __device__ __forceinline__ void gate_up(const BlockArgs& a, u8* memory, Ring& ring, int group, int rows, int tile) {
  int thread = threadIdx.x, warpgroup = thread >> 7, warp = (thread >> 5) & 3, lane = thread & 31;
  int blocks = a.hidden / 128, inner_blocks = a.inner / 128;
  const float* scales = (const float*)a.table[group * 4 + 1] + (i64)tile * blocks;
  float h[N / 2];
  product<N>(h, a, memory, ring, blocks, scales, scales + (i64)inner_blocks * blocks);
  u32* amax = (u32*)(memory + AT_AMAX);
  int column = warpgroup * 32 + warp * 8 + (lane >> 2);
#pragma unroll
  for (int j = 0; j < N / 8; j++)
#pragma unroll
    for (int q = 0; q < 2; q++) {
      int row = j * 8 + (lane & 3) * 2 + q;
      float v = __uint_as_float(bf16x2(__fmul_rn(silu(h[4 * j + q]), h[4 * j + 2 + q]), 0.f) << 16);
      h[4 * j + q] = v;
      v = fabsf(v);
      v = fmaxf(v, __shfl_xor_sync(~0u, v, 4));
      v = fmaxf(v, __shfl_xor_sync(~0u, v, 8));
      v = fmaxf(v, __shfl_xor_sync(~0u, v, 16));
      if (lane < 4 && row < rows) atomicMax(amax + row, __float_as_uint(v)); // magnitudes order as their bits; a NaN counts for nothing in fmaxf
    }
  consumers_meet();
  u8* staged = memory + AT_H;
#pragma unroll
  for (int j = 0; j < N / 8; j++)
#pragma unroll
    for (int q = 0; q < 2; q++) {
      int row = j * 8 + (lane & 3) * 2 + q;
      float s = quant_scale(__uint_as_float(amax[row]), a.pow2);
      u16 code = 0;
      if (row < rows) asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(code) : "f"(0.f), "f"(__fdiv_rn(h[4 * j + q], s)));
      staged[swizzled(row, column)] = (u8)code;
    }
  consumers_meet();
  int whole = (rows + 7) & ~7;
  i64 block = (i64)group * inner_blocks + tile;
  if (thread < whole * 8) ((uint4*)(a.h + block * MAX_ROWS * 128))[thread] = ((const uint4*)staged)[thread];
  if (thread < MAX_ROWS) {
    if (thread < whole) a.hs[block * MAX_ROWS + thread] = quant_scale(__uint_as_float(amax[thread]), a.pow2);
    amax[thread] = 0;
  }
  fence_all(); // others read these rows by bulk copies
  consumers_meet();
  if (thread == 0) {
    __threadfence();
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.sync + group) : "memory");
  }
}

template <int N> static __device__ __forceinline__ void down(const BlockArgs& a, u8* memory, Ring& ring, int group, int rows, int tile) {
  int warpgroup = threadIdx.x >> 7, warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, blocks = a.inner / 128;
  const float* scales = (const float*)a.table[group * 4 + 3] + (i64)(tile * 2 + (warpgroup >> 1)) * blocks;
  float y[N / 2];
  product<N>(y, a, memory, ring, blocks, scales, scales);
  i64 first = a.offsets[group];
  int column = tile * 256 + warpgroup * 64 + warp * 16 + (lane >> 2) * 2;
#pragma unroll
  for (int j = 0; j < N / 8; j++)
#pragma unroll
    for (int q = 0; q < 2; q++) {
      int row = j * 8 + (lane & 3) * 2 + q;
      if (row >= rows) continue;
      i64 to = a.scatter ? a.scatter[first + row] : first + row;
      *(u32*)(a.y + to * a.hidden + column) = bf16x2(y[4 * j + q], y[4 * j + 2 + q]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) expert_block(const __grid_constant__ BlockArgs a) {
  extern __shared__ __align__(1024) u8 memory[];
  if (a.groups > MAX_GROUPS || a.inner % 128 || a.hidden % 256) {
    if (threadIdx.x == 0) atomicExch(a.error, ERROR_SHAPE);
    return;
  }
  u32 base = shared(memory), bars = base + AT_BARRIERS;
  int thread = threadIdx.x;
  int* active = (int*)(memory + AT_ACTIVE); // count, largest; then {group, rows} of each group that has any
  volatile int *queue = (volatile int*)(memory + AT_QUEUE), *dead = (volatile int*)(memory + AT_DEAD);
  if (thread < MAX_ROWS) ((u32*)(memory + AT_AMAX))[thread] = 0;
  int t0 = 0;
  if (thread == WEIGHT_THREAD) t0 = atomicAdd(a.sync + a.groups, 1);
  if (thread >= CONSUMERS && thread < CONSUMERS + 32) {
    int lane = thread & 31, count = 0, most = 0;
    for (int g0 = 0; g0 < a.groups; g0 += 32) {
      int rows = g0 + lane < a.groups ? a.counts[g0 + lane] : 0;
      if (rows > MAX_ROWS) { atomicExch(a.error, ERROR_ROWS); rows = MAX_ROWS; }
      u32 has = __ballot_sync(~0u, rows > 0);
      if (rows > 0) {
        int at = count + __popc(has & ((1u << lane) - 1));
        active[4 + 2 * at] = g0 + lane;
        active[5 + 2 * at] = rows;
      }
      count += __popc(has);
      most = max(most, (int)__reduce_max_sync(~0u, rows));
    }
    if (lane == 0) { active[0] = count; active[1] = most; *dead = 0; }
  }
  if (thread == ROW_THREAD) {
    for (int i = 0; i < STAGES; i++) { barrier_init(bars + (W_FULL + i) * 8, 1); barrier_init(bars + (W_EMPTY + i) * 8, CONSUMERS / 32); }
    for (int i = 0; i < MAX_DEPTH; i++) { barrier_init(bars + (R_FULL + i) * 8, ROW_THREADS); barrier_init(bars + (R_EMPTY + i) * 8, CONSUMERS / 32); }
    for (int i = 0; i < QUEUE; i++) barrier_init(bars + (QUEUED + i) * 8, 1);
    barriers_made();
  }
  __syncthreads();
  int most = active[1], tile = most <= 8 ? 8 : most <= 16 ? 16 : most <= 32 ? 32 : 64, depth = min((int)MAX_DEPTH, ROW_BYTES / (tile * 128));
  int up_blocks = a.hidden / 128, down_blocks = a.inner / 128;
  int up_tiles = a.inner / 128, down_tiles = a.hidden / 256;
  int ups = active[0] * up_tiles, total = ups + active[0] * down_tiles;
  if (thread >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (thread == WEIGHT_THREAD) { // draws the tasks and hands them on
      int stage = 0, phase = 1, t = t0;
      for (int i = 0;; i++) {
        // At most four stages, so at most four tasks of one stage, are ahead of the consumers: eight places are never overrun.
        queue[i & (QUEUE - 1)] = t;
        barrier_arrive(bars + (QUEUED + (i & (QUEUE - 1))) * 8);
        if (t >= total) break;
        bool up = t < ups;
        int u = up ? t : t - ups, tiles = up ? up_tiles : down_tiles, group = active[4 + 2 * (u / tiles)], blocks = up ? up_blocks : down_blocks, next = 0;
        const u8* w = (const u8*)a.table[group * 4 + (up ? 0 : 2)] + (i64)(u % tiles) * 2 * blocks * 16384; // two tiles of 128 rows
        for (int block = 0; block < blocks; block++) {
          u32 full = bars + (W_FULL + stage) * 8;
          barrier_wait(bars + (W_EMPTY + stage) * 8, phase, a.error);
          barrier_expect(full, STAGE);
          bulk_copy(base + stage * STAGE, w + (i64)block * 16384, 16384, full);
          bulk_copy(base + stage * STAGE + 16384, w + (i64)(blocks + block) * 16384, 16384, full);
          if (block == blocks - 1) next = atomicAdd(a.sync + a.groups, 1);
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
        t = next;
      }
    } else if (thread >= ROW_THREAD) {
      int me = thread - ROW_THREAD, chunk = me & 7, stage = 0, phase = 1;
      for (int i = 0;; i++) {
        if (!barrier_wait(bars + (QUEUED + (i & (QUEUE - 1))) * 8, (i / QUEUE) & 1, a.error)) break;
        int t = queue[i & (QUEUE - 1)];
        if (t >= total) break;
        if (t < ups) {
          int q = t / up_tiles, group = active[4 + 2 * q], rows = active[5 + 2 * q], whole = (rows + 7) & ~7;
          i64 first = a.offsets[group];
          const u8* from[6];
#pragma unroll
          for (int k = 0; k < 6; k++) {
            int row = (me >> 3) + k * 12;
            from[k] = row < rows ? a.x + (a.gather ? a.gather[first + row] : first + row) * a.x_row + chunk * 16 : nullptr;
          }
          const float* scales = me < rows ? a.xs + (a.gather ? a.gather[first + me] : first + me) * (i64)a.xs_row : nullptr;
          for (int block = 0; block < up_blocks; block++) {
            u32 full = bars + (R_FULL + stage) * 8;
            barrier_wait(bars + (R_EMPTY + stage) * 8, phase, a.error);
#pragma unroll
            for (int k = 0; k < 6; k++) {
              int row = (me >> 3) + k * 12;
              if (row < whole) copy16(base + AT_ROWS + stage * tile * 128 + row * 128 + ((chunk ^ (row & 7)) << 4), from[k] ? from[k] + block * 128 : a.x, from[k] ? 16 : 0);
            }
            if (me < whole) copy4(base + AT_SCALES + (stage * tile + me) * 4, scales ? scales + block : a.xs, scales ? 4 : 0);
            barrier_arrive_after_copies(full);
            if (++stage == depth) { stage = 0; phase ^= 1; }
          }
        } else {
          int q = (t - ups) / down_tiles, group = active[4 + 2 * q], whole = (active[5 + 2 * q] + 7) & ~7;
          const u8* h = a.h + (i64)group * down_blocks * MAX_ROWS * 128;
          const float* hs = a.hs + (i64)group * down_blocks * MAX_ROWS;
          if (me == 0) { // the expert's h is complete when all its tiles have arrived
            u64 start = now();
            for (;;) {
              u32 ready;
              asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ready) : "l"(a.sync + group) : "memory");
              if (ready >= (u32)up_tiles) break;
              if (!may_wait(start, a.error)) break;
            }
            fence_all();
          }
          for (int block = 0; block < down_blocks; block++) {
            u32 full = bars + (R_FULL + stage) * 8;
            barrier_wait(bars + (R_EMPTY + stage) * 8, phase, a.error);
            if (me == 0) {
              barrier_expect(full, whole * 132);
              bulk_copy(base + AT_ROWS + stage * tile * 128, h + (i64)block * MAX_ROWS * 128, whole * 128, full);
              bulk_copy(base + AT_SCALES + stage * tile * 4, hs + block * MAX_ROWS, whole * 4, full);
            } else {
              barrier_arrive(full);
            }
            if (++stage == depth) { stage = 0; phase ^= 1; }
          }
        }
      }
      copies_landed();
    }
  } else { // 4 x 104 + 56 <= 5 x 96 registers
    asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
    Ring ring = {0, 0, 0, 0, depth, tile};
    for (int i = 0;; i++) {
      if (!barrier_wait(bars + (QUEUED + (i & (QUEUE - 1))) * 8, (i / QUEUE) & 1, a.error)) *dead = i + 1;
      int t = queue[i & (QUEUE - 1)];
      consumers_meet(); // if a wait ran out, all of them end before the same task
      int ended = *dead;
      if ((ended && ended <= i + 1) || t >= total) break;
      if (t < ups) {
        int q = t / up_tiles, group = active[4 + 2 * q], rows = active[5 + 2 * q];
        if (rows <= 8) gate_up<8>(a, memory, ring, group, rows, t % up_tiles);
        else if (rows <= 16) gate_up<16>(a, memory, ring, group, rows, t % up_tiles);
        else if (rows <= 32) gate_up<32>(a, memory, ring, group, rows, t % up_tiles);
        else gate_up<64>(a, memory, ring, group, rows, t % up_tiles);
      } else {
        int u = t - ups, q = u / down_tiles, group = active[4 + 2 * q], rows = active[5 + 2 * q];
        if (rows <= 8) down<8>(a, memory, ring, group, rows, u % down_tiles);
        else if (rows <= 16) down<16>(a, memory, ring, group, rows, u % down_tiles);
        else if (rows <= 32) down<32>(a, memory, ring, group, rows, u % down_tiles);
        else down<64>(a, memory, ring, group, rows, u % down_tiles);
      }
    }
    if (thread == 0) { // the last block leaves the counters as it found them
      __threadfence();
      if (atomicAdd(a.sync + a.groups + 1, 1) == gridDim.x - 1) {
        for (int i = 0; i < a.groups + 2; i++) a.sync[i] = 0;
        __threadfence();
      }
    }
  }
}
