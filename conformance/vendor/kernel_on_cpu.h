// SPDX-License-Identifier: Apache-2.0
// What the text of a device kernel needs to be a C++ program: words that mean nothing here, and a
// grid whose threads run one after the other. The blocks run last to first, since no kernel may
// rest on their order.
#pragma once
#include <cstddef>
#define __global__
#define __device__
#define __forceinline__ inline

struct Place { unsigned x, y, z; };
static thread_local Place blockIdx, threadIdx, blockDim, gridDim;

static inline unsigned long long atomicCAS(
    unsigned long long* word, unsigned long long expected, unsigned long long desired) {
    __atomic_compare_exchange_n(
        word, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}

template <class Argument>
static void run_grid(
    void (*kernel)(Argument), const void* argument, unsigned blocks, unsigned planes,
    unsigned threads) {
    gridDim = {blocks, planes, 1};
    blockDim = {threads, 1, 1};
    for (unsigned y = planes; y-- > 0;)
        for (unsigned x = blocks; x-- > 0;)
            for (unsigned thread = 0; thread < threads; ++thread) {
                blockIdx = {x, y, 0};
                threadIdx = {thread, 0, 0};
                kernel(*static_cast<const Argument*>(argument));
            }
}
