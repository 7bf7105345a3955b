// Every inline-PTX statement of the project, each with a twin in C++ for the CPU (tests/cuda_cpu/ptx_twins.h).
// The PTX ISA's names, so that its manual explains them. What needs sm_90 says so; all else runs from sm_80 on.
#pragma once

typedef unsigned long long u64;
typedef u64 mbarrier;  // lies in shared memory
struct __align__(64) TensorMap { u64 words[16]; };  // of launch.tensor_map; a __grid_constant__ parameter

#ifndef CUQWEN_CPU

__device__ constexpr int cluster_of(int blocks) { return blocks; }

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
// The same at once; mbarrier_try_wait may take its time.
__device__ __forceinline__ bool mbarrier_test_wait(mbarrier* b, unsigned parity) {
    unsigned done;
    asm volatile("{\n .reg .pred p;\n mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
    return done;
}
__device__ __forceinline__ void mbarrier_wait(mbarrier* b, unsigned parity) {
    while (!mbarrier_try_wait(b, parity)) {}
}
// Copies `bytes` (a multiple of 16) from global to shared memory, both 16-byte aligned, and counts them into the barrier. For
// what is read once: it leaves the L2 cache first, and what is read again can stay.
__device__ __forceinline__ void bulk_copy_once(void* shared, const void* global, unsigned bytes, mbarrier* b) {
    asm volatile(
        "{\n .reg .b64 policy;\n createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n}" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(b))
        : "memory");
}
// Between this thread's ordinary accesses to shared memory and bulk copies that it issues afterwards to the same place.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for all memory, also what other threads wrote before this one heard of it.
__device__ __forceinline__ void fence_proxy_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

// ---- tiles by the copy engine, clusters of blocks (sm_90) ----

// As bulk_copy_once, a box of the matrix that the map describes (launch.tensor_map), from its element `column` of row `row` on; rows
// and columns outside of the matrix are zeros, negative ones too, and count. In shared memory (128-byte aligned) a row takes 128
// bytes, and the 16-byte piece p of the row at address a lies at place p ^ a / 128 % 8: of row r at p ^ r % 8 from a multiple of 1024 on.
__device__ __forceinline__ void bulk_copy_2d(void* shared, const TensorMap* map, int column, int row, mbarrier* b) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                     shared_address(shared)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(b))
                 : "memory");
}
// The same into every block of the cluster whose bit is set in `blocks`, at the same place, and into their barriers at b's place.
__device__ __forceinline__ void bulk_copy_2d_to(void* shared, const TensorMap* map, int column, int row, mbarrier* b, unsigned blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], "
        "%5;" ::"r"(shared_address(shared)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(b)), "h"((unsigned short)blocks)
        : "memory");
}
// Brings the map itself nearer, some time before its first use.
__device__ __forceinline__ void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// Arrives at the barrier that lies at b's place in another block of the cluster, or in this one.
__device__ __forceinline__ void mbarrier_arrive_in(mbarrier* b, int block) {
    asm volatile("{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n"
                 " mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(b)),
                 "r"(block)
                 : "memory");
}
// A barrier of all threads of a cluster, which orders no memory accesses but what fence_mbarrier_init has covered.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
}

// ---- products by a warpgroup, four warps of which the first is a multiple of four (sm_90a) ----

