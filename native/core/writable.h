// SPDX-License-Identifier: Apache-2.0
// Whether host memory may be written, for copies that would else end the process.
#ifndef PORTAKV_WRITABLE_H
#define PORTAKV_WRITABLE_H

#include <cstdint>

namespace portakv {

// Return false if a write of the first or the last byte of a range of host memory would fail.
bool writable(int64_t first, int64_t past);

}  // namespace portakv

#endif
