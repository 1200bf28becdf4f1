// SPDX-License-Identifier: Apache-2.0
#include "runs.h"

#include <algorithm>
#include <cstring>

#include "core.h"
#include "guarded.h"

namespace portakv {

namespace {

constexpr int64_t kMostPlaces = int64_t{1} << 40;  // that loops lead to

// A place on one side, relative to the origin: entries of the address table, and bytes.
struct Place {
  int64_t entry;
  int64_t offset;
};

// --- Units ------------------------------------------------------------------------------------

// Write the numbers of units that ids name. An id outside of the view raises `Outside`.
template <class Id>
void read_ids(const Positions &at, int64_t unit, bool checked, std::vector<int64_t> &numbers) {
  const Id *ids = reinterpret_cast<const Id *>(at.ids);
  const int64_t per_id = at.step / unit;
  const int64_t past = at.slots / unit;
  // An id that lies past the view, and whose product with `per_id` fits into 64 bits.
  const int64_t past_id = checked ? past / per_id + 1 : INT64_MAX / per_id - 1;
  int64_t within = at.offset / unit % per_id;
  ids += at.offset / at.step;
  if (per_id == 1) {
    for (int64_t &number : numbers) {
      number = *ids++;
      if (checked && number >= past) throw Outside();
    }
    return;
  }
  for (size_t i = 0; i < numbers.size(); ids++, within = 0) {
    const int64_t named = *ids;  // another thread may change it
    const int64_t id = std::min(named, past_id);
    for (; within < per_id && i < numbers.size(); within++) {
      const int64_t number = id < 0 ? -1 : id * per_id + within;
      if (checked && number >= past) throw Outside();
      numbers[i++] = number;
    }
  }
}

std::vector<int64_t> read_side(const Positions &at, int64_t unit, int64_t count, bool checked) {
  if (at.offset < 0 || at.step < 1 || count < 0) throw Malformed("positions out of bounds");
  if (at.id_bytes == 0) {
    if (checked && count > at.slots - at.offset) throw Outside();
  } else {
    if (at.step % unit != 0) throw Malformed("a step is no multiple of the unit");
    if (count > at.number * at.step - at.offset) throw Outside();
  }
  std::vector<int64_t> numbers(static_cast<size_t>(count / unit));
  if (at.id_bytes == 8) {
    read_ids<int64_t>(at, unit, checked, numbers);
  } else if (at.id_bytes == 4) {
    read_ids<int32_t>(at, unit, checked, numbers);
  } else {
    int64_t number = at.offset / unit;
    for (int64_t &each : numbers) each = number++;
  }
  return numbers;
}

// Remove the units whose number is negative on a side.
void remove_negative(Units &units) {
  size_t kept = 0;
  for (size_t i = 0; i < units.src.size(); i++) {
    if (units.src[i] < 0 || units.dst[i] < 0) continue;
    units.src[kept] = units.src[i];
    units.dst[kept] = units.dst[i];
    kept++;
  }
  units.src.resize(kept);
  units.dst.resize(kept);
}

// --- Lines and planes -------------------------------------------------------------------------

// Loops inside the lines, and loops over planes.
//
// The address of a side that is `by_line` is looked up for each line, else for each plane. It
// cannot be looked up for both, because the two are added.
struct Split {
  LoopList inner;
  LoopList outer;
  bool by_line[2];
};

bool tabled(const Side &side) {
  for (const Step &step : side.units) {
    if (step.table != 0) return true;
  }
  return false;
}

Split split_loops(const Nest &nest) {
  Split split;
  split.outer = nest.loops;
  bool src = tabled(nest.src);
  bool dst = tabled(nest.dst);
  split.by_line[0] = src;
  split.by_line[1] = dst;
  if (!src && !dst) return split;
  // A loop that is taken into the lines for one side may need a look-up of the other side, which
  // then takes more loops.
  for (bool more = true; more;) {
    const bool by_src = src;
    const bool by_dst = dst;
    const auto stays = [&](const Loop &loop) {
      return !(by_src && loop.src_table != 0) && !(by_dst && loop.dst_table != 0);
    };
    const auto taken = std::stable_partition(split.outer.begin(), split.outer.end(), stays);
    more = taken != split.outer.end();
    for (auto loop = taken; loop != split.outer.end(); ++loop) {
      src = src || loop->src_table != 0;
      dst = dst || loop->dst_table != 0;
      split.inner.push_back(*loop);
    }
    split.outer.erase(taken, split.outer.end());
  }
  split.by_line[0] = src;
  split.by_line[1] = dst;
  return split;
}

// Return the places that loops lead to on a side (0: source), the innermost loop fastest.
std::vector<Place> walk(const LoopList &loops, int side) {
  if (loops.empty()) return {{0, 0}};
  std::vector<Place> places{{0, 0}};
  std::vector<Place> next;
  for (const Loop &loop : loops) {
    const int64_t table = side == 0 ? loop.src_table : loop.dst_table;
    const int64_t stride = side == 0 ? loop.src_stride : loop.dst_stride;
    if (loop.extent < 1 || loop.extent > kMostPlaces / static_cast<int64_t>(places.size())) {
      throw Malformed("a plan has too many planes");
    }
    next.clear();
    next.reserve(places.size() * static_cast<size_t>(loop.extent));
    for (const Place &place : places) {
      for (int64_t i = 0; i < loop.extent; i++) {
        next.push_back({place.entry + i * table, place.offset + i * stride});
      }
    }
    places.swap(next);
  }
  return places;
}

// Return the place of a unit relative to the origin.
Place locate(const Steps &steps, int64_t number) {
  Place place{0, 0};
  for (size_t i = steps.count; i-- > 0;) {
    const Step &step = steps[i];
    int64_t digit = number;
    if (step.extent != 0) {
      digit = number % step.extent;
      number /= step.extent;
    }
    place.entry += digit * step.table;
    place.offset += digit * step.stride;
  }
  return place;
}

// Return the start of each line on a side: an address if the plane is the only one or if the
// address is looked up by line, else a distance from the plane.
std::vector<int64_t> starts(const Side &side, const Positions &at,
                            const std::vector<int64_t> &units, int64_t unit,
                            const std::vector<Place> &inner, bool by_line, bool one_plane) {
  if (side.units.empty()) throw Malformed("a side has no steps for its units");
  int64_t base = side.offset;
  // Only if tokens lie at one stride may a unit begin between multiples.
  if (at.id_bytes == 0) base += at.offset % unit * (side.units.back().stride / unit);
  if (one_plane && !by_line) base += at.address(side.table);

  std::vector<int64_t> result;
  result.reserve(units.size() * inner.size());
  const bool even = side.units.size() == 1 && side.units[0].extent == 0;
  if (even && !by_line && inner.size() == 1) {
    const int64_t stride = side.units[0].stride;
    for (const int64_t number : units) result.push_back(base + number * stride);
    return result;
  }
  for (const int64_t number : units) {
    const Place place = locate(side.units, number);
    for (const Place &each : inner) {
      int64_t start = base + place.offset + each.offset;
      if (by_line) start += at.address(side.table + place.entry + each.entry);
      result.push_back(start);
    }
  }
  return result;
}

Factors expand_nest(const Nest &nest, int64_t unit, const Positions &src, const Positions &dst,
                    const Units &units, Lines kind) {
  const Split split = split_loops(nest);
  Factors factors;
  factors.one_plane = split.outer.empty();
  const std::vector<int64_t> from =
      starts(nest.src, src, units.src, unit, walk(split.inner, 0), split.by_line[0],
             factors.one_plane);
  const std::vector<int64_t> to =
      starts(nest.dst, dst, units.dst, unit, walk(split.inner, 1), split.by_line[1],
             factors.one_plane);
  factors.lines.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) factors.lines[i] = {from[i], to[i], nest.run};
  if (kind == Lines::kMerged) {
    sort_runs(factors.lines);
    std::vector<Run> &lines = factors.lines;
    size_t kept = 0;
    auto keep = [&](const Run &run) { lines[kept++] = run; };
    Merger<decltype(keep)> merged(keep);
    for (size_t i = 0; i < lines.size(); i++) merged(Run(lines[i]));
    merged.end();
    lines.resize(kept);
  }

