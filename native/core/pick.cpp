// SPDX-License-Identifier: Apache-2.0
// Picks of transfer strategies: see pick.h.
#include "pick.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core.h"
#include "guarded.h"
#include "plan.h"

namespace portakv {
namespace {

constexpr int64_t bit(int64_t strategy) { return int64_t{1} << strategy; }
constexpr int64_t kKernel = bit(kZeroCopy);

bool several(int64_t set) { return (set & (set - 1)) != 0; }

int64_t first_of(int64_t set) {
  int64_t strategy = 0;
  while ((set & bit(strategy)) == 0) strategy++;
  return strategy;
}

// --- Measured costs ---------------------------------------------------------------------------

struct Seconds {
  double device;
  double host;
};

struct Point {
  double runs;
  Seconds seconds;
};

static_assert(sizeof(Point) == 3 * sizeof(double), "points are three numbers");

// The measurements for runs of one size.
struct Column {
  double run_bytes;
  int64_t count;
  const Point *points;
};

// Reads the columns of one strategy after another.
class CostColumns {
 public:
  explicit CostColumns(const double *first) : next_(first) {}

  int64_t count() { return static_cast<int64_t>(*next_++); }

  Column column() {
    Column read{next_[0], static_cast<int64_t>(next_[1]), reinterpret_cast<const Point *>(next_ + 2)};
    next_ += 2 + 3 * read.count;
    return read;
  }

 private:
  const double *next_;
};

// Return one kind of seconds at a number of runs: level before the first measurement, straight on
// past the last.
double along(const Column &column, double Seconds::*kind, double runs) {
  const Point *points = column.points;
  const auto at = [&](int64_t number) { return points[number].seconds.*kind; };
  if (runs <= points[0].runs) return at(0);
  if (column.count == 1) return at(0) * runs / points[0].runs;
  int64_t next = 1;
  while (next < column.count - 1 && points[next].runs < runs) next++;
  // Two close measurements may fall; more runs are never cheaper.
  const double rise = std::max(0.0, at(next) - at(next - 1));
  const double slope = rise / (points[next].runs - points[next - 1].runs);
  if (runs <= points[next].runs) return at(next - 1) + slope * (runs - points[next - 1].runs);
  return at(next) + std::max(slope, 0.5 * at(next) / points[next].runs) * (runs - points[next].runs);
}

Seconds along(const Column &column, double runs) {
  return {along(column, &Seconds::device, runs), along(column, &Seconds::host, runs)};
}

// Return the seconds of one strategy between its `count` columns, one or more, and pass all of them.
//
// Between measurements seconds are linear: in the number of runs of one size, and for equal bytes in
// the number of runs. That is exact for costs that are a price for each run and each byte.
Seconds between(CostColumns &columns, int64_t count, double run_bytes, double runs) {
  const double nbytes = std::max(1.0, run_bytes) * runs;
  Column narrow{};
  Column wide = columns.column();
  const bool narrowest = run_bytes <= wide.run_bytes;
  for (int64_t read = 1; read < count; read++) {
    const Column next = columns.column();
    if (run_bytes <= wide.run_bytes) continue;
    narrow = wide;
    wide = next;
  }
  if (narrowest) return along(wide, runs);  // a narrower run costs as much as the narrowest
  if (run_bytes >= wide.run_bytes) return along(wide, nbytes / wide.run_bytes);
  const double share =
      (1 / narrow.run_bytes - 1 / run_bytes) / (1 / narrow.run_bytes - 1 / wide.run_bytes);
  const Seconds first = along(narrow, nbytes / narrow.run_bytes);
  const Seconds last = along(wide, nbytes / wide.run_bytes);
  return {first.device + share * (last.device - first.device),
          first.host + share * (last.host - first.host)};
}

// Return the costs of a copy by each strategy that moves it. The device's seconds of one that was
// not measured are not a number.
void look_up(const PickRules &rules, const double *costs, const Shape (&shapes)[kStrategies],
             Seconds (&out)[kStrategies]) {
  constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
  CostColumns columns(costs);
  for (int64_t strategy = 0; strategy < kStrategies; strategy++) {
    const Shape &shape = shapes[strategy];
    const int64_t runs = std::max<int64_t>(1, shape.runs);
    const int64_t pieces = std::max<int64_t>(1, shape.pieces);
    const int64_t run_bytes = std::max<int64_t>(1, shape.nbytes / pieces);
    Seconds &cost = out[strategy];
    cost = {kUnknown, kUnknown};
    const int64_t count = columns.count();
    if (count == 0) continue;
    cost = between(columns, count, static_cast<double>(run_bytes), static_cast<double>(pieces));
    // The host pays for each piece, the device for each row.
    if (pieces < runs) cost.device += static_cast<double>(runs) * rules.row;
  }
}

// --- The pick ---------------------------------------------------------------------------------

// Return whether every run of a copy that a kernel could move is a large page.
bool of_pages(const PickRules &rules, const Shape (&shapes)[kStrategies]) {
  return shapes[kZeroCopy].runs >= 0 && shapes[kZeroCopy].run_bytes() >= rules.page;
}

// Return whether the terms exclude the kernel. Copy engines slow a model and the host down more than
// the kernel does if runs are short (benchmarks/notes/link.md).
bool excluded(const PickRules &rules, const Shape &host) {
  const bool brief = host.nbytes <= rules.kernel_most ||
                     (host.run_bytes() < rules.even && rules.detached == 0);
  return rules.idle == 0 && rules.limited == 0 && !brief;
}

// The seconds that a caller waits for a copy.
//
// A part of the host's time counts where nothing hides it: on an idle device, in short copies unless
// all runs are pages, if the call is longer than the transfer, and if it is long. All of it counts
// in short copies on an idle device.
struct Waiting {
  bool exposed;    // the host's time counts in any case
  double part;     // the part of the host's time that counts
  double calls;    // a call takes that many times the measured seconds of the host
  double slowed;   // the kernel takes that many times the measured seconds
  double longest;  // seconds of the host that no queue of a device hides

