// SPDX-License-Identifier: Apache-2.0
// Kernels that copy rows: what a plan fixes about one, its argument, and its launches.
//
// The kernels are those of native/cuda/rows.cuh and native/host/direct.cuh. Both take the argument
// `Copy` of rows.cuh, whose layout `Argument` repeats here for the host.
#ifndef PORTAKV_ROWS_H
#define PORTAKV_ROWS_H

#include <cstdint>
#include <vector>

#include "plan.h"

namespace portakv {

// Lengths of arrays in the argument of rows.cuh.
constexpr size_t kMaxUnits = 3;
constexpr size_t kMaxOuter = 4;
constexpr size_t kMaxInner = 6;
constexpr int64_t kMaxPlanes = 65535;          // thread blocks along y
constexpr int64_t kMaxEntries = 192;           // addresses that travel in the argument
constexpr int64_t kMaxVectors = int64_t{1} << 31;  // of one launch: counted in 32 bits
constexpr int64_t kMaxNumbers = int64_t{1} << 32;  // units of a view: counted in 32 bits
constexpr int64_t kSector = 32;                // bytes of device memory that are written together

// How a side finds the address of a plane; `Table` of rows.cuh.
enum Lookup : int64_t {
  kOneAddress = 0,  // all else is strides
  kByPlane = 1,     // an entry for each plane, in the argument
  kByUnit = 2,      // entries in device memory, also chosen by the number of a unit
};

// What a plan fixes about one side. Words: ids, per_id, lookup, entries, the bounded extents of a
// unit's number (a count and so many), table.
struct RowsSide {
  bool ids;
  int64_t per_id;  // units of one id; 1 without ids
  Lookup lookup;
  int64_t entries;  // of the table in the argument
  std::vector<int64_t> bounded;
  int64_t table;    // the origin's entry of the view's table
  int64_t offset;   // bytes from there
  int64_t stride;   // bytes from one unit to the next, within the innermost step
  int64_t steps[2 * kMaxUnits + 2 * kMaxOuter + kMaxInner];  // `Side` of rows.cuh
};

// One nest of a plan as a kernel. Words: vector, run, lanes, row, planes, the extents of the loops
// inside a unit, and those over planes (each a count and so many), then the two sides.
struct RowsShape {
  int64_t vector;  // bytes
  int64_t run;     // vectors
  int64_t lanes;   // places of threads for the vectors of one unit in one plane
  int64_t row;     // vectors of one unit in one plane
  int64_t planes;
  std::vector<int64_t> inner;
  std::vector<int64_t> outer;
  RowsSide src;
  RowsSide dst;
};

// What a launch needs to know besides a nest. Words in this order.
struct RowsOptions {
  int64_t src_step;       // tokens of an id, 0 without ids
  int64_t dst_step;
  int64_t src_on_device;  // its addresses are known to a device alone
  int64_t dst_on_device;
  int64_t by_source;      // the planes follow the source's order
};

// A nest that the argument of the kernels cannot hold.
struct TooManyLoops {
  int64_t loops;
  int64_t planes;
};

// Return a nest as a kernel; throw `TooManyLoops`.
RowsShape rows_shape(const Nest &nest, int64_t unit, const RowsOptions &options);

void write_shape(const RowsShape &shape, Writer &writer);

}  // namespace portakv

#endif
