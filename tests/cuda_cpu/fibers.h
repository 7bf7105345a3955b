// Fibres: stacks of their own and the switch from one to another. Used by runtime.cpp alone.
#pragma once
#include <stdint.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

// EMU_ASAN: the kernels are built with AddressSanitizer (this file and runtime.cpp are not, see build.py).
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

// ---- where a fibre stands, and going on there ----

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)

struct Context { void* sp = nullptr; };

extern "C" void emu_switch(void** save_sp, void* load_sp);
asm(R"(.text
.hidden emu_switch
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");

inline void switch_stack(Context& from, Context& to) { emu_switch(&from.sp, to.sp); }

inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    // What emu_switch leaves on a stack: six registers and the address to return to. rsp is 8 modulo 16 at `entry`, as
    // it is after a call.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t(15)) - 2;
    *top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context.sp = top;
}

#else  // any other processor; several times slower, because swapcontext saves the signal mask by a system call

}  // namespace emu
#include <ucontext.h>
namespace emu {

struct Context { ucontext_t registers; };

inline void switch_stack(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack;
    context.registers.uc_stack.ss_size = size;
    context.registers.uc_link = nullptr;
    makecontext(&context.registers, entry, 0);
}

#endif

// ---- stacks ----

// AddressSanitizer's frames are several times larger. The odd 576 bytes keep the hot tops of neighbouring stacks from
// competing for the same cache sets.
#ifdef EMU_ASAN
constexpr size_t STACK = (256 << 10) + 576;
#else
constexpr size_t STACK = (64 << 10) + 576;
#endif
constexpr size_t STACK_GUARD = 64;  // bytes at the low end that hold CANARY until a stack overflows
constexpr uint64_t CANARY = 0x5afe57acc0ffee00;

// Stacks for the threads of one block. They are kept for the next launch: fresh pages cost more than a small kernel.
class Stacks {
public:
    explicit Stacks(size_t wanted) : count(wanted) {
        std::lock_guard<std::mutex> lock(mutex);
        const auto fits = std::find_if(idle.begin(), idle.end(), [&](auto& i) { return i.second >= wanted; });
        if (fits != idle.end()) {
            memory = fits->first, count = fits->second;
            idle.erase(fits);
            return;
        }
        void* pages = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        memory = pages == MAP_FAILED ? nullptr : static_cast<char*>(pages);
    }
    ~Stacks() {
        if (!memory) return;
#ifdef EMU_ASAN
        __asan_unpoison_memory_region(memory, bytes());  // fibres that were given up left their frames behind
#endif
        std::lock_guard<std::mutex> lock(mutex);
        if (idle.size() < 8) idle.emplace_back(memory, count);
        else munmap(memory, bytes());
    }
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;

    bool ok() const { return memory; }
    char* low(size_t i) const { return canary(i) + STACK_GUARD; }
    static constexpr size_t SIZE = STACK - STACK_GUARD;
    void set_canary(size_t i) { *reinterpret_cast<uint64_t*>(canary(i)) = CANARY; }
    bool overflowed(size_t i) const { return *reinterpret_cast<uint64_t*>(canary(i)) != CANARY; }

private:
    // one more than there are threads: the first thread's stack has something below it to overflow into
    size_t bytes() const { return (count + 1) * STACK; }
    char* canary(size_t i) const { return memory + (i + 1) * STACK; }

    char* memory;
    size_t count;
    inline static std::mutex mutex;
    inline static std::vector<std::pair<char*, size_t>> idle;
};

}  // namespace emu
