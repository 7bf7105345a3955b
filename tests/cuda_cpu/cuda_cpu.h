// CUDA C++ for the CPU: what our kernels use of the language and its library, in terms of runtime.h. Included before
// a kernel's source by build.py; kernels need no change, as long as dynamic shared memory is declared by
// DYNAMIC_SHARED and inline PTX stands in ptx.cuh, whose C++ twins in ptx_twins.h call emu::warp_meet for what a warp
// does together and emu::poll wherever they wait for memory to change.
//
// Not here, so that a use does not compile: what a kernel of ours should not use (printf-style debugging aside), among
// them __activemask, the intrinsics without _sync, and arithmetic on bf16x2 and half2.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "runtime.h"

// ---- keywords ----

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static __thread  // one block per OS thread at a time; __thread refuses initialisers as CUDA does
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emu::current->dynamic_shared)

#define threadIdx (emu::current->index)
#define blockIdx (emu::current->block_index)
#define blockDim (emu::current->block_size)
#define gridDim (emu::current->grid_size)
#define warpSize 32

// ---- vector types, aligned as on the GPU, so that UBSan sees a misaligned wide access ----

#define EMU_VECTOR(T, name, align2, align4)                                 \
    struct name##1 { T x; };                                                \
    struct alignas(align2) name##2 { T x, y; };                             \
    struct alignas(align4) name##4 { T x, y, z, w; };                       \
    inline name##1 make_##name##1(T x) { return {x}; }                      \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }              \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define EMU_VECTOR3(T, name) struct name { T x, y, z; }; EMU_MAKE3(T, name)
#define EMU_MAKE3(T, name) inline name make_##name(T x, T y, T z) { return {x, y, z}; }
EMU_VECTOR(signed char, char, 2, 4) EMU_VECTOR3(signed char, char3)
EMU_VECTOR(unsigned char, uchar, 2, 4) EMU_VECTOR3(unsigned char, uchar3)
EMU_VECTOR(short, short, 4, 8) EMU_VECTOR3(short, short3)
EMU_VECTOR(unsigned short, ushort, 4, 8) EMU_VECTOR3(unsigned short, ushort3)
EMU_VECTOR(int, int, 8, 16) EMU_VECTOR3(int, int3)
EMU_VECTOR(unsigned, uint, 8, 16) EMU_MAKE3(unsigned, uint3)  // runtime.h declares uint3
EMU_VECTOR(long long, longlong, 16, 16) EMU_VECTOR3(long long, longlong3)
EMU_VECTOR(unsigned long long, ulonglong, 16, 16) EMU_VECTOR3(unsigned long long, ulonglong3)
EMU_VECTOR(float, float, 8, 16) EMU_VECTOR3(float, float3)
EMU_VECTOR(double, double, 16, 16) EMU_VECTOR3(double, double3)

// ---- bits ----

