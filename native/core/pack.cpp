// SPDX-License-Identifier: Apache-2.0
#include "pack.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "core.h"
#include "guarded.h"

namespace portakv {
namespace {

// Threads of one launch: HIP takes fewer than 2^32.
constexpr int64_t kMostThreads = (int64_t{1} << 32) - 1024;

struct PackKernel {
  PackShape shape;
  int64_t threads;     // of a thread block
  int64_t together;    // planes of a thread block
  int64_t most_units;  // of one launch
  void *function;
  Argument fixed;  // with all values that no call changes
};

}  // namespace

PackShape pack_shape(const PackPlan &plan, const PackNest &nest, const RowsOptions &options) {
  // The raw values of a plane are runs of `run` bytes, of which steps without a gap are a part.
  StepList steps = nest.tokens;
  steps.append(nest.dim.data(), nest.dim.size());
  if (steps.empty()) throw Malformed("a row has no bytes");
  PackShape shape{};
  shape.run = steps.back().extent;
  steps.pop_back();
  while (!steps.empty() && steps.back().stride == shape.run) {
    shape.run = product(shape.run, steps.back().extent);
    steps.pop_back();
  }
  if (nest.loops.size() > kMaxOuter || steps.size() > kMaxInner ||
      std::max(nest.src.units.size(), nest.dst.units.size()) > kMaxUnits) {
    throw TooManyPackLoops{static_cast<int64_t>(nest.loops.size()),
                           static_cast<int64_t>(steps.size())};
  }

  Walk src_outer[kMaxOuter];
  Walk dst_outer[kMaxOuter];
  shape.planes = 1;
  for (const Loop &loop : nest.loops) {
    src_outer[shape.outer.count] = {loop.src_table, loop.src_stride};
    dst_outer[shape.outer.count] = {loop.dst_table, loop.dst_stride};
    shape.outer.push(loop.extent);
    shape.planes = product(shape.planes, loop.extent);
  }
  int64_t strides[kMaxInner];
  for (const Step &step : steps) {
    strides[shape.inner.count] = step.stride;
    shape.inner.push(step.extent);
  }
  const size_t inner = steps.size();
  shape.src = side_of(nest.src, options.src_step, plan.unit, options.src_on_device != 0, src_outer,
                      shape.outer, strides, plan.packs ? inner : 0);
  shape.dst = side_of(nest.dst, options.dst_step, plan.unit, options.dst_on_device != 0, dst_outer,
                      shape.outer, strides, plan.packs ? 0 : inner);
  return shape;
}

}  // namespace portakv

using namespace portakv;

struct portakv_pack {
  int64_t unit;  // tokens
  std::vector<PackKernel> kernels;
  LaunchKernel launch;
};

extern "C" {

int64_t portakv_pack_describe(const int64_t *plan_words, int64_t nest, const int64_t *options,
                              int64_t *out, int64_t capacity) {
  return guarded([&]() -> int64_t {
    const PackPlan plan = read_pack_plan(plan_words);
    if (nest < 0 || nest >= static_cast<int64_t>(plan.nests.size())) return PORTAKV_MALFORMED;
    RowsOptions known;
    std::memcpy(&known, options, sizeof known);
    Writer writer(out, capacity);
    try {
      const PackShape shape = pack_shape(plan, plan.nests[static_cast<size_t>(nest)], known);
      writer.word(shape.planes);
      writer.word(shape.run);
      write_extents(shape.inner, writer);
      write_extents(shape.outer, writer);
      write_side(shape.src, writer);
      write_side(shape.dst, writer);
    } catch (const TooManyPackLoops &refused) {
      out[0] = refused.outer;
      out[1] = refused.inner;
      return PORTAKV_ROWS_LOOPS;
    }
    return writer.count();
  });
}

portakv_pack *portakv_pack_open(const int64_t *plan_words, const int64_t *options,
                                const int64_t *cuts, const int64_t *functions, void *launch) {
  try {
    const PackPlan plan = read_pack_plan(plan_words);
    RowsOptions known;
    std::memcpy(&known, options, sizeof known);
    auto pack = std::make_unique<portakv_pack>();
    pack->unit = plan.unit;
    pack->launch = reinterpret_cast<LaunchKernel>(launch);
    for (size_t i = 0; i < plan.nests.size(); i++) {
      PackKernel kernel{};
      kernel.shape = pack_shape(plan, plan.nests[i], known);
      kernel.threads = cuts[2 * i];
      kernel.together = cuts[2 * i + 1];
      if (kernel.together < 1 || kernel.threads < kernel.together || kernel.shape.planes < 1) {
        return nullptr;
      }
      const int64_t blocks = kMostThreads / (kernel.threads / kernel.together);
      kernel.most_units = std::max<int64_t>(1, blocks / kernel.shape.planes);
      kernel.function = reinterpret_cast<void *>(functions[i]);
      kernel.fixed = fixed_argument(plan.unit, kernel.shape.src, kernel.shape.dst);
      pack->kernels.push_back(std::move(kernel));
    }
    return pack.release();
  } catch (...) {
    return nullptr;
  }
}

void portakv_pack_close(portakv_pack *pack) { delete pack; }

int portakv_pack_run(const portakv_pack *pack, const portakv_rows_side *src,
                     const portakv_rows_side *dst, int64_t count, uint64_t status,
                     uint64_t overflow, void *stream) {
  const int64_t unit = pack->unit;
  const int64_t units = count / unit;
  if (!countable(*src, *dst, count, unit)) return PORTAKV_ROWS_UNITS;
  if (std::max(src->wide, dst->wide) > PORTAKV_WIDE_64) return PORTAKV_MALFORMED;
  alignas(16) unsigned char buffer[kMostBytes + sizeof overflow];
  for (const PackKernel &kernel : pack->kernels) {
    const PackShape &shape = kernel.shape;
    Argument argument = kernel.fixed;
    argument.from = request_of(shape.src, *src, unit);
    argument.to = request_of(shape.dst, *dst, unit);
    argument.status = static_cast<int64_t>(status);
    auto *tables = reinterpret_cast<int64_t *>(buffer + sizeof(Argument));
    int64_t *behind = place_table(shape.dst, *dst, place_table(shape.src, *src, tables));
    std::memcpy(behind, &overflow, sizeof overflow);

    void *parameters[] = {buffer};
    const int64_t most = kernel.most_units;
    for (int64_t start = 0; start < units; start += most) {
      const int64_t part = std::min(most, units - start);
      argument.start = static_cast<uint32_t>(start);
      argument.units = static_cast<uint32_t>(part);
      std::memcpy(buffer, &argument, sizeof argument);
      const int64_t blocks = rounded_up(part * shape.planes, kernel.together);
      const int error = pack->launch(kernel.function, static_cast<unsigned>(blocks), 1, 1,
                                     static_cast<unsigned>(kernel.threads), 1, 1, 0, stream,
                                     parameters, nullptr);
      if (error != 0) return error;
    }
  }
  return 0;
}

}  // extern "C"
