// Attention of generated positions in absorbed form: every head's query [q_lat | q_pe] against the cached latents themselves, whose first
// kv_lora columns are the values too. Any number of query rows, each with a sequence's pages and its own position.
//
// Numerics (docs/numerics.md, class of Hopper GPUs): a row's keys are cut each `cut` positions from position 0 into pieces, and a piece into
// blocks of 64; even and odd blocks of a piece keep sums of probabilities of their own, which are added once at the piece's end. Scores by
// one chain of bf16 wgmma (rope first, then the halves of the latent in an order that the block's parity fixes); softmax in F32 with base-2
// exponentials; the reference maximum moves only by more than 2^8; probabilities rounded to bf16 for the product with the values. A row of one
// piece is divided and rounded to bf16; pieces of a longer row are kept normalised in FP16 and added up in ascending order by whichever
// block finishes the row's last piece. So a row depends on its query, position and keys alone: not on the batch, the grid or the schedule.
// tests/gpu/kernels/mla.cu holds that. (FP16 holds latents of magnitude up to 65,504: a normalised latent is at most sqrt(kv_lora) x its norm weight.)
//
// Block: 64 heads of a piece; two consumer warpgroups that own even and odd key blocks for scores and softmax, and half of the columns each for
// the values (probabilities and references pass through shared memory); one producer warp copies sub-tiles of pages in bulk.

#include "hopper.cuh"

struct DecodeArgs {
  const u8* q;          // query tiles [rows][halves][kv_lora / 64 + 1][8192], halves = ceil(heads / 64)
  const u8* cache;      // the layer's pages
  const int* tables;    // block tables [sequences][max_pages]
  const int* table_of;  // sequence of each row; null: the row's own number
  const int4* work;     // mla_plan: {row, first key, keys, slot or -1}
  const int* work_count;
  const int2* pieces;   // mla_plan: per row {first slot, pieces}
  u16* out;             // latent outputs [rows][heads][kv_lora] bf16
  uint4* partial;       // [slots][halves][kv_lora / 64][2048 / 8 ...]: slots x halves x kv_lora x 128 bytes
  float* sums;          // [slots][halves][64]
  int* done;            // [rows][halves], zero before the first launch; every launch leaves it zero
  int* error;
  i64 page_bytes;
  int max_pages, halves, heads;
  float scale;          // softmax scale x log2(e)
};
static_assert(sizeof(DecodeArgs) == 120, "the host's copy of this struct");

// Cuts rows into pieces. One block; once a step.
extern "C" __global__ void __launch_bounds__(1024, 1) mla_plan(const int* positions, int rows, int cut, int4* work, int2* pieces, int* work_count) {
  __shared__ int totals[32][2];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, work_at = 0, slot_at = 0;
  for (int r0 = 0; r0 < rows; r0 += 1024) {
    int row = r0 + threadIdx.x, keys = row < rows ? positions[row] + 1 : 0;
    int n = (keys + cut - 1) / cut, slots = n > 1 ? n : 0, sum_n = n, sum_s = slots;
    for (int d = 1; d < 32; d *= 2) {
      int x = __shfl_up_sync(~0u, sum_n, d), y = __shfl_up_sync(~0u, sum_s, d);
      if (lane >= d) { sum_n += x; sum_s += y; }
    }
    if (lane == 31) { totals[warp][0] = sum_n; totals[warp][1] = sum_s; }
    __syncthreads();
    int base_n = work_at, base_s = slot_at;
    for (int i = 0; i < 32; i++) {
      int x = totals[i][0], y = totals[i][1];
      if (i < warp) { base_n += x; base_s += y; }
      work_at += x;
      slot_at += y;
    }
    __syncthreads();
    int at = base_n + sum_n - n, slot = base_s + sum_s - slots;
    if (row < rows) pieces[row] = make_int2(slot, n);
    for (int i = 0; i < n; i++) work[at + i] = make_int4(row, i * cut, min(cut, keys - i * cut), n > 1 ? slot + i : -1);
  }
  if (threadIdx.x == 0) *work_count = work_at;
}

