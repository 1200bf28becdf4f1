// SPDX-License-Identifier: Apache-2.0
// Views: tensors that are read through a bound layout become a form, entries and spans.
//
// Nothing here knows Python. native/core/tensors.h reads Python's tensors.
#ifndef PORTAKV_VIEW_H
#define PORTAKV_VIEW_H

#include <cstdint>

#include "few.h"
#include "form.h"

namespace portakv {

// The tensors contradict the layout or the declared extents. Python looks for the sentence.
struct Contradiction {};

// The bytes of a slot of a packed view are not contiguous.
struct SlotsApart {};

// The axes of the layout language, in the order of `AXES` in portakv/layout/language.py.
enum Name : int64_t { kNameLayer, kNameKv, kNameBlock, kNameToken, kNameHead, kNameDim, kNamePage };
constexpr size_t kNames = 7;

// A whole axis, its quotient by `n` or its remainder. Words: axis, part, n.
enum Portion : int64_t { kWhole, kQuotient, kRemainder };
struct Factor {
  int64_t axis;
  int64_t part;
  int64_t n;
};

// A container level or a tensor dimension: its factors, outermost first. Words: a count and so
// many factors.
struct Group {
  const Factor *first;
  size_t count;

  const Factor *begin() const { return first; }
  const Factor *end() const { return first + count; }
};

// More dimensions than a tensor of torch has.
constexpr int64_t kMostGroups = 64;

// The container levels or the dimensions of a layout.
struct Groups {
  const Group *first;
  size_t count;

  const Group *begin() const { return first; }
  const Group *end() const { return first + count; }
  const Group &operator[](size_t g) const { return first[g]; }
};

// A layout with its declared extents. It looks into its words, which outlive it. Words: the address
// of a PortakvTorch (0: none), kv, flags, tokens of a packed block, number of containers, number of
// dimensions, then for each kv the extents of the seven axes (-1: not declared), then the groups,
// containers first.
struct Bound {
  const void *torch;
  int64_t kv;
  bool paged;
  bool opaque;
  bool open_end;      // the last dimension may cover several ones of a tensor
  bool reinterpret;   // rows are bytes, whatever the dtype
  bool packed;        // tensors hold slots of an encoding
  bool slot_is_last;  // the slot of a packed view is the last axis
  int64_t packed_tokens;
  const int64_t *extents;
  size_t container_count;
  Few<Group, 12> groups;

  // Read the words.
  explicit Bound(const int64_t *words);

  Groups containers() const { return {groups.data(), container_count}; }
  Groups dims() const { return {groups.data() + container_count, groups.size() - container_count}; }
};

// The shape, strides (in elements) and dtype that several tensors share.
struct Kind {
  int64_t itemsize;
  int64_t dtype;  // the fields of DLPack's dtype as `dtype_word` joins them, or a number of Python
  size_t ndim;
  size_t at;  // the place of its shape in `Tensors::numbers`; the strides follow the shape
};

// The word of a dtype that DLPack describes: its code, bits and lanes.
constexpr int64_t dtype_word(int64_t code, int64_t bits, int64_t lanes) {
  return code | bits << 8 | lanes << 16;
}

// Tensors in the order in which their containers name them.
struct Tensors {
  Few<int64_t, 40> begins;  // address of the first byte; none: only containers are known
  Few<int64_t, 40> bases;   // address of the storage
  Few<size_t, 40> kinds;    // the kind of each tensor
  Few<Kind, 4> kind;
  Few<int64_t, 40> numbers;  // shapes and strides of the kinds

  const int64_t *shape(const Kind &of) const { return numbers.data() + of.at; }
  const int64_t *strides(const Kind &of) const { return numbers.data() + of.at + of.ndim; }

  // Return the number of the kind with these facts, which is new if no tensor had them.
  size_t number_of(int64_t itemsize, int64_t dtype, size_t ndim, const int64_t *shape,
                   const int64_t *strides);
};

// Bytes of memory from the first one to past the last one.
struct Span {
  int64_t first;
  int64_t past;
};

// A view as the core hands it to Python.
struct View {
  int64_t slots;
  Few<int64_t, 40> entries;  // numbers of the tensors that stay in the table
  Few<Span, 40> spans;       // sorted, disjoint
  // The words of the form, then its place, whether a table on a device alone knows the addresses,
  // and for each kv the word of the dtype (0: bytes). Equal words mean equal forms.
  Few<int64_t, 128> form;
};

// Read tensors in containers of `sizes`. `place` is a position in `PLACES` of
// portakv/view/form.py; `alignment` 0 means: of the addresses.
//
// Raises Contradiction, SlotsApart, and Malformed if a number passes 64 bits.
void read_view(const Bound &bound, const int64_t *sizes, const Tensors &tensors, int64_t place,
               bool table_on_device, int64_t alignment, View &view);

}  // namespace portakv

#endif
