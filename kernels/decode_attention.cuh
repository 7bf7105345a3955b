// The attention stage of decode_step.cu, in its terms: UNITS groups of CH query heads that share a key head, each computed by one block
// or, where there are many keys, by up to MAX_SPLITS of them, which then merge their shares.
#pragma once

// 1 / sqrt(D), and 1 / log 2, so that the softmax needs powers of two only.
constexpr float QUERY_FACTOR = float(1.4426950408889634 / (D == 64 ? 8.0 : 11.313708498984761));

constexpr int LANES = D / 8, KEYS = 32 / LANES;             // of a key; that a warp reads at once
constexpr int LOADS = FRAME_KEYS / (WARPS * KEYS);          // of a warp in a frame
constexpr int FRAMES = 2, BATCH = FRAMES * LOADS;  // at a time

// Running softmax of one query head over the keys that a lane's group of LANES lanes has seen; each lane holds 8 elements.
struct Running {
    float top = MINUS_INFINITY, weight = 0.0f, sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
};

// One head's D projected values, gained, rotated and scaled, to out[0..D) in shared memory; with `round` as KV_TYPE has them, and to `stored`
// as well if it is there. The whole warp; lane i holds elements E i .. E i + E - 1, so its partners in the rotation are those of lane i ^ 16.
__device__ __forceinline__ void finish_head(float* out, bool round, KV_TYPE* stored, const u64* words, unsigned tag, const float* gain, bool rotate,
                                            const Shared& shared, float factor, float eps, Patience& patience) {
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
        out[first + e] = a;
    }
}

__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
    for (int offset = LANES / 2; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Makes room in the running softmax for N scores, in units of log 2, and turns them into weights; -inf becomes 0.
template <int N> __device__ __forceinline__ void weigh(Running& head, float (&score)[N]) {
    float top = head.top;
#pragma unroll
    for (int u = 0; u < N; u++) top = fmaxf(top, score[u]);
    const float base = top == MINUS_INFINITY ? 0.0f : top, shrink = exp2f(head.top - base);
    head.top = top;
    head.weight *= shrink;
#pragma unroll
    for (int e = 0; e < 8; e++) head.sum[e] *= shrink;
#pragma unroll
    for (int u = 0; u < N; u++) score[u] = exp2f(score[u] - base), head.weight += score[u];
}

// Elements `first` to first + 7 of a row of the ring's keys or values, zeros if it is not there: what lies in its place may be NaN. Its boxes
// have rows of 128 bytes and piece n of row r at place n ^ (r + slot) % 8, as each slot begins 128 bytes further off.
__device__ __forceinline__ void load_row(const unsigned char* rows, int slot, int row, int first, bool there, float (&x)[8]) {
    constexpr int PIECES = sizeof(KV_TYPE) / 2, IN_PIECE = 8 / PIECES, IN_BOX = 8 * IN_PIECE;  // elements
    alignas(16) KV_TYPE raw[8];
#pragma unroll
    for (int n = 0; n < PIECES; n++) {
        const int at = first + n * IN_PIECE, place = at % IN_BOX / IN_PIECE ^ (row + slot) % 8;
        const uint4 bits = *reinterpret_cast<const uint4*>(rows + at / IN_BOX * (FRAME_KEYS * 128) + row * 128 + 16 * place);
        reinterpret_cast<uint4*>(raw)[n] = there ? bits : uint4{0, 0, 0, 0};
    }
    load8(raw, x);
}

template <class Me>
__device__ __forceinline__ void attend(Me& me, const u64* table, int l, int p, KV_TYPE* keys, KV_TYPE* values, u64* words, unsigned tag, float eps) {
    const Share mine(p);
    if (!mine.exists()) return;
    const int shift = mine.shift, n = 1 << shift, unit = mine.unit, split = mine.split, last = mine.last, kv = mine.kv();
    Shared& shared = me.shared;
    const int t = threadIdx.x, warp = t / 32, lane = t % 32, group = lane / LANES, own = lane % LANES * 8;
    const bool newest = split == n - 1;  // this block has the new key, which is in nobody's cache yet

    const u64* projected = words + PROJECTED;
    if (warp < (newest ? CH + 2 : CH)) {
        const bool is_query = warp < CH, is_key = warp == CH, writes = !is_query && shared.known && unit * CH % (H / K) == 0;
        const u64* from = projected + (is_query ? (unit * CH + warp) * D : HD + (is_key ? 0 : K * D) + kv * D);
        const float* gain = QK_NORM && warp <= CH ? array<float>(table, l, is_query ? Q_NORM : K_NORM) : nullptr;
        KV_TYPE* stored = writes ? (is_key ? keys : values) + ((size_t)p * K + kv) * D : nullptr;
        finish_head(is_query ? shared.query[warp] : is_key ? shared.key : shared.value, !is_query, stored, from, tag, gain, warp <= CH, shared,
                    is_query ? QUERY_FACTOR : 1.0f, eps, me.patience);
    }
    me.barrier();

    float query[CH][8];
    Running head[CH];
#pragma unroll
    for (int h = 0; h < CH; h++) load8(shared.query[h] + own, query[h]);
#pragma unroll 1
    for (int j0 = mine.first; j0 < last; j0 += FRAMES * FRAME_KEYS) {
        int slot[FRAMES], there[FRAMES];  // rows of each frame
#pragma unroll
        for (int f = 0; f < FRAMES; f++) {
            slot[f] = me.ring.slot, there[f] = min(FRAME_KEYS, last - j0 - f * FRAME_KEYS);
            if (there[f] <= 0) continue;
            while (!mbarrier_try_wait(me.ring.full + me.ring.slot, me.ring.parity)) {}
            me.ring.next();
        }
        // No branch from here on, so that the loads and sums of all keys overlap: 1.6 instead of 3.4 us for 128 keys (H100).
        float score[CH][BATCH];
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const int f = u / LOADS, row = (u % LOADS * WARPS + warp) * KEYS + group;
            float x[8];
            load_row(me.ring.slots + slot[f] * SLOT_PITCH, slot[f], row, own, true, x);
#pragma unroll
            for (int h = 0; h < CH; h++) {
                float sum = 0.0f;
#pragma unroll
                for (int e = 0; e < 8; e++) sum = fmaf(query[h][e], x[e], sum);
                sum = lanes_sum(sum);
                score[h][u] = row < there[f] ? sum : MINUS_INFINITY;
            }
        }
#pragma unroll
        for (int h = 0; h < CH; h++) weigh(head[h], score[h]);
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const int f = u / LOADS, row = (u % LOADS * WARPS + warp) * KEYS + group;
            float x[8];
            load_row(me.ring.slots + slot[f] * SLOT_PITCH + SLOT / 2, slot[f], row, own, row < there[f], x);
#pragma unroll
            for (int h = 0; h < CH; h++)
#pragma unroll
                for (int e = 0; e < 8; e++) head[h].sum[e] = fmaf(score[h][u], x[e], head[h].sum[e]);
        }
        __syncwarp();
        if (lane == 0)
#pragma unroll
            for (int f = 0; f < FRAMES; f++)
                if (there[f] > 0) mbarrier_arrive(me.ring.empty + slot[f]);
    }
    if (newest && warp == WARPS - 1) {
        float x[8], y[8];
        load8(shared.key + own, x), load8(shared.value + own, y);
#pragma unroll
        for (int h = 0; h < CH; h++) {
            float score[1] = {0.0f};
#pragma unroll
            for (int e = 0; e < 8; e++) score[0] = fmaf(query[h][e], x[e], score[0]);
            score[0] = lanes_sum(score[0]);
            if (group) score[0] = MINUS_INFINITY;
            weigh(head[h], score);
#pragma unroll
            for (int e = 0; e < 8; e++) head[h].sum[e] = fmaf(score[0], y[e], head[h].sum[e]);
        }
    }

    // the groups of the warp, then the warps of the block
