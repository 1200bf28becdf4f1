// SPDX-License-Identifier: Apache-2.0
// Thread blocks whose threads wait for each other: each thread has a stack, and a barrier passes on
// to the next thread. The conformance suite's kernel_on_cpu.h, which stands first, runs threads one
// after the other.
#include <ucontext.h>

#define __shared__ static
static constexpr unsigned MOST_THREADS = 256;
static constexpr unsigned STACK = 1 << 16;
static ucontext_t scheduler, contexts[MOST_THREADS];
static char stacks[MOST_THREADS][STACK];
static bool ended[MOST_THREADS];

static inline void __syncthreads() { swapcontext(&contexts[threadIdx.x], &scheduler); }

static inline unsigned long long atomicAdd(unsigned long long* word, unsigned long long value) {
    return __atomic_fetch_add(word, value, __ATOMIC_SEQ_CST);
}

template <class Argument> struct Run {
    static inline void (*kernel)(Argument);
    static inline const Argument* argument;
    static void thread() {
        kernel(*argument);
        ended[threadIdx.x] = true;
        swapcontext(&contexts[threadIdx.x], &scheduler);
    }
};

// Blocks run last to first, and the threads of a block from the last to the first in every turn.
template <class Argument>
static void run_blocks(
    void (*kernel)(Argument), const void* argument, unsigned blocks, unsigned threads) {
    Run<Argument>::kernel = kernel;
    Run<Argument>::argument = static_cast<const Argument*>(argument);
    blockDim = {threads, 1, 1};
    for (unsigned block = blocks; block-- > 0;) {
        blockIdx = {block, 0, 0};
        for (unsigned nth = 0; nth < threads; ++nth) {
            getcontext(&contexts[nth]);
            contexts[nth].uc_stack.ss_sp = stacks[nth];
            contexts[nth].uc_stack.ss_size = STACK;
            contexts[nth].uc_link = nullptr;
            ended[nth] = false;
            makecontext(&contexts[nth], Run<Argument>::thread, 0);
        }
        for (unsigned running = threads; running > 0;)
            for (unsigned nth = threads; nth-- > 0;) {
                if (ended[nth]) continue;
                threadIdx = {nth, 0, 0};
                swapcontext(&scheduler, &contexts[nth]);
                running -= ended[nth];
            }
    }
}
