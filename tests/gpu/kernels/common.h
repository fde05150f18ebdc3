// What the device tests of the kernels share. Tests are programs of their own (static CUDA runtime, no cargo): nvcc builds them beside the
// kernels, they run where a card is. Each prints what it measured and ends with "N passed, N failed".
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <string>
#include <vector>

// Before the kernels, which the tests include in namespaces of their own.
#include "../../../crates/ops-cuda/kernels/hopper.cuh"

#define CK(x)                                                                    \
  do {                                                                           \
    cudaError_t e_ = (x);                                                        \
    if (e_ != cudaSuccess) {                                                     \
      printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e_));          \
      printf("%d passed, %d failed\n", passed, failed + 1);                      \
      exit(1);                                                                   \
    }                                                                            \
  } while (0)

static int passed = 0, failed = 0;
static void expect(bool ok, const char* format, ...) {
  va_list args;
  va_start(args, format);
  (ok ? passed : failed)++;
  printf("%s ", ok ? "ok  " : "FAIL");
  vprintf(format, args);
  printf("\n");
  fflush(stdout);
  va_end(args);
}

template <class T> struct Device {
  T* p = nullptr;
  size_t n = 0;
  Device() {}
  explicit Device(size_t count) : n(count) { CK(cudaMalloc(&p, (count + 64) * sizeof(T))); }
  explicit Device(const std::vector<T>& v) : Device(v.size()) { CK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice)); }
  Device(const Device&) = delete;
  Device(Device&& o) : p(o.p), n(o.n) { o.p = nullptr; }
  Device& operator=(Device&& o) { std::swap(p, o.p); std::swap(n, o.n); return *this; }
  ~Device() { if (p) cudaFree(p); }
  std::vector<T> get() const { std::vector<T> v(n); CK(cudaDeviceSynchronize()); CK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost)); return v; }
  void bytes(int value) { CK(cudaMemset(p, value, n * sizeof(T))); }
};

__device__ __forceinline__ float gauss(uint64_t i, uint32_t seed) {
  uint64_t x = i * 0x9E3779B97F4A7C15ull + (uint64_t)seed * 0xD1B54A32D192ED03ull;
  x ^= x >> 30; x *= 0xBF58476D1CE4E5B9ull; x ^= x >> 27; x *= 0x94D049BB133111EBull; x ^= x >> 31;
  float u = ((uint32_t)x + 1.f) * 2.3283064e-10f, v = (uint32_t)(x >> 32) * 2.3283064e-10f;
  return sqrtf(-2.f * logf(fminf(u, 1.f))) * cospif(2 * v);
}
__global__ void fill_e4m3(uint8_t* p, size_t n, uint32_t seed, float sd) { for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) p[i] = __nv_cvt_float_to_fp8(gauss(i, seed) * sd, __NV_SATFINITE, __NV_E4M3); }
__global__ void fill_bf16(uint16_t* p, size_t n, uint32_t seed, float sd) { for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) p[i] = __bfloat16_as_ushort(__float2bfloat16(gauss(i, seed) * sd)); }
__global__ void fill_scale(float* p, size_t n, uint32_t seed, float s) { for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) p[i] = s * exp2f(gauss(i, seed) * 0.5f); }
static uint32_t seed_of_run() { static uint32_t seed = getenv("SEED") ? (uint32_t)atoi(getenv("SEED")) : (uint32_t)time(nullptr); static bool said = (printf("SEED=%u\n", seed), true); (void)said; return seed = seed * 1664525u + 1013904223u; }
static Device<uint8_t> e4m3(size_t n, float sd) { Device<uint8_t> d(n); fill_e4m3<<<1024, 256>>>(d.p, n, seed_of_run(), sd); CK(cudaGetLastError()); return d; }
static Device<uint16_t> bf16(size_t n, float sd) { Device<uint16_t> d(n); fill_bf16<<<1024, 256>>>(d.p, n, seed_of_run(), sd); CK(cudaGetLastError()); return d; }
static Device<float> scales(size_t n, float s) { Device<float> d(n); fill_scale<<<256, 256>>>(d.p, n, seed_of_run(), s); CK(cudaGetLastError()); return d; }

__host__ __device__ inline float from_bf16(uint16_t v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
__host__ __device__ inline float from_e4m3(uint8_t v) {
  int e = (v >> 3) & 15, m = v & 7;
  float f = e ? ldexpf(1.f + m / 8.f, e - 7) : ldexpf(m / 8.f, -6);
  return v & 0x80 ? -f : f;
}

template <class A, class B> static double distance(const std::vector<A>& got, const std::vector<B>& want, std::function<double(A)> value, size_t count) {
  double num = 0, den = 0;
  for (size_t i = 0; i < count; i++) { double d = value(got[i]) - (double)want[i]; num += d * d; den += (double)want[i] * want[i]; }
  return sqrt(num / (den > 0 ? den : 1));
}

// Median of 30 launches in microseconds, each after 256 MB of other writes (L2 is cold).
static float time_cold(std::function<void()> launch, int repeats = 30) {
  static Device<uint8_t> flush(size_t(256) << 20);
  cudaEvent_t a, b;
  cudaEventCreate(&a);
  cudaEventCreate(&b);
  std::vector<float> times;
  for (int i = 0; i < repeats + 3; i++) {
    flush.bytes(i);
    cudaEventRecord(a);
    launch();
    cudaEventRecord(b);
    CK(cudaEventSynchronize(b));
    float t;
    cudaEventElapsedTime(&t, a, b);
    if (i >= 3) times.push_back(t * 1000);
  }
  CK(cudaGetLastError());
  cudaEventDestroy(a);
  cudaEventDestroy(b);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}
static int multiprocessors() { static int n = [] { int v; cudaDeviceGetAttribute(&v, cudaDevAttrMultiProcessorCount, 0); return v; }(); return n; }
static int finish() {
  CK(cudaDeviceSynchronize());
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
