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
#include <unordered_map>

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
    unsigned long workers = 0;           // OS threads: blocks that run at once
    std::vector<unsigned long> order{};  // of the blocks
    ptrdiff_t static_offset = 0;         // from the kernel's anchor to its static __shared__ memory
    size_t static_bytes = 0;
    std::atomic<unsigned long> next{0};
    std::atomic<bool> failed{false};
    std::atomic<int> running{0}, quiet{0};    // blocks that have started and not ended; those of them that only poll
    std::atomic<unsigned long> activity{0};  // how often one of them stopped being quiet
    std::atomic<uint64_t> idle{0}, looks{0};  // nanoseconds in which all were quiet; looks at the clock
    std::mutex round_mutex{};
    unsigned round = 0, in_round = 0;  // ends when every running block has polled in it
    unsigned long round_activity = 0;
    Clock::time_point round_start{};
    std::mutex late_mutex{};
    bool waited = false;  // for the launches before
    std::mutex report_mutex{};
    std::string report{};  // of the first failure

    void poll(unsigned& round_of_block);

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
    bool remove(unsigned place) {  // whether it was there
        const uint64_t bit = uint64_t(1) << (place % 64), before = words[place / 64];
        words[place / 64] &= ~bit;
        return before & bit;
    }
    void clear() { std::fill(words.begin(), words.end(), 0); }
    void swap(Places& other) { words.swap(other.words); }

private:
    std::vector<uint64_t> words;
};

struct Block;

// Bytes on their way into shared memory.
struct Copy {
    unsigned char* to;
    const unsigned char* from;
    unsigned size, bytes;  // to write; of those read, the rest are zeros
    const char* what;
    Site site;

    void deliver(const unsigned char* data) const;
};
struct SmallCopy : Copy {  // cp.async
    unsigned group;
    unsigned char data[16];
};
struct LargeCopy : Copy {  // cp.async.bulk
    std::vector<unsigned char> data;
};

struct MBarrier {
    unsigned count, missing;           // arrivals of a phase; those still to come
    unsigned long phase;
    unsigned long announced, copied;   // bytes in this phase
    std::vector<LargeCopy> copies;     // of this phase
};

struct NamedBarrier {
    unsigned arrived, threads;    // threads by warps: 32 as soon as the last lane is there
    std::vector<unsigned> lanes;  // that wait, by warp
};

struct Fiber : Thread {
    Block* block;
    Context context;
    unsigned place;  // in the block's order
    bool returned;
    const char* waits_at;  // null while running or ready
    Site site;
    const void* waits_on;  // an mbarrier or a named barrier
    std::vector<SmallCopy> copies;
    unsigned group;    // of the next copy
    void* fake_stack;  // AddressSanitizer's
};

struct Barrier {
    unsigned arrived;
    int votes, result;
    const char* what;
    Site site;
};

// What a warp has issued by wgmma and not yet waited for.
struct Accumulators {
    int n;
    float (*d[32])[4];          // of each lane: NaN until all is waited for
    std::vector<float> values;  // [16, n]
};
struct Product {
    const char* what;
    Site site;
    unsigned long group;
    size_t accumulators;
    unsigned long long a, b;
    const unsigned* registers[32];  // of each lane, if they hold a
    int step;
    std::vector<unsigned char> operands{};  // as they were when it was issued
};
struct WarpgroupProducts {
    bool fenced = false;
    unsigned long group = 0, issued = 0;
    std::vector<Accumulators> accumulators{};
    std::vector<Product> products{};
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
    WarpgroupProducts wgmma;

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
        static_shared = static_cast<unsigned char*>(launch.kernel.shared_anchor()) + launch.static_offset;
        for (NamedBarrier& b : named) b.lanes.resize(warps.size());
    }
    void run(unsigned long number);
    void give_way(const char* what, Site site);
    [[noreturn]] void leave();
    void thread_returned(Fiber& me);
    void release(Warp& warp, Meeting& meeting);
    void release_barrier();
    void release_if_complete(NamedBarrier& barrier);
    void progress();
    bool in_shared(const void* p, size_t bytes) const;
    MBarrier& find(const char* what, Site site, const unsigned long long* b);
    void end_phase(MBarrier& b);
    void wake(const char* what, Site site, const unsigned long long* b);

    Launch& launch;
    Stacks& stacks;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned> order;  // place -> thread
    Places ready, polling;
    Context worker;  // to go back to when the block has ended
    std::vector<unsigned char> shared_memory;
    unsigned char *shared, *static_shared;
    unsigned returned;
    Barrier barrier;
    NamedBarrier named[16];
    std::unordered_map<const void*, MBarrier> mbarriers;
    std::unordered_map<const void*, unsigned long long> seen;  // by those who poll
    uint64_t coins;   // state of a random generator
    bool quiet;       // nothing but polling
    bool only_local;  // and that of mbarriers alone, which nobody else will change
    unsigned rounds;  // of all who poll, since anything moved
    unsigned long watched;          // launch.activity
    uint64_t quiet_since;           // launch.idle
    unsigned round;                 // the last of launch.round in which this block has polled
    void* worker_fake_stack;
    const void* worker_low;
    size_t worker_size;

