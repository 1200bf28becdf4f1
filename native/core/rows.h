// SPDX-License-Identifier: Apache-2.0
// Kernels that copy rows: what a plan fixes about one, its argument, and its launches.
//
// The kernels are those of native/cuda/rows.cuh and native/host/direct.cuh. Both take the argument
// `Copy` of rows.cuh, whose layout `Argument` repeats here for the host.
#ifndef PORTAKV_ROWS_H
#define PORTAKV_ROWS_H

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core.h"
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

// The extents of a few loops. Words: a count and so many extents.
struct Extents {
  size_t count = 0;
  int64_t values[kMaxInner];

  void push(int64_t extent) { values[count++] = extent; }
  const int64_t *begin() const { return values; }
  const int64_t *end() const { return values + count; }
};

// What a plan fixes about one side. Words: ids, per_id, lookup, entries, the bounded extents of a
// unit's number, table.
struct RowsSide {
  bool ids;
  int64_t per_id;  // units of one id; 1 without ids
  Lookup lookup;
  int64_t entries;  // of the table in the argument
  Extents bounded;
  int64_t table;    // the origin's entry of the view's table
  int64_t offset;   // bytes from there
  int64_t stride;   // bytes from one unit to the next, within the innermost step
  int64_t steps[2 * kMaxUnits + 2 * kMaxOuter + kMaxInner];  // `Side` of rows.cuh
};

// One nest of a plan as a kernel. Words: vector, run, lanes, row, planes, the extents of the loops
// inside a unit, and those over planes, then the two sides.
struct RowsShape {
  int64_t vector;  // bytes
  int64_t run;     // vectors
  int64_t lanes;   // places of threads for the vectors of one unit in one plane
  int64_t row;     // vectors of one unit in one plane
  int64_t planes;
  Extents inner;
  Extents outer;
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

// `Request` of rows.cuh: what a call fixes about one side.
struct Request {
  int64_t base;
  int64_t table;
  int64_t ids;
  int64_t wide;  // of ids: 0 int32, 1 int64, `kCarried`
  int64_t first;
  int64_t limit;
};

// `Copy` of rows.cuh up to the tables that follow it.
struct Argument {
  Request from;
  Request to;
  uint32_t units;
  uint32_t start;
  uint32_t unit;
  uint32_t ahead;
  int64_t status;
  int64_t src[20];
  int64_t dst[20];
};
static_assert(sizeof(Argument) == 120 + 2 * 160, "as rows.cuh declares it");
static_assert(sizeof(RowsSide::steps) == sizeof(Argument::src), "one side of the argument");

// The most bytes of an argument with its tables.
constexpr size_t kMostBytes = sizeof(Argument) + 2 * 8 * kMaxEntries;
// Bytes of an argument with the ids that it carries, which every driver takes, and the most of them;
// as `CarryingOf` of rows.cuh.
constexpr size_t kCarryingBytes = 4096;
constexpr int64_t kMostCarried = 512;
static_assert(kMostBytes + 4 * sizeof(int32_t) <= kCarryingBytes, "two ids of each side need room");
constexpr int64_t kCarried = 2;  // the ids are int32 in the argument

// One step of a loop on one side.
struct Walk {
  int64_t table;
  int64_t stride;
};

// A nest that the argument of the kernels cannot hold.
struct TooManyLoops {
  int64_t loops;
  int64_t planes;
};

// Return a nest as a kernel; throw `TooManyLoops`.
RowsShape rows_shape(const Nest &nest, int64_t unit, const RowsOptions &options);

void write_shape(const RowsShape &shape, Writer &writer);

// cuLaunchKernel and hipModuleLaunchKernel.
using LaunchKernel = int (*)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                             unsigned block_x, unsigned block_y, unsigned block_z,
                             unsigned shared_bytes, void *stream, void **parameters, void **extra);

// How a kernel's launch is cut: the vectors that a thread moves, and the grid, by the units.
struct Cut {
  struct Tuning {
    int64_t payload;  // the least bytes that the tuning is for
    int64_t each;     // vectors that one thread moves
    int64_t ahead;    // bytes to prefetch ahead in copy order
  };
  // A copy by a few thread blocks that stay until all is moved.
  struct Staying {
    int64_t small_bytes;
    int64_t small;   // the most thread blocks of a launch up to `small_bytes`
    int64_t large;   // and of a larger one
    int64_t width;   // vectors that a block moves in one turn
    int64_t length;  // vectors of a unit in the planes that a block walks through
    int64_t groups;  // of such planes
  };
  int64_t threads;
  int64_t most_units;  // of one launch
  std::vector<Tuning> tunings;
  bool stays;
  Staying staying;
};

// A loaded kernel.
struct Kernel {
  std::vector<int64_t> shape;  // its words
  Cut cut;
  void *functions[2];  // by the vectors that a thread moves, less one
  Kernel *next;        // of the same bucket
};

}  // namespace portakv

// The loaded kernels of a device, by the words of their shapes. It only grows, and a reader takes no
// lock: a forked child may find any lock taken.
struct portakv_kernels {
  explicit portakv_kernels(portakv::LaunchKernel launch_);
  ~portakv_kernels();

  void add(portakv::Kernel *kernel);
  const portakv::Kernel *find(const int64_t *words, size_t count) const;

  const portakv::LaunchKernel launch;

 private:
  static constexpr size_t kBuckets = 256;
  std::atomic<portakv::Kernel *> buckets_[kBuckets];
};

namespace portakv {

// Order a copy of `count` tokens, whole units, on a stream of the current device; see
// `portakv_rows_run`, whose result this returns. Throw `TooManyLoops` and `Malformed`.
int64_t run_rows(const portakv_kernels &kernels, const Plan &plan, const RowsOptions &options,
                 const portakv_rows_side &src, const portakv_rows_side &dst, int64_t count,
                 uint64_t status, void *stream);

// --- Parts of a launch, which kernels that pack have too --------------------------------------

// Return what a plan fixes about one side. `step`: tokens of an id. `outer`: its steps over planes,
// of so many `extents`. `inner`: its strides inside a unit.
RowsSide side_of(const Side &side, int64_t step, int64_t unit, bool on_device, const Walk *outer,
                 const Extents &extents, const int64_t *inner, size_t inner_count);

void write_extents(const Extents &extents, Writer &writer);
void write_side(const RowsSide &side, Writer &writer);

// Return the values of the argument that no call changes.
Argument fixed_argument(int64_t unit, const RowsSide &src, const RowsSide &dst);

// Return true if the kernels count the units of both views and of a copy, in 32 bits.
bool countable(const portakv_rows_side &src, const portakv_rows_side &dst, int64_t count,
               int64_t unit);

Request request_of(const RowsSide &fixed, const portakv_rows_side &side, int64_t unit);

// Write a side's table behind those before it, and return the place behind it.
int64_t *place_table(const RowsSide &fixed, const portakv_rows_side &side, int64_t *place);

// Return true if a kernel reads a table of addresses that the device has not.
bool lacks_table(const RowsSide &fixed, const portakv_rows_side &side);

inline int64_t rounded_up(int64_t number, int64_t divisor) {
  return (number + divisor - 1) / divisor;
}

}  // namespace portakv

#endif
