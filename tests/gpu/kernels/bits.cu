// Why products may choose their tile by the number of rows: one output element of wgmma has the same bits whatever N is and whichever operand
// is A, for e4m3 (k = 128, one block of promotion) and BF16 (k = 64).
#include "common.h"

// a [64][128 bytes], b [N][128 bytes]; c [64][N].
template <int N, bool F8> __global__ void product(const uint8_t* a, const uint8_t* b, float* c) {
  __shared__ __align__(1024) uint8_t sa[64 * 128], sb[N * 128];
  for (int i = threadIdx.x; i < 64 * 128; i += 128) { int r = i / 128, k = i % 128; sa[r * 128 + (((k >> 4) ^ (r & 7)) << 4 | (k & 15))] = a[i]; }
  for (int i = threadIdx.x; i < N * 128; i += 128) { int r = i / 128, k = i % 128; sb[r * 128 + (((k >> 4) ^ (r & 7)) << 4 | (k & 15))] = b[i]; }
  fence_shared();
  __syncthreads();
  float v[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) v[i] = 0.f;
  u64 da = operand(shared(sa)), db = operand(shared(sb));
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (F8) Wgmma<N>::e4m3(v, da + i * 2, db + i * 2, 1);
    else Wgmma<N>::bf16(v, da + i * 2, db + i * 2, 1);
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold<N / 2>(v);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < N / 8; j++)
#pragma unroll
    for (int q = 0; q < 4; q++) c[(warp * 16 + lane / 4 + (q / 2) * 8) * N + j * 8 + (lane % 4) * 2 + (q & 1)] = v[4 * j + q];
}

template <int N, bool F8> static std::vector<float> run(const uint8_t* a, const uint8_t* b) {
  Device<float> c(64 * N);
  c.bytes(0xff);
  product<N, F8><<<1, 128>>>(a, b, c.p);
  CK(cudaGetLastError());
  return c.get();
}

template <int N, bool F8> static size_t differing(const uint8_t* a, const uint8_t* b, const std::vector<float>& base) {
  auto got = run<N, F8>(a, b);
  size_t differ = 0;
  int columns = N < 64 ? N : 64;
  for (int r = 0; r < 64; r++) differ += memcmp(&got[r * N], &base[r * 64], columns * 4) != 0;
  return differ;
}

template <bool F8> static void all() {
  size_t tiles = 0, exchanged = 0;
  for (int trial = 0; trial < 40; trial++) {
    Device<uint8_t> a, b;
    Device<uint16_t> ha, hb;
    if (F8) { a = e4m3(64 * 128, 60.f); b = e4m3(128 * 128, 60.f); }
    else { ha = bf16(64 * 64, 1.f); hb = bf16(128 * 64, 1.f); }
    const uint8_t *pa = F8 ? a.p : (const uint8_t*)ha.p, *pb = F8 ? b.p : (const uint8_t*)hb.p;
    auto base = run<64, F8>(pa, pb);
    tiles += differing<8, F8>(pa, pb, base) + differing<16, F8>(pa, pb, base) + differing<32, F8>(pa, pb, base) + differing<128, F8>(pa, pb, base);
    auto swapped = run<64, F8>(pb, pa);
    for (int r = 0; r < 64; r++)
      for (int c = 0; c < 64; c++) exchanged += memcmp(&swapped[c * 64 + r], &base[r * 64 + c], 4) != 0;
  }
  expect(!tiles && !exchanged, "wgmma %s, 40 draws: rows that differ for N = 8, 16, 32, 128 from 64: %zu; elements that differ with A and B exchanged: %zu", F8 ? "e4m3" : "bf16", tiles, exchanged);
}

int main() {
  all<true>();
  all<false>();
  return finish();
}
