// SPDX-License-Identifier: Apache-2.0
// One launch of the row kernel on an emulated machine.
#pragma once

namespace portakv_emulation {

// `ub_bytes` is the size that the kernel gets; the machine checks it against its own size.
inline void run_rows(Machine& on, const portakv::Copy& copy, uint32_t blocks, uint32_t ub_bytes) {
    if (const char* why = portakv::why_not(copy, blocks, ub_bytes)) fault("%s", why);
    launch(on, blocks, [&] { portakv_rows(PORTAKV_ROWS_ARGUMENTS(copy), ub_bytes); });
}

}  // namespace portakv_emulation