// q_pe of every row and head into the query tiles, zeros beside it, and zeros for heads that fill up a tile. One thread 16 bytes; grid free.
// q [rows][heads x (nope + rope)] bf16, rotated.
extern "C" __global__ void __launch_bounds__(256) mla_query_rope(const u16* q, i64 q_row, u8* tiles, int rows, int heads, int nope, int rope, int subs) {
  int halves = (heads + 63) / 64;
  i64 chunks = (i64)rows * halves * subs * 512;
  for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < chunks; i += (i64)gridDim.x * blockDim.x) {
    int chunk = i & 7, r = (i >> 3) & 63, sub = (int)((i >> 9) % subs);
    i64 rest = (i >> 9) / subs;
    int head = (int)(rest % halves) * 64 + r;
    i64 row = rest / halves;
    if (sub < subs - 1 && head < heads) continue; // q_lat: gemm.cu writes it
    uint4 v = make_uint4(0, 0, 0, 0);
    if (head < heads && chunk * 8 < rope) v = *(const uint4*)(q + row * q_row + (i64)head * (nope + rope) + nope + chunk * 8);
    *(uint4*)(tiles + ((row * halves + head / 64) * subs + sub) * 8192 + r * 128 + ((chunk ^ (r & 7)) << 4)) = v;
  }
}

static __device__ __forceinline__ u32 half2_of(float a, float b) { u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }
static __device__ __forceinline__ float2 floats_of(u32 v) {
  float2 r;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(r.x), "=f"(r.y) : "r"(v));
  return r;
}

enum { SUB_TILE = 8192, THREADS = 384 };

template <int NL> struct Shape { // NL = kv_lora / 64
  static const int SUBS = NL + 1;          // sub-tiles of a page and of a query tile; the last is rope
  static const int GROUPS = NL >= 4 ? 4 : 2;  // release groups of latent sub-tiles (half of them a warpgroup's columns); then rope
  static const int GROUP_SUBS = NL / GROUPS;
  static const int O = NL * 16;            // accumulators of a thread: half of the columns
  static const int AT_KEYS = SUBS * SUB_TILE;
  static const int AT_P = AT_KEYS + 2 * SUBS * SUB_TILE;
  static const int AT_M = AT_P + SUB_TILE, AT_L = AT_M + 256, AT_FLAG = AT_L + 1024, AT_BARRIERS = AT_FLAG + 16;
  static const int FULL = 0, EMPTY = 2 * SUBS, READY = EMPTY + 2 * (GROUPS + 1), Q_FULL = READY + 2, Q_EMPTY = Q_FULL + 1, SUMS = Q_EMPTY + 1, COUNT = SUMS + 1;
  static const int BYTES = AT_BARRIERS + COUNT * 8;
  static_assert(BYTES <= 232448, "shared memory of a block");
};

template <bool B> struct Bool { static constexpr bool value = B; };

