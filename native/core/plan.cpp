// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

namespace portakv {

namespace {

constexpr int64_t kMostLoops = 4096;  // of one nest that is read

Side read_side(Reader &reader) {
  Side side;
  side.table = reader.word();
  side.offset = reader.word();
  const Steps units = reader.steps(2 * kMostSteps);
  side.units.assign(units.begin(), units.end());
  return side;
}

Nest read_nest(Reader &reader) {
  Nest nest;
  nest.src = read_side(reader);
  nest.dst = read_side(reader);
  nest.loops.resize(static_cast<size_t>(reader.count(kMostLoops)));
  for (Loop &loop : nest.loops) {
    loop.axes = reader.word();
    loop.extent = reader.word();
    loop.src_table = reader.word();
    loop.src_stride = reader.word();
    loop.dst_table = reader.word();
    loop.dst_stride = reader.word();
  }
  nest.run = reader.word();
  nest.vector = reader.word();
  return nest;
}

void write_side(const Side &side, Writer &writer) {
  writer.word(side.table);
  writer.word(side.offset);
  writer.steps(side.units);
}

void write_loops(const std::vector<Loop> &loops, Writer &writer) {
  writer.word(static_cast<int64_t>(loops.size()));
  for (const Loop &loop : loops) {
    writer.word(loop.axes);
    writer.word(loop.extent);
    writer.word(loop.src_table);
    writer.word(loop.src_stride);
    writer.word(loop.dst_table);
    writer.word(loop.dst_stride);
  }
}

}  // namespace

Plan read_plan(const int64_t *words) {
  Reader reader(words);
  Plan plan;
  plan.unit = reader.word();
  const int64_t nests = reader.count(kMostParts);
  plan.nests.reserve(static_cast<size_t>(nests));
  for (int64_t k = 0; k < nests; k++) plan.nests.push_back(read_nest(reader));
  plan.src_anywhere = reader.word() != 0;
  plan.dst_anywhere = reader.word() != 0;
  return plan;
}

void write_plan(const Plan &plan, Writer &writer) {
  writer.word(plan.unit);
  writer.word(static_cast<int64_t>(plan.nests.size()));
  for (const Nest &nest : plan.nests) {
    write_side(nest.src, writer);
    write_side(nest.dst, writer);
    write_loops(nest.loops, writer);
    writer.word(nest.run);
    writer.word(nest.vector);
  }
  writer.word(plan.src_anywhere);
  writer.word(plan.dst_anywhere);
}

}  // namespace portakv
