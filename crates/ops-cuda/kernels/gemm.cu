// Matrix products of every kind: y = x W^T with e4m3 weights and quantised rows, or with bf16 weights and rows.
//
// Numerics (docs/numerics.md, class of Hopper GPUs). e4m3: k in blocks of 128; a block is four wgmma of k = 32 in ascending order from
// zero; acc = fma(block, s_x * s_w, acc) in F32, acc from +0. bf16: one chain of wgmma with k = 16 in ascending order into F32. Every output
// element depends on its row, its column of weights and the shape alone: tiles, grid, neighbours and the choice of entry point do not
// take part, because a wgmma's element does not depend on N, and k is never split. tests/gpu/kernels/gemm.cu holds that.
//
// Weights are operand A, in tiles of 128 rows x 128 bytes that pack.cu laid out as wgmma reads them (one 1-D bulk copy a stage). Rows of x
// are operand B and stay row-major in memory: the producer's threads copy 16 bytes each into the swizzled stage, through an index list
// where one is given, with zeros for columns beyond the edge. Groups (experts, heads, or one) come with their counts on the device; the grid
// is persistent and its size is free.
//
// Block: two consumer warpgroups of 64 weight rows each (one in the entry points of half tiles), then one producer warpgroup. Rows within
// 16 of a tile are permuted at packing so that a thread holds two adjacent output columns (or, for gate + up, gate and up of one column).

#include "hopper.cuh"

struct GemmArgs {
  const u8* x;         // rows: e4m3 or bf16; the pages of one layer's latents with x_mode 1
  const float* xs;     // e4m3: scales of x, [rows][xs_row]
  const int* gather;   // input row of each pair, or null: the pair's own number
  const int* scatter;  // Y_BF16: output row of each pair, or null: the pair's own number
  const u8* w;         // packed weights of group 0 (without table)
  const float* ws;     // e4m3: scales of w (without table)
  const u64* table;    // null, or per group {gate_up, its scales, down, its scales}
  const int* counts;   // rows of each group; null: `rows` each
  const int* offsets;  // first pair of each group; null: 0
  const int* pages;    // x_mode 1: page of each 64 positions
  void* y;
  int* error;          // receives ERROR_WAIT if a wait ran out, ERROR_SHAPE for too many groups
  i64 x_row, x_group;  // bytes
  i64 w_group;         // bytes
  i64 y_row, y_group;  // elements
  int xs_row;          // floats
  int groups, rows;
  int n, k;            // output columns (SwiGLU: inner width), length of the reduction
  int table_at;        // 0: gate_up, 2: down
  int x_mode, y_mode, y_sub;
};
static_assert(sizeof(GemmArgs) == 176, "the host's copy of this struct");

enum { X_ROWS = 0, X_PAGES = 1 };
enum { Y_BF16 = 0, Y_F32 = 1, Y_QUERY_TILES = 2, Y_KEY_TILES = 3, Y_SWIGLU = 4 };
enum { MAX_GROUPS = 1024, TOKEN_BAND = 16 };

enum { TILE = 16384, HALF_TILE = 8192, PRODUCERS = 128 };

// An entry point: W warpgroups of 64 weight rows each (a tile or half of one) and N rows of x. Shared memory: stages of both, then the
// stages' scales, barriers and the task table.
template <int N, int W> struct Shape {
  static const int THREADS = W * 128 + PRODUCERS;
  static const int WEIGHTS = W * HALF_TILE;
  static const int STAGE = WEIGHTS + N * 128;
  static const int STAGES = W == 1 ? (N >= 64 ? 12 : N >= 32 ? 16 : 18) : (N >= 128 ? 6 : N >= 64 ? 8 : 10);
  static const int TEAM = N <= 16 ? 1 : N <= 32 ? 2 : 4;  // producer warps a stage
  static const int SCALES = N + 4;      // floats a stage: rows, then two of the weights
  static const int AT_SCALES = STAGES * STAGE;
  static const int AT_BARRIERS = AT_SCALES + STAGES * SCALES * 4;
  static const int AT_TABLE = AT_BARRIERS + STAGES * 16;
  static const int BYTES = AT_TABLE + (MAX_GROUPS + 1) * 4;
  static_assert(BYTES <= 232448, "shared memory of a block");
};

