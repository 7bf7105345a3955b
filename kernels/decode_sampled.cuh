// The choice of the next token in decode_step.cu as sample.cu makes it, in the terms of both, by the last block.
#pragma once

// Where top_k comes first and nothing is penalised, that block follows the head while the others compute it: of each lot, the rows of a pass of
// a block, two warps publish the ranks of their two largest; from all but the LATE last passes it knows what the k best logits cannot be below,
// and fetches all of them; when the head ends, it looks for what has come since. All else takes another look at the logits, and fences.
constexpr int LOT = PASS * ROWS;  // rows at most
constexpr int LATE = 4;           // passes; 5 us each with 0.6B on an H100, and what is done before them takes 15 to 20

__device__ __forceinline__ int passes_of_head(int V) {
    const int units = (V + ROWS - 1) / ROWS, blocks = gridDim.x;
    return ((units + blocks - 1) / blocks * ROWS + LOT - 1) / LOT;
}
__device__ __forceinline__ bool in_lots(const unsigned* tops, const int* history, int V) {
    return tops && !history && passes_of_head(V) * int(gridDim.x) <= MAX_LOTS;
}

// Lot n is that of pass n / gridDim.x of block n % gridDim.x.
struct Lot {
    int first, last;
    __device__ Lot(int V, unsigned n) {
        const Deal rows(V, n % gridDim.x - blockIdx.x, ROWS);
        first = rows.first + n / gridDim.x * LOT, last = min(rows.last, first + LOT);
    }
};

// What a warp publishes of its half of a lot: the largest rank, or ALL from a block that gave up; and LANE_BITS of whose row that is, below the
// second largest rank, rounded up.
constexpr unsigned LANE_BITS = 31;

// By thread t, the first two warps, its row of the lot that this block has just computed.
__device__ __forceinline__ void publish_lot(u64* words, int pass, unsigned tag, bool there, float logit, bool lost) {
    const unsigned rank = there ? sampling::rank_of(logit) : 0, top = __reduce_max_sync(0xffffffffu, rank), lane = threadIdx.x % 32;
    const unsigned first = __ffs(__ballot_sync(0xffffffffu, rank == top)) - 1;
    const unsigned second = __reduce_max_sync(0xffffffffu, lane == first ? 0 : min(rank, ~LANE_BITS));
    if (lane == 0)
        store_relaxed2(words + TOPS + 4 * (pass * gridDim.x + blockIdx.x) + threadIdx.x / 32 * 2, (u64)tag << 32 | (lost ? sampling::ALL : top),
                       (u64)tag << 32 | ((second + LANE_BITS & ~LANE_BITS) | first));
}

struct Tops {
    unsigned top[2] = {0, 0}, rest[2] = {0, 0};  // of each half
    __device__ unsigned largest() const { return max(top[0], top[1]); }
};

// Lots n, n + CONSUMERS, .., zeros from `end` on and where there is none. Waits for them. Sets `lost` if a block that computed one gave up.
template <int N> __device__ __forceinline__ void read_lots(const u64* words, int V, int n, int end, unsigned tag, Tops (&lots)[N], int* lost,
                                                           Patience& patience) {
    bool there[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
        const Lot lot(V, n + j * CONSUMERS);
        there[j] = n + j * CONSUMERS < end && lot.first < lot.last;
    }
#pragma unroll 1
    for (unsigned tries = 0;; tries++) {
        bool ready = true;
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u64 a = (u64)tag << 32, b = a;
                if (there[j]) load_relaxed2(words + TOPS + 4 * (n + j * CONSUMERS) + 2 * h, a, b);
                ready &= unsigned(a >> 32) == tag && unsigned(b >> 32) == tag;
                lots[j].top[h] = unsigned(a), lots[j].rest[h] = unsigned(b);
            }
        if (ready || (tries % 256 == 255 && patience.over())) break;
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        if (lots[j].largest() != sampling::ALL) continue;  // or a logit is NaN
        if (__float_as_uint(read_word(words + BEST + 2 * ((n + j * CONSUMERS) % gridDim.x), tag, patience))) *lost = 1;
    }
}

static_assert(sampling::GROUPS > sampling::LIST, "");

