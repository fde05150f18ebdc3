// Tests of pack.cu, quantise.cu, gemm.cu and expert_block.cu. Usage: gemm [check | time | small | block]; without arguments check and time.
// small, block: shapes for compute-sanitizer.
#include "common.h"
namespace kernels_pack {
#include "../../../crates/ops-cuda/kernels/pack.cu"
}
namespace kernels_quantise {
#include "../../../crates/ops-cuda/kernels/quantise.cu"
}
namespace kernels_gemm {
#include "../../../crates/ops-cuda/kernels/gemm.cu"
}
namespace kernels_block {
#include "../../../crates/ops-cuda/kernels/expert_block.cu"
}
using kernels_block::BlockArgs;
using namespace kernels_pack;
using namespace kernels_quantise;
using namespace kernels_gemm;
typedef unsigned char u8;

typedef void (*Kernel)(const GemmArgs);
struct Entry { int n, bytes, threads; Kernel kernel; };
static std::vector<Entry> entries(bool f8) {
  std::vector<Entry> v = f8 ? std::vector<Entry>{{8, Shape<8, 2>::BYTES, Shape<8, 2>::THREADS, gemm_fp8_n8}, {16, Shape<16, 2>::BYTES, Shape<16, 2>::THREADS, gemm_fp8_n16}, {32, Shape<32, 2>::BYTES, Shape<32, 2>::THREADS, gemm_fp8_n32}, {64, Shape<64, 2>::BYTES, Shape<64, 2>::THREADS, gemm_fp8_n64}, {128, Shape<128, 2>::BYTES, Shape<128, 2>::THREADS, gemm_fp8_n128}, {8, Shape<8, 1>::BYTES, Shape<8, 1>::THREADS, gemm_fp8_h8}, {16, Shape<16, 1>::BYTES, Shape<16, 1>::THREADS, gemm_fp8_h16}, {32, Shape<32, 1>::BYTES, Shape<32, 1>::THREADS, gemm_fp8_h32}, {64, Shape<64, 1>::BYTES, Shape<64, 1>::THREADS, gemm_fp8_h64}}
                            : std::vector<Entry>{{8, Shape<8, 2>::BYTES, Shape<8, 2>::THREADS, gemm_bf16_n8}, {16, Shape<16, 2>::BYTES, Shape<16, 2>::THREADS, gemm_bf16_n16}, {32, Shape<32, 2>::BYTES, Shape<32, 2>::THREADS, gemm_bf16_n32}, {64, Shape<64, 2>::BYTES, Shape<64, 2>::THREADS, gemm_bf16_n64}, {128, Shape<128, 2>::BYTES, Shape<128, 2>::THREADS, gemm_bf16_n128}, {8, Shape<8, 1>::BYTES, Shape<8, 1>::THREADS, gemm_bf16_h8}, {16, Shape<16, 1>::BYTES, Shape<16, 1>::THREADS, gemm_bf16_h16}, {32, Shape<32, 1>::BYTES, Shape<32, 1>::THREADS, gemm_bf16_h32}, {64, Shape<64, 1>::BYTES, Shape<64, 1>::THREADS, gemm_bf16_h64}};
  for (auto& e : v) CK(cudaFuncSetAttribute(e.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, e.bytes));
  return v;
}
static Entry entry_for(bool f8, int rows) {
  static auto f = entries(true), b = entries(false);
  auto& all = f8 ? f : b; // whole tiles first
  for (int i = 0; i < 5; i++) if (all[i].n >= rows) return all[i];
  return all[4];
}
static int* error_flag() { static Device<int> e(1); static bool zero = (e.bytes(0), true); (void)zero; return e.p; }
static void run(const Entry& e, GemmArgs a, int grid = 0) {
  a.error = error_flag();
  e.kernel<<<grid ? grid : multiprocessors(), e.threads, e.bytes>>>(a);
  CK(cudaGetLastError());
}
static void no_error(const char* what) {
  int e = 0;
  CK(cudaMemcpy(&e, error_flag(), 4, cudaMemcpyDeviceToHost));
  if (e) expect(false, "%s: a wait ran out", what);
}

