// What the parts of sample.cu share: settings, the state of the block that chooses, scores as keys, weights, sums over a block.
// Who includes it has a block_barrier() of the THREADS threads that take part, and struct Logits, whose get() reads several at once.
#pragma once
#include "common.cuh"
#include "ptx.cuh"

namespace sampling {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int GROUPS = 2048;  // at most
constexpr int LIST = 1536;    // tokens at most
constexpr int SHORT = 256;    // of a list whose tokens are compared pair by pair; at most THREADS
constexpr unsigned ALL = 0xffffffffu;
constexpr u64 MINUS_INFINITY_KEY = 0x000fffffffffffffull, INFINITY_KEY = 0xfff0000000000000ull;
constexpr double LARGEST_FLOAT = 3.4028234663852886e38;

struct Settings { double temperature, inverse, top_p, min_p, repetition, presence, frequency; int top_k; };  // inverse: 1 / temperature

// What is to be sampled from, and what the last block knows of it.
struct Job {
    Settings set;
    Logits logits;
    const int* history;
    const double* relative;
    u64 largest;   // key of the largest score
    double top;    // that score
    double whole;  // what all weights sum to, where top_p needs it
    int N, shift, G;  // groups are of 1 << shift tokens
};

// Of the block that chooses.
struct Shared {
    Job job;
    union {
        struct { double sums[GROUPS], scales[GROUPS]; };  // of groups: of weights; weight of the largest
        unsigned lots[4 * GROUPS];                        // ranks; of decode_step.cu
    };
    unsigned tops[GROUPS];                // of groups: rank of the largest
    unsigned short active[GROUPS];        // groups to gather from
    u64 keys[LIST];                       // the list, in no order
    int ids[LIST];
    union {
        struct {
            double weights[LIST], running[LIST];
            unsigned short by_key[LIST], by_id[LIST];  // places in the list; equal keys by id
        };
        struct { u64 parts[SHORT], kept[SHORT]; };  // weights in units of 2^-52
        unsigned segments[GROUPS];                  // ranks of the largest of several groups
    };
    u64 least, removed, total;
    double before;
    double scratch_d[WARPS];
    u64 scratch_k[WARPS];
    int count, groups, first, last;
    unsigned threshold;
};
static_assert(sizeof(Shared) <= 96 << 10, "SAMPLE_SHARED_BYTES in cuqwen/cuda.py");

// ---- scores, keys and weights ----

// Larger scores have larger keys, equal ones equal keys; NaN has the largest.
__device__ __forceinline__ u64 key_of(double x) {
    if (x != x) return ~0ull;
    const long long bits = x == 0.0 ? 0ll : __double_as_longlong(x);  // -0 equals 0
    return (u64)bits ^ ((u64)(bits >> 63) | 0x8000000000000000ull);
}
__device__ __forceinline__ double value_of(u64 key) {
    return __longlong_as_double((long long)(key >> 63 ? key ^ 0x8000000000000000ull : ~key));
}
__device__ __forceinline__ bool has_choice(u64 largest) { return largest > MINUS_INFINITY_KEY && largest < INFINITY_KEY; }

// The rank of a score is its key in float32: of two scores the larger one never has the lower rank.
__device__ __forceinline__ unsigned rank_of(float x) {
    const int bits = __float_as_int(x + 0.0f);  // no -0; subnormal numbers are 0 as well, on a GPU
    return x != x ? ALL : bits ^ (bits >> 31 | 0x80000000);
}
__device__ __noinline__ unsigned rank_of_key(u64 key) {
    if (key < MINUS_INFINITY_KEY) return 0;  // no score's
    const double x = value_of(key);
    if (has_choice(key)) return rank_of((float)min(max(x, -LARGEST_FLOAT), LARGEST_FLOAT));
    return rank_of((float)x);
}
__device__ __forceinline__ float value_of_rank(unsigned rank) { return __uint_as_float(rank >> 31 ? rank ^ 0x80000000u : ~rank); }

// The key of the penalised logit, rounded as NumPy rounds: products and sums apart (no fma), subnormal logits kept (a
// conversion would flush them, -ftz=true). Called instead of repeated, like all that is long or rare: the kernel compiles
// in a third of the time, and its instructions, which come from far away each time, are fewer.
__device__ __noinline__ u64 key_of_logit(float logit, int uses, const Settings& set) {
    const unsigned bits = __float_as_uint(logit);
    double x = logit;
    if ((bits & 0x7f800000u) == 0) x = (bits >> 31 ? -0x1p-149 : 0x1p-149) * (double)(int)(bits & 0x7fffffu);
    if (uses) x = x < 0 ? __dmul_rn(x, set.repetition) : x / set.repetition;
    if (uses > 1) x = __dsub_rn(x, __dadd_rn(set.presence, __dmul_rn(set.frequency, (double)(uses - 1))));
    return key_of(x);
}
__device__ __forceinline__ u64 key_at(const Job& job, int id) {
    const int ids[1] = {id};
    float logit[1];
    job.logits.get(ids, job.N, logit);
    return key_of_logit(logit[0], job.history ? __ldcg(job.history + id) : 0, job.set);
}

// use(id, logit, uses) for `first` and every `stride`-th id after it up to `end`. Four are fetched before the first is looked
// at: the compiler leaves loads behind calls and branches, where each would take its own 0.3 us.
template <class F>
__device__ __forceinline__ void for_ids(const Logits& logits, const int* history, int first, int stride, int end, F use) {
#pragma unroll 1
    for (; first < end; first += 4 * stride) {
        float logit[4];
        int ids[4], uses[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            ids[j] = first + j * stride;
            uses[j] = ids[j] < end && history ? __ldcg(history + ids[j]) : 0;
        }
        logits.get(ids, end, logit);
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (first + j * stride < end) use(first + j * stride, logit[j], uses[j]);
    }
}

__device__ __noinline__ double power_of_e(double x) { return exp(x); }
__device__ __forceinline__ double weight_of(u64 key, double top, const Settings& set) {
    return power_of_e((value_of(key) - top) * set.inverse);
}
__device__ __forceinline__ double weight_of(const Job& job, u64 key) { return weight_of(key, job.top, job.set); }

// ---- sums and maxima over warp and block, the sums in a fixed order ----

__device__ __forceinline__ double warp_total(double x) {
#pragma unroll 1
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}
// The sum of x over the threads up to this one; total: over all of them.
__device__ __noinline__ double block_scan(Shared& s, double x, double& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int offset = 1; offset < 32; offset <<= 1) {
        const double before = __shfl_up_sync(ALL, x, offset);
        if (lane >= offset) x += before;
    }
    if (lane == 31) s.scratch_d[warp] = x;
    block_barrier();
    double base = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w == warp) base = sum;
        sum += s.scratch_d[w];
    }
    block_barrier();
    total = sum;
    return base + x;
}
__device__ __forceinline__ double block_total(Shared& s, double x) {
    double total;
    block_scan(s, x, total);
    return total;
}
// In how many threads.
__device__ __forceinline__ int block_count(Shared& s, bool is) { return (int)block_total(s, is ? 1.0 : 0.0); }
__device__ __forceinline__ u64 warp_max(u64 x) {  // by halves: there is no 64-bit reduction
    const unsigned high = __reduce_max_sync(ALL, (unsigned)(x >> 32));
    return (u64)high << 32 | __reduce_max_sync(ALL, (unsigned)(x >> 32) == high ? (unsigned)x : 0u);
}
__device__ __forceinline__ u64 block_max(Shared& s, u64 x) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) s.scratch_k[threadIdx.x / 32] = x;
    block_barrier();
    return warp_max(s.scratch_k[threadIdx.x % WARPS]);
}

}  // namespace sampling
