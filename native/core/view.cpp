// SPDX-License-Identifier: Apache-2.0
// Reads tensors through a bound layout. The subject of each step is an axis of the layout: its
// extent is solved first, then its steps through the table of addresses and through memory.
#include "view.h"

#include <algorithm>
#include <cstring>

#include "core.h"

namespace portakv {
namespace {

constexpr int64_t kUnknown = -1;

bool is_bytes(int64_t dtype) {
  return dtype == dtype_word(0, 8, 1) || dtype == dtype_word(1, 8, 1);
}

int64_t sum(int64_t a, int64_t b) {
  if (a > 0 ? b > std::numeric_limits<int64_t>::max() - a
            : b < std::numeric_limits<int64_t>::min() - a) {
    throw Malformed("a sum passes 64 bits");
  }
  return a + b;
}

void require(bool fits) {
  if (!fits) throw Contradiction();
}

// Return the axis whose extent is not part of a form: blocks, or the tokens of a chunk.
int64_t growing(const Bound &bound) { return bound.paged ? kNameBlock : kNameToken; }

bool grows(const Bound &bound, const Group &group) {
  for (const Factor &factor : group) {
    if (factor.axis == growing(bound)) return true;
  }
  return false;
}

// --- Extents ----------------------------------------------------------------------------------

// The extents of all axes for each kv, which are solved from the sizes of groups.
class Extents {
 public:
  explicit Extents(const Bound &bound) : bound_(bound) {
    known_.append(bound.extents, static_cast<size_t>(bound.kv) * kNames);
  }

  int64_t of(size_t k, int64_t axis) const { return known_[k * kNames + axis]; }

  // Return the extent of a factor, kUnknown while its axis is unknown.
  int64_t of(size_t k, const Factor &factor) const {
    if (factor.part == kRemainder) return factor.n;
    const int64_t extent = of(k, factor.axis);
    if (extent == kUnknown || factor.part == kWhole) return extent;
    require(extent % factor.n == 0);
    return extent / factor.n;
  }

  // Complete the extents from the size of each group for each kv: sizes[group * kv + k].
  void solve(const Groups &groups, const int64_t *sizes) {
    static_assert(kMostGroups == 64, "a bit of `settled` for each group");
    uint64_t settled = 0;
    size_t pending = groups.count;
    while (pending) {
      const size_t before = pending;
      for (size_t g = 0; g < groups.count; g++) {
        const uint64_t bit = uint64_t{1} << g;
        if (!(settled & bit) && settle(groups[g], sizes + g * static_cast<size_t>(bound_.kv))) {
          settled |= bit;
          pending--;
        }
      }
      require(pending < before);  // else several axes of one dimension are unknown
    }
    check();
  }

 private:
  // Check one group, or solve its one unknown axis; return false while two are unknown.
  bool settle(const Group &group, const int64_t *sizes) {
    const size_t kv = static_cast<size_t>(bound_.kv);
    const Factor *unknown = nullptr;
    for (const Factor &factor : group) {
      bool known = true;
      for (size_t k = 0; k < kv; k++) known &= of(k, factor) != kUnknown;
      if (known) continue;
      if (unknown) return false;
      unknown = &factor;
    }
    known_parts(group);
    for (size_t k = 0; k < kv; k++) {
      const int64_t expected = parts_[k];
      // A known factor of extent 0 fits no size: only an unknown axis may be empty.
      require(expected > 0);
      require(unknown ? sizes[k] % expected == 0 : sizes[k] == expected);
      if (unknown) {
        const int64_t steps = sizes[k] / expected;
        known_[k * kNames + unknown->axis] =
            unknown->part == kWhole ? steps : product(steps, unknown->n);
      }
    }
    return true;
  }

  // Set `parts_` to the product of the known extents for each kv. The kv of a group follow each
  // other, and may differ in size.
  void known_parts(const Group &group) {
    const size_t kv = static_cast<size_t>(bound_.kv);
    parts_.assign(kv, 1);
    for (const Factor *factor = group.end(); factor-- != group.begin();) {
      if (factor->axis == kNameKv) {
        int64_t all = 0;
        for (int64_t part : parts_) all = sum(all, part);
        parts_.assign(kv, all);
        continue;
      }
      for (size_t k = 0; k < kv; k++) {
        const int64_t extent = of(k, *factor);
        if (extent != kUnknown) parts_[k] = product(parts_[k], extent);
      }
    }
  }

