// Every inline-PTX statement of the project, each with a twin in C++ for the CPU (tests/cuda_cpu/ptx_twins.h).
// The PTX ISA's names, so that its manual explains them. What needs sm_90 says so; all else runs from sm_80 on.
#pragma once

typedef unsigned long long u64;
typedef u64 mbarrier;  // lies in shared memory

#ifndef CUQWEN_CPU

#define DYNAMIC_SHARED(T, name)                                  \
    extern __shared__ __align__(1024) unsigned char name##_bytes[]; \
    T* name = reinterpret_cast<T*>(name##_bytes)

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// ---- asynchronous copies of 16 bytes by each thread (sm_80) ----

// Copies the first `bytes` (0 to 16) and writes zeros behind them; with 0 the source is not read. Both ends 16-byte aligned.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies but the newest N groups; a barrier makes them visible to other threads.
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- matrix fragments ----

// Four 8x8 matrices of 16-bit elements: lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i (16 bytes each,
// aligned); r[i] gets elements 2 (lane % 4), + 1 of row lane / 4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// d [16, 8] += a [16, 16] b [16, 8], bf16 products, float32 sums. With g = lane / 4, i = lane % 4: d = rows g, g, g + 8, g + 8,
// columns 2 i, 2 i + 1 in turn; a = (row g, k 2 i), (g + 8, 2 i), (g, 2 i + 8), (g + 8, 2 i + 8), pairs along k;
// b0 = (k 2 i, column g), b1 = (k 2 i + 8, column g), pairs along k.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- barriers in shared memory and bulk copies (sm_90) ----

// One thread; afterwards fence_mbarrier_init and a block barrier before anybody uses it. A phase ends when `count` arrivals
// and all bytes that they announced are there.
__device__ __forceinline__ void mbarrier_init(mbarrier* b, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(mbarrier* b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives, and lets the phase wait for `bytes` more of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(mbarrier* b, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Whether the phase of this parity has ended (the first phase has parity 0; before it, parity 1 counts as ended).
__device__ __forceinline__ bool mbarrier_try_wait(mbarrier* b, unsigned parity) {
    unsigned done;
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
    return done;
}
__device__ __forceinline__ void mbarrier_wait(mbarrier* b, unsigned parity) {
    while (!mbarrier_try_wait(b, parity)) {}
}
// Copies `bytes` (a multiple of 16) from global to shared memory, both 16-byte aligned, and counts them into the barrier.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, unsigned bytes, mbarrier* b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(b))
                 : "memory");
}
// Between this thread's ordinary accesses to shared memory and bulk copies that it issues afterwards to the same place.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- part of a block ----

// A barrier of `threads` threads of the block (whole warps); ids 1 to 15, 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- memory that other blocks write meanwhile ----

__device__ __forceinline__ void store_relaxed(u64* p, u64 x) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}
__device__ __forceinline__ u64 load_relaxed(const u64* p) {
    u64 x;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
    return x;
}
// Two words at a 16-byte aligned address; each is whole, the two need not be of one time.
__device__ __forceinline__ void load_relaxed2(const u64* p, u64& x, u64& y) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(x), "=l"(y) : "l"(p) : "memory");
}
__device__ __forceinline__ void store_relaxed2(u64* p, u64 x, u64 y) {
    asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(p), "l"(x), "l"(y) : "memory");
}
// What this thread wrote before is visible to whoever reads the new count with load_acquire.
__device__ __forceinline__ void add_release(unsigned* p, unsigned x) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
    unsigned x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

// Nanoseconds, the same for all blocks; advances in steps of up to a microsecond.
__device__ __forceinline__ u64 global_timer() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

// Brings the 128 bytes around p into the L2 cache, some time.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- for the compiler ----

// x, of which the compiler knows nothing: what is computed from it stays where it stands, instead of being kept in a register
// from far above.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

#else
#include <ptx_twins.h>
#endif
