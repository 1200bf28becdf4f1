// SPDX-License-Identifier: Apache-2.0
// Runs: a plan expanded into contiguous bytes, for copy engines, files and networks.
//
// The runs of a nest are a sum: every line in every plane, whose addresses are added. A copy has
// few lines and few planes where it has many runs, so lines are sorted and merged before they are
// multiplied by planes.
#ifndef PORTAKV_RUNS_H
#define PORTAKV_RUNS_H

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan.h"

namespace portakv {

struct Run {
  int64_t src;
  int64_t dst;
  int64_t nbytes;
};

// The first address of a plane on both sides.
struct Plane {
  int64_t src;
  int64_t dst;
};

// The memory of a side's view, and the slot of each position of a copy. Words: the members.
struct Positions {
  int64_t addresses;  // a pointer to the table; the address itself if the table has one entry
  int64_t entries;    // of the table
  int64_t ids;        // a pointer to `number` ids of `id_bytes` each: 8, 4, or 0 without ids
  int64_t id_bytes;
  int64_t number;
  int64_t step;    // tokens of an id
  int64_t offset;  // tokens that are passed over before the first position
  int64_t slots;   // of the view

  // Return the address of an entry of the table; raise `Malformed` if there is no such entry.
  int64_t address(int64_t entry) const;
};

// Positions lie outside of a list of ids or of a view.
struct Outside {};

// The numbers of the units of a copy, on both sides.
struct Units {
  std::vector<int64_t> src;
  std::vector<int64_t> dst;
};

// The runs of one nest, before multiplication.
//
// Planes are in the order of the source. If there is one plane, lines have whole addresses.
struct Factors {
  std::vector<Plane> planes;
  std::vector<Run> lines;
  bool one_plane;

  size_t runs() const { return planes.size() * lines.size(); }
};

enum class Lines {
  kMerged,    // in the order of the source, neighbours merged
  kSeparate,  // in the order of the positions
};

// Return the numbers of the units of `count` positions, negative for negative ids.
//
// `checked`: raise `Outside` for positions past the list or past the view.
Units read_units(const Positions &src, const Positions &dst, int64_t unit, int64_t count,
                 bool checked);

// Return for each nest the runs of a copy, without units whose number is negative. Raise `Outside`.
std::vector<Factors> expand(const Plan &plan, const Positions &src, const Positions &dst,
                            int64_t count, Lines kind);

// Sort runs by source and then by destination, unless each begins after the run before it.
void sort_runs(std::vector<Run> &runs);

// Passes runs on to `out` (a function of a run), and merges neighbours that follow each other.
template <class Out>
class Merger {
 public:
  explicit Merger(Out &out) : out_(out) {}

  void operator()(const Run &run) {
    if (run.src == last_.src + last_.nbytes && run.dst == last_.dst + last_.nbytes && some_) {
      last_.nbytes += run.nbytes;
      return;
    }
    if (some_) out_(last_);
    last_ = run;
    some_ = true;
  }

  void end() {
    if (some_) out_(last_);
    some_ = false;
  }

 private:
  Out &out_;
  Run last_{0, 0, 0};
  bool some_ = false;
};

// Pass every line in every plane to `out`, plane after plane.
template <class Out>
void plane_by_plane(const Factors &factors, Out &&out) {
  for (const Plane &plane : factors.planes) {
    for (const Run &line : factors.lines) {
      out(Run{plane.src + line.src, plane.dst + line.dst, line.nbytes});
    }
  }
}

// Pass every line in every plane to `out`, line after line.
template <class Out>
void line_by_line(const Factors &factors, Out &&out) {
  for (const Run &line : factors.lines) {
    for (const Plane &plane : factors.planes) {
      out(Run{plane.src + line.src, plane.dst + line.dst, line.nbytes});
    }
  }
}

// How the runs of a nest come in the order of the source.
enum class Order { kPlanes, kLines, kSort };
Order order_of(const Factors &factors);

// Return the runs of several nests in a row; the runs of a nest that needs no sorting are in order.
std::vector<Run> multiplied(const std::vector<Factors> &several);

// Pass the runs of several nests to `out`, neighbours merged, in the order of the source.
template <class Out>
void each_run(const std::vector<Factors> &several, Out &&out) {
  if (several.size() == 1 && several[0].one_plane) {
    for (const Run &line : several[0].lines) out(line);  // merged before
    return;
  }
  Merger<Out> merged(out);
  const Order order = several.size() == 1 ? order_of(several[0]) : Order::kSort;
  if (order == Order::kPlanes) {
    plane_by_plane(several[0], merged);
  } else if (order == Order::kLines) {
    line_by_line(several[0], merged);
  } else {
    std::vector<Run> runs = multiplied(several);
    sort_runs(runs);
    for (const Run &run : runs) merged(run);
  }
  merged.end();
}

}  // namespace portakv

#endif