  Waiting(const PickRules &rules, const Shape (&shapes)[kStrategies], bool new_ids) {
    const bool pages = of_pages(rules, shapes);
    const bool brief = shapes[kStaged].nbytes <= rules.short_most;
    exposed = rules.idle != 0 || (brief && !pages);
    part = rules.idle != 0 && brief ? rules.short_part : rules.part;
    calls = new_ids ? rules.new_calls : 1.0;
    slowed = pages && rules.idle == 0 ? rules.alone_rate / rules.kernel_rate : 1.0;
    longest = rules.long_seconds;
  }

  double seconds(int64_t strategy, const Seconds &cost) const {
    if (std::isnan(cost.device)) return std::numeric_limits<double>::infinity();
    const double device = strategy == kZeroCopy ? cost.device * slowed : cost.device;
    const double call = calls * cost.host;
    const bool counts = exposed || cost.host >= longest || call > device;
    return counts ? device + part * call : device;
  }
};

int64_t answer(int64_t strategy, int64_t reason) { return strategy | reason << 4; }

// Return the candidate that occupies the host least of the quickest and its equals.
int64_t quickest(const PickRules &rules, const Waiting &waiting,
                 const Seconds (&costs)[kStrategies], int64_t candidates, bool kernel_excluded) {
  double seconds[kStrategies];
  double least = std::numeric_limits<double>::infinity();
  for (int64_t strategy = 0; strategy < kStrategies; strategy++) {
    seconds[strategy] = waiting.seconds(strategy, costs[strategy]);
    if ((candidates & bit(strategy)) != 0) least = std::min(least, seconds[strategy]);
  }
  const double limit = least * (1 + rules.equal);
  const auto host = [&](int64_t strategy) {
    return std::isnan(costs[strategy].device) ? 0.0 : costs[strategy].host;
  };
  int64_t best = -1;
  int64_t equals = 0;
  for (int64_t strategy = 0; strategy < kStrategies; strategy++) {
    if ((candidates & bit(strategy)) == 0 || seconds[strategy] > limit) continue;
    equals |= bit(strategy);
    if (best < 0 || host(strategy) < host(best)) best = strategy;
  }
  int64_t result = answer(best, kMeasured);
  if (several(equals)) result |= PORTAKV_PICK_SEVERAL;
  if (waiting.exposed) result |= PORTAKV_PICK_EXPOSED;
  if (waiting.slowed > 1 && best != kZeroCopy) result |= PORTAKV_PICK_SLOWED;
  if (kernel_excluded && seconds[kZeroCopy] < seconds[best]) result |= PORTAKV_PICK_QUICKER;
  return result;
}

// Return the strategy for a copy on a device that was not measured, if all were candidates.
//
// kernel  the terms allow a kernel to move the copy
// engine  `batched_memcpy` can move the copy without a wait
int64_t default_rule(const PickRules &rules, const Shape (&shapes)[kStrategies], bool kernel,
                     bool engine) {
  if (engine && rules.idle == 0 && of_pages(rules, shapes)) {
    // A caller waits no longer for a copy engine than for a kernel of few thread blocks.
    const auto nbytes = static_cast<double>(shapes[kZeroCopy].nbytes);
    const double by_engine = rules.engine_call + nbytes / rules.engine_rate;
    const double by_kernel = rules.kernel_call + nbytes / rules.kernel_rate;
    if (by_engine <= by_kernel) return answer(kBatchedMemcpy, kRulePages);
  }
  const Shape &staged = shapes[kStaged];
  const Shape &whole = shapes[kBatchedMemcpy];
  if (kernel && whole.nbytes <= rules.rule_most) return answer(kZeroCopy, kRuleSmall);
  if (kernel && staged.run_bytes() < rules.narrow) return answer(kZeroCopy, kRuleNarrow);
  if (whole.run_bytes() >= rules.wide) return answer(kBatchedMemcpy, kRuleWide);
  if (whole.run_bytes() >= rules.even && whole.runs <= staged.runs) {
    return answer(kBatchedMemcpy, kRuleEven);
  }
  return answer(kStaged, kRuleGathered);
}

}  // namespace

int64_t Shape::run_bytes() const {
  return std::max<int64_t>(1, nbytes / std::max<int64_t>(1, runs));
}

int64_t pick(const PickRules &rules, const double *costs, const Shape (&shapes)[kStrategies],
             int64_t out, int64_t waits, bool new_ids) {
  int64_t able = 0;
  for (int64_t strategy = 0; strategy < kStrategies; strategy++) {
    if (shapes[strategy].runs >= 0) able |= bit(strategy);
  }
  able &= ~out;
  // While a model runs, a kernel of few thread blocks costs less than a host that waits.
  const int64_t others = able & ~kKernel;
  const bool all_wait = others != 0 && (others & ~waits) == 0 && rules.detached == 0;
  const bool kernel_excluded = !all_wait && excluded(rules, shapes[kStaged]);
  const int64_t flags = kernel_excluded ? PORTAKV_PICK_EXCLUDED : 0;

  Seconds found[kStrategies];
  look_up(rules, costs, shapes, found);
  if (able == 0) return PORTAKV_PICK_NONE;

  const int64_t allowed = kernel_excluded ? others : able;
  const int64_t waitless = allowed & ~waits;
  const int64_t candidates = waitless != 0 ? waitless : allowed;
  if (allowed == 0) return answer(first_of(able), kExcludedAlone) | flags;
  if (waitless != 0 && !several(waitless) && several(allowed)) {
    return answer(first_of(waitless), kWaitless) | flags;
  }
  if (!several(allowed)) return answer(first_of(allowed), kLeft) | flags;

  for (int64_t strategy = 0; strategy < kStrategies; strategy++) {
    if ((allowed & bit(strategy)) == 0 || std::isnan(found[strategy].device)) continue;
    const Waiting waiting(rules, shapes, new_ids);
    const bool kernel_able = kernel_excluded && (able & kKernel) != 0;
    return quickest(rules, waiting, found, candidates, kernel_able) | flags;
  }
  const bool engine = (candidates & bit(kBatchedMemcpy)) != 0;
  const int64_t wanted = default_rule(rules, shapes, !kernel_excluded, engine);
  if ((candidates & bit(wanted & 15)) != 0) return wanted | flags;
  return answer(first_of(candidates), kGentlest) | flags;
}

int64_t pick(const PickedCopies &copies, const double *costs, int64_t groups, int64_t host_groups,
             int64_t count, int64_t out, int64_t waits, bool new_ids) {
  const auto plan = [](int64_t words) { return read_plan(reinterpret_cast<const int64_t *>(words)); };
  const int64_t units = count / copies.unit;
  const int64_t nbytes = product(count, copies.token_bytes);
  const RunCount whole = count_runs(plan(copies.plan), units, groups, copies.limits);
  const RunCount host = count_runs(plan(copies.host_plan), units, host_groups, copies.limits);
  const int64_t unmerged = product(units, copies.runs_per_unit);
  const Shape dense{nbytes, host.runs, host.pieces};
  const Shape shapes[kStrategies] = {
      dense,
      {nbytes, whole.runs, whole.pieces},
      {nbytes, unmerged, unmerged},  // a kernel follows the plan's loops, and merges nothing
      dense,
  };
  return pick(copies.rules, costs, shapes, out, waits, new_ids);
}

}  // namespace portakv

using namespace portakv;

int64_t portakv_pick(const int64_t *words, const double *costs, const int64_t *shapes, int64_t out,
                     int64_t waits, int new_ids) {
  PickRules rules;
  Shape copied[kStrategies];
  std::memcpy(&rules, words, sizeof rules);
  std::memcpy(copied, shapes, sizeof copied);
  return pick(rules, costs, copied, out, waits, new_ids != 0);
}

int64_t portakv_pick_copy(const int64_t *words, const double *costs, int64_t groups,
                          int64_t host_groups, int64_t count, int64_t out, int64_t waits,
                          int new_ids) {
  return guarded([&] {
    PickedCopies copies;
    std::memcpy(&copies, words, sizeof copies);
    if (count < 0 || groups < 1 || host_groups < 1) throw Malformed("a copy has no such groups");
    return pick(copies, costs, groups, host_groups, count, out, waits, new_ids != 0);
  });
}

void portakv_cost(const double *columns, double run_bytes, double runs, double *out) {
  CostColumns read(columns);
  const Seconds seconds = between(read, read.count(), run_bytes, std::max(1.0, runs));
  out[0] = seconds.device;
  out[1] = seconds.host;
}
