// Tests of mla_decode.cu and mla_prefill.cu with the products around them. Usage: mla [check | time | small]; without arguments check and time.
#include "common.h"
namespace kernels_pack {
#include "../../../crates/ops-cuda/kernels/pack.cu"
}
namespace kernels_gemm {
#include "../../../crates/ops-cuda/kernels/gemm.cu"
}
namespace kernels_decode {
#include "../../../crates/ops-cuda/kernels/mla_decode.cu"
}
namespace kernels_prefill {
#include "../../../crates/ops-cuda/kernels/mla_prefill.cu"
}
using kernels_decode::DecodeArgs;
using kernels_gemm::GemmArgs;
using kernels_prefill::PrefillArgs;
typedef unsigned char u8;
typedef long long i64;

static int* error_flag() { static Device<int> e(1); static bool zero = (e.bytes(0), true); (void)zero; return e.p; }
static void no_error(const char* what) {
  int e = 0;
  CK(cudaDeviceSynchronize());
  CK(cudaMemcpy(&e, error_flag(), 4, cudaMemcpyDeviceToHost));
  if (e) expect(false, "%s: a wait ran out", what);
}

struct Model { // shapes, kv_b and its packed forms
  int heads, nope, rope, lora, subs, halves;
  i64 page_bytes, key_tiles, head_bytes, uk_bytes;  // bytes of a head's key rows, of key and value rows, of its transposed key rows
  float scale;
  Device<uint16_t> kv_b;
  Device<u8> kv, uk;
  Model(int heads, int nope, int rope, int lora) : heads(heads), nope(nope), rope(rope), lora(lora), subs(lora / 64 + 1), halves((heads + 63) / 64) {
    page_bytes = subs * 8192;
    scale = 1.3f / sqrtf(nope + rope);
    kv_b = bf16((size_t)heads * 2 * nope * lora, 1.5f / sqrtf(lora));
    i64 kb = lora / 64;
    key_tiles = (nope + 127) / 128 * kb * 16384;
    head_bytes = 2 * key_tiles;
    uk_bytes = (i64)(lora + 127) / 128 * (nope / 64) * 16384;
    kv = Device<u8>(heads * head_bytes);
    uk = Device<u8>(heads * uk_bytes);
    kv.bytes(0xff); uk.bytes(0xff);
    kernels_pack::pack_bf16<<<1024, 256>>>(kv_b.p, lora, (i64)2 * nope * lora, kv.p, head_bytes, heads, nope, lora, 0);
    kernels_pack::pack_bf16<<<1024, 256>>>(kv_b.p + (i64)nope * lora, lora, (i64)2 * nope * lora, kv.p + key_tiles, head_bytes, heads, nope, lora, 0);
    kernels_pack::pack_bf16<<<1024, 256>>>(kv_b.p, lora, (i64)2 * nope * lora, uk.p, uk_bytes, heads, lora, nope, 1);
    CK(cudaGetLastError());
  }
};
// element of a page (the formula that kv_append uses)
__host__ __device__ inline size_t page_at(int r, int c) { return (size_t)(c / 64) * 4096 + r * 64 + ((((c % 64) / 8) ^ (r % 8)) * 8) + c % 8; }
__global__ void fill_pages(const uint16_t* rows, uint16_t* pages, int count, int width, int subs) { // padding stays zero
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)count * 64 * width; i += (size_t)gridDim.x * blockDim.x) {
    size_t row = i / width;
    pages[(row / 64) * subs * 4096 + page_at(row % 64, i % width)] = rows[i];
  }
}
struct Cache {
  int count;
  Device<uint16_t> rows, pages;
  Cache(const Model& m, int count) : count(count) {
    rows = bf16((size_t)count * 64 * (m.lora + m.rope), 1.f);
    pages = Device<uint16_t>((size_t)count * m.subs * 4096);
    pages.bytes(0);
    fill_pages<<<2048, 256>>>(rows.p, pages.p, count, m.lora + m.rope, m.subs);
    CK(cudaGetLastError());
  }
};

