// sample: out[0] = the next token, drawn from logits as cuqwen/sampling.py defines it: the same filters, ties and draw
//
//   s = penalised logits (float64); w = exp((s - max s) / temperature); then top_k, top_p, min_p and the draw by one uniform
//
// Entry point  sample             always; one launch, whatever the settings
// Arguments    out       [1]      int32    the token; -1 where no choice is possible: NaN, +inf or nothing but -inf among the
//                                          penalised logits, or a step outside 0..U-1
//              step      [1]      int32    which of the uniforms is used; null if temperature = 0; becomes one more
//              history   [N]      int32    0: never used, 1: in the prompt only, c + 1: c times in the answer; the token's is
//                                          brought up to date; null: no penalties
//              tops      [G]      uint32   scratch: float32 rank of each group's largest score; null where there are `maxima`
//              maxima    [G]      uint64   scratch: order-preserving key of it, where no top_k up to G bounds the list; else null
//              sums      [G]      float64  scratch: each group's sum of exp((s - its largest) / temperature), with `maxima`; null
//                                          for temperature 0 and where min_p alone filters
//              relative  [N]      float64  scratch: these exponentials, where top_p needs them again; else null
//              done      [1]      int32    a counter that is 0; left 0 again
//              logits    [N]      float32
//              uniforms  [U]      float64  in [0, 1); null if temperature = 0
//              N, shift, segments, U, top_k: int32; temperature, inverse, top_p, min_p, repetition, presence, frequency: float64;
//              inverse: 1 / temperature; segments: a power of two from 64 and top_k to 2048; 0 with `maxima`
// Constants    none
// Work         a group is 1 << shift (from 32) consecutive ids and belongs to one warp; G = ceil(N / group) up to 2048.
//              Grid ceil(G / 8), block 256, 96 KB of dynamic shared memory. Every block: the largest of each of its groups (and
//              sums). The block that finishes last:
//              1. A threshold below which nothing can be chosen. top_k: the k-th largest of the maxima of segments (several
//                 groups), since k of them have a token that large; for random logits few more than k tokens reach it.
//                 top_p: what is below t sums to at most sum(sums of groups below t) + sum over the others of
//                 min(their sum - their largest, ids * w(t)), which 8 warps compare with 1 - p for 8 thresholds t.
//                 min_p: by definition.
//              2. Gathers the tokens from there on, in any order, from the groups that have one.
//              3. Up to 256: each compares itself with all others, which gives the sums before it by score and by id, and so
//                 whether it is kept and whether it is drawn. Up to 1536: sorted (by counting), then sums in that order. Should
//                 more be there (equal logits, a flat nucleus), bisection over the whole vocabulary narrows them down: right,
//                 but slower by one or two orders of magnitude.
//              With temperature alone the draw is by groups' sums, then within a group.
// Precision    float64 or integers of 2^-52; scores exactly the host's, so top_k and all ties are decided as there. A float32 rank
//              decides nothing but which tokens are looked at
// Error bound  exponentials to 2 ulp, weights of short lists to 2^-53 and sums of at most N terms in another order than the
//              host's: the bounds of top_p, min_p and of the draw lie within 2 N 2^-53 (3.4e-11 for N = 151,936) of the host's,
//              relative to the whole sum; the token is the same unless u, p or min_p is that close to a bound
// Traffic      4 N bytes (8 N with history), 8 N of scratch for top_p without top_k, and the last block's groups once more
// Determinism  every sum of floats has a fixed order, sums of integers need none, and the last block is the same program
//              whichever block it is: bitwise reproducible
// Limits       G at most 2048; logits need no alignment
// Wrapper cuda.sample · truth reference.sample, cuqwen/sampling.py · test tests/test_sample.py · benchmark benchmarks/ops.py
#include "sample_all.cuh"

