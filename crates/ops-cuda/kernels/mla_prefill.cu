// Attention of prompt positions in naive form: keys [k_nope | k_pe] and values per head, expanded from the cached latents by gemm.cu
// (x_mode pages, y_mode key tiles) into scratch; k_pe is read from the cache's pages. Causal, one segment of one sequence and a range of
// heads a launch.
//
// Numerics (docs/numerics.md, class of Hopper GPUs): keys in blocks of 64 positions from position 0; scores by one chain of bf16 wgmma over
// nope, then rope; softmax in F32 with base-2 exponentials; the reference maximum moves only by more than 2^8; probabilities rounded to
// bf16 for the product with the values, not for their sum; at the end one division. A row's result depends on its query, its position and the
// keys up to it alone: a block that lies wholly behind it changes no bit. So chunks of a prompt may be cut anywhere. tests/gpu/kernels/mla.cu holds that.
//
// Block: three consumer warpgroups of 64 query rows, one producer. A score product of the next block runs while a block's probabilities
// multiply the values.

#include "hopper.cuh"

struct PrefillArgs {
  const u16* q;       // first row of the segment: [rows][heads x (nope + rope)], rotated
  const u8* kv;       // scratch: per head of the range key tiles, then value tiles; [2][key blocks][nope / 64][8192]
  const u8* cache;    // the layer's pages
  const int* pages;   // page of each 64 positions
  u16* out;           // first row of the segment: [rows][heads x v]
  int* error;
  i64 q_row, out_row; // elements
  i64 page_bytes;     // of the cache
  i64 kv_group;       // bytes of one head's key tiles (and of its value tiles)
  int rows, first_position;
  int head0, rope, rope_tile;  // first head of the range; rotary width; sub-tile of a page that holds k_pe
  float scale;        // softmax scale x log2(e)
};
static_assert(sizeof(PrefillArgs) == 104, "the host's copy of this struct");

enum { WARPGROUPS = 3, THREADS = WARPGROUPS * 128 + 128, SUB_TILE = 8192, STAGES = 3 };

template <int NS> struct Shape { // NS = nope / 64 = v / 64
  static const int QUERY = (NS + 1) * SUB_TILE;  // of one warpgroup
  static const int AT_KEYS = WARPGROUPS * QUERY;
  static const int KEYS = (NS + 1) * SUB_TILE, VALUES = NS * SUB_TILE;
  static const int AT_VALUES = AT_KEYS + STAGES * KEYS;
  static const int AT_BARRIERS = AT_VALUES + STAGES * VALUES;
  static const int BYTES = AT_BARRIERS + STAGES * 4 * 8;
  static_assert(BYTES <= 232448, "shared memory of a block");
};

template <int NS> static __device__ __forceinline__ void consume(const PrefillArgs& a, u8* memory, u32 base, int first_row, int blocks, int head) {
  typedef Shape<NS> S;
  int warpgroup = threadIdx.x >> 7, thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31;
  u32 k_full = base + S::AT_BARRIERS, k_empty = k_full + STAGES * 8, v_full = k_empty + STAGES * 8, v_empty = v_full + STAGES * 8;
  int row0 = first_row + warpgroup * 64, width = NS * 64 + a.rope;
  u32 query = base + warpgroup * S::QUERY;
  // query rows into swizzled sub-tiles; rows and rotary columns beyond the edge are zeros
  for (int i = thread; i < 64 * (NS + 1) * 8; i += 128) {
    int r = i / ((NS + 1) * 8), c = i % ((NS + 1) * 8), column = c * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row0 + r < a.rows && column < width) v = *(const uint4*)(a.q + (i64)(row0 + r) * a.q_row + (i64)(a.head0 + head) * width + column);
    *(uint4*)(memory + warpgroup * S::QUERY + (c >> 3) * SUB_TILE + r * 128 + (((c & 7) ^ (r & 7)) << 4)) = v;
  }
  fence_shared();
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
  const u64 qd = operand(query);
  int r0 = warp * 16 + (lane >> 2);
  int position0 = a.first_position + row0 + r0, position1 = position0 + 8;  // of this thread's two rows
  int last_seen = a.first_position + min(row0 + 63, a.rows - 1);
  int mine = row0 < a.rows ? last_seen / 64 + 1 : 0;  // blocks that a row of this warpgroup sees
  float o[NS * 32], s[32];
  u32 p[16];
  float m0 = -INFINITY, m1 = -INFINITY, l0 = 0.f, l1 = 0.f;