// A matrix: as in a checkpoint, and packed.
struct Matrix {
  bool f8; int n, k, kb;
  Device<uint8_t> codes; Device<uint16_t> values; Device<float> ws; Device<u8> packed;
  Matrix(bool f8, int n, int k, float sd = 0.02f) : f8(f8), n(n), k(k) {
    kb = f8 ? (k + 127) / 128 : (k + 63) / 64;
    packed = Device<u8>((size_t)((n + 127) / 128) * kb * kernels_pack::TILE);
    packed.bytes(0xff);
    if (f8) {
      codes = e4m3((size_t)n * k, 100.f);
      ws = scales((size_t)((n + 127) / 128) * kb, sd / 100.f);
      pack_fp8<<<1024, 256>>>(codes.p, k, packed.p, n, k);
    } else {
      values = bf16((size_t)n * k, sd);
      pack_bf16<<<1024, 256>>>(values.p, k, 0, packed.p, 0, 1, n, k, 0);
    }
    CK(cudaGetLastError());
  }
};
struct Rows {
  bool f8; int rows, k, kb;
  Device<uint8_t> codes; Device<uint16_t> values; Device<float> xs;
  Rows(bool f8, int rows, int k) : f8(f8), rows(rows), k(k), kb((k + 127) / 128) {
    values = bf16((size_t)rows * k, 1.f);
    if (f8) {
      codes = Device<uint8_t>((size_t)rows * k);
      xs = Device<float>((size_t)rows * kb);
      codes.bytes(0x7f);
      quantise_bf16<<<256, 256>>>(values.p, k, codes.p, xs.p, nullptr, rows, k, 0);
      CK(cudaGetLastError());
    }
  }
  const u8* data() const { return f8 ? codes.p : (const u8*)values.p; }
};
__global__ void product_f64(bool f8, const uint8_t* xc, const float* xs, const uint16_t* xv, const uint8_t* wc, const float* ws, const uint16_t* wv, const int* gather, double* y, int rows, int n, int k) {
  int kb = (k + 127) / 128;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)rows * n; i += (size_t)gridDim.x * blockDim.x) {
    int c = i % n;
    size_t r = gather ? gather[i / n] : i / n;
    double s = 0;
    for (int b = 0; b < k; b++)
      s += f8 ? (double)from_e4m3(xc[r * k + b]) * xs[r * kb + b / 128] * from_e4m3(wc[(size_t)c * k + b]) * ws[(size_t)(c / 128) * kb + b / 128] : (double)from_bf16(xv[r * k + b]) * from_bf16(wv[(size_t)c * k + b]);
    y[i] = s;
  }
}
static std::vector<double> reference(const Rows& x, const Matrix& w, const int* gather = nullptr, int rows = -1) {
  if (rows < 0) rows = x.rows;
  Device<double> y((size_t)rows * w.n);
  product_f64<<<2048, 128>>>(x.f8, x.codes.p, x.xs.p, x.values.p, w.codes.p, w.ws.p, w.values.p, gather, y.p, rows, w.n, w.k);
  CK(cudaGetLastError());
  return y.get();
}
static GemmArgs dense(const Rows& x, const Matrix& w, void* y, int y_mode) {
  GemmArgs a = {};
  a.x = x.data(); a.xs = x.xs.p; a.w = w.packed.p; a.ws = w.ws.p; a.y = y;
  a.x_row = x.f8 ? x.k : x.k * 2; a.y_row = w.n; a.xs_row = x.kb; a.groups = 1; a.rows = x.rows; a.n = w.n; a.k = w.k; a.y_mode = y_mode;
  return a;
}