// The lowest id that has the largest score; g: the first of this thread's groups that has it, or ALL.
__device__ __noinline__ int first_largest(Shared& s, unsigned g) {
    const Job& job = s.job;
    const int t = threadIdx.x, lane = t % 32;
    if (t == 0) s.first = job.G;
    __syncthreads();
    if (g < ALL) atomicMin(&s.first, (int)g);
    __syncthreads();
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
        __syncthreads();
        const bool enough = lane == WARPS - 1 || (lane < WARPS && s.scratch_d[lane] <= allowance * (1 - 1e-9));
        logarithm = -depth * __ffs(__ballot_sync(ALL, enough)) / WARPS;
        __syncthreads();
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
    const float* logits, const int* history, const Settings& set, int first, int end, u64* maximum, double* sum, double* relative) {
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
    __syncthreads();
#pragma unroll 1
    for (int g = t; g < G; g += THREADS) {
        const u64 key = __ldcg(maxima + g);
        s.tops[g] = rank_of_key(key);
        if (sums) s.scales[g] = weight_of(s.job, key), s.sums[g] = __ldcg(sums + g) * s.scales[g];
    }
    __syncthreads();
    return mine == largest ? first : ALL;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(
    int* out, int* step, int* history, unsigned* tops, u64* maxima, double* sums, double* relative, int* done, const float* logits,
    const double* uniforms, int N, int shift, int segments, int U, int top_k, double temperature, double inverse, double top_p,
    double min_p, double repetition, double presence, double frequency) {
    DYNAMIC_SHARED(Shared, shared);
    Shared& s = *shared;
    griddepcontrol_wait();
    const Settings set = {temperature, inverse, top_p, min_p, repetition, presence, frequency, top_k < N ? top_k : 0};
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, G = (N + (1 << shift) - 1) >> shift;
    const int now = temperature > 0 ? *step : 0;

    const int group = blockIdx.x * WARPS + warp, first_id = group << shift, end = min(N, first_id + (1 << shift));
    if (group < G && maxima)
        summarise(logits, history, set, first_id, end, maxima + group, sums ? sums + group : nullptr, relative);
    else if (group < G) {
        unsigned best = 0;
        for_ids(logits, history, first_id + lane, 32, end, [&](int, float logit, int uses) {
            best = max(best, uses ? rank_of_key(key_of_logit(logit, uses, set)) : rank_of(logit));
        });
        best = __reduce_max_sync(ALL, best);
        if (lane == 0) __stcg(tops + group, best);
    }
    if (t == 32) s.job = {set, logits, history, relative, 0, 0.0, 0.0, N, shift, G};
    __syncthreads();
    if (warp == 0) {
        const bool last = is_last_block(done, gridDim.x);
        if (t == 0) s.count = last;
    }
    __syncthreads();
    if (!s.count) return;
    const bool allowed = now >= 0 && (temperature <= 0 || now < U);
    const double share = temperature > 0 && allowed ? uniforms[now] : 0.0;

    unsigned first = ALL, top[GROUPS / THREADS] = {};
    if (t == 0) s.groups = s.threshold = 0;
    if (maxima) first = survey(s, maxima, sums);
    else {
#pragma unroll
        for (int j = 0; j < GROUPS / THREADS; j++) top[j] = j * THREADS + t < G ? __ldcg(tops + j * THREADS + t) : 0;
#pragma unroll 1
        for (int i = t; i < segments; i += THREADS) s.segments[i] = 0;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < GROUPS / THREADS; j++) {
            const int g = j * THREADS + t;
            s.tops[g] = top[j];
            if (top[j]) atomicMax(s.segments + (g & (segments - 1)), top[j]);
        }
        __syncthreads();
    }
    int token = -1;
    if (allowed && (!maxima || has_choice(s.job.largest))) token = temperature > 0 ? draw(s, top, segments, share) : first_largest(s, first);
    __syncthreads();  // other warps still read the history
    if (t == 0) {
        *out = token;
        if (token >= 0 && temperature > 0) *step = now + 1;
        if (token >= 0 && history) history[token] = history[token] ? history[token] + 1 : 2;
    }
}