private:
    void set_order(unsigned long number);
    void set_up(Fiber& f, unsigned linear, unsigned long number);
    void poison_shared_memory();
    void check_guard();
    void switch_to(Fiber* from, Fiber* to, bool for_good);
    void watch();
    std::string describe(const Fiber& f) const;
    [[noreturn]] void report_deadlock(const char* what);
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
    f.block = this, f.returned = false, f.waits_at = nullptr, f.waits_on = nullptr, f.fake_stack = nullptr;
    f.copies.clear(), f.group = 0;
    stacks.set_canary(linear);
    prepare(f.context, stacks.low(linear), Stacks::SIZE, fiber_entry);
    warps[linear / 32].alive |= 1u << f.lane;
    ready.add(f.place);
}

// Shared memory that was not written reads as NaN in every floating-point type, and never as what the last block left.
void Block::poison_shared_memory() {
    memset(shared, 0xff, launch.shared_bytes);
    if (launch.static_bytes) memset(static_shared, 0xff, launch.static_bytes);
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
    returned = 0, quiet = false, barrier = {}, round = ~0u;
    coins = number * 0x9e3779b97f4a7c15 ^ launch.options.seed;
    ready.clear(), polling.clear(), mbarriers.clear(), seen.clear();
    for (NamedBarrier& b : named) b.arrived = 0, std::fill(b.lanes.begin(), b.lanes.end(), 0);
    launch.running++;
    for (Warp& warp : warps) warp.alive = warp.open = 0, warp.wgmma = {};
    for (unsigned i = 0; i < fibers.size(); i++) set_up(fibers[i], i, number);
    poison_shared_memory();
    worker_low = nullptr;
    switch_to(nullptr, &fibers[order[ready.take_first()]], false);
    launch.running--;
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
        if (polling.empty()) report_deadlock("deadlock: ");
        watch();
        sched_yield();
        ready.swap(polling);
        place = ready.take_first();
    }
    Fiber& next = fibers[order[place]];
    next.waits_at = nullptr;
    if (&next != &me) switch_to(&me, &next, me.returned);
}

// Everybody waits or polls. That is a deadlock if they poll mbarriers alone, because nobody outside of the block can
// change one; else when all running blocks have done nothing else for too long.
void Block::watch() {
    constexpr unsigned ROUNDS = 64;  // a kernel may count how often it has looked
    launch.poll(round);
    const unsigned long activity = launch.activity;
    if (!quiet) {
        quiet = only_local = true, rounds = 0, watched = activity, quiet_since = launch.idle;
        launch.quiet++;
        return;
    }
    if (++rounds > ROUNDS && only_local) report_deadlock("deadlock: ");
    if (activity != watched) watched = activity, quiet_since = launch.idle;
    else if (launch.idle - quiet_since > launch.options.patience * 1e9) report_deadlock("nothing but polling for too long: ");
}

// Time passes only if every running block has polled since the last time and none did anything else: not while a block
// computes or its OS thread has to wait for a processor.
void Launch::poll(unsigned& round_of_block) {
    const std::lock_guard<std::mutex> lock(round_mutex);
    if (round_of_block == round) return;
    round_of_block = round;
    if (++in_round < unsigned(running)) return;
    constexpr uint64_t LONGEST = 100000000;  // a round that took longer had to wait for a processor
    const auto now = Clock::now();
    if (round_activity == activity && quiet >= running)
        idle += std::min<uint64_t>(LONGEST, std::chrono::nanoseconds(now - round_start).count());
    round++, in_round = 0, round_activity = activity, round_start = now;
}

