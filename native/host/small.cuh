// SPDX-License-Identifier: Apache-2.0
// Small copies from the host to the device by a kernel: no copy engine takes part, so that they
// never queue behind a large transfer.
//
// The bytes travel in the kernel's parameters (`Values`, of as many vectors as
// PORTAKV_SMALL_VECTORS says), or the kernel reads them from mapped host memory (`Mapped`). Raw
// pointers and integers only: builds under NVRTC, nvcc, hipRTC and hipcc.
#pragma once

// Parameters stay in constant memory; without the word each thread would copy all of them first.
#if !defined(PORTAKV_CONSTANT)
#if defined(__CUDACC_RTC__) || defined(__NVCC__)
#define PORTAKV_CONSTANT __grid_constant__
#else
#define PORTAKV_CONSTANT
#endif
#endif

namespace portakv {
namespace small {

typedef unsigned long long u64;

// 16 bytes as one access; the others are plain integers.
struct alignas(16) Wide { unsigned int part[4]; };

// By value: a launch carries all vectors, whatever it uses of them.
struct Values {
    char* to;
    unsigned bytes;  // to write
    unsigned width;  // bytes of the widest vector that `to` is aligned to
    Wide at[PORTAKV_SMALL_VECTORS];
};
static_assert(sizeof(Values) == 16 + 16 * PORTAKV_SMALL_VECTORS, "as the host packs it");

// From host memory that the device reads by itself; `from` is aligned to 16 bytes.
struct Mapped {
    char* to;
    const char* from;
    u64 bytes, width;
};
static_assert(sizeof(Mapped) == 32, "as the host packs it");

template <class Vector>
__device__ __forceinline__ void spread(char* to, const char* from, u64 bytes) {
    const u64 vectors = bytes / sizeof(Vector);
    const u64 step = (u64)gridDim.x * blockDim.x;
    const u64 mine = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (u64 at = mine; at < vectors; at += step) ((Vector*)to)[at] = ((const Vector*)from)[at];
    // Less than a vector is left: a byte for each of the first threads, of which a block has enough.
    const u64 last = vectors * sizeof(Vector) + mine;
    if (last < bytes) to[last] = from[last];
}

__device__ __forceinline__ void spread(char* to, const char* from, u64 bytes, u64 width) {
    if (width >= 16) spread<Wide>(to, from, bytes);
    else if (width == 8) spread<u64>(to, from, bytes);
    else if (width == 4) spread<unsigned int>(to, from, bytes);
    else if (width == 2) spread<unsigned short>(to, from, bytes);
    else spread<unsigned char>(to, from, bytes);
}

}  // namespace small
}  // namespace portakv

extern "C" __global__ void portakv_small_values(
    PORTAKV_CONSTANT const portakv::small::Values values) {
    portakv::small::spread(values.to, (const char*)values.at, values.bytes, values.width);
}

extern "C" __global__ void portakv_small_mapped(
    PORTAKV_CONSTANT const portakv::small::Mapped mapped) {
    portakv::small::spread(mapped.to, mapped.from, mapped.bytes, mapped.width);
}