typedef void (*GemmKernel)(const GemmArgs);
static void gemm(GemmArgs a, int rows) {
  using namespace kernels_gemm;
  struct { int n, bytes; GemmKernel k; } all[5] = {{8, Shape<8, 2>::BYTES, gemm_bf16_n8}, {16, Shape<16, 2>::BYTES, gemm_bf16_n16}, {32, Shape<32, 2>::BYTES, gemm_bf16_n32}, {64, Shape<64, 2>::BYTES, gemm_bf16_n64}, {128, Shape<128, 2>::BYTES, gemm_bf16_n128}};
  int i = 0;
  while (i < 4 && all[i].n < rows) i++;
  a.error = error_flag();
  CK(cudaFuncSetAttribute(all[i].k, cudaFuncAttributeMaxDynamicSharedMemorySize, all[i].bytes));
  all[i].k<<<multiprocessors(), Shape<8, 2>::THREADS, all[i].bytes>>>(a);
  CK(cudaGetLastError());
}

struct Decode { // buffers for a batch of rows
  const Model& m;
  int rows, cut, max_pages, slots;
  Device<u8> tiles; Device<uint16_t> latent, out; Device<int4> work; Device<int2> pieces; Device<int> count, done, positions, tables; Device<uint4> partial; Device<float> sums;
  Decode(const Model& m, const std::vector<int>& pos, const std::vector<int>& table, int max_pages, int cut) : m(m), rows(pos.size()), cut(cut), max_pages(max_pages), slots(0), positions(pos), tables(table) {
    int n = 0;
    for (int p : pos) { n += p / cut + 1; slots += p >= cut ? p / cut + 1 : 0; }
    tiles = Device<u8>((size_t)rows * m.halves * m.page_bytes); latent = Device<uint16_t>((size_t)rows * m.heads * m.lora); out = Device<uint16_t>((size_t)rows * m.heads * m.nope);
    work = Device<int4>(n); pieces = Device<int2>(rows); count = Device<int>(1); done = Device<int>(rows * m.halves);
    partial = Device<uint4>((size_t)slots * m.halves * 64 * m.lora / 8); sums = Device<float>((size_t)slots * m.halves * 64);
    tiles.bytes(0xff); latent.bytes(0xff); out.bytes(0xff); done.bytes(0); partial.bytes(0xff); sums.bytes(0xff);
  }
  void query(const uint16_t* q) {
    i64 width = m.nope + m.rope;
    kernels_decode::mla_query_rope<<<512, 256>>>(q, m.heads * width, tiles.p, rows, m.heads, m.nope, m.rope, m.subs);
    GemmArgs a = {};
    a.x = (const u8*)q; a.w = m.uk.p; a.y = tiles.p; a.x_row = m.heads * width * 2; a.x_group = width * 2; a.w_group = m.uk_bytes; a.y_row = (i64)m.halves * m.subs * 4096; a.groups = m.heads; a.rows = rows; a.n = m.lora; a.k = m.nope;
    a.y_mode = kernels_gemm::Y_QUERY_TILES; a.y_sub = m.subs;
    gemm(a, rows);
  }
  void plan() { kernels_decode::mla_plan<<<1, 1024>>>(positions.p, rows, cut, work.p, pieces.p, count.p); }
  void attend(const Cache& c, int grid = 0) {
    DecodeArgs a = {};
    a.q = tiles.p; a.cache = (const u8*)c.pages.p; a.tables = tables.p; a.work = work.p; a.work_count = count.p; a.pieces = pieces.p; a.out = latent.p; a.partial = partial.p; a.sums = sums.p; a.done = done.p; a.error = error_flag();
    a.page_bytes = m.page_bytes; a.max_pages = max_pages; a.halves = m.halves; a.heads = m.heads; a.scale = m.scale * 1.44269504f;
    if (!grid) grid = std::min(multiprocessors() / m.halves, (int)work.n) * m.halves;
    auto go = [&](auto kernel, int bytes) { CK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)); kernel<<<grid, kernels_decode::THREADS, bytes>>>(a); };
    if (m.lora == 512) go(kernels_decode::mla_decode_512, kernels_decode::Shape<8>::BYTES); else go(kernels_decode::mla_decode_128, kernels_decode::Shape<2>::BYTES);
    CK(cudaGetLastError());
  }
  void value_up() {
    GemmArgs a = {};
    a.x = (const u8*)latent.p; a.w = m.kv.p + m.key_tiles; a.y = out.p; a.x_row = (i64)m.heads * m.lora * 2; a.x_group = m.lora * 2; a.w_group = m.head_bytes; a.y_row = m.heads * m.nope; a.y_group = m.nope; a.groups = m.heads; a.rows = rows; a.n = m.nope; a.k = m.lora;
    gemm(a, rows);
  }
  void all(const Cache& c, const uint16_t* q, int grid = 0) { plan(); query(q); attend(c, grid); value_up(); }
};

