// The CPU's side of kernels/ptx.cuh: the same functions with the same parameters, and the place of the call for reports.
// What reads or writes global memory stands here and not in runtime.cpp, so that the sanitizers see it.
#pragma once
#include "cuda_cpu.h"

// ---- asynchronous copies of 16 bytes by each thread ----

inline void cp_async16(void* shared, const void* global, int bytes = 16, emu::Site site = {}) {
    if (bytes < 0 || bytes > 16) emu::fail("cp_async16 (%s:%d): bytes: wanted 0 to 16, got %d", site.file, site.line, bytes);
    emu::check_shared("cp_async16", site, shared, 16, 16);
    emu::check_global("cp_async16", site, global, bytes, 16);
    unsigned char data[16];
    if (bytes) memcpy(data, global, bytes);
    emu::async_copy("cp_async16", site, shared, global, data, bytes);
}
inline void cp_async_commit() { emu::async_commit(); }
template <int N> inline void cp_async_wait() {
    static_assert(N >= 0, "groups that may be on their way");
    emu::async_wait(N);
}

// ---- matrix fragments ----

inline void ldmatrix_x4(unsigned (&r)[4], const void* row, emu::Site site = {}) {
    emu::MatrixRow mine{{}, r};
    emu::check_shared("ldmatrix_x4", site, row, 16, 16);
    memcpy(mine.row, row, 16);
    emu::warp_meet("ldmatrix_x4", site, 0xffffffffu, &mine, emu::load_matrices);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, emu::Site site = {}) {
    emu::MatrixRow mine{{}, r};
    emu::check_shared("ldmatrix_x4_trans", site, row, 16, 16);
    memcpy(mine.row, row, 16);
    emu::warp_meet("ldmatrix_x4_trans", site, 0xffffffffu, &mine, emu::load_matrices_transposed);
}
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, emu::Site site = {}) {
    emu::Fragments mine{d, a, {b0, b1}};
    emu::warp_meet("mma_bf16", site, 0xffffffffu, &mine, emu::multiply_fragments);
}

// ---- barriers in shared memory and bulk copies ----

inline void mbarrier_init(mbarrier* b, unsigned count, emu::Site site = {}) { emu::mbarrier_init("mbarrier_init", site, b, count); }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(mbarrier* b, emu::Site site = {}) { emu::mbarrier_arrive("mbarrier_arrive", site, b, 0); }
inline void mbarrier_arrive_expect(mbarrier* b, unsigned bytes, emu::Site site = {}) {
    emu::mbarrier_arrive("mbarrier_arrive_expect", site, b, bytes);
}
inline bool mbarrier_try_wait(mbarrier* b, unsigned parity, emu::Site site = {}) {
    if (emu::mbarrier_ended("mbarrier_try_wait", site, b, parity)) return true;
    emu::mbarrier_poll("mbarrier_try_wait", site, b);
    return emu::mbarrier_ended("mbarrier_try_wait", site, b, parity);
}
inline bool mbarrier_test_wait(mbarrier* b, unsigned parity, emu::Site site = {}) {
    return emu::mbarrier_ended("mbarrier_test_wait", site, b, parity);
}
inline void mbarrier_wait(mbarrier* b, unsigned parity, emu::Site site = {}) {
    while (!emu::mbarrier_ended("mbarrier_wait", site, b, parity)) emu::mbarrier_poll("mbarrier_wait", site, b);
}
inline void bulk_copy_once(void* shared, const void* global, unsigned bytes, mbarrier* b, emu::Site site = {}) {
    memcpy(emu::bulk_copy("bulk_copy_once", site, shared, global, bytes, bytes, b), global, bytes);
    emu::bulk_copy_issued("bulk_copy_once", site, b);
}
inline void fence_proxy_async() {}
inline void fence_proxy_async_all() {}

// ---- tiles by the copy engine, clusters of blocks: each block is a cluster of its own ----

constexpr int cluster_of(int) { return 1; }

