// SPDX-License-Identifier: Apache-2.0
#include "pieces.h"

#include <algorithm>
#include <cstring>

#include "core.h"
#include "guarded.h"

namespace portakv {

namespace {

// A run, and the area in which it begins on either side.
struct Row {
  Run run;
  size_t src_area;
  size_t dst_area;
};

struct Pitches {
  int64_t src;
  int64_t dst;
};

Pitches pitches(const Row &row, const Row &next) {
  return {next.run.src - row.run.src, next.run.dst - row.run.dst};
}

bool same(const Pitches &a, const Pitches &b) { return a.src == b.src && a.dst == b.dst; }

Piece plain_piece(const Row &row) {
  return {row.run.dst, row.run.src, row.run.nbytes, 1, row.run.nbytes, row.run.nbytes};
}

// Return whether two rows may belong to one piece.
bool joins(const Row &row, const Row &next, const Limits &limits) {
  const Pitches step = pitches(row, next);
  const int64_t width = row.run.nbytes;
  return width == next.run.nbytes && step.src >= width && step.dst >= width &&
         step.src <= limits.pitch && step.dst <= limits.pitch && row.src_area == next.src_area &&
         row.dst_area == next.dst_area;
}

// Pass rows that follow each other in this order to `out`, those at constant pitches as one piece.
// A row that two pieces could have belongs to the first.
template <class Out>
void fold(const std::vector<Row> &rows, const Limits &limits, Out &&out) {
  const size_t number = rows.size();
  size_t next = 0;  // the first row that was not passed
  const bool enough = static_cast<int64_t>(number) >= limits.least;
  size_t first = 0;
  while (enough && first + 1 < number) {
    if (!joins(rows[first], rows[first + 1], limits)) {
      first++;
      continue;
    }
    const Pitches step = pitches(rows[first], rows[first + 1]);
    size_t last = first + 1;
    while (last + 1 < number && same(pitches(rows[last], rows[last + 1]), step) &&
           joins(rows[last], rows[last + 1], limits)) {
      last++;
    }
    const int64_t width = rows[first].run.nbytes;
    const int64_t least = width < limits.below ? limits.least : limits.tall;
    if (static_cast<int64_t>(last - first + 1) >= least) {
      for (; next < first; next++) out(plain_piece(rows[next]));
      const Run &begin = rows[next].run;
      const int64_t height = static_cast<int64_t>(last - next + 1);
      if (height == 1) {
        out(plain_piece(rows[next]));
      } else {
        out(Piece{begin.dst, begin.src, width, height, step.dst, step.src});
      }
      next = last + 1;
    }
    first = last;
  }
  for (; next < number; next++) out(plain_piece(rows[next]));
}

size_t count_pieces(const std::vector<Row> &rows, const Limits &limits) {
  size_t number = 0;
  fold(rows, limits, [&](const Piece &) { number++; });
  return number;
}

// Return after how many rows the steps between them repeat, such as the number of blocks of each
// layer. The steps at a few positions are compared with later steps.
std::vector<size_t> lags(const std::vector<Row> &rows, const Limits &limits) {
  std::vector<size_t> found;
  const size_t steps = rows.empty() ? 0 : rows.size() - 1;
  if (static_cast<int64_t>(steps) < limits.least) return found;
  const size_t most = steps / static_cast<size_t>(std::max<int64_t>(1, limits.least - 1));
  for (const size_t at : {size_t{0}, steps / 3, steps / 2}) {
    const Pitches step = pitches(rows[at], rows[at + 1]);
    const int64_t width = rows[at].run.nbytes;
    const size_t past = std::min(steps, at + most + 1);
    int left = 2;
    for (size_t later = at + 1; later < past && left > 0; later++) {
      if (rows[later].run.nbytes != width) continue;
      if (!same(pitches(rows[later], rows[later + 1]), step)) continue;
      if (later - at > 1) found.push_back(later - at);
      left--;
    }
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

// Return rows in the order in which each precedes the row `lag` later.
std::vector<Row> by_lag(const std::vector<Row> &rows, size_t lag) {
  std::vector<Row> ordered;
  ordered.reserve(rows.size());
  for (size_t first = 0; first < lag; first++) {
    for (size_t at = first; at < rows.size(); at += lag) ordered.push_back(rows[at]);
  }
  return ordered;
}

bool all_apart(const std::vector<Row> &rows, const Limits &limits) {
  if (limits.below > limits.apart) return false;
  for (const Row &row : rows) {
    if (row.run.nbytes < limits.apart) return false;
  }
  return true;
}

// Put rows into the order that gives the fewest pieces; return their number.
size_t order_rows(std::vector<Row> &rows, const Limits &limits) {
  if (all_apart(rows, limits)) return rows.size();
  size_t best = count_pieces(rows, limits);
  std::vector<Row> chosen;
  for (const size_t lag : lags(rows, limits)) {
    if (lag >= best) break;  // it gives at least as many pieces
    std::vector<Row> ordered = by_lag(rows, lag);
    const size_t number = count_pieces(ordered, limits);
    if (number < best) {
      best = number;
      chosen.swap(ordered);
    }
  }
  if (!chosen.empty()) rows.swap(chosen);
  return best;
}

// Pass rows in their order to `out`, folded or one by one.
template <class Out>
void pass(const std::vector<Row> &rows, const Limits &limits, bool folded, Out &&out) {
  if (folded) {
    fold(rows, limits, out);
    return;
  }
  for (const Row &row : rows) out(plain_piece(row));
}

// Cuts runs where they cross an edge, and passes the parts on as rows.
template <class Out>
class Cutter {
 public:
  Cutter(const std::vector<int64_t> &edges, Out &out) : src_(edges), dst_(edges), out_(out) {}

  void operator()(const Run &run) {
    if (src_.none()) {
      out_(Row{run, 0, 0});
      return;
    }
    Run rest = run;
    while (true) {
      const size_t src_area = src_.of(rest.src);
      const size_t dst_area = dst_.of(rest.dst);
      // Distances, since the end of the last area is no address.
      const uint64_t src_left = distance(rest.src, src_.end());
      const uint64_t dst_left = distance(rest.dst, dst_.end());
      const uint64_t left = std::min(src_left, dst_left);
      if (left >= static_cast<uint64_t>(rest.nbytes)) {
        out_(Row{rest, src_area, dst_area});
        return;
      }
      const int64_t part = static_cast<int64_t>(left);
      out_(Row{Run{rest.src, rest.dst, part}, src_area, dst_area});
      rest = Run{rest.src + part, rest.dst + part, rest.nbytes - part};
    }
  }

 private:
  static uint64_t distance(int64_t from, int64_t to) {
    return static_cast<uint64_t>(to) - static_cast<uint64_t>(from);
  }

  Areas src_;
  Areas dst_;
  Out &out_;
};

// --- Factors that are folded before they are multiplied ---------------------------------------

struct Range {
  int64_t first;
  int64_t past;
};

// Return the bytes of all lines on a side, relative to their plane.
Range range_of(const std::vector<Run> &lines, bool src) {
  Range range{INT64_MAX, INT64_MIN};
  for (const Run &line : lines) {
    const int64_t start = src ? line.src : line.dst;
    range.first = std::min(range.first, start);
    range.past = std::max(range.past, start + line.nbytes);
  }
  return range;
}

// Return whether no plane's lines lie on both sides of an edge.
bool between(const std::vector<int64_t> &edges, const Factors &factors) {
  if (edges.empty() || factors.lines.empty()) return true;
  Areas areas(edges);
  for (const bool src : {true, false}) {
    const Range range = range_of(factors.lines, src);
    for (const Plane &plane : factors.planes) {
      const int64_t start = src ? plane.src : plane.dst;
      areas.of(start + range.first);
      if (start + range.past > areas.end()) return false;
    }
  }
  return true;
}

std::vector<Row> rows_of(const std::vector<Run> &runs) {
  std::vector<Row> rows;
  rows.reserve(runs.size());
  for (const Run &run : runs) rows.push_back({run, 0, 0});
  return rows;
}

// Return every line in every plane as pieces. Either the lines have one row each, or the planes.
void multiply(const std::vector<Piece> &planes, const std::vector<Piece> &lines, Columns &out) {
  for (const Piece &plane : planes) {
    for (const Piece &line : lines) {
      const Piece &rows = plane.height > 1 ? plane : line;
      out(Piece{plane.dst + line.dst, plane.src + line.src, line.width,
                plane.height * line.height, rows.dst_pitch, rows.src_pitch});
    }
  }
}

// The planes and lines of a nest as pieces.
struct Folded {
  std::vector<Piece> planes;
  std::vector<Piece> lines;
  bool folded;
};

// Fold the planes or the lines, whichever gives fewer pieces.
Folded fold_factors(const Factors &factors, const Limits &limits,
                    const std::vector<int64_t> &edges) {
  Folded result;
  result.folded = false;
  if (factors.lines.empty()) return result;
  std::vector<Row> lines = rows_of(factors.lines);
  int64_t widest = 0;
  for (const Run &line : factors.lines) widest = std::max(widest, line.nbytes);
  const int64_t src_first = range_of(factors.lines, true).first;
  const int64_t dst_first = range_of(factors.lines, false).first;
  Areas src_areas(edges);
  Areas dst_areas(edges);
  std::vector<Row> planes;
  planes.reserve(factors.planes.size());
  for (const Plane &plane : factors.planes) {
    planes.push_back({{plane.src, plane.dst, widest},
                      src_areas.of(plane.src + src_first),
                      dst_areas.of(plane.dst + dst_first)});
  }
  Limits of_planes = limits;
  of_planes.below = widest < limits.below ? INT64_MAX : 0;
  const size_t lines_left = order_rows(lines, limits);
  const size_t planes_left = order_rows(planes, of_planes);
  const bool planes_fold = planes_left * lines.size() < lines_left * planes.size();
  const bool lines_fold = !planes_fold && lines_left < lines.size();
  const auto add_to = [](std::vector<Piece> &pieces) {
    return [&pieces](const Piece &piece) { pieces.push_back(piece); };
  };
  pass(planes, of_planes, planes_fold, add_to(result.planes));
  pass(lines, limits, lines_fold, add_to(result.lines));
  result.folded = planes_fold || lines_fold;
  return result;
}

// --- The pieces of a plan ---------------------------------------------------------------------

bool by_unit(const Plan &plan) {
  for (const Nest &nest : plan.nests) {
    for (const Side *side : {&nest.src, &nest.dst}) {
      for (const Step &step : side->units) {
        if (step.table != 0) return true;
      }
    }
  }
  return false;
}

int64_t shortest_run(const Plan &plan) {
  int64_t run = INT64_MAX;
  for (const Nest &nest : plan.nests) run = std::min(run, nest.run);
  return run;
}

// Return whether a nest has one line in several planes that may follow each other, or that edges
// may cut into shorter runs.
bool planes_meet(const std::vector<Factors> &several, bool cuts) {
  for (const Factors &factors : several) {
    const std::vector<Plane> &planes = factors.planes;
    if (factors.lines.size() != 1 || planes.size() < 2) continue;
    if (cuts || several.size() > 1) return true;  // planes of two nests may follow each other
    const int64_t nbytes = factors.lines[0].nbytes;
    for (size_t i = 1; i < planes.size(); i++) {
      const int64_t src_step = planes[i].src - planes[i - 1].src;
      const int64_t dst_step = planes[i].dst - planes[i - 1].dst;
      if (src_step == 0 || (src_step == nbytes && dst_step == nbytes)) return true;
    }
  }
  return false;
}

// Write the pieces of runs that stay as they are, but for edges.
void write_plain(const std::vector<Factors> &several, const PiecesRequest &request, Columns &out) {
  const auto write = [&](const Row &row) { out(row.run); };
  if (request.registered.number == 0) {
    for (const Factors &factors : several) out.multiply(factors);
    return;
  }
  const std::vector<int64_t> edges = sorted_edges({request.registered});
  Cutter<decltype(write)> cut(edges, write);
  for (const Factors &factors : several) plane_by_plane(factors, cut);
}

// Write the pieces of runs whose factors are folded before they are multiplied.
void write_folded(const std::vector<Factors> &several, const Limits &limits,
                  const std::vector<int64_t> &edges, Columns &out) {
  std::vector<Folded> folded;
  bool any = false;
  for (const Factors &factors : several) {
    folded.push_back(fold_factors(factors, limits, edges));
    any = any || folded.back().folded;
  }
  out.fold(any);
  for (const Folded &each : folded) multiply(each.planes, each.lines, out);
}

// Write the pieces of rows in the order of the source.
void write_rows(std::vector<Row> &rows, const Limits &limits, Columns &out) {
  const bool folded = order_rows(rows, limits) < rows.size();
  out.fold(folded);
  pass(rows, limits, folded, out);
}

}  // namespace

void write_pieces(const Plan &plan, const PiecesRequest &request, Columns &out) {
  const Limits &limits = request.limits;
  const bool units = by_unit(plan);
  // Each unit is all bytes at one address of a side, so that no units join.
  if (units && plan.nests.size() == 1 &&
      (plan.nests[0].run == request.src_whole || plan.nests[0].run == request.dst_whole)) {
    write_plain(expand(plan, request.src, request.dst, request.count, Lines::kSeparate), request,
                out);
    return;
  }
  // Wide runs stay separate pieces in any order. Each lies in the allocation of its plane, so the
  // edges of allocations need no look-up.
  const bool apart = limits.below <= limits.apart && limits.apart <= shortest_run(plan) &&
                     request.merged == 0 && !units;
  const bool edged = request.edged != 0 || (request.src.entries <= 1 && request.dst.entries <= 1);
  if (!apart && !edged) throw NeedsEdges();
  const std::vector<Factors> several =
      expand(plan, request.src, request.dst, request.count, Lines::kMerged);
  if (apart && !planes_meet(several, request.registered.number > 0)) {
    write_plain(several, request, out);
    return;
  }

  if (!edged) throw NeedsEdges();
  const std::vector<int64_t> edges =
      sorted_edges({request.registered, request.src_edges, request.dst_edges});
  size_t runs = 0;
  bool inside = true;
  for (const Factors &factors : several) {
    runs += factors.runs();
    inside = inside && between(edges, factors);
  }
  const bool large = static_cast<int64_t>(runs) >= limits.large && request.merged == 0;
  if (large && inside) {
    write_folded(several, limits, edges, out);
    return;
  }
  std::vector<Row> rows;
  rows.reserve(runs);
  const auto add = [&](const Row &row) { rows.push_back(row); };
  Cutter<decltype(add)> cut(edges, add);
  each_run(several, cut);
  write_rows(rows, limits, out);
}

void Columns::multiply(const Factors &factors) {
  const size_t lines = factors.lines.size();
  if (number_ + static_cast<int64_t>(factors.runs()) > room_) {
    plane_by_plane(factors, *this);
    return;
  }
  // One column after the other: compilers make vectors of such loops.
  std::vector<int64_t> dst(lines);
  std::vector<int64_t> src(lines);
  std::vector<int64_t> width(lines);
  for (size_t i = 0; i < lines; i++) {
    dst[i] = factors.lines[i].dst;
    src[i] = factors.lines[i].src;
    width[i] = factors.lines[i].nbytes;
  }
  int64_t *at = out_ + 1 + number_;
  for (const Plane &plane : factors.planes) {
    int64_t *dst_at = at;
    int64_t *src_at = at + room_;
    for (size_t i = 0; i < lines; i++) dst_at[i] = plane.dst + dst[i];
    for (size_t i = 0; i < lines; i++) src_at[i] = plane.src + src[i];
    std::copy(width.begin(), width.end(), at + 2 * room_);
    at += lines;
  }
  number_ += static_cast<int64_t>(factors.runs());
}

std::vector<int64_t> sorted_edges(const std::vector<Edges> &several) {
  std::vector<int64_t> edges;
  for (const Edges &each : several) {
    if (each.number < 0) throw Malformed("a number of edges is negative");
    const int64_t *first = reinterpret_cast<const int64_t *>(each.pointer);
    if (each.number > 0) edges.insert(edges.end(), first, first + each.number);
  }
  if (!std::is_sorted(edges.begin(), edges.end())) std::sort(edges.begin(), edges.end());
  edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
  return edges;
}

void Areas::look_up(int64_t address) {
  const auto next = std::upper_bound(edges_.begin(), edges_.end(), address);
  at_ = static_cast<size_t>(next - edges_.begin());
  begin_ = at_ == 0 ? INT64_MIN : edges_[at_ - 1];
  end_ = next == edges_.end() ? INT64_MAX : *next;
}

namespace {

// --- How many -----------------------------------------------------------------------------------

// After how many units the pitch of a side changes; 0: never.
int64_t limit_of(const Side &side) {
  return side.units.size() > 1 ? side.units.back().extent : 0;
}

// How many rows of a width become one piece; 0: no number does.
int64_t least_height(int64_t width, const Limits &limits) {
  if (limits.below == 0 || (limits.below <= limits.apart && limits.apart <= width)) return 0;
  // Wide rows cross faster as entries of a batch, so that only many of them fold.
  return width < limits.below ? limits.least : limits.tall;
}

// Merge loops into a run that they continue on both sides. Return the width of the run.
int64_t absorb(LoopList &loops, int64_t width) {
  for (size_t i = 0; i < loops.size(); i++) {
    const Loop loop = loops[i];
    if (loop.src_stride != width || loop.dst_stride != width || loop.tabled()) continue;
    loops.erase(&loops[i], &loops[i] + 1);
    return absorb(loops, product(width, loop.extent));
  }
  return width;
}

// Add the runs of a nest to `count`, and about as many pieces as `write_pieces` makes of them.
void add_nest(const Nest &nest, int64_t units, int64_t groups, const Limits &limits,
              RunCount &count) {
  // Units that follow each other on both sides form one run for each group.
  const Step &src = nest.src.units.back();
  const Step &dst = nest.dst.units.back();
  const bool joined = src.stride == nest.run && dst.stride == nest.run && src.table == 0 &&
                      dst.table == 0;
  const int64_t lines = joined ? groups : units;
  int64_t width = nest.run;
  LoopList loops = nest.loops;

  // All groups have one known length: there is one group, or each group is a whole block.
  const int64_t either[] = {limit_of(nest.src), limit_of(nest.dst)};
  const int64_t block = either[0] != 0 && either[1] != 0 ? std::min(either[0], either[1])
                                                         : std::max(either[0], either[1]);
  if (joined && (groups == 1 || (block != 0 && units == product(groups, block)))) {
    width = absorb(loops, product(nest.run, units / groups));
  }

  int64_t around = 1;
  for (const Loop &loop : loops) around = product(around, loop.extent);
  const int64_t runs = product(lines, around);
  const int64_t longest = product(nest.run, units) / lines;
  const int64_t least = least_height(std::max(width, longest), limits);
  int64_t pieces = runs;
  // Rows that may become one piece: their number, their pitches, and the pieces that are left.
  const auto fold = [&](int64_t height, int64_t src_pitch, int64_t dst_pitch, int64_t left) {
    const bool many = least != 0 && height >= least;
    const bool apart = width <= std::min(src_pitch, dst_pitch);
    if (many && apart && std::max(src_pitch, dst_pitch) <= limits.pitch) {
      pieces = std::min(pieces, left);
    }
  };
  for (const Loop &loop : loops) {
    if (!loop.tabled()) fold(loop.extent, loop.src_stride, loop.dst_stride, runs / loop.extent);
  }
  if (!joined) fold(units / groups, src.stride, dst.stride, product(groups, around));
  count.runs += runs;
  count.pieces += pieces;
}

}  // namespace

RunCount count_runs(const Plan &plan, int64_t units, int64_t groups, const Limits &limits) {
  RunCount count{0, 0};
  if (units == 0) return count;
  for (const Nest &nest : plan.nests) add_nest(nest, units, groups, limits, count);
  return count;
}

}  // namespace portakv

using namespace portakv;

int64_t portakv_pieces_count(const int64_t *plan, int64_t units, int64_t groups,
                             const int64_t *words, int64_t *out) {
  return guarded([&]() -> int64_t {
    Limits limits;
    std::memcpy(&limits, words, sizeof limits);
    if (units < 0 || groups < 1) throw Malformed("a copy has no such groups");
    const RunCount count = count_runs(read_plan(plan), units, groups, limits);
    out[0] = count.runs;
    out[1] = count.pieces;
    return 0;
  });
}

int64_t portakv_pieces_list(const int64_t *plan, const int64_t *words, int64_t *out,
                            int64_t room) {
  return guarded([&]() -> int64_t {
    PiecesRequest request;
    std::memcpy(&request, words, sizeof request);
    Columns columns(out, room);
    try {
      write_pieces(read_plan(plan), request, columns);
    } catch (const NeedsEdges &) {
      return PORTAKV_RUNS_EDGES;
    }
    return columns.end();
  });
}
