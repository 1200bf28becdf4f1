// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "core.h"
#include "guarded.h"

namespace portakv {

namespace {

constexpr int64_t kMostLoops = 4096;  // of one nest that is read
constexpr int kMostAxes = 21;         // base-8 digits in a word

uint64_t magnitude(int64_t number) {
  const uint64_t bits = static_cast<uint64_t>(number);
  return number < 0 ? 0 - bits : bits;
}

// Return the greatest common divisor; 0 divides by anything.
int64_t common_divisor(int64_t a, int64_t b) {
  uint64_t x = magnitude(a);
  uint64_t y = magnitude(b);
  while (y != 0) {
    const uint64_t rest = x % y;
    x = y;
    y = rest;
  }
  return static_cast<int64_t>(x);
}

// Collects numbers; `widest` is the largest power of two up to 16 that divides all of them.
class Divisible {
 public:
  void by(int64_t number) { bits_ |= static_cast<uint64_t>(number); }
  void strides(const Steps &steps) {
    for (const Step &step : steps) by(step.stride);
  }
  int64_t widest() const { return static_cast<int64_t>(bits_ & (0 - bits_)); }

 private:
  uint64_t bits_ = 16;
};

// --- Chains: the steps of a slot number -------------------------------------------------------

using Chain = StepList;

// Append a step; join it with the step before it if both form one.
void append_merged(Chain &chain, const Step &step) {
  if (!chain.empty()) {
    Step &last = chain.back();
    const bool goes_on = last.table == product(step.extent, step.table) &&
                         last.stride == product(step.extent, step.stride);
    if (goes_on) {
      last = Step{product(last.extent, step.extent), step.table, step.stride};
      return;
    }
  }
  if (step.extent != 1) chain.push_back(step);
}

// Return the steps of a slot number: blocks, then the token in its block.
Chain slot_chain(const Form &form, const Part &part) {
  const Steps &block = part.axis(kBlock);
  const Steps &token = part.axis(kToken);
  Chain chain;
  if (form.opaque) {
    // Tokens of an opaque page have no separate place.
    chain.append(block.begin(), block.count);
    if (form.block_size > 1) chain.push_back(Step{form.block_size, 0, 0});
  } else {
    for (const Step &step : block) append_merged(chain, step);
    for (const Step &step : token) append_merged(chain, step);
  }
  if (chain.empty()) throw Malformed("a form has neither blocks nor tokens");
  return chain;
}

// Return the chains of the first parts of a form.
std::vector<Chain> slot_chains(const Form &form, size_t count) {
  std::vector<Chain> chains;
  chains.reserve(count);
  for (size_t k = 0; k < count; k++) chains.push_back(slot_chain(form, form.parts[k]));
  return chains;
}

// Split a chain into the steps of a unit's number, and the steps of the tokens inside a unit.
bool split_chain(const Chain &chain, int64_t unit, StepList &outer, StepList &inner,
                 Refusal &refusal) {
  for (const Step *step = chain.end(); step-- != chain.begin();) {
    if (unit == 1) {
      outer.push_back(*step);
    } else if (step->extent != 0 && unit % step->extent == 0) {
      inner.push_back(*step);
      unit /= step->extent;
    } else if (step->extent % unit == 0) {
      inner.push_back(Step{unit, step->table, step->stride});
      outer.push_back(Step{step->extent / unit, product(step->table, unit),
                           product(step->stride, unit)});
      unit = 1;
    } else {
      refusal.code = PORTAKV_PLAN_NO_FACTOR;
      refusal.values = {unit, step->extent};
      return false;
    }
  }
  std::reverse(outer.begin(), outer.end());
  std::reverse(inner.begin(), inner.end());
  return true;
}

// Return true if a side may begin between two units: it has no ids, and its tokens lie at one
// stride from one address.
bool begins_anywhere(const Chain &chain, int64_t step) {
  return step == 0 && chain.size() == 1 && chain[0].table == 0;
}

bool all_begin_anywhere(const std::vector<Chain> &chains, int64_t step) {
  return std::all_of(chains.begin(), chains.end(),
                     [step](const Chain &chain) { return begins_anywhere(chain, step); });
}

// Return the tokens of a block, or the greatest common divisor of several; 0 without blocks.
// A unit of opaque pages is one page, also where a page is one token.
int64_t block_tokens(const Form &form, const std::vector<Chain> &chains) {
  if (form.opaque) return form.block_size;
  int64_t result = 0;
  for (const Chain &chain : chains) {
    if (chain.size() < 2) continue;
    int64_t tokens = 1;
    for (size_t i = 1; i < chain.size(); i++) tokens = product(tokens, chain[i].extent);
    result = common_divisor(result, tokens);
  }
  return result;
}

// --- Loops ------------------------------------------------------------------------------------

// Takes positions from the steps of an axis, from the innermost step outwards.
class Cursor {
 public:
  explicit Cursor(const Steps &steps) : steps_(steps), left_(steps.count) { next(); }