void Block::progress() {
    rounds = 0;
    if (!quiet) return;
    quiet = false;
    launch.activity++;
    launch.quiet--;
}

void Block::leave() {
    switch_to(&self(), nullptr, true);
    __builtin_unreachable();
}

std::string Block::describe(const Fiber& f) const {
    std::string text = " at " + name(f.waits_at, f.site);
    if (!f.waits_on) return text;
    const auto found = mbarriers.find(f.waits_on);
    if (found == mbarriers.end()) {
        const NamedBarrier& b = *static_cast<const NamedBarrier*>(f.waits_on);
        return text + ", barrier " + std::to_string(&b - named) + ": " + std::to_string(b.arrived) + " of " +
               std::to_string(b.threads) + " threads are there";
    }
    const MBarrier& b = found->second;
    return text + ", phase " + std::to_string(b.phase) + ": " + std::to_string(b.missing) + " of " + std::to_string(b.count) +
           " arrivals are missing, copies of " + std::to_string(b.copied) + " of " + std::to_string(b.announced) +
           " announced bytes were issued";
}

void Block::report_deadlock(const char* what) {
    std::string text = what;
    std::vector<bool> told(fibers.size());
    for (size_t i = 0; i < fibers.size(); i++) {
        const Fiber& f = fibers[i];
        if (told[i] || f.returned || !f.waits_at) continue;
        unsigned others = 0;
        for (size_t j = i + 1; j < fibers.size(); j++) {
            const Fiber& g = fibers[j];
            if (g.returned || !g.waits_at || !same(g.waits_at, f.waits_at) || !same(g.site, f.site) || g.waits_on != f.waits_on)
                continue;
            told[j] = true, others++;
        }
        text += "thread " + name(f.index) + (others ? " and " + std::to_string(others) + " more wait" : " waits");
        text += describe(f) + "; ";
    }
    const unsigned long blocks = launch.order.size(), started = std::min<unsigned long>(launch.next, blocks);
    if (started < blocks)
        text += std::to_string(blocks - started) + " of " + std::to_string(blocks) + " blocks have not started, because no more than " +
                std::to_string(launch.workers) + " run at once: blocks that wait for each other need cooperative=True or settings." +
                "resident_blocks; ";
    fail("%s%u threads have returned", text.c_str(), returned);
}

void Block::release(Warp& warp, Meeting& meeting) {
    Fiber* lanes = &fibers[(&warp - warps.data()) * 32];
    meeting.complete(meeting.arrived, meeting.operand);
    for (unsigned left = meeting.arrived; left; left &= left - 1) ready.add(lanes[__builtin_ctz(left)].place);
    warp.open &= ~(1u << (&meeting - warp.meeting));
    rounds = 0;
}

void Block::release_barrier() {
    barrier.result = barrier.votes;
    barrier.arrived = 0, barrier.votes = 0;
    for (const Fiber& f : fibers) ready.add(f.place);
    rounds = 0;
}

void Block::release_if_complete(NamedBarrier& barrier) {
    barrier.arrived = 0;
    for (size_t w = 0; w < warps.size(); w++)
        if (barrier.lanes[w] && (barrier.lanes[w] & warps[w].alive) == warps[w].alive) barrier.arrived += 32;
    if (barrier.arrived < barrier.threads) return;
    for (size_t w = 0; w < warps.size(); w++)
        for (unsigned left = barrier.lanes[w] & warps[w].alive; left; left &= left - 1)
            ready.add(fibers[w * 32 + __builtin_ctz(left)].place);
    std::fill(barrier.lanes.begin(), barrier.lanes.end(), 0);
    barrier.arrived = 0;
    rounds = 0;
}

