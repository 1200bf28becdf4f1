// SPDX-License-Identifier: Apache-2.0
// Read lists of ids, check them, and expand them to slots.
#include "ids.h"

#include "guarded.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace portakv {

Places::Places(const portakv_ids &list) : first(0), past(0) {
  if (list.data == nullptr || list.length <= 0 || list.offset < 0 || list.count <= 0) return;
  if (list.step <= 0 || list.step > kPastAnyView) return;
  if (list.offset >= kPastAnyView || list.count >= kPastAnyView) return;
  const int64_t end = list.offset + list.count;
  first = std::min(list.offset / list.step, list.length);
  past = std::min((end - 1) / list.step + 1, list.length);
}

namespace {

// --- Python's lists -----------------------------------------------------------------------------

// The functions of Python's stable ABI that read a list, found in the process: the library links
// without Python, and one file serves every release.
struct Interpreter {
  int64_t (*size)(void *list);
  void *(*item)(void *list, intptr_t place);  // a borrowed reference
  long long (*value)(void *number, int *overflow);
  const void *int_type;
  int64_t type_word;  // the word of an object that holds its type

  bool complete() const { return type_word >= 0; }
  const void *type_of(void *object) const { return static_cast<void **>(object)[type_word]; }
};

template <typename Function>
void look_up(Function &function, const char *name) {
#if defined(_WIN32)
  (void)name;
  function = nullptr;
#else
  function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
#endif
}

Interpreter find_interpreter() {
  Interpreter python{};
  python.type_word = -1;
  void *(*make)(long) = nullptr;
  void (*release)(void *) = nullptr;
  look_up(python.size, "PyList_Size");
  look_up(python.item, "PyList_GetItem");
  look_up(python.value, "PyLong_AsLongLongAndOverflow");
  look_up(python.int_type, "PyLong_Type");
  look_up(make, "PyLong_FromLong");
  look_up(release, "Py_DecRef");
  if (!python.size || !python.item || !python.value || !python.int_type || !make || !release) {
    return python;
  }

  // The type follows the count of references, which is longer in free-threaded builds.
  void *number = make(1);
  for (int64_t word = 0; word < 4 && python.type_word < 0; word++) {
    if (static_cast<void **>(number)[word] == python.int_type) python.type_word = word;
  }
  release(number);
  return python;
}

int read_list(const portakv_ids_list_call &call) {
  static const Interpreter python = find_interpreter();
  if (!python.complete() || python.size(call.list) != call.length) return PORTAKV_MALFORMED;
  for (int64_t place = 0; place < call.length; place++) {
    void *item = python.item(call.list, place);
    // bool and numpy's integers have other types.
    if (item == nullptr || python.type_of(item) != python.int_type) return PORTAKV_MALFORMED;
    int overflow = 0;
    call.out[place] = python.value(item, &overflow);
    if (overflow) return PORTAKV_MALFORMED;
  }
  return 0;
}

// --- One pass over the ids ----------------------------------------------------------------------

// Return the largest id of a view, or -1.
int64_t last_id(int64_t slots, int64_t step) { return slots < step ? -1 : slots / step - 1; }

template <typename Ids>
bool any_negative(const Ids &ids, Places places) {
  uint64_t signs = 0;
  for (int64_t place = places.first; place < places.past; place++) {
    signs |= static_cast<uint64_t>(ids[place]);
  }
  return signs >> 63 != 0;
}

// The ids that a pass has seen, with a byte for each id of the view. Another thread may change the
// ids meanwhile, so each id is compared with the bounds when it is added.
class SeenBytes {
 public:
  explicit SeenBytes(int64_t last)
      : size_(static_cast<uint64_t>(last + 1)), seen_(new uint8_t[size_]()) {}

  // Return true if the id was added before. Ids past the last one are not noted.
  bool add(int64_t id) {
    if (static_cast<uint64_t>(id) >= size_) return false;
    return std::exchange(seen_[static_cast<size_t>(id)], uint8_t{1}) != 0;
  }

 private:
  uint64_t size_;
  std::unique_ptr<uint8_t[]> seen_;
};

// The same for ids that are few in comparison with the view: a table of at least two entries for
// each id, where an id lies in the first free entry from its hash on.
class SeenTable {
 public:
  explicit SeenTable(int64_t most) {
    int bits = 1;
    while ((int64_t{1} << bits) < 2 * most) bits++;
    const size_t size = size_t{1} << bits;
    shift_ = 64 - bits;
    last_ = size - 1;
    entries_.reset(new int64_t[size]);
    std::memset(entries_.get(), 0xFF, size * sizeof(int64_t));
    static_assert(kFree == -1, "bytes of 0xFF");
  }