// Naive form in double for one (row, head): scores over positions 0..=position, values expanded; one block a pair.
__global__ void attention_f64(const uint16_t* q, const uint16_t* latents, const uint16_t* kv_b, const int* positions, const int* tables, int max_pages, const int* pick_row, const int* pick_head, double* scratch, int longest, double* out, int heads, int nope, int rope, int lora, double scale) {
  extern __shared__ double sh[]; // q_lat, o_lat
  int row = pick_row[blockIdx.x], h = pick_head[blockIdx.x], keys = positions[row] + 1, width = lora + rope;
  double *ql = sh, *ol = sh + lora, *s = scratch + (size_t)blockIdx.x * longest;
  __shared__ double red[256];
  const uint16_t *qr = q + ((size_t)row * heads + h) * (nope + rope), *w = kv_b + (size_t)h * 2 * nope * lora;
  for (int c = threadIdx.x; c < lora; c += blockDim.x) { double v = 0; for (int d = 0; d < nope; d++) v += (double)from_bf16(qr[d]) * from_bf16(w[(size_t)d * lora + c]); ql[c] = v; }
  __syncthreads();
  double most = -1e300;
  for (int j = threadIdx.x; j < keys; j += blockDim.x) {
    const uint16_t* k = latents + ((size_t)tables[(size_t)row * max_pages + j / 64] * 64 + j % 64) * width;
    double v = 0;
    for (int c = 0; c < lora; c++) v += ql[c] * from_bf16(k[c]);
    for (int c = 0; c < rope; c++) v += (double)from_bf16(qr[nope + c]) * from_bf16(k[lora + c]);
    s[j] = v * scale;
    most = fmax(most, s[j]);
  }
  red[threadIdx.x] = most;
  __syncthreads();
  for (int i = 0; i < blockDim.x; i++) most = fmax(most, red[i]);
  __syncthreads();
  double sum = 0;
  for (int j = threadIdx.x; j < keys; j += blockDim.x) { s[j] = exp(s[j] - most); sum += s[j]; }
  red[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < blockDim.x; i++) sum += red[i];
  for (int c = threadIdx.x; c < lora; c += blockDim.x) { double v = 0; for (int j = 0; j < keys; j++) v += s[j] * from_bf16(latents[((size_t)tables[(size_t)row * max_pages + j / 64] * 64 + j % 64) * width + c]); ol[c] = v / sum; }
  __syncthreads();
  for (int d = threadIdx.x; d < nope; d += blockDim.x) { double v = 0; for (int c = 0; c < lora; c++) v += ol[c] * from_bf16(w[(size_t)(nope + d) * lora + c]); out[(size_t)blockIdx.x * nope + d] = v; }
}
static double worst_error(const Model& m, const Cache& c, const uint16_t* q, const std::vector<int>& pos, const std::vector<int>& table, int max_pages, const std::vector<uint16_t>& got) {
  std::vector<int> pr, ph;
  int longest = 0;
  for (size_t r = 0; r < pos.size(); r += std::max<size_t>(1, pos.size() / 24)) for (int i = 0; i < 3; i++) { pr.push_back(r); ph.push_back((r * 37 + i * 53 + (i == 2 ? m.heads - 1 : 0)) % m.heads); }
  for (int p : pos) longest = std::max(longest, p + 1);
  Device<int> dp(pos), dt(table), dr(pr), dh(ph);
  Device<double> scratch((size_t)pr.size() * longest), out(pr.size() * m.nope);
  attention_f64<<<pr.size(), 256, 2 * m.lora * 8>>>(q, c.rows.p, m.kv_b.p, dp.p, dt.p, max_pages, dr.p, dh.p, scratch.p, longest, out.p, m.heads, m.nope, m.rope, m.lora, m.scale);
  CK(cudaGetLastError());
  auto want = out.get();
  double worst = 0;
  for (size_t i = 0; i < pr.size(); i++) {
    double num = 0, den = 0;
    for (int d = 0; d < m.nope; d++) { double g = from_bf16(got[((size_t)pr[i] * m.heads + ph[i]) * m.nope + d]), w = want[i * m.nope + d]; num += (g - w) * (g - w); den += w * w; }
    double e = sqrt(num / den);
    if (!(e <= worst)) worst = e;
  }
  return worst;
}
static std::vector<int> shuffled(int n) { std::vector<int> v(n); for (int i = 0; i < n; i++) v[i] = i; for (int i = n - 1; i > 0; i--) std::swap(v[i], v[(unsigned)rand() % (i + 1)]); return v; }