#pragma unroll
  for (int i = 0; i < NS * 32; i++) o[i] = 0.f;
  int stage = 0, phase = 0;   // of keys
  int v_stage = 0, v_phase = 0;

  auto scores = [&](int st) {
    u64 kd = operand(base + S::AT_KEYS + st * S::KEYS);
    hold<32>(s);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < NS + 1; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) Wgmma<64>::bf16(s, qd + t * (SUB_TILE / 16) + i * 2, kd + t * (SUB_TILE / 16) + i * 2, t | i);
    wgmma_commit();
  };
  float f0, f1;
  auto softmax = [&](int block) { // s -> p, l, new references; f0, f1 rescale o
    int key = block * 64 + (lane & 3) * 2;
    if (block * 64 + 63 > position0) {
#pragma unroll
      for (int i = 0; i < 32; i++)
        if (key + (i >> 2) * 8 + (i & 1) > ((i & 2) ? position1 : position0)) s[i] = -INFINITY;
    }
    float x0 = s[0], x1 = s[2];
#pragma unroll
    for (int i = 0; i < 32; i++) { if (i & 2) x1 = fmaxf(x1, s[i]); else x0 = fmaxf(x0, s[i]); }
    x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 1)); x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 1));
    x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 2)); x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 2));
    x0 = __fmul_rn(x0, a.scale); x1 = __fmul_rn(x1, a.scale);
    float n0 = x0 > m0 + 8.f ? x0 : m0, n1 = x1 > m1 + 8.f ? x1 : m1;
    f0 = exp2_fast(m0 - n0); f1 = exp2_fast(m1 - n1);
    m0 = n0; m1 = n1;
#pragma unroll
    for (int i = 0; i < 32; i++) s[i] = exp2_fast(fmaf(s[i], a.scale, (i & 2) ? -n1 : -n0));
    float u[8];
#pragma unroll
    for (int i = 0; i < 8; i++) u[i] = s[i] + s[i + 8];
#pragma unroll
    for (int i = 16; i < 32; i++) u[i & 7] += s[i];
    l0 = fmaf(l0, f0, (u[0] + u[1]) + (u[4] + u[5]));
    l1 = fmaf(l1, f1, (u[2] + u[3]) + (u[6] + u[7]));
  };
  auto pack = [&] {
#pragma unroll
    for (int i = 0; i < 16; i++) p[i] = bf16x2(s[2 * i], s[2 * i + 1]);
  };
  auto rescale = [&] {
    if (__any_sync(~0u, f0 != 1.f || f1 != 1.f)) {
#pragma unroll
      for (int i = 0; i < NS * 32; i += 4) { o[i] *= f0; o[i + 1] *= f0; o[i + 2] *= f1; o[i + 3] *= f1; }
    }
  };
  auto values = [&] {
    u64 vd = operand_transposed(base + S::AT_VALUES + v_stage * S::VALUES);
    hold<NS * 32>(o);
#pragma unroll
    for (int i = 0; i < 16; i++) asm volatile("" : "+r"(p[i])::"memory");
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) Wgmma<NS * 64>::bf16_from_registers(o, p + 4 * i, vd + i * 128);
    wgmma_commit();
  };
  auto next = [&](int& st, int& ph) { if (++st == STAGES) { st = 0; ph ^= 1; } };

  if (mine > 0) {
    barrier_wait(k_full + stage * 8, phase, a.error);
    scores(stage);
    wgmma_wait<0>();
    hold<32>(s);
    if (lane == 0) barrier_arrive(k_empty + stage * 8);
    next(stage, phase);
    softmax(0); // o is zero: no rescale
    pack();
#pragma unroll 1
    for (int block = 1; block < mine; block++) {
      barrier_wait(k_full + stage * 8, phase, a.error);
      scores(stage);
      barrier_wait(v_full + v_stage * 8, v_phase, a.error);
      values();
      wgmma_wait<1>();
      hold<32>(s);
      if (lane == 0) barrier_arrive(k_empty + stage * 8);
      next(stage, phase);
      softmax(block);
      wgmma_wait<0>();
      hold<NS * 32>(o);
      if (lane == 0) barrier_arrive(v_empty + v_stage * 8);
      next(v_stage, v_phase);
      rescale();
      pack();
    }
    barrier_wait(v_full + v_stage * 8, v_phase, a.error);
    values();
    wgmma_wait<0>();
    hold<NS * 32>(o);
    if (lane == 0) barrier_arrive(v_empty + v_stage * 8);
    next(v_stage, v_phase);
  }
  for (int block = mine; block < blocks; block++) { // blocks that only later rows of the tile see
    barrier_wait(k_full + stage * 8, phase, a.error); // an arrival belongs to this use of the stage, not to the one before
    if (lane == 0) barrier_arrive(k_empty + stage * 8);
    barrier_wait(v_full + stage * 8, phase, a.error);
    if (lane == 0) barrier_arrive(v_empty + stage * 8);
    next(stage, phase);
  }
  l0 += __shfl_xor_sync(~0u, l0, 1); l1 += __shfl_xor_sync(~0u, l1, 1);
  l0 += __shfl_xor_sync(~0u, l0, 2); l1 += __shfl_xor_sync(~0u, l1, 2);
  float i0 = __fdiv_rn(1.f, l0), i1 = __fdiv_rn(1.f, l1);
  u16* y = a.out + (i64)(row0 + r0) * a.out_row + (i64)(a.head0 + head) * (NS * 64) + (lane & 3) * 2;
