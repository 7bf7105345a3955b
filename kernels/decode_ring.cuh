// The weights' and the cache's way into a block of decode_step.cu, in its terms: which rows each block has, and the ring in shared memory
// through which the producer warp streams them.
#pragma once

// Whether this block chooses the tokens for all, in the memory of its ring.
__device__ __forceinline__ bool chooses() { return SAMPLED && blockIdx.x == gridDim.x - 1; }

// Rows `first` to `last` - 1 of a matrix, dealt out evenly in pieces of `unit` of them: of 4 where whole tiles of 8 would come out unevenly
// (2,560 rows over 132 blocks: 24 instead of 20 the most). The layer turns the deal so that no block has the longer end in each.
struct Deal {
    int first, last;
    __device__ Deal(int rows, unsigned turn, int unit, unsigned blocks = gridDim.x) {  // to the first so many blocks
        const unsigned b = blockIdx.x < blocks ? (blockIdx.x + turn) % blocks : blocks, units = (rows + unit - 1) / unit;
        first = min(rows, int(b * units / blocks * unit)), last = min(rows, int((b + 1) * units / blocks * unit));
    }
    __device__ int size() const { return last - first; }
};

// Layer l's projections. The block that chooses has none in the first layer: its ring is in use, and empty after the choice.
__device__ __forceinline__ Deal projections(int l) { return Deal(QKV, l, ROWS, gridDim.x - unsigned(SAMPLED && l == 0)); }

// This block's share of the cached keys of a unit of query heads.
struct Share {
    int shift, unit, split, first, last;
    __device__ explicit Share(int cached) {
        shift = 0;  // 2^shift blocks share them, each with SPLIT_KEYS or more
        while (2 << shift <= MAX_SPLITS && (2 << shift) * UNITS <= int(gridDim.x) && 2 * SPLIT_KEYS << shift < cached) shift++;
        unit = blockIdx.x % UNITS, split = blockIdx.x / UNITS;
        const int each = (cached + (1 << shift) - 1) >> shift;
        first = min(cached, split * each), last = min(cached, first + each);
    }
    __device__ bool exists() const { return split < 1 << shift; }
    __device__ int kv() const { return unit * CH / (H / K); }
    __device__ int frames() const { return exists() ? (last - first + FRAME_KEYS - 1) / FRAME_KEYS : 0; }
};

// Bytes from one row of a tile to the next in its slot. Copies keep a row's place in 128 bytes: with half of the rows moved by 64 bytes, an
// exchange of a vector beside two frames on their way took 2.0 instead of 1.7 us (H100).
template <int COLUMNS> constexpr int ROW_PITCH = (COLUMNS < SEGMENT ? COLUMNS : SEGMENT) * 2;

// So many that with one more these are at most the ring, as far back as `wait_for_landing` sees.
__host__ __device__ constexpr int in_ring(int frames) { return frames < SLOTS - 1 ? frames : SLOTS - 1; }

// Frames on their way in the layers, and how many may be left in the ring for one more: what waits for words queues behind them all. By themselves
// on an H100 one reaches 2.3 TB/s, two 3.05, three 3.1, and an exchange of a vector beside them takes 1.1, 1.5 and 2.4 us instead of 0.7. us a
// token: 0.6B with two and `low` 4, 6, 8, 10 439, 432, 431, 441, with one and 10 436; at 8,192 tokens two or three 802, 831; 4B 2,722 and 2,746.
constexpr int IN_FLIGHT = in_ring(2), LOW = SLOTS - 2 < 6 ? SLOTS - 2 : 6;
// Nobody waits for words in the head, but the block that chooses, which has its rows early to look at those of the others.
constexpr int HEAD_IN_FLIGHT = in_ring(SAMPLED ? 3 : 6), CHOOSER_IN_FLIGHT = SLOTS - 2;

struct Ring {
    unsigned char* slots;
    mbarrier *full, *empty;
    mbarrier* next;            // a phase for each token but the last
    const volatile int* over;  // not 0: nobody will use what is still to come
    int slot = 0;
    unsigned parity = 0;
    bool ended = false;  // no frame will be free any more
    int in_flight = IN_FLIGHT;  // frames that may be on their way; one more when LOW or fewer wait to be used
    __device__ void advance() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    __device__ bool is_over() const { return __shfl_sync(0xffffffffu, *over, 0); }  // the same for all lanes, which may be anywhere
    __device__ void skip(int frames) {
        slot += frames;
        parity ^= slot / SLOTS & 1, slot %= SLOTS;
    }
    // Until the n-th token's keys and values may be read, n from 1 on: those of the token before have been published, and in the block that
    // chooses, whose ring is the memory for it, that is done.
    __device__ void wait_for_next(int n) const {
        if (n == 0) return;
        while (!*over && !mbarrier_try_wait(next, n + 1 & 1)) {}
        fence_proxy_async_all();  // bulk copies of keys and values that other blocks have written
    }
    // Whether LOW frames or fewer wait to be used: whether the one before them has been freed.
    __device__ bool runs_low() const {
        const int ahead = slot + SLOTS - 1 - LOW;
        const bool wraps = ahead >= SLOTS;
        return mbarrier_test_wait(empty + ahead - (wraps ? SLOTS : 0), parity ^ 1 ^ unsigned(wraps));
    }
    // Waits until the frame that was sent `frames` frames ago has arrived.
    __device__ void wait_for_landing(int frames) const {
        const bool wrapped = slot < frames;
        const int earlier = slot - frames + (wrapped ? SLOTS : 0);
        while (!mbarrier_try_wait(full + earlier, parity ^ unsigned(wrapped))) {}
    }
    // The next frame, once it is free and may be sent for, with `bytes` announced; null if none will be free. The whole producer warp, whose lanes
    // come to the same: nobody frees anything once `over` is seen.
    __device__ unsigned char* take(unsigned bytes) {
        while (!ended && !mbarrier_try_wait(empty + slot, parity ^ 1)) ended = *over && !mbarrier_test_wait(empty + slot, parity ^ 1);
        if (ended) return nullptr;
        wait_for_landing(in_flight + runs_low());
        if (PARTS > 1) __syncwarp();  // an empty frame may be used and freed at once, a phase further than what the other lanes wait for
        if (threadIdx.x % 32 == 0) mbarrier_arrive_expect(full + slot, bytes);
        __syncwarp();
        return slots + slot * SLOT;
    }
    // Waits for the next N frames, or the next `count` if these are fewer.
    template <int N> __device__ __forceinline__ void receive(int (&arrived)[N], int count) {
        unsigned phase[N];
        bool there = true;
#pragma unroll
        for (int f = 0; f < N; f++)
            if (f < count) {
                arrived[f] = slot, phase[f] = parity;
                there &= mbarrier_test_wait(full + slot, parity);
                advance();
            }
        if (there) return;
#pragma unroll
        for (int f = 0; f < N; f++)
            if (f < count)
                while (!mbarrier_try_wait(full + arrived[f], phase[f])) {}
    }
};