static void decode(const Model& m, std::vector<int> pos, int cut) {
  int rows = pos.size(), longest = 0;
  for (int p : pos) longest = std::max(longest, p + 1);
  int max_pages = (longest + 63) / 64;
  Cache c(m, rows * max_pages);
  auto table = shuffled(rows * max_pages);
  auto q = bf16((size_t)rows * m.heads * (m.nope + m.rope), 1.f);
  Decode d(m, pos, table, max_pages, cut);
  d.all(c, q.p);
  auto base = d.out.get();
  auto base_latent = d.latent.get();
  size_t bad = 0;
  for (uint16_t v : base) bad += v == 0xffff;
  double error = worst_error(m, c, q.p, pos, table, max_pages, base);
  size_t differ = 0;
  for (int grid : {2 * m.halves, 7 * m.halves, 0}) {
    d.latent.bytes(0xff); d.out.bytes(0xff); d.partial.bytes(0xff);
    d.all(c, q.p, grid);
    differ += memcmp(d.out.get().data(), base.data(), base.size() * 2) != 0;
    differ += memcmp(d.latent.get().data(), base_latent.data(), base_latent.size() * 2) != 0;
  }
  for (int r = 0; r < rows; r += std::max(1, rows / 16)) { // alone
    Decode one(m, {pos[r]}, std::vector<int>(table.begin() + (size_t)r * max_pages, table.begin() + (size_t)(r + 1) * max_pages), max_pages, cut);
    one.all(c, q.p + (size_t)r * m.heads * (m.nope + m.rope));
    differ += memcmp(one.out.get().data(), &base[(size_t)r * m.heads * m.nope], (size_t)m.heads * m.nope * 2) != 0;
  }
  no_error("decode");
  expect(error < 1.2e-2 && !differ && !bad, "decode heads %d lora %d cut %d, %d rows to %d keys: worst error of a head %.2e; runs, grids and lone rows that differ %zu; unwritten %zu", m.heads, m.lora, cut, rows, longest, error, differ, bad);
}

