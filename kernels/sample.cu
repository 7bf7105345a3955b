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
//              maxima    [G]      uint64   scratch: order-preserving key of each group's largest score
//              sums      [G]      float64  scratch: each group's sum of exp((s - its largest) / temperature); null: see Work
//              relative  [N]      float64  scratch: these exponentials; null with `sums`
//              done      [1]      int32    a counter that is 0; left 0 again
//              logits    [N]      float32
//              uniforms  [U]      float64  in [0, 1); null if temperature = 0
//              N, per_lane, U, top_k: int32; temperature, top_p, min_p, repetition, presence, frequency: float64
// Constants    none
// Work         a group is 32 per_lane consecutive ids and belongs to one warp; G = ceil(N / (32 per_lane)) up to 2048.
//              Grid ceil(G / 16), block 512, 46 KB of shared memory. Every block: scores and maxima of its groups (and sums,
//              where no top_k bounds the list: top_k = 0 or beyond G). The block that finishes last:
//              1. A threshold below which nothing can be chosen. top_k: the k-th largest of the maxima of segments (1 to 32
//                 groups), since k of them have a token that large; for random logits few more than k tokens reach it.
//                 top_p: what is below t sums to at most sum(sums of groups below t) + sum over the others of
//                 min(their sum - their largest, ids * w(t)), which 16 warps compare with 1 - p for 16 thresholds t.
//                 min_p: by definition.
//              2. Gathers the tokens from there on, in the order of their ids, from the groups that have one.
//              3. Up to 1536 of them are sorted (by counting, in shared memory), and the sorted sums give the last token kept.
//                 Should more be there (equal logits, a flat nucleus), bisection over the whole vocabulary narrows them
//                 down: right, but slower by one or two orders of magnitude.
//              4. The draw: sums by 16 warps of 16 ranges, then within the range that holds the target, and so on.
//              With temperature alone, 4 starts with the groups' sums, and no list is made.
// Precision    float64 throughout; scores exactly the host's, so top_k and all ties are decided as there
// Error bound  exponentials to 2 ulp and sums of at most N terms in another order than the host's: the bounds of top_p,
//              min_p and of the draw lie within 2 N 2^-53 (3.4e-11 for N = 151,936) of the host's, relative to the whole sum;
//              the token is the same unless u, p or min_p is that close to a bound
// Traffic      4 N bytes (8 N with history), 16 N of scratch where sums are needed, and the last block's groups once more
// Determinism  every sum has a fixed order, the last block is the same program whichever block it is: bitwise reproducible
// Limits       G at most 2048 (the wrapper chooses per_lane); logits need no alignment
// Wrapper cuda.sample · truth reference.sample, cuqwen/sampling.py · test tests/test_sample.py · benchmark benchmarks/ops.py
#include "common.cuh"

typedef unsigned long long u64;

#define THREADS 512
#define WARPS (THREADS / 32)
#define GROUPS 2048  // at most
#define LIST 1536    // tokens at most
#define ALL 0xffffffffu
#define MINUS_INFINITY_KEY 0x000fffffffffffffull
#define INFINITY_KEY 0xfff0000000000000ull

struct Settings { double temperature, top_p, min_p, repetition, presence, frequency; int top_k; };

// What is to be sampled from, and what the last block knows of it. In shared memory, because the rarely used parts below are
// functions of their own: inlined, they would cost all the others registers.
struct Job {
    Settings set;
    const float* logits;
    const int* history;
    const double* relative;
    const u64* maxima;
    u64 largest;  // key of the largest score
    double top;   // that score
    double others;  // what the tokens that are not in the list sum to
    int N, width, G;
};

__shared__ Job job;
__shared__ u64 region_a[GROUPS];  // weights of the groups' largest; then the list's keys
__shared__ u64 region_b[GROUPS];  // the groups' sums or the segments; then the list's ids, and groups' places in it or its order
__shared__ u64 region_c[LIST];    // leading halves of the groups' maxima, and groups to gather; then the list's weights
__shared__ double scratch_d[32];
__shared__ int scratch_i[32];
__shared__ u64 scratch_k[32];

