// SPDX-License-Identifier: Apache-2.0
// Lists of ids in host memory, as the core reads them.
#ifndef PORTAKV_IDS_H
#define PORTAKV_IDS_H

#include <cstdint>
#include <cstring>

#include "core.h"

namespace portakv {

// No view has this slot, and a distance from it does not pass 64 bits. An id past it counts as it.
constexpr int64_t kPastAnyView = int64_t{1} << 62;

// Reads ids of one type that lie next to each other, at any address.
template <typename Id>
struct DenseIds {
  const char *data;

  int64_t operator[](int64_t place) const {
    Id id;
    std::memcpy(&id, data + place * static_cast<int64_t>(sizeof(Id)), sizeof(Id));
    return id;
  }
};

// Reads ids of 4 or 8 bytes that lie at any stride.
struct SpacedIds {
  const char *data;
  int64_t stride;
  int64_t width;

  int64_t operator[](int64_t place) const {
    const char *at = data + place * stride;
    return width == 4 ? DenseIds<int32_t>{at}[0] : DenseIds<int64_t>{at}[0];
  }
};

// Return function(ids) with the reader that fits the list. Readers of dense ids are the fast ones.
template <typename Function>
auto with_ids(const portakv_ids &list, Function function) {
  const char *data = static_cast<const char *>(list.data);
  if (list.width == 8 && list.stride == 8) return function(DenseIds<int64_t>{data});
  if (list.width == 4 && list.stride == 4) return function(DenseIds<int32_t>{data});
  return function(SpacedIds{data, list.stride, list.width});
}

// Collects whether ids are negative or above `last`, without branches.
struct Odd {
  uint64_t last;
  uint64_t signs;

  explicit Odd(int64_t last_)
      : last(static_cast<uint64_t>(last_)), signs(last_ < 0 ? ~uint64_t{0} : 0) {}

  // The first bit of either word is set by a negative id, or else by an id above `last`.
  void add(int64_t id) { signs |= static_cast<uint64_t>(id) | (last - static_cast<uint64_t>(id)); }

  // Add so many ids from a place on: compilers use vectors for loops of a constant length.
  static constexpr int64_t kTogether = 16;
  template <typename Ids>
  void add_together(const Ids &ids, int64_t place) {
    Odd odd = *this;
    for (int64_t i = 0; i < kTogether; i++) odd.add(ids[place + i]);
    signs = odd.signs;
  }

  bool any() const { return signs >> 63 != 0; }
};

// The places of the ids that positions use: from `first` on, before `past`. Both lie in the list.
struct Places {
  int64_t first;
  int64_t past;

  explicit Places(const portakv_ids &list);

  int64_t count() const { return past - first; }
};

// Check the ids that the positions of a list use, in a view of `slots` slots; return a code.
// `distinct`: no slot may occur twice. `fault` is written with PAST and TWICE; it may be null.
// Raises std::bad_alloc.
int check_ids(const portakv_ids &list, int64_t slots, bool distinct, portakv_ids_fault *fault);

}  // namespace portakv

#endif