  // Only what grows may be empty, and kv may differ in their width alone.
  void check() const {
    const size_t kv = static_cast<size_t>(bound_.kv);
    for (size_t k = 0; k < kv; k++) {
      for (size_t axis = 0; axis < kNames; axis++) {
        require(of(k, axis) != 0 || static_cast<int64_t>(axis) == growing(bound_));
      }
      for (int64_t axis : {kNameLayer, kNameBlock, kNameToken, kNameHead}) {
        require(of(k, axis) == of(0, axis));
      }
    }
  }

  const Bound &bound_;
  Few<int64_t, 4 * kNames> known_;
  Few<int64_t, 4> parts_;
};

// --- Containers -------------------------------------------------------------------------------

// An axis of the grid of tensors that the containers make.
struct GridAxis {
  Factor factor;
  size_t extent;
  size_t stride;       // tensors from one position to the next
  bool collapsed;      // its tensors follow each other at equal distances
  int64_t table;       // entries from one position to the next
  int64_t *distances;  // bytes from one position to the next, for each kv
};

class Grid {
 public:
  Grid(const Bound &bound, const Extents &extents, size_t tensors)
      : kv_(static_cast<size_t>(bound.kv)) {
    for (const Group &group : bound.containers()) {
      for (const Factor &factor : group) {
        const int64_t extent = extents.of(0, factor);
        const size_t steps = extent > 0 ? static_cast<size_t>(extent) : 1;
        axes_.push_back({factor, steps, 1, false, 0, nullptr});
      }
    }
    size_t stride = 1;
    for (size_t at = axes_.size(); at-- > 0;) {
      axes_[at].stride = stride;
      stride *= axes_[at].extent;
    }
    require(stride == tensors);
    distances_.assign(axes_.size() * kv_, 0);
    for (size_t at = 0; at < axes_.size(); at++) axes_[at].distances = &distances_[at * kv_];
  }
  Grid(const Grid &) = delete;
  Grid &operator=(const Grid &) = delete;

  const Few<GridAxis, 4> &axes() const { return axes_; }

  // Find the number of the first tensor of each kv; all tensors of a kv are of one kind.
  void pick(const Tensors &tensors, Few<size_t, 4> &picks) const {
    const GridAxis *split = nullptr;
    for (const GridAxis &axis : axes_) {
      if (axis.factor.axis == kNameKv) split = &axis;
    }
    picks.assign(kv_, 0);
    require(!split || split->extent == kv_);
    for (size_t k = 0; split && k < kv_; k++) picks[k] = k * split->stride;
    if (tensors.kind.size() == 1) return;
    for (size_t n = 0; n < tensors.kinds.size(); n++) {
      const size_t k = split ? n / split->stride % split->extent : 0;
      require(tensors.kinds[n] == tensors.kinds[picks[k]]);
    }
  }

  // Collapse the grid into the smallest table, and list the tensors that stay entries.
  //
  // Tensors of one allocation at equal distances become a stride, so that a block that is
  // contiguous over all layers is one run. The others stay a table. Addresses without tensors stay
  // one too: nothing shows which of them lie in one allocation.
  void tabulate(const Tensors &tensors, Few<int64_t, 40> &numbers) {
    // Blocks stand outermost: then no step of another axis depends on how many there are.
    const auto rank = [](const GridAxis &axis) {
      return axis.factor.axis == kNameBlock ? 0 : axis.factor.axis == kNameToken ? 1 : 2;
    };
    std::stable_sort(axes_.begin(), axes_.end(), [&](const GridAxis &a, const GridAxis &b) {
      return rank(a) < rank(b);
    });
    for (GridAxis &axis : axes_) {
      // Memory objects come and go: whether they lie at equal distances must not change a form.
      if (!tensors.begins.empty() && rank(axis) == 2) collapse(axis, tensors);
    }

    int64_t entries = 1;
    for (size_t at = axes_.size(); at-- > 0;) {
      if (axes_[at].collapsed) continue;
      axes_[at].table = entries;
      entries *= static_cast<int64_t>(axes_[at].extent);
    }
    numbers.reserve(static_cast<size_t>(entries));
    visit(nullptr, [&](size_t number, size_t) {
      numbers.push_back(static_cast<int64_t>(number));
      return true;
    });
  }