void Block::thread_returned(Fiber& me) {
    me.returned = true;
    returned++;
    progress();
    if (barrier.arrived)
        fail("a thread returned while %u others wait at %s, which every thread of a block must reach", barrier.arrived,
             name(barrier.what, barrier.site).c_str());
    if (!me.copies.empty())
        fail("a thread returned without waiting for %zu copies, the first by %s", me.copies.size(),
             name(me.copies[0].what, me.copies[0].site).c_str());
    Warp& warp = warps[me.linear / 32];
    if (const auto& products = warp.wgmma.products; !products.empty())
        fail("a thread returned without waiting for %zu products, the first by %s", products.size(),
             name(products[0].what, products[0].site).c_str());
    if (returned == fibers.size()) {
        for (const auto& [_, b] : mbarriers)
            if (!b.copies.empty())
                fail("a block ended without waiting for %zu bulk copies, the first by %s", b.copies.size(),
                     name(b.copies[0].what, b.copies[0].site).c_str());
        for (size_t w = 0; w < warps.size(); w++)
            if (const unsigned long first = warps[w / 4 * 4].wgmma.issued; warps[w].wgmma.issued != first)
                fail("warp %zu took part in %lu products of a warpgroup, warp %zu in %lu: wanted all four in each", w,
                     warps[w].wgmma.issued, w / 4 * 4, first);
    }
    warp.alive &= ~(1u << me.lane);
    for (NamedBarrier& b : named)
        if (b.lanes[me.linear / 32]) release_if_complete(b);
    for (unsigned left = warp.open; left; left &= left - 1) {
        Meeting& meeting = warp.meeting[__builtin_ctz(left)];
        if (meeting.arrived == (meeting.mask & warp.alive)) release(warp, meeting);
    }
    give_way(nullptr, {});
}

bool Block::in_shared(const void* p, size_t bytes) const {
    const auto inside = [&](const unsigned char* low, size_t size) {
        const size_t offset = static_cast<const unsigned char*>(p) - low;  // huge if p lies below
        return offset < size && bytes <= size - offset;
    };
    return inside(shared, launch.shared_bytes) || inside(static_shared, launch.static_bytes);
}

// What the copy writes was NaN since it was issued; what its source became meanwhile may have been read or not.
void Copy::deliver(const unsigned char* data) const {
    if (std::any_of(to, to + size, [](unsigned char byte) { return byte != 0xff; }))
        fail("%s: something else was written to its destination before it was waited for", name(what, site).c_str());
    memcpy(to, data, size);
    for (unsigned i = 0; i < bytes; i += 4)  // by words, so that what becomes of a float is NaN
        if (memcmp(from + i, data + i, std::min(4u, bytes - i))) memset(to + i, 0xff, 4);
}

// What an initialised mbarrier holds: nothing that a kernel writes by accident, or copies from another place.
unsigned long long mbarrier_mark(const unsigned long long* b) {
    return reinterpret_cast<uintptr_t>(b) * 0x9e3779b97f4a7c15 ^ 0x6261727269657221;
}

MBarrier& Block::find(const char* what, Site site, const unsigned long long* b) {
    check_shared(what, site, b, 8, 8);
    const auto found = mbarriers.find(b);
    if (found == mbarriers.end()) fail("%s: the mbarrier was not initialised", name(what, site).c_str());
    if (*b != mbarrier_mark(b)) fail("%s: the mbarrier was overwritten", name(what, site).c_str());
    return found->second;
}

void Block::end_phase(MBarrier& b) {
    for (const LargeCopy& copy : b.copies) copy.deliver(copy.data.data());
    b.copies.clear();
    b.phase++, b.missing = b.count, b.announced = b.copied = 0;
    progress();
}

// The phase's end is there to be seen: lets those who wait for it run at once if they come before this thread in the
// block's order, so that a slot released too early is overwritten before its last reader goes on.
void Block::wake(const char* what, Site site, const unsigned long long* b) {
    for (const Fiber& f : fibers)
        if (f.waits_on == b && polling.remove(f.place)) ready.add(f.place);
    ready.add(self().place);
    give_way(what, site);
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
    me.block->only_local = false;
    me.block->polling.add(me.place);
    me.block->give_way(what, site);
}

void progress() { self().block->progress(); }

bool seen_before(const void* p, unsigned long long value, const char* what, Site site) {
    Block& block = *self().block;
    const auto [at, is_new] = block.seen.try_emplace(p, value);
    if (is_new || at->second != value) {
        at->second = value;
        block.progress();
        return false;
    }
    poll(what, site);
    return true;
}

bool coin() {
    uint64_t& state = self().block->coins;
    state = state * 6364136223846793005 + 1442695040888963407;
    return state >> 63;
}

void breathe() { sched_yield(); }

unsigned long long clock_ns() {
    Block& block = *self().block;
    block.only_local = false;  // who looks at the clock will go on by itself
    return (1ull << 60) + block.launch.idle + 32 * block.launch.looks++;
}

// ---- the instructions of ptx.cuh ----

