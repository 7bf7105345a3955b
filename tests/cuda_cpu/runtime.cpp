// The scheduler behind runtime.h: barriers, warp meetings, launches. Compiled once, linked by every kernel.
#include "runtime.h"

#include <link.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

#include "fibers.h"

namespace emu {

__thread const Thread* current __attribute__((tls_model("initial-exec")));

namespace {

using Clock = std::chrono::steady_clock;

struct Launch {
    const Kernel& kernel;
    const Options& options;
    dim3 grid, block;
    size_t shared_bytes;
    void** args;
    std::vector<unsigned long> order{};  // of the blocks
    ptrdiff_t static_offset = 0;         // from the kernel's anchor to its static __shared__ memory
    size_t static_bytes = 0;
    std::atomic<unsigned long> next{0};
    std::atomic<bool> failed{false};
    std::mutex report_mutex{};
    std::string report{};  // of the first failure

    void fail(const std::string& text) {
        std::lock_guard<std::mutex> lock(report_mutex);
        if (!failed.exchange(true)) report = text;
    }
};

// A set of threads, by their places in the block's order.
class Places {
public:
    explicit Places(size_t n) : words((n + 63) / 64) {}
    void add(unsigned place) { words[place / 64] |= uint64_t(1) << (place % 64); }
    int take_first() {  // -1: empty
        for (size_t i = 0; i < words.size(); i++) {
            if (!words[i]) continue;
            const int place = int(i) * 64 + __builtin_ctzll(words[i]);
            words[i] &= words[i] - 1;
            return place;
        }
        return -1;
    }
    bool empty() const { return std::all_of(words.begin(), words.end(), [](uint64_t w) { return !w; }); }
    void clear() { std::fill(words.begin(), words.end(), 0); }
    void swap(Places& other) { words.swap(other.words); }

private:
    std::vector<uint64_t> words;
};

struct Block;

struct Fiber : Thread {
    Block* block;
    Context context;
    unsigned place;  // in the block's order
    bool returned;
    const char* waits_at;  // null while running or ready
    Site site;
    void* fake_stack;  // AddressSanitizer's
};

struct Barrier {
    unsigned arrived;
    int votes, result;
    const char* what;
    Site site;
};

// Lanes of a warp that wait for the others of the same mask.
struct Meeting {
    unsigned mask, arrived;
    const char* what;
    Complete complete;
    void* operand[32];
};

struct Warp {
    unsigned alive;        // lanes that have not returned
    unsigned open;         // which meetings somebody waits in; each holds a lane of its own, so there are never more than 32
    Meeting meeting[32];

    Meeting& find(unsigned mask) {
        for (unsigned left = open; left; left &= left - 1)
            if (Meeting& m = meeting[__builtin_ctz(left)]; m.mask == mask) return m;
        const unsigned free = __builtin_ctz(~open);
        open |= 1u << free;
        meeting[free].mask = mask, meeting[free].arrived = 0;
        return meeting[free];
    }
};

std::string name(uint3 i) { return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")"; }
std::string name(const char* what, Site site) { return std::string(what) + " (" + site.file + ":" + std::to_string(site.line) + ")"; }
bool same(const char* a, const char* b) { return a == b || !strcmp(a, b); }
bool same(Site a, Site b) { return a.line == b.line && same(a.file, b.file); }

// Bytes behind the dynamic shared memory that nobody may write.
constexpr size_t GUARD = 256;
constexpr unsigned char GUARD_BYTE = 0xa5;
// The most that any instruction asks of an address in shared memory.
constexpr uintptr_t SHARED_ALIGNMENT = 1024;

// The block that an OS thread runs now.
struct Block {
    Block(Launch& launch, Stacks& stacks)
        : launch(launch), stacks(stacks), fibers(launch.block.x * launch.block.y * launch.block.z),
          warps((fibers.size() + 31) / 32), order(fibers.size()), ready(fibers.size()), polling(fibers.size()),
          shared_memory(launch.shared_bytes + GUARD + SHARED_ALIGNMENT) {
        const auto address = reinterpret_cast<uintptr_t>(shared_memory.data());
        shared = shared_memory.data() + (-address & (SHARED_ALIGNMENT - 1));
    }
    void run(unsigned long number);
    void give_way(const char* what, Site site);
    [[noreturn]] void leave();
    void thread_returned(Fiber& me);
    void release(Warp& warp, Meeting& meeting);
    void release_barrier();

