// SPDX-License-Identifier: Apache-2.0
// The link between a device and the host: the schedule of a copy in slices, and CUDA's driver, to
// which slices and their pieces are submitted.
#ifndef PORTAKV_LINK_H
#define PORTAKV_LINK_H

#include <cstdint>
#include <initializer_list>

#include "core.h"
#include "pieces.h"

namespace portakv {

// --- The schedule -----------------------------------------------------------------------------
//
// A copy crosses in slices. Each has two stages: the device's, between its rows and dense rows in a
// buffer, and the link's, between that buffer and the host's rows. This is the one description of
// who waits for what. Two executors follow it: `portakv_link_rows`, by CUDA's driver and the kernels
// that copy rows, and `Passage` of portakv/interconnect/slices.py, by the torch of any device.

// Words: the members in their order.
struct SliceOrder {
  int64_t slices;
  int64_t buffers;   // used in turns
  int64_t first;     // the buffer of the first slice
  int64_t used;      // bit n: the event of buffer n marks a use by an earlier copy
  int64_t downward;  // 1: from the device to the host, so that the device's stage comes first
  int64_t alone;     // 1: all is ordered on the stream of the copy
  int64_t detached;  // 1: later copies do not wait for the end of this one
};

enum StepKind : int64_t {
  kWait = 0,    // the stream waits for the event `number`
  kRecord = 1,  // the event `number` marks the present work of the stream
  kStage = 2,   // the device's stage of slice `number`, on the stream
  kCross = 3    // the link's stage of slice `number`, on the stream
};

enum StreamOf : int64_t {
  kWork = 0,   // the copy's stream, which waits for its end
  kHalf = 1,   // of the device's stages
  kLink = 2,   // of the slices that cross
  kBefore = 3  // whose present work comes before the copy
};

// Words: the members in their order.
struct ScheduleStep {
  StepKind kind;
  StreamOf stream;
  int64_t number;
};

// Events: the last use of each buffer by its number, then these.
enum EventOf : int64_t { kBegun = 0, kHanded = 1, kEnded = 2, kEvents = 3 };

inline int64_t buffer_of(const SliceOrder &order, int64_t slice) {
  return (order.first + slice) % order.buffers;
}

// Pass the steps before the first slice to `out`.
template <class Out>
void first_steps(const SliceOrder &order, Out &&out) {
  if (order.alone != 0) return;
  // The other stream waits for this one before each slice.
  const int64_t begun = order.buffers + kBegun;
  out(ScheduleStep{kRecord, kBefore, begun});
  out(ScheduleStep{kWait, order.downward != 0 ? kHalf : kLink, begun});
}

// Pass the steps of a slice to `out`.
template <class Out>
void slice_steps(const SliceOrder &order, int64_t slice, Out &&out) {
  const bool down = order.downward != 0;
  const bool alone = order.alone != 0;
  const StepKind stages[2] = {down ? kStage : kCross, down ? kCross : kStage};
  const StreamOf streams[2] = {alone ? kWork : down ? kHalf : kLink,
                               alone ? kWork : down ? kLink : kHalf};
  const int64_t buffer = buffer_of(order, slice);
  const bool before = slice >= order.buffers || ((order.used >> buffer) & 1) != 0;
  // On one stream its own order suffices.
  if (before && !alone) out(ScheduleStep{kWait, streams[0], buffer});
  out(ScheduleStep{stages[0], streams[0], slice});
  if (!alone) {
    out(ScheduleStep{kRecord, streams[0], order.buffers + kHanded});
    out(ScheduleStep{kWait, streams[1], order.buffers + kHanded});
  }
  out(ScheduleStep{stages[1], streams[1], slice});
  // The next copy waits for the stream of this one, unless it is detached.
  const bool after = order.detached != 0 || slice + order.buffers < order.slices;
  if (after && !alone) out(ScheduleStep{kRecord, streams[1], buffer});
}

// Pass the steps after the last slice to `out`.
template <class Out>
void last_steps(const SliceOrder &order, Out &&out) {
  if (order.alone != 0) return;
  // The second stage of the last slice comes after everything else.
  const int64_t ended = order.buffers + kEnded;
  out(ScheduleStep{kRecord, order.downward != 0 ? kLink : kHalf, ended});
  out(ScheduleStep{kWait, kWork, ended});
}

// Pass the steps to `out` that replace all that were left out after one failed: what was submitted
// stays part of the copy's stream, and the slice that failed may still use its buffer.
template <class Out>
void failed_steps(const SliceOrder &order, Out &&out) {
  if (order.alone != 0) return;
  const int64_t ended = order.buffers + kEnded;
  for (const StreamOf stream : {kHalf, kLink}) {
    out(ScheduleStep{kRecord, stream, ended});
    out(ScheduleStep{kWait, kWork, ended});
  }
  if (order.detached == 0) return;
  const int64_t used = order.slices < order.buffers ? order.slices : order.buffers;
  for (int64_t slice = 0; slice < used; slice++) {
    out(ScheduleStep{kRecord, kWork, buffer_of(order, slice)});
  }
}

// --- Crossings --------------------------------------------------------------------------------

// How pieces are submitted; portakv/interconnect/link.py has the reasons. Words: the members.
struct SubmitRules {
  int64_t in_a_row;  // bytes on one stream without a rest
  int64_t first;     // entries of the first of several batches
  int64_t most;      // entries of a batch
  int64_t growth;    // each batch is so many times as long as the batch before it
  int64_t least;     // fewer plain copies are separate calls
};

// A stream that pieces cross on. Words: the members.
struct Crossing {
  int64_t to_device;
  int64_t stream;
  int64_t aside;  // replaces the legacy default stream, which rejects batches
  SubmitRules rules;
};

// --- Copies of rows ---------------------------------------------------------------------------

// Bytes of slices. Words: the members.
struct SliceSizes {
  int64_t whole;     // the most of a copy that is one slice
  int64_t smallest;  // the first slice, if the link is free
  int64_t largest;
  int64_t growth;    // each slice is at most so many times as long as the slice before it
};

// How dense rows lie in a buffer. Words: the members.
struct DenseRows {
  int64_t block;    // tokens of a block; 1 if the rows are not paged
  int64_t quantum;  // every slice but the last is a multiple of so many tokens
  int64_t nbytes;   // of `tokens` tokens
  int64_t tokens;
  int64_t slots;    // tokens of a buffer; 0: as many as the slices need
};

// How a copy is cut into slices. Words: the members.
struct CutRules {
  int64_t downward;  // 1: from the device to the host
  DenseRows dense;
  SliceSizes sizes;
};

// What the copies between two forms have in common. Words: the members.
struct CrossingPlan {
  CutRules cut;
  int64_t kernels;   // of the device's stage: a portakv_kernels; 0: pieces cross without stages
  int64_t stage;     // the words of its plan
  int64_t options;   // and those of its RowsOptions
  int64_t plan;      // of what crosses
  int64_t merged;    // see `PiecesRequest`, for pieces that cross without stages
  Limits limits;
  SubmitRules rules;
};

// Buffers of detached copies, which take them in turns. Words: the members.
struct BufferTurn {
  int64_t first;  // the buffer of the next slice
  int64_t used;   // see `SliceOrder`
};

// The buffers of a stream's copies. Words: the members.
struct StagingBuffers {
  int64_t half;    // the streams of the device's stages, and of the slices that cross
  int64_t link;
  int64_t events;  // pointer to handles: of each buffer, and by `EventOf`
  int64_t memory;  // pointer to the addresses of the buffers
  int64_t number;
  int64_t nbytes;    // of a buffer
  int64_t detached;  // see `SliceOrder`
  int64_t turn;      // pointer to a BufferTurn, which a copy writes if it is detached
};

// The checked sides of a copy between a device and the host. Ids lie in the host's memory; those of
// the device's rows do not if it crosses in slices, for which `rows` alone describes them.
// Words: the members.
struct CheckedCopy {
  Positions src;
  Positions dst;
  int64_t count;
  int64_t src_whole;  // see `PiecesRequest`
  int64_t dst_whole;
  portakv_rows_side rows;  // the device's, as kernels of its stage read them
};
static_assert(sizeof(CheckedCopy) == 25 * sizeof(int64_t), "a copy is words");

// Addresses that no piece crosses; see `PiecesRequest`. Words: the members.
struct Uncrossed {
  int64_t edged;
  Edges registered;
  Edges edges[2];  // of the allocations of the host's rows, or of both sides
};

// One copy. Words: the members.
struct CrossingCopy {
  int64_t plan;     // pointer to a CrossingPlan
  int64_t staging;  // pointer to StagingBuffers
  int64_t copy;     // pointer to a CheckedCopy
  int64_t stream;
  int64_t before;  // the stream whose present work comes before the slices
  int64_t aside;   // see `Crossing`
  int64_t end;    // pointer to a portakv_copy_end whose event is recorded after the copy; 0: none
  Uncrossed uncrossed;
};

}  // namespace portakv

#endif