#define GROUP_SCALES reinterpret_cast<double*>(region_a)
#define GROUP_SUMS reinterpret_cast<double*>(region_b)
#define GROUP_TOPS reinterpret_cast<unsigned*>(region_c)
#define SEGMENT_TOPS reinterpret_cast<unsigned*>(region_b)
#define ACTIVE reinterpret_cast<unsigned short*>(GROUP_TOPS + GROUPS)
#define LIST_KEYS region_a
#define LIST_IDS reinterpret_cast<int*>(region_b)
#define PLACES (LIST_IDS + LIST)
#define ORDER reinterpret_cast<unsigned short*>(PLACES)
#define LIST_WEIGHTS reinterpret_cast<double*>(region_c)

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

// Long and used in several places: these, gather and bound_of_list are called instead of repeated, and all compiles in 4 s of processor
// time instead of 7.
__device__ __noinline__ double penalised(double x, int uses, double repetition, double presence, double frequency) {
    x = x < 0 ? __dmul_rn(x, repetition) : x / repetition;
    return uses > 1 ? __dsub_rn(x, __dadd_rn(presence, __dmul_rn(frequency, (double)(uses - 1)))) : x;
}
__device__ __noinline__ double power_of_e(double x, double temperature) { return exp(x / temperature); }

// The key of the penalised logit, rounded as NumPy rounds: products and sums apart (no fma), subnormal logits kept (a
// conversion would flush them, -ftz=true).
__device__ __forceinline__ u64 key_at(const float* logits, const int* history, const Settings& set, int id) {
    const float logit = logits[id];
    const unsigned bits = __float_as_uint(logit);
    double x = logit;
    if ((bits & 0x7f800000u) == 0) x = (bits >> 31 ? -0x1p-149 : 0x1p-149) * (double)(int)(bits & 0x7fffffu);
    const int uses = history ? history[id] : 0;
    if (uses) x = penalised(x, uses, set.repetition, set.presence, set.frequency);
    return key_of(x);
}
__device__ __forceinline__ u64 key_at(int id) { return key_at(job.logits, job.history, job.set, id); }

__device__ __forceinline__ double weight_of(u64 key, double top, double temperature) {
    return power_of_e(value_of(key) - top, temperature);
}
__device__ __forceinline__ double weight_of(u64 key) { return weight_of(key, job.top, job.set.temperature); }
__device__ __forceinline__ double weight_at(int id) {
    return job.relative ? __ldcg(job.relative + id) * GROUP_SCALES[id / job.width] : weight_of(key_at(id));
}
__device__ __forceinline__ void scale_groups() {
    for (int g = threadIdx.x; g < job.G; g += THREADS) GROUP_SCALES[g] = weight_of(__ldcg(job.maxima + g));
}
// use(id, key) for this thread's share of all tokens, whose logits are fetched four at a time.
template <class F> __device__ __forceinline__ void for_all(F use) {
    for (int first = threadIdx.x; first < job.N; first += 4 * THREADS) {
        u64 key[4];
#pragma unroll
        for (int j = 0; j < 4; j++) key[j] = key_at(min(first + j * THREADS, job.N - 1));
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (first + j * THREADS < job.N) use(first + j * THREADS, key[j]);
    }
}

// ---- sums over warp and block, each in a fixed order ----

