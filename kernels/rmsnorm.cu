// rmsnorm: out[r, c] = x[r, c] / sqrt(mean_c(x[r, c]^2) + eps) * weight[c];  with residual, x is residual + x, kept there
//
// Entry points rmsnorm_lanes          C <= 512: up to a warp a row, no barrier
//              rmsnorm_row            otherwise: a block a row
//              rmsnorm_add_lanes, rmsnorm_add_row   the same with a residual
//              All keep the row in registers if C is a multiple of 8, all rows are 16-byte aligned and C <= 16,384; else
//              they read it twice, element by element.
// Arguments    out     [R, C]  OUT_TYPE
//              x       [R, C]  X_TYPE
//              weight  [C]     W_TYPE
//              residual [R, C] float32, becomes residual + x and is normalised in x's place; or null
//              R, C            int32, any values from 1
//              eps             float32; below 1.2e-38 it counts as 0
//              lanes           int32, threads a row where that is not the block: the lowest power of two with 16 lanes >= C,
//                              32 at most
// Constants    X_TYPE, W_TYPE, OUT_TYPE   bf16 | f16 | f32
// Work         .._lanes: `lanes` threads a row, 16 elements each; whole warps up to 256 threads a block; grid enough for R rows;
//                        no shared memory
//              .._row:  ceil(C/512) warps up to 32, 16 elements a thread; grid R; 384 bytes of shared memory
// Precision    statistics, scaling and weight in float32; one rounding, when OUT_TYPE is narrower than float32.
//              The weight is applied before that rounding (transformers rounds to the storage type first).
//              Where the sum of squares overflows, or mean square + eps is below 2^-96 so that squares may have been
//              flushed, the row is scaled by a power of two and summed again: any magnitude is served.
// Error bound  (24 + C/2048) eps32 relative, before the final rounding: the sum takes at most max(32, C/1024) + 10 roundings,
//              of which the square root halves the effect, like those of mean and eps; 4 follow; 2^-30 for flushed squares.
//              And 2^-126 |weight|, where x / sqrt(..) is flushed
// Traffic      R C (sizeof(X_TYPE) + sizeof(OUT_TYPE)) bytes, 8 R C more with residual; 4 R C FLOP
// Determinism  fixed order of summation; a row's result depends on C and on whether all is aligned, not on R
// Limits       a row with NaN becomes NaN; beside an infinity, which becomes NaN, finite elements become 0; a row of zeros with
//              eps = 0 is NaN (0/0), all as in NumPy. float32 subnormals in x count as zeros (-ftz=true)
// Wrapper cuda.rmsnorm · truth reference.rmsnorm · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "common.cuh"

// The threads that share a row. `reduce` combines their values; f(x, 0) = x.
struct Lanes {  // `count` of them, a power of two
    int count, me = threadIdx.x % count;
    template <class F> __device__ __forceinline__ float reduce(float x, F f) {
        const unsigned mask = 0xffffffffu >> (32 - count) << (threadIdx.x % 32 - me);
#pragma unroll
        for (int offset = 16; offset; offset >>= 1)
            if (offset < count) x = f(x, __shfl_xor_sync(mask, x, offset));
        return x;
    }
};
struct Block {
    float (*scratch)[32];  // 32 floats for each reduction of a row, three at most
    int me = threadIdx.x, count = blockDim.x;
    template <class F> __device__ __forceinline__ float reduce(float x, F f) {
        float* const values = *scratch++;
        const int lane = threadIdx.x % 32;
        x = Lanes{32}.reduce(x, f);
        if (lane == 0) values[threadIdx.x / 32] = x;
        __syncthreads();
        return Lanes{32}.reduce(lane < count / 32 ? values[lane] : 0.0f, f);
    }
};

template <bool YES, class A, class B> struct Choose { typedef A type; };
template <class A, class B> struct Choose<false, A, B> { typedef B type; };

// What a row is multiplied by, in two steps so that neither leaves float32's range.
struct Scale { float before, after; };

// `each(f)` calls f with each value of this thread.
template <class Threads, class Each>
__device__ __forceinline__ Scale find_scale(Threads threads, Each each, int C, float eps) {
    const auto add = [](float a, float b) { return a + b; };
    float sum = 0.0f;
    each([&](float v) { sum = fmaf(v, v, sum); });
    sum = threads.reduce(sum, add);
    const float power = sum / C + eps;
    if (power >= 0x1p-96f && sum < -MINUS_INFINITY) return {1.0f, 1.0f / sqrtf(power)};

    float top = 0.0f;
    each([&](float v) { top = fmaxf(top, fabsf(v)); });
    top = fmaxf(threads.reduce(top, [](float a, float b) { return fmaxf(a, b); }), sqrtf(eps));
    // s = 2^-n with top s in [1, 4); 1 where nothing helps, for a row of zeros or with an infinity
    const int exponent = __float_as_int(top) >> 23;
    const float s = top > 0.0f && top < -MINUS_INFINITY ? __int_as_float(max(254 - exponent, 1) << 23) : 1.0f;
    sum = 0.0f;
    each([&](float v) { sum = fmaf(v * s, v * s, sum); });
    const float r = 1.0f / sqrtf(threads.reduce(sum, add) / C + eps * s * s);
    if (s >= 1.0f) return {s, r};
    return {0.0625f, r * (s * 16.0f)};  // what 1/16 flushes would be lost anyway; r s alone may be subnormal
}