  bool add(int64_t id) {
    // The golden ratio spreads ids at any even distance. The shift before it breaks the distances
    // whose multiples it would map to neighbours.
    const uint64_t number = static_cast<uint64_t>(id);
    const uint64_t hash = (number ^ (number >> 15)) * 0x9E3779B97F4A7C15u;
    size_t at = static_cast<size_t>(hash >> shift_);
    while (entries_[at] != kFree) {
      if (entries_[at] == id) return true;
      at = (at + 1) & last_;
    }
    entries_[at] = id;
    return false;
  }

 private:
  static constexpr int64_t kFree = -1;  // no id that is added is negative

  int shift_;
  size_t last_;
  std::unique_ptr<int64_t[]> entries_;
};

// Return function(seen) with what notes so many ids up to `last` fastest. Bytes are faster than a
// table of no less memory.
template <typename Function>
auto with_seen(int64_t count, int64_t last, Function function) {
  if (last < 16 * count) return function(SeenBytes(std::max<int64_t>(last, -1)));
  return function(SeenTable(count));
}

// What one pass over ids has found.
struct Found {
  bool odd;    // an id is negative or above the last one
  bool twice;  // an id from 0 to the last one occurs twice; the pass ended there
};

template <typename Ids>
Found look(const Ids &ids, Places places, int64_t last, bool distinct) {
  Odd odd(last);
  if (!distinct) {
    int64_t place = places.first;
    for (; place + Odd::kTogether <= places.past; place += Odd::kTogether) {
      odd.add_together(ids, place);
    }
    for (; place < places.past; place++) odd.add(ids[place]);
    return {odd.any(), false};
  }

  // Ids that ascend are the usual case that needs no memory.
  int64_t ascending = places.first;
  int64_t before = -1;
  for (; ascending < places.past && ids[ascending] > before; ascending++) {
    before = ids[ascending];
    odd.add(before);
  }
  if (ascending == places.past) return {odd.any(), false};

  return with_seen(places.count(), last, [&](auto seen) -> Found {
    for (int64_t place = places.first; place < places.past; place++) {
      const int64_t id = ids[place];
      odd.add(id);
      if (id >= 0 && seen.add(id)) return {true, true};
    }
    return {odd.any(), false};
  });
}

// --- What is wrong ------------------------------------------------------------------------------

// The tokens of an id that positions use: only those of the first and of the last id may be cut.
struct Tokens {
  int64_t first;
  int64_t past;
};

Tokens tokens_of(const portakv_ids &list, Places places, int64_t place) {
  const int64_t end = (list.offset + list.count - 1) % list.step + 1;
  const bool is_last = place == (list.offset + list.count - 1) / list.step;
  return {place == places.first ? list.offset % list.step : 0, is_last ? end : list.step};
}

// Find the first position whose slot is past the end, and the first id that is.
template <typename Ids>
bool find_past(const Ids &ids, const portakv_ids &list, Places places, int64_t slots,
               portakv_ids_fault &fault) {
  const int64_t last = last_id(slots, list.step);
  const int64_t clip = kPastAnyView / list.step;
  bool found = false;
  for (int64_t place = places.first; place < places.past; place++) {
    const int64_t id = ids[place];
    if (id <= last || id < 0) continue;
    if (fault.past_place < 0) {
      fault.past_place = place;
      fault.past_id = id;
    }

    // An id that the view's end cuts is valid if only its first tokens are used.
    const Tokens tokens = tokens_of(list, places, place);
    const int64_t slot = std::min(id, clip) * list.step;
    const int64_t token = std::max(tokens.first, slots - slot);
    if (token < tokens.past) {
      fault.position = place * list.step + token - list.offset;
      fault.slot = slot + token;
      fault.id = id;
      found = true;
      break;
    }
  }
  return found;
}

struct Occurrence {
  int64_t id;
  int64_t place;
};

// Find the smallest slot that occurs twice, and the first id that occurs again.
template <typename Ids>
bool find_twice(const Ids &ids, const portakv_ids &list, Places places, portakv_ids_fault &fault) {
  std::vector<Occurrence> found;
  for (int64_t place = places.first; place < places.past; place++) {
    if (ids[place] >= 0) found.push_back({ids[place], place});
  }
  std::sort(found.begin(), found.end(), [](const Occurrence &a, const Occurrence &b) {
    return a.id != b.id ? a.id < b.id : a.place < b.place;
  });

  bool twice = false;
  fault.again_place = -1;
  for (size_t first = 0, past = 0; first < found.size(); first = past) {
    const int64_t id = found[first].id;
    while (past < found.size() && found[past].id == id) past++;
    if (past - first < 2) continue;
    if (fault.again_place < 0 || found[first + 1].place < fault.again_place) {
      fault.again_id = id;
      fault.first_place = found[first].place;
      fault.again_place = found[first + 1].place;
    }
    if (twice) continue;

    // Occurrences that a cut leaves parts of may share no token.
    for (const int64_t token : {int64_t{0}, list.offset % list.step}) {
      int64_t times = 0;
      for (size_t at = first; at < past; at++) {
        const Tokens tokens = tokens_of(list, places, found[at].place);
        times += tokens.first <= token && token < tokens.past;
      }
      if (times > 1) {
        fault.slot = id * list.step + token;
        fault.times = times;
        twice = true;
        break;
      }
    }
  }
  return twice;
}

// --- Slots and repeats --------------------------------------------------------------------------

// Write the slot of each `every`-th position. Return how many the ids cover.
int64_t write_slots(const portakv_ids_slots_call &call) {
  const portakv_ids &list = call.ids;
  const Places places(list);
  if (call.every <= 0 || call.every > kPastAnyView) return 0;
  const int64_t clip = kPastAnyView / std::max<int64_t>(list.step, 1);
  return with_ids(list, [&](const auto &ids) {
    int64_t number = 0;
    int64_t place = places.first;
    int64_t token = places.count() > 0 ? list.offset % list.step : 0;
    for (int64_t position = 0; position < list.count && place < places.past;
         position += call.every) {
      const int64_t id = ids[place];
      call.out[number++] = id < 0 ? -1 : std::min(id, clip) * list.step + token;
      token += call.every;
      if (token >= list.step) {
        place += token / list.step;
        token %= list.step;
      }
    }
    return number;
  });
}

// Write the ids, with -1 for each that a later one equals. Return how many those are.
int64_t write_last(const portakv_ids_last_call &call) {
  const portakv_ids &list = call.ids;
  if (list.data == nullptr || list.length <= 0) return 0;
  return with_ids(list, [&](const auto &ids) {
    // No id of 0 or more is above the number that has the bits of all of them.
    uint64_t bits = 0;
    for (int64_t place = 0; place < list.length; place++) {
      const int64_t id = ids[place];
      bits |= id < 0 ? 0 : static_cast<uint64_t>(id);
    }
    return with_seen(list.length, static_cast<int64_t>(bits), [&](auto seen) {
      int64_t replaced = 0;
      for (int64_t place = list.length - 1; place >= 0; place--) {
        const int64_t id = ids[place];
        const bool again = id >= 0 && seen.add(id);
        replaced += again;
        if (call.out) call.out[place] = again ? -1 : id;
      }
      return replaced;
    });
  });
}

}  // namespace

