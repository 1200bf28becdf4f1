// SPDX-License-Identifier: Apache-2.0
// XXH3 with 64 bits, the checksum of the block store, after the specification of xxHash 0.8.
#ifndef PORTAKV_XXH3_H
#define PORTAKV_XXH3_H

#include <cstddef>
#include <cstdint>

namespace portakv {

// Return the checksum of bytes at any alignment.
uint64_t xxh3(const void *data, size_t nbytes, uint64_t seed);

}  // namespace portakv

#endif
