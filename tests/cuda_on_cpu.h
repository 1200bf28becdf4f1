// SPDX-License-Identifier: Apache-2.0
// What the text of a CUDA kernel needs to be a C++ program: words that mean nothing here, and a grid
// whose threads run one after the other. tests/cuda_on_cpu.py puts it before the text.
#include <cstddef>
#define __global__
#define __device__
#define __forceinline__ inline

struct Place { unsigned x, y, z; };
static thread_local Place blockIdx, threadIdx, blockDim, gridDim;

// Where the kernel prefetched; called in place of the instruction.
static const void* touched[1 << 12];
static unsigned touches;
static void touch(const void* address) {
    if (touches < sizeof touched / sizeof *touched) touched[touches++] = address;
}

template <class Argument>
static void run_grid(
    void (*kernel)(Argument), const void* argument, unsigned blocks, unsigned planes,
    unsigned threads) {
    gridDim = {blocks, planes, 1};
    blockDim = {threads, 1, 1};
    touches = 0;
    for (unsigned y = 0; y < planes; ++y)
        for (unsigned x = 0; x < blocks; ++x)
            for (unsigned thread = 0; thread < threads; ++thread) {
                blockIdx = {x, y, 0};
                threadIdx = {thread, 0, 0};
                kernel(*static_cast<const Argument*>(argument));
            }
}