template <int NL, int WG> static __device__ __forceinline__ void consume(const DecodeArgs& a, u8* memory, u32 base, int half, int w0, int w1) {
  typedef Shape<NL> S;
  constexpr int HALF = NL / 2;  // sub-tiles of this warpgroup's columns
  constexpr int OWN_GROUPS = S::GROUPS / 2;
  constexpr int SPLIT = 1 + HALF;  // sub-tiles multiplied before the other warpgroup's probabilities are taken
  int lane = threadIdx.x & 31, warp = (threadIdx.x & 127) >> 5, r0 = warp * 16 + (lane >> 2);
  float *shared_m = (float*)(memory + S::AT_M), *shared_l = (float*)(memory + S::AT_L);
  u32 bars = base + S::AT_BARRIERS;
  u32 p_row; // this thread's row for stmatrix
  { int r = warp * 16 + ((lane >> 3) & 1) * 8 + (lane & 7); p_row = base + S::AT_P + r * 128; }
  int p_xor = lane & 7, p_chunk = lane >> 4;
  const u64 qd = operand(base), pd = operand(base + S::AT_P);
  const u32 keys = base + S::AT_KEYS + WG * S::SUBS * SUB_TILE;
  int key_phase = 0, p_phase = 0, q_phase = 0, last = -1, turn = 0;
  float o[S::O], s[32];
  float m0, m1, l0, l1, lm0, lm1; // references of o; sums of this warpgroup's blocks and their references

  auto full = [&](int st, int sub) { return bars + (S::FULL + st * S::SUBS + sub) * 8; };
  auto release = [&](int st, int group) { __syncwarp(); if (lane == 0) barrier_arrive(bars + (S::EMPTY + st * (S::GROUPS + 1) + group) * 8); };
  auto release_own = [&](int st) {
#pragma unroll
    for (int g = 0; g < OWN_GROUPS; g++) release(st, WG * OWN_GROUPS + g);
  };
  auto rescale = [&](float n0, float n1) {
    if (__any_sync(~0u, n0 != m0 || n1 != m1)) {
      float f0 = exp2_fast(m0 - n0), f1 = exp2_fast(m1 - n1);
#pragma unroll
      for (int i = 0; i < S::O; i += 4) { o[i] *= f0; o[i + 1] *= f0; o[i + 2] *= f1; o[i + 3] *= f1; }
      m0 = n0; m1 = n1;
    }
  };
  auto other = [&] { // the other warpgroup's block: its probabilities lie in shared memory
    constexpr int st = WG ^ 1;
    barrier_wait(bars + (S::READY + st) * 8, p_phase, a.error);
    p_phase ^= 1;
    rescale(shared_m[r0], shared_m[r0 + 8]);
    u64 vd = operand_transposed(base + S::AT_KEYS + (st * S::SUBS + WG * HALF) * SUB_TILE);
    hold<S::O>(o);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) { Wgmma<NL * 32>::bf16_transposed(o, pd + i * 2, vd + i * 128, 1); }
    wgmma_commit();
  };
  auto step = [&](auto previous, int keys_left, bool last_use_of_q) { // one of this warpgroup's blocks
    constexpr bool prev = decltype(previous)::value;
    constexpr int st = WG;
    auto scores = [&](auto lower) {
      constexpr bool low = decltype(lower)::value;
      hold<32>(s);
      wgmma_fence();
#pragma unroll
      for (int g = low ? 0 : SPLIT; g < (low ? SPLIT : S::SUBS); g++) {
        const int t = g == 0 ? NL : ((g - 1) ^ (WG * HALF));
        barrier_wait(full(st, t), key_phase, a.error);
        u64 kd = operand(keys + t * SUB_TILE), qt = qd + t * (SUB_TILE / 16);
#pragma unroll
        for (int i = 0; i < 4; i++) Wgmma<64>::bf16(s, qt + i * 2, kd + i * 2, g | i);
      }
      wgmma_commit();
    };
    scores(Bool<true>()); // rope and the half whose groups this warpgroup releases itself
    if constexpr (prev) {
      other();
      wgmma_wait<0>();
      hold<S::O>(o);
      release_own(st ^ 1);
      release(st, S::GROUPS);
    }
    scores(Bool<false>());
    wgmma_wait<0>();
    hold<32>(s);
    if constexpr (!prev) release(st, S::GROUPS);
    if (last_use_of_q) { __syncwarp(); if (lane == 0) barrier_arrive(bars + S::Q_EMPTY * 8); }
    key_phase ^= 1;
    if (keys_left < 64) {
#pragma unroll
      for (int i = 0; i < 32; i++)
        if ((i >> 2) * 8 + (lane & 3) * 2 + (i & 1) >= keys_left) s[i] = -INFINITY;
    }
    float x0, x1;
    {
      float u[8];
#pragma unroll
      for (int i = 0; i < 8; i++) u[i] = s[i];
#pragma unroll
      for (int i = 8; i < 32; i++) u[i & 7] = fmaxf(u[i & 7], s[i]);
      x0 = fmaxf(fmaxf(u[0], u[1]), fmaxf(u[4], u[5]));
      x1 = fmaxf(fmaxf(u[2], u[3]), fmaxf(u[6], u[7]));
    }
    x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 1)); x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 1));
    x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, 2)); x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, 2));
    x0 = __fmul_rn(x0, a.scale); x1 = __fmul_rn(x1, a.scale);
    float n0 = x0 > m0 + 8.f ? x0 : m0, n1 = x1 > m1 + 8.f ? x1 : m1; // the reference moves only by more than 2^8
    float f0 = exp2_fast(lm0 - n0), f1 = exp2_fast(lm1 - n1);
    lm0 = n0; lm1 = n1;
    u32 p[16];
#pragma unroll
    for (int i = 0; i < 32; i++) s[i] = exp2_fast(fmaf(s[i], a.scale, (i & 2) ? -n1 : -n0));
#pragma unroll
    for (int i = 0; i < 16; i++) p[i] = bf16x2(s[2 * i], s[2 * i + 1]);
    float u[8];
