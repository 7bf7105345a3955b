// The consumer warps' side of decode_step.cu, in its terms: reading a vector that other blocks publish, and multiplying a matrix by it.
#pragma once

struct Consumer {
    Shared& shared;
    Ring ring;
    Patience patience;
    int buffer = 0;

    // Opaque, or what each stage derives from them is kept in registers across all the others, and spilled.
    __device__ int warp() const { return opaque(threadIdx.x / 32); }
    __device__ int lane() const { return opaque(threadIdx.x % 32); }

    __device__ void barrier() { block_barrier(); }

    // `rows` rows of a matrix times v, or of TOGETHER matrices whose tiles take turns, at most PASS tiles between two barriers; then
    // finish(first row, rows, sums) with sums[row PITCH].
    template <int COLUMNS, int TOGETHER = 1, class Finish>
    __device__ __forceinline__ void multiply(const Vector<COLUMNS>& v, int rows, Finish finish) {
        const int tiles = (rows + ROWS - 1) / ROWS * TOGETHER;
#pragma unroll 1
        for (int t0 = 0; t0 < tiles; t0 += PASS) {
            const int warp = this->warp(), lane = this->lane();
            float* part = shared.part[buffer];
            const int n = min(PASS, tiles - t0);
            int t = 0;
            if (segments(COLUMNS) == 1 && TOGETHER == 2 && SLOTS >= 6 && n == 6)  // 0.6B's gate and up
                multiply_tiles<COLUMNS, 6>(ring, v, part, warp, lane), t = 6;
            if (segments(COLUMNS) == 1)  // the latencies of four tiles overlap
#pragma unroll 1
                for (; t + 4 <= n; t += 4) multiply_tiles<COLUMNS, 4>(ring, v, part + t * ROWS * PITCH, warp, lane);
            if (segments(COLUMNS) <= 2)
#pragma unroll 1
                for (; t + 2 <= n; t += 2) multiply_tiles<COLUMNS, 2>(ring, v, part + t * ROWS * PITCH, warp, lane);
#pragma unroll 1
            for (; t < n; t++) multiply_tiles<COLUMNS, 1>(ring, v, part + t * ROWS * PITCH, warp, lane);
            barrier();
            const int first = t0 * ROWS / TOGETHER;
            finish(first, min(n * ROWS / TOGETHER, rows - first), part);
            buffer ^= 1;  // the next but one pass may write here: everybody is then past the barrier after this one
        }
    }

    // Where the sum of squares of a vector is after the next barrier, from each lane's share of it.
    __device__ __forceinline__ const float* share_squares(int which, float squares) {
        squares = warp_sum(squares);
        if (threadIdx.x % 32 == 0) shared.squares[which][threadIdx.x / 32] = squares;
        return shared.squares[which];
    }

    // Reads a vector of words, or of the embedding where there is one.
    template <int COLUMNS>
    __device__ __forceinline__ float read(Vector<COLUMNS>& v, const float* weight, const u64* words, unsigned tag, const W_TYPE* embedded = nullptr) {
        const int warp = this->warp(), lane = this->lane();
        const int first = warp * OWN + 2 * lane;
        return load_vector<COLUMNS>(v, weight, shared.scratch[warp], warp, lane, [&](int n, auto& x) {
            constexpr int N = sizeof(x) / sizeof(x[0]);
            if (embedded) {
#pragma unroll
                for (int m = 0; m < N; m++)
                    if (has_chunk<COLUMNS>(n + m, warp)) {
                        x[m][0] = shared.known ? to_float(embedded[first + chunk(n + m)]) : NOT_A_NUMBER;
                        x[m][1] = shared.known ? to_float(embedded[first + chunk(n + m) + 1]) : NOT_A_NUMBER;
                    }
                return;
            }
            const auto there = [&](int m) { return has_chunk<COLUMNS>(n + m, warp); };
            read_pairs<N>([&](int m) { return words + first + chunk(n + m); }, tag, x, patience, there);
        });
    }
};