// `words` as tests/emulator.py's tensor_map makes them.
inline void bulk_copy_2d(void* shared, const TensorMap* map, int column, int row, mbarrier* b, emu::Site site = {}) {
    if (map->words[4] != 0x70616d726f736e74) emu::fail("bulk_copy_2d (%s:%d): this is no map of launch.tensor_map", site.file, site.line);
    const auto from = reinterpret_cast<const unsigned char*>(map->words[0]);
    const long rows = map->words[1], columns = map->words[2], box_rows = map->words[3];
    emu::check_shared("bulk_copy_2d", site, shared, 128 * box_rows, 128);
    const long turn = reinterpret_cast<u64>(shared) / 128;  // pieces are exchanged by their address
    for (long r = 0; r < box_rows; r++)
        for (long p = 0; p < 8; p++) {
            const long t = row + r, c = column + 8 * p;
            const unsigned bytes = t >= 0 && t < rows && c >= 0 && c < columns ? 16 : 0;
            const unsigned char* const piece = bytes ? from + 2 * (t * columns + c) : from;
            void* const to = static_cast<unsigned char*>(shared) + 128 * r + 16 * (p ^ (turn + r) % 8);
            unsigned char* const data = emu::bulk_copy("bulk_copy_2d", site, to, piece, 16, bytes, b);
            if (bytes) memcpy(data, piece, bytes);
        }
    emu::bulk_copy_issued("bulk_copy_2d", site, b);
}
inline void bulk_copy_2d_to(void* shared, const TensorMap* map, int column, int row, mbarrier* b, unsigned blocks, emu::Site site = {}) {
    if (blocks != 1) emu::fail("bulk_copy_2d_to (%s:%d): blocks: wanted 1, a cluster of one block, got %u", site.file, site.line, blocks);
    bulk_copy_2d(shared, map, column, row, b, site);
}
inline void prefetch_map(const TensorMap* map) { (void)map; }
inline void mbarrier_arrive_in(mbarrier* b, int block, emu::Site site = {}) {
    if (block) emu::fail("mbarrier_arrive_in (%s:%d): block: wanted 0, a cluster of one block, got %d", site.file, site.line, block);
    emu::mbarrier_arrive("mbarrier_arrive_in", site, b, 0);
}
inline void cluster_barrier(emu::Site site = {}) { emu::block_barrier("cluster_barrier", site, false); }

// ---- products by a warpgroup ----