#pragma unroll
    for (int i = 0; i < 8; i++) u[i] = s[i] + s[i + 8];
#pragma unroll
    for (int i = 16; i < 32; i++) u[i & 7] += s[i];
    l0 = fmaf(l0, f0, (u[0] + u[1]) + (u[4] + u[5]));
    l1 = fmaf(l1, f1, (u[2] + u[3]) + (u[6] + u[7]));
    if constexpr (prev) asm volatile("bar.sync %0, 128;" ::"n"(1 + WG) : "memory"); // all four warps are done with the other's probabilities
#pragma unroll
    for (int i = 0; i < 4; i++)
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(p_row + (((2 * i + p_chunk) ^ p_xor) << 4)), "r"(p[4 * i]), "r"(p[4 * i + 1]), "r"(p[4 * i + 2]), "r"(p[4 * i + 3]) : "memory");
    if ((lane & 3) == 0) { shared_m[r0] = n0; shared_m[r0 + 8] = n1; }
    fence_shared();
    barrier_arrive(bars + (S::READY + st) * 8);
    rescale(n0, n1);
    u64 vd = operand_transposed(keys + WG * HALF * SUB_TILE);
    hold<S::O>(o);
#pragma unroll
    for (int i = 0; i < 16; i++) asm volatile("" : "+r"(p[i])::"memory");
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) { Wgmma<NL * 32>::bf16_from_registers(o, p + 4 * i, vd + i * 128); }
    wgmma_commit();
    wgmma_wait<0>();
    hold<S::O>(o);
    release_own(st);
  };

  for (int w = w0; w < w1; w++) {
    int4 k = a.work[w];
    int blocks = (k.z + 63) / 64;
    if (k.x != last) {
      last = k.x;
      barrier_wait(bars + S::Q_FULL * 8, q_phase, a.error);
      q_phase ^= 1;
    }
    bool q_ends = w + 1 >= w1 || a.work[w + 1].x != k.x;
#pragma unroll
    for (int i = 0; i < S::O; i++) o[i] = 0.f;
    m0 = m1 = lm0 = lm1 = -INFINITY;
    l0 = l1 = 0.f;
    if (WG == 0) step(Bool<false>(), k.z, q_ends && blocks <= 2);
#pragma unroll 1
    for (int j = 2 - WG; j < blocks; j += 2) step(Bool<true>(), k.z - j * 64, q_ends && j + 2 >= blocks);
    if (blocks == 1 && WG == 1 && q_ends) { __syncwarp(); if (lane == 0) barrier_arrive(bars + S::Q_EMPTY * 8); }
    if (((blocks - 1) & 1) != WG) {
      other();
      wgmma_wait<0>();
      hold<S::O>(o);
      release_own(WG ^ 1);
    }
    // both warpgroups' sums at the common reference
    l0 += __shfl_xor_sync(~0u, l0, 1); l1 += __shfl_xor_sync(~0u, l1, 1);
    l0 += __shfl_xor_sync(~0u, l0, 2); l1 += __shfl_xor_sync(~0u, l1, 2);
    l0 *= exp2_fast(lm0 - m0); l1 *= exp2_fast(lm1 - m1);
    if ((lane & 3) == 0) { shared_l[turn + WG * 64 + r0] = l0; shared_l[turn + WG * 64 + r0 + 8] = l1; }
    barrier_arrive(bars + S::SUMS * 8);
    barrier_wait(bars + S::SUMS * 8, turn >> 7, a.error);
    l0 = shared_l[turn + r0] + shared_l[turn + 64 + r0];
    l1 = shared_l[turn + r0 + 8] + shared_l[turn + 64 + r0 + 8];
    turn ^= 128; // the next piece uses the other half, so one meeting a piece is enough
    float i0 = __fdiv_rn(1.f, l0), i1 = __fdiv_rn(1.f, l1);
    int head = half * 64 + r0;
    u16* y = a.out + ((i64)k.x * a.heads + head) * (NL * 64) + WG * HALF * 64 + (lane & 3) * 2;
    bool real0 = head < a.heads, real1 = head + 8 < a.heads;
    if (k.w < 0) {
#pragma unroll
      for (int j = 0; j < S::O / 4; j++) {
        if (real0) *(u32*)(y + j * 8) = bf16x2(o[4 * j] * i0, o[4 * j + 1] * i0);
        if (real1) *(u32*)(y + 8 * NL * 64 + j * 8) = bf16x2(o[4 * j + 2] * i1, o[4 * j + 3] * i1);
      }
    } else {
      constexpr int PARTS = S::O / 8, STRIDE = 2 * PARTS * 128;  // 16-byte parts of a thread; of a slot and half
      int2 row = a.pieces[k.x];
      uint4* part = a.partial + ((i64)k.w * a.halves + half) * STRIDE + WG * PARTS * 128 + (threadIdx.x & 127);
#pragma unroll
      for (int j = 0; j < PARTS; j++)
        __stcg(part + j * 128, make_uint4(half2_of(o[8 * j] * i0, o[8 * j + 1] * i0), half2_of(o[8 * j + 2] * i1, o[8 * j + 3] * i1), half2_of(o[8 * j + 4] * i0, o[8 * j + 5] * i0), half2_of(o[8 * j + 6] * i1, o[8 * j + 7] * i1)));
      float* sum = a.sums + ((i64)k.w * a.halves + half) * 64 + r0;
      if (WG == 0 && (lane & 3) == 0) { __stcg(sum, m0 + log2_fast(l0)); __stcg(sum + 8, m1 + log2_fast(l1)); }
      __threadfence();
      int* flag = (int*)(memory + S::AT_FLAG);
      asm volatile("bar.sync 3, 256;" ::: "memory");
      if (threadIdx.x == 0) {
        int before = atomicAdd(a.done + (i64)k.x * a.halves + half, 1);
        if (before == row.y - 1) a.done[(i64)k.x * a.halves + half] = 0;
        __threadfence();
        *flag = before == row.y - 1;
      }
      asm volatile("bar.sync 3, 256;" ::: "memory");
      if (*flag) { // the row's last piece: add them all in order
        float M0 = -INFINITY, M1 = -INFINITY, L0 = 0.f, L1 = 0.f;
        const float* sums = a.sums + ((i64)row.x * a.halves + half) * 64 + r0;
#pragma unroll 4
        for (int i = 0; i < row.y; i++) { M0 = fmaxf(M0, __ldcg(sums + (i64)i * a.halves * 64)); M1 = fmaxf(M1, __ldcg(sums + (i64)i * a.halves * 64 + 8)); }
#pragma unroll
        for (int i = 0; i < S::O; i++) o[i] = 0.f;
        const uint4* from = a.partial + ((i64)row.x * a.halves + half) * STRIDE + WG * PARTS * 128 + (threadIdx.x & 127);
#pragma unroll 1
        for (int i = 0; i < row.y; i++, from += (i64)a.halves * STRIDE) {
          float g0 = exp2_fast(__ldcg(sums + (i64)i * a.halves * 64) - M0), g1 = exp2_fast(__ldcg(sums + (i64)i * a.halves * 64 + 8) - M1);
          L0 += g0; L1 += g1;
          constexpr int BATCH = PARTS < 8 ? PARTS : 8;
#pragma unroll
          for (int h = 0; h < PARTS / BATCH; h++) {
            uint4 v[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) v[j] = __ldcg(from + (h * BATCH + j) * 128);
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
              float* c = o + (h * BATCH + j) * 8;
              float2 t;
              t = floats_of(v[j].x); c[0] = fmaf(t.x, g0, c[0]); c[1] = fmaf(t.y, g0, c[1]);
              t = floats_of(v[j].y); c[2] = fmaf(t.x, g1, c[2]); c[3] = fmaf(t.y, g1, c[3]);
              t = floats_of(v[j].z); c[4] = fmaf(t.x, g0, c[4]); c[5] = fmaf(t.y, g0, c[5]);
              t = floats_of(v[j].w); c[6] = fmaf(t.x, g1, c[6]); c[7] = fmaf(t.y, g1, c[7]);
            }
          }
        }
        i0 = __fdiv_rn(1.f, L0); i1 = __fdiv_rn(1.f, L1);
#pragma unroll
        for (int j = 0; j < S::O / 4; j++) {
          if (real0) *(u32*)(y + j * 8) = bf16x2(o[4 * j] * i0, o[4 * j + 1] * i0);
          if (real1) *(u32*)(y + 8 * NL * 64 + j * 8) = bf16x2(o[4 * j + 2] * i1, o[4 * j + 3] * i1);
        }
      }
      asm volatile("bar.sync 3, 256;" ::: "memory"); // the flag is read before the next piece writes it
    }
  }
}