void launches_before_end(const char* what, Site site) {
    Launch& launch = self().block->launch;
    const Late* touched = nullptr;
    {
        std::lock_guard<std::mutex> lock(launch.late_mutex);
        if (launch.waited) return;
        launch.waited = true;
        for (int i = 0; i < launch.options.lates; i++) {
            const Late& late = launch.options.late[i];
            if (memcmp(late.memory, late.before, late.bytes)) touched = &late;
            memcpy(late.memory, late.after, late.bytes);
        }
    }
    if (touched)  // without the lock, which would never be given back
        fail("%s: something was written before to an array of %zu bytes that earlier launches may still use", name(what, site).c_str(),
             touched->bytes);
}

void check_shared(const char* what, Site site, const void* p, size_t bytes, size_t alignment) {
    if (!self().block->in_shared(p, bytes))
        fail("%s: %zu bytes at %p do not lie in the block's shared memory", name(what, site).c_str(), bytes, p);
    if (reinterpret_cast<uintptr_t>(p) % alignment)
        fail("%s: misaligned address in shared memory: %p, wanted a multiple of %zu", name(what, site).c_str(), p, alignment);
}

void check_global(const char* what, Site site, const void* p, size_t bytes, size_t alignment) {
    if (bytes && self().block->in_shared(p, bytes))
        fail("%s: %p lies in shared memory, wanted an address in global memory", name(what, site).c_str(), p);
    if (reinterpret_cast<uintptr_t>(p) % alignment)
        fail("%s: misaligned address in global memory: %p, wanted a multiple of %zu", name(what, site).c_str(), p, alignment);
}

void async_copy(const char* what, Site site, void* to, const void* from, const void* data, unsigned bytes) {
    Fiber& me = self();
    SmallCopy copy{{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), 16, bytes, what, site}, me.group, {}};
    memcpy(copy.data, data, bytes);
    memset(to, 0xff, 16);
    me.copies.push_back(copy);
}

void async_commit() { self().group++; }

void async_wait(unsigned groups_left) {
    Fiber& me = self();
    size_t done = 0;  // copies are in the order of their groups; those not yet committed are waited for by nobody
    while (done < me.copies.size() && me.copies[done].group + groups_left < me.group) {
        me.copies[done].deliver(me.copies[done].data);
        done++;
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + done);
}

void whole_warp(const char* what, unsigned present) {
    if (present != ~0u) fail("%s: wanted all 32 lanes of the warp, got 0x%08x", what, present);
}

void multiply_fragments(unsigned present, void** operands) {
    whole_warp("mma_bf16", present);
    // in float64, where each product is exact: better than the hardware's sums, of which PTX promises little
    typedef double Pair __attribute__((vector_size(16)));  // what every processor has
    double a[16][16];
    union { Pair pairs[16][4]; double at[16][8]; } b, d;
    const auto put = [](double& low, double& high, unsigned pair) {
        const unsigned bits[2] = {pair << 16, pair & 0xffff0000u};
        float values[2];
        memcpy(values, bits, 8);
        low = values[0], high = values[1];
    };
    for (unsigned lane = 0; lane < 32; lane++) {
        const Fragments& f = *static_cast<Fragments*>(operands[lane]);
        const unsigned g = lane / 4, i = lane % 4 * 2;
        for (unsigned r = 0; r < 4; r++) put(a[g + r % 2 * 8][i + r / 2 * 8], a[g + r % 2 * 8][i + r / 2 * 8 + 1], f.a[r]);
        for (unsigned r = 0; r < 2; r++) put(b.at[i + r * 8][g], b.at[i + r * 8 + 1][g], f.b[r]);
    }
    for (unsigned m = 0; m < 16; m++) {
        Pair sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
        for (unsigned k = 0; k < 16; k++) {
            const Pair* row = b.pairs[k];
            const double x = a[m][k];
            sum0 += x * row[0], sum1 += x * row[1], sum2 += x * row[2], sum3 += x * row[3];
        }
        Pair* row = d.pairs[m];
        row[0] = sum0, row[1] = sum1, row[2] = sum2, row[3] = sum3;
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        const Fragments& f = *static_cast<Fragments*>(operands[lane]);
        for (unsigned r = 0; r < 4; r++) f.d[r] = float(f.d[r] + d.at[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]);
    }
}

