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

RowsSide side_of(const Side &side, int64_t step, int64_t unit, bool on_device,
                 const Walk *outer, const Extents &extents, const int64_t *inner,
                 size_t inner_count) {
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
  for (size_t i = 0; i < extents.count; i++) {
    looks_up = looks_up || outer[i].table != 0;
    entries += product(extents.values[i] - 1, outer[i].table);
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
    *next++ = i < extents.count ? outer[i].table : 0;
    *next++ = i < extents.count ? outer[i].stride : 0;
  }
  for (size_t i = 0; i < kMaxInner; i++) *next++ = i < inner_count ? inner[i] : 0;
  for (size_t i = 1; i < side.units.size(); i++) result.bounded.push(side.units[i].extent);
  return result;
}

void write_extents(const Extents &extents, Writer &writer) {
  writer.word(static_cast<int64_t>(extents.count));
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

bool lacks_table(const RowsSide &fixed, const portakv_rows_side &side) {
  return fixed.lookup == kByUnit && side.table == 0;
}

RowsShape rows_shape(const Nest &nest, int64_t unit, const RowsOptions &options) {
  const LoopList *loops = &nest.loops;
  LoopList sorted;
  if (options.by_source) {
    // A plan follows the destination's order; a link wants neighbours on the host's side.
    sorted = nest.loops;
    std::stable_sort(sorted.begin(), sorted.end(), [](const Loop &a, const Loop &b) {
      if (a.tabled() != b.tabled()) return a.tabled();
      return std::abs(a.src_stride) > std::abs(b.src_stride);
    });
    loops = &sorted;
  }
  RowsShape shape{};
  shape.planes = 1;
  shape.vector = nest.vector;
  shape.run = nest.run / nest.vector;
  shape.row = shape.run;
  Walk src_outer[kMaxOuter];
  Walk dst_outer[kMaxOuter];
  int64_t src_inner[kMaxInner];
  int64_t dst_inner[kMaxInner];
  size_t outer = 0;
  size_t inner = 0;
  for (const Loop &loop : *loops) {
    if (loop.tabled() || over_planes(loop)) {
      shape.planes = product(shape.planes, loop.extent);
      if (outer < kMaxOuter) {
        shape.outer.push(loop.extent);
        src_outer[outer] = {loop.src_table, loop.src_stride};
        dst_outer[outer] = {loop.dst_table, loop.dst_stride};
      }
      outer++;
    } else {
      shape.row = product(shape.row, loop.extent);
      if (inner < kMaxInner) {
        shape.inner.push(loop.extent);
        src_inner[inner] = loop.src_stride;
        dst_inner[inner] = loop.dst_stride;
      }
      inner++;
    }
  }
  if (outer > kMaxOuter || inner > kMaxInner ||
      std::max(nest.src.units.size(), nest.dst.units.size()) > kMaxUnits ||
      shape.planes > kMaxPlanes || shape.row >= kMaxVectors) {
    throw TooManyLoops{static_cast<int64_t>(nest.loops.size()), shape.planes};
  }
  shape.src = side_of(nest.src, options.src_step, unit, options.src_on_device != 0, src_outer,
                      shape.outer, src_inner, inner);
  shape.dst = side_of(nest.dst, options.dst_step, unit, options.dst_on_device != 0, dst_outer,
                      shape.outer, dst_inner, inner);
  // rows.cuh says why some units have more places than vectors: rows at ids of the destination that
  // end inside a sector, if a quarter more suffices. A row may begin at any vector of a sector.
  shape.lanes = shape.row;
  if (inner == 0 && shape.dst.ids && nest.run % kSector != 0) {
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
void grid_of(const RowsShape &shape, const Cut &cut, int64_t units, int64_t each, unsigned *x,
             unsigned *y) {
  if (!cut.stays) {
    *x = static_cast<unsigned>(rounded_up(units * shape.lanes, cut.threads * each));
    *y = static_cast<unsigned>(shape.planes);
    return;
  }
  const int64_t bytes = units * shape.row * shape.planes * shape.vector;
  const int64_t most = bytes > cut.staying.small_bytes ? cut.staying.large : cut.staying.small;
  const int64_t turns = rounded_up(units * cut.staying.length, cut.staying.width);
  *x = static_cast<unsigned>(std::min(most, turns * cut.staying.groups));
  *y = 1;
}

// A nest of one copy with its kernel.
struct Launch {
  RowsShape shape;
  const Kernel *kernel;
};

// The ids of one side that lie on the host: those of each launch travel in its argument.
struct Travelling {
  const void *ids = nullptr;  // null: the side has none
  bool wide = false;
  int64_t per_id = 1;
  int64_t first = 0;  // number of the first position's unit, counted from the first id

  Travelling() = default;
  Travelling(const portakv_rows_side &side, const RowsSide &fixed, const Request &request) {
    if (side.ids == 0 || side.wide < PORTAKV_WIDE_32_HOST) return;
    ids = reinterpret_cast<const void *>(side.ids);
    wide = side.wide == PORTAKV_WIDE_64_HOST;
    per_id = fixed.per_id;
    first = request.first;
  }

  // The units, wherever they begin, whose ids are no more than `room`.
  int64_t units_in(int64_t room) const {
    return ids == nullptr ? INT64_MAX : (room - 1) * per_id;
  }

  // Write the ids of the units from `start` on to `out[next]` and so on; return the place behind.
  int64_t write(int64_t start, int64_t units, int32_t *out, int64_t next, Request &request) const {
    if (ids == nullptr) return next;
    const int64_t at = first + start;
    const int64_t past = (at + units - 1) / per_id + 1;
    // The kernel adds the number of a position, of which `start` is the first.
    request.first = next * per_id + at % per_id - start;
    request.wide = kCarried;
    const int64_t number = past - at / per_id;
    if (wide) {
      narrow(static_cast<const int64_t *>(ids) + at / per_id, number, out + next);
    } else {
      narrow(static_cast<const int32_t *>(ids) + at / per_id, number, out + next);
    }
    return next + number;
  }

  // Another thread may have changed a checked id: a kernel finds it past the view, as it was.
  template <typename Id>
  static void narrow(const Id *from, int64_t number, int32_t *out) {
    for (int64_t n = 0; n < number; n++) {
      const Id id = std::max<Id>(from[n], -1);
      out[n] = static_cast<int32_t>(std::min<Id>(id, INT32_MAX));
    }
  }
};

// Launch one nest; return the driver's error.
int launch_nest(const portakv_kernels &kernels, const Launch &nest, int64_t unit,
                const portakv_rows_side &src, const portakv_rows_side &dst, int64_t units,
                uint64_t status, void *stream) {
  const RowsShape &shape = nest.shape;
  const Cut &cut = nest.kernel->cut;
  alignas(16) unsigned char buffer[kCarryingBytes];
  Argument argument = fixed_argument(unit, shape.src, shape.dst);
  argument.from = request_of(shape.src, src, unit);
  argument.to = request_of(shape.dst, dst, unit);
  argument.status = static_cast<int64_t>(status);
  const int64_t payload = units * shape.row * shape.planes * shape.vector;
  int64_t each = 1;
  for (const Cut::Tuning &tuning : cut.tunings) {
    if (payload < tuning.payload) continue;
    each = tuning.each;
    argument.ahead = static_cast<uint32_t>(tuning.ahead / shape.vector);
    break;
  }
  auto *tables = reinterpret_cast<int64_t *>(buffer + sizeof(Argument));
  int64_t *const behind = place_table(shape.dst, dst, place_table(shape.src, src, tables));
  auto *const carried = reinterpret_cast<int32_t *>(behind);
  const Travelling read(src, shape.src, argument.from);
  const Travelling written(dst, shape.dst, argument.to);
  int64_t room = reinterpret_cast<int32_t *>(buffer + sizeof buffer) - carried;
  room = std::min(room, kMostCarried) / (read.ids != nullptr && written.ids != nullptr ? 2 : 1);
  const int64_t most = std::min({cut.most_units, read.units_in(room), written.units_in(room)});
  void *parameters[] = {buffer};
  for (int64_t start = 0; start < units; start += most) {
    const int64_t part = std::min(most, units - start);
    written.write(start, part, carried, read.write(start, part, carried, 0, argument.from),
                  argument.to);
    argument.start = static_cast<uint32_t>(start);
    argument.units = static_cast<uint32_t>(part);
    std::memcpy(buffer, &argument, sizeof argument);
    unsigned x = 0;
    unsigned y = 0;
    grid_of(shape, cut, part, each, &x, &y);
    const int error =
        kernels.launch(nest.kernel->functions[each - 1], x, y, 1,
                       static_cast<unsigned>(cut.threads), 1, 1, 0, stream, parameters, nullptr);
    if (error != 0) return error;
  }
  return 0;
}

size_t bucket_of(const int64_t *words, size_t count, size_t buckets) {
  uint64_t hash = 1469598103934665603u;  // FNV-1a, by words
  for (size_t i = 0; i < count; i++) hash = (hash ^ static_cast<uint64_t>(words[i])) * 1099511628211u;
  return static_cast<size_t>(hash ^ hash >> 32) % buckets;
}

// More words than a shape has.
constexpr size_t kShapeWords = 64;

}  // namespace

int64_t run_rows(const portakv_kernels &kernels, const Plan &plan, const RowsOptions &options,
                 const portakv_rows_side &src, const portakv_rows_side &dst, int64_t count,
                 uint64_t status, void *stream) {
  const int64_t unit = plan.unit;
  if (!countable(src, dst, count, unit)) return PORTAKV_ROWS_UNITS;
  // Every kernel is found before the first one is launched.
  constexpr size_t kFew = 2;
  Launch few[kFew];
  std::vector<Launch> many;
  Launch *launches = few;
  if (plan.nests.size() > kFew) {
    many.resize(plan.nests.size());
    launches = many.data();
  }
  for (size_t n = 0; n < plan.nests.size(); n++) {
    RowsShape &shape = launches[n].shape;
    shape = rows_shape(plan.nests[n], unit, options);
    if (lacks_table(shape.src, src) || lacks_table(shape.dst, dst)) return PORTAKV_ROWS_NO_TABLE;
    int64_t words[kShapeWords];
    Writer writer(words, kShapeWords);
    write_shape(shape, writer);
    launches[n].kernel = kernels.find(words, static_cast<size_t>(writer.count()));
    if (launches[n].kernel == nullptr) return PORTAKV_ROWS_NOT_LOADED;
  }
  for (size_t n = 0; n < plan.nests.size(); n++) {
    const int error =
        launch_nest(kernels, launches[n], unit, src, dst, count / unit, status, stream);
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace portakv

using namespace portakv;

portakv_kernels::portakv_kernels(LaunchKernel launch_) : launch(launch_) {
  for (std::atomic<Kernel *> &bucket : buckets_) bucket.store(nullptr, std::memory_order_relaxed);
}

portakv_kernels::~portakv_kernels() {
  for (std::atomic<Kernel *> &bucket : buckets_) {
    for (Kernel *kernel = bucket.load(std::memory_order_acquire); kernel != nullptr;) {
      Kernel *next = kernel->next;
      delete kernel;
      kernel = next;
    }
  }
}

void portakv_kernels::add(Kernel *kernel) {
  std::atomic<Kernel *> &bucket =
      buckets_[bucket_of(kernel->shape.data(), kernel->shape.size(), kBuckets)];
  kernel->next = bucket.load(std::memory_order_relaxed);
  while (!bucket.compare_exchange_weak(kernel->next, kernel, std::memory_order_release,
                                       std::memory_order_relaxed)) {
  }
}

const Kernel *portakv_kernels::find(const int64_t *words, size_t count) const {
  const Kernel *kernel =
      buckets_[bucket_of(words, count, kBuckets)].load(std::memory_order_acquire);
  for (; kernel != nullptr; kernel = kernel->next) {
    if (kernel->shape.size() == count &&
        std::memcmp(kernel->shape.data(), words, 8 * count) == 0) {
      return kernel;
    }
  }
  return nullptr;
}

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

portakv_kernels *portakv_kernels_open(void *launch) {
  return new (std::nothrow) portakv_kernels(reinterpret_cast<LaunchKernel>(launch));
}

void portakv_kernels_close(portakv_kernels *kernels) { delete kernels; }

int64_t portakv_kernels_add(portakv_kernels *kernels, const int64_t *shape, int64_t count,
                            const int64_t *cut, const int64_t *functions) {
  return guarded([&]() -> int64_t {
    if (kernels->find(shape, static_cast<size_t>(count)) != nullptr) return 0;
    auto kernel = std::make_unique<Kernel>();
    kernel->shape.assign(shape, shape + count);
    Reader reader(cut);
    kernel->cut = read_cut(reader);
    for (size_t each = 0; each < 2; each++) {
      kernel->functions[each] = reinterpret_cast<void *>(functions[each]);
    }
    kernels->add(kernel.release());
    return 0;
  });
}

int64_t portakv_rows_run(const portakv_kernels *kernels, const int64_t *plan,
                         const int64_t *options, const portakv_rows_side *src,
                         const portakv_rows_side *dst, int64_t count, uint64_t status,
                         void *stream) {
  return guarded([&]() -> int64_t {
    RowsOptions known;
    std::memcpy(&known, options, sizeof known);
    try {
      return run_rows(*kernels, read_plan(plan), known, *src, *dst, count, status, stream);
    } catch (const TooManyLoops &) {
      return PORTAKV_ROWS_LOOPS;
    }
  });
}

}  // extern "C"