__device__ __forceinline__ double warp_total(double x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}
// The sum of this lane's x and those of the lanes before it.
template <class T> __device__ __forceinline__ T warp_scan(T x) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const T before = __shfl_up_sync(ALL, x, offset);
        if (lane >= offset) x += before;
    }
    return x;
}
// The sum of x over the threads before this one, and over all of them. `scratch`: 32 elements, free again at the end.
template <class T> __device__ __forceinline__ T block_scan(T x, T& total, T* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const T inclusive = warp_scan(x);
    if (lane == 31) scratch[warp] = inclusive;
    __syncthreads();
    const T warps = warp_scan(lane < WARPS ? scratch[lane] : 0);
    const T before = __shfl_up_sync(ALL, inclusive, 1), base = __shfl_sync(ALL, warps, (warp + 31) % 32);
    total = __shfl_sync(ALL, warps, 31);
    __syncthreads();
    return (warp ? base : 0) + (lane ? before : 0);
}
template <class T> __device__ __forceinline__ T block_total(T x, T* scratch) {
    T total;
    block_scan(x, total, scratch);
    return total;
}
__device__ __forceinline__ u64 warp_max(u64 x) {  // by halves: there is no 64-bit reduction
    const unsigned high = __reduce_max_sync(ALL, (unsigned)(x >> 32));
    return (u64)high << 32 | __reduce_max_sync(ALL, (unsigned)(x >> 32) == high ? (unsigned)x : 0u);
}

// The first of n items, in order, whose running sum of weight(i) exceeds the target, which is a share of the whole sum if
// `is_share`; on return it is less the sum before the item. The whole block calls this, and every thread gets the answer.
template <class W> __device__ __forceinline__ int first_exceeding(int n, W weight, double& target, bool is_share) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int begin = 0, end = n;
    while (true) {
        const bool last = end - begin <= 32;
        const int size = last ? 1 : max(32, (end - begin + WARPS - 1) / WARPS);
        double x = 0;
        if (last) {  // every warp for itself
            if (begin + lane < end) x = weight(begin + lane);
        } else {
            const int stop = min(end, begin + (warp + 1) * size);
#pragma unroll 4
            for (int i = begin + warp * size + lane; i < stop; i += 32) x += weight(i);
            x = warp_total(x);
            if (lane == 0) scratch_d[warp] = x;
            __syncthreads();
            x = lane < WARPS ? scratch_d[lane] : 0.0;
            __syncthreads();
        }
        const double sum = warp_scan(x);
        if (is_share) target *= __shfl_sync(ALL, sum, 31), is_share = false;
        const unsigned some = __ballot_sync(ALL, x > 0), over = __ballot_sync(ALL, x > 0 && sum > target);
        // a range's sum and that of its parts may differ in the last place: then none exceeds, and the last one is it
        const int pick = over ? __ffs(over) - 1 : 31 - __clz(some | 1u);
        const double before = __shfl_sync(ALL, sum, (pick + 31) % 32);
        if (pick) target -= before;
        begin += pick * size, end = min(end, begin + size);
        if (last) return begin;
    }
}

// ---- the list ----

// The tokens with keys from low to high, in the order of their ids, into LIST_KEYS and LIST_IDS; returns how many there are.
// More than LIST are only counted. With `others` job.others becomes the sum of all others; low's lower half must be 0 then.
__device__ __noinline__ int gather(u64 low, u64 high, bool others) {
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int part = GROUPS / THREADS;
    int n = 0, mine = 0, groups;
    double x = 0;
#pragma unroll
    for (int j = 0; j < part; j++) {
        const int g = part * t + j;
        const bool in = g < job.G && GROUP_TOPS[g] >= (unsigned)(low >> 32);
        mine += in;
        if (g < job.G && !in && others) x += GROUP_SUMS[g];
    }
    int at = block_scan(mine, groups, scratch_i);
#pragma unroll
    for (int j = 0; j < part; j++)
        if (part * t + j < job.G && GROUP_TOPS[part * t + j] >= (unsigned)(low >> 32)) ACTIVE[at++] = part * t + j;
    __syncthreads();
    const auto each = [&](int a, auto use) {  // a group's tokens, 32 at a time: use(id, key, in the range?, whose are?)
        const int first = ACTIVE[a] * job.width;
#pragma unroll 4
        for (int id = first + lane; id < first + job.width; id += 32) {
            const u64 key = id < job.N ? key_at(id) : 0;
            const bool in = id < job.N && key >= low && key <= high;
            use(id, key, in, __ballot_sync(ALL, in));
        }
    };
    for (int a = warp; a < groups; a += WARPS) {
        int count = 0;
        each(a, [&](int id, u64, bool in, unsigned all) {
            count += __popc(all);
            if (others && id < job.N && !in) x += weight_at(id);
        });
        if (lane == 0) PLACES[a] = count;
    }
    __syncthreads();
    for (int base = 0; base < groups; base += THREADS) {
        int total;
        const int place = block_scan(base + t < groups ? PLACES[base + t] : 0, total, scratch_i);
        if (base + t < groups) PLACES[base + t] = n + place;
        n += total;
    }
    if (others) x = block_total(x, scratch_d);
    if (others && t == 0) job.others = x;
    __syncthreads();
    for (int a = warp; n <= LIST && a < groups; a += WARPS) {
        int place = PLACES[a];
        each(a, [&](int id, u64 key, bool in, unsigned all) {
            const int mine = place + __popc(all & ((1u << lane) - 1));
            if (in) LIST_KEYS[mine] = key, LIST_IDS[mine] = id;
            place += __popc(all);
        });
    }
    __syncthreads();
    for (int i = t; n <= LIST && i < n; i += THREADS) LIST_WEIGHTS[i] = weight_of(LIST_KEYS[i]);
    return n;
}

