// SPDX-License-Identifier: Apache-2.0
// The unchanged kernel as a shared library, functionally emulated on a CPU: the C interface of
// copy.h, and the functions that only an emulation needs.
#include "../rows.h"
#include "rows_emulated.h"

#include <atomic>

using portakv_emulation::Memory;

// Runs a launch on the device that a stream belongs to; returns what the launch returns.
typedef int (*Serve)(
    const portakv::Copy* copy, uint32_t blocks, uint32_t ub_bytes, const Memory* memory,
    uint32_t allocations, void* stream);

namespace {
thread_local std::vector<Memory> lent;
std::atomic<Serve> serving{nullptr};
constexpr int kUnserved = 2;
}  // namespace

// --- The C interface -----------------------------------------------------------------------------

extern "C" uint32_t portakv_ascend_abi() { return portakv::kAbi; }

extern "C" uint32_t portakv_ascend_emulated() { return 1; }

extern "C" int portakv_ascend_platform(uint32_t* blocks, uint32_t* ub_bytes) {
    *blocks = 20;
    *ub_bytes = 192 << 10;
    return 0;
}

extern "C" int portakv_ascend_rows(
    const portakv::Copy* copy, uint32_t blocks, uint32_t ub_bytes, void* stream) {
    const std::vector<Memory> memory = std::move(lent);
    lent.clear();
    if (copy == nullptr || portakv::why_not(*copy, blocks, ub_bytes) != nullptr) return 1;
    if (copy->units == 0) return 0;
    const Serve serve = serving;
    if (serve == nullptr) return kUnserved;
    return serve(copy, blocks, ub_bytes, memory.data(), static_cast<uint32_t>(memory.size()), stream);
}

// --- Only for the emulation ----------------------------------------------------------------------

// Memory that this thread's next launch may touch: an emulation has no device memory.
extern "C" void portakv_emulation_lend(const Memory* memory, uint32_t allocations) {
    lent.assign(memory, memory + allocations);
}

// The function that runs launches from now on: an emulation has no streams either.
extern "C" void portakv_emulation_serve(Serve serve) { serving = serve; }

// Run a launch now. Returns 0, or 1 with a sentence in `why`.
extern "C" int portakv_emulated_rows(
    const portakv::Copy* copy, uint32_t blocks, uint32_t ub_bytes, const Memory* memory,
    uint32_t allocations, uint32_t when, uint32_t seed, char* why, uint32_t room) {
    using namespace portakv_emulation;
    try {
        Machine on({memory, memory + allocations}, ub_bytes, static_cast<When>(when), seed);
        run_rows(on, *copy, blocks, ub_bytes);
        return 0;
    } catch (const Fault& found) {
        snprintf(why, room, "%s", found.what());
        return 1;
    }
}

extern "C" uint32_t portakv_emulated_nest_bytes() { return sizeof(portakv::Nest); }
extern "C" uint32_t portakv_emulated_copy_bytes() { return sizeof(portakv::Copy); }