template <int NL> static __device__ __forceinline__ void produce(const DecodeArgs& a, u32 base, int half, int w0, int w1) {
  typedef Shape<NL> S;
  if (threadIdx.x != 256) return;
  u32 bars = base + S::AT_BARRIERS;
  int phase[2] = {1, 1}, q_phase = 1, last = -1;
  for (int w = w0; w < w1; w++) {
    int4 k = a.work[w];
    int blocks = (k.z + 63) / 64;
    const int* table = a.tables + (i64)(a.table_of ? a.table_of[k.x] : k.x) * a.max_pages + k.y / 64;
    if (k.x != last) {
      last = k.x;
      barrier_wait(bars + S::Q_EMPTY * 8, q_phase, a.error);
      q_phase ^= 1;
      barrier_expect(bars + S::Q_FULL * 8, S::SUBS * SUB_TILE);
      bulk_copy(base, a.q + ((i64)k.x * a.halves + half) * (S::SUBS * SUB_TILE), S::SUBS * SUB_TILE, bars + S::Q_FULL * 8);
    }
    for (int j = 0; j < blocks; j++) {
      int st = j & 1, parity = st ? phase[1] : phase[0];
      const u8* page = a.cache + (i64)table[j] * a.page_bytes;
#pragma unroll 1
      for (int g = 0; g <= S::GROUPS; g++) { // rope first, then the halves in the order in which the block's owner takes them
        int group = g == 0 ? (int)S::GROUPS : ((g - 1) ^ (st * (S::GROUPS / 2)));
        barrier_wait(bars + (S::EMPTY + st * (S::GROUPS + 1) + group) * 8, parity, a.error);
        int s0 = group * S::GROUP_SUBS, s1 = group == S::GROUPS ? (int)S::SUBS : s0 + S::GROUP_SUBS;
        for (int s = s0; s < s1; s++) {
          u32 full = bars + (S::FULL + st * S::SUBS + s) * 8;
          barrier_expect(full, SUB_TILE);
          bulk_copy(base + S::AT_KEYS + (st * S::SUBS + s) * SUB_TILE, page + s * SUB_TILE, SUB_TILE, full);
        }
      }
      if (st) phase[1] ^= 1; else phase[0] ^= 1;
    }
  }
}