void load_matrices(unsigned present, void** operands) {
    whole_warp("ldmatrix_x4", present);
    for (unsigned lane = 0; lane < 32; lane++)
        for (unsigned i = 0; i < 4; i++)
            static_cast<MatrixRow*>(operands[lane])->r[i] = static_cast<MatrixRow*>(operands[8 * i + lane / 4])->row[lane % 4];
}

void load_matrices_transposed(unsigned present, void** operands) {
    whole_warp("ldmatrix_x4_trans", present);
    for (unsigned lane = 0; lane < 32; lane++)
        for (unsigned i = 0; i < 4; i++) {
            unsigned short pair[2];  // rows 2 (lane % 4), + 1 of matrix i, column lane / 4
            for (unsigned j = 0; j < 2; j++)
                memcpy(pair + j, reinterpret_cast<char*>(static_cast<MatrixRow*>(operands[8 * i + lane % 4 * 2 + j])->row) + lane / 4 * 2, 2);
            static_cast<MatrixRow*>(operands[lane])->r[i] = pair[0] | unsigned(pair[1]) << 16;
        }
}

namespace {

// What this warp reads of the operands of a product: its 16 rows of a, the n rows of b, 32 bytes each, 16 of them at a time at the
// places where bulk_copy_2d lays them.
std::vector<unsigned char> read_operands(const Product& product, int n) {
    std::vector<unsigned char> bytes((16 + n) * 32);
    if (product.registers[0]) {
        for (int lane = 0; lane < 32; lane++)
            for (int e = 0; e < 4; e++)
                memcpy(bytes.data() + 32 * (lane / 4 + e % 2 * 8) + 4 * (lane % 4) + e / 2 * 16, product.registers[lane] + e, 4);
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < n; column++) {
                const uintptr_t at = product.b * 16 + column / 64 * product.step + 128 * k + column % 64 * 2;
                memcpy(bytes.data() + 32 * (16 + column) + 2 * k, reinterpret_cast<const void*>(at ^ (at >> 7 & 7) << 4), 2);
            }
        return bytes;
    }
    const auto read = [](unsigned char* to, uintptr_t matrix, int row) {
        for (int piece = 0; piece < 2; piece++) {
            const uintptr_t at = matrix + 128 * row + 16 * piece;
            memcpy(to + 16 * piece, reinterpret_cast<const void*>(at ^ (at >> 7 & 7) << 4), 16);
        }
    };
    const int first = self().linear / 32 % 4 * 16;
    for (int row = 0; row < 16; row++) read(bytes.data() + 32 * row, product.a * 16, first + row);
    for (int row = 0; row < n; row++) read(bytes.data() + 32 * (16 + row), product.b * 16, row);
    return bytes;
}

double bf16_at(const unsigned char* p) {
    unsigned bits = 0;
    memcpy(reinterpret_cast<char*>(&bits) + 2, p, 2);
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// sums [16, n] += a b^T, each step of 16 exact in float64 as in multiply_fragments
void add_product(float* sums, const unsigned char* operands, int n) {
    typedef double Four __attribute__((vector_size(32)));
    union { Four fours[16][64]; double at[16][256]; } b;
    for (int k = 0; k < 16; k++)
        for (int column = 0; column < n; column++) b.at[k][column] = bf16_at(operands + 32 * (16 + column) + 2 * k);
    for (int m = 0; m < 16; m++) {
        union { Four fours[64]; double at[256]; } row;
        memset(&row, 0, sizeof row);
        for (int k = 0; k < 16; k++) {
            const double x = bf16_at(operands + 32 * m + 2 * k);
            for (int i = 0; i < n / 4; i++) row.fours[i] += x * b.fours[k][i];
        }
        for (int column = 0; column < n; column++) sums[m * n + column] = float(sums[m * n + column] + row.at[column]);
    }
}

// Calls f(place in [16, n], accumulator) for all that the lanes of the warp hold.
template <class F> void for_each_accumulator(const Accumulators& held, F f) {
    for (int lane = 0; lane < 32; lane++)
        for (int j = 0; j < held.n / 8; j++)
            for (int e = 0; e < 4; e++)
                f((lane / 4 + e / 2 * 8) * held.n + 8 * j + lane % 4 * 2 + e % 2, held.d[lane][j][e]);
}

WarpgroupProducts& products_of_warp() { return self().block->warps[self().linear / 32].wgmma; }

}  // namespace