static void linear(bool f8, int n, int k, int rows) {
  Matrix w(f8, n, k);
  Rows x(f8, rows, k);
  auto all = entries(f8);
  auto want = reference(x, w);
  Device<uint16_t> y((size_t)rows * n);
  Device<float> z((size_t)rows * n);
  y.bytes(0xff); z.bytes(0xff);
  run(all[4], dense(x, w, y.p, Y_BF16));
  run(all[4], dense(x, w, z.p, Y_F32));
  auto base = y.get();
  auto base32 = z.get();
  double d16 = distance<uint16_t, double>(base, want, [](uint16_t v) { return (double)from_bf16(v); }, base.size());
  double d32 = distance<float, double>(base32, want, [](float v) { return (double)v; }, base32.size());
  // every tile, several counts, gathered rows: equal bits; rows beyond the count untouched
  size_t differ = 0, touched = 0;
  for (auto& e : all)
    for (int m : {0, 1, 31, 33, 128, rows}) {
      if (m > rows) continue;
      for (int gathered = 0; gathered < 2; gathered++) {
        std::vector<int> list(rows);
        for (int i = 0; i < rows; i++) list[i] = gathered ? (i * 37 + 11) % rows : i;
        Device<int> g(list);
        y.bytes(0xff);
        auto a = dense(x, w, y.p, Y_BF16);
        a.rows = m;
        a.gather = gathered ? g.p : nullptr;
        run(e, a, gathered ? 17 : 0);
        auto got = y.get();
        for (int i = 0; i < rows; i++) {
          if (i < m) differ += memcmp(&got[(size_t)i * n], &base[(size_t)list[i] * n], n * 2) != 0;
          else for (int c = 0; c < n; c++) touched += got[(size_t)i * n + c] != 0xffff;
        }
      }
    }
  no_error("linear");
  expect(d16 < 4e-3 && d32 < (f8 ? 1e-3 : 1e-6 + 3e-9 * k) && !differ && !touched, "linear %s n %d k %d rows %d: error bf16 %.1e, f32 %.1e; rows that differ over tiles, counts, gathers %zu; elements beyond the rows written %zu", f8 ? "fp8" : "bf16", n, k, rows, d16, d32, differ, touched);
}