struct Prefill { // one sequence, chunks of it
  const Model& m;
  const Cache& c;
  Device<int> pages;
  Device<u8> scratch;
  int max_keys, range;
  Prefill(const Model& m, const Cache& c, const std::vector<int>& table, int max_keys, int range) : m(m), c(c), pages(table), max_keys(max_keys), range(range) { scratch = Device<u8>((size_t)2 * range * ((max_keys + 63) / 64) * (m.nope / 64) * 8192); scratch.bytes(0x7f); }
  void expand(int head0, int heads, int keys) {
    int blocks = (keys + 63) / 64;
    GemmArgs a = {};
    a.x = (const u8*)c.pages.p; a.pages = pages.p; a.w = m.kv.p + head0 * m.head_bytes; a.y = scratch.p; a.x_row = m.page_bytes; a.w_group = m.key_tiles; a.y_group = (i64)blocks * (m.nope / 64) * 4096; a.groups = 2 * heads; a.rows = blocks * 64; a.n = m.nope; a.k = m.lora;
    a.x_mode = kernels_gemm::X_PAGES; a.y_mode = kernels_gemm::Y_KEY_TILES; a.y_sub = m.nope / 64;
    gemm(a, a.rows);
  }
  void attend(const uint16_t* q, uint16_t* out, int head0, int heads, int first, int rows) {
    int blocks = (first + rows + 63) / 64;
    PrefillArgs a = {};
    a.q = q; a.kv = scratch.p; a.cache = (const u8*)c.pages.p; a.pages = pages.p; a.out = out; a.error = error_flag(); a.q_row = m.heads * (m.nope + m.rope); a.out_row = m.heads * m.nope; a.page_bytes = m.page_bytes; a.kv_group = (i64)blocks * (m.nope / 64) * 8192;
    a.rows = rows; a.first_position = first; a.head0 = head0; a.rope = m.rope; a.rope_tile = m.subs - 1; a.scale = m.scale * 1.44269504f;
    dim3 grid((rows + 191) / 192, heads);
    auto go = [&](auto kernel, int bytes) { CK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)); kernel<<<grid, kernels_prefill::THREADS, bytes>>>(a); };
    if (m.nope == 128) go(kernels_prefill::mla_prefill_128, kernels_prefill::Shape<2>::BYTES); else go(kernels_prefill::mla_prefill_64, kernels_prefill::Shape<1>::BYTES);
    CK(cudaGetLastError());
  }
  void chunk(const uint16_t* q, uint16_t* out, int first, int rows) { // q, out: the whole prompt's
    if (rows == 0) return;
    for (int h = 0; h < m.heads; h += range) {
      int n = std::min(range, m.heads - h);
      expand(h, n, first + rows);
      attend(q + (size_t)first * m.heads * (m.nope + m.rope), out + (size_t)first * m.heads * m.nope, h, n, first, rows);
    }
  }
};
static void prefill(const Model& m, int length, std::vector<std::vector<int>> cuts) {
  int np = (length + 63) / 64;
  Cache c(m, np + 3);
  auto table = shuffled(np + 3);
  table.resize(np);
  auto q = bf16((size_t)length * m.heads * (m.nope + m.rope), 1.f);
  Device<uint16_t> out((size_t)length * m.heads * m.nope);
  out.bytes(0xff);
  Prefill whole(m, c, table, length, m.heads);
  whole.chunk(q.p, out.p, 0, length);
  auto base = out.get();
  size_t bad = 0, differ = 0;
  for (uint16_t v : base) bad += v == 0xffff;
  std::vector<int> pos(length), tables;
  for (int i = 0; i < length; i++) { pos[i] = i; tables.insert(tables.end(), table.begin(), table.end()); }
  double error = worst_error(m, c, q.p, pos, tables, np, base);
  for (auto& cut : cuts) {
    for (int range : {m.heads, std::max(1, m.heads / 4)}) {
      Prefill p(m, c, table, length, range);
      out.bytes(0xff);
      int at = 0;
      for (size_t i = 0; at < length; i++) { int n = std::min(cut[i % cut.size()], length - at); p.chunk(q.p, out.p, at, n); at += n; }
      auto got = out.get();
      for (size_t r = 0; r < (size_t)length; r++) differ += memcmp(&got[r * m.heads * m.nope], &base[r * m.heads * m.nope], (size_t)m.heads * m.nope * 2) != 0;
    }
  }
  no_error("prefill");
  expect(error < 1.2e-2 && !differ && !bad, "prefill heads %d lora %d length %d: worst error of a head %.2e; rows that differ over %zu cuttings x 2 head ranges %zu; unwritten %zu", m.heads, m.lora, length, error, cuts.size(), differ, bad);
}

