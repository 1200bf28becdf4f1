// SPDX-License-Identifier: Apache-2.0
#include "rows.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>

#include "core.h"
#include "guarded.h"

namespace portakv {
namespace {

bool over_planes(const Loop &loop) {
  for (int64_t digits = loop.axes; digits != 0; digits /= 8) {
    if (digits % 8 != kLayer && digits % 8 != kKv) return false;
  }
  return true;
}

}  // namespace

int64_t product_of(const std::vector<int64_t> &extents) {
  int64_t result = 1;
  for (int64_t extent : extents) result = product(result, extent);
  return result;
}

RowsSide side_of(const Side &side, int64_t step, int64_t unit, bool on_device,
                 const std::vector<Walk> &outer, const std::vector<int64_t> &extents,
                 const std::vector<int64_t> &inner) {
  RowsSide result{};
  result.ids = step > 0;
  result.per_id = step > 0 ? step / unit : 1;
  result.table = side.table;
  result.offset = side.offset;
  result.stride = side.units.empty() ? 0 : side.units.back().stride;
  bool by_unit = false;
  for (const Step &each : side.units) by_unit = by_unit || each.table != 0;
  bool looks_up = by_unit;
  int64_t entries = 1;
  for (size_t i = 0; i < outer.size(); i++) {
    looks_up = looks_up || outer[i].table != 0;
    entries += product(extents[i] - 1, outer[i].table);
  }
  if (on_device) {
    result.lookup = kByUnit;  // also for one address, which the host does not know
  } else if (!looks_up) {
    result.lookup = kOneAddress;
  } else if (!by_unit && entries <= kMaxEntries) {
    result.lookup = kByPlane;
    result.entries = entries;
  } else {
    result.lookup = kByUnit;
  }
  int64_t *next = result.steps;
  for (size_t i = 0; i < kMaxUnits; i++) {
    *next++ = i < side.units.size() ? side.units[i].table : 0;
    *next++ = i < side.units.size() ? side.units[i].stride : 0;
  }
  for (size_t i = 0; i < kMaxOuter; i++) {
    *next++ = i < outer.size() ? outer[i].table : 0;
    *next++ = i < outer.size() ? outer[i].stride : 0;
  }
  for (size_t i = 0; i < kMaxInner; i++) *next++ = i < inner.size() ? inner[i] : 0;
  for (size_t i = 1; i < side.units.size(); i++) result.bounded.push_back(side.units[i].extent);
  return result;
}

void write_extents(const std::vector<int64_t> &extents, Writer &writer) {
  writer.word(static_cast<int64_t>(extents.size()));
  for (int64_t extent : extents) writer.word(extent);
}

void write_side(const RowsSide &side, Writer &writer) {
  writer.word(side.ids);
  writer.word(side.per_id);
  writer.word(side.lookup);
  writer.word(side.entries);
  write_extents(side.bounded, writer);
  writer.word(side.table);
}

Argument fixed_argument(int64_t unit, const RowsSide &src, const RowsSide &dst) {
  Argument argument{};
  argument.unit = static_cast<uint32_t>(unit);
  std::memcpy(argument.src, src.steps, sizeof argument.src);
  std::memcpy(argument.dst, dst.steps, sizeof argument.dst);
  return argument;
}

bool countable(const portakv_rows_side &src, const portakv_rows_side &dst, int64_t count,
               int64_t unit) {
  return std::max({src.slots, dst.slots, count}) / unit <= kMaxNumbers;
}

Request request_of(const RowsSide &fixed, const portakv_rows_side &side, int64_t unit) {
  Request request{};
  request.base = fixed.offset;
  if (fixed.lookup == kByUnit) {
    request.table = side.table + 8 * fixed.table;
  } else if (fixed.lookup == kOneAddress) {
    request.base += side.addresses[fixed.table];
  }
  request.first = side.offset / unit;
  request.limit = side.slots / unit;
  if (side.ids == 0) {
    // A flat side may start anywhere, also between two units.
    request.base += side.offset % unit * (fixed.stride / unit);
    return request;
  }
  request.ids = side.ids;
  request.wide = side.wide;
  return request;
}

int64_t *place_table(const RowsSide &fixed, const portakv_rows_side &side, int64_t *place) {
  *place = 0;  // the word of a side without a table
  if (fixed.entries != 0) {
    std::memcpy(place, side.addresses + fixed.table, 8 * static_cast<size_t>(fixed.entries));
  }
  return place + std::max<int64_t>(1, fixed.entries);
}

RowsShape rows_shape(const Nest &nest, int64_t unit, const RowsOptions &options) {
  std::vector<Loop> loops = nest.loops;
  if (options.by_source) {
    // A plan follows the destination's order; a link wants neighbours on the host's side.
    std::stable_sort(loops.begin(), loops.end(), [](const Loop &a, const Loop &b) {
      if (a.tabled() != b.tabled()) return a.tabled();
      return std::abs(a.src_stride) > std::abs(b.src_stride);
    });
  }
  RowsShape shape{};
  std::vector<Walk> src_outer, dst_outer;
  std::vector<int64_t> src_inner, dst_inner;
  for (const Loop &loop : loops) {
    if (loop.tabled() || over_planes(loop)) {
      shape.outer.push_back(loop.extent);
      src_outer.push_back({loop.src_table, loop.src_stride});
      dst_outer.push_back({loop.dst_table, loop.dst_stride});
    } else {
      shape.inner.push_back(loop.extent);
      src_inner.push_back(loop.src_stride);
      dst_inner.push_back(loop.dst_stride);
    }
  }
  shape.vector = nest.vector;
  shape.run = nest.run / nest.vector;
  shape.row = product(product_of(shape.inner), shape.run);
  shape.planes = product_of(shape.outer);
  if (shape.outer.size() > kMaxOuter || shape.inner.size() > kMaxInner ||
      std::max(nest.src.units.size(), nest.dst.units.size()) > kMaxUnits ||
      shape.planes > kMaxPlanes || shape.row >= kMaxVectors) {
    throw TooManyLoops{static_cast<int64_t>(nest.loops.size()), shape.planes};
  }
  shape.src = side_of(nest.src, options.src_step, unit, options.src_on_device != 0, src_outer,
                      shape.outer, src_inner);
  shape.dst = side_of(nest.dst, options.dst_step, unit, options.dst_on_device != 0, dst_outer,
                      shape.outer, dst_inner);
  // rows.cuh says why some units have more places than vectors: rows at ids of the destination that
  // end inside a sector, if a quarter more suffices. A row may begin at any vector of a sector.
  shape.lanes = shape.row;
  if (shape.inner.empty() && shape.dst.ids && nest.run % kSector != 0) {
    const int64_t each = kSector / nest.vector;
    const int64_t lanes = rounded_up(shape.row + each - 1, each) * each;
    if (4 * lanes <= 5 * shape.row) shape.lanes = lanes;
  }
  return shape;
}

void write_shape(const RowsShape &shape, Writer &writer) {
  writer.word(shape.vector);
  writer.word(shape.run);
  writer.word(shape.lanes);
  writer.word(shape.row);
  writer.word(shape.planes);
  write_extents(shape.inner, writer);
  write_extents(shape.outer, writer);
  write_side(shape.src, writer);
  write_side(shape.dst, writer);
}

namespace {

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
    int64_t small;    // the most thread blocks of a launch up to `small_bytes`
    int64_t large;    // and of a larger one
    int64_t width;    // vectors that a block moves in one turn
    int64_t length;   // vectors of a unit in the planes that a block walks through
    int64_t groups;   // of such planes
  };
  int64_t threads;
  int64_t most_units;  // of one launch
  std::vector<Tuning> tunings;
  bool stays;
  Staying staying;
};

