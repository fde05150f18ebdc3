// PTX of compute capability 9.0 in words: barriers in shared memory with bounded waits, copies into shared memory, and wgmma. What the
// kernels of the tensor cores (gemm, expert_block, mla_decode, mla_prefill) share; the arithmetic itself is in their files.
#pragma once
#include "numerics.cuh"

// What a kernel writes into the queue's error word.
enum { ERROR_WAIT = 1, ERROR_ROWS = 2, ERROR_SHAPE = 3 };

// The address that instructions on shared memory take.
__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Barriers: `count` arrivals, and the bytes that are expected.
__device__ __forceinline__ void barrier_init(u32 b, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(count)); }
// After all of them are made, before anybody else may use them.
__device__ __forceinline__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::); }
__device__ __forceinline__ void barrier_expect(u32 b, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory"); }
__device__ __forceinline__ void barrier_arrive(u32 b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
// An arrival when this thread's copies (copy16, copy4) have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(u32 b) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(b) : "memory"); }
__device__ __forceinline__ bool barrier_try(u32 b, int phase) {
  u32 done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(b), "r"(phase) : "memory");
  return done;
}
__device__ __forceinline__ u64 now() { u64 t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t; }
// Nanoseconds: a stage takes microseconds; tools that slow the device a thousandfold still fit.
enum : u64 { LONGEST_WAIT = 4000000000ull };
// The error word lies in host memory: a look at it crosses the bus, and thousands of threads that look in every turn of a wait slow a kernel
// down hundreds of times. Nobody looks before this time is over.
enum : u64 { PATIENCE = 1000000ull };
// Whether who has waited since `start` has to go on.
__device__ __forceinline__ bool may_wait(u64 start, int* error) {
  u64 waited = now() - start;
  if (waited < PATIENCE) return true;
  if (waited > LONGEST_WAIT) atomicExch(error, ERROR_WAIT);
  return !*(volatile int*)error;
}
// Waits at most LONGEST_WAIT and gives up soon where another thread gave up before (then false): a defect ends in a flag that the host
// reads, never in a device that hangs.
__device__ __forceinline__ bool barrier_wait(u32 b, int phase, int* error) {
  if (barrier_try(b, phase)) return true;
  u64 start = now();
  while (!barrier_try(b, phase))
    if (!may_wait(start, error)) return false;
  return true;
}

// Memory to shared memory: in bulk, counted by a barrier; 16 or 4 bytes of one thread, of which those beyond `bytes` become zeros.
__device__ __forceinline__ void bulk_copy(u32 dst, const void* src, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy16(u32 dst, const void* src, int bytes) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory"); }
__device__ __forceinline__ void copy4(u32 dst, const void* src, int bytes) { asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory"); }
__device__ __forceinline__ void copies_landed() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// What this thread wrote or copied into shared memory may be read by wgmma and bulk copies.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same of all memory.
__device__ __forceinline__ void fence_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ __forceinline__ u32 bf16x2(float low, float high) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float log2_fast(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// K-major operand of 128-byte rows, 128-byte swizzle: groups of eight rows lie 1,024 bytes apart.
__device__ __forceinline__ u64 operand(u32 a) { return (u64)((a & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62; }
// The same sub-tiles read transposed (values): groups of 64 columns lie 8,192 bytes apart, groups of eight keys 1,024.
__device__ __forceinline__ u64 operand_transposed(u32 a) { return (u64)((a & 0x3FFFF) >> 4) | (u64)512 << 16 | (u64)64 << 32 | (u64)1 << 62; }

// Keeps accumulators in their registers, and other code on its side, while wgmma writes them.
template <int COUNT> __device__ __forceinline__ void hold(float* c) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(c[i])::"memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

// c [64][N] += a [64][k] b [N][k], k = 32 of e4m3 or 16 of BF16; with `keep` 0 the sum starts from zero. `bf16_transposed` takes b as [k][N];
// `bf16_from_registers` also takes a's fragment from registers, and always adds.
template <int N> struct Wgmma;
#define C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define C8(i) C4(i), C4(i + 4)
#define C16(i) C8(i), C8(i + 8)
#define C32(i) C16(i), C16(i + 16)
#define C64(i) C32(i), C32(i + 32)
#define C128(i) C64(i), C64(i + 64)
#define LIST4 "%0, %1, %2, %3"
#define LIST8 LIST4 ", %4, %5, %6, %7"
#define LIST16 LIST8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST32 LIST16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST64 LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LIST128 LIST64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// P0 ... P4: the numbers of the operands behind the accumulators.
#define WGMMA(N, COUNT, P0, P1, P2, P3, P4)                                                                                                    \
  template <> struct Wgmma<N> {                                                                                                                \
    static __device__ __forceinline__ void e4m3(float* c, u64 a, u64 b, int keep) {                                                            \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P2 ", 0;\n"                                                                              \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" LIST##COUNT "}, %" #P0 ", %" #P1 ", p, 1, 1;\n}"               \
                   : C##COUNT(0) : "l"(a), "l"(b), "r"(keep));                                                                                 \
    }                                                                                                                                          \
    static __device__ __forceinline__ void bf16(float* c, u64 a, u64 b, int keep) {                                                            \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P2 ", 0;\n"                                                                              \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST##COUNT "}, %" #P0 ", %" #P1 ", p, 1, 1, 0, 0;\n}"         \
                   : C##COUNT(0) : "l"(a), "l"(b), "r"(keep));                                                                                 \
    }                                                                                                                                          \
    static __device__ __forceinline__ void bf16_transposed(float* c, u64 a, u64 b, int keep) {                                                 \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P2 ", 0;\n"                                                                              \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST##COUNT "}, %" #P0 ", %" #P1 ", p, 1, 1, 0, 1;\n}"         \
                   : C##COUNT(0) : "l"(a), "l"(b), "r"(keep));                                                                                 \
    }                                                                                                                                          \
    static __device__ __forceinline__ void bf16_from_registers(float* c, const u32* a, u64 b) {                                                \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST##COUNT "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", 1, 1, 1, 1;" \
                   : C##COUNT(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                        \
    }                                                                                                                                          \
  }
WGMMA(8, 4, 4, 5, 6, 7, 8);
WGMMA(16, 8, 8, 9, 10, 11, 12);
WGMMA(32, 16, 16, 17, 18, 19, 20);
WGMMA(64, 32, 32, 33, 34, 35, 36);
WGMMA(128, 64, 64, 65, 66, 67, 68);
WGMMA(256, 128, 128, 129, 130, 131, 132);
#undef WGMMA
#undef C4
#undef C8
#undef C16
#undef C32
#undef C64
#undef C128
#undef LIST4
#undef LIST8
#undef LIST16
#undef LIST32
#undef LIST64
#undef LIST128