    Launch& launch;
    Stacks& stacks;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned> order;  // place -> thread
    Places ready, polling;
    Context worker;  // to go back to when the block has ended
    std::vector<unsigned char> shared_memory;
    unsigned char* shared;
    unsigned returned;
    Barrier barrier;
    bool quiet;  // nothing but polling since `quiet_since`
    Clock::time_point quiet_since;
    void* worker_fake_stack;
    const void* worker_low;
    size_t worker_size;

private:
    void set_order(unsigned long number);
    void set_up(Fiber& f, unsigned linear, unsigned long number);
    void poison_shared_memory();
    void check_guard();
    void switch_to(Fiber* from, Fiber* to, bool for_good);
    [[noreturn]] void report_deadlock();
    static void fiber_entry();
};

// const only for the kernel, which must not assign to threadIdx
Fiber& self() { return *const_cast<Fiber*>(static_cast<const Fiber*>(current)); }

void Block::set_order(unsigned long number) {
    const unsigned n = fibers.size();
    for (unsigned i = 0; i < n; i++) order[i] = launch.options.order == 1 ? n - 1 - i : i;
    if (launch.options.order == 2) {
        // from the block's number, not from the OS thread that happens to run it: what fails, fails again
        uint64_t state = (number + 1) * 0x9e3779b97f4a7c15 ^ launch.options.seed * 0xbf58476d1ce4e5b9;
        for (unsigned i = n - 1; i > 0; i--) {
            state = state * 6364136223846793005 + 1442695040888963407;
            std::swap(order[i], order[(state >> 33) % (i + 1)]);
        }
    }
    for (unsigned place = 0; place < n; place++) fibers[order[place]].place = place;
}

void Block::set_up(Fiber& f, unsigned linear, unsigned long number) {
    const dim3 grid = launch.grid, size = launch.block;
    f.index = {linear % size.x, linear / size.x % size.y, linear / (size.x * size.y)};
    f.block_index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
    f.block_size = size, f.grid_size = grid;
    f.linear = linear, f.lane = linear % 32;
    f.dynamic_shared = shared;
    f.block = this, f.returned = false, f.waits_at = nullptr, f.fake_stack = nullptr;
    stacks.set_canary(linear);
    prepare(f.context, stacks.low(linear), Stacks::SIZE, fiber_entry);
    warps[linear / 32].alive |= 1u << f.lane;
    ready.add(f.place);
}

// Shared memory that was not written reads as NaN in every floating-point type, and never as what the last block left.
void Block::poison_shared_memory() {
    memset(shared, 0xff, launch.shared_bytes);
    if (launch.static_bytes)
        memset(static_cast<char*>(launch.kernel.shared_anchor()) + launch.static_offset, 0xff, launch.static_bytes);
#ifdef EMU_ASAN
    __asan_poison_memory_region(shared + launch.shared_bytes, GUARD);
#else
    memset(shared + launch.shared_bytes, GUARD_BYTE, GUARD);
#endif
}

void Block::check_guard() {
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(shared + launch.shared_bytes, GUARD);
#else
    const unsigned char* guard = shared + launch.shared_bytes;
    if (std::any_of(guard, guard + GUARD, [](unsigned char byte) { return byte != GUARD_BYTE; }))
        launch.fail("a write past the " + std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory; noticed after block " +
                    name(fibers[0].block_index));
#endif
}

void Block::run(unsigned long number) {
    set_order(number);
    returned = 0, quiet = false, barrier = {};
    ready.clear(), polling.clear();
    for (Warp& warp : warps) warp.alive = warp.open = 0;
    for (unsigned i = 0; i < fibers.size(); i++) set_up(fibers[i], i, number);
    poison_shared_memory();
    worker_low = nullptr;
    switch_to(nullptr, &fibers[order[ready.take_first()]], false);
    check_guard();
}

void Block::switch_to(Fiber* from, Fiber* to, bool for_good) {  // null: the worker
    if (to) current = to;
    Context& a = from ? from->context : worker;
    Context& b = to ? to->context : worker;
#ifdef EMU_ASAN
    void** fake_stack = from ? &from->fake_stack : &worker_fake_stack;
    __sanitizer_start_switch_fiber(for_good ? nullptr : fake_stack, to ? stacks.low(to->linear) : worker_low,
                                   to ? Stacks::SIZE : worker_size);
    switch_stack(a, b);
    __sanitizer_finish_switch_fiber(*fake_stack, nullptr, nullptr);
#else
    (void)for_good;
    switch_stack(a, b);
#endif
}

void Block::fiber_entry() {
    Fiber& me = self();
    Block& block = *me.block;
#ifdef EMU_ASAN
    const void* low;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &low, &size);
    if (!block.worker_low) block.worker_low = low, block.worker_size = size;  // the first fibre comes from the worker
#endif
    block.launch.kernel.call(block.launch.args);
    block.thread_returned(me);
}

// Runs the first ready thread of the block's order. Always the first, so that a thread goes on until it must wait and a
// warp gets as far ahead of the others as the barriers allow: that is what shows a missing one.
void Block::give_way(const char* what, Site site) {
    Fiber& me = self();
    // now, before the neighbour that it grew into runs
    if (stacks.overflowed(me.linear)) fail("stack overflow: raise STACK in tests/cuda_cpu/fibers.h");
    me.waits_at = what, me.site = site;
    int place = ready.take_first();
    while (place < 0) {
        if (launch.failed || returned == fibers.size()) leave();
        const auto now = Clock::now();
        if (!quiet) quiet = true, quiet_since = now;
        if (polling.empty() || now - quiet_since > std::chrono::duration<double>(launch.options.patience)) report_deadlock();
        sched_yield();
        ready.swap(polling);
        place = ready.take_first();
    }
    Fiber& next = fibers[order[place]];
    next.waits_at = nullptr;
    if (&next != &me) switch_to(&me, &next, me.returned);
}

void Block::leave() {
    switch_to(&self(), nullptr, true);
    __builtin_unreachable();
}

void Block::report_deadlock() {
    std::string text = polling.empty() ? "deadlock: " : "nothing but polling for too long: ";
    std::vector<bool> told(fibers.size());
    for (size_t i = 0; i < fibers.size(); i++) {
        const Fiber& f = fibers[i];
        if (told[i] || f.returned || !f.waits_at) continue;
        unsigned others = 0;
        for (size_t j = i + 1; j < fibers.size(); j++) {
            const Fiber& g = fibers[j];
            if (g.returned || !g.waits_at || !same(g.waits_at, f.waits_at) || !same(g.site, f.site)) continue;
            told[j] = true, others++;
        }
        text += "thread " + name(f.index) + (others ? " and " + std::to_string(others) + " more wait" : " waits");
        text += " at " + name(f.waits_at, f.site) + "; ";
    }
    fail("%s%u threads have returned", text.c_str(), returned);
}

void Block::release(Warp& warp, Meeting& meeting) {
    Fiber* lanes = &fibers[(&warp - warps.data()) * 32];
    meeting.complete(meeting.arrived, meeting.operand);
    for (unsigned left = meeting.arrived; left; left &= left - 1) ready.add(lanes[__builtin_ctz(left)].place);
    warp.open &= ~(1u << (&meeting - warp.meeting));
    quiet = false;
}

void Block::release_barrier() {
    barrier.result = barrier.votes;
    barrier.arrived = 0, barrier.votes = 0;
    for (const Fiber& f : fibers) ready.add(f.place);
    quiet = false;
}

void Block::thread_returned(Fiber& me) {
    me.returned = true;
    returned++;
    quiet = false;
    if (barrier.arrived)
        fail("a thread returned while %u others wait at %s, which every thread of a block must reach", barrier.arrived,
             name(barrier.what, barrier.site).c_str());
    Warp& warp = warps[me.linear / 32];
    warp.alive &= ~(1u << me.lane);
    for (unsigned left = warp.open; left; left &= left - 1) {
        Meeting& meeting = warp.meeting[__builtin_ctz(left)];
        if (meeting.arrived == (meeting.mask & warp.alive)) release(warp, meeting);
    }
    give_way(nullptr, {});
}

// All thread-local memory of a kernel's library is its static __shared__ memory, besides the anchor: finds it in the
// calling OS thread. Its distance from the anchor is the same in every thread.
void find_static_shared(Launch& launch) {
    const char* anchor = static_cast<const char*>(launch.kernel.shared_anchor());
    struct Search { Launch& launch; const char* anchor; } search{launch, anchor};
    dl_iterate_phdr([](dl_phdr_info* info, size_t, void* data) {
        const Search& search = *static_cast<Search*>(data);
        const char* begin = static_cast<const char*>(info->dlpi_tls_data);
        for (int i = 0; begin && i < info->dlpi_phnum; i++) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_TLS || search.anchor < begin || search.anchor >= begin + header.p_memsz) continue;
            search.launch.static_offset = begin - search.anchor;
            search.launch.static_bytes = header.p_memsz;
            return 1;
        }
        return 0;
    }, &search);
}

