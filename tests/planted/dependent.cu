// A launch that may start before those before it have ended, for tests/test_emulator.py. `fault` plants one fault.
#include "ptx.cuh"

enum Fault { NONE, READS_EARLY, WRITES_EARLY, NEVER_WAITS };

// out += x
extern "C" __global__ void __launch_bounds__(32) add(float* out, const float* x, int fault) {
    const int i = blockIdx.x * 32 + threadIdx.x;
    griddepcontrol_launch_dependents();
    const float early = x[i];
    if (fault == WRITES_EARLY) out[i] = 0.0f;
    if (fault != NEVER_WAITS) griddepcontrol_wait();
    out[i] += fault == READS_EARLY ? early : x[i];
}
