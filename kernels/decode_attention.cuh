// The attention stage of decode_step.cu, in its terms: UNITS groups of CH query heads that share a key head, each computed by one block
// or, where there are many keys, by up to MAX_SPLITS of them, which then merge their shares.
#pragma once
#include "decode_keys.cuh"

// 1 / sqrt(D), and 1 / log 2, so that the softmax needs powers of two only.
constexpr float QUERY_FACTOR = float(1.4426950408889634 / (D == 64 ? 8.0 : 11.313708498984761));

// One head's D projected values, gained, rotated and scaled, to out[0..D) in shared memory, and cut into three to `parts` if it is there; with
// `round` as KV_TYPE has them, and to `stored` as well if it is there. The whole warp; lane i holds elements E i .. E i + E - 1, so its partners in
// the rotation are those of lane i ^ 16.
__device__ __forceinline__ void finish_head(float* out, unsigned (*parts)[PARTS_PITCH], bool round, KV_TYPE* stored, const u64* words, unsigned tag,
                                            const float* gain, bool rotate, const Shared& shared, float factor, float eps, Patience& patience) {
    constexpr int E = D / 32;
    const int lane = threadIdx.x % 32, first = E * lane;
    float x[E / 2][2], g[E];
    if (gain)
#pragma unroll
        for (int e = 0; e < E; e++) g[e] = gain[first + e];
    read_pairs<E / 2>([&](int n) { return words + first + 2 * n; }, tag, x, patience);
    if (gain) {
        float squares = 0.0f;
#pragma unroll
        for (int e = 0; e < E; e++) squares = fmaf(x[e / 2][e % 2], x[e / 2][e % 2], squares), x[e / 2][e % 2] *= g[e];
        factor *= inverse_sqrt(warp_sum(squares) / D + eps);
    }
#pragma unroll
    for (int e = 0; e < E; e++) {
        float& a = x[e / 2][e % 2];
        const float other = __shfl_xor_sync(0xffffffffu, a, 16);
        if (rotate) {
            const float c = shared.cos[first % (D / 2) + e], s = shared.sin[first % (D / 2) + e];
            a = first < D / 2 ? a * c - other * s : a * c + other * s;
        }
    }
#pragma unroll
    for (int e = 0; e < E; e++) {
        float a = x[e / 2][e % 2] * factor;
        if (round) {
            KV_TYPE narrow;
            store(&narrow, a);
            a = to_float(narrow);
            if (stored) stored[first + e] = narrow;
        }
        out[first + e] = x[e / 2][e % 2] = a;
    }
    if (parts)
#pragma unroll
        for (int n = 0; n < E / 2; n++) {
            unsigned three[3];
            cut(x[n][0], x[n][1], three);
#pragma unroll
            for (int p = 0; p < 3; p++) parts[p][first / 2 + n] = three[p];
        }
}

template <class Me>
__device__ __forceinline__ void attend(Me& me, const u64* table, int l, int p, KV_TYPE* keys, KV_TYPE* values, u64* words, unsigned tag, float eps) {
    const Share mine(p);
    if (!mine.exists()) return;
    const int shift = mine.shift, n = 1 << shift, unit = mine.unit, split = mine.split, last = mine.last, kv = mine.kv();
    Shared& shared = me.shared;
    const int t = threadIdx.x, warp = t / 32, lane = t % 32;
    const bool newest = split == n - 1;  // this block has the new key, which is in nobody's cache yet

    const u64* projected = words + PROJECTED;
    if (warp < (newest ? CH + 2 : CH)) {
        const bool is_query = warp < CH, is_key = warp == CH, writes = !is_query && shared.known && unit * CH % (H / K) == 0;
        const u64* from = projected + (is_query ? (unit * CH + warp) * D : HD + (is_key ? 0 : K * D) + kv * D);
        const float* gain = QK_NORM && warp <= CH ? array<float>(table, l, is_query ? Q_NORM : K_NORM) : nullptr;
        KV_TYPE* stored = writes ? (is_key ? keys : values) + ((size_t)p * K + kv) * D : nullptr;
        float* const to = is_query ? shared.query[warp] : is_key ? shared.key : shared.value;
        finish_head(to, is_query ? shared.query_parts[warp] : nullptr, !is_query, stored, from, tag, gain, warp <= CH, shared,
                    is_query ? QUERY_FACTOR : 1.0f, eps, me.patience);
    }
    me.barrier();

    // Two warps have a frame, with nobody else to wait for.
    WarpAttention<KV_TYPE> attention;
    if (newest && warp == WARPS - 1) attention.begin_with_newest(shared);
    else attention.begin(shared);
    const int frames = mine.frames(), half = warp % WARPS_OF_FRAME * HALF;
    Ring ring = me.ring;
    ring.skip(warp / WARPS_OF_FRAME);
#pragma unroll 1
    for (int f = warp / WARPS_OF_FRAME; f < frames; f += WARPS / WARPS_OF_FRAME) {
        while (!mbarrier_try_wait(ring.full + ring.slot, ring.parity)) {}
        const int count = last - mine.first - f * FRAME_KEYS - half;
        if (count > 0) attention.add(ring.slots + ring.slot * SLOT, half, count);
        __syncwarp();
        if (lane < WARPS / WARPS_OF_FRAME) mbarrier_arrive(ring.empty + ring.slot);  // for a warp of every other frame
        ring.skip(WARPS / WARPS_OF_FRAME);
    }
    me.ring.skip(frames);
    attention.finish(shared);
    me.barrier();
    u64* shares = words + SHARES + (size_t)(unit * MAX_SPLITS) * (SHARE + 2 * CH);
#pragma unroll 1
    for (int e = t; e < SHARE; e += CONSUMERS) {
        const int h = e / D;
        float top = LOWEST, weight = 0.0f, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared.top[h][w]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = exp2f(shared.top[h][w] - top);
            weight = fmaf(shared.weight[h][w], factor, weight);
            sum = fmaf(shared.merge[w][e], factor, sum);
        }
        if (n == 1) {
            publish_to_all(words + ATTENDED + unit * SHARE + e, __fdividef(sum, weight), tag);
        } else {
            u64* to = shares + (size_t)split * (SHARE + 2 * CH);
            publish(to + e, sum, tag);
            if (e % D == 0) publish(to + SHARE + 2 * h, top, tag), publish(to + SHARE + 2 * h + 1, weight, tag);
        }
    }
    if (n == 1) return;
    // each of the n blocks merges SHARE / n elements, n lanes for each of them
#pragma unroll 1
    for (int e = t; e < SHARE; e += CONSUMERS) {
        const int element = split * (SHARE >> shift) + (e >> shift), h = element / D;
        const u64* from = shares + (size_t)(e & (n - 1)) * (SHARE + 2 * CH);
        float state[2][2];  // polled together: one way there and back
        read_pairs<2>([&](int n) { return from + (n ? element / 2 * 2 : SHARE + 2 * h); }, tag, state, me.patience);
        float sum = element % 2 ? state[1][1] : state[1][0];
        float top = state[0][0];
        for (int offset = n / 2; offset; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
        const float factor = exp2f(state[0][0] - top);
        float weight = state[0][1] * factor;
        sum *= factor;
        for (int offset = n / 2; offset; offset >>= 1) {
            weight += __shfl_xor_sync(0xffffffffu, weight, offset);
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
        if ((e & (n - 1)) == 0) publish_to_all(words + ATTENDED + unit * SHARE + element, __fdividef(sum, weight), tag);
    }
}
