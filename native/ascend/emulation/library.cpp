// SPDX-License-Identifier: Apache-2.0
// The unchanged kernel as a shared library, functionally emulated on a CPU.
#include "../rows.h"
#include "rows_emulated.h"

// Run a launch. `memory`: the allocations of global memory, which here is the host's. Returns 0, or
// 1 with a sentence in `why`.
extern "C" int portakv_emulated_rows(
    const portakv::Copy* copy, uint32_t blocks, uint32_t ub_bytes,
    const portakv_emulation::Memory* memory, uint32_t allocations, uint32_t when, uint32_t seed,
    char* why, uint32_t room) {
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