  if (factors.one_plane) {
    factors.planes.push_back({0, 0});
    return factors;
  }
  const std::vector<Place> src_planes = walk(split.outer, 0);
  const std::vector<Place> dst_planes = walk(split.outer, 1);
  factors.planes.resize(src_planes.size());
  for (size_t i = 0; i < src_planes.size(); i++) {
    Plane &plane = factors.planes[i];
    plane = {src_planes[i].offset, dst_planes[i].offset};
    if (!split.by_line[0]) plane.src += src.address(nest.src.table + src_planes[i].entry);
    if (!split.by_line[1]) plane.dst += dst.address(nest.dst.table + dst_planes[i].entry);
  }
  const auto before = [](const Plane &a, const Plane &b) { return a.src < b.src; };
  if (!std::is_sorted(factors.planes.begin(), factors.planes.end(), before)) {
    std::stable_sort(factors.planes.begin(), factors.planes.end(), before);
  }
  return factors;
}

// --- Sorting ----------------------------------------------------------------------------------

constexpr size_t kFew = 256;  // runs; sorting more of them by digits is faster

bool comes_before(const Run &a, const Run &b) {
  return a.src != b.src ? a.src < b.src : a.dst < b.dst;
}

// Sort by source, 11 bits at a time; equal sources keep their order.
void sort_by_digits(std::vector<Run> &runs) {
  constexpr int kBits = 11;
  constexpr size_t kDigits = size_t{1} << kBits;
  int64_t least = runs[0].src;
  int64_t most = runs[0].src;
  for (const Run &run : runs) {
    least = std::min(least, run.src);
    most = std::max(most, run.src);
  }
  const uint64_t range = static_cast<uint64_t>(most) - static_cast<uint64_t>(least);
  // Runs lie at multiples of some power of two, whose bits need no pass.
  uint64_t used = 0;
  const auto from_least = [least](const Run &run) {
    return static_cast<uint64_t>(run.src) - static_cast<uint64_t>(least);
  };
  for (const Run &run : runs) used |= from_least(run);
  int shift = 0;
  while (shift < 63 && !(used >> shift & 1)) shift++;

  std::vector<Run> other(runs.size());
  std::vector<size_t> places(kDigits);
  for (; shift < 64 && range >> shift != 0; shift += kBits) {
    const auto digit = [&](const Run &run) { return from_least(run) >> shift & (kDigits - 1); };
    std::fill(places.begin(), places.end(), 0);
    for (const Run &run : runs) places[digit(run)]++;
    size_t before = 0;
    for (size_t &place : places) {
      const size_t number = place;
      place = before;
      before += number;
    }
    for (const Run &run : runs) other[places[digit(run)]++] = run;
    runs.swap(other);
  }
}

}  // namespace