void multiply_warpgroup(unsigned present, void** operands) {
    const auto& first = *static_cast<WarpgroupProduct*>(operands[0]);
    const std::string what = name(first.what, first.site);
    whole_warp(what.c_str(), present);
    WarpgroupProducts& issued = products_of_warp();
    Accumulators held{first.n, {}, {}};
    Product product{first.what, first.site, issued.group, 0, first.a, first.b, {}, first.step};
    for (unsigned lane = 0; lane < 32; lane++) {
        const auto& its = *static_cast<WarpgroupProduct*>(operands[lane]);
        if (its.a != first.a || its.b != first.b || !its.add != !first.add)
            fail("%s: lane %u brings other operands than lane 0", what.c_str(), lane);
        held.d[lane] = its.d, product.registers[lane] = its.registers;
    }
    if (!issued.fenced) fail("%s: no wgmma_fence since its accumulators could be touched", what.c_str());
    const int rows_of_b = first.registers ? 16 : first.n, columns = first.registers ? first.n : 64;
    for (const auto& [matrix, rows] : {std::pair{first.registers ? first.b : first.a, first.registers ? 16 : 64}, {first.b + (columns - 64) / 64 * first.step / 16, rows_of_b}}) {
        const auto p = reinterpret_cast<const unsigned char*>(matrix * 16);
        if (matrix * 16 % 1024 >= 128) fail("%s: a matrix that does not begin at a multiple of 1024 bytes", what.c_str());
        check_shared(first.what, first.site, p, (rows - 1) * 128 + 32, 32);
    }
    size_t at = 0;
    while (at < issued.accumulators.size() && issued.accumulators[at].d[0] != held.d[0]) at++;
    if (at == issued.accumulators.size()) {
        held.values.resize(16 * first.n);
        for_each_accumulator(held, [&](int place, float& d) { held.values[place] = d, memset(&d, 0xff, 4); });
        issued.accumulators.push_back(held);
    }
    auto& values = issued.accumulators[at].values;
    if (!first.add) std::fill(values.begin(), values.end(), 0.0f);
    product.accumulators = at, product.operands = read_operands(product, first.n);
    issued.products.push_back(product);
    add_product(values.data(), issued.products.back().operands.data(), first.n);
    issued.issued++;
}

void fence_warpgroup(unsigned present, void**) {
    whole_warp("wgmma_fence", present);
    products_of_warp().fenced = true;
}

void commit_warpgroup(unsigned present, void**) {
    whole_warp("wgmma_commit", present);
    products_of_warp().group++;
}

void wait_warpgroup(unsigned present, void** operands) {
    whole_warp("wgmma_wait", present);
    WarpgroupProducts& issued = products_of_warp();
    const unsigned long left = static_cast<WarpgroupWait*>(operands[0])->groups;
    std::vector<Product> remaining;
    for (Product& product : issued.products) {
        if (product.group + left >= issued.group) {
            remaining.push_back(std::move(product));
            continue;
        }
        Accumulators& held = issued.accumulators[product.accumulators];
        if (read_operands(product, held.n) != product.operands)  // as they are now or as they were
            memset(held.values.data(), 0xff, held.values.size() * sizeof(float));
    }
    issued.products = std::move(remaining);
    for (size_t i = 0; i < issued.accumulators.size(); i++) {
        Accumulators& held = issued.accumulators[i];
        if (held.values.empty() || std::any_of(issued.products.begin(), issued.products.end(), [&](const Product& p) { return p.accumulators == i; }))
            continue;
        for_each_accumulator(held, [&](int place, float& d) {
            unsigned bits;
            memcpy(&bits, &d, 4);
            if (bits != ~0u) fail("wgmma_wait: an accumulator was written before it was waited for");
            d = held.values[place];
        });
        held.values.clear(), held.d[0] = nullptr;
    }
    if (issued.products.empty()) issued.accumulators.clear();
    issued.fenced = false;
}

void mbarrier_init(const char* what, Site site, unsigned long long* b, unsigned count) {
    check_shared(what, site, b, 8, 8);
    if (count < 1 || count >= 1u << 20) fail("%s: count: wanted 1 to 2^20 - 1, got %u", name(what, site).c_str(), count);
    if (!self().block->mbarriers.try_emplace(b, MBarrier{count, count, 0, 0, 0, {}}).second)
        fail("%s: the mbarrier was initialised before", name(what, site).c_str());
    *b = mbarrier_mark(b);
}