struct Task {
  int group, row_tile, weight_tile, count, first;
};

// Tasks: groups in order; in a group bands of 16 row tiles, in a band weight tiles, in a weight tile the band's row tiles, so that blocks at
// work at one time share weights and rows in L2. `before[g]` = row tiles of the groups before g.
static __device__ __forceinline__ Task task_at(const GemmArgs& a, const int* before, int weight_tiles, int t) {
  int low = 0, high = a.groups;
  while (high - low > 1) {
    int middle = (low + high) >> 1;
    if (before[middle] * weight_tiles <= t) low = middle; else high = middle;
  }
  Task task;
  task.group = low;
  int tiles = before[low + 1] - before[low];
  t -= before[low] * weight_tiles;
  int band = t / (TOKEN_BAND * weight_tiles);
  t -= band * TOKEN_BAND * weight_tiles;
  int width = min(TOKEN_BAND, tiles - band * TOKEN_BAND);
  task.weight_tile = t / width;
  task.row_tile = band * TOKEN_BAND + t % width;
  task.count = a.counts ? a.counts[low] : a.rows;
  task.first = a.offsets ? a.offsets[low] : 0;
  return task;
}

// Producer warps fill stages in teams: for few rows each warp alone fills every fourth stage (few arrivals a stage, and four are filled at a
// time), for many rows all four share each. A row beyond the count is not copied: what lies in its place reaches only outputs that nobody
// stores. Columns beyond k are zeros, because they meet every output.
template <int N, bool F8, int W> static __device__ __forceinline__ void produce(const GemmArgs& a, u32 base, const int* before, int tasks, int weight_tiles, int blocks) {
  typedef Shape<N, W> S;
  constexpr int TEAM = S::TEAM, TEAMS = 4 / TEAM, LANES = TEAM * 32, COPIES = (N + TEAM * 4 - 1) / (TEAM * 4);
  static_assert(N <= LANES, "a lane a scale");
  int thread = threadIdx.x - W * 128, team = thread / LANES, lane = thread % LANES, chunk = lane & 7, row0 = lane >> 3;
  u32 full = base + S::AT_BARRIERS, empty = full + S::STAGES * 8;
  int bytes_k = F8 ? a.k : a.k * 2;
  int stage = team, phase = 1, done = 0;  // done: blocks of the tasks before, modulo TEAMS
  for (int t = blockIdx.x; t < tasks; t += gridDim.x) {
    int first = (team - done) & (TEAMS - 1);
    done = (done + blocks) & (TEAMS - 1);
    if (first >= blocks) continue;
    Task task = task_at(a, before, weight_tiles, t);
    const u8 *x = a.x + task.group * a.x_group, *w = a.w + task.group * a.w_group;
    const float* scales = a.ws;
    if (a.table) {
      w = (const u8*)a.table[task.group * 4 + a.table_at];
      scales = (const float*)a.table[task.group * 4 + a.table_at + 1];
    }
    // tiles of 128 rows follow each other block by block; with W = 1 a task takes the upper or the lower half of one
    w += W == 2 ? (i64)task.weight_tile * blocks * TILE : (i64)(task.weight_tile >> 1) * blocks * TILE + (task.weight_tile & 1) * HALF_TILE;
    if (F8) { // lanes 0 and 1: the two weight scales that a tile needs
      int scale_rows = (a.n + 127) >> 7, tile = W == 2 ? task.weight_tile : task.weight_tile >> 1;
      scales += (i64)(a.y_mode == Y_SWIGLU ? (tile >> 1) + (lane & 1) * scale_rows : tile) * blocks;
    }
    const u8* from[COPIES];  // this lane's chunk of each of its rows, null beyond the count
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      int row = row0 + i * TEAM * 4, at = task.row_tile * N + row;
      from[i] = nullptr;
      if (row < N && at < task.count) {
        if (a.x_mode == X_PAGES) { // pages are swizzled already
          from[i] = x + a.pages[at >> 6] * a.x_row + (at & 63) * 128 + ((chunk ^ (row & 7)) << 4);
        } else {
          int pair = task.first + at;
          from[i] = x + (a.gather ? a.gather[pair] : pair) * a.x_row + chunk * 16;
        }
      }
    }
    const float* row_scales = nullptr;
    if (F8 && lane < N && task.row_tile * N + lane < task.count) {
      int pair = task.first + task.row_tile * N + lane;
      row_scales = a.xs + (i64)(a.gather ? a.gather[pair] : pair) * a.xs_row;
    }
    i64 step = a.x_mode == X_PAGES ? 8192 : 128, along = first * step;
    for (int block = first; block < blocks; block += TEAMS, along += TEAMS * step) {
      barrier_wait(empty + stage * 8, phase, a.error);
      u32 at = base + stage * S::STAGE;
      if (lane == 0) {
        barrier_expect(full + stage * 8, S::WEIGHTS);
        bulk_copy(at, w + (i64)block * TILE, S::WEIGHTS, full + stage * 8);
      }
      int bytes = block * 128 + chunk * 16 < bytes_k ? 16 : 0;
      i64 offset = bytes ? along : 0;
      u32 to = at + S::WEIGHTS + row0 * 128 + ((chunk ^ (row0 & 7)) << 4);
#pragma unroll
      for (int i = 0; i < COPIES; i++) {
        // rows of a lane are multiples of 4 apart: with one warp a stage their swizzle alternates
        u32 place = TEAM == 1 ? at + S::WEIGHTS + (row0 + i * 4) * 128 + ((chunk ^ ((row0 + i * 4) & 7)) << 4) : to + i * TEAM * 512;
        if (from[i]) copy16(place, from[i] + offset, bytes);
      }
      if (F8) {
        u32 s = base + S::AT_SCALES + stage * S::SCALES * 4;
        if (row_scales) copy4(s + lane * 4, row_scales + block, 4);
        if (lane < 2) copy4(s + (N + lane) * 4, scales + block, 4);
      }
      barrier_arrive_after_copies(full + stage * 8);
      if ((stage += TEAMS) >= S::STAGES) { stage -= S::STAGES; phase ^= 1; }
    }
  }
  copies_landed();
}

