// SPDX-License-Identifier: Apache-2.0
// The form of a view in the core: where rows lie relative to the view's addresses, in bytes.
//
// Forms, plans and everything in them cross the border to Python as int64 words. The comment of
// each struct gives its words in their order; "steps" are a count and then so many `Step`s. The
// structs mirror the dataclasses of portakv/view/form.py.
#ifndef PORTAKV_FORM_H
#define PORTAKV_FORM_H

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "few.h"

namespace portakv {

// The words do not describe anything that the core can work with: a count out of bounds, steps
// that do not reach every position, or a product past 64 bits.
struct Malformed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// No layout needs a tenth of these; they bound what one call can allocate and what `detail` holds.
constexpr int64_t kMostSteps = 16;    // of one axis
constexpr int64_t kMostParts = 4096;  // of one form

// Return a product; raise `Malformed` where it passes 64 bits.
inline int64_t product(int64_t a, int64_t b) {
  int64_t result = 0;
#if defined(__GNUC__)
  const bool past = __builtin_mul_overflow(a, b, &result);
#else
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  const bool past = b != 0 && (a > most / (b < 0 ? -b : b) || a < -(most / (b < 0 ? -b : b)));
  result = past ? 0 : a * b;
#endif
  if (past) throw Malformed("a product passes 64 bits");
  return result;
}

// Return a difference; raise `Malformed` where it passes 64 bits.
inline int64_t difference(int64_t a, int64_t b) {
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  constexpr int64_t least = std::numeric_limits<int64_t>::min();
  const bool past = b < 0 ? a > most + b : a < least + b;
  if (past) throw Malformed("a difference passes 64 bits");
  return a - b;
}

// Return a sum of numbers that are not negative; raise `Malformed` where it passes 64 bits.
inline int64_t sum(int64_t a, int64_t b) {
  if (a > std::numeric_limits<int64_t>::max() - b) throw Malformed("a sum passes 64 bits");
  return a + b;
}

// One factor of an axis. Words: extent, table, stride.
//
// `extent` 0 means unbounded: blocks, or the tokens of a chunk. `table` counts entries of the
// address table, `stride` counts bytes.
struct Step {
  int64_t extent;
  int64_t table;
  int64_t stride;
};

inline bool operator==(const Step &a, const Step &b) {
  return a.extent == b.extent && a.table == b.table && a.stride == b.stride;
}
inline bool operator!=(const Step &a, const Step &b) { return !(a == b); }

// The steps of an axis, outermost first: a view of words or of a list that outlives it.
struct Steps {
  const Step *first = nullptr;
  size_t count = 0;

  Steps() = default;
  Steps(const Step *first_, size_t count_) : first(first_), count(count_) {}
  Steps(const std::vector<Step> &steps) : first(steps.data()), count(steps.size()) {}
  template <size_t N>
  Steps(const Few<Step, N> &steps) : first(steps.data()), count(steps.size()) {}

  const Step *begin() const { return first; }
  const Step *end() const { return first + count; }
  const Step &operator[](size_t i) const { return first[i]; }
};

inline bool operator==(const Steps &a, const Steps &b) {
  if (a.count != b.count) return false;
  for (size_t i = 0; i < a.count; i++) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

// The axes of loops, by the digits that name them in words.
enum Axis : int64_t { kLayer = 1, kBlock = 2, kToken = 3, kHead = 4, kDim = 5, kKv = 6 };

// The rows of one kv: an origin, and the steps of each axis. Words: table, offset, then the steps
// of layer, block, token, head and dim.
struct Part {
  int64_t table;
  int64_t offset;
  Steps axes[5];

  const Steps &axis(Axis name) const { return axes[name - kLayer]; }
};

// A view without addresses and counts. Words: kv, layers, heads, block_size, opaque, alignment,
// then a width for each kv, then a part for each kv.
//
// A form looks into the words that it was read from: they outlive it.
struct Form {
  int64_t layers;
  int64_t heads;
  int64_t block_size;  // 0: not paged
  bool opaque;         // only whole pages move
  int64_t alignment;   // the largest power of two up to 16 that divides all addresses
  const int64_t *widths;
  Few<Part, 2> parts;
};

// Reads words from the first one on.
class Reader {
 public:
  explicit Reader(const int64_t *words) : next_(words) {}

  int64_t word() { return *next_++; }

  // Return a count; raise `Malformed` unless it lies between 0 and `most`.
  int64_t count(int64_t most) {
    const int64_t result = word();
    if (result < 0 || result > most) throw Malformed("a count is out of bounds");
    return result;
  }

  const int64_t *words(int64_t count) {
    const int64_t *result = next_;
    next_ += count;
    return result;
  }

  Steps steps(int64_t most = kMostSteps) {
    static_assert(sizeof(Step) == 3 * sizeof(int64_t), "a step is three words");
    const int64_t n = count(most);
    const Steps result(reinterpret_cast<const Step *>(words(3 * n)), static_cast<size_t>(n));
    for (const Step &step : result) {
      if (step.extent < 0) throw Malformed("an extent is negative");
    }
    return result;
  }

 private:
  const int64_t *next_;
};

// Writes words into a buffer of the caller, and counts those that it has no room for.
class Writer {
 public:
  Writer(int64_t *out, int64_t capacity) : out_(out), capacity_(capacity) {}

  void word(int64_t value) {
    if (count_ < capacity_) out_[count_] = value;
    count_++;
  }

  void steps(const Steps &steps) {
    word(static_cast<int64_t>(steps.count));
    for (const Step &step : steps) {
      word(step.extent);
      word(step.table);
      word(step.stride);
    }
  }

  // Return the words so far: more than the capacity if the buffer is too small.
  int64_t count() const { return count_; }

 private:
  int64_t *out_;
  int64_t capacity_;
  int64_t count_ = 0;
};

inline Form read_form(const int64_t *words) {
  Reader reader(words);
  const int64_t kv = reader.count(kMostParts);
  Form form;
  form.layers = reader.word();
  form.heads = reader.word();
  form.block_size = reader.word();
  form.opaque = reader.word() != 0;
  form.alignment = reader.word();
  form.widths = reader.words(kv);
  form.parts.resize(static_cast<size_t>(kv));
  for (Part &part : form.parts) {
    part.table = reader.word();
    part.offset = reader.word();
    for (Steps &axis : part.axes) axis = reader.steps();
  }
  return form;
}

inline void write_form(const Form &form, Writer &writer) {
  writer.word(static_cast<int64_t>(form.parts.size()));
  writer.word(form.layers);
  writer.word(form.heads);
  writer.word(form.block_size);
  writer.word(form.opaque);
  writer.word(form.alignment);
  for (size_t k = 0; k < form.parts.size(); k++) writer.word(form.widths[k]);
  for (const Part &part : form.parts) {
    writer.word(part.table);
    writer.word(part.offset);
    for (const Steps &axis : part.axes) writer.steps(axis);
  }
}

}  // namespace portakv

#endif
