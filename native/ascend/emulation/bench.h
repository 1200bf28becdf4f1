// SPDX-License-Identifier: Apache-2.0
// The bench on which the kernels of misuse.cpp run: two small allocations, a queue, and the fault
// that the machine reports.
#pragma once
#include "kernel_operator.h"

#include <string>

using namespace AscendC;
using portakv_emulation::Fault;
using portakv_emulation::Machine;
using portakv_emulation::When;

constexpr uint64_t kBytes = 256, kUb = 4096;

// Two allocations, and memory between them that a kernel must not touch.
struct Bench {
    alignas(64) uint8_t source[kBytes];
    alignas(64) uint8_t beyond[kBytes];
    alignas(64) uint8_t target[kBytes];
};
inline Bench bench;

typedef TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> Queue;

struct Kernel {
    TPipe pipe;
    Queue queue;
    TBuf<TPosition::VECCALC> scratch;
    GlobalTensor<uint8_t> from, into;

    explicit Kernel(uint8_t buffers = 2, uint32_t bytes = 256) {
        from.SetGlobalBuffer(bench.source);
        into.SetGlobalBuffer(bench.target);
        if (buffers) pipe.InitBuffer(queue, buffers, bytes);
        pipe.InitBuffer(scratch, 32);
    }
    LocalTensor<uint8_t> Loaded(uint32_t bytes = 64) {
        LocalTensor<uint8_t> tile = queue.AllocTensor<uint8_t>();
        DataCopy(tile, from, bytes);
        queue.EnQue(tile);
        return queue.DeQue<uint8_t>();
    }
};

inline void Flag() { SetFlag<HardEvent::S_MTE3>(0); WaitFlag<HardEvent::S_MTE3>(0); }

inline std::vector<portakv_emulation::Memory> Allocations() {
    return {{(uint64_t)bench.source, kBytes, 0}, {(uint64_t)bench.target, kBytes, 1}};
}

// The fault that the machine reports for a kernel; empty if there is none.
inline std::string FaultOf(void (*kernel)(), When when, uint32_t blocks = 1, uint32_t seed = 1) {
    try {
        Machine on(Allocations(), kUb, when, seed);
        portakv_emulation::launch(on, blocks, kernel);
        return "";
    } catch (const Fault& found) {
        return found.what();
    }
}

inline void Reset() {
    memset(bench.source, 0x11, kBytes);
    memset(bench.target, 0x22, kBytes);
}