// ---- what top_k and top_p keep: keys above `key`, and those equal to it with an id beyond `id` ----

struct Bound { u64 key; int id; };

// By the list of n tokens. below, above: what the tokens left of it and right of it sum to.
__device__ __noinline__ Bound bound_of_list(int n, int top_k, double top_p, double below, double above) {
    const int t = threadIdx.x;
    // ORDER: places in the list, by key, then by place, which is the order of ids. A token's place in it is the number of
    // those before it, for which `parts` neighbouring threads compare it with all others: n * n compares in all, and no
    // barriers. A bitonic network took 7 us for 30 tokens and 12 for 70 (H100)
    int parts = 32;
    while (parts > 1 && n * parts > THREADS) parts /= 2;
    for (int base = 0; base < n; base += THREADS / parts) {
        const int i = base + t / parts;
        const u64 key = i < n ? LIST_KEYS[i] : 0;
        int rank = 0;
#pragma unroll 4
        for (int j = t % parts; j < n; j += parts) rank += LIST_KEYS[j] < key || (LIST_KEYS[j] == key && j < i);
        for (int offset = parts / 2; offset; offset /= 2) rank += __shfl_xor_sync(ALL, rank, offset);
        if (i < n && t % parts == 0) ORDER[rank] = i;
    }
    __syncthreads();
    const u64 least = top_k > 0 && top_k < n ? LIST_KEYS[ORDER[n - top_k]] : 0;
    int first = 0, removed = 0;
    double sums[LIST / THREADS], sum = below;
#pragma unroll
    for (int j = 0; j < LIST / THREADS; j++)
        if (j * THREADS < n) {
            const int r = j * THREADS + t, i = r < n ? ORDER[r] : 0;
            const bool kept = r < n && LIST_KEYS[i] >= least;
            const double w = kept ? LIST_WEIGHTS[i] : 0.0;
            double total = 0;
            first += __syncthreads_count(r < n && !kept);
            if (top_p < 1) sums[j] = sum + (block_scan(w, total, scratch_d) + w), sum += total;
            if (!kept) sums[j] = 1e300;
        }
    if (top_p >= 1) return {LIST_KEYS[ORDER[first]], -1};
    const double allowance = (1 - top_p) * (sum + above);
#pragma unroll
    for (int j = 0; j < LIST / THREADS; j++)
        if (j * THREADS < n) removed += __syncthreads_count(sums[j] <= allowance);
    const int at = min(first + removed, n - 1);  // the most likely token always stays
    const u64 lowest = LIST_KEYS[ORDER[at]];
    const int gone = at > first ? ORDER[at - 1] : -1;
    return {lowest, gone >= 0 && LIST_KEYS[gone] == lowest ? LIST_IDS[gone] : -1};
}