inline int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
inline float __int_as_float(int i) { float x; memcpy(&x, &i, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned i; memcpy(&i, &x, 4); return i; }
inline float __uint_as_float(unsigned i) { float x; memcpy(&x, &i, 4); return x; }
inline long long __double_as_longlong(double x) { long long i; memcpy(&i, &x, 8); return i; }
inline double __longlong_as_double(long long i) { double x; memcpy(&x, &i, 8); return x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) { unsigned r = 0; for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i); return r; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline int __mulhi(int a, int b) { return (long long)a * b >> 32; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned s = selector >> (4 * i), byte = both >> (8 * (s & 7)) & 0xff;
        r |= (s & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
    }
    return r;
}

// ---- mathematics ----
// The C library's functions are closer to the truth than the GPU's (and the fast ones, __expf and its kin, much closer):
// compare with tolerances. fmaf is exact here and there, sqrtf and division are rounded correctly here and there.

inline float rsqrtf(float x) { return float(1.0 / sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return float(pow(10.0, x)); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __double2float_rn(double x) { return float(x); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }

// CUDA's overloads: the usual conversions for integers, and for floating point the number where one is NaN.
#define EMU_MIN_MAX(T)                                 \
    inline T min(T a, T b) { return b < a ? b : a; }   \
    inline T max(T a, T b) { return a < b ? b : a; }
EMU_MIN_MAX(int) EMU_MIN_MAX(unsigned) EMU_MIN_MAX(long) EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long) EMU_MIN_MAX(unsigned long long)
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- memory ----

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldca(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldlu(const T* p) { return *p; }
template <class T> inline T __ldcv(const T* p) { return *const_cast<const volatile T*>(p); }
template <class T> inline void __stwb(T* p, T x) { *p = x; }
template <class T> inline void __stcg(T* p, T x) { *p = x; }
template <class T> inline void __stcs(T* p, T x) { *p = x; }
template <class T> inline void __stwt(T* p, T x) { *p = x; }

inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned, emu::Site site = {}) { emu::poll("__nanosleep", site); }
inline long long clock64() { return emu::clock_ns(); }

namespace emu {
template <class T> struct Given { typedef T type; };  // an argument that takes no part in deducing T
template <class T, class F> inline T update(T* p, F f) {
    T old, next;
    __atomic_load(p, &old, __ATOMIC_SEQ_CST);
    do next = f(old);
    while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    if (memcmp(&old, &next, sizeof(T))) progress();
    return old;
}
}  // namespace emu
#define EMU_ATOMIC(name, expression)                                                                                  \
    template <class T> inline T name(T* p, typename emu::Given<T>::type x) {                                          \
        return emu::update(p, [x](T old) -> T { return expression; });                                                \
    }
EMU_ATOMIC(atomicAdd, old + x)
EMU_ATOMIC(atomicSub, old - x)
EMU_ATOMIC(atomicExch, ((void)old, x))
EMU_ATOMIC(atomicMin, x < old ? x : old)
EMU_ATOMIC(atomicMax, old < x ? x : old)
EMU_ATOMIC(atomicAnd, old & x)
EMU_ATOMIC(atomicOr, old | x)
EMU_ATOMIC(atomicXor, old ^ x)
EMU_ATOMIC(atomicInc, old >= x ? 0 : old + 1)
EMU_ATOMIC(atomicDec, old == 0 || old > x ? x : old - 1)
template <class T> inline T atomicCAS(T* p, typename emu::Given<T>::type expected, typename emu::Given<T>::type x) {
    return emu::update(p, [=](T old) -> T { return old == expected ? x : old; });
}

// ---- the block ----

inline void __syncthreads(emu::Site site = {}) { emu::block_barrier("__syncthreads", site, false); }
inline int __syncthreads_count(int p, emu::Site site = {}) { return emu::block_barrier("__syncthreads_count", site, p); }
inline int __syncthreads_or(int p, emu::Site site = {}) { return emu::block_barrier("__syncthreads_or", site, p) != 0; }
inline int __syncthreads_and(int p, emu::Site site = {}) { return emu::block_barrier("__syncthreads_and", site, !p) == 0; }

// ---- the warp ----

namespace emu {

template <class F> inline void for_each_lane(unsigned lanes, F f) {
    for (; lanes; lanes &= lanes - 1) f(unsigned(__builtin_ctz(lanes)));
}

template <class T> inline T shuffle(const char* what, Site site, unsigned mask, T value, unsigned source) {
    struct Operand { T value; unsigned source; T result; } mine{value, source & 31, value};
    warp_meet(what, site, mask, &mine, [](unsigned present, void** operands) {
        for_each_lane(present, [&](unsigned lane) {
            Operand& to = *static_cast<Operand*>(operands[lane]);
            if (present >> to.source & 1) to.result = static_cast<Operand*>(operands[to.source])->value;
            else memset(static_cast<void*>(&to.result), 0xff, sizeof(T));  // undefined on a GPU
        });
    });
    return mine.result;
}

// Every lane gets f(lanes present, their values by lane).
template <class R, class T, class F> inline R collect(const char* what, Site site, unsigned mask, T value, F) {
    struct Operand { T value; R result; } mine{value, R()};
    warp_meet(what, site, mask, &mine, [](unsigned present, void** operands) {
        T values[32] = {};
        for_each_lane(present, [&](unsigned lane) { values[lane] = static_cast<Operand*>(operands[lane])->value; });
        for_each_lane(present, [&](unsigned lane) { static_cast<Operand*>(operands[lane])->result = F::of(present, values, lane); });
    });
    return mine.result;
}

struct Ballot {
    static unsigned of(unsigned present, const int* votes, unsigned) {
        unsigned result = 0;
        for_each_lane(present, [&](unsigned lane) { result |= unsigned(votes[lane] != 0) << lane; });
        return result;
    }
};
struct All {
    static int of(unsigned present, const int* votes, unsigned lane) { return Ballot::of(present, votes, lane) == present; }
};
struct Match {
    template <class T> static unsigned of(unsigned present, const T* values, unsigned me) {
        unsigned result = 0;
        for_each_lane(present, [&](unsigned lane) { result |= unsigned(!memcmp(values + lane, values + me, sizeof(T))) << lane; });
        return result;
    }
};
struct Nothing {
    static int of(unsigned, const int*, unsigned) { return 0; }
};

}  // namespace emu

inline void __syncwarp(unsigned mask = 0xffffffffu, emu::Site site = {}) {
    emu::collect<int>("__syncwarp", site, mask, 0, emu::Nothing());
}
template <class T> inline T __shfl_sync(unsigned mask, T x, int source, int width = 32, emu::Site site = {}) {
    const unsigned lane = emu::current->lane;
    return emu::shuffle("__shfl_sync", site, mask, x, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32, emu::Site site = {}) {
    const unsigned lane = emu::current->lane, source = lane ^ lanes;
    // as the hardware has it: a lane of an earlier segment may be read, one of a later segment not
    return emu::shuffle("__shfl_xor_sync", site, mask, x, source <= (lane | (width - 1)) ? source : lane);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32, emu::Site site = {}) {
    const unsigned lane = emu::current->lane;
    return emu::shuffle("__shfl_down_sync", site, mask, x, (lane & (width - 1)) + delta < unsigned(width) ? lane + delta : lane);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32, emu::Site site = {}) {
    const unsigned lane = emu::current->lane;
    return emu::shuffle("__shfl_up_sync", site, mask, x, (lane & (width - 1)) >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int p, emu::Site site = {}) {
    return emu::collect<unsigned>("__ballot_sync", site, mask, p, emu::Ballot());
}
inline int __any_sync(unsigned mask, int p, emu::Site site = {}) {
    return emu::collect<unsigned>("__any_sync", site, mask, p, emu::Ballot()) != 0;
}
inline int __all_sync(unsigned mask, int p, emu::Site site = {}) {
    return emu::collect<int>("__all_sync", site, mask, p, emu::All());
}
template <class T> inline unsigned __match_any_sync(unsigned mask, T x, emu::Site site = {}) {
    return emu::collect<unsigned>("__match_any_sync", site, mask, x, emu::Match());
}

#define EMU_REDUCE(name, T, expression)                                                                \
    namespace emu {                                                                                    \
    struct name##_##T {                                                                                \
        static T of(unsigned present, const T* values, unsigned) {                                     \
            T a = values[__builtin_ctz(present)];                                                      \
            for_each_lane(present & (present - 1), [&](unsigned lane) { const T b = values[lane]; a = expression; }); \
            return a;                                                                                  \
        }                                                                                              \
    };                                                                                                 \
    }                                                                                                  \
    inline T __reduce_##name##_sync(unsigned mask, T x, emu::Site site = {}) {                   \
        return emu::collect<T>("__reduce_" #name "_sync", site, mask, x, emu::name##_##T());           \
    }
EMU_REDUCE(add, unsigned, a + b) EMU_REDUCE(min, unsigned, b < a ? b : a) EMU_REDUCE(max, unsigned, a < b ? b : a)
EMU_REDUCE(and, unsigned, a & b) EMU_REDUCE(or, unsigned, a | b) EMU_REDUCE(xor, unsigned, a ^ b)
EMU_REDUCE(add, int, int(unsigned(a) + unsigned(b))) EMU_REDUCE(min, int, b < a ? b : a) EMU_REDUCE(max, int, a < b ? b : a)

#include "low_precision.h"

// ---- what Python sees of a kernel ----

namespace emu {

template <class T> struct Type { static constexpr const char* name = ""; };
#define EMU_TYPE(T, numpy) template <> struct Type<T> { static constexpr const char* name = numpy; };
EMU_TYPE(bool, "bool") EMU_TYPE(signed char, "int8") EMU_TYPE(unsigned char, "uint8") EMU_TYPE(short, "int16")
EMU_TYPE(unsigned short, "uint16") EMU_TYPE(int, "int32") EMU_TYPE(unsigned, "uint32") EMU_TYPE(long, "int64")
EMU_TYPE(unsigned long, "uint64") EMU_TYPE(long long, "int64") EMU_TYPE(unsigned long long, "uint64")
EMU_TYPE(float, "float32") EMU_TYPE(double, "float64") EMU_TYPE(__half, "float16") EMU_TYPE(__nv_bfloat16, "bfloat16")

template <class T> struct Describe {
    static Parameter parameter() { return {Type<T>::name, sizeof(T), false, false}; }
};
template <class T> struct Describe<T*> {
    static Parameter parameter() { return {Type<T>::name, sizeof(T*), true, false}; }
};
template <class T> struct Describe<const T*> {
    static Parameter parameter() { return {Type<T>::name, sizeof(T*), true, true}; }
};

template <class... A> struct Caller {
    template <size_t... I> struct Indices {};
    template <size_t N, size_t... I> struct Count : Count<N - 1, N - 1, I...> {};
    template <size_t... I> struct Count<0, I...> { typedef Indices<I...> type; };
    template <size_t... I> static void call(void (*kernel)(A...), void** args, Indices<I...>) {
        (void)args;
        kernel(*static_cast<A*>(args[I])...);
    }
    static void call(void (*kernel)(A...), void** args) { call(kernel, args, typename Count<sizeof...(A)>::type()); }
};
template <class... A> inline void call(void (*kernel)(A...), void** args) { Caller<A...>::call(kernel, args); }

template <class... A>
inline Kernel describe(void (*)(A...), void (*call)(void**), void* (*anchor)(), int max_threads) {
    static_assert(sizeof...(A) <= 64, "raise the size of Kernel::parameter");
    return {call, anchor, max_threads, int(sizeof...(A)), {Describe<A>::parameter()...}};
}

static __thread char anchor;
static void* shared_anchor() { return &anchor; }
inline int max_threads(int threads = 1024, int = 0, int = 0) { return threads; }

}  // namespace emu

// Makes a kernel visible to Python; what follows the name are the arguments of its __launch_bounds__.
#define EMU_KERNEL(name, ...)                                                                                     \
    extern "C" __attribute__((visibility("default"))) const emu::Kernel* emu_kernel_##name() {                   \
        static const emu::Kernel kernel = emu::describe(                                                         \
            name, [](void** args) { emu::call(name, args); }, emu::shared_anchor, emu::max_threads(__VA_ARGS__)); \
        return &kernel;                                                                                          \
    }