struct Experts {
  std::vector<Matrix*> gate, up, down;
  std::vector<Device<u8>*> packed;
  std::vector<Device<float>*> s;
  Device<u64> table;
  int inner, hidden;
  bool f8;
  Experts(bool f8, int count, int inner, int hidden) : inner(inner), hidden(hidden), f8(f8) {
    std::vector<u64> t;
    for (int e = 0; e < count; e++) {
      gate.push_back(new Matrix(f8, inner, hidden)); up.push_back(new Matrix(f8, inner, hidden)); down.push_back(new Matrix(f8, hidden, inner));
      auto* p = new Device<u8>((size_t)((inner + 63) / 64) * gate[e]->kb * kernels_pack::TILE);
      packed.push_back(p);
      auto* q = new Device<float>(f8 ? gate[e]->ws.n * 2 : 1);
      s.push_back(q);
      if (f8) {
        pack_gate_up_fp8<<<1024, 256>>>(gate[e]->codes.p, up[e]->codes.p, p->p, inner, hidden);
        CK(cudaMemcpy(q->p, gate[e]->ws.p, gate[e]->ws.n * 4, cudaMemcpyDeviceToDevice));
        CK(cudaMemcpy(q->p + gate[e]->ws.n, up[e]->ws.p, up[e]->ws.n * 4, cudaMemcpyDeviceToDevice));
      } else {
        pack_gate_up_bf16<<<1024, 256>>>(gate[e]->values.p, up[e]->values.p, p->p, inner, hidden);
      }
      CK(cudaGetLastError());
      for (u64 v : {(u64)p->p, (u64)q->p, (u64)down[e]->packed.p, (u64)down[e]->ws.p}) t.push_back(v);
    }
    table = Device<u64>(t);
  }
  ~Experts() { for (auto* m : gate) delete m; for (auto* m : up) delete m; for (auto* m : down) delete m; for (auto* m : packed) delete m; for (auto* m : s) delete m; }
};
struct Block { // scratch of the grouped block
  Device<uint16_t> h, y; Device<uint8_t> hc; Device<float> hs;
  Block(int pairs, int inner, int hidden) : h((size_t)pairs * inner), y((size_t)pairs * hidden), hc((size_t)pairs * inner), hs((size_t)pairs * ((inner + 127) / 128)) {}
  void poison() { h.bytes(0xff); y.bytes(0xff); hc.bytes(0x7f); hs.bytes(0xff); }
};
static void grouped(const Experts& ex, const Rows& x, const Entry& e, const int* counts, const int* offsets, const int* gather, int groups, int pairs, const u64* table, Block& b, const int* scatter = nullptr) {
  GemmArgs a = {};
  a.x = x.data(); a.xs = x.xs.p; a.gather = gather; a.table = table; a.counts = counts; a.offsets = offsets; a.y = b.h.p;
  a.x_row = x.f8 ? x.k : x.k * 2; a.xs_row = x.kb; a.y_row = ex.inner; a.groups = groups; a.n = ex.inner; a.k = ex.hidden; a.table_at = 0; a.y_mode = Y_SWIGLU;
  run(e, a);
  if (x.f8) { quantise_bf16<<<512, 256>>>(b.h.p, ex.inner, b.hc.p, b.hs.p, nullptr, pairs, ex.inner, 0); CK(cudaGetLastError()); }
  a.x = x.f8 ? b.hc.p : (const u8*)b.h.p; a.xs = b.hs.p; a.gather = nullptr; a.y = b.y.p; a.x_row = x.f8 ? ex.inner : ex.inner * 2; a.xs_row = (ex.inner + 127) / 128; a.y_row = ex.hidden; a.n = ex.hidden; a.k = ex.inner;
  a.table_at = 2; a.y_mode = Y_BF16; a.scatter = scatter;
  run(e, a);
}
struct Fused {
  Device<u8> h; Device<float> hs; Device<unsigned> sync;
  Fused(const Experts& ex, int count) : h((size_t)count * ex.inner * 64), hs((size_t)count * (ex.inner / 128) * 64), sync(count + 2) { h.bytes(0x7f); hs.bytes(0xff); sync.bytes(0); }
};
static bool fusable(const Experts& ex, int most) { return ex.f8 && most <= 64 && ex.inner % 128 == 0 && ex.hidden % 256 == 0; }
static void fused(const Experts& ex, const Rows& x, Fused& f, const int* counts, const int* offsets, const int* gather, int groups, uint16_t* y, int grid = 0, const int* scatter = nullptr) {
  CK(cudaFuncSetAttribute(kernels_block::expert_block, cudaFuncAttributeMaxDynamicSharedMemorySize, kernels_block::BYTES));
  BlockArgs a = {x.codes.p, x.xs.p, gather, scatter, ex.table.p, counts, offsets, f.h.p, f.hs.p, y, f.sync.p, error_flag(), x.k, x.kb, groups, ex.hidden, ex.inner, 0};
  kernels_block::expert_block<<<grid ? grid : multiprocessors(), kernels_block::THREADS, kernels_block::BYTES>>>(a);
  CK(cudaGetLastError());
}
static void experts(bool f8, int count, int inner, int hidden, std::vector<int> m) {
  Experts ex(f8, count, inner, hidden);
  int pairs = 0, most = 0;
  std::vector<int> off(count), list;
  for (int e = 0; e < count; e++) { off[e] = pairs; pairs += m[e]; most = std::max(most, m[e]); }
  int distinct = std::max(1, pairs / 2);
  Rows x(f8, distinct, hidden);
  for (int p = 0; p < pairs; p++) list.push_back((p * 29 + 5) % distinct);
  Device<int> counts(m), offsets(off), gather(list);
  Block b(pairs, inner, hidden);
  auto all = entries(f8);
  std::vector<uint16_t> h0, y0;
  size_t differ = 0;
  for (int i = (int)all.size() - 1; i >= 0; i--) {
    b.poison();
    grouped(ex, x, all[i], counts.p, offsets.p, gather.p, count, pairs, ex.table.p, b);
    auto h = b.h.get(), y = b.y.get();
    if (h0.empty()) { h0 = h; y0 = y; }
    else { differ += memcmp(h.data(), h0.data(), h.size() * 2) != 0; differ += memcmp(y.data(), y0.data(), y.size() * 2) != 0; }
  }
  // results in another order
  std::vector<int> back(pairs);
  for (int p = 0; p < pairs; p++) back[p] = pairs - 1 - p;
  Device<int> scatter(back);
  for (auto& e : all) {
    Block c(pairs, inner, hidden);
    c.poison();
    grouped(ex, x, e, counts.p, offsets.p, gather.p, count, pairs, ex.table.p, c, scatter.p);
    auto got = c.y.get();
    for (int p = 0; p < pairs; p++) differ += memcmp(&got[(size_t)back[p] * hidden], &y0[(size_t)p * hidden], hidden * 2) != 0;
  }
  // the whole block in one launch, with several grids, and again with other counts
  if (fusable(ex, most)) {
    Fused f(ex, count);
    Device<uint16_t> y((size_t)pairs * hidden);
    for (int grid : {0, 0, 40, 1, 3 * multiprocessors() + 5}) {
      y.bytes(0xff);
      fused(ex, x, f, counts.p, offsets.p, gather.p, count, y.p, grid);
      differ += memcmp(y.get().data(), y0.data(), y0.size() * 2) != 0;
      y.bytes(0xff);
      fused(ex, x, f, counts.p, offsets.p, gather.p, count, y.p, grid, scatter.p);
      auto got = y.get();
      for (int p = 0; p < pairs; p++) differ += memcmp(&got[(size_t)back[p] * hidden], &y0[(size_t)p * hidden], hidden * 2) != 0;
    }
    std::vector<int> less(m);
    for (auto& v : less) v = v > 3 ? (v * 2) / 3 : v;
    Device<int> fewer(less);
    y.bytes(0xff);
    fused(ex, x, f, fewer.p, offsets.p, gather.p, count, y.p);
    auto got = y.get();
    for (int e = 0; e < count; e++)
      for (int j = 0; j < m[e]; j++)
        for (int c = 0; c < hidden; c++) { size_t i = (size_t)(off[e] + j) * hidden + c; differ += got[i] != (j < less[e] ? y0[i] : 0xffff); }
  }
  // a pair alone
  for (int e = 0; e < count; e++)
    for (int j : {0, m[e] / 2, m[e] - 1}) {
      if (j < 0 || j >= m[e]) continue;
      int p = off[e] + j;
      Device<int> one(std::vector<int>{1}), at(std::vector<int>{list[p]}), zero(std::vector<int>{0});
      Block c(1, inner, hidden);
      c.poison();
      grouped(ex, x, all[0], one.p, zero.p, at.p, 1, 1, ex.table.p + e * 4, c);
      auto y = c.y.get();
      differ += memcmp(y.data(), &y0[(size_t)p * hidden], hidden * 2) != 0;
    }
  // against double: h from the inputs, y from the device's h (and its codes)
  double hn = 0, hd = 0, yn = 0, yd = 0;
  auto hc = b.hc.get();
  auto hs = b.hs.get();
  size_t code_errors = 0;
  if (f8)
    for (int p = 0; p < pairs; p++)
      for (int blk = 0; blk < (inner + 127) / 128; blk++) {
        float amax = 1e-4f;
        for (int c = blk * 128; c < std::min(inner, blk * 128 + 128); c++) amax = std::max(amax, std::fabs(from_bf16(h0[(size_t)p * inner + c])));
        float s = amax / 448.f;
        code_errors += hs[(size_t)p * ((inner + 127) / 128) + blk] != s;
        for (int c = blk * 128; c < std::min(inner, blk * 128 + 128); c++) code_errors += hc[(size_t)p * inner + c] != __nv_cvt_float_to_fp8(from_bf16(h0[(size_t)p * inner + c]) / s, __NV_SATFINITE, __NV_E4M3);
      }
  for (int e = 0; e < count; e++) {
    if (!m[e]) continue;
    Device<int> g(std::vector<int>(list.begin() + off[e], list.begin() + off[e] + m[e]));
    auto G = reference(x, *ex.gate[e], g.p, m[e]), U = reference(x, *ex.up[e], g.p, m[e]);
    for (size_t i = 0; i < G.size(); i++) { double want = G[i] / (1 + exp(-G[i])) * U[i], got = from_bf16(h0[(size_t)off[e] * inner + i]); hn += (got - want) * (got - want); hd += want * want; }
    Rows hx(f8, m[e], inner);
    if (f8) { CK(cudaMemcpy(hx.codes.p, b.hc.p + (size_t)off[e] * inner, (size_t)m[e] * inner, cudaMemcpyDeviceToDevice)); CK(cudaMemcpy(hx.xs.p, b.hs.p + (size_t)off[e] * hx.kb, (size_t)m[e] * hx.kb * 4, cudaMemcpyDeviceToDevice)); }
    else CK(cudaMemcpy(hx.values.p, b.h.p + (size_t)off[e] * inner, (size_t)m[e] * inner * 2, cudaMemcpyDeviceToDevice));
    auto Y = reference(hx, *ex.down[e]);
    for (size_t i = 0; i < Y.size(); i++) { double got = from_bf16(y0[(size_t)off[e] * hidden + i]); yn += (got - Y[i]) * (got - Y[i]); yd += Y[i] * Y[i]; }
  }
  no_error("experts");
  double eh = sqrt(hn / (hd > 0 ? hd : 1)), ey = sqrt(yn / (yd > 0 ? yd : 1));
  expect(eh < 4e-3 && ey < 4e-3 && !differ && !code_errors, "experts %s %d of inner %d hidden %d, %d pairs (most %d): error h %.1e, y %.1e; codes off %zu; runs and lone rows that differ %zu", f8 ? "fp8" : "bf16", count, inner, hidden, pairs, most, eh, ey, code_errors, differ);
}