constexpr int CHUNKS = 2;  // of 8 elements a thread, kept in registers as they lay in memory: bf16 takes half of what float32
                           // does, and it is threads at work at once that bring the bandwidth

template <bool ADD, class Threads>
__device__ __forceinline__ void in_registers(Threads threads, OUT_TYPE* out, const X_TYPE* x, const W_TYPE* weight,
                                             float* residual, int C, float eps) {
    using V = typename Choose<ADD, f32, X_TYPE>::type;
    uint4 v[CHUNKS][sizeof(V) / 2], w[CHUNKS][sizeof(W_TYPE) / 2];
    const auto place = [&](int i) { return 8 * (threads.me + threads.count * i); };
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)
        if (place(i) < C) {
            if (ADD) {
                float a[8], before[8];
                load8(x + place(i), a);
                load8(residual + place(i), before);
#pragma unroll
                for (int e = 0; e < 8; e++) a[e] += before[e];
                store8(reinterpret_cast<V*>(v[i]), a);
            } else {
#pragma unroll
                for (int j = 0; j < (int)sizeof(V) / 2; j++) v[i][j] = reinterpret_cast<const uint4*>(x + place(i))[j];
            }
        }
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)  // early: their way takes as long as the row's. With a residual there are no registers left
        if (!ADD && place(i) < C)
#pragma unroll
            for (int j = 0; j < (int)sizeof(W_TYPE) / 2; j++) w[i][j] = reinterpret_cast<const uint4*>(weight + place(i))[j];
    const auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            if (place(i) < C) {
                float a[8];
                load8(reinterpret_cast<const V*>(v[i]), a);
#pragma unroll
                for (int e = 0; e < 8; e++) f(a[e]);
            }
    };
    const Scale scale = find_scale(threads, each, C, eps);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)
        if (place(i) < C) {
            float a[8], gain[8];
            load8(reinterpret_cast<const V*>(v[i]), a);
            load8(ADD ? weight + place(i) : reinterpret_cast<const W_TYPE*>(w[i]), gain);
            if (ADD) store8(residual + place(i), a);
#pragma unroll
            for (int e = 0; e < 8; e++) a[e] = a[e] * scale.before * scale.after * gain[e];
            store8(out + place(i), a);
        }
}

// Any C and any address.
template <class Threads>
__device__ __forceinline__ void from_memory(Threads threads, OUT_TYPE* out, const X_TYPE* x, const W_TYPE* weight,
                                            float* residual, int C, float eps) {
    if (residual)
        for (int c = threads.me; c < C; c += threads.count) residual[c] += to_float(x[c]);
    const auto value = [&](int c) { return residual ? residual[c] : to_float(x[c]); };
    const auto each = [&](auto f) {
        for (int c = threads.me; c < C; c += threads.count) f(value(c));
    };
    const Scale scale = find_scale(threads, each, C, eps);
    for (int c = threads.me; c < C; c += threads.count)
        store(out + c, value(c) * scale.before * scale.after * to_float(weight[c]));
}

template <bool ADD, class Threads>
__device__ __forceinline__ void normalise(Threads threads, int row, OUT_TYPE* out, const X_TYPE* x, const W_TYPE* weight,
                                          float* residual, int C, float eps) {
    const size_t first = (size_t)row * C;
    const bool wide = C % 8 == 0 && ((size_t)out | (size_t)x | (size_t)weight | (size_t)residual) % 16 == 0;
    if (ADD) residual += first;
    if (wide && C <= 8 * CHUNKS * threads.count)
        in_registers<ADD>(threads, out + first, x + first, weight, residual, C, eps);
    else
        from_memory(threads, out + first, x + first, weight, residual, C, eps);
}

#define PARAMETERS                                                                                                \
    OUT_TYPE *__restrict__ out, const X_TYPE *x, const W_TYPE *__restrict__ weight, float *residual, \
        int R, int C, float eps, int lanes

template <bool ADD> __device__ __forceinline__ void by_lanes(PARAMETERS) {
    wait_for_launches_before();
    const int row = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    if (row < R) normalise<ADD>(Lanes{lanes}, row, out, x, weight, residual, C, eps);
}
template <bool ADD> __device__ __forceinline__ void by_block(PARAMETERS) {
    __shared__ float scratch[3][32];
    wait_for_launches_before();
    normalise<ADD>(Block{scratch}, blockIdx.x, out, x, weight, residual, C, eps);
}

// Bounds of one or two blocks: where ptxas is left to itself it aims at more, and spills.
extern "C" __global__ void __launch_bounds__(256, 2) rmsnorm_lanes(PARAMETERS) {
    by_lanes<false>(out, x, weight, residual, R, C, eps, lanes);
}
extern "C" __global__ void __launch_bounds__(1024, 1) rmsnorm_row(PARAMETERS) {
    by_block<false>(out, x, weight, residual, R, C, eps, lanes);
}
extern "C" __global__ void __launch_bounds__(256, 2) rmsnorm_add_lanes(PARAMETERS) {
    by_lanes<true>(out, x, weight, residual, R, C, eps, lanes);
}
extern "C" __global__ void __launch_bounds__(1024, 1) rmsnorm_add_row(PARAMETERS) {
    by_block<true>(out, x, weight, residual, R, C, eps, lanes);
}
