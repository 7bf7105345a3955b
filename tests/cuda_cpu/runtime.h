// What a kernel compiled for the CPU and the scheduler (runtime.cpp) know of each other.
//
// Every CUDA thread is a fibre: a stack of its own that runs until it has to wait for others. The fibres of one block
// share one OS thread; different blocks may run on different OS threads at once. Between two points where a thread
// waits nothing else of its block runs, in one of three orders, so what a missing barrier leaves to chance on a GPU is
// decided by the order here, and differs from one order to the next.
#pragma once
#include <stddef.h>

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

// What a running CUDA thread may ask about itself.
struct Thread {
    uint3 index, block_index;
    dim3 block_size, grid_size;
    unsigned linear, lane;  // index in the block, index in the warp
    unsigned char* dynamic_shared;
};

// __thread, not thread_local: no dynamic initialisation, so that an access is two instructions.
extern __thread const Thread* current __attribute__((tls_model("initial-exec")));

// A place in the kernel's source, for reports: as a default argument `Site site = {}` it is the caller's line.
struct Site {
    const char* file;
    int line;
    constexpr Site(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};

// __syncthreads and its voting kin: waits for every thread of the block, returns how many brought a vote.
int block_barrier(const char* what, Site site, bool vote);

// The one building block of everything that a warp does together (shuffles, ballots, matrix products). The lanes of
// `mask` that have not returned meet here; each brings a pointer to an operand on its own stack. The last one to come
// runs `complete` for all of them: operands[lane] is valid for every lane in `present`.
typedef void (*Complete)(unsigned present, void** operands);
void warp_meet(const char* what, Site site, unsigned mask, void* operand, Complete complete);

// One unsuccessful look at memory that another thread will change: lets the other fibres run, then other blocks.
// Whatever polls (flags between blocks, mbarriers) must call it in its loop. Polling for too long is reported.
void poll(const char* what, Site site);

// Something happened that others may have waited for: the time until polling counts as a deadlock starts again.
void progress();
// A look at 8 bytes or fewer that other threads write. Returns at once if they differ from what the block saw there last
// time (the caller may use them), else after everybody else has run (the caller looks again).
bool seen_before(const void* p, unsigned long long value, const char* what, Site site);
// Which of two words that need not be of one time comes first; other OS threads may run between them.
bool coin();
void breathe();
// Nanoseconds in which all blocks did nothing but poll, and a few for each look: a kernel that gives up after a while does so
// when it is stuck, and not because it runs slowly here.
unsigned long long clock_ns();

// ---- the instructions of ptx.cuh ----

// Fails unless `bytes` bytes at p lie in the block's shared memory (global: outside of it, or there are none) and are aligned.
void check_shared(const char* what, Site site, const void* p, size_t bytes, size_t alignment);
void check_global(const char* what, Site site, const void* p, size_t bytes, size_t alignment);

// cp.async: 16 bytes at `to` will hold `data`, which was read from `from` (`bytes` of it, the rest is zero), when this
// thread has waited for them, and not before: until then they are NaN.
void async_copy(const char* what, Site site, void* to, const void* from, const void* data, unsigned bytes);
void async_commit();
void async_wait(unsigned groups_left);

// d += a b in the fragments of mma.m16n8k16
struct Fragments { float* d; const unsigned* a; unsigned b[2]; };
void multiply_fragments(unsigned present, void** operands);  // Complete, on Fragments
// ldmatrix.x4: each lane brings its row, gets its registers
struct MatrixRow { unsigned row[4]; unsigned* r; };
void load_matrices(unsigned present, void** operands);
void load_matrices_transposed(unsigned present, void** operands);

// A barrier in shared memory. Its phase ends at the last moment that PTX allows: without bytes with the last arrival,
// with bytes when somebody waits for it; then the copies arrive, until then what they write to is NaN.
void mbarrier_init(const char* what, Site site, unsigned long long* b, unsigned count);
void mbarrier_arrive(const char* what, Site site, unsigned long long* b, unsigned bytes);
bool mbarrier_ended(const char* what, Site site, unsigned long long* b, unsigned parity);
void mbarrier_poll(const char* what, Site site, unsigned long long* b);
// Room for the `bytes` that a bulk copy reads of the `size` that it writes, the rest zeros; the caller fills it and says so.
unsigned char* bulk_copy(const char* what, Site site, void* to, const void* from, unsigned size, unsigned bytes, unsigned long long* b);
void bulk_copy_issued(const char* what, Site site, unsigned long long* b);

void named_barrier(const char* what, Site site, int id, int threads);

// One wgmma, as a lane brings it: its accumulators [n / 8][4], and where its operands begin in shared memory, in 16 bytes. Each
// warp computes its 16 rows. The operands are read when it is issued and must be the same when it is waited for; until then the
// accumulators are NaN.
// With `registers` a is in the lanes' registers, which must not change either, and b lies as rows of 64 elements, `step` bytes
// from those of the next 64 columns.
struct WarpgroupProduct { const char* what; Site site; float (*d)[4]; unsigned long long a, b; int n, add; const unsigned* registers; int step; };
void multiply_warpgroup(unsigned present, void** operands);  // Complete
struct WarpgroupWait { const char* what; Site site; int groups; };
void fence_warpgroup(unsigned present, void** operands);   // Complete, on WarpgroupWait, here and below
void commit_warpgroup(unsigned present, void** operands);
void wait_warpgroup(unsigned present, void** operands);

// The first call makes the changes of Options::late.
void launches_before_end(const char* what, Site site);

// Ends the launch with a report of this block and thread. Does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- what Python sees of a kernel ----

struct Parameter {
    const char* type;  // NumPy's name of the dtype, of what it points to for a pointer; "" if there is none
    int size, is_pointer, is_const;
};

struct Kernel {
    void (*call)(void** args);
    void* (*shared_anchor)();  // the address of a thread_local of the kernel's library in the calling OS thread
    int max_threads;           // from __launch_bounds__
    int parameters;
    Parameter parameter[64];
};

struct Options {
    int order;  // of the threads of a block and of the blocks: 0 ascending, 1 descending, 2 shuffled
    unsigned seed;
    int workers;      // OS threads
    int cooperative;  // every block gets an OS thread of its own, so that blocks may wait for each other
    double patience;  // seconds of nothing but polling until that is reported
    const struct Late* late;  // what changes at the launch's first griddepcontrol_wait
    int lates;
    int dependent;  // the launch may start before the ones before it have ended
};
// Memory that holds `before` until then, and afterwards `after`.
struct Late { void* memory; const void *before, *after; size_t bytes; };

}  // namespace emu

// Runs one launch to its end. dims: grid x, y, z, block x, y, z; args: where each argument's bytes are.
// 0, or 1 with the report in `error`.
extern "C" int emu_launch(const emu::Kernel* kernel, const emu::Options* options, const unsigned* dims,
                          size_t shared_bytes, void** args, char* error, size_t error_size);