template <int N, bool F8, int W> static __device__ __forceinline__ void store(const GemmArgs& a, const Task& task, float* y) {
  int warpgroup = threadIdx.x >> 7, warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31;
  int column = task.weight_tile * (W * 64) + warpgroup * 64 + warp * 16 + (lane >> 2) * 2;
  if (a.y_mode == Y_SWIGLU) column = task.weight_tile * (W * 32) + warpgroup * 32 + warp * 8 + (lane >> 2);
  if (column >= a.n) return;
#pragma unroll
  for (int j = 0; j < N / 8; j++)
#pragma unroll
    for (int q = 0; q < 2; q++) {
      int at = task.row_tile * N + j * 8 + (lane & 3) * 2 + q;
      if (at >= task.count) continue;
      float low = y[4 * j + q], high = y[4 * j + 2 + q];
      i64 row = task.first + at;
      if (a.y_mode == Y_SWIGLU) {
        ((u16*)a.y)[task.group * a.y_group + row * a.y_row + column] = (u16)bf16x2(__fmul_rn(silu(low), high), 0.f);
      } else if (a.y_mode == Y_F32) {
        *(float2*)((float*)a.y + task.group * a.y_group + row * a.y_row + column) = make_float2(low, high);
      } else {
        i64 to = task.group * a.y_group + (a.scatter ? a.scatter[row] : row) * a.y_row + column;
        int inner = ((column >> 3) & 7), tile_row;
        if (a.y_mode == Y_QUERY_TILES) { // rows of a tile are heads
          tile_row = task.group & 63;
          to = row * a.y_row + ((i64)(task.group >> 6) * a.y_sub + (column >> 6)) * 4096 + tile_row * 64 + ((inner ^ (tile_row & 7)) << 3) + (column & 7);
        }
        if (a.y_mode == Y_KEY_TILES) { // rows of a tile are positions
          tile_row = at & 63;
          to = task.group * a.y_group + ((i64)(at >> 6) * a.y_sub + (column >> 6)) * 4096 + tile_row * 64 + ((inner ^ (tile_row & 7)) << 3) + (column & 7);
        }
        *(u32*)((u16*)a.y + to) = bf16x2(low, high);
      }
    }
}

