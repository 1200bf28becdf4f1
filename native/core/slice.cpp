// SPDX-License-Identifier: Apache-2.0
// Slices of forms: ranges of kv, layers and heads, and the table entries that are left.
#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "core.h"
#include "few.h"
#include "form.h"
#include "guarded.h"

namespace portakv {
namespace {

constexpr int64_t kWidest = 16;  // bytes of the widest vector

// Positions of one axis.
struct Range {
  int64_t start;
  int64_t count;
};

// A range that begins or ends inside a factor of an axis.
struct CutsFactor {
  Axis axis;
};

using Axes = std::array<Few<Step, 4>, 5>;

// The rows of one kv whose steps change.
struct Rows {
  int64_t table;
  int64_t offset;
  Axes axes;

  explicit Rows(const Part &part) : table(part.table), offset(part.offset) {
    for (size_t axis = 0; axis < axes.size(); axis++) {
      axes[axis].append(part.axes[axis].first, part.axes[axis].count);
    }
  }

  Few<Step, 4> &axis(Axis name) { return axes[name - kLayer]; }
};

// Move the origin to a position of an axis.
void move(Rows &rows, const Few<Step, 4> &steps, int64_t position) {
  for (size_t i = steps.size(); i-- > 0;) {
    const Step &step = steps[i];
    const int64_t at = step.extent != 0 ? position % step.extent : position;
    position = step.extent != 0 ? position / step.extent : 0;
    rows.table += product(at, step.table);
    rows.offset += product(at, step.stride);
  }
}

// Keep only a range of the positions of an axis.
void cut(Rows &rows, Axis name, Range range) {
  const Few<Step, 4> steps = rows.axis(name);
  int64_t whole = 1;
  for (const Step &step : steps) whole = product(whole, step.extent);
  if (range.count == whole) return;
  move(rows, steps, range.start);

  // From the innermost step on, whole steps stay. The first step that is longer than the rest of the
  // positions is cut, and has to contain them.
  Few<Step, 4> &left = rows.axis(name);  // innermost first, until it is whole
  left.clear();
  int64_t size = range.count;  // in units of the step that is looked at
  int64_t below = 1;           // positions of that unit
  for (size_t i = steps.size(); i-- > 0;) {
    const Step &step = steps[i];
    if (step.extent == 0) throw Malformed("an axis of layers or heads is unbounded");
    if (size <= step.extent) {
      const int64_t first = range.start / below % step.extent;
      if (range.start % below != 0 || first + size > step.extent) break;
      if (size > 1) left.push_back(Step{size, step.table, step.stride});
      std::reverse(left.begin(), left.end());
      return;
    }
    if (size % step.extent != 0) break;
    left.push_back(step);
    size /= step.extent;
    below *= step.extent;
  }
  throw CutsFactor{name};
}

// Return the table entries that rows reach, counted from their first on. `count` is the number of
// steps of the unbounded axis.
std::vector<int64_t> entries_of(const Rows &rows, int64_t count) {
  std::vector<int64_t> entries{0};
  for (const Few<Step, 4> &steps : rows.axes) {
    int64_t bounded = 1;
    for (const Step &step : steps) bounded = product(bounded, step.extent != 0 ? step.extent : 1);
    for (const Step &step : steps) {
      if (step.table == 0) continue;
      const int64_t extent = step.extent != 0 ? step.extent : count / bounded;
      std::vector<int64_t> reached;
      reached.reserve(entries.size() * static_cast<size_t>(extent));
      for (const int64_t entry : entries) {
        for (int64_t i = 0; i < extent; i++) reached.push_back(entry + product(i, step.table));
      }
      entries = std::move(reached);
    }
  }
  return entries;
}

// A table entry that a slice uses, and the bytes that its address gains.
struct Entry {
  int64_t number;
  int64_t gained;
};

// The entries that a slice uses, in their order.
class Table {
 public:
  // `copies`: 1 if parts share entries; else entry e of the i-th part is e * copies + i.
  Table(const std::vector<Rows> &parts, int64_t count, int64_t copies) : copies_(copies) {
    // Parts that start at one entry share its address: the first part's offset goes into it.
    for (size_t i = 0; i < parts.size(); i++) starts_.push_back(start_of(parts[i], i));
    for (size_t i = 0; i < parts.size(); i++) {
      const size_t first = static_cast<size_t>(
          std::find(starts_.begin(), starts_.end(), starts_[i]) - starts_.begin());
      moved_.push_back(parts[first].offset);
      for (const int64_t entry : entries_of(parts[i], count)) {
        entries_.push_back({starts_[i] + product(copies, entry), moved_[i]});
      }
    }
    // Of parts that reach one entry, the last part decides.
    const auto before = [](const Entry &a, const Entry &b) { return a.number < b.number; };
    std::stable_sort(entries_.begin(), entries_.end(), before);
    size_t used = 0;
    for (size_t i = 0; i < entries_.size(); i++) {
      const bool last = i + 1 == entries_.size() || entries_[i + 1].number != entries_[i].number;
      if (last) entries_[used++] = entries_[i];
    }
    entries_.resize(used);
    if (entries_.empty()) throw Malformed("a slice reaches no entry of its table");
  }