// Adds the tokens of lots s.active[first..last) with a rank from `rank` on to the list, in any order.
__device__ __noinline__ void gather_lots(sampling::Shared& s, int V, unsigned rank, int first, int last) {
    constexpr int TOGETHER = 4, LOADS = LOT / 32;  // lots whose loads are on their way at once, of a warp
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float least = sampling::value_of_rank(rank);
#pragma unroll 1
    for (int a = first + warp; a < last; a += TOGETHER * WARPS) {
        int ids[TOGETHER * LOADS];
        float logit[TOGETHER * LOADS];
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            const bool there = a + j * WARPS < last;
            const Lot lot(V, there ? s.active[a + j * WARPS] : 0);
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int id = lot.first + 32 * i + lane;
                ids[j * LOADS + i] = there && id < lot.last ? id : s.job.N;
            }
        }
        s.job.logits.get(ids, s.job.N, logit);
#pragma unroll
        for (int j = 0; j < TOGETHER * LOADS; j++) {
            if (logit[j] < least) continue;  // NaN is not
            const int place = atomicAdd(&s.count, 1);
            if (place < sampling::LIST) s.ids[place] = ids[j], s.keys[place] = sampling::key_of_logit(logit[j], 0, s.job.set);
        }
    }
}

// The token, or NO_CHOICE; `lost` if a block that computed logits gave up, or this one does.
__device__ __noinline__ int choose_from_lots(sampling::Shared& s, const sampling::Inputs& in, const sampling::Random& random, int V, const u64* words,
                                             int* lost, Patience patience) {
    const int t = threadIdx.x, blocks = gridDim.x, passes = passes_of_head(V), all = passes * blocks, early = max(1, passes - LATE) * blocks;
    const unsigned tag = in.logits.tag;
    if (t == 32) s.job = {in.set, in.logits, nullptr, nullptr, 0, 0.0, 0.0, in.N, in.shift, in.groups()};
    if (t == 0) s.groups = s.threshold = s.count = 0;
#pragma unroll 1
    for (int i = t; i < in.segments; i += CONSUMERS) s.segments[i] = 0;
    block_barrier();
#pragma unroll 1
    for (int n = t; n < early; n += CONSUMERS) {
        Tops its[1];
        read_lots(words, V, n, early, tag, its, lost, patience);
        const unsigned top = s.lots[n] = its[0].largest();
        if (top) atomicMax(s.segments + (n & (in.segments - 1)), top);
    }
    if (patience.lost) *lost = 1;
    block_barrier();
    if (*lost) return NO_CHOICE;  // what is gathered must be sure to come
    const unsigned rank = max(sampling::rank_of(-sampling::LARGEST_FLOAT), threshold_of_top_k(s, in.segments));
    const auto mark = [&](int n) {
        const int place = atomicAdd(&s.groups, 1);
        if (place < sampling::GROUPS) s.active[place] = n;
    };
#pragma unroll 1
    for (int n = t; n < early; n += CONSUMERS)
        if (s.lots[n] >= rank) mark(n);
    block_barrier();
    const int before = min(s.groups, sampling::GROUPS);
    gather_lots(s, V, rank, 0, before);
    block_barrier();  // s.groups has been read
    // A rehearsal, which brings the instructions: a layer's have pushed them out of the caches.
    if (before > 0 && s.count <= sampling::SHORT) draw_from_short_list(s, s.count, 0.0, random.share);  // not s.count > 0: others add late ones

    // A late lot's only token comes with it, which saves the way to its logits: 2.5 us.
    const auto add = [&](int n, const Tops& its) {
        if (its.largest() < rank) return;
        const unsigned zero = sampling::rank_of(0.0f);  // of subnormal numbers too
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (its.top[h] >= rank && ((its.rest[h] & ~LANE_BITS) >= rank || its.top[h] == zero || its.top[h] == sampling::ALL)) return mark(n);
#pragma unroll 1
        for (int h = 0; h < 2; h++) {
            if (its.top[h] < rank) continue;
            const int place = atomicAdd(&s.count, 1);
            if (place >= sampling::LIST) continue;
            s.ids[place] = Lot(V, n).first + 32 * h + (its.rest[h] & LANE_BITS);
            s.keys[place] = sampling::key_of_logit(sampling::value_of_rank(its.top[h]), 0, s.job.set);
        }
    };
#pragma unroll 1
    for (int n = early + t; n < all; n += 2 * CONSUMERS) {
        Tops its[2];
        read_lots(words, V, n, all, tag, its, lost, patience);
        add(n, its[0]), add(n + CONSUMERS, its[1]);
    }
    if (V <= (blocks - 1) * ROWS)  // some have no lot
#pragma unroll 1
        for (int b = t; b < blocks; b += CONSUMERS)
            if (__float_as_uint(read_word(words + BEST + 2 * b, tag, patience))) *lost = 1;
    if (patience.lost) *lost = 1;
    block_barrier();
    if (*lost) return NO_CHOICE;
    const int marked = min(s.groups, sampling::GROUPS);
    if (marked > before) {
        gather_lots(s, V, rank, before, marked);
        block_barrier();
    }
    const int n = s.count;  // more than a list holds if s.active could not hold all lots
    int token = NO_CHOICE;
    if (random.allowed && n > 0) {
        if (n <= sampling::SHORT) token = draw_from_short_list(s, n, 0.0, random.share);
        else {
#pragma unroll 1
            for (int g = t; g < s.job.G; g += CONSUMERS) s.tops[g] = sampling::ALL;  // any group may have any rank
            if (t == 0) s.groups = 0;
            block_barrier();
            token = draw_from_all(s, n, rank, 0.0, random.share);
        }
    }
    if (t == 0 && token >= 0) *in.step = random.now + 1;
    return token;
}