template <int N, bool F8, int W> static __device__ __forceinline__ void consume(const GemmArgs& a, u8* memory, u32 base, const int* before, int tasks, int weight_tiles, int blocks) {
  typedef Shape<N, W> S;
  int warpgroup = threadIdx.x >> 7, lane = threadIdx.x & 31;
  u32 full = base + S::AT_BARRIERS, empty = full + S::STAGES * 8;
  int stage = 0, phase = 0;
  for (int t = blockIdx.x; t < tasks; t += gridDim.x) {
    Task task = task_at(a, before, weight_tiles, t);
    float sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) sum[i] = 0.f;
    int previous = -1;
    for (int block = 0; block < blocks; block++) {
      barrier_wait(full + stage * 8, phase, a.error);
      fence_shared();  // rows came through the generic proxy, wgmma reads through the other
      u64 wd = operand(base + stage * S::STAGE + warpgroup * 8192), xd = operand(base + stage * S::STAGE + S::WEIGHTS);
      if (F8) {
        float part[N / 2];
        hold<N / 2>(part);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) Wgmma<N>::e4m3(part, wd + i * 2, xd + i * 2, i);
        wgmma_commit();
        const float* scales = (const float*)(memory + S::AT_SCALES) + stage * S::SCALES;
        float s0 = scales[N], s1 = scales[N + 1];
        wgmma_wait<0>();
        hold<N / 2>(part);
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
          float2 s = *(const float2*)(scales + j * 8 + (lane & 3) * 2);
          sum[4 * j] = fmaf(part[4 * j], s.x * s0, sum[4 * j]);
          sum[4 * j + 1] = fmaf(part[4 * j + 1], s.y * s0, sum[4 * j + 1]);
          sum[4 * j + 2] = fmaf(part[4 * j + 2], s.x * s1, sum[4 * j + 2]);
          sum[4 * j + 3] = fmaf(part[4 * j + 3], s.y * s1, sum[4 * j + 3]);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + stage * 8);
      } else { // one block stays in flight while the next one's operands arrive
        hold<N / 2>(sum);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) Wgmma<N>::bf16(sum, wd + i * 2, xd + i * 2, 1);
        wgmma_commit();
        wgmma_wait<1>();
        if (previous >= 0 && lane == 0) barrier_arrive(empty + previous * 8);
        previous = stage;
      }
      if (++stage == S::STAGES) { stage = 0; phase ^= 1; }
    }
    if (!F8) {
      wgmma_wait<0>();
      hold<N / 2>(sum);
      if (previous >= 0 && lane == 0) barrier_arrive(empty + previous * 8);
    }
    store<N, F8, W>(a, task, sum);
  }
}

