// embed: out[t, c] = table[ids[t], c]
//
// Entry point  embed                 always
// Arguments    out    [T, C]  float32
//              ids    [T]     int32; an id outside 0..V-1 gives a row of NaN, nothing is read out of bounds
//              table  [V, C]  TABLE_TYPE
//              V, C           int32
// Constants    TABLE_TYPE     bf16 | f16 | f32
// Work         block = one token, 256 threads over the columns; grid T; no shared memory
// Precision    exact: every storage type is a subset of float32
// Traffic      T C (sizeof(TABLE_TYPE) + 4) bytes, no arithmetic
// Determinism  each element is written once, by one thread
// Wrapper cuda.embed · truth reference.embed · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
embed(float* __restrict__ out, const int* ids, const TABLE_TYPE* __restrict__ table, int V, int C) {
    wait_for_launches_before();
    const int id = ids[blockIdx.x];
    const bool known = id >= 0 && id < V;
    for (int c = threadIdx.x; c < C; c += blockDim.x)
        out[(size_t)blockIdx.x * C + c] = known ? to_float(table[(size_t)id * C + c]) : NOT_A_NUMBER;
}