// Moves registers between the warps of a block: all warps of a warpgroup, N a multiple of 8.
template <int N> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// What wgmma reads: rows of 16 elements along k, as bulk_copy_2d lays them, 8 to 1,024 bytes. Plus 2 for the next 16 elements.
__device__ __forceinline__ u64 matrix_descriptor(const void* shared) {
    return 1ull << 62 | 64ull << 32 | 1ull << 16 | (shared_address(shared) & 0x3ffff) >> 4;
}
// Before the first wgmma, and before the next one whenever this thread could touch the accumulators in between.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for this warp's part of all groups but the newest N: their operands have been read, their accumulators may be touched.
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// d [64, n] = a [64, 16] b [n, 16]^T (+ d, if `add`), bf16 products, float32 sums. With w = warp % 4, g = lane / 4, i = lane % 4: d[j] =
// rows 16 w + g, g, g + 8, g + 8, columns 8 j + 2 i, 8 j + 2 i + 1 in turn.
#define ACCUMULATORS_4(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define ACCUMULATORS_16(d, j) ACCUMULATORS_4(d, j), ACCUMULATORS_4(d, j + 1), ACCUMULATORS_4(d, j + 2), ACCUMULATORS_4(d, j + 3)
#define ACCUMULATORS_64(d, j) ACCUMULATORS_16(d, j), ACCUMULATORS_16(d, j + 4), ACCUMULATORS_16(d, j + 8), ACCUMULATORS_16(d, j + 12)
__device__ __forceinline__ void wgmma_m64n64(float (&d)[8][4], u64 a, u64 b, int add) {
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, p, 1, 1, 0, 0;\n}"
        : ACCUMULATORS_16(d, 0), ACCUMULATORS_16(d, 4)
        : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma_m64n128(float (&d)[16][4], u64 a, u64 b, int add) {
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
        "%59, %60, %61, %62, %63"
        "}, %64, %65, p, 1, 1, 0, 0;\n}"
        : ACCUMULATORS_64(d, 0)
        : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma_m64n256(float (&d)[32][4], u64 a, u64 b, int add) {
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
        "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "
        "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, "
        "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "
        "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, %128, %129, p, 1, 1, 0, 0;\n}"
        : ACCUMULATORS_64(d, 0), ACCUMULATORS_64(d, 16)
        : "l"(a), "l"(b), "r"(add));
}
// d [64, n] += a [64, 16] b [16, n]: a in registers, of each warp its 16 rows as mma_bf16 has them, not to be changed before it is
// waited for; b 16 rows of 64 elements as bulk_copy_2d lays them, those of the next 64 columns `step` bytes further. Plus 128 for
// the next 16 rows.
__device__ __forceinline__ void wgmma_m64n128_rows(float (&d)[16][4], const unsigned (&a)[4], u64 b, int step) {
    asm volatile(
        "{\n .reg .pred p;\n setp.eq.b32 p, 0, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
        : ACCUMULATORS_64(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b + ((u64)(step / 16 - 1) << 16)));
}
__device__ __forceinline__ void wgmma_m64n64_rows(float (&d)[8][4], const unsigned (&a)[4], u64 b) {
    asm volatile(
        "{\n .reg .pred p;\n setp.eq.b32 p, 0, 0;\n wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
        : ACCUMULATORS_16(d, 0), ACCUMULATORS_16(d, 4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// d, of which the compiler knows nothing: called after wgmma_wait, no use of d can come before it, and before wgmma_fence, no write
// after it.
template <int N> __device__ __forceinline__ void wgmma_touch(float (&d)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++) asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}

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
// As store_relaxed and load_relaxed, for memory of the host, which it may look at and change meanwhile.
__device__ __forceinline__ void store_host(int* p, int x) {
    asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
__device__ __forceinline__ int load_host(const int* p) {
    int x;
    asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
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

// ---- launches that overlap (sm_90; before it, one starts when the one before has ended) ----

// Lets the next launch start on what room there is, once all blocks of this one have started and come here.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Waits until the launches before this one have ended and what they wrote is there. Each of them must do so too.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- for the compiler ----

// p, of which the compiler knows nothing: what is read through it is not read earlier, even where `__restrict__` allows it.
template <class T> __device__ __forceinline__ T* opaque_pointer(T* p) {
    asm volatile("" : "+l"(p));
    return p;
}

// x, of which the compiler knows nothing: what is computed from it stays where it stands, instead of being kept in a register
// from far above.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

#else
#include <ptx_twins.h>
#endif