// A range of keys that holds the one at which a running sum, tokens ascending by key, first exceeds an allowance.
struct Range { u64 low, high; double below, above; };  // the sums on either side

// Narrows it until it holds no more tokens than a list, or one key. measure: of a key and an id; hint: a key known to be no
// higher. Keys that differ do so above their last `bits` bits: float32 logits without penalties take half the rounds.
template <class M> __device__ __forceinline__ Range bisect(M measure, double allowance, u64 hint, int bits) {
    u64 from = 0, to = job.largest >> bits, middle = hint >> bits ? hint >> bits : to - to / 2;
    double below = 0, above = 0;
    for (int count = job.N; from < to && count > LIST; middle = to - (to - from) / 2) {
        double left = 0, right = 0;
        int lefts = 0, rights = 0;
        for_all([&](int id, u64 key) {
            key >>= bits;
            if (key < from || key > to) return;
            const double x = measure(key << bits, id);
            if (key < middle) left += x, lefts++;
            else right += x, rights++;
        });
        left = block_total(left, scratch_d), right = block_total(right, scratch_d);
        lefts = block_total(lefts, scratch_i), rights = block_total(rights, scratch_i);
        if (below + left <= allowance) from = middle, below += left, count = rights;
        else to = middle - 1, above += right, count = lefts;
    }
    u64 low = from << bits, high = (to + 1 << bits) - 1;
    if (from == to) low = high = low >> 63 ? low : high;  // a float32's key: zeros below if it is positive, else ones
    return {low, high, below, above};
}

// By all N tokens.
__device__ __forceinline__ Bound bound_of_all(u64 hint) {
    const int bits = job.history ? 0 : 29;
    const auto restore = [] {  // what the list overwrote
        __syncthreads();
        for (int g = threadIdx.x; g < job.G; g += THREADS) GROUP_TOPS[g] = __ldcg(job.maxima + g) >> 32;
        if (job.relative) scale_groups();
        __syncthreads();
    };
    u64 least = 0;
    if (job.set.top_k > 0) {
        const Range range = bisect([](u64, int) { return 1.0; }, (double)(job.N - job.set.top_k), hint, bits);
        least = range.low;
        if (range.low < range.high) {
            const int n = gather(range.low, range.high, false);
            __syncthreads();
            least = bound_of_list(n, job.set.top_k - (int)range.above, 1.0, 0.0, 0.0).key;
            restore();
        }
    }
    if (job.set.top_p >= 1) return {least, -1};
    const auto measure = [=](u64 key, int id) { return key >= (least >> bits << bits) ? weight_at(id) : 0.0; };
    double x = 0;
    for_all([&](int id, u64 key) { x += measure(key, id); });
    const double allowance = (1 - job.set.top_p) * block_total(x, scratch_d);
    const Range range = bisect(measure, allowance, max(least, hint), bits);
    if (range.low < range.high) {
        const int n = gather(max(range.low, least), range.high, false);
        __syncthreads();
        const Bound bound = bound_of_list(n, 0, job.set.top_p, range.below, range.above);
        restore();
        return bound;
    }
    int equals = 0;  // the first ones of them go, by number
    for_all([&](int, u64 key) { equals += key == range.low; });
    equals = block_total(equals, scratch_i);
    const double gone = min(max(floor((allowance - range.below) / weight_of(range.low)), 0.0), equals - 1.0);
    double number = gone - 1;
    const auto is_equal = [=](int id) { return key_at(id) == range.low ? 1.0 : 0.0; };
    return {range.low, gone > 0 ? first_exceeding(job.N, is_equal, number, false) : -1};
}

// ---- the last block ----