// `count` rows of a matrix, 4 or 8, segment after segment, into the ring; half a tile has empty frames in its other half's place. The whole
// producer warp.
template <int COLUMNS> __device__ __forceinline__ void produce(Ring& ring, const W_TYPE* rows, int count = ROWS) {
    constexpr int N = segments(COLUMNS);
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int f = 0; f < N * PARTS; f++) {
        const int s = f / PARTS, first = f % PARTS * FRAME_ROWS, n = min(FRAME_ROWS, count - first);
        const int columns = N == 1 ? COLUMNS : min(SEGMENT, COLUMNS - s * SEGMENT);
        unsigned char* slot = ring.take(n * columns * 2);
        if (!slot) return;
        if (lane < n)
            bulk_copy_once(slot + lane * ROW_PITCH<COLUMNS>, rows + (size_t)(first + lane) * COLUMNS + s * SEGMENT, columns * 2,
                           ring.full + ring.slot);
        ring.advance();
    }
}

// The cached keys and values of a share, FRAME_KEYS of each in a frame, as boxes of 128 bytes a row: one copy for each row of a head, 256 bytes,
// reached 1.1 TB/s on an H100, boxes 3.05. A box may go on behind the share; nobody looks there.
__device__ __forceinline__ void produce_keys(Ring& ring, const Share& mine, const TensorMap* keys, const TensorMap* values, int first_row) {
    constexpr int BOXES = KEY_BYTES / 128, BOX = FRAME_KEYS * 128, COLUMNS = 64;  // of two bytes, whatever the type
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = mine.first; row < mine.last; row += FRAME_KEYS) {
        unsigned char* slot = ring.take(KEY_FRAME);
        if (!slot) return;
        if (lane < 2 * BOXES)
            bulk_copy_2d(slot + lane * BOX, lane < BOXES ? keys : values, (mine.kv() * BOXES + lane % BOXES) * COLUMNS, first_row + row,
                         ring.full + ring.slot);
        ring.advance();
    }
}

__device__ __forceinline__ const W_TYPE* qkv_rows(const u64* table, int layer, int row) {
    const Array which = row < HD ? Q_PROJ : row < HD + K * D ? K_PROJ : V_PROJ;
    const int first = row < HD ? 0 : row < HD + K * D ? HD : HD + K * D;
    return array<W_TYPE>(table, layer, which) + (size_t)(row - first) * C;
}

// For the n-th token of a launch, from 0 on, with `cached` tokens before it.
__device__ __forceinline__ void produce_layers(Ring& ring, int n, const u64* table, int cached, const TensorMap* keys, const TensorMap* values, int S) {
    const Share mine(cached);
    ring.in_flight = IN_FLIGHT;
#pragma unroll 1
    for (int l = 0; l < L && !ring.is_over(); l++) {
        const Deal qkv = projections(l), vector(C, l, 4), ffn(F, l, 4);
        for (int r = qkv.first; r < qkv.last; r += ROWS) produce<C>(ring, qkv_rows(table, l, r));
        if (l == 0) ring.wait_for_next(n);
        if (mine.exists()) produce_keys(ring, mine, keys, values, l * S);
        for (int r = vector.first; r < vector.last; r += ROWS)
            produce<HD>(ring, array<W_TYPE>(table, l, O_PROJ) + (size_t)r * HD, min(ROWS, vector.last - r));
        for (int r = ffn.first; r < ffn.last; r += ROWS) {
            produce<C>(ring, array<W_TYPE>(table, l, GATE) + (size_t)r * C, min(ROWS, ffn.last - r));
            produce<C>(ring, array<W_TYPE>(table, l, UP) + (size_t)r * C, min(ROWS, ffn.last - r));
        }
        for (int r = vector.first; r < vector.last; r += ROWS)
            produce<F>(ring, array<W_TYPE>(table, l, DOWN) + (size_t)r * F, min(ROWS, vector.last - r));
    }
}

__device__ __forceinline__ void produce_head(Ring& ring, const W_TYPE* lm_head, const Deal& head) {
    ring.in_flight = chooses() ? CHOOSER_IN_FLIGHT : HEAD_IN_FLIGHT;
#pragma unroll 1
    for (int r = head.first; r < head.last; r += ROWS) produce<C>(ring, lm_head + (size_t)r * C);
}
