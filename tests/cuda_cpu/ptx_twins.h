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
inline void mbarrier_wait(mbarrier* b, unsigned parity, emu::Site site = {}) {
    while (!emu::mbarrier_ended("mbarrier_wait", site, b, parity)) emu::mbarrier_poll("mbarrier_wait", site, b);
}
inline void bulk_copy(void* shared, const void* global, unsigned bytes, mbarrier* b, emu::Site site = {}) {
    memcpy(emu::bulk_copy("bulk_copy", site, shared, global, bytes, b), global, bytes);
    emu::bulk_copy_issued("bulk_copy", site, b);
}
inline void fence_proxy_async() {}

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
inline void add_release(unsigned* p, unsigned x, emu::Site site = {}) {
    emu::check_aligned("add_release", site, p);
    __atomic_fetch_add(p, x, __ATOMIC_RELEASE);
    emu::progress();
}
inline unsigned load_acquire(const unsigned* p, emu::Site site = {}) {
    emu::check_aligned("load_acquire", site, p);
    return emu::look("load_acquire", site, p);
}

inline u64 global_timer() { return emu::clock_ns(); }

// ---- for the compiler ----

inline int opaque(int x) { return x; }