void mbarrier_arrive(const char* what, Site site, unsigned long long* at, unsigned bytes) {
    Block& block = *self().block;
    MBarrier& b = block.find(what, site, at);
    if (!b.missing)
        fail("%s: one arrival too many in phase %lu, which has all %u and ends when somebody waits for its copies",
             name(what, site).c_str(), b.phase, b.count);
    b.missing--, b.announced += bytes;
    if (b.announced >= 1u << 20)
        fail("%s: %lu bytes are announced in phase %lu, wanted less than 2^20", name(what, site).c_str(), b.announced, b.phase);
    if (!b.missing && b.copied > b.announced)
        fail("%s: copies of %lu bytes were issued in phase %lu, %lu announced", name(what, site).c_str(), b.copied, b.phase, b.announced);
    block.progress();
    if (b.missing || b.announced != b.copied) return;
    if (!b.announced) block.end_phase(b);
    block.wake(what, site, at);
}

bool mbarrier_ended(const char* what, Site site, unsigned long long* at, unsigned parity) {
    Block& block = *self().block;
    MBarrier& b = block.find(what, site, at);
    if (parity > 1) fail("%s: parity: wanted 0 or 1, got %u", name(what, site).c_str(), parity);
    if (b.phase % 2 != parity) return true;
    if (b.missing || b.announced != b.copied) return false;
    block.end_phase(b);
    return true;
}

void mbarrier_poll(const char* what, Site site, unsigned long long* b) {
    Fiber& me = self();
    me.waits_on = b;
    me.block->polling.add(me.place);
    me.block->give_way(what, site);
    me.waits_on = nullptr;
}

unsigned char* bulk_copy(const char* what, Site site, void* to, const void* from, unsigned size, unsigned bytes, unsigned long long* at) {
    Block& block = *self().block;
    MBarrier& b = block.find(what, site, at);
    if (size == 0 || size % 16) fail("%s: bytes: wanted a positive multiple of 16, got %u", name(what, site).c_str(), size);
    check_shared(what, site, to, size, 16);
    check_global(what, site, from, bytes, 16);
    b.copied += size;
    if (!b.missing && b.copied > b.announced)
        fail("%s: copies of %lu bytes were issued in phase %lu, %lu announced", name(what, site).c_str(), b.copied, b.phase, b.announced);
    memset(to, 0xff, size);
    const Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), size, bytes, what, site};
    b.copies.push_back({copy, std::vector<unsigned char>(size)});
    block.progress();
    return b.copies.back().data.data();
}

void bulk_copy_issued(const char* what, Site site, unsigned long long* at) {
    Block& block = *self().block;
    const MBarrier& b = block.find(what, site, at);
    if (!b.missing && b.announced == b.copied) block.wake(what, site, at);
}

void named_barrier(const char* what, Site site, int id, int threads) {
    Fiber& me = self();
    Block& block = *me.block;
    if (id < 1 || id > 15) fail("%s: id: wanted 1 to 15, got %d", name(what, site).c_str(), id);
    if (threads < 32 || threads % 32 || size_t(threads) > block.warps.size() * 32)
        fail("%s: threads: wanted whole warps of the block (a multiple of 32 up to %zu), got %d", name(what, site).c_str(),
             block.warps.size() * 32, threads);
    NamedBarrier& b = block.named[id];
    if (std::all_of(b.lanes.begin(), b.lanes.end(), [](unsigned lanes) { return !lanes; })) b.threads = threads;
    if (b.threads != unsigned(threads))
        fail("%s: threads wait at barrier %d for %u threads, one more comes and wants %d", name(what, site).c_str(), id, b.threads,
             threads);
    b.lanes[me.linear / 32] |= 1u << me.lane;
    me.waits_on = &b;
    block.release_if_complete(b);
    block.give_way(what, site);
    me.waits_on = nullptr;
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
    launch.workers = workers;
    if (workers == 1) {
        emu::work(launch);
    } else {
        std::vector<std::thread> threads;
        for (unsigned long i = 0; i < workers; i++) threads.emplace_back(emu::work, std::ref(launch));
        for (auto& thread : threads) thread.join();
    }
    if (options->dependent && !launch.waited) launch.fail("it ends without griddepcontrol_wait");
    snprintf(error, error_size, "%s", launch.report.c_str());
    return launch.failed;
}