int check_ids(const portakv_ids &list, int64_t slots, bool distinct, portakv_ids_fault *fault) {
  const Places places(list);
  if (places.count() <= 0) return PORTAKV_IDS_CLEAN;
  const int64_t last = last_id(slots, list.step);
  return with_ids(list, [&](const auto &ids) -> int {
    const Found found = look(ids, places, last, distinct);
    if (!found.odd) return PORTAKV_IDS_CLEAN;
    int code = any_negative(ids, places) ? PORTAKV_IDS_NEGATIVE : PORTAKV_IDS_CLEAN;
    portakv_ids_fault wrong{};
    wrong.past_place = -1;
    if (find_past(ids, list, places, slots, wrong)) {
      code = PORTAKV_IDS_PAST;
    } else if (found.twice && find_twice(ids, list, places, wrong)) {
      code = PORTAKV_IDS_TWICE;
    }
    if (code < 0 && fault) *fault = wrong;
    return code;
  });
}

}  // namespace portakv

int portakv_ids_read_list(const portakv_ids_list_call *call) { return portakv::read_list(*call); }

int portakv_ids_check(const portakv_ids_check_call *call) {
  return static_cast<int>(portakv::guarded([&] {
    return portakv::check_ids(call->ids, call->slots, call->distinct != 0, call->fault);
  }));
}

int64_t portakv_ids_slots(const portakv_ids_slots_call *call) {
  return portakv::write_slots(*call);
}

int64_t portakv_ids_last(const portakv_ids_last_call *call) {
  return portakv::guarded([&] { return portakv::write_last(*call); });
}