// The lowest id that has the largest score; g: the first of this thread's groups that has it, or ALL.
__device__ __forceinline__ int first_largest(unsigned g) {
    const int t = threadIdx.x, lane = t % 32;
    g = __reduce_min_sync(ALL, g);
    if (lane == 0) scratch_i[t / 32] = g;
    __syncthreads();
    g = __reduce_min_sync(ALL, lane < WARPS ? (unsigned)scratch_i[lane] : ALL);
    for (int first = g * job.width;; first += 32) {
        const unsigned here = __ballot_sync(ALL, first + lane < job.N && key_at(min(first + lane, job.N - 1)) == job.largest);
        if (here) return first + __ffs(here) - 1;
    }
}

// For top_k any k segments of the vocabulary will do, each of some groups: twice as many as k let few others through.
__device__ __forceinline__ int segment_size(int top_k, int G) {
    int size = 32;
    while (size > 1 && (G + size - 1) / size < 2 * top_k) size /= 2;
    return size;
}

// The leading half of a key below which nothing can be chosen.
__device__ __forceinline__ unsigned threshold() {
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    unsigned least = 0;
    if (job.set.top_k > job.G) return 0;
    if (job.set.top_k > 0) {  // four bits a round, as 16 warps try 16 values; 8 bits of the mantissa are near enough
        const int size = segment_size(job.set.top_k, job.G), segments = (job.G + size - 1) / size;
        for (int shift = 28; shift >= 12; shift -= 4) {
            const unsigned tried = least | (unsigned)warp << shift;
            int reached = 0;
#pragma unroll 4
            for (int i = lane; i < segments; i += 32) reached += SEGMENT_TOPS[i] >= tried;
            reached = __reduce_add_sync(ALL, reached);
            if (lane == 0) scratch_i[warp] = reached >= job.set.top_k;
            __syncthreads();
            least |= (unsigned)(31 - __clz(__ballot_sync(ALL, lane < WARPS && scratch_i[lane]) | 1u)) << shift;
            __syncthreads();
        }
        return least;
    }
    double logarithm = MINUS_INFINITY;  // of the least weight
    if (job.set.top_p < 1) {
        double x = 0;
        for (int g = t; g < job.G; g += THREADS) x += GROUP_SUMS[g];
        const double allowance = (1 - job.set.top_p) * block_total(x, scratch_d);
        const double depth = log(job.N / allowance) + 1e-6;  // all of them at e^-depth would go together
        const double tried = exp(-depth * (warp + 1) / WARPS);
        x = 0;
        for (int g = lane; g < job.G; g += 32) {
            const double top = GROUP_SCALES[g], sum = GROUP_SUMS[g];
            x += top < tried ? sum : min(sum - top, (job.width - 1) * tried);
        }
        x = warp_total(x);
        if (lane == 0) scratch_i[warp] = warp == WARPS - 1 || x <= allowance * (1 - 1e-9);
        __syncthreads();
        logarithm = -depth * __ffs(__ballot_sync(ALL, lane < WARPS && scratch_i[lane])) / WARPS;
        __syncthreads();
    }
    if (job.set.min_p > 0) logarithm = max(logarithm, log(job.set.min_p));
    return key_of(job.top + job.set.temperature * (logarithm - 1e-9) - fabs(job.top) * 1e-15) >> 32;
}

