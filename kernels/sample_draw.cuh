// The choice of a token from the parts of sample.cu. Part of it and of decode_step.cu.
#pragma once
#include "sample_all.cuh"

namespace sampling {

// The arguments of sample.cu.
struct Inputs {
    Settings set;
    Logits logits;
    int *step, *history;
    unsigned* tops;
    u64* maxima;
    double *sums, *relative;
    const double* uniforms;
    int N, shift, segments, U;
    __device__ int groups() const { return (N + (1 << shift) - 1) >> shift; }
};

// The random number of this token. Fetched before anything else: its two loads take as long as half of the choice.
struct Random {
    int now;
    bool allowed;
    double share;
    Random() = default;
    __device__ explicit Random(const Inputs& in) {
        const bool draws = in.set.temperature > 0;
        now = draws ? *in.step : 0;
        allowed = now >= 0 && (!draws || now < in.U);
        share = draws && allowed ? in.uniforms[now] : 0.0;
    }
};

// The lowest id that has the largest score; g: the first of this thread's groups that has it, or ALL.
__device__ __noinline__ int first_largest(Shared& s, unsigned g) {
    const Job& job = s.job;
    const int t = threadIdx.x, lane = t % 32;
    if (t == 0) s.first = job.G;
    block_barrier();
    if (g < ALL) atomicMin(&s.first, (int)g);
    block_barrier();
#pragma unroll 1
    for (int first = s.first << job.shift;; first += 32) {
        const int id = first + lane;
        const unsigned here = __ballot_sync(ALL, id < job.N && key_at(job, min(id, job.N - 1)) == job.largest);
        if (here) return first + __ffs(here) - 1;
    }
}

// The rank below which top_p and min_p choose nothing.
__device__ __noinline__ unsigned threshold_of_weights(Shared& s) {
    const Job& job = s.job;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    double logarithm = MINUS_INFINITY;  // of the least weight
    if (job.set.top_p < 1) {
        double x = 0;
#pragma unroll 1
        for (int g = t; g < job.G; g += THREADS) x += s.sums[g];
        const double whole = block_total(s, x), allowance = (1 - job.set.top_p) * whole;
        if (t == 0) s.job.whole = whole;
        const double depth = log(job.N / allowance) + 1e-6;  // all of them at e^-depth would go together
        const double tried = exp(-depth * (warp + 1) / WARPS);
        x = 0;
#pragma unroll 1
        for (int g = lane; g < job.G; g += 32) {
            const double top = s.scales[g], sum = s.sums[g];
            x += top < tried ? sum : min(sum - top, ((1 << job.shift) - 1) * tried);
        }
        x = warp_total(x);
        if (lane == 0) s.scratch_d[warp] = x;
        block_barrier();
        const bool enough = lane == WARPS - 1 || (lane < WARPS && s.scratch_d[lane] <= allowance * (1 - 1e-9));
        logarithm = -depth * __ffs(__ballot_sync(ALL, enough)) / WARPS;
        block_barrier();
    }
    if (job.set.min_p > 0) logarithm = max(logarithm, log(job.set.min_p));
    return rank_of_key(key_of(job.top + job.set.temperature * (logarithm - 1e-9) - fabs(job.top) * 1e-15));
}

// From what tops of groups bound: those of this thread are in `top` for top_k, in s.tops otherwise.
__device__ __forceinline__ int draw(Shared& s, const unsigned (&top)[GROUPS / THREADS], int segments, double share) {
    const Job& job = s.job;
    const bool by_sums = job.set.top_k == 0 && job.set.top_p < 1;
    unsigned rank = rank_of(-LARGEST_FLOAT);  // nothing is lost with -inf
    if (segments) {
        rank = max(rank, threshold_of_top_k(s, segments));
        unsigned some = 0;
#pragma unroll
        for (int j = 0; j < GROUPS / THREADS; j++) some |= unsigned(top[j] >= rank) << j;
#pragma unroll 1
        for (; some; some &= some - 1) s.active[atomicAdd(&s.groups, 1)] = (__ffs(some) - 1) * THREADS + threadIdx.x;
    } else {
        if (by_sums || (job.set.top_k == 0 && job.set.min_p > 0)) rank = max(rank, threshold_of_weights(s));
        else if (job.set.top_k == 0) return draw_by_temperature(s, share);
        mark_all(s, rank);
    }
    const int n = gather(s, rank, 0, ~0ull);
    const double whole = by_sums ? job.whole : 0.0;
    if (n == 0) return -1;
    return n <= SHORT ? draw_from_short_list(s, n, whole, share) : draw_from_all(s, n, rank, whole, share);
}

// The largest of a warp's group as a key, and the sum.
__device__ __noinline__ void summarise(
    const Logits& logits, const int* history, const Settings& set, int first, int end, u64* maximum, double* sum, double* relative) {
    const int lane = threadIdx.x % 32;
    u64 best = 0;
    for_ids(logits, history, first + lane, 32, end, [&](int, float logit, int uses) { best = max(best, key_of_logit(logit, uses, set)); });
    best = warp_max(best);
    if (lane == 0) __stcg(maximum, best);
    if (!sum) return;
    double total = 0;
    for_ids(logits, history, first + lane, 32, end, [&](int id, float logit, int uses) {
        const double w = best > MINUS_INFINITY_KEY ? weight_of(key_of_logit(logit, uses, set), value_of(best), set) : 0.0;
        if (relative) __stcg(relative + id, w);
        total += w;
    });
    total = warp_total(total);
    if (lane == 0) __stcg(sum, total);
}

// What the last block knows of the groups by `maxima`; returns the first of this thread's groups that has the largest score, or ALL.
__device__ __noinline__ unsigned survey(Shared& s, const u64* maxima, const double* sums) {
    const int t = threadIdx.x, G = s.job.G;
    u64 mine = 0, key[GROUPS / THREADS];
    unsigned first = ALL;
#pragma unroll
    for (int j = 0; j < GROUPS / THREADS; j++) key[j] = j * THREADS + t < G ? __ldcg(maxima + j * THREADS + t) : 0;
#pragma unroll
    for (int j = 0; j < GROUPS / THREADS; j++)
        if (key[j] > mine) mine = key[j], first = j * THREADS + t;
    const u64 largest = block_max(s, mine);
    if (t == 0) s.job.largest = largest, s.job.top = value_of(largest);
    block_barrier();
#pragma unroll 1
    for (int g = t; g < G; g += THREADS) {
        const u64 key = __ldcg(maxima + g);
        s.tops[g] = rank_of_key(key);
        if (sums) s.scales[g] = weight_of(s.job, key), s.sums[g] = __ldcg(sums + g) * s.scales[g];
    }
    block_barrier();
    return mine == largest ? first : ALL;
}

// What choose() needs of a group, by one warp: its largest score, and sums.
__device__ __forceinline__ void look_at_group(const Inputs& in, int group) {
    const int lane = threadIdx.x % 32, first = group << in.shift, end = min(in.N, first + (1 << in.shift));
    if (in.maxima) return summarise(in.logits, in.history, in.set, first, end, in.maxima + group, in.sums ? in.sums + group : nullptr, in.relative);
    unsigned best = 0;
    for_ids(in.logits, in.history, first + lane, 32, end, [&](int, float logit, int uses) {
        best = max(best, uses ? rank_of_key(key_of_logit(logit, uses, in.set)) : rank_of(logit));
    });
    best = __reduce_max_sync(ALL, best);
    if (lane == 0) __stcg(in.tops + group, best);
}

// The ranks that look_at_group has left of this thread's groups, if it has.
__device__ __forceinline__ void load_tops(const Inputs& in, unsigned (&top)[GROUPS / THREADS]) {
#pragma unroll
    for (int j = 0; j < GROUPS / THREADS; j++) {
        const int g = j * THREADS + threadIdx.x;
        top[j] = in.tops && g < in.groups() ? __ldcg(in.tops + g) : 0;
    }
}

// The token, for thread 0, once all groups have been looked at; step and history follow it. -1 where there is no choice.
// top: where there are no maxima, the ranks of the largest of groups t, THREADS + t, ..; 0 behind the last.
__device__ __forceinline__ int choose(Shared& s, const Inputs& in, const Random& random, const unsigned (&top)[GROUPS / THREADS]) {
    const int t = threadIdx.x, G = in.groups(), segments = in.segments;
    const bool draws = in.set.temperature > 0;
    if (t == 32) s.job = {in.set, in.logits, in.history, in.relative, 0, 0.0, 0.0, in.N, in.shift, G};
    if (t == 0) s.groups = s.threshold = 0;
    block_barrier();

    unsigned first = ALL;
    if (in.maxima) first = survey(s, in.maxima, in.sums);
    else {
#pragma unroll 1
        for (int i = t; i < segments; i += THREADS) s.segments[i] = 0;
        block_barrier();
#pragma unroll
        for (int j = 0; j < GROUPS / THREADS; j++) {
            const int g = j * THREADS + t;
            s.tops[g] = top[j];
            if (top[j]) atomicMax(s.segments + (g & (segments - 1)), top[j]);
        }
        block_barrier();
    }
    int token = -1;
    if (random.allowed && (!in.maxima || has_choice(s.job.largest))) token = draws ? draw(s, top, segments, random.share) : first_largest(s, first);
    block_barrier();  // other warps still read the history
    if (t == 0 && token >= 0) {
        if (draws) *in.step = random.now + 1;
        if (in.history) in.history[token] = in.history[token] ? in.history[token] + 1 : 2;
    }
    return token;
}

}  // namespace sampling
