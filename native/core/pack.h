// SPDX-License-Identifier: Apache-2.0
// Kernels that pack and unpack planes: what a plan fixes about one.
//
// The kernels are those of native/cuda/pack.cuh. Their argument is that of the kernels that copy rows
// (rows.h), with the address of the overflow words behind its tables.
#ifndef PORTAKV_PACK_H
#define PORTAKV_PACK_H

#include <cstdint>
#include <vector>

#include "plan.h"
#include "rows.h"

namespace portakv {

// One nest of a plan as a kernel. Words: planes, run, the extents of the loops inside a plane, and
// those over planes (each a count and so many), then the two sides as `RowsSide` has them.
struct PackShape {
  int64_t planes;  // of a unit
  int64_t run;     // bytes of the raw values of a plane without a gap
  Extents inner;
  Extents outer;
  RowsSide src;
  RowsSide dst;
};

// A nest that the argument of the kernels cannot hold.
struct TooManyPackLoops {
  int64_t outer;
  int64_t inner;
};

// Return a nest as a kernel; throw `TooManyPackLoops`. Of `options` the order of planes is not read.
PackShape pack_shape(const PackPlan &plan, const PackNest &nest, const RowsOptions &options);

}  // namespace portakv

#endif