 private:
  void collapse(GridAxis &axis, const Tensors &tensors) {
    Few<int64_t, 4> distances;
    distances.assign(kv_, kUnknown);
    const bool equal = visit(&axis, [&](size_t number, size_t k) {
      for (size_t i = 1; i < axis.extent; i++) {
        const size_t next = number + axis.stride;
        const int64_t distance = tensors.begins[next] - tensors.begins[number];
        // Torch has no negative strides, so descending tensors stay a table.
        if (distance < 0 || tensors.bases[next] != tensors.bases[number]) return false;
        if (distances[k] == kUnknown) distances[k] = distance;
        if (distances[k] != distance) return false;
        number = next;
      }
      return true;
    });
    if (!equal) return;
    // An axis of kv, or a grid without one, has one distance for all kv.
    for (size_t k = 0; k < kv_; k++) {
      const int64_t own = distances[k] != kUnknown ? distances[k] : distances[0];
      axis.distances[k] = own == kUnknown ? 0 : own;
    }
    axis.collapsed = true;
  }

  // Call `use` with the number and the kv of each tensor at the first position of `fixed` and of
  // collapsed axes, the last axis fastest, until it returns false; return whether it never did.
  template <typename Use>
  bool visit(const GridAxis *fixed, const Use &use) const {
    if (axes_.empty()) return use(0, 0);
    Few<size_t, 4> at;
    at.assign(axes_.size(), 0);
    size_t number = 0;
    size_t k = 0;
    while (true) {
      if (!use(number, k)) return false;
      size_t axis = axes_.size();
      while (true) {
        if (axis-- == 0) return true;
        const GridAxis &moved = axes_[axis];
        if (moved.collapsed || &moved == fixed) continue;
        const bool is_kv = moved.factor.axis == kNameKv;
        number += moved.stride;
        k += is_kv;
        if (++at[axis] < moved.extent) break;
        number -= moved.stride * moved.extent;
        if (is_kv) k = 0;
        at[axis] = 0;
      }
    }
  }

  size_t kv_;
  Few<GridAxis, 4> axes_;
  Few<int64_t, 16> distances_;
};

// --- Dimensions -------------------------------------------------------------------------------

// Write the sizes and the strides (in elements) of the dimensions that a layout names, each
// `apart` words apart. The last dimension of a layout may cover several ones of the tensor.
void read_dims(const Bound &bound, const Tensors &tensors, const Kind &kind, int64_t *sizes,
               int64_t *strides, size_t apart) {
  const size_t named = bound.dims().count;
  require(kind.ndim >= named && (kind.ndim == named || bound.open_end));
  const int64_t *shape = tensors.shape(kind);
  const int64_t *stride = tensors.strides(kind);
  for (size_t g = 0; g < named; g++) {
    sizes[g * apart] = shape[g];
    strides[g * apart] = stride[g];
  }
  if (kind.ndim == named) return;

  // Join the dimensions from the innermost one on; they are contiguous together.
  int64_t size = shape[kind.ndim - 1];
  int64_t step = stride[kind.ndim - 1];
  for (size_t d = kind.ndim - 1; d-- > named - 1;) {
    require(shape[d] == 1 || size == 1 || stride[d] == product(size, step));
    if (size == 1) step = stride[d];
    size = product(shape[d], size);
  }
  sizes[(named - 1) * apart] = size;
  strides[(named - 1) * apart] = step;
}

// --- Parts ------------------------------------------------------------------------------------

// The steps of one kv by axis: the whole axis or its quotient first, then its remainder.
struct PartSteps {
  int64_t table = 0;
  int64_t offset = 0;
  Step steps[kNames][2];
  bool present[kNames][2] = {};