int64_t Positions::address(int64_t entry) const {
  if (static_cast<uint64_t>(entry) >= static_cast<uint64_t>(entries)) {
    throw Malformed("an entry of the address table is out of bounds");
  }
  return entries == 1 ? addresses : reinterpret_cast<const int64_t *>(addresses)[entry];
}

Units read_units(const Positions &src, const Positions &dst, int64_t unit, int64_t count,
                 bool checked) {
  if (unit < 1) throw Malformed("a unit has no tokens");
  return {read_side(src, unit, count, checked), read_side(dst, unit, count, checked)};
}

std::vector<Factors> expand(const Plan &plan, const Positions &src, const Positions &dst,
                            int64_t count, Lines kind) {
  Units units = read_units(src, dst, plan.unit, count, true);
  remove_negative(units);
  std::vector<Factors> several;
  several.reserve(plan.nests.size());
  for (const Nest &nest : plan.nests) {
    several.push_back(expand_nest(nest, plan.unit, src, dst, units, kind));
  }
  return several;
}

void sort_runs(std::vector<Run> &runs) {
  bool rising = true;
  for (size_t i = 1; i < runs.size() && rising; i++) rising = runs[i - 1].src < runs[i].src;
  if (rising) return;
  if (runs.size() <= kFew) {
    std::stable_sort(runs.begin(), runs.end(), comes_before);
    return;
  }
  sort_by_digits(runs);
  for (size_t i = 1; i < runs.size(); i++) {
    if (runs[i - 1].src != runs[i].src) continue;
    size_t past = i + 1;
    while (past < runs.size() && runs[past].src == runs[i].src) past++;
    const auto begin = runs.begin() + static_cast<std::ptrdiff_t>(i - 1);
    std::stable_sort(begin, runs.begin() + static_cast<std::ptrdiff_t>(past), comes_before);
    i = past;
  }
}

