// SPDX-License-Identifier: Apache-2.0
// The arguments of the AscendC row kernel, and the C interface of the library that launches it.
//
// `Nest` depends on two forms: one nest of a `CopyPlan`, uploaded once when a launch is prepared.
// `Copy` depends on a request; it stays on the host and travels as scalars. Every member is a
// 64-bit integer: Python packs both with struct.pack("<...q"). Strides and offsets are bytes.
#pragma once
#include <cstdint>

namespace portakv {

constexpr int kUnits = 4;  // steps that split the number of a unit
constexpr int kLoops = 8;  // strided loops of a nest, without the loop over the rows

// One step of a unit's number, outermost first; the outermost has extent 0: it takes what is left.
struct Step {
    int64_t extent, table, stride;
};

// Where the units of one side lie.
struct Side {
    int64_t table, offset;  // origin: entry of the address table, bytes after its address
    int64_t per_id;         // units of one id; 0: a side without ids
    int64_t steps;          // how many of `units` there are
    Step units[kUnits];
};

struct Loop {
    int64_t extent, src_table, src_stride, dst_table, dst_stride;
};

// Units x loops x rows x one contiguous run.
struct Nest {
    Side src, dst;
    int64_t unit;                    // tokens of a unit, to name a bad position
    int64_t run;                     // contiguous bytes
    int64_t rows;                    // runs that one transfer takes, if it can; 1: none
    int64_t src_stride, dst_stride;  // bytes between rows, at least `run`
    int64_t loops;                   // how many of `loop` there are, outermost first
    Loop loop[kLoops];
};

// What a request fixes about one side.
struct Request {
    int64_t table;   // addresses in global memory, int64; or 0
    int64_t base;    // bytes after the table's addresses; without a table: the address itself
    int64_t ids;     // int32 or int64 in global memory; 0 if the side has none
    int64_t wide;    // ids are int64
    int64_t first;   // number of the unit at position 0
    int64_t limit;   // units in the view: ids past it move nothing
};

struct Copy {
    int64_t nest;    // a `Nest` in global memory
    Request src, dst;
    int64_t units;   // units to move
    int64_t status;  // in global memory an int64 word for each core, where it puts its first bad
                     // position + 1; or 0
};

constexpr uint32_t kLeastUb = 1024;  // bytes: far below any core's, far above what tiling needs

// The reason why the arguments of a launch are wrong, as a sentence; null if they are right.
inline const char* why_not(const Copy& copy, uint32_t blocks, uint32_t ub_bytes) {
    if (copy.nest == 0) return "Expected a launch with a nest, got none.";
    if (copy.units < 0) return "Expected a number of units of at least 0, got a negative number.";
    if (blocks == 0) return "Expected a launch on at least one core, got no core.";
    if (ub_bytes < kLeastUb)
        return "Expected a unified buffer of 1 KiB or more, got less; ask the platform.";
    return nullptr;
}

}  // namespace portakv

// The functions that a library exports, whether it was built with CANN or with emulation/. The
// caller calls the first two before the others.

namespace portakv {
constexpr uint32_t kAbi = 2;  // counts changes of the structures above and of the functions below
}

extern "C" uint32_t portakv_ascend_abi();
// 1 if it emulates the kernel on a CPU, 0 if it launches on an NPU.
extern "C" uint32_t portakv_ascend_emulated();
// Vector cores, and bytes of one core's unified buffer; returns 0 if the platform reports both.
extern "C" int portakv_ascend_platform(uint32_t* blocks, uint32_t* ub_bytes);
// Launch on `blocks` vector cores, ordered on `stream`, whose device is the current one; returns 0, or
// 1 if the arguments cannot be right (`portakv::why_not`). `copy` is read before it returns.
extern "C" int portakv_ascend_rows(
    const portakv::Copy* copy, uint32_t blocks, uint32_t ub_bytes, void* stream);
