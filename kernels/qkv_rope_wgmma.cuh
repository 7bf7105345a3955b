// The same for qkv_rope_wgmma_*, whose tiles lie otherwise (wgmma.cuh). No kernel in here. Needs sm_90a, once it is used.
#pragma once
#include "qkv_rope_head.cuh"
#include "wgmma.cuh"

// A tile of whole heads; a thread holds rotation pairs, four lanes the heads of a row.
template <class Tile> __device__ __forceinline__ void wgmma_heads(PARAMETERS_OF(const TensorMap&, const TensorMap&), float eps) {
    if constexpr (on_tensor_cores<X_TYPE> && on_tensor_cores<W_TYPE> && (D == 64 || D == 128)) {
        DYNAMIC_SHARED(unsigned char, shared);
        constexpr int BLOCKS = D / 8, HALF = BLOCKS / 2;  // of 8 columns: of a head, of half a head
        const int all = H + 2 * K;
        const auto box = [&](int i, int column) {
            const int row = column + i * Tile::BOX;
            if (row < H * D) return WgmmaBox{&q_proj, row};
            if (row < (H + K) * D) return WgmmaBox{&k_proj, row - H * D};
            return WgmmaBox{&v_proj, row - (H + K) * D};  // behind the last head zeros that nobody stores
        };
        const auto nothing = [](int, int) {};
        Tile::product(shared, x, T, all * D, C, box, nothing, [&](float (&acc)[Tile::NJ][4], int row0, int column, float* memory) {
            const int lane = threadIdx.x % 32, row = row0 + lane / 8;
            int position[4];
#pragma unroll
            for (int i = 0; i < 4; i++) position[i] = row + 4 * i < T ? positions[row + 4 * i] : -1;
#pragma unroll
            for (int n = 0; n < Tile::BN / D; n++) {
                const int h = column / D + n;
                if (h >= all) break;
                const Head head = find_head(nullptr, nullptr, nullptr, q_bias, k_bias, v_bias, q_norm, k_norm, k_rows, v_rows, q_ms,
                                            k_ms, H, K, h);
                if (head.bias)
#pragma unroll
                    for (int j = 0; j < BLOCKS; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            acc[n * BLOCKS + j][e] += head.bias[head.index * D + 8 * j + lane % 4 * 2 + e % 2];
                float scale[2] = {1.0f, 1.0f};
                if (head.rotated)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int t = row0 + lane / 4 + 8 * half;
                        float squares = 0.0f;
#pragma unroll
                        for (int j = 0; j < BLOCKS; j++)
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                const float a = acc[n * BLOCKS + j][2 * half + e];
                                squares = fmaf(a, a, squares);
                            }
                        squares += __shfl_xor_sync(0xffffffffu, squares, 1);
                        squares += __shfl_xor_sync(0xffffffffu, squares, 2);
                        if (lane % 4 == 0 && t < T) head.ms[(size_t)t * head.heads + head.index] = squares / D;
                        if (eps >= 0.0f) scale[half] = 1.0f / sqrtf(squares / D + eps);
                    }
                int target[4];
                float scale_of[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int t = row + 4 * i;
                    target[i] = t >= T ? -1 : head.rows ? head.rows[t] : t;
                    if (head.rows && target[i] >= S) target[i] = -1;
                    scale_of[i] = __shfl_sync(0xffffffffu, scale[i / 2], 16 * (i % 2) + lane / 8 * 4);
                }
#pragma unroll
                for (int first = 0; first < HALF; first += 4) {
                    float4 lows[4], highs[4];
                    trade_rows(lows, *reinterpret_cast<const float(*)[4][4]>(acc + n * BLOCKS + first), memory);
                    trade_rows(highs, *reinterpret_cast<const float(*)[4][4]>(acc + n * BLOCKS + HALF + first), memory);
                    const int d = opaque(8 * first + lane % 8 * 4);  // so that nothing is read so early that it spills
                    float4 c4[4], s4[4];  // before any store, after which they might have to wait
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        c4[i] = s4[i] = {NOT_A_NUMBER, NOT_A_NUMBER, NOT_A_NUMBER, NOT_A_NUMBER};
                        if (!head.rotated || position[i] < 0 || position[i] >= P) continue;
                        c4[i] = *reinterpret_cast<const float4*>(cos + (size_t)position[i] * (D / 2) + d);
                        s4[i] = *reinterpret_cast<const float4*>(sin + (size_t)position[i] * (D / 2) + d);
                    }
                    float4 gain[2] = {{1.0f, 1.0f, 1.0f, 1.0f}, {1.0f, 1.0f, 1.0f, 1.0f}};
                    if (head.gain)
#pragma unroll
                        for (int half = 0; half < 2; half++)
                            gain[half] = {head.gain[d + half * (D / 2)], head.gain[d + half * (D / 2) + 1],
                                          head.gain[d + half * (D / 2) + 2], head.gain[d + half * (D / 2) + 3]};
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float low[4] = {lows[i].x, lows[i].y, lows[i].z, lows[i].w};
                        float high[4] = {highs[i].x, highs[i].y, highs[i].z, highs[i].w};
                        if (head.rotated) {
                            const float g[8] = {gain[0].x, gain[0].y, gain[0].z, gain[0].w,
                                                gain[1].x, gain[1].y, gain[1].z, gain[1].w};
                            const float c[4] = {c4[i].x, c4[i].y, c4[i].z, c4[i].w}, s[4] = {s4[i].x, s4[i].y, s4[i].z, s4[i].w};
#pragma unroll
                            for (int e = 0; e < 4; e++) {
                                low[e] *= g[e], high[e] *= g[e + 4];
                                rotate(low[e], high[e], c[e], s[e]);
                                low[e] *= scale_of[i], high[e] *= scale_of[i];
                            }
                        }
                        if (target[i] < 0) continue;
                        const size_t at = ((size_t)target[i] * head.heads + head.index) * D + d;
                        if (h < H) store_run(q + at, low, true), store_run(q + at + D / 2, high, true);
                        else if (h < H + K) store_run(k + at, low, true), store_run(k + at + D / 2, high, true);
                        else store_run(v + at, low, true), store_run(v + at + D / 2, high, true);
                    }
                }
            }
        });
    }
}