// What must end in the error flag, not in a device that hangs: an expert whose h is never complete, too many rows, a width that does not fit.
static void errors() {
  Experts ex(true, 2, 128, 256);
  Rows x(true, 70, 256);
  Device<uint16_t> y((size_t)140 * 256);
  auto code = [&](std::vector<int> m, unsigned drawn, int inner, int grid) {
    Device<int> counts(m), offsets(std::vector<int>{0, m[0]});
    Fused f(ex, 2);
    CK(cudaMemcpy(f.sync.p + 2, &drawn, 4, cudaMemcpyHostToDevice)); // tasks that nobody will compute
    int e = 0;
    ex.inner = inner;
    fused(ex, x, f, counts.p, offsets.p, nullptr, 2, y.p, grid);
    ex.inner = 128;
    CK(cudaDeviceSynchronize());
    CK(cudaMemcpy(&e, error_flag(), 4, cudaMemcpyDeviceToHost));
    CK(cudaMemset(error_flag(), 0, 4));
    return e;
  };
  int none = code({3, 4}, 0, 128, 0), wait = code({3, 4}, 2, 128, 1), rows = code({65, 4}, 0, 128, 0), shape = code({3, 4}, 0, 96, 0), again = code({3, 4}, 0, 128, 0);
  expect(none == 0 && wait == ERROR_WAIT && rows == ERROR_ROWS && shape == ERROR_SHAPE && again == 0, "errors of the block: fit %d, h never complete %d, 65 rows %d, inner width of 96 %d, fit again %d", none, wait, rows, shape, again);
}