  void set(const Factor &factor, int64_t extent, int64_t entries, int64_t stride) {
    const bool inner = factor.part == kRemainder;
    steps[factor.axis][inner] = {extent, entries, stride};
    present[factor.axis][inner] = true;
  }
};

int64_t extent_or_0(const Extents &extents, size_t k, const Factor &factor) {
  return std::max<int64_t>(extents.of(k, factor), 0);
}

// Add the steps of one dimension for kv `k`; `stride` is in bytes. The planes of a dimension that
// contains kv follow each other, and may differ in width. `spans` is room for a number of each kv.
void add_dimension(PartSteps &part, const Bound &bound, const Extents &extents, const Group &group,
                   int64_t stride, size_t k, Few<int64_t, 4> &spans) {
  const size_t kv = static_cast<size_t>(bound.kv);
  spans.assign(kv, stride);  // for each kv, the bytes of the factors further in
  for (const Factor *factor = group.end(); factor-- != group.begin();) {
    if (factor->axis == kNameKv) {
      int64_t all = 0;
      for (size_t other = 0; other < kv; other++) {
        if (other == k) part.offset = sum(part.offset, all);
        all = sum(all, spans[other]);
      }
      spans.assign(kv, all);
      continue;
    }
    part.set(*factor, extent_or_0(extents, k, *factor), 0, spans[k]);
    if (factor == group.begin()) break;  // no factor lies further out
    for (size_t other = 0; other < kv; other++) {
      spans[other] = product(spans[other], extent_or_0(extents, other, *factor));
    }
  }
}

// Join neighbours that form one step, and drop steps of extent 1; return how many are left.
size_t merge_steps(Step *steps, size_t count) {
  size_t merged = 0;
  for (size_t i = 0; i < count; i++) {
    const Step step = steps[i];
    if (merged) {
      Step &last = steps[merged - 1];
      if (last.table == product(step.extent, step.table) &&
          last.stride == product(step.extent, step.stride)) {
        last = {product(last.extent, step.extent), step.table, step.stride};
        continue;
      }
    }
    if (step.extent != 1) steps[merged++] = step;
  }
  return merged;
}

void write_part(const Bound &bound, PartSteps &part, int64_t itemsize, int64_t width,
                Few<int64_t, 128> &words) {
  part.steps[growing(bound)][0].extent = 0;
  const int64_t innermost = bound.opaque ? kNamePage : kNameDim;
  words.push_back(part.table);
  words.push_back(part.offset);
  for (int64_t axis : {int64_t{kNameLayer}, int64_t{kNameBlock}, int64_t{kNameToken},
                       int64_t{kNameHead}, innermost}) {
    Step steps[3];
    size_t count = 0;
    for (size_t inner : {0, 1}) {
      if (part.present[axis][inner]) steps[count++] = part.steps[axis][inner];
    }
    if (axis == innermost) steps[count++] = {itemsize, 0, 1};  // the bytes of an element
    count = merge_steps(steps, count);
    if (bound.packed && axis == innermost) {
      if (count != 1 || steps[0] != Step{width, 0, 1}) throw SlotsApart();
    }
    words.push_back(static_cast<int64_t>(count));
    for (size_t i = 0; i < count; i++) {
      words.push_back(steps[i].extent);
      words.push_back(steps[i].table);
      words.push_back(steps[i].stride);
    }
  }
}

// --- Addresses --------------------------------------------------------------------------------

// Return the largest power of two up to 16 that divides all addresses. Torch addresses memory from
// its storage's base, so the base has to be aligned as well.
int64_t alignment_of(const Tensors &tensors) {
  int64_t bits = 16;
  for (int64_t begin : tensors.begins) bits |= begin;
  for (int64_t base : tensors.bases) bits |= base;
  return bits & -bits;
}

// Return the bytes from the first element of a tensor to past its last one.
int64_t reach(const Tensors &tensors, const Kind &kind) {
  const int64_t *shape = tensors.shape(kind);
  const int64_t *strides = tensors.strides(kind);
  int64_t elements = 1;
  for (size_t d = 0; d < kind.ndim; d++) {
    if (shape[d] == 0) return 0;
    elements = sum(elements, product(shape[d] - 1, strides[d]));
  }
  return product(elements, kind.itemsize);
}

void find_spans(const Tensors &tensors, Few<Span, 40> &spans) {
  if (tensors.begins.empty()) return;
  size_t kind = 0;
  int64_t length = reach(tensors, tensors.kind[kind]);
  spans.reserve(tensors.begins.size());
  for (size_t n = 0; n < tensors.begins.size(); n++) {
    if (tensors.kinds[n] != kind) {
      kind = tensors.kinds[n];
      length = reach(tensors, tensors.kind[kind]);
    }
    if (length) spans.push_back({tensors.begins[n], sum(tensors.begins[n], length)});
  }
  std::sort(spans.begin(), spans.end(),
            [](const Span &a, const Span &b) { return a.first < b.first; });
  size_t merged = 0;
  for (const Span &span : spans) {
    // Equal spans overlap too; spans that only touch may be separate allocations.
    if (merged && span.first < spans[merged - 1].past) {
      spans[merged - 1].past = std::max(spans[merged - 1].past, span.past);
    } else {
      spans[merged++] = span;
    }
  }
  spans.resize(merged);
}

// Check that tensors can hold slots of an encoding: bytes, with a slot as the last axis.
void check_slots(const Bound &bound, const Tensors &tensors) {
  for (const Kind &kind : tensors.kind) {
    require(kind.itemsize == 1 && (bound.reinterpret || is_bytes(kind.dtype)));
    if (!bound.slot_is_last) continue;
    const int64_t last = kind.ndim ? tensors.shape(kind)[kind.ndim - 1] : 0;
    bool fits = false;
    for (int64_t k = 0; k < bound.kv; k++) fits |= bound.extents[k * kNames + kNameDim] == last;
    require(fits);
  }
}

}  // namespace

Bound::Bound(const int64_t *words) {
  Reader reader(words);
  torch = reinterpret_cast<const void *>(static_cast<uintptr_t>(reader.word()));
  kv = reader.count(kMostParts);
  const int64_t flags = reader.word();
  paged = flags & 1;
  opaque = flags & 2;
  open_end = flags & 4;
  reinterpret = flags & 8;
  packed = flags & 16;
  slot_is_last = flags & 32;
  packed_tokens = reader.word();
  const int64_t containers = reader.count(kMostGroups);
  const int64_t dims = reader.count(kMostGroups);
  container_count = static_cast<size_t>(containers);
  extents = reader.words(kv * static_cast<int64_t>(kNames));
  groups.reserve(static_cast<size_t>(containers + dims));
  for (int64_t g = 0; g < containers + dims; g++) {
    const int64_t factors = reader.word();
    const int64_t *first = reader.words(3 * factors);
    static_assert(sizeof(Factor) == 3 * sizeof(int64_t), "a factor is three words");
    groups.push_back({reinterpret_cast<const Factor *>(first), static_cast<size_t>(factors)});
  }
}

size_t Tensors::number_of(int64_t itemsize, int64_t dtype, size_t ndim, const int64_t *sizes,
                          const int64_t *steps) {
  const size_t nbytes = ndim * sizeof(int64_t);
  for (size_t n = 0; n < kind.size(); n++) {
    const Kind &known = kind[n];
    if (known.itemsize == itemsize && known.dtype == dtype && known.ndim == ndim &&
        (!ndim || (std::memcmp(shape(known), sizes, nbytes) == 0 &&
                   std::memcmp(strides(known), steps, nbytes) == 0))) {
      return n;
    }
  }
  kind.push_back({itemsize, dtype, ndim, numbers.size()});
  numbers.append(sizes, ndim);
  numbers.append(steps, ndim);
  return kind.size() - 1;
}

void read_view(const Bound &bound, const int64_t *sizes, const Tensors &tensors, int64_t place,
               bool table_on_device, int64_t alignment, View &view) {
  const size_t kv = static_cast<size_t>(bound.kv);
  if (bound.packed) check_slots(bound, tensors);

  Extents extents(bound);
  Few<int64_t, 16> of_groups;  // the size of each group for each kv
  for (size_t g = 0; g < bound.container_count; g++) {
    for (size_t k = 0; k < kv; k++) of_groups.push_back(sizes[g]);
  }
  extents.solve(bound.containers(), of_groups.data());
  Grid grid(bound, extents, tensors.kinds.size());
  Few<size_t, 4> picks;
  grid.pick(tensors, picks);

  const Groups dims = bound.dims();
  of_groups.resize(dims.count * kv);
  Few<int64_t, 16> strides;
  strides.resize(dims.count * kv);
  for (size_t k = 0; k < kv; k++) {
    const Kind &kind = tensors.kind[tensors.kinds[picks[k]]];
    read_dims(bound, tensors, kind, of_groups.data() + k, strides.data() + k, kv);
  }
  extents.solve(dims, of_groups.data());
  grid.tabulate(tensors, view.entries);
  find_spans(tensors, view.spans);

  const int64_t tokens = extents.of(0, kNameToken);
  const int64_t blocks = extents.of(0, kNameBlock);
  view.slots = blocks == kUnknown ? tokens : product(tokens, blocks);
  int64_t block_size = bound.paged ? tokens : 0;
  if (bound.packed) {
    view.slots = product(view.slots, bound.packed_tokens);
    block_size = bound.packed_tokens;
  }
  Few<int64_t, 128> &words = view.form;
  words.push_back(bound.kv);
  words.push_back(extents.of(0, kNameLayer));
  words.push_back(extents.of(0, kNameHead));
  words.push_back(block_size);
  words.push_back(bound.opaque || bound.packed);
  words.push_back(alignment ? alignment : alignment_of(tensors));
  for (size_t k = 0; k < kv; k++) {
    const Kind &kind = tensors.kind[tensors.kinds[picks[k]]];
    const int64_t width = extents.of(k, bound.opaque ? kNamePage : kNameDim);
    words.push_back(product(width, kind.itemsize));
  }
  Few<int64_t, 4> spans;
  for (size_t k = 0; k < kv; k++) {
    const Kind &kind = tensors.kind[tensors.kinds[picks[k]]];
    PartSteps part;
    for (const GridAxis &axis : grid.axes()) {
      if (axis.factor.axis == kNameKv) {
        part.table = static_cast<int64_t>(k) * axis.table;
        part.offset = product(static_cast<int64_t>(k), axis.distances[k]);
      } else {
        part.set(axis.factor, extent_or_0(extents, k, axis.factor), axis.table, axis.distances[k]);
      }
    }
    for (size_t g = 0; g < dims.count; g++) {
      // No copy steps through a dimension of one position, whose stride may be any number.
      const bool still = of_groups[g * kv + k] == 1 && !grows(bound, dims[g]);
      const int64_t stride = still ? 0 : product(strides[g * kv + k], kind.itemsize);
      add_dimension(part, bound, extents, dims[g], stride, k, spans);
    }
    write_part(bound, part, kind.itemsize, words[6 + k], words);
  }

  words.push_back(place);
  words.push_back(table_on_device);
  const bool typed = !(bound.opaque || bound.reinterpret || bound.packed);
  for (size_t k = 0; k < kv; k++) {
    const int64_t dtype = tensors.kind[tensors.kinds[picks[k]]].dtype;
    words.push_back(typed && !is_bytes(dtype) ? dtype : 0);
  }
}

}  // namespace portakv