struct Kernel {
  RowsShape shape;
  Cut cut;
  void *functions[2];  // by the vectors that a thread moves, less one
  Argument fixed;      // with all values that no call changes
};

Cut read_cut(Reader &reader) {
  Cut cut{};
  cut.threads = reader.word();
  cut.most_units = reader.word();
  cut.stays = reader.word() != 0;
  if (cut.stays) {
    cut.staying.small_bytes = reader.word();
    cut.staying.small = reader.word();
    cut.staying.large = reader.word();
    cut.staying.width = reader.word();
    cut.staying.length = reader.word();
    cut.staying.groups = reader.word();
  }
  const int64_t tunings = reader.count(64);
  for (int64_t i = 0; i < tunings; i++) {
    Cut::Tuning tuning;
    tuning.payload = reader.word();
    tuning.each = reader.word();
    tuning.ahead = reader.word();
    if (tuning.each < 1 || tuning.each > 2) throw Malformed("there is no such entry");
    cut.tunings.push_back(tuning);
  }
  return cut;
}

// The blocks along x and y of a launch of so many units.
void grid_of(const Kernel &kernel, int64_t units, int64_t each, unsigned *x, unsigned *y) {
  const Cut &cut = kernel.cut;
  if (!cut.stays) {
    *x = static_cast<unsigned>(rounded_up(units * kernel.shape.lanes, cut.threads * each));
    *y = static_cast<unsigned>(kernel.shape.planes);
    return;
  }
  const int64_t bytes = units * kernel.shape.row * kernel.shape.planes * kernel.shape.vector;
  const int64_t most = bytes > cut.staying.small_bytes ? cut.staying.large : cut.staying.small;
  const int64_t turns = rounded_up(units * cut.staying.length, cut.staying.width);
  *x = static_cast<unsigned>(std::min(most, turns * cut.staying.groups));
  *y = 1;
}

}  // namespace
}  // namespace portakv

using namespace portakv;

