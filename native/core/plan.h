// SPDX-License-Identifier: Apache-2.0
// The plan of a copy between two forms, before any address or id is known.
//
// A plan is one nest of loops, or one for each kv if they differ: units x strided loops x one
// contiguous run. The structs mirror the dataclasses of portakv/plan/plan.py.
#ifndef PORTAKV_PLAN_H
#define PORTAKV_PLAN_H

#include <cstdint>
#include <vector>

#include "few.h"
#include "form.h"

namespace portakv {

using StepList = Few<Step, 4>;

// The location of the units of one side. Words: table, offset, steps of a unit's number.
//
// The number of a unit walks through `units`, outermost (unbounded) first: n % extent from the
// innermost on, as in positional notation.
struct Side {
  int64_t table;
  int64_t offset;
  StepList units;
};

// Steps that both sides take together. Words: the six members in their order.
//
// `axes` names the axes that were merged into the loop: base-8 digits of `Axis`, the outermost axis
// in the most significant digit.
struct Loop {
  int64_t axes;
  int64_t extent;
  int64_t src_table;
  int64_t src_stride;
  int64_t dst_table;
  int64_t dst_stride;

  // Return true if a side looks its address up for each step.
  bool tabled() const { return src_table != 0 || dst_table != 0; }
};

inline bool operator==(const Loop &a, const Loop &b) {
  return a.axes == b.axes && a.extent == b.extent && a.src_table == b.src_table &&
         a.src_stride == b.src_stride && a.dst_table == b.dst_table &&
         a.dst_stride == b.dst_stride;
}

using LoopList = Few<Loop, 6>;

// One nest. Words: src side, dst side, a count of loops and the loops, run, vector.
//
// Loops are in their order from the outermost one on. `vector` is the widest access in bytes that
// everything in the nest allows.
struct Nest {
  Side src;
  Side dst;
  LoopList loops;
  int64_t run;
  int64_t vector;
};

// Words: unit, a count of nests and the nests, vector, run, runs, bytes, then 1 or 0 for each side:
// src_anywhere, dst_anywhere.
struct Plan {
  int64_t unit;  // tokens moved for each index read
  std::vector<Nest> nests;
  int64_t vector;  // the least of the nests
  int64_t run;     // bytes of the shortest run of the nests
  int64_t runs;    // of one unit, in all nests
  int64_t bytes;   // of one unit, in all nests
  // True if a side may begin between two units: it has no ids, and one stride from one address.
  bool src_anywhere;
  bool dst_anywhere;
};

// One nest of a copy that packs or unpacks planes. Words: src side, dst side, a count of loops and
// the loops, steps of tokens, steps of dim, raw_vector, packed_vector.
//
// `tokens` are the steps of the raw side through the tokens of a plane, and `dim` those through the
// bytes of a token. The vectors are the widest access of each side in bytes.
struct PackNest {
  Side src;
  Side dst;
  LoopList loops;
  StepList tokens;
  StepList dim;
  int64_t raw_vector;
  int64_t packed_vector;
};

// Words: unit, 1 if it packs and 0 if it unpacks, a count of nests and the nests.
struct PackPlan {
  int64_t unit;  // tokens of a block
  bool packs;
  std::vector<PackNest> nests;
};

// Why there is no plan: a code of core.h, and the values of its sentence.
struct Refusal {
  int64_t code = 0;
  std::vector<int64_t> values;
};

// Plan a copy; return false with the refusal if there is no plan. Raise `Malformed`.
//
// `src_step` and `dst_step` are the tokens for each id, 0 for a side without ids. `unit` is the
// tokens moved together, 0 for the most that both sides allow.
bool make_plan(const Form &src, const Form &dst, int64_t src_step, int64_t dst_step, int64_t unit,
               Plan &plan, Refusal &refusal);

// Plan a copy that packs (raw to packed) or unpacks blocks; as `make_plan`. `equal_planes`: all kv
// have one geometry of their packed planes.
bool make_pack_plan(const Form &raw, const Form &packed, bool packs, bool equal_planes,
                    PackPlan &plan, Refusal &refusal);

// Read a plan from its words; raise `Malformed`.
Plan read_plan(const int64_t *words);
PackPlan read_pack_plan(const int64_t *words);

void write_plan(const Plan &plan, Writer &writer);

}  // namespace portakv

#endif