#pragma unroll
    for (int h = 0; h < CH; h++) {
#pragma unroll
        for (int offset = LANES; offset < 32; offset *= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, head[h].top, offset), top = fmaxf(head[h].top, other);
            const float base = top == MINUS_INFINITY ? 0.0f : top, mine = exp2f(head[h].top - base), theirs = exp2f(other - base);
            head[h].top = top;
            head[h].weight = head[h].weight * mine + __shfl_xor_sync(0xffffffffu, head[h].weight, offset) * theirs;
#pragma unroll
            for (int e = 0; e < 8; e++)
                head[h].sum[e] = head[h].sum[e] * mine + __shfl_xor_sync(0xffffffffu, head[h].sum[e], offset) * theirs;
        }
        if (group == 0) {
            float4* to = reinterpret_cast<float4*>(shared.merge[warp] + h * D + own);
            to[0] = make_float4(head[h].sum[0], head[h].sum[1], head[h].sum[2], head[h].sum[3]);
            to[1] = make_float4(head[h].sum[4], head[h].sum[5], head[h].sum[6], head[h].sum[7]);
        }
        if (lane == 0) shared.top[h][warp] = head[h].top, shared.weight[h][warp] = head[h].weight;
    }
    me.barrier();
    u64* shares = words + SHARES + (size_t)(unit * MAX_SPLITS) * (SHARE + 2 * CH);
#pragma unroll 1
    for (int e = t; e < SHARE; e += CONSUMERS) {
        const int h = e / D;
        float top = MINUS_INFINITY, weight = 0.0f, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared.top[h][w]);
        const float base = top == MINUS_INFINITY ? 0.0f : top;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = exp2f(shared.top[h][w] - base);
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