#pragma unroll
  for (int j = 0; j < NS * 8; j++) {
    if (row0 + r0 < a.rows) *(u32*)(y + j * 8) = bf16x2(o[4 * j] * i0, o[4 * j + 1] * i0);
    if (row0 + r0 + 8 < a.rows) *(u32*)(y + 8 * a.out_row + j * 8) = bf16x2(o[4 * j + 2] * i1, o[4 * j + 3] * i1);
  }
}

template <int NS> static __device__ __forceinline__ void produce(const PrefillArgs& a, u32 base, int blocks, int head) {
  typedef Shape<NS> S;
  if (threadIdx.x != WARPGROUPS * 128) return;
  u32 k_full = base + S::AT_BARRIERS, k_empty = k_full + STAGES * 8, v_full = k_empty + STAGES * 8, v_empty = v_full + STAGES * 8;
  const u8 *keys = a.kv + (i64)head * 2 * a.kv_group, *values = keys + a.kv_group;
  int stage = 0, phase = 1;
  for (int block = 0; block < blocks; block++) {
    barrier_wait(k_empty + stage * 8, phase, a.error);
    u32 to = base + S::AT_KEYS + stage * S::KEYS;
    barrier_expect(k_full + stage * 8, S::KEYS);
    bulk_copy(to, keys + (i64)block * S::VALUES, S::VALUES, k_full + stage * 8);
    bulk_copy(to + S::VALUES, a.cache + (i64)a.pages[block] * a.page_bytes + a.rope_tile * SUB_TILE, SUB_TILE, k_full + stage * 8);
    barrier_wait(v_empty + stage * 8, phase, a.error);
    barrier_expect(v_full + stage * 8, S::VALUES);
    bulk_copy(base + S::AT_VALUES + stage * S::VALUES, values + (i64)block * S::VALUES, S::VALUES, v_full + stage * 8);
    if (++stage == STAGES) { stage = 0; phase ^= 1; }
  }
}

// grid (ceil(rows / 192), heads of the range): the tiles with most keys start first.
template <int NS> static __device__ __forceinline__ void prefill(const PrefillArgs& a, u8* memory) {
  typedef Shape<NS> S;
  u32 base = shared(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(base + S::AT_BARRIERS + i * 8, 1);
      barrier_init(base + S::AT_BARRIERS + (STAGES + i) * 8, WARPGROUPS * 4);
      barrier_init(base + S::AT_BARRIERS + (2 * STAGES + i) * 8, 1);
      barrier_init(base + S::AT_BARRIERS + (3 * STAGES + i) * 8, WARPGROUPS * 4);
    }
    barriers_made();
  }
  __syncthreads();
  int first_row = (gridDim.x - 1 - blockIdx.x) * (WARPGROUPS * 64), head = blockIdx.y;
  int last = a.first_position + min(first_row + WARPGROUPS * 64, a.rows) - 1, blocks = last / 64 + 1;
  if (threadIdx.x >= WARPGROUPS * 128) { // 3 x 160 + 32 = 4 x 128 registers
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    produce<NS>(a, base, blocks, head);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    consume<NS>(a, memory, base, first_row, blocks, head);
  }
}

extern "C" __global__ void __launch_bounds__(512, 1) mla_prefill_64(const __grid_constant__ PrefillArgs a) { extern __shared__ __align__(1024) u8 memory[]; prefill<1>(a, memory); }
extern "C" __global__ void __launch_bounds__(512, 1) mla_prefill_128(const __grid_constant__ PrefillArgs a) { extern __shared__ __align__(1024) u8 memory[]; prefill<2>(a, memory); }
