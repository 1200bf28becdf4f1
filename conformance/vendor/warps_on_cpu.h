// SPDX-License-Identifier: Apache-2.0
// Warps whose lanes exchange values: each thread has a stack. A thread stops where its warp or its
// block meets, and continues after all threads of the warp or block have come there. kernel_on_cpu.h
// stands first. With `__AMDGCN__` a warp is one half of a wave of 64 lanes, whose other half may have
// taken another branch.
//
// Lanes of a warp run one after the other between two meetings, in an order that `run_warps` takes:
// code that relies on lanes being in step gives other bytes for another order.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#define __shared__ static
#define __launch_bounds__(...)
static constexpr unsigned MOST_THREADS = 1024;
static constexpr unsigned STACK = 1 << 16;
static ucontext_t scheduler, contexts[MOST_THREADS];
static char stacks[MOST_THREADS][STACK];

enum Stop { RUNNING, IN_WARP, IN_BLOCK, ENDED };
static Stop stops[MOST_THREADS];
static const char* places[MOST_THREADS];     // the operation that a thread waits in
static unsigned deposits[MOST_THREADS][2];   // of the last two meetings
static unsigned meetings[MOST_THREADS];

// Wait for the warp or block. A meeting of different operations is an error of the kernel.
static inline void meet(Stop stop, const char* place) {
    const unsigned own = threadIdx.x;
    stops[own] = stop;
    places[own] = place;
    swapcontext(&contexts[own], &scheduler);
}
static inline const unsigned* exchange(unsigned value, const char* place) {
    static unsigned results[32];
    const unsigned own = threadIdx.x, turn = meetings[own]++ & 1;
    deposits[own][turn] = value;
    meet(IN_WARP, place);
    const unsigned first = threadIdx.x / 32 * 32;
    for (unsigned lane = 0; lane < 32; ++lane) results[lane] = deposits[first + lane][turn];
    return results;
}

static inline void __syncthreads() { meet(IN_BLOCK, "syncthreads"); }
static inline void __syncwarp() { exchange(0, "syncwarp"); }
static inline unsigned __ballot_sync(unsigned, bool bit) {
    const unsigned* all = exchange(bit, "ballot");
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane) result |= all[lane] << lane;
    return result;
}
[[maybe_unused]] static inline bool __any_sync(unsigned mask, bool bit) {
    return __ballot_sync(mask, bit) != 0;
}
[[maybe_unused]] static inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    const unsigned* all = exchange(value, "reduce_add");
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane) result += all[lane];
    return result;
}
[[maybe_unused]] static inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    const unsigned* all = exchange(value, "reduce_max");
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane) result = all[lane] > result ? all[lane] : result;
    return result;
}
[[maybe_unused]] static inline unsigned __shfl_sync(unsigned, unsigned value, unsigned lane) {
    return exchange(value, "shfl")[lane % 32];
}
[[maybe_unused]] static inline unsigned __shfl_up_sync(unsigned, unsigned value, unsigned step) {
    const unsigned own = threadIdx.x % 32;
    const unsigned* all = exchange(value, "shfl_up");
    return all[own >= step ? own - step : own];
}
#if defined(__AMDGCN__)
// What the other half of a wave answers is of no use: all ones here, also for a shuffle of a width
// by which a lane reads from there.
[[maybe_unused]] static inline unsigned __lane_id() { return threadIdx.x % 64; }
[[maybe_unused]] static inline unsigned long long __ballot(bool bit) {
    const unsigned upper = threadIdx.x & 32;
    const unsigned long long others = 0xffffffffULL << (32 - upper);
    return others | (unsigned long long)__ballot_sync(0, bit) << upper;
}
static inline unsigned of_wave(unsigned value, unsigned lane, const char* place) {
    const unsigned* all = exchange(value, place);
    return lane / 32 == __lane_id() / 32 ? all[lane % 32] : 0xffffffffU;
}
[[maybe_unused]] static inline unsigned __shfl(unsigned value, unsigned lane, unsigned width) {
    return of_wave(value, __lane_id() / width * width + lane % width, "shfl");
}
[[maybe_unused]] static inline unsigned __shfl_up(unsigned value, unsigned by, unsigned width) {
    const unsigned own = __lane_id();
    return of_wave(value, own % width >= by ? own - by : own, "shfl_up");
}
[[maybe_unused]] static inline unsigned __shfl_xor(unsigned value, unsigned mask, unsigned width) {
    const unsigned own = __lane_id(), other = own ^ mask;
    return of_wave(value, other / width == own / width ? other : own, "shfl_xor");
}
// Lanes here do not go in step: they meet where the compiler must keep the order.
[[maybe_unused]] static inline void __builtin_amdgcn_wave_barrier() { exchange(0, "barrier"); }
[[maybe_unused]] static inline void __builtin_amdgcn_fence(int, const char*) {}
#endif
[[maybe_unused]] static inline int __popc(unsigned word) { return __builtin_popcount(word); }
[[maybe_unused]] static inline int __ffs(unsigned word) { return __builtin_ffs((int)word); }
[[maybe_unused]] static inline unsigned atomicAdd(unsigned* word, unsigned value) {
    const unsigned before = *word;
    *word += value;
    return before;
}