void order_blocks(Launch& launch) {
    auto& order = launch.order;
    for (unsigned long i = 0; i < order.size(); i++) order[i] = launch.options.order == 1 ? order.size() - 1 - i : i;
    uint64_t state = launch.options.seed;
    for (unsigned long i = order.size() - 1; launch.options.order == 2 && i > 0; i--) {
        state = state * 6364136223846793005 + 1442695040888963407;
        std::swap(order[i], order[(state >> 33) % (i + 1)]);
    }
}

void work(Launch& launch) {
    Stacks stacks(launch.block.x * launch.block.y * launch.block.z);
    if (!stacks.ok()) return launch.fail("no memory for the stacks of a block");
    Block block(launch, stacks);
    for (;;) {
        const unsigned long i = launch.next++;
        if (launch.failed || i >= launch.order.size()) return;
        block.run(launch.order[i]);
    }
}

}  // namespace

// ---- what kernels call ----

int block_barrier(const char* what, Site site, bool vote) {
    Block& block = *self().block;
    Barrier& barrier = block.barrier;
    if (block.returned)
        fail("%s, which every thread of a block must reach, was reached after %u threads had returned", name(what, site).c_str(),
             block.returned);
    if (!barrier.arrived) barrier.what = what, barrier.site = site;
    else if (!same(barrier.what, what) || !same(barrier.site, site))
        fail("threads of a block wait at different barriers: %s and %s", name(barrier.what, barrier.site).c_str(),
             name(what, site).c_str());
    barrier.arrived++;
    barrier.votes += vote;
    if (barrier.arrived == block.fibers.size()) block.release_barrier();
    block.give_way(what, site);
    return barrier.result;  // the next barrier needs this thread too, so it has not changed
}

