// SPDX-License-Identifier: Apache-2.0
// The launch of the row kernel: the only file with launch syntax, which only bisheng reads.
#include "rows.h"

#ifndef ASCENDC_CPU_DEBUG  // CANN's CPU twin calls the kernel by ICPU_RUN_KF instead
extern "C" int portakv_ascend_rows(
    const portakv::Copy* copy, uint32_t blocks, uint32_t ub_bytes, void* stream) {
    if (copy == nullptr || portakv::why_not(*copy, blocks, ub_bytes) != nullptr) return 1;
    if (copy->units == 0) return 0;
    portakv_rows<<<blocks, nullptr, stream>>>(PORTAKV_ROWS_ARGUMENTS(*copy), ub_bytes);
    return 0;
}
#endif
