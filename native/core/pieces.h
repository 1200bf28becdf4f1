// SPDX-License-Identifier: Apache-2.0
// Pieces: the copies that cross a link. Runs at constant pitches become rows of 2-D copies.
#ifndef PORTAKV_PIECES_H
#define PORTAKV_PIECES_H

#include <cstddef>
#include <cstdint>
#include <vector>

#include "runs.h"

namespace portakv {

// A 2-D copy. A piece of one row is a plain copy, whose pitches are its width.
struct Piece {
  int64_t dst;
  int64_t src;
  int64_t width;
  int64_t height;
  int64_t dst_pitch;
  int64_t src_pitch;
};

// The limits of folding, which the caller has measured. Words: the members in their order.
struct Limits {
  int64_t below;   // rows below this width become a piece if they are `least`, wider rows if `tall`
  int64_t least;   // rows
  int64_t tall;    // rows
  int64_t apart;   // rows of this width stay separate if `below` is not larger
  int64_t large;   // from this many runs on, fold factors before they are multiplied
  int64_t pitch;   // the largest pitch
};

// Addresses that no piece may cross, in any order. Words: the members.
struct Edges {
  int64_t pointer;
  int64_t number;
};

// A request for the pieces of a copy. Words: the members in their order.
struct PiecesRequest {
  Positions src;
  Positions dst;
  int64_t count;
  Limits limits;
  int64_t src_whole;  // all bytes at each address of a side; 0: unknown, or there is one address
  int64_t dst_whole;
  int64_t merged;    // 1: runs that meet where planes end are merged, too
  int64_t edged;     // 1: the edges of allocations are listed; else they are asked for if needed
  Edges registered;  // where two registrations meet
  Edges src_edges;   // where the allocations of a side begin and end
  Edges dst_edges;
};

static_assert(sizeof(PiecesRequest) == 33 * sizeof(int64_t), "a request is words");

// A request has no edges of allocations, and its runs may cross some.
struct NeedsEdges {};

class Columns;

// Write the pieces of a copy; raise `NeedsEdges` and `Outside`.
void write_pieces(const Plan &plan, const PiecesRequest &request, Columns &out);

// How many runs a copy has, with neighbours merged, and about how many pieces.
struct RunCount {
  int64_t runs;
  int64_t pieces;
};

// Count the runs of so many units in groups, in each of which the units follow each other on both
// sides. Nothing is expanded. `limits.below` is 0 if nothing folds.
RunCount count_runs(const Plan &plan, int64_t units, int64_t groups, const Limits &limits);

// Return the addresses of several lists, sorted, each once.
std::vector<int64_t> sorted_edges(const std::vector<Edges> &several);

// Looks up between which of the sorted edges an address lies: its area.
class Areas {
 public:
  explicit Areas(const std::vector<int64_t> &edges) : edges_(edges) {}

  bool none() const { return edges_.empty(); }

  // Return the number of the area of an address; fast if it is the area of the last address.
  size_t of(int64_t address) {
    if (address < begin_ || address >= end_) look_up(address);
    return at_;
  }

  // Return the end of the area that `of` returned last.
  int64_t end() const { return end_; }

 private:
  void look_up(int64_t address);

  const std::vector<int64_t> &edges_;
  size_t at_ = 0;
  int64_t begin_ = INT64_MAX;
  int64_t end_ = INT64_MIN;
};

// Writes pieces into a buffer of the caller: the first word is 1 if a piece has several rows; then
// follow six columns of `room` words, of which only three have values if no piece has.
class Columns {
 public:
  Columns(int64_t *out, int64_t room) : out_(out), room_(room) {}

  // Set whether a piece has several rows; no piece was written yet.
  void fold(bool folded) { folded_ = folded; }

  void operator()(const Piece &piece) {
    if (number_ < room_) {
      int64_t *at = out_ + 1 + number_;
      at[0] = piece.dst;
      at[room_] = piece.src;
      at[2 * room_] = piece.width;
      if (folded_) {
        at[3 * room_] = piece.height;
        at[4 * room_] = piece.dst_pitch;
        at[5 * room_] = piece.src_pitch;
      }
    }
    number_++;
  }

  void operator()(const Run &run) {
    (*this)(Piece{run.dst, run.src, run.nbytes, 1, run.nbytes, run.nbytes});
  }

  // Write every line of a nest in every plane as a plain copy.
  void multiply(const Factors &factors);

  // Return the number of pieces: more than the room if the buffer is too small.
  int64_t end() {
    out_[0] = folded_;
    return number_;
  }

 private:
  int64_t *out_;
  int64_t room_;
  int64_t number_ = 0;
  bool folded_ = false;
};

}  // namespace portakv

#endif