using namespace portakv;

int64_t portakv_view_read(const int64_t *bound, const int64_t *sizes, const int64_t *tensors,
                          int64_t place, int64_t table_on_device, int64_t alignment, int64_t *out,
                          int64_t capacity) {
  try {
    Tensors read;
    Reader reader(tensors);
    const int64_t count = reader.word();
    const int64_t kinds = reader.word();
    const bool addressed = reader.word() != 0;
    for (int64_t n = 0; n < count; n++) {
      if (addressed) {
        read.begins.push_back(reader.word());
        read.bases.push_back(reader.word());
      }
      read.kinds.push_back(static_cast<size_t>(reader.count(kinds - 1)));
    }
    for (int64_t n = 0; n < kinds; n++) {
      const int64_t itemsize = reader.word();
      const int64_t dtype = reader.word();
      const size_t ndim = static_cast<size_t>(reader.word());
      read.kind.push_back({itemsize, dtype, ndim, read.numbers.size()});
      const int64_t *numbers = reader.words(2 * static_cast<int64_t>(ndim));
      read.numbers.append(numbers, 2 * ndim);
    }
    View view;
    read_view(Bound(bound), sizes, read, place, table_on_device != 0, alignment, view);
    Writer writer(out, capacity);
    writer.word(view.slots);
    writer.word(static_cast<int64_t>(view.entries.size()));
    writer.word(static_cast<int64_t>(view.spans.size()));
    writer.word(static_cast<int64_t>(view.form.size()));
    for (int64_t entry : view.entries) writer.word(entry);
    for (const Span &span : view.spans) {
      writer.word(span.first);
      writer.word(span.past);
    }
    for (int64_t word : view.form) writer.word(word);
    return writer.count();
  } catch (const Contradiction &) {
    return PORTAKV_VIEW_CONTRADICTION;
  } catch (const SlotsApart &) {
    return PORTAKV_VIEW_SLOTS_APART;
  } catch (const std::exception &) {
    return PORTAKV_VIEW_PAST_64_BITS;
  }
}