struct portakv_rows {
  int64_t unit;  // tokens
  std::vector<Kernel> kernels;
  LaunchKernel launch;
};

extern "C" {

int64_t portakv_rows_describe(const int64_t *plan_words, int64_t nest, const int64_t *options,
                              int64_t *out, int64_t capacity) {
  return guarded([&]() -> int64_t {
    const Plan plan = read_plan(plan_words);
    if (nest < 0 || nest >= static_cast<int64_t>(plan.nests.size())) return PORTAKV_MALFORMED;
    RowsOptions known;
    std::memcpy(&known, options, sizeof known);
    Writer writer(out, capacity);
    try {
      write_shape(rows_shape(plan.nests[static_cast<size_t>(nest)], plan.unit, known), writer);
    } catch (const TooManyLoops &refused) {
      out[0] = refused.loops;
      out[1] = refused.planes;
      return PORTAKV_ROWS_LOOPS;
    }
    return writer.count();
  });
}

portakv_rows *portakv_rows_open(const int64_t *plan_words, const int64_t *options,
                                const int64_t *cuts, const int64_t *functions, void *launch) {
  try {
    const Plan plan = read_plan(plan_words);
    RowsOptions known;
    std::memcpy(&known, options, sizeof known);
    auto rows = std::make_unique<portakv_rows>();
    rows->unit = plan.unit;
    rows->launch = reinterpret_cast<LaunchKernel>(launch);
    Reader reader(cuts);
    for (size_t i = 0; i < plan.nests.size(); i++) {
      Kernel kernel{};
      kernel.shape = rows_shape(plan.nests[i], plan.unit, known);
      kernel.cut = read_cut(reader);
      for (size_t each = 0; each < 2; each++) {
        kernel.functions[each] = reinterpret_cast<void *>(functions[2 * i + each]);
      }
      kernel.fixed = fixed_argument(plan.unit, kernel.shape.src, kernel.shape.dst);
      rows->kernels.push_back(std::move(kernel));
    }
    return rows.release();
  } catch (...) {
    return nullptr;
  }
}

void portakv_rows_close(portakv_rows *rows) { delete rows; }

int portakv_rows_run(const portakv_rows *rows, const portakv_rows_side *src,
                     const portakv_rows_side *dst, int64_t count, uint64_t status, void *stream) {
  const int64_t unit = rows->unit;
  const int64_t units = count / unit;
  if (!countable(*src, *dst, count, unit)) return PORTAKV_ROWS_UNITS;
  alignas(16) unsigned char buffer[kMostBytes];
  for (const Kernel &kernel : rows->kernels) {
    const RowsShape &shape = kernel.shape;
    Argument argument = kernel.fixed;
    argument.from = request_of(shape.src, *src, unit);
    argument.to = request_of(shape.dst, *dst, unit);
    argument.status = static_cast<int64_t>(status);
    const int64_t payload = units * shape.row * shape.planes * shape.vector;
    int64_t each = 1;
    for (const Cut::Tuning &tuning : kernel.cut.tunings) {
      if (payload < tuning.payload) continue;
      each = tuning.each;
      argument.ahead = static_cast<uint32_t>(tuning.ahead / shape.vector);
      break;
    }
    auto *tables = reinterpret_cast<int64_t *>(buffer + sizeof(Argument));
    place_table(shape.dst, *dst, place_table(shape.src, *src, tables));
    void *parameters[] = {buffer};
    const int64_t most = kernel.cut.most_units;
    for (int64_t start = 0; start < units; start += most) {
      const int64_t part = std::min(most, units - start);
      argument.start = static_cast<uint32_t>(start);
      argument.units = static_cast<uint32_t>(part);
      std::memcpy(buffer, &argument, sizeof argument);
      unsigned x = 0;
      unsigned y = 0;
      grid_of(kernel, part, each, &x, &y);
      const int error = rows->launch(kernel.functions[each - 1], x, y, 1,
                                     static_cast<unsigned>(kernel.cut.threads), 1, 1, 0, stream,
                                     parameters, nullptr);
      if (error != 0) return error;
    }
  }
  return 0;
}

int portakv_rows_again(const portakv_rows *rows, const portakv_rows_side *src,
                       const portakv_rows_side *dst, int64_t src_at, int64_t dst_at, int64_t first,
                       int64_t count, uint64_t status, void *stream) {
  const auto placed = [first](const portakv_rows_side &side, const int64_t *at) {
    portakv_rows_side result = side;
    if (side.ids != 0) {
      result.ids = *at;
      result.offset = first;
    } else {
      result.addresses = at;
      result.offset = 0;
    }
    return result;
  };
  const portakv_rows_side from = placed(*src, &src_at);
  const portakv_rows_side to = placed(*dst, &dst_at);
  return portakv_rows_run(rows, &from, &to, count, status, stream);
}

}  // extern "C"