// Chooses in the memory of its ring, which is empty then.
__device__ __noinline__ Chosen choose_token(Shared& shared, Patience patience, const sampling::Inputs& in, int V, u64* words) {
    const unsigned tag = in.logits.tag;
    const int t = threadIdx.x;
    const bool lots = shared.lots;
    block_barrier();  // the block's logits are there
    if (!lots) {
        const Deal head = shared.head;
#pragma unroll 1
        for (int g = (head.first >> in.shift) + t / 32; g << in.shift < min(head.last, in.N); g += WARPS) look_at_group(in, g);
        block_barrier();
        if (t == 0) __threadfence();
    }
    if (t == 0) store_relaxed(words + BEST + 2 * blockIdx.x, (u64)tag << 32 | shared.lost);
    if (chooses()) {
        sampling::Shared& s = *reinterpret_cast<sampling::Shared*>(reinterpret_cast<unsigned char*>(&shared) - SLOTS * SLOT);
        int token = NO_CHOICE;
        if (lots) token = choose_from_lots(s, in, shared.random, V, words, &shared.lost, patience);
        else {
#pragma unroll 1
            for (int b = t; b < int(gridDim.x); b += CONSUMERS)
                if (__float_as_uint(read_word(words + BEST + 2 * b, tag, patience)) || patience.lost) shared.lost = 1;
            __threadfence();
            block_barrier();
            unsigned top[sampling::GROUPS / sampling::THREADS];
            load_tops(in, top);
            if (!shared.lost) token = choose(s, in, shared.random, top);
            if (in.history) {
                if (t == 0) __threadfence();  // all will look at it
                block_barrier();
            }
        }
        const u64 state = (u64)tag << 32 | unsigned(shared.lost ? LOST : shared.halted ? ENDED : 0);
#pragma unroll 1
        for (int b = t; b < int(gridDim.x); b += CONSUMERS) store_relaxed2(words + CHOSEN + b * CHOSEN_PITCH, (u64)tag << 32 | unsigned(token), state);
        fence_proxy_async();
    }
    float both[1][2];
    read_pairs<1>([&](int) { return words + CHOSEN + blockIdx.x * CHOSEN_PITCH; }, tag, both, patience);
    if (in.history) __threadfence();
    if (patience.lost) shared.lost = 1;
    block_barrier();
    const unsigned state = __float_as_uint(both[0][1]);
    return {int(__float_as_uint(both[0][0])), shared.lost || state == LOST, state == ENDED};
}