  const std::vector<Entry> &entries() const { return entries_; }

  // Number the entries of a part anew: those that no part reaches are gone.
  void renumber(Rows &rows, size_t part) const {
    for (Few<Step, 4> &steps : rows.axes) {
      for (Step &step : steps) {
        step.table = place_of(entries_[0].number + product(copies_, step.table));
      }
    }
    rows.table = place_of(starts_[part]);
    rows.offset -= moved_[part];
  }

 private:
  int64_t start_of(const Rows &rows, size_t part) const {
    return product(rows.table, copies_) + static_cast<int64_t>(part) % copies_;
  }

  // Return how many entries come before one.
  int64_t place_of(int64_t number) const {
    const auto before = [](const Entry &entry, int64_t wanted) { return entry.number < wanted; };
    return std::lower_bound(entries_.begin(), entries_.end(), number, before) - entries_.begin();
  }

  int64_t copies_;
  std::vector<int64_t> starts_;
  std::vector<int64_t> moved_;  // the bytes that the address of each part's first entry gains
  std::vector<Entry> entries_;
};

// Return how many entries of the slice an entry of the view becomes: parts with one address whose
// distance changes from layer to layer get separate entries.
int64_t copies_of(const std::vector<Rows> &parts, bool fewer_layers) {
  std::vector<int64_t> tables;
  bool drift = false;
  for (const Rows &rows : parts) {
    tables.push_back(rows.table);
    drift = drift || !(Steps(rows.axes[0]) == Steps(parts[0].axes[0]));
  }
  std::sort(tables.begin(), tables.end());
  const bool shared = std::adjacent_find(tables.begin(), tables.end()) != tables.end();
  return fewer_layers && shared && drift ? static_cast<int64_t>(parts.size()) : 1;
}

int64_t slice(const Form &form, int64_t count, Range kv, Range layers, Range heads, Writer &out) {
  std::vector<Rows> parts;
  for (int64_t k = kv.start; k < kv.start + kv.count; k++) {
    parts.emplace_back(form.parts[static_cast<size_t>(k)]);
    cut(parts.back(), kHead, heads);
  }

  // The strides of the layers count, so that slices of any layer have one alignment and form.
  const bool fewer_layers = layers.count < form.layers;
  int64_t bits = kWidest | form.alignment;
  for (Rows &rows : parts) {
    bits |= rows.offset;
    if (!fewer_layers) continue;
    for (const Step &step : rows.axis(kLayer)) bits |= step.stride;
  }

  const int64_t copies = copies_of(parts, fewer_layers);
  for (Rows &rows : parts) cut(rows, kLayer, layers);
  const Table table(parts, count, copies);
  for (size_t i = 0; i < parts.size(); i++) table.renumber(parts[i], i);

  out.word(copies);
  out.word(static_cast<int64_t>(table.entries().size()));
  for (const Entry &entry : table.entries()) {
    out.word(entry.number);
    out.word(entry.gained);
  }
  Form sliced{layers.count, heads.count, form.block_size, form.opaque, bits & -bits,
              form.widths + kv.start, {}};
  for (const Rows &rows : parts) {
    Part part{rows.table, rows.offset, {}};
    for (size_t axis = 0; axis < rows.axes.size(); axis++) part.axes[axis] = rows.axes[axis];
    sliced.parts.push_back(part);
  }
  write_form(sliced, out);
  return out.count();
}

}  // namespace
}  // namespace portakv

using namespace portakv;

int64_t portakv_form_slice(const int64_t *form, int64_t count, const int64_t *ranges, int64_t *out,
                           int64_t capacity) {
  return guarded([&]() -> int64_t {
    Writer writer(out, capacity);
    const auto range = [&](int number) { return Range{ranges[2 * number], ranges[2 * number + 1]}; };
    try {
      return slice(read_form(form), count, range(0), range(1), range(2), writer);
    } catch (const CutsFactor &cuts) {
      return cuts.axis == kHead ? PORTAKV_SLICE_HEADS : PORTAKV_SLICE_LAYERS;
    }
  });
}
