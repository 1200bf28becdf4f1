// SPDX-License-Identifier: Apache-2.0
// Picks the transfer strategy of a copy by its costs, or by a rule if nothing was measured.
//
// `portakv/interconnect/choose.py` has the figures of the rules, with their origin, and the sentences
// of the reasons.
#ifndef PORTAKV_PICK_H
#define PORTAKV_PICK_H

#include <cstdint>

#include "pieces.h"

namespace portakv {

// The strategies, the gentlest to a running model first: of equal costs the first one wins. Sets of
// strategies are bits by these numbers.
enum Strategy { kStaged, kBatchedMemcpy, kZeroCopy, kPageable, kStrategies };

// Bytes of a copy and the pieces that they lie in, as a strategy moves them.
struct Shape {
  int64_t nbytes;
  int64_t runs;    // contiguous, with neighbours merged
  int64_t pieces;  // as the host describes them

  // Return the average bytes of a run.
  int64_t run_bytes() const;
};

// What picks depend on besides the copies: a direction, a caller's terms, and the figures of the
// rules. Bytes and flags come first, then seconds, bytes of a second, and parts.
struct PickRules {
  int64_t idle;         // 1: nothing hides the host's time
  int64_t detached;     // 1: no stream of the caller waits for the end
  int64_t limited;      // 1: the terms limit the kernel
  int64_t kernel_most;  // the most bytes that a kernel moves while a model runs
  int64_t rule_most;    // the same in the default rule
  int64_t short_most;   // the most bytes of a short copy
  int64_t page;
  int64_t wide;
  int64_t even;
  int64_t narrow;
  double equal;
  double part;
  double short_part;
  double new_calls;  // a call with new ids takes that many times the measured seconds of the host
  double long_seconds;
  double engine_call;
  double kernel_call;
  double engine_rate;
  double kernel_rate;
  double alone_rate;
  double row;
};

static_assert(sizeof(PickRules) == 21 * sizeof(int64_t), "rules are words");

// The copies of one plan. The plans stay as long as the caller uses this.
struct PickedCopies {
  int64_t plan;       // the words of the plan
  int64_t host_plan;  // between the host's memory and dense rows in its order
  int64_t unit;       // tokens that the plan moves together
  int64_t token_bytes;
  int64_t runs_per_unit;
  Limits limits;  // of folding
  PickRules rules;
};

// Why a strategy was picked. `portakv_pick` of core.h has the bits of an answer.
enum PickReason {
  kExcludedAlone,   // no other strategy takes the copy, though the terms exclude this one
  kWaitless,        // no other strategy starts without a wait
  kLeft,            // no other strategy is left
  kMeasured,        // the least time
  kGentlest,        // nothing was measured, and the strategy of the default rule is not left
  kRulePages,       // the default rule: runs are pages
  kRuleSmall,       // the copy is small
  kRuleNarrow,      // runs on the host are narrow
  kRuleWide,        // runs are wide
  kRuleEven,        // runs would not become longer
  kRuleGathered     // runs become longer
};

// Return the answer for a copy, or PORTAKV_PICK_NONE.
//
// costs    the measurements of the direction: for each strategy the number of columns, then for each
//          its bytes of a run, the number of points, and their runs, seconds, and seconds of the host.
//          All rise.
// shapes   of each strategy; with runs below 0: it does not move the copy
// out      strategies that do not take the copy
// waits    strategies that would wait for what only the device knows
// new_ids  no copy has used the lists of ids before
int64_t pick(const PickRules &rules, const double *costs, const Shape (&shapes)[kStrategies],
             int64_t out, int64_t waits, bool new_ids);

// Return the answer for so many tokens in groups; see `portakv_runs_groups`.
//
// groups       on both sides together
// host_groups  on the host's side
int64_t pick(const PickedCopies &copies, const double *costs, int64_t groups, int64_t host_groups,
             int64_t count, int64_t out, int64_t waits, bool new_ids);

}  // namespace portakv

#endif