__device__ __forceinline__ int draw(double target) {
    if (job.set.top_k == 0 && job.set.top_p >= 1 && job.set.min_p <= 0) {
        const int g = first_exceeding(job.G, [](int i) { return GROUP_SUMS[i]; }, target, true), first = g * job.width;
        const auto of_group = [=](int i) { return weight_at(first + i); };
        return first + first_exceeding(min(job.width, job.N - first), of_group, target, false);
    }
    const u64 low = (u64)threshold() << 32;
    const bool by_sums = job.set.top_k == 0 && job.set.top_p < 1;
    const int n = gather(low, job.largest, by_sums);
    __syncthreads();
    Bound bound = {low, -1};
    if (job.set.top_k > 0 || job.set.top_p < 1)
        bound = n > LIST ? bound_of_all(low) : bound_of_list(n, job.set.top_k, job.set.top_p, by_sums ? job.others : 0.0, 0.0);
    const auto kept = [=](u64 key, int id, double weight) {
        const bool in = key > bound.key || (key == bound.key && id > bound.id);
        return in && weight >= job.set.min_p ? weight : 0.0;
    };
    if (n > LIST) return first_exceeding(job.N, [=](int id) { return kept(key_at(id), id, weight_at(id)); }, target, true);
    const auto of_list = [=](int i) { return kept(LIST_KEYS[i], LIST_IDS[i], LIST_WEIGHTS[i]); };
    return LIST_IDS[first_exceeding(n, of_list, target, true)];
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(
    int* out, int* step, int* history, u64* maxima, double* sums, double* relative, int* done, const float* logits,
    const double* uniforms, int N, int per_lane, int U, int top_k, double temperature, double top_p, double min_p,
    double repetition, double presence, double frequency) {
    const Settings set = {temperature, top_p, min_p, repetition, presence, frequency, top_k < N ? top_k : 0};
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int width = 32 * per_lane, G = (N + width - 1) / width;

    const int group = blockIdx.x * WARPS + warp, end = min(N, (group + 1) * width);
    if (group < G) {
        u64 best = 0;
#pragma unroll 4
        for (int id = group * width + lane; id < end; id += 32) best = max(best, key_at(logits, history, set, id));
        best = warp_max(best);
        if (lane == 0) maxima[group] = best;
        if (sums) {
            double sum = 0;
            for (int id = group * width + lane; id < end; id += 32) {
                const u64 key = key_at(logits, history, set, id);
                const double w = best > MINUS_INFINITY_KEY ? weight_of(key, value_of(best), temperature) : 0.0;
                relative[id] = w, sum += w;
            }
            sum = warp_total(sum);
            if (lane == 0) sums[group] = sum;
        }
    }
    __threadfence();
    __syncthreads();
    if (t == 0) scratch_i[0] = atomicInc(reinterpret_cast<unsigned*>(done), gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (!scratch_i[0]) return;
    __threadfence();

    u64 largest = 0, mine = 0;
    unsigned first = ALL;
    const int size = segment_size(set.top_k, G);
#pragma unroll
    for (int j = 0; j < GROUPS / THREADS; j++) {
        const int g = j * THREADS + t;
        const u64 key = g < G ? __ldcg(maxima + g) : 0;
        if (key > mine) mine = key, first = g;
        unsigned top = key >> 32;
        GROUP_TOPS[g] = top;
        if (set.top_k > 0 && j * THREADS < G) {
            for (int offset = 1; offset < size; offset *= 2) top = max(top, __shfl_xor_sync(ALL, top, offset));
            if (g < G && g % size == 0) SEGMENT_TOPS[g / size] = top;
        }
    }
    largest = mine;
    largest = warp_max(largest);
    if (lane == 0) scratch_k[warp] = largest;
    __syncthreads();
    largest = warp_max(lane < WARPS ? scratch_k[lane] : 0);
    const int now = temperature > 0 ? *step : 0;
    if (t == 0) job = {set, logits, history, relative, maxima, largest, value_of(largest), 0.0, N, width, G};
    __syncthreads();
    if (largest >= INFINITY_KEY || largest <= MINUS_INFINITY_KEY || now < 0 || (temperature > 0 && now >= U)) {
        if (t == 0) *out = -1;
        return;
    }
    if (sums) {
        scale_groups();
        for (int g = t; g < G; g += THREADS) GROUP_SUMS[g] = __ldcg(sums + g) * GROUP_SCALES[g];
        __syncthreads();
    }
    const int token = temperature > 0 ? draw(uniforms[now]) : first_largest(mine == largest ? first : ALL);
    __syncthreads();  // other warps still read the history
    if (t == 0) {
        *out = token;
        if (temperature > 0) *step = now + 1;
        if (history) history[token] = history[token] ? history[token] + 1 : 2;
    }
}