Order order_of(const Factors &factors) {
  const std::vector<Plane> &planes = factors.planes;
  const std::vector<Run> &lines = factors.lines;
  if (lines.empty()) return Order::kPlanes;
  int64_t gap = INT64_MAX;  // between two lines
  for (size_t i = 1; i < lines.size(); i++) gap = std::min(gap, lines[i].src - lines[i - 1].src);
  int64_t plane_gap = INT64_MAX;
  for (size_t i = 1; i < planes.size(); i++) {
    plane_gap = std::min(plane_gap, planes[i].src - planes[i - 1].src);
  }
  if (gap < 1 || plane_gap < 1) return Order::kSort;  // equal sources go by their destinations
  if (lines.back().src - lines.front().src < plane_gap) return Order::kPlanes;
  if (planes.back().src - planes.front().src < gap) return Order::kLines;
  return Order::kSort;
}

std::vector<Run> multiplied(const std::vector<Factors> &several) {
  size_t total = 0;
  for (const Factors &factors : several) total += factors.runs();
  std::vector<Run> runs;
  runs.reserve(total);
  const auto add = [&](const Run &run) { runs.push_back(run); };
  for (const Factors &factors : several) {
    if (order_of(factors) == Order::kLines) {
      line_by_line(factors, add);
    } else {
      plane_by_plane(factors, add);
    }
  }
  return runs;
}

}  // namespace portakv

using namespace portakv;

namespace {

// A call: the words that Python passes, in their order.
struct Copy {
  Positions src;
  Positions dst;
  int64_t count;
};

static_assert(sizeof(Copy) == 17 * sizeof(int64_t), "a copy is words");

// Return the number of groups of neighbours among units that are in order; see core.h.
int64_t count_groups(const Units &units, const int64_t *limits, bool falls) {
  int64_t groups = units.src.empty() ? 0 : 1;
  for (size_t i = 1; i < units.src.size(); i++) {
    const int64_t src_step = units.src[i] - units.src[i - 1];
    const int64_t dst_step = units.dst[i] - units.dst[i - 1];
    bool joined = src_step == 1 && dst_step == 1;
    if (limits[0] != 0) joined = joined && units.src[i] % limits[0] != 0;
    if (limits[1] != 0) joined = joined && units.dst[i] % limits[1] != 0;
    if (falls) joined = joined || (src_step == -1 && dst_step == -1);
    groups += !joined;
  }
  return groups;
}

}  // namespace

int64_t portakv_runs_list(const int64_t *plan, const int64_t *words, int64_t *out, int64_t room) {
  return guarded([&] {
    Copy copy;
    std::memcpy(&copy, words, sizeof copy);
    const std::vector<Factors> several =
        expand(read_plan(plan), copy.src, copy.dst, copy.count, Lines::kMerged);
    int64_t number = 0;
    each_run(several, [&](const Run &run) {
      if (number < room) {
        out[number] = run.src;
        out[room + number] = run.dst;
        out[2 * room + number] = run.nbytes;
      }
      number++;
    });
    return number;
  });
}

int64_t portakv_runs_groups(const int64_t *words, int64_t unit, int64_t src_limit,
                            int64_t dst_limit, int64_t most) {
  return guarded([&]() -> int64_t {
    Copy copy;
    std::memcpy(&copy, words, sizeof copy);
    const int64_t limits[2] = {src_limit, dst_limit};
    Units units = read_units(copy.src, copy.dst, unit, copy.count, false);
    const size_t number = units.src.size();
    if (most == 0) return count_groups(units, limits, false);
    if (static_cast<int64_t>(number) > most) return count_groups(units, limits, true);
    if (!std::is_sorted(units.src.begin(), units.src.end())) {
      std::vector<Run> sorted(number);
      for (size_t i = 0; i < number; i++) {
        sorted[i] = {units.src[i], units.dst[i], 0};
      }
      std::stable_sort(sorted.begin(), sorted.end(),
                       [](const Run &a, const Run &b) { return a.src < b.src; });
      for (size_t i = 0; i < number; i++) {
        units.src[i] = sorted[i].src;
        units.dst[i] = sorted[i].dst;
      }
    }
    return count_groups(units, limits, false);
  });
}