static void times() {
  Model m(128, 128, 64, 512);
  const int PAGES = 128 * 128;
  Cache c(m, PAGES);
  auto perm = shuffled(PAGES);
  int shapes[][2] = {{1, 4096}, {16, 4096}, {32, 4096}, {64, 4096}, {128, 4096}, {128, 8192}};
  for (auto& s : shapes) {
    int b = s[0], np = s[1] / 64;
    std::vector<int> pos(b, s[1] - 1), table(perm.begin(), perm.begin() + (size_t)b * np);
    auto q = bf16((size_t)b * m.heads * 192, 1.f);
    for (int cut : {1024, 2048}) {
      Decode d(m, pos, table, np, cut);
      d.all(c, q.p);
      float t0 = time_cold([&] { d.plan(); }), t1 = time_cold([&] { d.query(q.p); }), t2 = time_cold([&] { d.attend(c); }), t3 = time_cold([&] { d.value_up(); });
      printf("time decode b %3d keys %d cut %d: attention %.1f us (%.0f TFLOPS); plan %.1f, query (rope + W_UK) %.1f, value up %.1f\n", b, s[1], cut, t2, 2.0 * b * 128 * s[1] * 1088 / t2 * 1e-6, t0, t1, t3);
      fflush(stdout);
    }
  }
  for (int length : {2048, 16384}) {
    std::vector<int> table(perm.begin(), perm.begin() + length / 64);
    auto q = bf16((size_t)length * m.heads * 192, 1.f);
    Device<uint16_t> out((size_t)length * m.heads * m.nope);
    Prefill p(m, c, table, length, 128);
    float t1 = time_cold([&] { p.expand(0, 128, length); }, 10), t2 = time_cold([&] { p.attend(q.p, out.p, 0, 128, 0, length); }, 10);
    printf("time prefill length %d: expand %.2f ms (%.0f TFLOPS), attention %.2f ms (%.0f TFLOPS, causal half)\n", length, t1 / 1000, 2.0 * length * 512 * 32768 / t1 * 1e-6, t2 / 1000, 2.0 * length * (double)length / 2 * 128 * 320 / t2 * 1e-6);
    fflush(stdout);
  }
  no_error("times");
}

int main(int argc, char** argv) {
  std::string mode = argc > 1 ? argv[1] : "";
  srand(seed_of_run());
  if (mode == "small") {
    Model pocket(4, 64, 32, 128);
    decode(pocket, {0, 63, 200, 129}, 128);
    prefill(pocket, 150, {{33, 64}});
    Model v3(65, 128, 64, 512);
    decode(v3, {5, 130}, 64);
    return finish();
  }
  if (mode != "time") {
    std::vector<int> base = {0, 1, 62, 63, 64, 65, 126, 127, 128, 199, 999, 1023, 1024, 2047, 2048, 3332, 4095, 4999}, many(base), kimi;
    while (many.size() < 128) many.push_back(rand() % 2500);
    for (int i = 0; i < 31; i++) kimi.push_back(rand() % 3000);
    {
      Model pocket(4, 64, 32, 128);
      decode(pocket, base, 1024);
      decode(pocket, {17}, 1024);
      decode(pocket, many, 256);
      prefill(pocket, 700, {{1}, {7, 64, 100}, {33, 31}, {512}});
      prefill(pocket, 1, {{1}});
      prefill(pocket, 33, {{31}, {1, 32}});
    }
    {
      Model v3(128, 128, 64, 512);
      decode(v3, base, 1024);
      decode(v3, many, 512);
      prefill(v3, 200, {{1}, {7, 64, 100}});
      prefill(v3, 1500, {{333, 64, 100}, {512}, {1000, 31}});
    }
    {
      Model k2(64, 128, 64, 512);
      decode(k2, kimi, 1024);
      prefill(k2, 400, {{129, 1, 65}});
    }
  }
  if (mode == "" || mode == "time") times();
  return finish();
}