template <class Argument> struct Warps {
    static inline void (*kernel)(Argument);
    static inline const Argument* argument;
    static void thread() {
        kernel(*argument);
        meet(ENDED, "end");
    }
};

// False unless the threads from `first` on have all stopped at one meeting (or all have ended).
static inline bool together(unsigned first, unsigned count) {
    for (unsigned nth = first; nth < first + count; ++nth)
        if (stops[nth] != stops[first] || strcmp(places[nth], places[first])) return false;
    return true;
}

// Blocks run last to first. `backwards`: so do the lanes of a warp. Returns 0, or 1 if threads of a
// warp or a block wait in different places.
template <class Argument>
static int run_warps(
    void (*kernel)(Argument), const void* argument, unsigned blocks, unsigned threads,
    bool backwards) {
    static std::mutex one_launch;  // the stacks and all shared memory are static
    const std::lock_guard<std::mutex> held(one_launch);
    Warps<Argument>::kernel = kernel;
    Warps<Argument>::argument = static_cast<const Argument*>(argument);
    blockDim = {threads, 1, 1};
    gridDim = {blocks, 1, 1};
    for (unsigned block = blocks; block-- > 0;) {
        blockIdx = {block, 0, 0};
        for (unsigned nth = 0; nth < threads; ++nth) {
            getcontext(&contexts[nth]);
            contexts[nth].uc_stack.ss_sp = stacks[nth];
            contexts[nth].uc_stack.ss_size = STACK;
            contexts[nth].uc_link = nullptr;
            stops[nth] = RUNNING;
            meetings[nth] = 0;
            makecontext(&contexts[nth], Warps<Argument>::thread, 0);
        }
        for (unsigned ended = 0; ended < threads;) {
            unsigned waiting = 0;
            for (unsigned warp = 0; warp < threads; warp += 32) {
                if (stops[warp] == IN_BLOCK) ++waiting;
                if (stops[warp] == IN_BLOCK || stops[warp] == ENDED) continue;
                for (unsigned at = 0; at < 32; ++at) {
                    const unsigned nth = warp + (backwards ? 31 - at : at);
                    threadIdx = {nth, 0, 0};
                    swapcontext(&scheduler, &contexts[nth]);
                }
                if (!together(warp, 32)) return 1;
                if (stops[warp] == ENDED) ended += 32;
                waiting += stops[warp] == IN_BLOCK;
            }
            if (!waiting || waiting * 32 + ended < threads) continue;
            if (!together(0, threads)) return 1;
            for (unsigned nth = 0; nth < threads; ++nth) stops[nth] = RUNNING;
        }
    }
    return 0;
}
