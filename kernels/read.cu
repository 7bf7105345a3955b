// read_all: reads an array once, to find out how fast that can be done
//
// Entry point  read_all               by bandwidth.read_bandwidth only
// Arguments    p    [n]  16 bytes each, 16-byte aligned
//              n         int64, from 0
//              out  [1]  uint32; written in one of 2^32 cases, so that the compiler does not leave out the loads
// Constants    none
// Work         a thread has eight loads of 16 bytes on their way at a time; grid any, block 512, no shared memory
// Precision    integers
// Traffic      16 n bytes
// Determinism  bitwise reproducible
// Wrapper cuqwen/bandwidth.py · test tests/test_bench.py

extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* __restrict__ p, long long n, unsigned* __restrict__ out) {
    unsigned sum = 0;
    const long long step = (long long)gridDim.x * 512;
    long long i = blockIdx.x * 512ll + threadIdx.x;
    for (; i + 7 * step < n; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = p[i + k * step];
#pragma unroll
        for (int k = 0; k < 8; k++) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    for (; i < n; i += step) sum += p[i].x ^ p[i].y ^ p[i].z ^ p[i].w;
    if (sum == 0x12345678u) *out = sum;
}