template <int N, bool F8, int W> static __device__ __forceinline__ void gemm(const GemmArgs& a, u8* memory) {
  typedef Shape<N, W> S;
  if (a.groups > MAX_GROUPS) { // the task table has no room
    if (threadIdx.x == 0) atomicExch(a.error, ERROR_SHAPE);
    return;
  }
  u32 base = shared(memory);
  int* before = (int*)(memory + S::AT_TABLE);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::STAGES; i++) {
      barrier_init(base + S::AT_BARRIERS + i * 8, S::TEAM * 32 + 1);  // the team's copies, and the weights' bytes
      barrier_init(base + S::AT_BARRIERS + (S::STAGES + i) * 8, W * 4);
    }
    barriers_made();
  }
  if (threadIdx.x < 32) { // row tiles before each group
    int total = 0;
    for (int g0 = 0; g0 < a.groups; g0 += 32) {
      int g = g0 + threadIdx.x, tiles = 0;
      if (g < a.groups) tiles = ((a.counts ? a.counts[g] : a.rows) + N - 1) / N;
      int sum = tiles;
      for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(~0u, sum, d);
        if (threadIdx.x >= d) sum += other;
      }
      if (g < a.groups) before[g] = total + sum - tiles;
      total += __shfl_sync(~0u, sum, 31);
    }
    if (threadIdx.x == 0) before[a.groups] = total;
  }
  __syncthreads();
  int per_tile = a.y_mode == Y_SWIGLU ? W * 32 : W * 64;
  int weight_tiles = (a.n + per_tile - 1) / per_tile, blocks = F8 ? (a.k + 127) / 128 : (a.k + 63) / 64;
  int tasks = before[a.groups] * weight_tiles;
  if (threadIdx.x >= W * 128) {
    if (W == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 104;"); // 2 x 200 + 104 = 3 x 168 registers
    produce<N, F8, W>(a, base, before, tasks, weight_tiles, blocks);
  } else {
    if (W == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
    consume<N, F8, W>(a, memory, base, before, tasks, weight_tiles, blocks);
  }
}

// Whole tiles.
extern "C" __global__ void __launch_bounds__(384, 1) gemm_fp8_n8(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<8, true, 2>(a, memory); }
extern "C" __global__ void __launch_bounds__(384, 1) gemm_fp8_n16(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<16, true, 2>(a, memory); }
extern "C" __global__ void __launch_bounds__(384, 1) gemm_fp8_n32(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<32, true, 2>(a, memory); }
extern "C" __global__ void __launch_bounds__(384, 1) gemm_fp8_n64(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<64, true, 2>(a, memory); }
extern "C" __global__ void __launch_bounds__(384, 1) gemm_fp8_n128(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<128, true, 2>(a, memory); }
extern "C" __global__ void __launch_bounds__(384, 1) gemm_bf16_n8(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<8, false, 2>(a, memory); }
extern "C" __global__ void __launch_bounds__(384, 1) gemm_bf16_n16(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<16, false, 2>(a, memory); }
extern "C" __global__ void __launch_bounds__(384, 1) gemm_bf16_n32(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<32, false, 2>(a, memory); }
extern "C" __global__ void __launch_bounds__(384, 1) gemm_bf16_n64(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<64, false, 2>(a, memory); }
extern "C" __global__ void __launch_bounds__(384, 1) gemm_bf16_n128(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<128, false, 2>(a, memory); }
// Half tiles: twice the tasks, for narrow matrices and few rows.
extern "C" __global__ void __launch_bounds__(256, 1) gemm_fp8_h8(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<8, true, 1>(a, memory); }
extern "C" __global__ void __launch_bounds__(256, 1) gemm_fp8_h16(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<16, true, 1>(a, memory); }
extern "C" __global__ void __launch_bounds__(256, 1) gemm_fp8_h32(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<32, true, 1>(a, memory); }
extern "C" __global__ void __launch_bounds__(256, 1) gemm_fp8_h64(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<64, true, 1>(a, memory); }
extern "C" __global__ void __launch_bounds__(256, 1) gemm_bf16_h8(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<8, false, 1>(a, memory); }
extern "C" __global__ void __launch_bounds__(256, 1) gemm_bf16_h16(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<16, false, 1>(a, memory); }
extern "C" __global__ void __launch_bounds__(256, 1) gemm_bf16_h32(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<32, false, 1>(a, memory); }
extern "C" __global__ void __launch_bounds__(256, 1) gemm_bf16_h64(const __grid_constant__ GemmArgs a) { extern __shared__ __align__(1024) u8 memory[]; gemm<64, false, 1>(a, memory); }