// grid: a multiple of halves; blocks of one half share the work list evenly.
template <int NL> static __device__ __forceinline__ void decode(const DecodeArgs& a, u8* memory) {
  typedef Shape<NL> S;
  u32 base = shared(memory), bars = base + S::AT_BARRIERS;
  int warpgroup = threadIdx.x >> 7, half = blockIdx.x % a.halves, share = blockIdx.x / a.halves, shares = gridDim.x / a.halves;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * S::SUBS; i++) barrier_init(bars + (S::FULL + i) * 8, 1);
    for (int i = 0; i < 2 * (S::GROUPS + 1); i++) barrier_init(bars + (S::EMPTY + i) * 8, 4);
    for (int i = 0; i < 2; i++) barrier_init(bars + (S::READY + i) * 8, 128);
    barrier_init(bars + S::Q_FULL * 8, 1);
    barrier_init(bars + S::Q_EMPTY * 8, 8);
    barrier_init(bars + S::SUMS * 8, 256);
    barriers_made();
  }
  __syncthreads();
  i64 count = *a.work_count;
  int w0 = (int)(share * count / shares), w1 = (int)((share + 1) * count / shares);
  if (warpgroup == 2) { // 2 x 232 + 40 = 3 x 168 registers
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    produce<NL>(a, base, half, w0, w1);
  } else if (warpgroup == 0) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<NL, 0>(a, memory, base, half, w0, w1);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<NL, 1>(a, memory, base, half, w0, w1);
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) mla_decode_512(const __grid_constant__ DecodeArgs a) { extern __shared__ __align__(1024) u8 memory[]; decode<8>(a, memory); }
extern "C" __global__ void __launch_bounds__(384, 1) mla_decode_128(const __grid_constant__ DecodeArgs a) { extern __shared__ __align__(1024) u8 memory[]; decode<2>(a, memory); }