static void times() {
  for (bool f8 : {true, false}) {
    for (int count : {8, 32}) {
      if (!f8 && count == 32) continue;
      Experts ex(f8, count, 2048, 7168);
      for (int m : {1, 8, 16, 32, 64, 128, 256, 1024, 4096}) {
        if (count == 32 && m > 128) continue;
        int pairs = m * count;
        Rows x(f8, pairs, 7168);
        std::vector<int> mm(count, m), off(count), list(pairs);
        for (int e = 0; e < count; e++) off[e] = e * m;
        for (int p = 0; p < pairs; p++) list[p] = (p * 29 + 5) % pairs;
        Device<int> counts(mm), offsets(off), gather(list);
        Block b(pairs, 2048, 7168);
        Entry e = entry_for(f8, m);
        GemmArgs a = {};
        a.x = x.data(); a.xs = x.xs.p; a.gather = gather.p; a.table = ex.table.p; a.counts = counts.p; a.offsets = offsets.p; a.y = b.h.p;
        a.x_row = f8 ? 7168 : 14336; a.xs_row = 56; a.y_row = 2048; a.groups = count; a.n = 2048; a.k = 7168; a.y_mode = Y_SWIGLU;
        float t1 = time_cold([&] { run(e, a); });
        a.x = f8 ? b.hc.p : (const u8*)b.h.p; a.xs = b.hs.p; a.gather = nullptr; a.y = b.y.p; a.x_row = f8 ? 2048 : 4096; a.xs_row = 16; a.y_row = 7168; a.n = 7168; a.k = 2048; a.table_at = 2; a.y_mode = Y_BF16;
        float t2 = time_cold([&] { run(e, a); });
        float t3 = time_cold([&] { grouped(ex, x, e, counts.p, offsets.p, gather.p, count, pairs, ex.table.p, b); });
        double f1 = 2.0 * pairs * 4096 * 7168, f2 = f1 / 2;
        if (fusable(ex, m)) {
          Fused f(ex, count);
          float t4 = time_cold([&] { fused(ex, x, f, counts.p, offsets.p, gather.p, count, b.y.p); });
          printf("time fp8  %d experts m %4d in one launch: %.1f us\n", count, m, t4);
        }
        printf("time %s %d experts m %4d tile %3d: gate_up %.1f us (%.0f TFLOPS), down %.1f us (%.0f), block %.1f us\n", f8 ? "fp8 " : "bf16", count, m, e.n, t1, f1 / t1 * 1e-6, t2, f2 / t2 * 1e-6, t3);
        fflush(stdout);
      }
    }
    int shapes[][2] = {{1536, 7168}, {576, 7168}, {24576, 1536}, {7168, 16384}, {8192, 8192}};
    for (auto& s : shapes) {
      Matrix w(f8, s[0], s[1]);
      for (int m : {1, 32, 128, 1024, 8192}) {
        if (m == 8192 && s[0] != 8192) continue;
        Rows x(f8, m, s[1]);
        Device<uint16_t> y((size_t)m * s[0]);
        Entry e = entry_for(f8, m);
        float t = time_cold([&] { run(e, dense(x, w, y.p, Y_BF16)); });
        float half = 0;
        if (m <= 64) { Entry h = e; for (auto& c : entries(f8)) if (c.threads == 256 && c.n >= m) { h = c; break; } half = time_cold([&] { run(h, dense(x, w, y.p, Y_BF16)); }); }
        printf("time %s dense n %5d k %5d rows %4d: %.1f us (half tiles %.1f), %.2f TB/s of weights, %.0f TFLOPS\n", f8 ? "fp8 " : "bf16", s[0], s[1], m, t, half, (double)s[0] * s[1] * (f8 ? 1 : 2) / t * 1e-6, 2.0 * m * s[0] * s[1] / t * 1e-6);
        fflush(stdout);
      }
    }
  }
}

