// The choice from longer lists, and where more tokens than a list holds may be kept (equal logits, a flat nucleus): bisection
// over the whole vocabulary, right, but slower by one or two orders of magnitude. Part of sample.cu.
#pragma once
#include "sample_list.cuh"

namespace sampling {

// What is kept: keys above `key`, and those equal to it with an id beyond `id`.
struct Bound { u64 key; int id; };

__device__ __forceinline__ double kept_weight(const Shared& s, Bound bound, u64 key, int id, double weight) {
    const bool in = key > bound.key || (key == bound.key && id > bound.id);
    return in && weight >= s.job.set.min_p ? weight : 0.0;
}
__device__ __noinline__ double weight_at(const Shared& s, int id) {
    const Job& job = s.job;
    return job.relative ? __ldcg(job.relative + id) * s.scales[id >> job.shift] : weight_of(job, key_at(job, id));
}
// use(id, key) for this thread's share of all tokens.
template <class F> __device__ __forceinline__ void for_all(const Job& job, F use) {
    for_ids(job.logits, job.history, threadIdx.x, THREADS, job.N, [&](int id, float logit, int uses) {
        use(id, key_of_logit(logit, uses, job.set));
    });
}

// Marks the groups that have a token of that rank.
__device__ __noinline__ void mark_all(Shared& s, unsigned rank) {
#pragma unroll 1
    for (int g = threadIdx.x; g < s.job.G; g += THREADS)
        if (s.tops[g] >= rank) s.active[atomicAdd(&s.groups, 1)] = g;
    block_barrier();
}

// ---- sums in the order of items ----

// What first_exceeding sums: the list in the order of ids; groups' sums; weights from `first` on; weights of what the bound
// keeps; 1 for each key like it.
enum Item { LISTED, GROUP, IN_GROUP, KEPT, EQUAL };

__device__ __noinline__ double item(Shared& s, Item what, Bound bound, int first, int i) {
    if (what == LISTED) return s.weights[s.by_id[i]];
    if (what == GROUP) return s.sums[i];
    if (what == IN_GROUP) return weight_at(s, first + i);
    const u64 key = key_at(s.job, i);
    return what == KEPT ? kept_weight(s, bound, key, i, weight_at(s, i)) : key == bound.key;
}

// The first of n items, in order, whose running sum exceeds the target, which is a share of the whole sum if `is_share`; on
// return it is less the sum before the item. The whole block calls this, and every thread gets the answer.
__device__ __noinline__ int first_exceeding(Shared& s, Item what, Bound bound, int first, int n, double& target, bool is_share) {
    const int t = threadIdx.x;
    int begin = 0, end = n;
    while (true) {
        const int size = (end - begin + THREADS - 1) / THREADS, stop = min(end, begin + (t + 1) * size);
        double x = 0, total;
#pragma unroll 1
        for (int i = begin + t * size; i < stop; i++) x += item(s, what, bound, first, i);
        const double sum = block_scan(s, x, total);
        if (is_share) target *= total, is_share = false;
        if (t == 0) s.first = THREADS, s.last = 0;
        block_barrier();
        if (x > 0) atomicMax(&s.last, t);
        if (x > 0 && sum > target) atomicMin(&s.first, t);
        block_barrier();
        // a range's sum and that of its parts may differ in the last place: then none exceeds, and the last one is it
        const int pick = s.first < THREADS ? s.first : s.last;
        if (t == pick) s.before = sum - x;
        block_barrier();
        target -= s.before;
        begin += pick * size, end = min(end, begin + size);
        if (size == 1) return begin;
    }
}

__device__ __noinline__ int draw_by_temperature(Shared& s, double share) {
    const int g = first_exceeding(s, GROUP, {}, 0, s.job.G, share, true), first = g << s.job.shift;
    return first + first_exceeding(s, IN_GROUP, {}, first, min(1 << s.job.shift, s.job.N - first), share, false);
}

// ---- a list of up to LIST tokens ----

// s.weights, s.by_key and s.by_id from the list of n tokens. A token's place is the number of those before it, for which
// `parts` neighbouring threads compare it with all others. Ends with a barrier.
__device__ __noinline__ void sort_list(Shared& s, int n) {
    const int bits = sharing(n), parts = 1 << bits, part = threadIdx.x & (parts - 1);
#pragma unroll 1
    for (int base = 0; base < n; base += THREADS >> bits) {
        const int i = base + (threadIdx.x >> bits);
        const u64 key = i < n ? s.keys[i] : 0;
        const int id = i < n ? s.ids[i] : 0;
        int ranks = 0;  // by key in the upper half, by id in the lower one
#pragma unroll 4
        for (int j = part; j < n; j += parts) {
            const bool before = s.ids[j] < id;
            ranks += (s.keys[j] < key || (s.keys[j] == key && before)) << 16 | before;
        }
#pragma unroll 1
        for (int offset = parts / 2; offset; offset /= 2) ranks += __shfl_xor_sync(ALL, ranks, offset);
        if (i < n && part == 0) s.by_key[ranks >> 16] = i, s.by_id[ranks & 0xffff] = i, s.weights[i] = weight_of(s.job, key);
    }
    block_barrier();
}

// s.running[0..n) become their running sums. Ends with a barrier.
__device__ __noinline__ void running_sums(Shared& s, int n) {
    double before = 0;
#pragma unroll 1
    for (int base = 0; base < n; base += THREADS) {
        const int i = base + threadIdx.x;
        double total;
        const double sum = block_scan(s, i < n ? s.running[i] : 0.0, total);
        if (i < n) s.running[i] = before + sum;
        before += total;
    }
    block_barrier();
}

// By the sorted list of n tokens. whole: what all tokens sum to, 0 if the list has all; above: those beyond it.
__device__ __noinline__ Bound bound_of_list(Shared& s, int n, int top_k, double top_p, double whole, double above) {
    const u64 least = top_k > 0 && top_k < n ? s.keys[s.by_key[n - top_k]] : 0;
    int at = 0;
#pragma unroll 1
    for (int base = 0; base < n; base += THREADS) {
        const int r = base + threadIdx.x, i = r < n ? s.by_key[r] : 0;
        const bool kept = r < n && s.keys[i] >= least;
        if (r < n) s.running[r] = kept ? s.weights[i] : 0.0;
        at += block_count(s, r < n && !kept);
    }
    if (top_p < 1) {
        running_sums(s, n);
        const double sum = s.running[n - 1], below = whole > 0 ? max(whole - above - sum, 0.0) : 0.0;
        const double allowance = (1 - top_p) * (whole > 0 ? whole : sum);
        int removed = 0;
#pragma unroll 1
        for (int base = 0; base < n; base += THREADS) {
            const int r = base + threadIdx.x;
            removed += block_count(s, r < n && below + s.running[r] <= allowance);
        }
        at = max(at, min(removed, n - 1));  // the most likely token always stays
    }
    const u64 lowest = s.keys[s.by_key[at]];
    const int gone = at > 0 ? s.by_key[at - 1] : -1;
    return {lowest, gone >= 0 && s.keys[gone] == lowest ? s.ids[gone] : -1};
}

// ---- all tokens ----

// A range of keys that holds the one at which a running sum, tokens ascending by key, first exceeds an allowance.
struct Range { u64 low, high; double below, above; };  // the sums on either side

// Narrows it until it holds no more tokens than a list, or one key. Summed are the weights of keys from `least` on, or the
// tokens counted (`least` 0); hint: a key known to be no higher. Keys that differ do so above their last `bits` bits: float32
// logits without penalties take half the rounds.
__device__ __noinline__ Range bisect(Shared& s, bool counted, u64 least, double allowance, u64 hint, int bits) {
    const Job& job = s.job;
    u64 from = 0, to = job.largest >> bits, middle = hint >> bits ? hint >> bits : to - to / 2;
    double below = 0, above = 0;
#pragma unroll 1
    for (int count = job.N; from < to && count > LIST; middle = to - (to - from) / 2) {
        double left = 0, right = 0, rights = 0;
        for_all(job, [&](int id, u64 key) {
            key >>= bits;
            if (key < from || key > to) return;
            const double x = counted ? 1.0 : key >= least >> bits ? weight_at(s, id) : 0.0;
            if (key < middle) left += x;
            else right += x, rights++;
        });
        left = block_total(s, left), right = block_total(s, right), rights = block_total(s, rights);
        if (below + left <= allowance) from = middle, below += left, count = (int)rights;
        else to = middle - 1, above += right, count -= (int)rights;
    }
    u64 low = from << bits, high = (to + 1 << bits) - 1;
    if (from == to) low = high = low >> 63 ? low : high;  // a float32's key: zeros below if it is positive, else ones
    return {low, high, below, above};
}

__device__ __forceinline__ Bound bound_of_all(Shared& s, u64 hint) {
    const Job& job = s.job;
    const int bits = job.history ? 0 : 29;
    u64 least = 0;
    if (job.set.top_k > 0) {
        const Range range = bisect(s, true, 0, (double)(job.N - job.set.top_k), hint, bits);
        least = range.low;
        if (range.low < range.high) {
            mark_all(s, rank_of_key(range.low));
            const int n = gather(s, rank_of_key(range.low), range.low, range.high);
            sort_list(s, n);
            least = bound_of_list(s, n, job.set.top_k - (int)range.above, 1.0, 0.0, 0.0).key;
            block_barrier();
        }
    }
    if (job.set.top_p >= 1) return {least, -1};
    double x = 0;
    for_all(job, [&](int id, u64 key) { x += key >> bits >= least >> bits ? weight_at(s, id) : 0.0; });
    const double whole = block_total(s, x), allowance = (1 - job.set.top_p) * whole;
    const Range range = bisect(s, false, least, allowance, max(least, hint), bits);
    if (range.low < range.high) {
        const u64 low = max(range.low, least);
        mark_all(s, rank_of_key(low));
        const int n = gather(s, rank_of_key(low), low, range.high);
        sort_list(s, n);
        return bound_of_list(s, n, 0, job.set.top_p, whole, range.above);
    }
    x = 0;  // how many are equal: the first ones of them go, by number
    for_all(job, [&](int, u64 key) { x += key == range.low; });
    const double equals = block_total(s, x);
    const double gone = min(max(floor((allowance - range.below) / weight_of(job, range.low)), 0.0), equals - 1);
    double number = gone - 1;
    return {range.low, gone > 0 ? first_exceeding(s, EQUAL, {range.low, 0}, 0, job.N, number, false) : -1};
}

// From a list of n tokens, or from all if there are more; arguments as of draw_from_short_list. rank: below all that may be kept.
__device__ __noinline__ int draw_from_all(Shared& s, int n, unsigned rank, double whole, double share) {
    const Job& job = s.job;
    u64 largest = 0;
    for_all(job, [&](int, u64 key) { largest = max(largest, key); });
    largest = block_max(s, largest);
    if (!has_choice(largest)) return -1;
    if (threadIdx.x == 0) s.job.largest = largest, s.job.top = value_of(largest);
    block_barrier();
    const bool bounded = job.set.top_k > 0 || job.set.top_p < 1;
    Bound bound = {0, -1};
    if (n > LIST) {
        if (bounded) bound = bound_of_all(s, rank ? key_of((double)value_of_rank(rank)) : 0);
        return first_exceeding(s, KEPT, bound, 0, job.N, share, true);
    }
    sort_list(s, n);
    if (bounded) bound = bound_of_list(s, n, job.set.top_k, job.set.top_p, whole, 0.0);
    block_barrier();
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += THREADS) s.weights[i] = kept_weight(s, bound, s.keys[i], s.ids[i], s.weights[i]);
    block_barrier();
    return s.ids[s.by_id[first_exceeding(s, LISTED, bound, 0, n, share, true)]];
}

}  // namespace sampling