void warp_meet(const char* what, Site site, unsigned mask, void* operand, Complete complete) {
    Fiber& me = self();
    Warp& warp = me.block->warps[me.linear / 32];
    if (!(mask >> me.lane & 1)) fail("%s: lane %u is not in its own mask 0x%08x", name(what, site).c_str(), me.lane, mask);
    Meeting& meeting = warp.find(mask);
    if (!meeting.arrived) meeting.what = what, meeting.complete = complete;
    else if (meeting.complete != complete || !same(meeting.what, what))
        fail("lanes of a warp wait in different operations: %s and %s", meeting.what, name(what, site).c_str());
    meeting.arrived |= 1u << me.lane;
    meeting.operand[me.lane] = operand;
    if (meeting.arrived == (mask & warp.alive)) me.block->release(warp, meeting);
    me.block->give_way(what, site);
}

void poll(const char* what, Site site) {
    Fiber& me = self();
    me.block->polling.add(me.place);
    me.block->give_way(what, site);
}

void fail(const char* format, ...) {
    char text[2048];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    Fiber& me = self();
    me.block->launch.fail(std::string(text) + "; noticed in block " + name(me.block_index) + ", thread " + name(me.index));
    me.block->leave();
}

}  // namespace emu

extern "C" __attribute__((visibility("default"))) int emu_launch(const emu::Kernel* kernel, const emu::Options* options,
                                                                 const unsigned* dims, size_t shared_bytes, void** args,
                                                                 char* error, size_t error_size) {
    const dim3 grid(dims[0], dims[1], dims[2]), block(dims[3], dims[4], dims[5]);
    emu::Launch launch{*kernel, *options, grid, block, shared_bytes, args};
    launch.order.resize((unsigned long)grid.x * grid.y * grid.z);
    emu::order_blocks(launch);
    emu::find_static_shared(launch);
    const unsigned long blocks = launch.order.size();
    const unsigned long workers = options->cooperative ? blocks : std::min(blocks, (unsigned long)options->workers);
    if (workers == 1) {
        emu::work(launch);
    } else {
        std::vector<std::thread> threads;
        for (unsigned long i = 0; i < workers; i++) threads.emplace_back(emu::work, std::ref(launch));
        for (auto& thread : threads) thread.join();
    }
    snprintf(error, error_size, "%s", launch.report.c_str());
    return launch.failed;
}