int main(int argc, char** argv) {
  std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "block") { // the whole block alone
    experts(true, 3, 128, 256, {3, 0, 9});
    return finish();
  }
  if (mode == "small") {
    for (bool f8 : {true, false}) { linear(f8, 160, 256, 33); linear(f8, 256, 272, 129); experts(f8, 3, 128, 256, {3, 0, 9}); }
    return finish();
  }
  if (mode != "time")
    for (bool f8 : {true, false}) {
      int shapes[][3] = {{160, 256, 200}, {128, 256, 140}, {256, 128, 129}, {768, 256, 33}, {4096, 256, 128}, {256, 272, 200}, {34, 48, 64}, {576, 7168, 129}, {1536, 7168, 128}, {24576, 1536, 128}, {7168, 2048, 128}, {7168, 18432, 64}, {12288, 1536, 33}, {7168, 8192, 31}, {2112, 7168, 1}};
      for (auto& s : shapes) linear(f8, s[0], s[1], s[2]);
      experts(f8, 6, 128, 256, {3, 0, 31, 33, 1, 129});
      experts(f8, 3, 192, 272, {5, 40, 0});
      experts(f8, 4, 2048, 7168, {33, 0, 7, 128});
      experts(f8, 4, 2048, 7168, {33, 1, 0, 64});
      experts(f8, 40, 128, 256, {1, 0, 2, 3, 0, 0, 8, 9, 16, 17, 31, 32, 33, 64, 0, 0, 5, 5, 5, 5, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 40, 0, 0, 7, 0, 63, 0, 0, 1, 2});
      experts(f8, 9, 256, 512, {0, 0, 0, 0, 1, 0, 0, 0, 0});
      experts(f8, 2, 2048, 7168, {0, 0});
    }
  if (mode == "" || mode == "check") errors();
  if (mode == "" || mode == "time") times();
  return finish();
}