template <int N> inline void more_registers() { static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers a thread"); }
template <int N> inline void fewer_registers() { static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers a thread"); }

inline u64 matrix_descriptor(const void* shared, emu::Site site = {}) {
    emu::check_shared("matrix_descriptor", site, shared, 16, 16);
    return reinterpret_cast<u64>(shared) / 16;
}
inline void wgmma_fence(emu::Site site = {}) {
    emu::WarpgroupWait mine{"wgmma_fence", site, 0};
    emu::warp_meet(mine.what, site, 0xffffffffu, &mine, emu::fence_warpgroup);
}
inline void wgmma_commit(emu::Site site = {}) {
    emu::WarpgroupWait mine{"wgmma_commit", site, 0};
    emu::warp_meet(mine.what, site, 0xffffffffu, &mine, emu::commit_warpgroup);
}
template <int N> inline void wgmma_wait(emu::Site site = {}) {
    emu::WarpgroupWait mine{"wgmma_wait", site, N};
    emu::warp_meet(mine.what, site, 0xffffffffu, &mine, emu::wait_warpgroup);
}
inline void wgmma_m64n64(float (&d)[8][4], u64 a, u64 b, int add, emu::Site site = {}) {
    emu::WarpgroupProduct mine{"wgmma_m64n64", site, d, a, b, 64, add};
    emu::warp_meet(mine.what, site, 0xffffffffu, &mine, emu::multiply_warpgroup);
}
inline void wgmma_m64n128(float (&d)[16][4], u64 a, u64 b, int add, emu::Site site = {}) {
    emu::WarpgroupProduct mine{"wgmma_m64n128", site, d, a, b, 128, add, nullptr, 0};
    emu::warp_meet(mine.what, site, 0xffffffffu, &mine, emu::multiply_warpgroup);
}
inline void wgmma_m64n256(float (&d)[32][4], u64 a, u64 b, int add, emu::Site site = {}) {
    emu::WarpgroupProduct mine{"wgmma_m64n256", site, d, a, b, 256, add, nullptr, 0};
    emu::warp_meet(mine.what, site, 0xffffffffu, &mine, emu::multiply_warpgroup);
}
inline void wgmma_m64n128_rows(float (&d)[16][4], const unsigned (&a)[4], u64 b, int step, emu::Site site = {}) {
    emu::WarpgroupProduct mine{"wgmma_m64n128_rows", site, d, 0, b, 128, 1, a, step};
    emu::warp_meet(mine.what, site, 0xffffffffu, &mine, emu::multiply_warpgroup);
}
inline void wgmma_m64n64_rows(float (&d)[8][4], const unsigned (&a)[4], u64 b, emu::Site site = {}) {
    emu::WarpgroupProduct mine{"wgmma_m64n64_rows", site, d, 0, b, 64, 1, a, 0};
    emu::warp_meet(mine.what, site, 0xffffffffu, &mine, emu::multiply_warpgroup);
}
template <int N> inline void wgmma_touch(float (&d)[N][4]) { (void)d; }

// ---- part of a block ----

inline void named_barrier(int id, int threads, emu::Site site = {}) { emu::named_barrier("named_barrier", site, id, threads); }

inline void prefetch_l2(const void* p, emu::Site site = {}) { emu::check_global("prefetch_l2", site, p, 1, 1); }

// ---- memory that other blocks write meanwhile ----
// Who looks again and finds what was there before lets others run first; new values are read without delay.

namespace emu {
template <class T> inline T look(const char* what, Site site, const T* p) {
    T x = __atomic_load_n(p, __ATOMIC_ACQUIRE);
    if (seen_before(p, x, what, site)) x = __atomic_load_n(p, __ATOMIC_ACQUIRE);
    return x;
}
template <class T> inline void check_aligned(const char* what, Site site, const T* p, size_t alignment = sizeof(T)) {
    check_global(what, site, p, alignment, alignment);
}
}  // namespace emu

inline void store_relaxed(u64* p, u64 x, emu::Site site = {}) {
    emu::check_aligned("store_relaxed", site, p);
    __atomic_store_n(p, x, __ATOMIC_RELAXED);
    emu::progress();
}
inline u64 load_relaxed(const u64* p, emu::Site site = {}) {
    emu::check_aligned("load_relaxed", site, p);
    return emu::look("load_relaxed", site, p);
}
inline void load_relaxed2(const u64* p, u64& x, u64& y, emu::Site site = {}) {
    emu::check_aligned("load_relaxed2", site, p, 16);
    if (emu::coin()) x = emu::look("load_relaxed2", site, p), y = emu::look("load_relaxed2", site, p + 1);
    else y = emu::look("load_relaxed2", site, p + 1), x = emu::look("load_relaxed2", site, p);
}
inline void store_relaxed2(u64* p, u64 x, u64 y, emu::Site site = {}) {
    emu::check_aligned("store_relaxed2", site, p, 16);
    const bool first = emu::coin();
    __atomic_store_n(p + !first, first ? x : y, __ATOMIC_RELAXED);
    emu::breathe();
    __atomic_store_n(p + first, first ? y : x, __ATOMIC_RELAXED);
    emu::progress();
}
inline void store_host(int* p, int x, emu::Site site = {}) {
    emu::check_aligned("store_host", site, p);
    __atomic_store_n(p, x, __ATOMIC_RELAXED);
    emu::progress();
}
inline int load_host(const int* p, emu::Site site = {}) {
    emu::check_aligned("load_host", site, p);
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

inline u64 global_timer() { return emu::clock_ns(); }

// ---- launches that overlap ----

inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait(emu::Site site = {}) { emu::launches_before_end("griddepcontrol_wait", site); }

// ---- for the compiler ----

inline int opaque(int x) { return x; }
template <class T> inline T* opaque_pointer(T* p) { return p; }
