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
#include "common.cuh"

__device__ __forceinline__ void block_barrier() { __syncthreads(); }

struct Logits {
    const float* values;
    // out[i] = that of ids[i], -inf from `end` on.
    template <int N> __device__ __forceinline__ void get(const int (&ids)[N], int end, float (&out)[N]) const {
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = ids[i] < end ? __ldcg(values + ids[i]) : MINUS_INFINITY;
    }
};

#include "sample_draw.cuh"

extern "C" __global__ void __launch_bounds__(sampling::THREADS, 1) sample(
    int* out, int* step, int* history, unsigned* tops, u64* maxima, double* sums, double* relative, int* done, const float* logits,
    const double* uniforms, int N, int shift, int segments, int U, int top_k, double temperature, double inverse, double top_p,
    double min_p, double repetition, double presence, double frequency) {
    DYNAMIC_SHARED(sampling::Shared, shared);
    griddepcontrol_wait();
    const sampling::Settings set = {temperature, inverse, top_p, min_p, repetition, presence, frequency, top_k < N ? top_k : 0};
    const sampling::Inputs in = {set, {logits}, step, history, tops, maxima, sums, relative, uniforms, N, shift, segments, U};
    const sampling::Random random(in);
    const int t = threadIdx.x, group = blockIdx.x * sampling::WARPS + t / 32;
    if (group < in.groups()) look_at_group(in, group);
    __syncthreads();
    if (t < 32) {
        const bool last = is_last_block(done, gridDim.x);
        if (t == 0) shared->count = last;
    }
    __syncthreads();
    if (!shared->count) return;
    unsigned top[sampling::GROUPS / sampling::THREADS];
    load_tops(in, top);
    const int token = choose(*shared, in, random, top);
    if (t == 0) *out = token;
}