  bool done() const { return done_; }
  const Step &step() const { return step_; }

  void take(int64_t extent) {
    if (step_.extent > extent) {
      step_ = Step{step_.extent / extent, product(step_.table, extent),
                   product(step_.stride, extent)};
    } else {
      next();
    }
  }

 private:
  // Go on to the next step that is longer than 1.
  void next() {
    do {
      done_ = left_ == 0;
      if (done_) return;
      step_ = steps_[--left_];
    } while (step_.extent == 1);
  }

  Steps steps_;
  size_t left_;
  bool done_ = false;
  Step step_{1, 0, 0};
};

void refuse_axis(Axis axis, const Steps &src, const Steps &dst, Refusal &refusal) {
  refusal.code = PORTAKV_PLAN_NO_REFINEMENT;
  refusal.values = {axis, static_cast<int64_t>(src.count), static_cast<int64_t>(dst.count)};
  for (const Step &step : src) refusal.values.push_back(step.extent);
  for (const Step &step : dst) refusal.values.push_back(step.extent);
}

// Append the loops of one axis, outermost first: the coarsest factors common to both sides.
bool refine(Axis axis, const Steps &src, const Steps &dst, LoopList &loops,
            Refusal &refusal) {
  const size_t begin = loops.size();
  Cursor left(src);
  Cursor right(dst);
  while (!left.done() || !right.done()) {
    if (left.done() || right.done()) throw Malformed("an axis has two extents");
    const Step s = left.step();
    const Step d = right.step();
    const int64_t inner = std::min(s.extent, d.extent);
    const int64_t outer = std::max(s.extent, d.extent);
    if (inner == 0) throw Malformed("an axis without blocks or tokens is unbounded");
    if (outer % inner != 0) {
      refuse_axis(axis, src, dst, refusal);
      return false;
    }
    loops.push_back(Loop{axis, inner, s.table, s.stride, d.table, d.stride});
    left.take(inner);
    right.take(inner);
  }
  std::reverse(loops.begin() + begin, loops.end());
  return true;
}

bool nearer(const Loop &a, const Loop &b) {
  if (a.tabled() != b.tabled()) return b.tabled();
  const uint64_t a_dst = magnitude(a.dst_stride);
  const uint64_t b_dst = magnitude(b.dst_stride);
  if (a_dst != b_dst) return a_dst < b_dst;
  return magnitude(a.src_stride) < magnitude(b.src_stride);
}

// Return true if all steps of `inner` are one step of `outer`, on both sides.
bool continues(const Loop &outer, const Loop &inner) {
  return outer.dst_stride == product(inner.extent, inner.dst_stride) &&
         outer.src_stride == product(inner.extent, inner.src_stride) &&
         outer.src_table == product(inner.extent, inner.src_table) &&
         outer.dst_table == product(inner.extent, inner.dst_table);
}

int digits(int64_t axes) {
  int count = 0;
  for (; axes != 0; axes >>= 3) count++;
  return count;
}

int64_t joined_axes(int64_t outer, int64_t inner) {
  if (outer == inner) return inner;
  const int below = digits(inner);
  if (below + digits(outer) > kMostAxes) throw Malformed("a loop merges too many axes");
  return outer << (3 * below) | inner;
}

// Merge loops that are contiguous on both sides, whatever their order; sort outermost first.
void merge_loops(LoopList &loops) {
  // Insertion keeps the order of equal loops, and needs no second buffer for the few there are.
  for (Loop *loop = loops.begin(); loop != loops.end(); ++loop) {
    std::rotate(std::upper_bound(loops.begin(), loop, *loop, nearer), loop, loop + 1);
  }
  for (size_t i = 0; i < loops.size();) {
    Loop &inner = loops[i];
    Loop *const outer = std::find_if(&inner + 1, loops.end(), [&inner](const Loop &loop) {
      return continues(loop, inner);
    });
    if (outer == loops.end()) {
      i++;
      continue;
    }
    inner.axes = joined_axes(outer->axes, inner.axes);
    inner.extent = product(outer->extent, inner.extent);
    loops.erase(outer, outer + 1);
  }
  std::reverse(loops.begin(), loops.end());
}

// --- Nests ------------------------------------------------------------------------------------

// Return the step from the origins of one kv on both sides to those of the next one, as a loop.
template <typename Origin>
Loop step_between(const Origin &src, const Origin &dst, const Origin &next_src,
                  const Origin &next_dst, int64_t extent) {
  return Loop{kKv,
              extent,
              difference(next_src.table, src.table),
              difference(next_src.offset, src.offset),
              difference(next_dst.table, dst.table),
              difference(next_dst.offset, dst.offset)};
}

template <typename AnyNest>
Loop step_between(const AnyNest &nest, const AnyNest &next, int64_t extent) {
  return step_between(nest.src, nest.dst, next.src, next.dst, extent);
}

// Return true if all kv have the shape of the first, and differ by equal distances.
template <typename AnyNest, typename Alike>
bool evenly_apart(const std::vector<AnyNest> &nests, Alike alike) {
  const int64_t extent = static_cast<int64_t>(nests.size());
  for (size_t k = 1; k < nests.size(); k++) {
    if (!alike(nests[0], nests[k])) return false;
    const Loop step = step_between(nests[k - 1], nests[k], extent);
    if (!(step == step_between(nests[0], nests[1], extent))) return false;
  }
  return true;
}

// Replace nests that differ by equal distances alone by the first, with a loop over kv.
template <typename AnyNest, typename Alike>
void join(std::vector<AnyNest> &nests, Alike alike) {
  if (nests.size() < 2 || !evenly_apart(nests, alike)) return;
  const int64_t extent = static_cast<int64_t>(nests.size());
  nests[0].loops.push_back(step_between(nests[0], nests[1], extent));
  nests.erase(nests.begin() + 1, nests.end());
}

template <typename AnyNest>
bool same_shape(const AnyNest &a, const AnyNest &b) {
  return std::equal(a.loops.begin(), a.loops.end(), b.loops.begin(), b.loops.end()) && Steps(a.src.units) == Steps(b.src.units) &&
         Steps(a.dst.units) == Steps(b.dst.units);
}

// Return true if all parts of both forms differ by their origins alone, by equal distances: they
// have one nest. Then `step` is the loop over kv.
bool one_nest(const Form &src, const Form &dst, Loop &step) {
  const size_t count = src.parts.size();
  for (size_t k = 1; k < count; k++) {
    for (size_t axis = 0; axis < std::size(src.parts[k].axes); axis++) {
      if (!(src.parts[k].axes[axis] == src.parts[0].axes[axis])) return false;
      if (!(dst.parts[k].axes[axis] == dst.parts[0].axes[axis])) return false;
    }
    const Loop next = step_between(src.parts[k - 1], dst.parts[k - 1], src.parts[k], dst.parts[k],
                                   static_cast<int64_t>(count));
    if (k == 1) step = next;
    if (!(next == step)) return false;
  }
  return count > 1;
}

// Merge the loops of a nest, take its run out of them, and narrow its vector.
void close(Nest &nest) {
  merge_loops(nest.loops);
  nest.run = 1;
  const auto contiguous = [&nest](const Loop &loop) {
    const bool taken = loop.src_stride == 1 && loop.dst_stride == 1 && !loop.tabled();
    if (taken) nest.run = loop.extent;
    return taken;
  };
  nest.loops.erase(std::remove_if(nest.loops.begin(), nest.loops.end(), contiguous),
                   nest.loops.end());

  Divisible divisible;
  divisible.by(nest.vector);
  divisible.by(nest.run);
  divisible.by(nest.src.offset);
  divisible.by(nest.dst.offset);
  for (const Loop &loop : nest.loops) {
    divisible.by(loop.src_stride);
    divisible.by(loop.dst_stride);
  }
  divisible.strides(nest.src.units);
  divisible.strides(nest.dst.units);
  nest.vector = divisible.widest();
}

// Both sides of a plan. Chains: the steps of the slot numbers of each part that has a nest.
struct Sides {
  const Form &src;
  const Form &dst;
  const Loop *over_kv;  // the step from each part to the next one, if the first has the only nest
  std::vector<Chain> src_chains;
  std::vector<Chain> dst_chains;
  int64_t src_step;
  int64_t dst_step;
};

// Make the nest of one kv before its loops are merged. Its vector divides every place where a side
// may begin.
bool make_nest(const Sides &sides, size_t k, int64_t unit, Nest &nest, Refusal &refusal) {
  const Part &src = sides.src.parts[k];
  const Part &dst = sides.dst.parts[k];
  const Chain &src_chain = sides.src_chains[k];
  const Chain &dst_chain = sides.dst_chains[k];
  nest.src.table = src.table;
  nest.src.offset = src.offset;
  nest.dst.table = dst.table;
  nest.dst.offset = dst.offset;

  StepList src_tokens;
  StepList dst_tokens;
  if (!split_chain(src_chain, unit, nest.src.units, src_tokens, refusal)) return false;
  if (!split_chain(dst_chain, unit, nest.dst.units, dst_tokens, refusal)) return false;

  for (const Axis axis : {kLayer, kHead, kDim}) {
    if (!refine(axis, src.axis(axis), dst.axis(axis), nest.loops, refusal)) return false;
  }
  if (!sides.src.opaque && !refine(kToken, src_tokens, dst_tokens, nest.loops, refusal)) {
    return false;
  }

  nest.vector = common_divisor(sides.src.alignment, sides.dst.alignment);
  if (begins_anywhere(src_chain, sides.src_step)) {
    nest.vector = common_divisor(nest.vector, src_chain[0].stride);
  }
  if (begins_anywhere(dst_chain, sides.dst_step)) {
    nest.vector = common_divisor(nest.vector, dst_chain[0].stride);
  }
  return true;
}

// Fill in what holds for all nests together.
void sum_up(Plan &plan) {
  plan.vector = plan.nests.empty() ? 0 : plan.nests[0].vector;
  plan.run = plan.nests.empty() ? 0 : plan.nests[0].run;
  plan.runs = 0;
  plan.bytes = 0;
  for (const Nest &nest : plan.nests) {
    int64_t runs = 1;
    for (const Loop &loop : nest.loops) runs = product(runs, loop.extent);
    plan.vector = std::min(plan.vector, nest.vector);
    plan.run = std::min(plan.run, nest.run);
    plan.runs = sum(plan.runs, runs);
    plan.bytes = sum(plan.bytes, product(runs, nest.run));
  }
}

// Plan with one unit.
bool fit(const Sides &sides, int64_t unit, Plan &plan, Refusal &refusal) {
  if (sides.src.opaque && unit % sides.src.block_size != 0) return false;
  plan.unit = unit;
  plan.nests.clear();
  plan.nests.resize(sides.src_chains.size());
  for (size_t k = 0; k < plan.nests.size(); k++) {
    if (!make_nest(sides, k, unit, plan.nests[k], refusal)) return false;
  }
  if (sides.over_kv != nullptr) {
    plan.nests[0].loops.push_back(*sides.over_kv);
  } else {
    join(plan.nests, same_shape<Nest>);
  }
  for (Nest &nest : plan.nests) close(nest);
  sum_up(plan);
  return true;
}

// Plan with the largest divisor of `most` that every part takes.
bool fit_most(const Sides &sides, int64_t most, Plan &plan, Refusal &refusal) {
  int64_t below = 1;
  for (; below <= most / below; below++) {
    if (most % below == 0 && fit(sides, most / below, plan, refusal)) return true;
  }
  // The divisors from the square root on are done; these are their counterparts.
  while (--below > 0) {
    const bool tried = most / below == below;
    if (most % below == 0 && !tried && fit(sides, below, plan, refusal)) return true;
  }
  return false;
}

// Return true if rows of both forms hold the same: kv, layers, heads, and bytes of each row.
bool alike(const Form &src, const Form &dst) {
  if (src.parts.size() != dst.parts.size()) return false;
  if (src.layers != dst.layers || src.heads != dst.heads || src.opaque != dst.opaque) return false;
  if (src.opaque && src.block_size != dst.block_size) return false;
  return std::equal(src.widths, src.widths + src.parts.size(), dst.widths);
}

bool refuse(Refusal &refusal, int64_t code, std::vector<int64_t> values = {}) {
  refusal.code = code;
  refusal.values = std::move(values);
  return false;
}

// --- Copies that pack or unpack ---------------------------------------------------------------

// Return the widest access of one side whose innermost run has so many bytes.
Divisible access(const Form &form, const Side &side, int64_t run) {
  Divisible result;
  result.by(form.alignment);
  result.by(run);
  result.by(side.offset);
  result.strides(side.units);
  return result;
}

int64_t raw_vector(const Form &form, const Part &part, const Side &side, const Steps &tokens) {
  const Steps &dim = part.axis(kDim);
  if (dim.count == 0) throw Malformed("a row has no bytes");
  Divisible result = access(form, side, dim[dim.count - 1].extent);
  result.strides(part.axis(kLayer));
  result.strides(part.axis(kHead));
  result.strides(tokens);
  result.strides(Steps(dim.first, dim.count - 1));
  return result.widest();
}

int64_t packed_vector(const Form &form, const Part &part, const Side &side) {
  Divisible result = access(form, side, 16);
  result.strides(part.axis(kLayer));
  result.strides(part.axis(kHead));
  return result.widest();
}

// Make the nest of one kv before its loops are merged.
bool make_pack_nest(const Form &raw, const Form &packed, bool packs, size_t k, PackNest &nest,
                    Refusal &refusal) {
  const Part &raw_part = raw.parts[k];
  const Part &packed_part = packed.parts[k];
  Side raw_side{raw_part.table, raw_part.offset, {}};
  const Chain chain = slot_chain(raw, raw_part);
  if (!split_chain(chain, packed.block_size, raw_side.units, nest.tokens, refusal)) return false;
  const Steps &dim = raw_part.axis(kDim);
  nest.dim.append(dim.begin(), dim.count);
  const Steps &blocks = packed_part.axis(kBlock);
  Side packed_side{packed_part.table, packed_part.offset, {blocks.begin(), blocks.end()}};

  const Part &src = packs ? raw_part : packed_part;
  const Part &dst = packs ? packed_part : raw_part;
  for (const Axis axis : {kLayer, kHead}) {
    if (!refine(axis, src.axis(axis), dst.axis(axis), nest.loops, refusal)) return false;
  }
  nest.raw_vector = raw_vector(raw, raw_part, raw_side, nest.tokens);
  nest.packed_vector = packed_vector(packed, packed_part, packed_side);
  nest.src = std::move(packs ? raw_side : packed_side);
  nest.dst = std::move(packs ? packed_side : raw_side);
  return true;
}

// --- Words ------------------------------------------------------------------------------------

StepList read_steps(Reader &reader, int64_t most) {
  const Steps steps = reader.steps(most);
  return {steps.begin(), steps.end()};
}

Side read_side(Reader &reader) {
  Side side;
  side.table = reader.word();
  side.offset = reader.word();
  side.units = read_steps(reader, 2 * kMostSteps);
  return side;
}

LoopList read_loops(Reader &reader) {
  LoopList loops;
  loops.resize(static_cast<size_t>(reader.count(kMostLoops)));
  for (Loop &loop : loops) {
    loop.axes = reader.word();
    loop.extent = reader.word();
    loop.src_table = reader.word();
    loop.src_stride = reader.word();
    loop.dst_table = reader.word();
    loop.dst_stride = reader.word();
  }
  return loops;
}

Nest read_nest(Reader &reader) {
  Nest nest;
  nest.src = read_side(reader);
  nest.dst = read_side(reader);
  nest.loops = read_loops(reader);
  nest.run = reader.word();
  nest.vector = reader.word();
  return nest;
}

PackNest read_pack_nest(Reader &reader) {
  PackNest nest;
  nest.src = read_side(reader);
  nest.dst = read_side(reader);
  nest.loops = read_loops(reader);
  nest.tokens = read_steps(reader, 2 * kMostSteps);
  nest.dim = read_steps(reader, kMostSteps);
  nest.raw_vector = reader.word();
  nest.packed_vector = reader.word();
  return nest;
}

void write_side(const Side &side, Writer &writer) {
  writer.word(side.table);
  writer.word(side.offset);
  writer.steps(side.units);
}

void write_loops(const LoopList &loops, Writer &writer) {
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

int64_t write_refusal(const Refusal &refusal, int64_t *out, int64_t capacity) {
  Writer writer(out, capacity);
  for (const int64_t value : refusal.values) writer.word(value);
  return refusal.code;
}

}  // namespace

bool make_plan(const Form &src, const Form &dst, int64_t src_step, int64_t dst_step, int64_t unit,
               Plan &plan, Refusal &refusal) {
  if (!alike(src, dst)) return refuse(refusal, PORTAKV_PLAN_UNLIKE);
  if (src.opaque && src.block_size < 1) throw Malformed("opaque pages have no tokens");
  Loop over_kv{};
  const bool one = one_nest(src, dst, over_kv);
  const size_t count = one ? 1 : src.parts.size();
  const Sides sides{src,
                    dst,
                    one ? &over_kv : nullptr,
                    slot_chains(src, count),
                    slot_chains(dst, count),
                    src_step,
                    dst_step};

  // 0 if any number of tokens can be moved together.
  int64_t most = common_divisor(src_step, dst_step);
  most = common_divisor(most, block_tokens(src, sides.src_chains));
  most = common_divisor(most, block_tokens(dst, sides.dst_chains));
  if (unit < 0 || (unit > 0 && most % unit != 0)) return refuse(refusal, PORTAKV_PLAN_UNIT, {most});

  plan.src_anywhere = all_begin_anywhere(sides.src_chains, src_step);
  plan.dst_anywhere = all_begin_anywhere(sides.dst_chains, dst_step);
  refusal.code = PORTAKV_PLAN_PAGES;
  if (unit > 0) return fit(sides, unit, plan, refusal);
  return fit_most(sides, most == 0 ? 1 : most, plan, refusal);
}

bool make_pack_plan(const Form &raw, const Form &packed, bool packs, bool equal_planes,
                    PackPlan &plan, Refusal &refusal) {
  if (raw.parts.size() != packed.parts.size()) return refuse(refusal, PORTAKV_PLAN_UNLIKE);
  if (packed.block_size < 1) throw Malformed("packed rows have no blocks");
  plan.unit = packed.block_size;
  plan.packs = packs;
  std::vector<PackNest> &nests = plan.nests;
  nests.resize(raw.parts.size());
  for (size_t k = 0; k < nests.size(); k++) {
    if (!make_pack_nest(raw, packed, packs, k, nests[k], refusal)) return false;
  }

  PackNest narrowest = nests.empty() ? PackNest() : nests[0];
  for (const PackNest &nest : nests) {
    narrowest.raw_vector = std::min(narrowest.raw_vector, nest.raw_vector);
    narrowest.packed_vector = std::min(narrowest.packed_vector, nest.packed_vector);
  }
  join(nests, [equal_planes](const PackNest &a, const PackNest &b) {
    return equal_planes && same_shape(a, b) && Steps(a.tokens) == Steps(b.tokens) &&
           Steps(a.dim) == Steps(b.dim);
  });
  if (nests.size() == 1) {
    nests[0].raw_vector = narrowest.raw_vector;
    nests[0].packed_vector = narrowest.packed_vector;
  }
  for (PackNest &nest : nests) merge_loops(nest.loops);
  return true;
}

Plan read_plan(const int64_t *words) {
  Reader reader(words);
  Plan plan;
  plan.unit = reader.word();
  const int64_t nests = reader.count(kMostParts);
  plan.nests.reserve(static_cast<size_t>(nests));
  for (int64_t k = 0; k < nests; k++) plan.nests.push_back(read_nest(reader));
  plan.vector = reader.word();
  plan.run = reader.word();
  plan.runs = reader.word();
  plan.bytes = reader.word();
  plan.src_anywhere = reader.word() != 0;
  plan.dst_anywhere = reader.word() != 0;
  return plan;
}

PackPlan read_pack_plan(const int64_t *words) {
  Reader reader(words);
  PackPlan plan;
  plan.unit = reader.word();
  plan.packs = reader.word() != 0;
  const int64_t nests = reader.count(kMostParts);
  plan.nests.reserve(static_cast<size_t>(nests));
  for (int64_t k = 0; k < nests; k++) plan.nests.push_back(read_pack_nest(reader));
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
  writer.word(plan.vector);
  writer.word(plan.run);
  writer.word(plan.runs);
  writer.word(plan.bytes);
  writer.word(plan.src_anywhere);
  writer.word(plan.dst_anywhere);
}

}  // namespace portakv

using namespace portakv;

int64_t portakv_plan_make(const int64_t *src, const int64_t *dst, int64_t src_step,
                          int64_t dst_step, int64_t unit, int64_t *out, int64_t capacity) {
  return guarded([&]() -> int64_t {
    Plan plan;
    Refusal refusal;
    if (!make_plan(read_form(src), read_form(dst), src_step, dst_step, unit, plan, refusal)) {
      return write_refusal(refusal, out, capacity);
    }
    Writer writer(out, capacity);
    write_plan(plan, writer);
    return writer.count();
  });
}

int64_t portakv_plan_pack(const int64_t *raw, const int64_t *packed, int packs, int equal_planes,
                          int64_t *out, int64_t capacity) {
  return guarded([&]() -> int64_t {
    PackPlan plan;
    Refusal refusal;
    if (!make_pack_plan(read_form(raw), read_form(packed), packs != 0, equal_planes != 0, plan,
                        refusal)) {
      return write_refusal(refusal, out, capacity);
    }
    Writer writer(out, capacity);
    writer.word(plan.unit);
    writer.word(plan.packs);
    writer.word(static_cast<int64_t>(plan.nests.size()));
    for (const PackNest &nest : plan.nests) {
      write_side(nest.src, writer);
      write_side(nest.dst, writer);
      write_loops(nest.loops, writer);
      writer.steps(nest.tokens);
      writer.steps(nest.dim);
      writer.word(nest.raw_vector);
      writer.word(nest.packed_vector);
    }
    return writer.count();
  });
}
