// SPDX-License-Identifier: Apache-2.0
// The launch of the row kernel: the only file with launch syntax, which only bisheng reads.
#include "rows.h"

#ifndef ASCENDC_CPU_DEBUG  // CANN's CPU twin calls the kernel by ICPU_RUN_KF instead
// Called by host.cpp, which has looked at the arguments.
extern "C" void portakv_ascend_launch(
    const portakv::Copy* copy, uint32_t blocks, uint32_t ub_bytes, void* stream) {
    portakv_rows<<<blocks, nullptr, stream>>>(PORTAKV_ROWS_ARGUMENTS(*copy), ub_bytes);
}
#endif
